"""Schedule `resident`: one program keeps all of U on chip and walks the whole sequence for BLOCK_B batch rows.

Shapes (time-major, contiguous; T steps, B batch, K groups, H hidden, G gates, S saved tiles):
    gx     [T, B, K, G*H]  input projection
    saved  [T, B, K, W, H] the S saved tiles in W words (see `tiles`)
    u      [K, G*H, H]     weight_hh          bias [K, INNER*H]  b_hh of the inner gates, or None
    y, c   [T+1, B, K, H]  states: row t+1 after step t, row 0 before the first (h0, c0: given). With reversed groups
                           [T+2, B, K, H]: theirs start in row T+1. c [1, B, K, H], the start, where nothing is saved.
                           Zero after a step that holds the row (but see `tiles.after_step`)
    mask   [T, B] uint8 codes (see `buffers`), or None
    hn, cn [K, B, H]       final states;  dhn, dcn their gradients, or None
    dy     [T, B, K, H]    or None;  dcs [T, B, K, H], of every step's c, or None
    dgx    [T, B, K, G*H];  dhu [T, B, K, INNER*H];  m [T, B, K, H] (two products)
    dh0, dc0 [K, B, H]
"""

import triton
import triton.language as tl

from .layout import load_weights, memory_rows, memory_units, read_tiles, unit_order, write_tiles
from .math import product
from .tiles import (
    add_outer,
    after_step,
    before_step,
    biases,
    cast_tiles,
    join_tuples,
    keep_rows,
    kept,
    live,
    load_mask,
    load_tiles,
    operands,
    pack_tiles,
    products,
    replace_first,
    unpack_tiles,
    walk,
)


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, hn_ptr, cn_ptr, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr, HOLDS: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, WARPS: tl.constexpr, U_IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = WARPS if WARPS * 16 < BLOCK_H else BLOCK_H // 16
    units = unit_order(BLOCK_H, W)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    # A load past the batch reads its last row instead (rows do not mix, and that one is not stored): no predicates.
    rows = memory_rows(BLOCK_B)
    row_mask = rows < B - row0
    from_rows = tl.minimum(rows, B - 1 - row0).to(tl.int32)
    tile_units = memory_units(BLOCK_H, W, y_ptr.dtype.element_ty.primitive_bitwidth // 8)
    readable = None if H == BLOCK_H else tl.broadcast_to(tile_units < H, (rows + tile_units).shape)
    mask = (tile_units < H) & row_mask
    group = tl.program_id(1).to(tl.int64)
    # Offsets inside a step are small; the step's start is a 64-bit scalar that advances.
    at_h = rows * (GROUPS * H) + tile_units
    from_h = from_rows * (GROUPS * H) + tile_units
    from_g = from_rows * (GROUPS * G * H) + tile_units
    at_state = rows * H + tile_units
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    word_units = memory_units(BLOCK_H, W, TYPE.primitive_bitwidth // 8 * SAVED_PACK)
    word_mask = (word_units < H) & row_mask
    at_s = rows * (GROUPS * WORDS * H) + word_units
    line = (row0 * GROUPS + group) * H
    state0 = (group * B + row0) * H
    step, sign = walk(group, 0, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step * per_step + line
    forth = sign * per_step
    gx_ptr += begin * G
    y_ptr += begin + per_step - forth  # row step+1 is after the step, and the one it came from before it
    u_ptr += group * (G * H * H)
    if bias_ptr is not None:
        bias_ptr += group * (INNER * H)

    if U_IN_REGISTERS:
        U = load_weights(u_ptr, G, H, BLOCK_H, W, False)
    else:
        square = units[:, None] * H + units[None, :]
        U = load_tiles(u_ptr, square, (units[:, None] < H) & (units[None, :] < H), G, H * H, TYPE)
    U = operands(U, G, TYPE, PRECISION)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), G, INNER, H)

    states = read_tiles(y_ptr, from_h, readable, 1, 0)
    if STATES == 2:
        c_ptr += line
        if SAVE:
            c_ptr += step * per_step + per_step - forth
        states = states + read_tiles(c_ptr, from_h, readable, 1, 0)
    states = cast_tiles(states, STATES, ACC)
    if SAVED > 0:
        saved_ptr += begin * WORDS
    loaded = read_tiles(gx_ptr, from_g, readable, G, H)
    code = valid
    if mask_ptr is not None:
        mask_ptr += step * B.to(tl.int64) + row0
        code = load_mask(mask_ptr, r, valid, group, REVERSED, HOLDS)

    for t in range(T):
        # The next step's inputs are asked for before this step's product, which hides their latency. Until the next
        # step nothing touches what was loaded, not even to pack it: that would wait for it here.
        # The last step asks for its own once more.
        gx_ptr += tl.where(t + 1 < T, forth * G, 0)
        loaded_next = read_tiles(gx_ptr, from_g, readable, G, H)
        if mask_ptr is not None:
            mask_ptr += sign * B
            code_next = load_mask(mask_ptr, r, tl.where(t + 1 < T, valid, False), group, REVERSED, HOLDS)
            states = keep_rows(states, kept(code, HOLDS), STATES)
        gx = cast_tiles(loaded, G, ACC)
        hu = products(U, states[0], start, 0, SPLIT, PRECISION)
        if SPLIT < G:
            m = MIDDLE(gx, hu, states, FAST)
            hu = join_tuples(hu, products(U, m, start, SPLIT, G, PRECISION), 0, G - SPLIT)
        new, saved = STEP(gx, hu, states, FAST)
        states, stored = after_step(new, states, code, group, STATES, REVERSED, HOLDS)
        y_ptr += forth
        write_tiles(y_ptr, at_h, mask, stored, 0, 1, 0)
        if SAVE and STATES == 2:
            c_ptr += forth
            write_tiles(c_ptr, at_h, mask, stored, 1, 2, 0)
        if SAVED > 0:
            words = pack_tiles(saved, SAVED, SAVED_PACK, TYPE)
            write_tiles(saved_ptr, at_s, word_mask, words, 0, WORDS, H)
            saved_ptr += forth * WORDS
        loaded = loaded_next
        if mask_ptr is not None:
            code = code_next

    write_tiles(hn_ptr + state0, at_state, mask, states, 0, 1, 0)
    if STATES == 2:
        write_tiles(cn_ptr + state0, at_state, mask, states, 1, 2, 0)


@triton.jit
def _load_step(
    dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_s, readable, readable_words,
    H: tl.constexpr, STATES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What a step of backward reads: the states before it, saved words, and dy and dcs (if any).

    A cell that does not look at h, as the LSTM, does not load it.
    """
    before = read_tiles(y_ptr, from_h, readable, 1, 0)
    if STATES == 2:
        before = before + read_tiles(c_ptr, from_h, readable, 1, 0)
    dy = ()
    if dy_ptr is not None:
        dy = read_tiles(dy_ptr, from_h, readable, 1, 0)
    dcs = ()
    if dcs_ptr is not None:
        dcs = read_tiles(dcs_ptr, from_h, readable, 1, 0)
    return before, read_tiles(saved_ptr, from_s, readable_words, WORDS, H), dy, dcs


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    dy_ptr, dcs_ptr, dhn_ptr, dcn_ptr, u_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr,
    dgx_ptr, dhu_ptr, m_ptr, dh0_ptr, dc0_ptr, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr, HOLDS: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, WARPS: tl.constexpr, U_IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = WARPS if WARPS * 16 < BLOCK_H else BLOCK_H // 16
    units = unit_order(BLOCK_H, W)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    # A load past the batch reads its last row instead (rows do not mix, and that one is not stored): no predicates.
    rows = memory_rows(BLOCK_B)
    row_mask = rows < B - row0
    from_rows = tl.minimum(rows, B - 1 - row0).to(tl.int32)
    tile_units = memory_units(BLOCK_H, W, y_ptr.dtype.element_ty.primitive_bitwidth // 8)
    readable = None if H == BLOCK_H else tl.broadcast_to(tile_units < H, (rows + tile_units).shape)
    mask = (tile_units < H) & row_mask
    group = tl.program_id(1).to(tl.int64)
    from_h = from_rows * (GROUPS * H) + tile_units
    at_h = rows * (GROUPS * H) + tile_units
    at_g = rows * (GROUPS * G * H) + tile_units
    from_state = from_rows * H + tile_units
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    word_units = memory_units(BLOCK_H, W, TYPE.primitive_bitwidth // 8 * SAVED_PACK)
    readable_words = None if H == BLOCK_H else tl.broadcast_to(word_units < H, (rows + word_units).shape)
    from_s = from_rows * (GROUPS * WORDS * H) + word_units
    at_i = rows * (GROUPS * INNER * H) + tile_units
    state0 = (group * B + row0) * H
    step, sign = walk(group, T - 1, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step * per_step + (row0 * GROUPS + group) * H
    forth = sign * per_step

    # Every pointer stands at the last step taken and walks back; y and c at the states after it.
    y_ptr += begin + per_step
    dgx_ptr += begin * G
    if dy_ptr is not None:
        dy_ptr += begin
    if dcs_ptr is not None:
        dcs_ptr += begin
    if STATES == 2:
        c_ptr += begin + per_step
    if SAVED > 0:
        saved_ptr += begin * WORDS
    if INNER > 0:
        dhu_ptr += begin * INNER
    if SPLIT < G:
        m_ptr += begin
    code = valid
    if mask_ptr is not None:
        mask_ptr += step * B.to(tl.int64) + row0
        code = load_mask(mask_ptr, r, valid, group, REVERSED, HOLDS)
    u_ptr += group * (G * H * H)

    if U_IN_REGISTERS:
        UT = load_weights(u_ptr, G, H, BLOCK_H, W, True)
    else:
        transposed = units[None, :] * H + units[:, None]
        UT = load_tiles(u_ptr, transposed, (units[:, None] < H) & (units[None, :] < H), G, H * H, TYPE)
    UT = operands(UT, G, TYPE, PRECISION)
    zero = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    dstates = (zero,)
    if dhn_ptr is not None:
        dstates = read_tiles(dhn_ptr + state0, from_state, readable, 1, 0)
    after = read_tiles(y_ptr, from_h, readable, 1, 0)
    y_ptr -= forth
    if STATES == 2:
        if dcn_ptr is not None:
            dstates = dstates + read_tiles(dcn_ptr + state0, from_state, readable, 1, 0)
        else:
            dstates = dstates + (zero,)
        after = after + read_tiles(c_ptr, from_h, readable, 1, 0)
        c_ptr -= forth
    dstates = cast_tiles(dstates, STATES, ACC)
    after = cast_tiles(after, STATES, ACC)
    loaded, words, dy, dcs = _load_step(
        dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_s, readable, readable_words, H, STATES, WORDS
    )

    for t in range(T):
        back = tl.where(t + 1 < T, forth, 0)
        y_ptr -= back
        if dy_ptr is not None:
            dy_ptr -= back
        if dcs_ptr is not None:
            dcs_ptr -= back
        if STATES == 2:
            c_ptr -= back
        if SAVED > 0:
            saved_ptr -= back * WORDS
        loaded_next, words_next, dy_next, dcs_next = _load_step(
            dy_ptr, dcs_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_s, readable, readable_words, H, STATES, WORDS
        )
        before = cast_tiles(loaded, STATES, ACC)
        saved = unpack_tiles(words, SAVED, SAVED_PACK, TYPE, ACC)
        came = before
        if mask_ptr is not None:
            # Also a step ahead for the sake of Triton, which takes the narrowest load that a product's operand comes
            # from, if it is in the same step, for the operand's own width, and shuffles all of U to match.
            mask_ptr -= sign * B
            code_next = load_mask(mask_ptr, r, tl.where(t + 1 < T, valid, False), group, REVERSED, HOLDS)
            came = keep_rows(before, kept(code, HOLDS), STATES)
        dstates = add_outer(dstates, dy, dcs, code, HOLDS)
        dm = None
        if SPLIT < G:
            d_second, m = MIDDLE(dstates, saved, came, after, FAST)
            if HOLDS:  # what d_second makes of a held row ends in before_step
                m = tl.where(live(code)[None, :], m, 0.0)
            write_tiles(m_ptr, at_h, mask, (m,), 0, 1, 0)
            m_ptr -= forth
            dm = zero
            d_second = operands(d_second, G - SPLIT, TYPE, PRECISION)
            for n in tl.static_range(SPLIT, G):
                dm = product(UT[n], d_second[n - SPLIT], dm, PRECISION)
        dgx, dhu, new = STEP(dstates, dm, saved, came, after, FAST)
        dgx, dhu, dstates = before_step(dgx, dhu, new, dstates, code, G, STATES, HOLDS)
        write_tiles(dgx_ptr, at_g, mask, dgx, 0, G, H)
        dgx_ptr -= forth * G
        if INNER > 0:
            write_tiles(dhu_ptr, at_i, mask, dhu, G - INNER, G, H)
            dhu_ptr -= forth * INNER
        dh = dstates[0]
        dhu = operands(dhu, SPLIT, TYPE, PRECISION)  # all before the first product: one barrier for them
        for n in tl.static_range(SPLIT):
            dh = product(UT[n], dhu[n], dh, PRECISION)
        dstates = replace_first(dstates, dh, STATES)
        if mask_ptr is not None:
            dstates = keep_rows(dstates, kept(code, HOLDS), STATES)
        after = before
        loaded = loaded_next
        words = words_next
        dy = dy_next
        dcs = dcs_next
        if mask_ptr is not None:
            code = code_next

    at_state = rows * H + tile_units
    write_tiles(dh0_ptr + state0, at_state, mask, dstates, 0, 1, 0)
    if STATES == 2:
        write_tiles(dc0_ptr + state0, at_state, mask, dstates, 1, 2, 0)

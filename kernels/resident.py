"""Schedule `resident`: one program keeps all of U on chip and walks the whole sequence for BLOCK_B batch rows.

Shapes (time-major, contiguous; T steps, B batch, H hidden, G gates, S saved tiles):
    gx     [T, B, G*H]  input projection
    saved  [T, B, W, H] the S saved tiles in W words (see `tiles`)
    u      [G*H, H]     weight_hh          bias [INNER*H]  b_hh of the inner gates, or None
    y, c   [T+1, B, H]  states, y[t] before step t (y[0] = h0, c[0] = c0 are given); c [1, B, H] where nothing is saved
    resets [T, B] uint8, or None: where set, the states before that step are zero
    hn, cn [B, H]       final states;  dhn, dcn their gradients, or None
    dy     [T, B, H]    or None;  dgx [T, B, G*H];  dhu [T, B, INNER*H];  m [T, B, H] (cells with a second product)
    dh0, dc0 [B, H]
"""

import triton
import triton.language as tl

from .math import product
from .tiles import (
    biases,
    cast_tiles,
    join_tuples,
    keep_rows,
    load_tiles,
    load_weights,
    memory_rows,
    memory_units,
    pack_tiles,
    products,
    read_tiles,
    replace_first,
    unit_order,
    unpack_tiles,
    write_tiles,
)


@triton.jit
def _load_keep(resets_ptr, r, valid):
    return tl.load(resets_ptr + r, mask=valid, other=0) == 0


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, y_ptr, c_ptr, saved_ptr, resets_ptr, hn_ptr, cn_ptr, T, B,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
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
    # Offsets inside a step are small; the step's start is a 64-bit scalar that advances.
    at_h = rows * H + tile_units
    from_h = from_rows * H + tile_units
    from_g = from_rows * (G * H) + tile_units
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    word_units = memory_units(BLOCK_H, W, TYPE.primitive_bitwidth // 8 * SAVED_PACK)
    word_mask = (word_units < H) & row_mask
    at_s = rows * (WORDS * H) + word_units
    per_step = B.to(tl.int64) * H
    gx_ptr += row0 * (G * H)
    y_ptr += row0 * H

    if U_IN_REGISTERS:
        U = load_weights(u_ptr, G, H, BLOCK_H, W, False)
    else:
        square = units[:, None] * H + units[None, :]
        U = load_tiles(u_ptr, square, (units[:, None] < H) & (units[None, :] < H), G, H * H, TYPE)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), G, INNER, H)

    states = read_tiles(y_ptr, from_h, readable, 1, 0)
    if STATES == 2:
        c_ptr += row0 * H
        states = states + read_tiles(c_ptr, from_h, readable, 1, 0)
    states = cast_tiles(states, STATES, ACC)
    if SAVED > 0:
        saved_ptr += row0 * (WORDS * H)
    loaded = read_tiles(gx_ptr, from_g, readable, G, H)
    keep = valid
    if resets_ptr is not None:
        resets_ptr += row0
        keep = _load_keep(resets_ptr, r, valid)

    for t in range(T):
        # The next step's inputs are asked for before this step's product, which hides their latency. Until the next
        # step nothing touches what was loaded, not even to pack it: that would wait for it here.
        # The last step asks for its own once more.
        gx_ptr += tl.where(t + 1 < T, per_step * G, 0)
        loaded_next = read_tiles(gx_ptr, from_g, readable, G, H)
        if resets_ptr is not None:
            resets_ptr += B
            keep_next = _load_keep(resets_ptr, r, tl.where(t + 1 < T, valid, False))
            states = keep_rows(states, keep, STATES)
            keep = keep_next
        gx = cast_tiles(loaded, G, ACC)
        hu = products(U, states[0], start, 0, SPLIT, PRECISION)
        if SPLIT < G:
            m = MIDDLE(gx, hu, states, FAST)
            hu = join_tuples(hu, products(U, m, start, SPLIT, G, PRECISION), 0, G - SPLIT)
        states, saved = STEP(gx, hu, states, FAST)
        y_ptr += per_step
        write_tiles(y_ptr, at_h, mask, states, 0, 1, 0)
        if SAVE and STATES == 2:
            c_ptr += per_step
            write_tiles(c_ptr, at_h, mask, states, 1, 2, 0)
        if SAVED > 0:
            words = pack_tiles(saved, SAVED, SAVED_PACK, TYPE)
            write_tiles(saved_ptr, at_s, word_mask, words, 0, WORDS, H)
            saved_ptr += per_step * WORDS
        loaded = loaded_next

    write_tiles(hn_ptr + row0 * H, at_h, mask, states, 0, 1, 0)
    if STATES == 2:
        write_tiles(cn_ptr + row0 * H, at_h, mask, states, 1, 2, 0)


@triton.jit
def _load_step(
    dy_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_s, readable, readable_words,
    H: tl.constexpr, STATES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What a step of backward reads: the states before it, saved words, and dy (if any).

    A cell that does not look at h, as the LSTM, does not load it.
    """
    before = read_tiles(y_ptr, from_h, readable, 1, 0)
    if STATES == 2:
        before = before + read_tiles(c_ptr, from_h, readable, 1, 0)
    dy = ()
    if dy_ptr is not None:
        dy = read_tiles(dy_ptr, from_h, readable, 1, 0)
    return before, read_tiles(saved_ptr, from_s, readable_words, WORDS, H), dy


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    dy_ptr, dhn_ptr, dcn_ptr, u_ptr, y_ptr, c_ptr, saved_ptr, resets_ptr,
    dgx_ptr, dhu_ptr, m_ptr, dh0_ptr, dc0_ptr, T, B,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
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
    at_h = rows * H + tile_units
    from_h = from_rows * H + tile_units
    at_g = rows * (G * H) + tile_units
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    word_units = memory_units(BLOCK_H, W, TYPE.primitive_bitwidth // 8 * SAVED_PACK)
    readable_words = None if H == BLOCK_H else tl.broadcast_to(word_units < H, (rows + word_units).shape)
    from_s = from_rows * (WORDS * H) + word_units
    at_i = rows * (INNER * H) + tile_units
    per_step = B.to(tl.int64) * H
    last = (T - 1).to(tl.int64) * per_step

    # Every pointer stands at the last step and walks back. y and c have T+1 rows of states.
    y_ptr += last + row0 * H
    dgx_ptr += last * G + row0 * (G * H)
    if dy_ptr is not None:
        dy_ptr += last + row0 * H
    if STATES == 2:
        c_ptr += last + row0 * H
    if SAVED > 0:
        saved_ptr += last * WORDS + row0 * (WORDS * H)
    if INNER > 0:
        dhu_ptr += last * INNER + row0 * (INNER * H)
    if SPLIT < G:
        m_ptr += last + row0 * H
    if resets_ptr is not None:
        resets_ptr += (T - 1).to(tl.int64) * B + row0

    if U_IN_REGISTERS:
        UT = load_weights(u_ptr, G, H, BLOCK_H, W, True)
    else:
        transposed = units[None, :] * H + units[:, None]
        UT = load_tiles(u_ptr, transposed, (units[:, None] < H) & (units[None, :] < H), G, H * H, TYPE)
    zero = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    dstates = (zero,)
    if dhn_ptr is not None:
        dstates = read_tiles(dhn_ptr + row0 * H, from_h, readable, 1, 0)
    after = read_tiles(y_ptr + per_step, from_h, readable, 1, 0)
    if STATES == 2:
        if dcn_ptr is not None:
            dstates = dstates + read_tiles(dcn_ptr + row0 * H, from_h, readable, 1, 0)
        else:
            dstates = dstates + (zero,)
        after = after + read_tiles(c_ptr + per_step, from_h, readable, 1, 0)
    dstates = cast_tiles(dstates, STATES, ACC)
    after = cast_tiles(after, STATES, ACC)
    loaded, words, dy = _load_step(
        dy_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_s, readable, readable_words, H, STATES, WORDS
    )

    for t in range(T):
        back = tl.where(t + 1 < T, per_step, 0)
        y_ptr -= back
        if dy_ptr is not None:
            dy_ptr -= back
        if STATES == 2:
            c_ptr -= back
        if SAVED > 0:
            saved_ptr -= back * WORDS
        loaded_next, words_next, dy_next = _load_step(
            dy_ptr, y_ptr, c_ptr, saved_ptr, from_h, from_s, readable, readable_words, H, STATES, WORDS
        )
        before = cast_tiles(loaded, STATES, ACC)
        saved = unpack_tiles(words, SAVED, SAVED_PACK, TYPE, ACC)
        keep = valid
        before_step = before
        if resets_ptr is not None:
            keep = _load_keep(resets_ptr, r, valid)
            before_step = keep_rows(before, keep, STATES)
            resets_ptr -= B
        if dy_ptr is not None:
            dstates = replace_first(dstates, dstates[0] + dy[0].to(ACC), STATES)
        dm = None
        if SPLIT < G:
            d_second, m = MIDDLE(dstates, saved, before_step, after, FAST)
            write_tiles(m_ptr, at_h, mask, (m,), 0, 1, 0)
            m_ptr -= per_step
            dm = zero
            for n in tl.static_range(SPLIT, G):
                dm = product(UT[n], d_second[n - SPLIT].to(UT[n].dtype), dm, PRECISION)
        dgx, dhu, dstates = STEP(dstates, dm, saved, before_step, after, FAST)
        write_tiles(dgx_ptr, at_g, mask, dgx, 0, G, H)
        dgx_ptr -= per_step * G
        if INNER > 0:
            write_tiles(dhu_ptr, at_i, mask, dhu, G - INNER, G, H)
            dhu_ptr -= per_step * INNER
        dh = dstates[0]
        for n in tl.static_range(SPLIT):
            dh = product(UT[n], dhu[n].to(UT[n].dtype), dh, PRECISION)
        dstates = replace_first(dstates, dh, STATES)
        if resets_ptr is not None:
            dstates = keep_rows(dstates, keep, STATES)
        after = before
        loaded = loaded_next
        words = words_next
        dy = dy_next

    write_tiles(dh0_ptr + row0 * H, at_h, mask, dstates, 0, 1, 0)
    if STATES == 2:
        write_tiles(dc0_ptr + row0 * H, at_h, mask, dstates, 1, 2, 0)

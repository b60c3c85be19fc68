"""Schedule `resident`: one program keeps all of U on chip and walks the whole sequence for BLOCK_B batch rows.

Shapes (time-major, contiguous; T steps, B batch, K groups, H hidden, G gates, S saved tiles):
    gx     [T, B, K, G*H]  input projection
    saved  [T, B, K, W, H] the S saved tiles in W words (see `tiles`)
    u      [K, G*H, H]     weight_hh          bias [K, INNER*H]  b_hh of the inner gates, or None
    y, c   [T+1, B, K, H]  states: row t+1 after step t, row 0 before the first (h0, c0: given). With reversed groups
                           [T+2, B, K, H]: theirs start in row T+1. c [1, B, K, H], the start, where nothing is saved
    resets [T, B] uint8, or None: where set, the states before that step are zero
    hn, cn [K, B, H]       final states;  dhn, dcn their gradients, or None
    dy     [T, B, K, H]    or None;  dgx [T, B, K, G*H];  dhu [T, B, K, INNER*H];  m [T, B, K, H] (two products)
    dh0, dc0 [K, B, H]
"""

import triton
import triton.language as tl

from .math import product
from .tiles import (
    biases,
    in_layout_of,
    join_tuples,
    keep_rows,
    load_tiles,
    pack_tiles,
    products,
    replace_first,
    store_tiles,
    unpack_tiles,
    walk,
)


@triton.jit
def _load_keep(resets_ptr, r, valid):
    return tl.load(resets_ptr + r, mask=valid, other=0) == 0


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    gx_ptr, u_ptr, bias_ptr, y_ptr, c_ptr, saved_ptr, resets_ptr, hn_ptr, cn_ptr, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, SAVE: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    units = tl.arange(0, BLOCK_H)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    mask = (units[:, None] < H) & valid[None, :]
    group = tl.program_id(1).to(tl.int64)
    # Offsets inside a step are small; the step's start is a 64-bit scalar that advances.
    at_h = r[None, :] * (GROUPS * H) + units[:, None]
    at_g = r[None, :] * (GROUPS * G * H) + units[:, None]
    at_state = r[None, :] * H + units[:, None]
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    GX_PACK: tl.constexpr = PACK if G > 1 else 1
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    at_s = r[None, :] * (GROUPS * WORDS * H) + units[:, None]
    line = (row0 * GROUPS + group) * H
    state0 = (group * B + row0) * H
    step, sign = walk(group, 0, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step * per_step + line
    forth = sign * per_step
    gx_ptr += begin * G
    y_ptr += begin + per_step - forth  # row step+1 is after the step, and the one it came from before it

    square = units[:, None] * H + units[None, :]
    u_ptr += group * (G * H * H)
    if bias_ptr is not None:
        bias_ptr += group * (INNER * H)
    U = load_tiles(u_ptr, square, (units[:, None] < H) & (units[None, :] < H), G, H * H, u_ptr.dtype.element_ty)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), G, INNER, H)

    states = (tl.load(y_ptr + at_h, mask=mask, other=0.0).to(ACC),)
    if STATES == 2:
        c_ptr += line
        if SAVE:
            c_ptr += step * per_step + per_step - forth
        states = states + (tl.load(c_ptr + at_h, mask=mask, other=0.0).to(ACC),)
    if SAVED > 0:
        saved_ptr += begin * WORDS
    loaded = load_tiles(gx_ptr, at_g, mask, G, H, TYPE)
    keep = valid
    if resets_ptr is not None:
        resets_ptr += step * B.to(tl.int64) + row0
        keep = _load_keep(resets_ptr, r, valid)

    for t in range(T):
        # The next step's inputs are asked for before this step's product, which hides their latency. Until the next
        # step nothing touches what was loaded, not even to pack it: that would wait for it here.
        ahead = tl.where(t + 1 < T, mask, False)  # not &: Triton's interpreter widens a scalar operand
        gx_ptr += forth * G
        loaded_next = load_tiles(gx_ptr, at_g, ahead, G, H, TYPE)
        if resets_ptr is not None:
            resets_ptr += sign * B
            keep_next = _load_keep(resets_ptr, r, tl.where(t + 1 < T, valid, False))
            states = keep_rows(states, keep, STATES)
            keep = keep_next
        gx_words = pack_tiles(loaded, G, GX_PACK, TYPE)
        gx_words = in_layout_of(states[0], gx_words, (G + GX_PACK - 1) // GX_PACK, GX_PACK)
        gx = unpack_tiles(gx_words, G, GX_PACK, TYPE, ACC)
        hu = products(U, states[0], start, 0, SPLIT, PRECISION)
        if SPLIT < G:
            m = MIDDLE(gx, hu, states, FAST)
            hu = join_tuples(hu, products(U, m, start, SPLIT, G, PRECISION), 0, G - SPLIT)
        states, saved = STEP(gx, hu, states, FAST)
        y_ptr += forth
        store_tiles(y_ptr, at_h, mask, states, 0, 1, 0)
        if SAVE and STATES == 2:
            c_ptr += forth
            store_tiles(c_ptr, at_h, mask, states, 1, 2, 0)
        if SAVED > 0:
            store_tiles(saved_ptr, at_s, mask, pack_tiles(saved, SAVED, SAVED_PACK, TYPE), 0, WORDS, H)
            saved_ptr += forth * WORDS
        loaded = loaded_next

    store_tiles(hn_ptr + state0, at_state, mask, states, 0, 1, 0)
    if STATES == 2:
        store_tiles(cn_ptr + state0, at_state, mask, states, 1, 2, 0)


@triton.jit
def _load_step(
    dy_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_s, mask,
    H: tl.constexpr, STATES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What a step of backward reads: dy (if any) and the last state before the step; h if that is c; saved words."""
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    # c will be packed with dy, and h alone: a cell that does not look at it, as the LSTM, then does not load it.
    pair = load_tiles(c_ptr if STATES == 2 else y_ptr, at_h, mask, 1, 0, TYPE)
    if dy_ptr is not None:
        pair = join_tuples(load_tiles(dy_ptr, at_h, mask, 1, 0, TYPE), pair, 0, 1)
    h = ()
    if STATES == 2:
        h = load_tiles(y_ptr, at_h, mask, 1, 0, TYPE)
    saved = load_tiles(saved_ptr, at_s, mask, WORDS, H, saved_ptr.dtype.element_ty)
    return pair, h, saved


@triton.jit(do_not_specialize=["T", "B"])
def backward_kernel(
    dy_ptr, dhn_ptr, dcn_ptr, u_ptr, y_ptr, c_ptr, saved_ptr, resets_ptr,
    dgx_ptr, dhu_ptr, m_ptr, dh0_ptr, dc0_ptr, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    units = tl.arange(0, BLOCK_H)
    r = tl.arange(0, BLOCK_B)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_B
    valid = r < B - row0
    mask = (units[:, None] < H) & valid[None, :]
    group = tl.program_id(1).to(tl.int64)
    at_h = r[None, :] * (GROUPS * H) + units[:, None]
    at_g = r[None, :] * (GROUPS * G * H) + units[:, None]
    at_state = r[None, :] * H + units[:, None]
    TYPE: tl.constexpr = y_ptr.dtype.element_ty
    PAIR: tl.constexpr = 1 if dy_ptr is None else 2
    PAIR_PACK: tl.constexpr = 1 if dy_ptr is None else PACK
    SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
    WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
    at_s = r[None, :] * (GROUPS * WORDS * H) + units[:, None]
    at_i = r[None, :] * (GROUPS * INNER * H) + units[:, None]
    state0 = (group * B + row0) * H
    step, sign = walk(group, T - 1, T, REVERSED)
    per_step = B.to(tl.int64) * (GROUPS * H)
    begin = step * per_step + (row0 * GROUPS + group) * H
    back = sign * per_step

    # Every pointer stands at the last step taken and walks back; y and c at the states after it.
    y_ptr += begin + per_step
    dgx_ptr += begin * G
    if dy_ptr is not None:
        dy_ptr += begin
    if STATES == 2:
        c_ptr += begin + per_step
    if SAVED > 0:
        saved_ptr += begin * WORDS
    if INNER > 0:
        dhu_ptr += begin * INNER
    if SPLIT < G:
        m_ptr += begin
    if resets_ptr is not None:
        resets_ptr += step * B.to(tl.int64) + row0

    transposed = units[None, :] * H + units[:, None]
    u_ptr += group * (G * H * H)
    UT = load_tiles(u_ptr, transposed, (units[:, None] < H) & (units[None, :] < H), G, H * H, u_ptr.dtype.element_ty)
    zero = tl.zeros([BLOCK_H, BLOCK_B], ACC)
    dh = zero
    if dhn_ptr is not None:
        dh = tl.load(dhn_ptr + state0 + at_state, mask=mask, other=0.0).to(ACC)
    dstates = (dh,)
    after = load_tiles(y_ptr, at_h, mask, 1, 0, ACC)
    y_ptr -= back
    if STATES == 2:
        dc = zero
        if dcn_ptr is not None:
            dc = tl.load(dcn_ptr + state0 + at_state, mask=mask, other=0.0).to(ACC)
        dstates = dstates + (dc,)
        after = after + load_tiles(c_ptr, at_h, mask, 1, 0, ACC)
        c_ptr -= back
    pair_loaded, h_before, saved_words = _load_step(dy_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_s, mask, H, STATES, WORDS)

    for t in range(T):
        ahead = tl.where(t + 1 < T, mask, False)
        y_ptr -= back
        if dy_ptr is not None:
            dy_ptr -= back
        if STATES == 2:
            c_ptr -= back
        if SAVED > 0:
            saved_ptr -= back * WORDS
        pair_next, h_next, saved_next = _load_step(dy_ptr, y_ptr, c_ptr, saved_ptr, at_h, at_s, ahead, H, STATES, WORDS)
        pair_words = pack_tiles(pair_loaded, PAIR, PAIR_PACK, TYPE)
        pair_words = in_layout_of(dstates[0], pair_words, (PAIR + PAIR_PACK - 1) // PAIR_PACK, PAIR_PACK)
        pair = unpack_tiles(pair_words, PAIR, PAIR_PACK, TYPE, ACC)
        before = (pair[PAIR - 1],)
        if STATES == 2:
            before = (h_before[0].to(ACC), pair[PAIR - 1])
        saved_words = in_layout_of(dstates[0], saved_words, WORDS, SAVED_PACK)
        saved = unpack_tiles(saved_words, SAVED, SAVED_PACK, TYPE, ACC)
        keep = valid
        before_step = before
        if resets_ptr is not None:
            keep = _load_keep(resets_ptr, r, valid)
            before_step = keep_rows(before, keep, STATES)
            resets_ptr -= sign * B
        if dy_ptr is not None:
            dstates = replace_first(dstates, dstates[0] + pair[0], STATES)
        dm = None
        if SPLIT < G:
            d_second, m = MIDDLE(dstates, saved, before_step, after, FAST)
            tl.store(m_ptr + at_h, m.to(m_ptr.dtype.element_ty), mask=mask)
            m_ptr -= back
            dm = zero
            for n in tl.static_range(SPLIT, G):
                dm = product(UT[n], d_second[n - SPLIT].to(UT[n].dtype), dm, PRECISION)
        dgx, dhu, dstates = STEP(dstates, dm, saved, before_step, after, FAST)
        store_tiles(dgx_ptr, at_g, mask, dgx, 0, G, H)
        dgx_ptr -= back * G
        if INNER > 0:
            store_tiles(dhu_ptr, at_i, mask, dhu, G - INNER, G, H)
            dhu_ptr -= back * INNER
        dh = dstates[0]
        for n in tl.static_range(SPLIT):
            dh = product(UT[n], dhu[n].to(UT[n].dtype), dh, PRECISION)
        dstates = replace_first(dstates, dh, STATES)
        if resets_ptr is not None:
            dstates = keep_rows(dstates, keep, STATES)
        after = before
        pair_loaded = pair_next
        h_before = h_next
        saved_words = saved_next

    store_tiles(dh0_ptr + state0, at_state, mask, dstates, 0, 1, 0)
    if STATES == 2:
        store_tiles(dc0_ptr + state0, at_state, mask, dstates, 1, 2, 0)

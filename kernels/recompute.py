"""The gates of all steps at once, from the states: what save="states" does before backward.

Given every state, the steps no longer depend on each other: the recurrent products are one GEMM (two for a cell with a
second product), and the rest is pointwise. Shapes as in `resident`, with N = T*B rows and
    hu [N, K, G*H]  the recurrent products, without biases;  m [N, K, H]  operand of the second product
"""

import triton
import triton.language as tl

from .tiles import biases, keep_rows, kept, load_mask, load_tiles, pack_tiles, store_tiles


@triton.jit(do_not_specialize=["N", "B"])
def kernel(
    gx_ptr, hu_ptr, bias_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, m_ptr, N, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, SPLIT: tl.constexpr, INNER: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr,
    PACK: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr, HOLDS: tl.constexpr,
    PHASE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """PHASE 0: m, from the first gates' products. PHASE 1: the saved tiles."""
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < N
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2)
    line = row * GROUPS + group
    at_h = (line * H)[None, :] + units[:, None]
    at_g = (line * (G * H))[None, :] + units[:, None]
    at_before = at_h
    if REVERSED > 0:  # a reversed group comes from the row after
        at_before += ((REVERSED >> group) & 1).to(tl.int64) * 2 * B * (GROUPS * H)

    states = load_tiles(y_ptr, at_before, mask, 1, 0, ACC)
    if STATES == 2:
        states = states + load_tiles(c_ptr, at_before, mask, 1, 0, ACC)
    if mask_ptr is not None:
        code = load_mask(mask_ptr, row, row_mask, group, REVERSED, HOLDS)
        states = keep_rows(states, kept(code, HOLDS), STATES)
    gx = load_tiles(gx_ptr, at_g, mask, G, H, ACC)
    if bias_ptr is not None:
        bias_ptr += group * (INNER * H)
    start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), G, INNER, H)
    products = load_tiles(hu_ptr, at_g, mask, SPLIT if PHASE == 0 else G, H, ACC)
    hu = ()
    for n in tl.static_range(SPLIT if PHASE == 0 else G):
        hu = hu + (products[n] + start[n],)
    if PHASE == 0:
        m = MIDDLE(gx, hu, states, FAST)
        tl.store(m_ptr + at_h, m.to(m_ptr.dtype.element_ty), mask=mask)
    else:
        states, saved = STEP(gx, hu, states, FAST)
        SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
        WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
        at_s = (line * (WORDS * H))[None, :] + units[:, None]
        store_tiles(saved_ptr, at_s, mask, pack_tiles(saved, SAVED, SAVED_PACK, y_ptr.dtype.element_ty), 0, WORDS, H)

"""What all steps saved, at once, from the states: what save="states" does before backward.

Given every state, the steps no longer depend on each other: the recurrent products are one GEMM an operand, and the
rest is pointwise. Shapes as in `resident`, with N = T*B rows and
    hu [N, K, products*H]  the recurrent products, without biases
    v  [N, K, level-1 operands*H], where they are published;  m [N, K, level-2 operands*H]
"""

import triton
import triton.language as tl

from .exchange import shares
from .random import draw
from .tiles import (
    apart_before,
    biases,
    first_product,
    keep_rows,
    load_mask,
    load_params,
    load_tiles,
    not_reset,
    pack_tiles,
    store_tiles,
)


@triton.jit(do_not_specialize=["N", "B"])
def kernel(
    gx_ptr, hu_ptr, bias_ptr, params_ptr, dropout_ptr, y_ptr, c_ptr, saved_ptr, mask_ptr, v_ptr, m_ptr, N, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr, STATE_OF: tl.constexpr, ADDS: tl.constexpr,
    LATE: tl.constexpr, PUBLISHED: tl.constexpr, STATES: tl.constexpr, SAVED: tl.constexpr, PARAMS: tl.constexpr,
    PACK: tl.constexpr, STEP: tl.constexpr, OPERANDS_1: tl.constexpr, OPERANDS_2: tl.constexpr, PADDING: tl.constexpr,
    PHASE: tl.constexpr, FAST: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """PHASE 0: the operands of level 1. 1: those of level 2, from the products of level 1. 2: the saved tiles."""
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < N
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2)
    line = row * GROUPS + group
    PRODUCTS: tl.constexpr = len(ADDS)
    before = line
    if REVERSED > 0:  # a reversed group comes from the row after
        before += ((REVERSED >> group) & 1).to(tl.int64) * 2 * B * GROUPS

    states = load_tiles(y_ptr, (before * H)[None, :] + units[:, None], mask, 1, 0, ACC)
    if STATES > 1:
        at_c = (before * ((STATES - 1) * H))[None, :] + units[:, None]
        states = states + load_tiles(c_ptr, at_c, mask, STATES - 1, H, ACC)
    if mask_ptr is not None:
        code = load_mask(mask_ptr, row, row_mask, group, REVERSED, PADDING)
        states = keep_rows(states, not_reset(code, PADDING), STATES)
    gx = load_tiles(gx_ptr, (line * (G * H))[None, :] + units[:, None], mask, G, H, ACC)
    params = ()
    if PARAMS > 0:
        params = load_params(params_ptr + group * (PARAMS * H), units, PARAMS, H, ACC)
    at_once = (((row % B) * GROUPS + group) * H)[None, :] + units[:, None]
    params = params + draw(dropout_ptr, at_once, DRAWN, True, ACC)
    params = params + draw(dropout_ptr, (line * H)[None, :] + units[:, None], DRAWN, False, ACC)
    params = params + shares(units, H, ACC)
    if PHASE == 0:
        v = OPERANDS_1(gx, states, params, FAST)
        store_tiles(v_ptr, (line * (LEVEL * H))[None, :] + units[:, None], mask, v, 0, LEVEL, H)
    else:
        FIRST: tl.constexpr = first_product(GATES, LEVEL)
        THERE: tl.constexpr = FIRST if PHASE == 1 else PRODUCTS
        if bias_ptr is not None:
            bias_ptr += group * (apart_before(ADDS, PRODUCTS) * H)
        start = biases(bias_ptr, units, tl.zeros([BLOCK_H, BLOCK_B], ACC), ADDS, H)
        products = load_tiles(hu_ptr, (line * (PRODUCTS * H))[None, :] + units[:, None], mask, THERE, H, ACC)
        hu = ()
        for n in tl.static_range(THERE):
            hu = hu + (products[n] + start[n],)
        if PHASE == 1:
            m = OPERANDS_2(gx, hu, states, params, FAST)
            M: tl.constexpr = len(GATES) - LEVEL
            store_tiles(m_ptr, (line * (M * H))[None, :] + units[:, None], mask, m, 0, M, H)
        else:
            states, saved = STEP(gx, hu, states, params, FAST)
            SAVED_PACK: tl.constexpr = PACK if SAVED > 1 else 1
            WORDS: tl.constexpr = (SAVED + SAVED_PACK - 1) // SAVED_PACK
            at_s = (line * (WORDS * H))[None, :] + units[:, None]
            words = pack_tiles(saved, SAVED, SAVED_PACK, y_ptr.dtype.element_ty)
            store_tiles(saved_ptr, at_s, mask, words, 0, WORDS, H)

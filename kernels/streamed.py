"""Products whose U streams from L2, for `stepwise`: in its own launches, or in launches that are nothing else.

The shapes are in `stepwise`.
"""

import triton
import triton.language as tl

from .math import operand, product
from .tiles import (
    apart_before,
    first_product,
    gate_rows,
    load_mask,
    not_reset,
    nth_step,
    split_gates,
    store_tiles,
)


@triton.jit
def stream(
    u_ptr, unit0, x_ptr, X: tl.constexpr, line, row_mask, keep, H: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U[n] @ x for the products n in FROM..TO as a tuple, streaming U [products*H, H] and x [rows, X*H] in tiles of
    BLOCK_K. If MASKED, zero in the rows where keep is false.

    One product of all their rows, unit by unit: one operand of U for the compiler to pipeline, one accumulator.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(TO - FROM)
    at_m, valid_m = gate_rows(tl.arange(0, BLOCK_H * PADDED), unit0, FROM, TO, H, PADDED)
    k = tl.arange(0, BLOCK_K)
    at_u = at_m[:, None] + k[None, :]
    at_x = line[None, :] * (X * H) + k[:, None]
    acc = tl.zeros([PADDED * BLOCK_H, BLOCK_B], ACC)
    for k0 in range(0, H, BLOCK_K):
        x = tl.load(x_ptr + at_x + k0, mask=row_mask[None, :] & (k0 + k[:, None] < H), other=0.0)
        U = tl.load(u_ptr + at_u + k0, mask=valid_m[:, None] & (k0 + k[None, :] < H), other=0.0)
        acc = product(U, x.to(U.dtype), acc, PRECISION)
    if MASKED:
        # The product and not its operand: rows do not mix. Triton gives an operand the width of the narrowest load that
        # it comes from; that of the mask's byte has no float64 product.
        acc = tl.where(keep[None, :], acc, 0.0)
    return split_gates(acc, TO - FROM, PADDED, BLOCK_H, BLOCK_B)


@triton.jit
def _accumulate_transposed(
    acc, u_ptr, d_ptr, d_stride, units, line, row_mask, H: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + the sum of U[n]^T @ d[n] over the products n in FROM..TO; d_ptr is the start of d[FROM]."""
    k = tl.arange(0, BLOCK_K)
    TILES: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    # One loop over products and tiles: one pipeline, and none is unrolled next to the others.
    for i in range((TO - FROM) * TILES):
        n = i // TILES
        ks = (i % TILES) * BLOCK_K + k
        at_d = line[None, :] * d_stride + n * H + ks[:, None]
        d = tl.load(d_ptr + at_d, mask=row_mask[None, :] & (ks[:, None] < H), other=0.0)
        at_u = ((FROM + n) * H + ks)[None, :] * H + units[:, None]
        U = tl.load(u_ptr + at_u, mask=(units[:, None] < H) & (ks[None, :] < H), other=0.0)
        acc = product(U, operand(d, U.dtype, PRECISION), acc, PRECISION)
    return acc


@triton.jit
def through(
    acc, OPERAND: tl.constexpr, SEGMENTS: tl.constexpr, u_ptr, dgx_ptr, dhu_ptr, dgx_stride, dhu_stride, units, line,
    row_mask, H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + the gradient of an operand, through U^T. dgx_ptr, dhu_ptr: where the step's gradients begin."""
    for s in tl.static_range(len(SEGMENTS) // 5):
        if SEGMENTS[5 * s] == OPERAND:
            acc = _accumulate_transposed(
                acc, u_ptr, (dhu_ptr if SEGMENTS[5 * s + 3] else dgx_ptr) + SEGMENTS[5 * s + 4] * H,
                dhu_stride if SEGMENTS[5 * s + 3] else dgx_stride, units, line, row_mask, H,
                SEGMENTS[5 * s + 1], SEGMENTS[5 * s + 1] + SEGMENTS[5 * s + 2], BLOCK_K, PRECISION,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["t", "T", "B"])
def forward_kernel(
    u_ptr, y_ptr, mask_ptr, v_ptr, hu_first_ptr, m_ptr, h_ptr, t, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    GATES: tl.constexpr, LEVEL: tl.constexpr, ADDS: tl.constexpr, PUBLISHED: tl.constexpr, PADDING: tl.constexpr,
    PHASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The recurrent products of step t, without biases, into hu_first. PHASE: their level."""
    unit0 = tl.program_id(0) * BLOCK_H
    units = unit0 + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < B
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2).to(tl.int64)
    step, sign = nth_step(group, t, T, REVERSED)
    line = row * GROUPS + group
    per_step = B.to(tl.int64) * (GROUPS * H)
    FIRST: tl.constexpr = 0 if PHASE == 1 else LEVEL
    LAST: tl.constexpr = LEVEL if PHASE == 1 else len(GATES)
    MASKED: tl.constexpr = PHASE == 1 and not PUBLISHED and mask_ptr is not None
    at_hu = ((group * B + row) * (len(ADDS) * H))[None, :] + units[:, None]
    u_ptr += group * (len(ADDS) * H * H)
    keep = row_mask
    if MASKED:
        code = load_mask(mask_ptr + step.to(tl.int64) * B, row, row_mask, group, REVERSED, PADDING)
        keep = not_reset(code, PADDING)
    if PHASE == 2:
        x_ptr = m_ptr
    elif PUBLISHED:
        x_ptr = v_ptr
    elif h_ptr is None:
        x_ptr = y_ptr + (step + 1) * per_step - sign * per_step
    else:
        x_ptr = h_ptr
    for n in tl.static_range(FIRST, LAST):
        sums = stream(
            u_ptr, unit0, x_ptr + (n - FIRST) * H, LAST - FIRST, line, row_mask, keep, H,
            first_product(GATES, n), first_product(GATES, n + 1), BLOCK_H, BLOCK_B, BLOCK_K, ACC, MASKED, PRECISION,
        )  # fmt: skip
        store_tiles(hu_first_ptr + first_product(GATES, n) * H, at_hu, mask, sums, 0, len(sums), H)


@triton.jit(do_not_specialize=["t", "T", "B"])
def backward_kernel(
    u_ptr, dgx_ptr, dhu_ptr, dv_ptr, t, T, B,
    GROUPS: tl.constexpr, REVERSED: tl.constexpr,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, GATES: tl.constexpr, LEVEL: tl.constexpr, ADDS: tl.constexpr, SEGMENTS: tl.constexpr,
    PHASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of step t's operands, into dv. PHASE 1: those of level 2; 2: those of level 1."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    row_mask = row < B
    mask = (units[:, None] < H) & row_mask[None, :]
    group = tl.program_id(2).to(tl.int64)
    step, _ = nth_step(group, t, T, REVERSED)
    line = row * GROUPS + group
    per_step = B.to(tl.int64) * (GROUPS * H)
    APART: tl.constexpr = apart_before(ADDS, len(ADDS))
    FIRST: tl.constexpr = LEVEL if PHASE == 1 else 0
    LAST: tl.constexpr = len(GATES) if PHASE == 1 else LEVEL
    at_dv = ((group * B + row) * (len(GATES) * H))[None, :] + units[:, None]
    u_ptr += group * (len(ADDS) * H * H)
    dgx_ptr += step * per_step * G
    if APART > 0:
        dhu_ptr += step * per_step * APART
    for n in tl.static_range(FIRST, LAST):
        d = through(
            tl.zeros([BLOCK_H, BLOCK_B], ACC), n, SEGMENTS, u_ptr, dgx_ptr, dhu_ptr, G * H, APART * H, units, line,
            row_mask, H, BLOCK_K, PRECISION,
        )  # fmt: skip
        store_tiles(dv_ptr + n * H, at_dv, mask, (d,), 0, 1, H)

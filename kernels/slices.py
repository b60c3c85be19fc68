"""A program's slices of U in the `grid` schedule: how they are kept on chip, and their products with what others
published."""

import triton
import triton.language as tl

from .math import operand, product
from .tiles import first_product, gate_rows, split_gates


@triton.jit
def _load_u(
    u_ptr, at_m, valid_m, k_stride, k0, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U's elements at_m[m] + k * k_stride for k0 <= k < k0 + SIZE: [M, SIZE], or [PARTS, M, SIZE / PARTS]."""
    PART: tl.constexpr = SIZE // PARTS
    if PARTS == 1:
        ks = (k0 + tl.arange(0, PART))[None, :]
        U = tl.load(u_ptr + at_m[:, None] + ks * k_stride, mask=valid_m[:, None] & (ks < K), other=0.0)
    else:
        ks = k0 + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
        mask = valid_m[None, :, None] & (ks < K)
        U = tl.load(u_ptr + at_m[None, :, None] + ks * k_stride, mask=mask, other=0.0)
    return operand(U, U.dtype, PRECISION)


@triton.jit
def _load_x(
    x_ptr, at_row, keep, k0, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The operand that meets it, from L2: [SIZE, rows], or [PARTS, SIZE / PARTS, rows]; zero where keep is false.

    Not masked where all columns exist (WHOLE): a masked load's registers are taken from the moment they are zeroed.
    """
    PART: tl.constexpr = SIZE // PARTS
    if PARTS == 1:
        ks = (k0 + tl.arange(0, PART))[:, None]
        rows = at_row[None, :]
        wanted = keep[None, :]
    else:
        ks = k0 + tl.arange(0, PARTS)[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
        rows = at_row[None, None, :]
        wanted = keep[None, None, :]
    if WHOLE:
        x = tl.load(x_ptr + rows + ks, cache_modifier=".cg")
    else:
        x = tl.load(x_ptr + rows + ks, mask=tl.broadcast_to(ks < K, (rows + ks).shape), other=0.0, cache_modifier=".cg")
    if MASKED:
        x = tl.where(wanted, x, 0.0).to(x.dtype)
    return x


@triton.jit
def _slice(
    u_ptr, at_m, valid_m, k_stride, M: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):
    """A program's rows of U, in chunks of CHUNK columns and a last one of what is left (sizes: `plan.chunks`).

    Rows below 64 would leave warps idle, or repeating each other's work: they share the inner sum instead.
    """
    PARTS: tl.constexpr = 64 // M if M < 64 else 1
    WHOLE: tl.constexpr = K // CHUNK
    REST: tl.constexpr = triton.next_power_of_2(K - WHOLE * CHUNK) if K > WHOLE * CHUNK else 0
    chunks = ()
    for n in tl.static_range(WHOLE):
        chunks = chunks + (_load_u(u_ptr, at_m, valid_m, k_stride, n * CHUNK, K, PARTS, CHUNK, PRECISION),)
    if REST > 0:
        LAST: tl.constexpr = 16 * PARTS if REST < 16 * PARTS else REST
        chunks = chunks + (_load_u(u_ptr, at_m, valid_m, k_stride, WHOLE * CHUNK, K, PARTS, LAST, PRECISION),)
    return chunks


@triton.jit
def _sum(acc, N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr):
    """The sum over the first of acc's three axes, N long (a power of two). [M, BLOCK_B]

    By halves and not tl.sum: one trip through shared memory brings a thread all its parts, and the result is free of
    the product's register layout, which the rest of the step would inherit and leave again tile by tile.
    """
    if N == 1:
        return tl.reshape(acc, [M, BLOCK_B])
    else:
        a, b = tl.split(tl.permute(tl.reshape(acc, [2, N // 2, M, BLOCK_B]), (1, 2, 3, 0)))
        return _sum(a + b, N // 2, M, BLOCK_B)


@triton.jit
def _product(
    U, x_ptr, at_row, keep, ACC: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr, K: tl.constexpr,
    CHUNK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U @ x [M, BLOCK_B], U as `_slice` returns it, x[k, row] at x_ptr + at_row + k: what others have published."""
    PARTS: tl.constexpr = 64 // M if M < 64 else 1
    WHOLE: tl.constexpr = K // CHUNK
    REST: tl.constexpr = triton.next_power_of_2(K - WHOLE * CHUNK) if K > WHOLE * CHUNK else 0
    if PARTS == 1:  # noqa: SIM108  (the compiler needs the two shapes apart)
        acc = tl.zeros([M, BLOCK_B], ACC)
    else:
        acc = tl.zeros([PARTS, M, BLOCK_B], ACC)
    for n in tl.static_range(WHOLE):
        x = _load_x(x_ptr, at_row, keep, n * CHUNK, K, PARTS, CHUNK, True, MASKED)
        acc = product(U[n], operand(x, U[n].dtype, PRECISION), acc, PRECISION)
    if REST > 0:
        LAST: tl.constexpr = 16 * PARTS if REST < 16 * PARTS else REST
        x = _load_x(x_ptr, at_row, keep, WHOLE * CHUNK, K, PARTS, LAST, False, MASKED)
        acc = product(U[WHOLE], operand(x, U[WHOLE].dtype, PRECISION), acc, PRECISION)
    return acc if PARTS == 1 else _sum(acc, PARTS, M, BLOCK_B)


@triton.jit
def _operand_slice(
    u_ptr, unit0, FROM: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's rows of the COUNT products of one operand."""
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    at_m, valid_m = gate_rows(unit0, FROM, FROM + COUNT, H, BLOCK_H, PADDED)
    return _slice(u_ptr, at_m, valid_m, 1, PADDED * BLOCK_H, H, CHUNK, PRECISION)


@triton.jit
def operand_slices(
    u_ptr, unit0, GATES: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's rows of U, a slice an operand. GATES: the products of each."""
    out = ()
    for n in tl.static_range(len(GATES)):
        first = first_product(GATES, n)
        out = out + (_operand_slice(u_ptr, unit0, first, GATES[n], H, BLOCK_H, CHUNKS[n], PRECISION),)
    return out


@triton.jit
def _operand_products(
    U, x_ptr, at_row, keep, start, FROM: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start + the COUNT products of one operand, as a tuple."""
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    acc = _product(U, x_ptr, at_row, keep, ACC, PADDED * BLOCK_H, BLOCK_B, H, CHUNK, MASKED, PRECISION)
    sums = split_gates(acc, COUNT, PADDED, BLOCK_H, BLOCK_B)
    out = ()
    for n in tl.static_range(COUNT):
        out = out + (sums[n] + start[FROM + n],)
    return out


@triton.jit
def operand_products(
    U, x_ptr, at_row, keep, start, GATES: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, H: tl.constexpr, CHUNKS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """start + the products of the operands FROM..TO, as a tuple; the operands lie side by side at x_ptr + at_row."""
    out = ()
    for n in tl.static_range(FROM, TO):
        out = out + _operand_products(
            U[n], x_ptr + (n - FROM) * H, at_row, keep, start, first_product(GATES, n), GATES[n], ACC, BLOCK_H, BLOCK_B,
            H, CHUNKS[n], MASKED, PRECISION,
        )  # fmt: skip
    return out


@triton.jit
def segment_slices(
    u_ptr, units, H: tl.constexpr, BLOCK_H: tl.constexpr, SEGMENTS: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's columns of U, a slice a segment (see `form.Segment`): five numbers in SEGMENTS."""
    out = ()
    for s in tl.static_range(len(SEGMENTS) // 5):
        rows = u_ptr + SEGMENTS[5 * s + 1] * H * H
        out = out + (_slice(rows, units, units < H, H, BLOCK_H, SEGMENTS[5 * s + 2] * H, CHUNKS[s], PRECISION),)
    return out


@triton.jit
def through_u(
    acc, UT, dgx_ptr, at_gx, dhu_ptr, at_hu, valid, OPERAND: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr, H: tl.constexpr, SEGMENTS: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (or None) + the gradient of an operand: U^T times those of its products, which all have stored."""
    for s in tl.static_range(len(SEGMENTS) // 5):
        if SEGMENTS[5 * s] == OPERAND:
            if SEGMENTS[5 * s + 3]:
                found = _product(
                    UT[s], dhu_ptr + SEGMENTS[5 * s + 4] * H, at_hu, valid, ACC, BLOCK_H, BLOCK_B,
                    SEGMENTS[5 * s + 2] * H, CHUNKS[s], False, PRECISION,
                )  # fmt: skip
            else:
                found = _product(
                    UT[s], dgx_ptr + SEGMENTS[5 * s + 4] * H, at_gx, valid, ACC, BLOCK_H, BLOCK_B,
                    SEGMENTS[5 * s + 2] * H, CHUNKS[s], False, PRECISION,
                )  # fmt: skip
            acc = found if acc is None else acc + found
    return acc

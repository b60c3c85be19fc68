"""A program's slices of U in the `grid` schedule: how they are kept on chip, and their products with what others
published."""

import triton
import triton.language as tl

from . import plan
from .exchange import complete
from .layout import in_order
from .math import INTERPRETED, operand, product
from .tiles import first_product, gate_rows, split_gates

_parts = triton.constexpr_function(plan.parts)


@triton.constexpr_function
def _run(part, dtype):
    """How many neighbours of a part's columns one thread loads of the operand: 16 bytes if there are as many."""
    return min(128 // dtype.primitive_bitwidth, part // 4)


@triton.constexpr_function
def _pair(dtype):
    """How many neighbours of the inner sum a register of the tensor cores' operands holds."""
    return 2 if dtype.primitive_bitwidth == 16 else 1


@triton.jit
def _opaque(x):
    """x (int32), of which the compiler does not know that neighbours are neighbours."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _elements(u_ptr, m, k, unit0, FROM: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    """U's elements in row m and column k of a slice (forward; COUNT 0: backward), in the shape of m and k together."""
    if COUNT > 0:
        at, valid = gate_rows(m, unit0, FROM, FROM + COUNT, H, triton.next_power_of_2(COUNT))
        at = at + k
    else:
        at = k * H + unit0 + m
        valid = unit0 + m < H
    return in_order(tl.load(u_ptr + in_order(at), mask=in_order(valid & (k < K)), other=0.0))


@triton.jit
def _load_u(
    u_ptr, unit0, k0, FROM: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    PARTS: tl.constexpr, SIZE: tl.constexpr, WARPS: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The columns k0 <= k < k0 + SIZE of a slice: [M, SIZE], or [PARTS, M, SIZE / PARTS] with a part's columns in the
    order of `_load_x`. See `_elements`.

    IN_REGISTERS: in a shape whose layout is the one the tensor cores want of their left operand (as in `layout`).
    Otherwise in one that the shared memory, which takes the order of a thread's registers, gets a good order of: with
    the parts last, so that what one instruction of the tensor cores reads lies in different banks.
    """
    PART: tl.constexpr = SIZE // PARTS
    TYPE: tl.constexpr = u_ptr.dtype.element_ty
    RUN: tl.constexpr = _run(PART, TYPE)
    PAIR: tl.constexpr = _pair(TYPE)
    TURNS: tl.constexpr = PART // (4 * RUN)
    if PARTS == 1:
        U = _elements(
            u_ptr, tl.arange(0, M)[:, None], (k0 + tl.arange(0, PART))[None, :], unit0, FROM, COUNT, H, K
        )  # fmt: skip
    elif IN_REGISTERS:
        W: tl.constexpr = WARPS if PARTS > WARPS else PARTS
        part = tl.arange(0, PARTS // W)[:, None, None, None, None, None, None, None] * W
        eight = tl.arange(0, M // 8)[None, :, None, None, None, None, None, None] * 8
        turn = tl.arange(0, TURNS)[None, None, :, None, None, None, None, None]
        if COUNT > 0:  # columns are neighbours
            part += tl.arange(0, W)[None, None, None, :, None, None, None, None]
            m = eight + tl.arange(0, 8)[None, None, None, None, :, None, None, None]
            lane = tl.arange(0, 4)[None, None, None, None, None, :, None, None]
            run = tl.arange(0, RUN)[None, None, None, None, None, None, None, :]
            k = k0 + part * PART + (turn * 4 + lane) * RUN + run
            U = _elements(u_ptr, m, k, unit0, FROM, COUNT, H, K)
            U = tl.reshape(U, [PARTS // W, M // 8, TURNS, W, 8, 4, RUN // PAIR, PAIR])
            U = tl.permute(U, [0, 3, 1, 4, 2, 6, 5, 7])
        else:  # units are, and four of a row of threads
            run = tl.arange(0, RUN // PAIR)[None, None, None, :, None, None, None, None] * PAIR
            run += tl.arange(0, PAIR)[None, None, None, None, :, None, None, None]
            part += tl.arange(0, W)[None, None, None, None, None, :, None, None]
            m = eight + _opaque(tl.arange(0, 8)[None, None, None, None, None, None, :, None])
            lane = tl.arange(0, 4)[None, None, None, None, None, None, None, :]
            U = _elements(u_ptr, m, k0 + part * PART + (turn * 4 + lane) * RUN + run, unit0, FROM, COUNT, H, K)
            U = tl.permute(U, [0, 5, 1, 6, 2, 3, 7, 4])
    elif COUNT > 0:  # columns are neighbours: [parts, M, parts, PART]
        THREADS: tl.constexpr = 128 * RUN // PART
        INNER: tl.constexpr = PARTS if THREADS >= PARTS else THREADS
        part = tl.arange(0, PARTS // INNER)[:, None, None, None] * INNER + tl.arange(0, INNER)[None, None, :, None]
        k = k0 + part * PART + tl.arange(0, PART)[None, None, None, :]
        U = _elements(u_ptr, tl.arange(0, M)[None, :, None, None], k, unit0, FROM, COUNT, H, K)
        U = tl.reshape(U, [PARTS // INNER, M, INNER, TURNS, 4, RUN // PAIR, PAIR])
        U = tl.permute(U, [0, 2, 1, 3, 5, 4, 6])
    else:  # units are neighbours: [PART, parts, M]
        k = k0 + tl.arange(0, PARTS)[None, :, None] * PART + tl.arange(0, PART)[:, None, None]
        U = _elements(u_ptr, tl.arange(0, M)[None, None, :], k, unit0, FROM, COUNT, H, K)
        U = tl.reshape(U, [TURNS, 4, RUN // PAIR, PAIR, PARTS, M])
        U = tl.permute(U, [4, 5, 0, 2, 1, 3])
    if PARTS > 1:
        U = tl.reshape(U, [PARTS, M, PART])
    return operand(U, U.dtype, PRECISION)


@triton.jit
def _load_x(
    x_ptr, last, again, k0, ROW: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The operand that meets it, from L2: [SIZE, rows], or [PARTS, SIZE / PARTS, rows] with a part's columns in an
    order of their own. ROW elements from row to row; a row past the last one reads that (rows do not mix). again: None,
    or what `exchange.complete` takes, if the operand's values are their own flags.

    Loaded in a shape whose layout, as Triton chooses it, is the one the tensor cores want of their right operand when
    reshaped (as in `layout`): a warp loads its own parts, straight into the registers of its products.

    Not masked where all columns exist (WHOLE): a masked load's registers are taken from the moment they are zeroed.
    """
    PART: tl.constexpr = SIZE // PARTS
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    if PARTS == 1:
        ks = (k0 + tl.arange(0, PART))[:, None]
        at = x_ptr + tl.minimum(tl.arange(0, BLOCK_B), last)[None, :] * ROW + ks
        if WHOLE:
            x = tl.load(at, cache_modifier=".cg")
        else:
            x = tl.load(at, mask=tl.broadcast_to(ks < K, at.shape), other=0.0, cache_modifier=".cg")
    else:
        RUN: tl.constexpr = _run(PART, TYPE)
        PAIR: tl.constexpr = _pair(TYPE)
        W: tl.constexpr = WARPS if PARTS > WARPS else PARTS
        EACH: tl.constexpr = PARTS // W
        TURNS: tl.constexpr = PART // (4 * RUN)
        part = tl.arange(0, EACH)[:, None, None, None, None, None, None] * W
        part += tl.arange(0, W)[None, None, None, :, None, None, None]
        turn = tl.arange(0, TURNS)[None, :, None, None, None, None, None]
        row = tl.arange(0, BLOCK_B // 8)[None, None, :, None, None, None, None] * 8
        row += tl.arange(0, 8)[None, None, None, None, :, None, None]
        lane = tl.arange(0, 4)[None, None, None, None, None, :, None]
        run = tl.arange(0, RUN)[None, None, None, None, None, None, :]
        k = k0 + part * PART + (turn * 4 + lane) * RUN
        ks = k + run
        # Rows before columns: what differs between a thread's addresses is then a constant, and takes no registers.
        at_row = tl.minimum(row, last) * ROW
        if again is not None:  # a run is whole or past the last column; then it is the last run, and left out
            there = tl.minimum(k, K - RUN)
            x = tl.load(in_order(x_ptr + at_row + there + run), volatile=True)
            at_run, more = (
                tl.broadcast_to(at_row + there, (at_row + ks).shape),
                tl.broadcast_to(run, (at_row + ks).shape),
            )
            x = complete(x, x_ptr, in_order(at_run), in_order(more), again, EACH * TURNS * (BLOCK_B // 8) * RUN, RUN)
            x = in_order(x)
            if not WHOLE:
                x = tl.where(tl.broadcast_to(ks < K, x.shape), x, 0.0)
        elif WHOLE:
            x = in_order(tl.load(in_order(x_ptr + at_row + ks), cache_modifier=".cg"))
        else:
            mask = in_order(tl.broadcast_to(ks < K, (at_row + ks).shape))
            x = in_order(tl.load(in_order(x_ptr + at_row + ks), mask=mask, other=0.0, cache_modifier=".cg"))
        x = tl.reshape(x, [EACH, TURNS, BLOCK_B // 8, W, 8, 4, RUN // PAIR, PAIR])
        x = tl.reshape(tl.permute(x, [0, 3, 1, 6, 5, 7, 2, 4]), [PARTS, PART, BLOCK_B])
    return x


@triton.constexpr_function
def _sizes(K, CHUNK, PARTS):
    """The sizes of a slice's chunks of K columns: CHUNK but for the last (`plan.chunks`)."""
    whole = K // CHUNK
    rest = K - whole * CHUNK
    return (CHUNK,) * whole + ((max(16 * PARTS, triton.next_power_of_2(rest)),) if rest else ())


@triton.jit
def _slice(
    u_ptr, unit0, FROM: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr,
    K: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's rows of U, in chunks of CHUNK columns and a last one of what is left (sizes: `plan.chunks`)."""
    PARTS: tl.constexpr = _parts(M, BLOCK_B, WARPS)
    SIZES: tl.constexpr = _sizes(K, CHUNK, PARTS)
    chunks = ()
    for n in tl.static_range(len(SIZES)):
        chunks = chunks + (_load_u(
            u_ptr, unit0, n * CHUNK, FROM, COUNT, H, M, K, PARTS, SIZES[n], WARPS, IN_REGISTERS, PRECISION
        ),)  # fmt: skip
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
    U, x_ptr, last, again, ROW: tl.constexpr, ACC: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr,
    K: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U @ x [M, BLOCK_B], U as `_slice` returns it, x[k, row] at x_ptr + row * ROW + k: what others have published.
    again: see `_load_x`."""
    PARTS: tl.constexpr = _parts(M, BLOCK_B, WARPS)
    SIZES: tl.constexpr = _sizes(K, CHUNK, PARTS)
    if PARTS == 1:  # noqa: SIM108  (the compiler needs the two shapes apart)
        acc = tl.zeros([M, BLOCK_B], ACC)
    else:
        acc = tl.zeros([PARTS, M, BLOCK_B], ACC)
    for n in tl.static_range(len(SIZES)):
        x = _load_x(x_ptr, last, again, n * CHUNK, ROW, K, PARTS, SIZES[n], BLOCK_B, WARPS, n < K // CHUNK)
        acc = product(U[n], operand(x, U[n].dtype, PRECISION), acc, PRECISION)
    return acc if PARTS == 1 else _sum(acc, PARTS, M, BLOCK_B)


@triton.jit
def operand_slices(
    u_ptr, unit0, GATES: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
    CHUNKS: tl.constexpr, WARPS: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's rows of U, a slice an operand. GATES: the products of each."""
    out = ()
    for n in tl.static_range(len(GATES)):
        out = out + (_slice(
            u_ptr, unit0, first_product(GATES, n), GATES[n], H, triton.next_power_of_2(GATES[n]) * BLOCK_H, BLOCK_B, H,
            CHUNKS[n], WARPS, IN_REGISTERS, PRECISION,
        ),)  # fmt: skip
    return out


@triton.jit
def _operand_products(
    U, x_ptr, last, again, keep, start, ROW: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
    WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start + the COUNT products of one operand, as a tuple. MASKED: its rows are zero where keep is false."""
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    acc = _product(U, x_ptr, last, again, ROW, ACC, PADDED * BLOCK_H, BLOCK_B, H, CHUNK, WARPS, PRECISION)
    sums = split_gates(acc, COUNT, PADDED, BLOCK_H, BLOCK_B)
    out = ()
    for n in tl.static_range(COUNT):
        out = out + ((tl.where(keep[None, :], sums[n], 0.0) if MASKED else sums[n]) + start[FROM + n],)
    return out


@triton.jit
def operand_products(
    U, x_ptr, last, again, keep, start, ROW: tl.constexpr, GATES: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, H: tl.constexpr, CHUNKS: tl.constexpr,
    MASKED: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start + the products of the operands FROM..TO, as a tuple; the operands lie side by side at x_ptr."""
    out = ()
    for n in tl.static_range(FROM, TO):
        out = out + _operand_products(
            U[n], x_ptr + (n - FROM) * H, last, again, keep, start, ROW, first_product(GATES, n), GATES[n], ACC,
            BLOCK_H, BLOCK_B, H, CHUNKS[n], MASKED, WARPS, PRECISION,
        )  # fmt: skip
    return out


@triton.jit
def segment_slices(
    u_ptr, unit0, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, SEGMENTS: tl.constexpr,
    CHUNKS: tl.constexpr, WARPS: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's columns of U, a slice a segment (see `form.Segment`): five numbers in SEGMENTS."""
    out = ()
    for s in tl.static_range(len(SEGMENTS) // 5):
        out = out + (_slice(
            u_ptr + SEGMENTS[5 * s + 1] * H * H, unit0, 0, 0, H, BLOCK_H, BLOCK_B, SEGMENTS[5 * s + 2] * H, CHUNKS[s],
            WARPS, IN_REGISTERS, PRECISION,
        ),)  # fmt: skip
    return out


@triton.jit
def through_u(
    acc, UT, dgx_ptr, dhu_ptr, last, GX_ROW: tl.constexpr, HU_ROW: tl.constexpr, OPERAND: tl.constexpr,
    ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, H: tl.constexpr, SEGMENTS: tl.constexpr,
    CHUNKS: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (or None) + the gradient of an operand: U^T times those of its products, which all have stored."""
    for s in tl.static_range(len(SEGMENTS) // 5):
        if SEGMENTS[5 * s] == OPERAND:
            if SEGMENTS[5 * s + 3]:
                found = _product(
                    UT[s], dhu_ptr + SEGMENTS[5 * s + 4] * H, last, None, HU_ROW, ACC, BLOCK_H, BLOCK_B,
                    SEGMENTS[5 * s + 2] * H, CHUNKS[s], WARPS, PRECISION,
                )  # fmt: skip
            else:
                found = _product(
                    UT[s], dgx_ptr + SEGMENTS[5 * s + 4] * H, last, None, GX_ROW, ACC, BLOCK_H, BLOCK_B,
                    SEGMENTS[5 * s + 2] * H, CHUNKS[s], WARPS, PRECISION,
                )  # fmt: skip
            acc = found if acc is None else acc + found
    return acc

"""Tiles and tuples of tiles: the loads, stores and products the schedules share.

Words: several tiles of the data's type packed into one tile of 64-bit integers (PACK of them: 4 of 16 bits, 2 of 32;
float64 is not packed), the form in which gates are saved for backward: one load or store for all of them.

A tile is [units, rows]: hidden units down, batch rows across, so that the recurrent product U h has its many units on
the tensor cores' long side and a small batch on the short one. In memory the units are contiguous.
"""

import triton
import triton.language as tl

from .math import product


@triton.jit
def unit_order(BLOCK_H: tl.constexpr, W: tl.constexpr):
    """The hidden unit that each row m of a product's tile stands for (see `in_memory`): [BLOCK_H]."""
    return _unit(tl.arange(0, BLOCK_H), BLOCK_H, W)


@triton.jit
def _unit(m, BLOCK_H: tl.constexpr, W: tl.constexpr):
    return (m // 16 % W * 8 + m % 8) * (BLOCK_H // (8 * W)) + m // (16 * W) * 2 + m // 8 % 2


@triton.jit
def memory_units(BLOCK_H: tl.constexpr, W: tl.constexpr, BYTES: tl.constexpr):
    """The units of `in_memory`'s shape, for elements of BYTES: [N, 1, W*8, 1, RUN]. RUN units fit one load."""
    ALL: tl.constexpr = BLOCK_H // (8 * W)
    RUN: tl.constexpr = ALL if ALL * BYTES <= 16 else 16 // BYTES
    run = tl.arange(0, ALL // RUN)[:, None, None, None, None] * RUN + tl.arange(0, RUN)[None, None, None, None, :]
    return tl.arange(0, 8 * W)[None, None, :, None, None] * ALL + run


@triton.jit
def memory_rows(BLOCK_B: tl.constexpr):
    """The rows of `in_memory`'s shape: [1, BLOCK_B/4, 1, 4, 1]."""
    n = tl.arange(0, BLOCK_B // 4)[None, :, None, None, None]
    return n // 2 * 8 + n % 2 + 2 * tl.arange(0, 4)[None, None, None, :, None]


@triton.jit
def in_memory(tile, SHAPE: tl.constexpr):
    """A tile [units, rows] of a product, in the shape it is loaded and stored in.

    The layout Triton gives a load of that shape, units in the last axis together, is the one the tensor cores give
    their result (16 x 8 blocks, a thread with two rows of two units of each; W warps down). So every thread loads and
    stores what it computes with, and nothing goes through shared memory. That a thread's units be neighbours,
    `unit_order` deals them out. With another layout it is as right, and slower.
    """
    N: tl.constexpr = SHAPE[0]
    W: tl.constexpr = SHAPE[2] // 8
    RUN: tl.constexpr = SHAPE[4]
    tile = tl.reshape(tile, [N, RUN // 2, W, 2, 8, SHAPE[1] // 2, 4, 2])
    tile = tl.permute(tile, [0, 5, 7, 2, 4, 6, 1, 3])
    return tl.reshape(tile, [N, SHAPE[1], 8 * W, 4, RUN])


@triton.jit
def from_memory(tile):
    """The inverse of `in_memory`."""
    N: tl.constexpr = tile.shape[0]
    W: tl.constexpr = tile.shape[2] // 8
    RUN: tl.constexpr = tile.shape[4]
    BLOCK_B: tl.constexpr = tile.shape[1] * 4
    tile = tl.reshape(tile, [N, BLOCK_B // 8, 2, W, 8, 4, RUN // 2, 2])
    tile = tl.permute(tile, [0, 6, 3, 7, 4, 1, 5, 2])
    return tl.reshape(tile, [N * RUN * W * 8, BLOCK_B])


@triton.jit
def load_weights(
    ptr, N: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, W: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The N blocks [H, H] of U (or their transposes) as tiles [BLOCK_H, BLOCK_H], both axes in `unit_order`.

    Like `in_memory`, in the shape whose layout is the one the tensor cores want of their left operand, so that each
    thread keeps its part of U in registers. Loaded plainly, U would be kept in shared memory and read at every step.
    """
    K: tl.constexpr = 2 if ptr.dtype.element_ty.primitive_bitwidth == 16 else 1
    KK: tl.constexpr = BLOCK_H // (8 * K)
    R: tl.constexpr = BLOCK_H // (16 * W)
    a = tl.arange(0, 2)[:, None, None, None, None, None, None, None]
    j = tl.arange(0, K)[None, :, None, None, None, None, None, None]
    kk = tl.arange(0, KK)[None, None, :, None, None, None, None, None]
    r = tl.arange(0, R)[None, None, None, :, None, None, None, None]
    i = tl.arange(0, 2)[None, None, None, None, :, None, None, None]
    w = tl.arange(0, W)[None, None, None, None, None, :, None, None]
    g = tl.arange(0, 8)[None, None, None, None, None, None, :, None]
    t = tl.arange(0, 4)[None, None, None, None, None, None, None, :]
    down = (w * 8 + g) * (2 * R) + r * 2 + i
    across = _unit(kk * (8 * K) + a * (4 * K) + t * K + j, BLOCK_H, W)
    offsets = across * H + down if TRANSPOSED else down * H + across
    mask = (down < H) & (across < H)
    tiles = ()
    for n in tl.static_range(N):
        tile = tl.load(ptr + n * H * H + offsets, mask=mask, other=0.0)
        tile = tl.permute(tile, [3, 5, 4, 6, 2, 0, 7, 1])
        tiles = tiles + (tl.reshape(tile, [BLOCK_H, BLOCK_H]),)
    return tiles


@triton.jit
def read_tiles(ptr, offsets, mask, N: tl.constexpr, STRIDE: tl.constexpr):
    """N tiles of a product, STRIDE elements apart, as a tuple; zero where masked. offsets: in `in_memory`'s shape."""
    tiles = ()
    for n in tl.static_range(N):
        if mask is None:
            tile = tl.load(ptr + offsets + n * STRIDE)
        else:
            tile = tl.load(ptr + offsets + n * STRIDE, mask=mask, other=0)
        tiles = tiles + (from_memory(tile),)
    return tiles


@triton.jit
def write_tiles(ptr, offsets, mask, tiles, FROM: tl.constexpr, TO: tl.constexpr, STRIDE: tl.constexpr):
    """tiles[FROM:TO], each STRIDE elements after the one before; ptr is where tiles[FROM] goes."""
    for n in tl.static_range(FROM, TO):
        tile = in_memory(tiles[n].to(ptr.dtype.element_ty), offsets.shape)
        tl.store(ptr + offsets + (n - FROM) * STRIDE, tile, mask=mask)


@triton.jit
def cast_tiles(tiles, N: tl.constexpr, TYPE: tl.constexpr):
    out = ()
    for n in tl.static_range(N):
        out = out + (tiles[n].to(TYPE),)
    return out


@triton.jit
def load_tiles(ptr, offsets, mask, N: tl.constexpr, STRIDE: tl.constexpr, TYPE: tl.constexpr):
    """N tiles, STRIDE elements apart, as a tuple; zero where masked."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (tl.load(ptr + offsets + n * STRIDE, mask=mask, other=0.0).to(TYPE),)
    return tiles


@triton.jit
def store_tiles(ptr, offsets, mask, tiles, FROM: tl.constexpr, TO: tl.constexpr, STRIDE: tl.constexpr):
    """tiles[FROM:TO], each STRIDE elements after the one before; ptr is where tiles[FROM] goes."""
    for n in tl.static_range(FROM, TO):
        tl.store(ptr + offsets + (n - FROM) * STRIDE, tiles[n].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def products(U, x, start, FROM: tl.constexpr, TO: tl.constexpr, PRECISION: tl.constexpr):
    """start[n] + U[n] @ x for n in FROM..TO, as a tuple. x is rounded to U's type."""
    out = ()
    for n in tl.static_range(FROM, TO):
        out = out + (product(U[n], x.to(U[n].dtype), start[n], PRECISION),)
    return out


@triton.jit
def join_tuples(a, b, FROM: tl.constexpr, TO: tl.constexpr):
    """a with b[FROM:TO] behind it."""
    for n in tl.static_range(FROM, TO):
        a = a + (b[n],)
    return a


@triton.jit
def replace_first(tiles, first, N: tl.constexpr):
    out = (first,)
    return join_tuples(out, tiles, 1, N)


@triton.jit
def keep_rows(tiles, keep, N: tl.constexpr):
    """The tiles with the rows (columns of a tile) where keep is false set to zero."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.where(keep[None, :], tiles[n], 0.0),)
    return out


@triton.jit
def biases(bias_ptr, units, zero, G: tl.constexpr, INNER: tl.constexpr, H: tl.constexpr):
    """What the recurrent product of each gate starts from: zero, or b_hh for the INNER last gates (bias [INNER*H])."""
    out = ()
    for n in tl.static_range(G):
        if bias_ptr is None or n < G - INNER:
            out = out + (zero,)
        else:
            b = tl.load(bias_ptr + (n - (G - INNER)) * H + units, mask=units < H, other=0.0)
            out = out + (zero + b.to(zero.dtype)[:, None],)
    return out


@triton.jit
def _bits(x, TYPE: tl.constexpr):
    if TYPE.primitive_bitwidth == 16:
        return x.to(TYPE).to(tl.uint16, bitcast=True).to(tl.int64)
    else:
        return x.to(TYPE).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def pack_tiles(tiles, N: tl.constexpr, PACK: tl.constexpr, TYPE: tl.constexpr):
    """N tiles as words of PACK of them; with PACK 1, the tiles in TYPE."""
    words = ()
    for w in tl.static_range((N + PACK - 1) // PACK):
        if PACK == 1:
            words = words + (tiles[w].to(TYPE),)
        else:
            word = _bits(tiles[w * PACK], TYPE)
            for k in tl.static_range(1, PACK):
                if w * PACK + k < N:
                    word = word | (_bits(tiles[w * PACK + k], TYPE) << (k * TYPE.primitive_bitwidth))
            words = words + (word,)
    return words


@triton.jit
def unpack_tiles(words, N: tl.constexpr, PACK: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr):
    """The N tiles of the words, in ACC."""
    tiles = ()
    for n in tl.static_range(N):
        if PACK == 1:
            tiles = tiles + (words[n].to(ACC),)
        elif TYPE.primitive_bitwidth == 16:
            bits = (words[n // PACK] >> (n % PACK * 16)).to(tl.uint16)
            tiles = tiles + (bits.to(TYPE, bitcast=True).to(ACC),)
        else:
            bits = (words[n // PACK] >> (n % PACK * 32)).to(tl.uint32)
            tiles = tiles + (bits.to(TYPE, bitcast=True).to(ACC),)
    return tiles

"""Tiles in the tensor cores' own register layout, straight from memory and back.

The compiler gives a product one register layout and loads and stores another; a tile that crosses costs a trip through
shared memory and two barriers. Here tiles are loaded in a shape whose layout, as Triton chooses it, is the product's
when reshaped. With the report (sm_90, bfloat16, 8 rows) the LSTM's step at 64 units costs 127 issue slots and 2
barriers, backward 234 and 2; at commit 4e6d929, without this, the report says 191 and 6, 343 and 12.
"""

import triton
import triton.language as tl

from .math import new_chain, widened

# A load's threads are dealt out along its axes, the contiguous one first. Among the others, Triton 3.6 begins with the
# first axis, later releases with the last.
FIRST_AXIS_FIRST = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def in_order(x):
    """x, or x with its axes (but a contiguous last one) reversed, so that threads go along the same ones."""
    if not FIRST_AXIS_FIRST:
        return x
    elif len(x.shape) == 3:
        return tl.permute(x, [1, 0, 2])
    elif len(x.shape) == 4:
        return tl.permute(x, [2, 1, 0, 3])
    elif len(x.shape) == 5:
        return tl.permute(x, [3, 2, 1, 0, 4])
    elif len(x.shape) == 7:
        return tl.permute(x, [5, 4, 3, 2, 1, 0, 6])
    else:
        return tl.permute(x, [7, 6, 5, 4, 3, 2, 1, 0])


@triton.jit
def unit_order(BLOCK_H: tl.constexpr, W: tl.constexpr):
    """The hidden unit that each row m of a product's tile stands for (see `in_memory`): [BLOCK_H]."""
    return _unit(tl.arange(0, BLOCK_H), BLOCK_H, W)


@triton.jit
def _unit(m, BLOCK_H: tl.constexpr, W: tl.constexpr):
    return (m // 16 % W * 8 + m % 8) * (BLOCK_H // (8 * W)) + m // (16 * W) * 2 + m // 8 % 2


@triton.constexpr_function
def together(units, hidden, BYTES):
    """How many of a thread's units, neighbours of BYTES, one load takes: 16 bytes, and as far as rows are aligned."""
    return min(units, max(16 // BYTES, 1), hidden & -hidden)


@triton.jit
def memory_units(H: tl.constexpr, BLOCK_H: tl.constexpr, W: tl.constexpr, BYTES: tl.constexpr):
    """The units of `in_memory`'s shape, for elements of BYTES: [N, 1, W*8, 1, RUN]. RUN units fit one load."""
    ALL: tl.constexpr = BLOCK_H // (8 * W)
    RUN: tl.constexpr = together(ALL, H, BYTES)
    runs = tl.arange(0, 8 * W)[None, None, :, None, None] * (ALL // RUN)
    runs += tl.arange(0, ALL // RUN)[:, None, None, None, None]
    if RUN == 1:
        # Triton would see that neighbours lie along the first axis, and deal out threads along that.
        runs += new_chain(runs.to(tl.float32)).to(tl.int32)
    return runs * RUN + tl.arange(0, RUN)[None, None, None, None, :]


@triton.jit
def readable(units, H: tl.constexpr):
    """The units of `memory_units`, the last that there are in place of those beyond H: loads need no predicates. What a
    tile has beyond H may be anything."""
    RUN: tl.constexpr = units.shape[4]
    if units.shape[0] * units.shape[2] * RUN == H:
        return units
    else:
        return tl.minimum(units // RUN, H // RUN - 1) * RUN + tl.arange(0, RUN)[None, None, None, None, :]


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
    if RUN == 1:
        tile = tl.reshape(tile, [N // 2, W, 2, 8, SHAPE[1] // 2, 4, 2])
        tile = tl.permute(tile, [0, 2, 4, 6, 1, 3, 5])
    else:
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
    if RUN == 1:
        tile = tl.reshape(tile, [N // 2, 2, BLOCK_B // 8, 2, W, 8, 4])
        tile = tl.permute(tile, [0, 4, 1, 5, 2, 6, 3])
    else:
        tile = tl.reshape(tile, [N, BLOCK_B // 8, 2, W, 8, 4, RUN // 2, 2])
        tile = tl.permute(tile, [0, 6, 3, 7, 4, 1, 5, 2])
    return tl.reshape(tile, [N * RUN * W * 8, BLOCK_B])


@triton.jit
def in_layout_of(tile, numbers):
    """numbers (int32), in the register layout of a loaded tile, with what is computed from them. The compiler would
    give them another, and take the results through shared memory at every step."""
    if tile.dtype == tl.float32:
        return numbers + new_chain(tile).to(tl.int32)
    else:
        return numbers


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
        tile = in_order(tl.load(ptr + n * H * H + in_order(offsets), mask=in_order(mask), other=0.0))
        tile = tl.permute(tile, [3, 5, 4, 6, 2, 0, 7, 1])
        tiles = tiles + (tl.reshape(tile, [BLOCK_H, BLOCK_H]),)
    return tiles


@triton.jit
def read_tiles(ptr, offsets, N: tl.constexpr, STRIDE: tl.constexpr):
    """N tiles of a product, STRIDE elements apart, as a tuple. offsets: in `in_memory`'s shape."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + (from_memory(_load(ptr, offsets, n * STRIDE)),)
    return tiles


@triton.jit
def _load(ptr, offsets, AT: tl.constexpr):
    """A tile in `in_memory`'s shape, AT elements on."""
    return in_order(tl.load(ptr + in_order(offsets) + AT))


@triton.jit
def write_tiles(ptr, offsets, mask, tiles, FROM: tl.constexpr, TO: tl.constexpr, STRIDE: tl.constexpr):
    """tiles[FROM:TO], each STRIDE elements after the one before; ptr is where tiles[FROM] goes."""
    for n in tl.static_range(FROM, TO):
        tile = in_order(in_memory(tiles[n].to(ptr.dtype.element_ty), offsets.shape))
        tl.store(ptr + in_order(offsets) + (n - FROM) * STRIDE, tile, mask=in_order(mask))


@triton.jit
def load_next(ptr, offsets, N: tl.constexpr, STRIDE: tl.constexpr):
    """What `arrived` makes N tiles of in the next step; ptr, offsets and STRIDE as for `read_tiles`.

    A load is waited for where something first touches what it loaded, even to take 16-bit halves apart. The compiler
    does that in the step of the load, unless whole 32-bit words are what is carried to the next step. They are put
    together here; where one load brings both halves, the compiler sees that they are together already.
    """
    tiles = ()
    for n in tl.static_range(N):
        tile = _load(ptr, offsets, n * STRIDE)
        if tile.dtype.primitive_bitwidth == 16 and tile.shape[4] > 1:
            tile = tile_words(tile)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def tile_words(tile):
    """A tile in `in_memory`'s shape as words of 32 bits: of 16-bit elements, two neighbours in the last axis."""
    if tile.dtype.primitive_bitwidth == 32:
        return tile.to(tl.int32, bitcast=True)
    else:
        bits = tl.reshape(tile.to(tl.int16, bitcast=True), tile.shape[:4] + [tile.shape[4] // 2, 2])
        low, high = tl.split(bits)
        return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _halves(words, TYPE: tl.constexpr):
    """The inverse of `tile_words`, for elements of TYPE."""
    if TYPE.primitive_bitwidth == 32:
        return words.to(TYPE, bitcast=True)
    else:
        shifts = tl.arange(0, 2)[None, None, None, None, None, :] * 16
        halves = (words[:, :, :, :, :, None] >> shifts).to(tl.int16).to(TYPE, bitcast=True)
        return tl.reshape(halves, words.shape[:4] + [words.shape[4] * 2])


@triton.jit
def arrived(tiles, N: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr):
    """The N tiles of a product that `load_next` loaded, of elements of TYPE, in ACC."""
    out = ()
    for n in tl.static_range(N):
        tile = tiles[n]
        if tile.dtype == tl.int32:
            tile = _halves(tile, TYPE)
        out = out + (widened(from_memory(tile), ACC),)
    return out

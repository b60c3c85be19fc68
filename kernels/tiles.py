"""Tiles and tuples of tiles: the loads, stores and products the schedules share.

A tile is [units, rows]: hidden units down, batch rows across, so that the recurrent product U h has its many units on
the tensor cores' long side and a small batch on the short one. In memory the units are contiguous.
"""

import triton
import triton.language as tl

from .math import product


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

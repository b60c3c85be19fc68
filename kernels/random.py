"""Dropout masks from a counter-based generator: the same numbers in forward and backward, by every schedule and tile,
and by `seqcells.dropouts`, without being stored.

The generator is Squares (Widynski 2022, arXiv:2004.06278): a key and a counter give 32 random bits, of which the first
24 are used. The counter is the number of the element in [T, B, K, H], or in [B, K, H] for a mask drawn once.

dropout [2 + 2*M], for M masks, float32 (float64 for float64 data): two seeds, integers below 2^24; then for each mask
the probability that an element is kept, and the value of those that are. The others are zero.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _nth_seed(n):
    """What splitmix64 adds to a seed before its (n+1)-th number."""
    return (n + 1) * 0x9E3779B97F4A7C15 % (1 << 64)


@triton.jit
def _key(dropout_ptr, n: tl.constexpr):
    """The key of the n-th mask. Keys must have irregular digits: this is splitmix64 (Steele et al. 2014), made odd."""
    key = tl.load(dropout_ptr).to(tl.uint64) + (tl.load(dropout_ptr + 1).to(tl.uint64) << 24) + _nth_seed(n)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    return (key ^ (key >> 31)) | 1


@triton.jit
def draw(dropout_ptr, counters, DRAWN: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr):
    """The masks that are drawn once, or else those of a step, as tiles. counters: of the tile's elements.

    The seeds are read at each step: kept, they would take registers.
    """
    out = ()
    for n in tl.static_range(len(DRAWN)):
        if DRAWN[n] == ONCE:
            key = _key(dropout_ptr, n)
            keep = (tl.load(dropout_ptr + 2 + 2 * n) * 16777216.0).to(tl.int32)
            value = tl.load(dropout_ptr + 3 + 2 * n).to(ACC)
            y = counters.to(tl.uint64) * key
            z = y + key
            x = y * y + y
            x = (x >> 32) | (x << 32)
            x = x * x + z
            x = (x >> 32) | (x << 32)
            x = x * x + y
            x = (x >> 32) | (x << 32)
            out = out + (tl.where(((x * x + z) >> 40).to(tl.int32) < keep, value, 0.0),)
    return out


@triton.jit
def draw_all(dropout_ptr, counters, step, DRAWN: tl.constexpr, ACC: tl.constexpr):
    """All masks of a step. counters: of those drawn once. step: what to add for the others."""
    once = draw(dropout_ptr, counters, DRAWN, True, ACC)
    return once + draw(dropout_ptr, counters + step, DRAWN, False, ACC)

"""Dropout masks from a counter-based generator: the same numbers in forward and backward, by every schedule and tile,
and by `seqcells.drawn`, without being stored.

The generator is Squares (Widynski 2022, arXiv:2004.06278): a key and a counter give 32 random bits, for two masks. The
counter is the number of the element in [T, B, K, H], or in [B, K, H] for masks drawn once. Those and the others are
numbered apart: the first two have one key, the next two another.

dropout [2 + 2*M], for M masks, float32 (float64 for float64 data): two seeds, integers below 2^24; then for each mask
the probability that an element is kept, of which 16 bits are used, and the value of those that are. Others are zero.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _numbered(drawn, n):
    """The number of the n-th mask among those that are drawn as often."""
    return sum(1 for m in drawn[:n] if m == drawn[n])


@triton.constexpr_function
def _added(pair, once):
    """What splitmix64 adds to a seed before the number that is the key of a pair of masks."""
    return (2 * pair + once + 1) * 0x9E3779B97F4A7C15 % (1 << 64)


@triton.jit
def _squares(dropout_ptr, counters, ADDED: tl.constexpr):
    """32 random bits for each counter. Keys must have irregular digits: splitmix64's (Steele et al. 2014), made odd."""
    key = tl.load(dropout_ptr).to(tl.uint64) + (tl.load(dropout_ptr + 1).to(tl.uint64) << 24) + ADDED
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = (key ^ (key >> 31)) | 1
    y = counters.to(tl.uint64) * key
    z = y + key
    x = y * y + y
    x = (x >> 32) | (x << 32)
    x = x * x + z
    x = (x >> 32) | (x << 32)
    x = x * x + y
    x = (x >> 32) | (x << 32)
    return ((x * x + z) >> 32).to(tl.uint32)


@triton.jit
def draw(dropout_ptr, counters, DRAWN: tl.constexpr, ONCE: tl.constexpr, ACC: tl.constexpr):
    """The masks that are drawn once, or else those of a step, as tiles. counters: of the tile's elements.

    Seeds and probabilities are read at each step: kept, they would take registers.
    """
    out = ()
    for n in tl.static_range(len(DRAWN)):
        if DRAWN[n] == ONCE:
            if _numbered(DRAWN, n) % 2 == 0:
                bits = _squares(dropout_ptr, counters, _added(_numbered(DRAWN, n) // 2, ONCE))
            else:
                bits = bits >> 16
            keep = (tl.load(dropout_ptr + 2 + 2 * n) * 65536.0).to(tl.int32)
            value = tl.load(dropout_ptr + 3 + 2 * n).to(ACC)
            out = out + (tl.where((bits & 0xFFFF).to(tl.int32) < keep, value, 0.0),)
    return out


@triton.jit
def draw_all(dropout_ptr, counters, step, DRAWN: tl.constexpr, ACC: tl.constexpr):
    """All masks of a step. counters: of those drawn once. step: what to add for the others."""
    once = draw(dropout_ptr, counters, DRAWN, True, ACC)
    return once + draw(dropout_ptr, counters + step, DRAWN, False, ACC)

"""The scalar functions and the matrix product that every kernel shares.

All work in the accumulation type: float32, or float64 for float64 data. FAST chooses the one-instruction
approximation (relative error 2^-11, of the order of float16's and below bfloat16's own rounding); everything else is
accurate to a few units in the last place of the result (a sigmoid near 0: of 1), saturates, and is finite for every
finite argument.
"""

import triton
import triton.language as tl
from triton import knobs

# Triton decides at import whether kernels are compiled or interpreted; so does this.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
if INTERPRETED.value == isinstance(tl.zeros, triton.JITFunction):
    raise RuntimeError("TRITON_INTERPRET changed after triton was imported: set it before Python starts")


@triton.jit
def _tanh_small(x):
    """tanh for |x| <= 1/4, where 1 - exp(-2x) would cancel: the Taylor series, cut below one ulp."""
    s = x * x
    if x.dtype == tl.float64:
        p = s * 9.691537956929451e-05 - 0.00023912911424355248
        p = s * p + 0.000590027440945586
        p = s * p - 0.0014558343870513183
        p = s * p + 0.003592128036572481
        p = s * p - 0.008863235529902197
        p = s * p + 0.021869488536155203
    else:
        p = 0.021869488536155203
    p = s * p - 0.05396825396825397
    p = s * p + 0.13333333333333333
    p = s * p - 0.3333333333333333
    return x + x * (s * p)


@triton.jit
def tanh(x, FAST: tl.constexpr):
    if FAST and not INTERPRETED:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        # Only exp of a non-positive number: it cannot overflow (the form with exp(2x) gives NaN at large |x|).
        e = tl.exp(-2.0 * tl.abs(x))
        large = (1.0 - e) / (1.0 + e)
        return tl.where(tl.abs(x) <= 0.25, _tanh_small(x), tl.where(x < 0, -large, large))


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    if FAST and not INTERPRETED:
        return 0.5 * tanh(0.5 * x, FAST) + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(x):
    """log(1 + x), accurate near 0: what is lost by rounding 1 + x is put right to first order."""
    u = 1.0 + x
    d = u - 1.0
    return tl.where(u == 1.0, x, tl.where(d == x, tl.log(u), tl.log(u) * (x / d)))


@triton.jit
def expm1(x):
    """exp(x) - 1, accurate near 0."""
    t = tanh(0.5 * x, False)
    return tl.where(tl.abs(x) <= 0.5, 2.0 * t / (1.0 - t), tl.exp(x) - 1.0)


@triton.jit
def widened(x, TYPE: tl.constexpr):
    """x in TYPE. A bfloat16 is the upper half of a float32: of two in a word each takes one instruction."""
    if x.dtype.is_bf16() and TYPE.is_fp32():
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def operand(x, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of `product`: in TYPE, and for a TF32 product such that cutting off its last 13 bits, which the
    tensor cores do, rounds it to nearest (ties away from zero, as PTX's cvt.rna.tf32.f32)."""
    x = x.to(TYPE)
    if PRECISION == "tf32" and x.dtype == tl.float32:
        # A NaN of all ones would become zero. A device's sum with zero is the positive NaN, to which the integer sum
        # overflows. (From Hopper on, that sum and the greater of two are one instruction.)
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        if INTERPRETED:
            bits = tl.where(x == x, bits, 0x7FFFFFFF)
        bits = tl.maximum(bits + 0x1000, bits)
        if INTERPRETED:
            bits = bits & -0x2000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in acc's type. a, b: see `operand`; PRECISION: tl.dot's input_precision."""
    if INTERPRETED:
        # The interpreter multiplies the raw bits of bfloat16 operands.
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.constexpr_function
def is_one_chain(depth, rows, dtype, precision):
    """Whether a sum of products is best one chain. It is not with 8 rows on the tensor cores, but for a product that is
    one instruction, and, in 16 bits, for up to 64 units, where a chain was quicker on a device (benchmarks/NOTES.md).
    More rows keep the tensor cores busy anyway; other types do not use them."""
    if dtype.primitive_bitwidth == 16:
        return rows > 8 or depth <= 64
    return not (dtype.is_fp32() and precision != "ieee" and rows <= 8 and depth > 8)


@triton.jit
def new_chain(like):
    """Zeros of like's shape (float32), for a `product` to start a chain of its own from.

    The compiler turns product(.., 0) + x into product(.., x), so that each product waits for the one before. It does
    not look into inline assembly. The assembler does, and the zero costs no register.
    """
    if INTERPRETED:
        return tl.zeros_like(like)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [like], dtype=tl.float32, is_pure=True, pack=1)

"""GRU with the reset before the product (Cho et al. 2014, arXiv:1406.1078 v3): the textbook cell.

    r, z = sigmoid(gx + h U^T)     m = r h     n = tanh(gx_n + m U_n^T)     h' = (1 - z) n + z h

The candidate waits for r, so a step has two dependent products.
"""

import triton
import triton.language as tl

from ..form import Operand
from ..math import sigmoid, tanh
from . import Cell, register


@triton.jit
def operands_2(gx, hu, states, params, FAST: tl.constexpr):
    return (sigmoid(gx[0] + hu[0], FAST) * states[0],)


@triton.jit
def forward(gx, hu, states, params, FAST: tl.constexpr):
    r = sigmoid(gx[0] + hu[0], FAST)  # the compiler takes it from `operands_2` where both are in one kernel
    z = sigmoid(gx[1] + hu[1], FAST)
    n = tanh(gx[2] + hu[2], FAST)
    return (n + z * (states[0] - n),), (r, z, n)


@triton.jit
def backward_2(dstates, saved, before, after, params, FAST: tl.constexpr):
    r, z, n = saved
    return (dstates[0] * (1.0 - z) * (1.0 - n * n),), (r * before[0],)


@triton.jit
def backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    r, z, n = saved
    dh = dstates[0]
    h = before[0]
    # Products that occur twice are formed once.
    through = dh * (1.0 - z)
    direct = dm[0] * r
    d = (direct * h * (1.0 - r), through * z * (h - n), through * (1.0 - n * n))
    return d, d, (dh * z + direct,), (), ()


GRU_BEFORE = register(
    Cell(
        "gru_before",
        gates=3,
        states=1,
        saved=3,
        operands=(Operand(1, 2, 0), Operand(2, 1)),
        adds=(0, 1, 2),
        forward=forward,
        backward=backward,
        operands_2=operands_2,
        backward_2=backward_2,
    )
)

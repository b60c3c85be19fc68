"""GRU with the reset before the product (Cho et al. 2014, arXiv:1406.1078 v3): the textbook cell.

    r, z = sigmoid(gx + h U^T)     m = r h     n = tanh(gx_n + m U_n^T)     h' = (1 - z) n + z h

The candidate waits for r, so a step has two dependent products.
"""

import triton
import triton.language as tl

from ..math import sigmoid, tanh
from . import Cell, register


@triton.jit
def middle(gx, hu, states, FAST: tl.constexpr):
    return sigmoid(gx[0] + hu[0], FAST) * states[0]


@triton.jit
def forward(gx, hu, states, FAST: tl.constexpr):
    r = sigmoid(gx[0] + hu[0], FAST)  # the compiler takes it from `middle` where both are in one kernel
    z = sigmoid(gx[1] + hu[1], FAST)
    n = tanh(gx[2] + hu[2], FAST)
    return (n + z * (states[0] - n),), (r, z, n)


@triton.jit
def backward_middle(dstates, saved, states_prev, states, FAST: tl.constexpr):
    r, z, n = saved
    return (dstates[0] * (1.0 - z) * (1.0 - n * n),), r * states_prev[0]


@triton.jit
def backward(dstates, dm, saved, states_prev, states, FAST: tl.constexpr):
    r, z, n = saved
    dh = dstates[0]
    h = states_prev[0]
    # Products that occur twice are formed once.
    through = dh * (1.0 - z)
    direct = dm * r
    d = (direct * h * (1.0 - r), through * z * (h - n), through * (1.0 - n * n))
    return d, d, (dh * z + direct,)


GRU_BEFORE = register(
    Cell(
        "gru_before",
        gates=3,
        states=1,
        saved=3,
        first=2,
        forward=forward,
        backward=backward,
        middle=middle,
        backward_middle=backward_middle,
    )
)

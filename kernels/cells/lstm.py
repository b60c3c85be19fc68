"""LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), as torch.nn.LSTM defines it.

i, f, o = sigmoid(gx + h U^T)     g = tanh(gx_g + h U_g^T)
c' = f c + i g                    h' = o tanh(c')
"""

import triton
import triton.language as tl

from ..form import Operand
from ..math import sigmoid, tanh
from . import Cell, register


@triton.jit
def forward(gx, hu, states, params, FAST: tl.constexpr):
    i = sigmoid(gx[0] + hu[0], FAST)
    f = sigmoid(gx[1] + hu[1], FAST)
    g = tanh(gx[2] + hu[2], FAST)
    o = sigmoid(gx[3] + hu[3], FAST)
    c = f * states[1] + i * g
    return (o * tanh(c, FAST), c), (i, f, g, o)


@triton.jit
def backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    i, f, g, o = saved
    dh = dstates[0]
    tc = tanh(after[1], FAST)
    # Products that occur twice are formed once.
    dtc = dh * o
    dc = dstates[1] + dtc * (1.0 - tc * tc)
    dci = dc * i
    dcf = dc * f
    d = (
        dci * g * (1.0 - i),
        dcf * before[1] * (1.0 - f),
        dci * (1.0 - g * g),
        dtc * tc * (1.0 - o),
    )
    return d, d, (tl.zeros_like(dh), dcf), (), ()


LSTM = register(Cell("lstm", 4, 2, 4, (Operand(1, 4, 0),), (0, 1, 2, 3), forward=forward, backward=backward))

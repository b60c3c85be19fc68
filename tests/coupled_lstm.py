"""A sixth cell, as a user would add it: one kernel file and its reference. Coupled gates (Greff et al. 2017, "CIFG").

f, o = sigmoid(gx + h U^T)     g = tanh(gx_g + h U_g^T)     c' = f c + (1 - f) g     h' = o tanh(c')
"""

import triton
import triton.language as tl
from torch.nn.functional import linear

from seqcells import reference
from seqcells.kernels.cells import Cell, register
from seqcells.kernels.math import sigmoid, tanh


@triton.jit
def forward(gx, hu, states, FAST: tl.constexpr):
    f = sigmoid(gx[0] + hu[0], FAST)
    g = tanh(gx[1] + hu[1], FAST)
    o = sigmoid(gx[2] + hu[2], FAST)
    c = g + f * (states[1] - g)
    return (o * tanh(c, FAST), c), (f, g, o)


@triton.jit
def backward(dstates, dm, saved, states_prev, states, FAST: tl.constexpr):
    f, g, o = saved
    dh = dstates[0]
    tc = tanh(states[1], FAST)
    dc = dstates[1] + dh * o * (1.0 - tc * tc)
    d = (dc * (states_prev[1] - g) * f * (1.0 - f), dc * (1.0 - f) * (1.0 - g * g), dh * tc * o * (1.0 - o))
    return d, d, (tl.zeros_like(dh), dc * f)


register(Cell("coupled_lstm", gates=3, states=2, saved=3, forward=forward, backward=backward))


def coupled_lstm_cell(x, states, w_ih, w_hh, b_ih=None, b_hh=None):
    h, c = states
    f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(3, -1)
    c = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
    return o.sigmoid() * c.tanh(), c


reference.CELLS["coupled_lstm"] = reference.Cell(coupled_lstm_cell, 3, 2)

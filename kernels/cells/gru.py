"""GRU with the reset after the product, as torch.nn.GRU and cuDNN define it (Cho et al. 2014, arXiv:1406.1078 v1).

r, z = sigmoid(gx + h U^T)     q = h U_n^T + b_hn     n = tanh(gx_n + r q)     h' = (1 - z) n + z h
"""

import triton
import triton.language as tl

from ..form import Operand
from ..math import sigmoid, tanh
from . import Cell, register


@triton.jit
def forward(gx, hu, states, params, FAST: tl.constexpr):
    r = sigmoid(gx[0] + hu[0], FAST)
    z = sigmoid(gx[1] + hu[1], FAST)
    n = tanh(gx[2] + r * hu[2], FAST)
    return (n + z * (states[0] - n),), (r, z, n, hu[2])


@triton.jit
def backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    r, z, n, q = saved
    dh = dstates[0]
    # Products that occur twice are formed once.
    through = dh * (1.0 - z)
    dn = through * (1.0 - n * n)
    dq = dn * r
    dr = dq * q * (1.0 - r)
    dz = through * z * (before[0] - n)
    return (dr, dz, dn), (dr, dz, dq), (dh * z,), (), ()


GRU = register(Cell("gru", 3, 1, 4, (Operand(1, 3, 0),), (0, 1, -1), forward=forward, backward=backward))

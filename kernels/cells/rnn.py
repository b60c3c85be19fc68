"""Elman RNN, as torch.nn.RNN defines it: h' = tanh(gx + h U^T), or relu in place of tanh.

Both derivatives follow from h', so nothing but the outputs is kept for backward.
"""

import triton
import triton.language as tl

from ..form import Operand
from ..math import tanh
from . import Cell, register


@triton.jit
def forward_tanh(gx, hu, states, params, FAST: tl.constexpr):
    return (tanh(gx[0] + hu[0], FAST),), ()


@triton.jit
def backward_tanh(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    h = after[0]
    d = (dstates[0] * (1.0 - h * h),)
    return d, d, (tl.zeros_like(h),), (), ()


@triton.jit
def forward_relu(gx, hu, states, params, FAST: tl.constexpr):
    a = gx[0] + hu[0]
    # Not tl.maximum: that drops NaN, and torch.relu keeps it.
    return (tl.where(a < 0.0, 0.0, a),), ()


@triton.jit
def backward_relu(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    # Not h > 0: where h is NaN, torch's relu lets the gradient through.
    d = (tl.where(after[0] <= 0.0, 0.0, dstates[0]),)
    return d, d, (tl.zeros_like(after[0]),), (), ()


PRODUCT = (Operand(1, 1, 0),)
RNN_TANH = register(Cell("rnn_tanh", 1, 1, 0, PRODUCT, (0,), forward=forward_tanh, backward=backward_tanh))
RNN_RELU = register(Cell("rnn_relu", 1, 1, 0, PRODUCT, (0,), forward=forward_relu, backward=backward_relu))

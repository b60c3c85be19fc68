"""Elman RNN, as torch.nn.RNN defines it: h' = tanh(gx + h U^T), or relu in place of tanh.

Both derivatives follow from h', so nothing but the outputs is kept for backward.
"""

import triton
import triton.language as tl

from ..math import tanh
from . import Cell, register


@triton.jit
def forward_tanh(gx, hu, states, FAST: tl.constexpr):
    return (tanh(gx[0] + hu[0], FAST),), ()


@triton.jit
def backward_tanh(dstates, dm, saved, states_prev, states, FAST: tl.constexpr):
    h = states[0]
    d = (dstates[0] * (1.0 - h * h),)
    return d, d, (tl.zeros_like(h),)


@triton.jit
def forward_relu(gx, hu, states, FAST: tl.constexpr):
    a = gx[0] + hu[0]
    # Not tl.maximum: that drops NaN, and torch.relu keeps it.
    return (tl.where(a < 0.0, 0.0, a),), ()


@triton.jit
def backward_relu(dstates, dm, saved, states_prev, states, FAST: tl.constexpr):
    # Not h > 0: where h is NaN, torch's relu lets the gradient through.
    d = (tl.where(states[0] <= 0.0, 0.0, dstates[0]),)
    return d, d, (tl.zeros_like(states[0]),)


RNN_TANH = register(Cell("rnn_tanh", gates=1, states=1, saved=0, forward=forward_tanh, backward=backward_tanh))
RNN_RELU = register(Cell("rnn_relu", gates=1, states=1, saved=0, forward=forward_relu, backward=backward_relu))

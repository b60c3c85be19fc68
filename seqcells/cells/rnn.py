"""Elman RNN (Elman 1990), as torch.nn.RNN defines it: with tanh, and with relu."""

import torch

from ..cell import cell


@cell(gates="n", states="h")
def rnn_tanh(x, U, h):
    """Elman RNN with tanh, as torch.nn.RNN defines it."""
    return torch.tanh(x.n + U.n(h))


@cell(gates="n", states="h")
def rnn_relu(x, U, h):
    """Elman RNN with relu, as torch.nn.RNN defines it."""
    return torch.relu(x.n + U.n(h))

"""LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), as torch.nn.LSTM defines it."""

import torch

from ..cell import cell


@cell(gates="i f g o", states="h c", dropout="d")
def lstm(x, U, h, c, d=1):
    """LSTM, as torch.nn.LSTM defines it."""
    i, f = torch.sigmoid(x.i + U.i(h)), torch.sigmoid(x.f + U.f(h))
    g, o = torch.tanh(x.g + U.g(h)), torch.sigmoid(x.o + U.o(h))
    c = f * c + i * (d * g)
    return o * torch.tanh(c), c

"""LSTM with peepholes (Gers & Schmidhuber 2000): each unit's gates depend on its cell state."""

import torch

from ..cell import cell


@cell(gates="i f g o", states="h c", params="p_i p_f p_o", dropout="d")
def peephole_lstm(x, U, h, c, p_i, p_f, p_o, d=1):
    """LSTM with peepholes (Gers & Schmidhuber 2000)."""
    i = torch.sigmoid(x.i + U.i(h) + p_i * c)
    f = torch.sigmoid(x.f + U.f(h) + p_f * c)
    c = f * c + i * d * torch.tanh(x.g + U.g(h))
    o = torch.sigmoid(x.o + U.o(h) + p_o * c)
    return o * torch.tanh(c), c

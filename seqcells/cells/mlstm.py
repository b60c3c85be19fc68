"""Multiplicative LSTM (Krause et al. 2016, arXiv:1609.07959): each input has recurrent weights of its own."""

import torch

from ..cell import cell


@cell(gates="m i f g o", states="h c", bias="i f g o", dropout="d")
def mlstm(x, U, h, c, d=1):
    """Multiplicative LSTM (Krause et al. 2016): an LSTM that reads m in place of h. Not xLSTM's mLSTM."""
    m = x.m * U.m(h)
    i, f = torch.sigmoid(x.i + U.i(m)), torch.sigmoid(x.f + U.f(m))
    g, o = d * torch.tanh(x.g + U.g(m)), torch.sigmoid(x.o + U.o(m))
    c = f * c + i * g
    return o * torch.tanh(c), c

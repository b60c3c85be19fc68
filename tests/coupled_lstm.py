"""A sixth cell, as a user would add it."""

import torch

import seqcells


@seqcells.cell(gates="f g o", states="h c")
def coupled_lstm(x, U, h, c):
    """LSTM with coupled gates (Greff et al. 2017, "CIFG")."""
    f = torch.sigmoid(x.f + U.f(h))
    g = torch.tanh(x.g + U.g(h))
    o = torch.sigmoid(x.o + U.o(h))
    c = f * c + (1 - f) * g
    return o * torch.tanh(c), c

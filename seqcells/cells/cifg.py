"""LSTM with coupled input and forget gates (Greff et al. 2017, arXiv:1503.04069): what is forgotten is replaced."""

import torch

from ..cell import cell


@cell(gates="f g o", states="h c", dropout="d")
def cifg(x, U, h, c, d=1):
    """LSTM with coupled input and forget gates (Greff et al. 2017, "CIFG")."""
    f, o = torch.sigmoid(x.f + U.f(h)), torch.sigmoid(x.o + U.o(h))
    g = d * torch.tanh(x.g + U.g(h))
    c = f * c + (1 - f) * g
    return o * torch.tanh(c), c

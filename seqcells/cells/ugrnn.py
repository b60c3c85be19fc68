"""Update gate RNN (Collins et al. 2017, arXiv:1611.09913): one gate between the old state and the candidate."""

import torch

from ..cell import cell


@cell(gates="g c", states="h", dropout="d")
def ugrnn(x, U, h, d=1):
    """Update gate RNN (Collins et al. 2017)."""
    g = torch.sigmoid(x.g + U.g(h))
    c = d * torch.tanh(x.c + U.c(h))
    return g * h + (1 - g) * c

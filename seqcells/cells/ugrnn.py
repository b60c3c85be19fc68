"""Update gate RNN (Collins et al. 2017, arXiv:1611.09913): one gate between the old state and the candidate."""

import torch

from ..cell import cell


@cell(gates="g c", states="h")
def ugrnn(x, U, h):
    """Update gate RNN (Collins et al. 2017)."""
    g = torch.sigmoid(x.g + U.g(h))
    c = torch.tanh(x.c + U.c(h))
    return g * h + (1 - g) * c

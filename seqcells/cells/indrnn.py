"""Independently recurrent network (Li et al. 2018, arXiv:1803.04831): each unit is connected only to itself."""

import torch

from ..cell import cell


@cell(gates="n", states="h", params="u")
def indrnn(x, U, h, u):
    """Independently recurrent network (Li et al. 2018)."""
    return torch.relu(x.n + u * h)

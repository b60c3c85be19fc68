"""Stackable recurrent cell (Turkoglu et al. 2021, arXiv:1911.11033): gradients keep their size over layers, too."""

import torch

from ..cell import cell


@cell(gates="z k", states="h")
def star(x, U, h):
    """STAR (Turkoglu et al. 2021)."""
    k = torch.sigmoid(x.k + U.k(h))
    return torch.tanh(h + k * (torch.tanh(x.z) - h))

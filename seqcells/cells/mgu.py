"""Minimal gated unit (Zhou et al. 2016, arXiv:1603.09420): one gate, which forgets and resets."""

import torch

from ..cell import cell


@cell(gates="f n", states="h", dropout="d")
def mgu(x, U, h, d=1):
    """Minimal gated unit (Zhou et al. 2016)."""
    f = torch.sigmoid(x.f + U.f(h))
    n = d * torch.tanh(x.n + U.n(f * h))
    return h + f * (n - h)

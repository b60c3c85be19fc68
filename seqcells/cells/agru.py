"""Attention-based GRU (Zhou et al. 2019, arXiv:1809.03672, "AGRU"): an attention score is the update gate."""

import torch

from ..cell import cell


@cell(gates="r n", states="h", inputs="a")
def agru(x, U, h, a):
    """GRU with an attention score a of each step, from 0 to 1, in place of the update gate (Zhou et al. 2019)."""
    n = torch.tanh(x.n + torch.sigmoid(x.r + U.r(h)) * U.n(h))
    return h + a * (n - h)

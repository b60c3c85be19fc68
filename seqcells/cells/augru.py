"""GRU with an attentional update gate (Zhou et al. 2019, arXiv:1809.03672, "DIEN")."""

import torch

from ..cell import cell


@cell(gates="r z n", states="h", inputs="a", dropout="d")
def augru(x, U, h, a, d=1):
    """GRU whose update gate is scaled by a score a of each step (Zhou et al. 2019)."""
    r, z = torch.sigmoid(x.r + U.r(h)), a * torch.sigmoid(x.z + U.z(h))
    n = d * torch.tanh(x.n + r * U.n(h))
    return h + z * (n - h)

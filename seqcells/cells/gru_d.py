"""GRU-D (Che et al. 2018, arXiv:1606.01865): the state decays between observations, before every product with it."""

import torch

from ..cell import cell


@cell(gates="d r z n", states="h")
def gru_d(x, U, h):
    """GRU-D's step (Che et al. 2018). x.d should depend on the time gaps in the input only."""
    h = torch.exp(-torch.relu(x.d)) * h
    r, z = torch.sigmoid(x.r + U.r(h)), torch.sigmoid(x.z + U.z(h))
    n = torch.tanh(x.n + U.n(r * h))
    return z * h + (1 - z) * n

"""GRU (Cho et al. 2014, arXiv:1406.1078): with the reset gate after the product, as torch.nn.GRU and cuDNN define it
(v1 of the paper), and before it, as in textbooks (v3)."""

import torch

from ..cell import cell


@cell(gates="r z n", states="h", dropout="d")
def gru(x, U, h, d=1):
    """GRU with the reset gate applied after the product, as torch.nn.GRU defines it."""
    r, z = torch.sigmoid(x.r + U.r(h)), torch.sigmoid(x.z + U.z(h))
    n = d * torch.tanh(x.n + r * U.n(h))
    return n + z * (h - n)


@cell(gates="r z n", states="h", dropout="d")
def gru_before(x, U, h, d=1):
    """GRU with the reset gate applied to h before the product (Cho et al. 2014, v3)."""
    r, z = torch.sigmoid(x.r + U.r(h)), torch.sigmoid(x.z + U.z(h))
    n = d * torch.tanh(x.n + U.n(r * h))
    return n + z * (h - n)

"""Light GRU (Ravanelli et al. 2018, arXiv:1803.10225), for speech: no reset gate, and ReLU for tanh."""

import torch

from ..cell import cell


@cell(gates="z n", states="h", dropout="d")
def ligru(x, U, h, d=1):
    """Li-GRU (Ravanelli et al. 2018), without the paper's batch norm of the input products."""
    z = torch.sigmoid(x.z + U.z(h))
    return z * h + (1 - z) * d * torch.relu(x.n + U.n(h))

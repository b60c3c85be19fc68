"""JANET, "just another network" (van der Westhuizen & Lasenby 2018, arXiv:1804.04849): an LSTM's forget gate alone."""

import torch

from ..cell import cell


@cell(gates="f g", states="h", constants="beta=1", dropout="d")
def janet(x, U, h, beta, d=1):
    """JANET (van der Westhuizen & Lasenby 2018). The paper initializes it by seqcells.init.chrono_."""
    s = x.f + U.f(h)
    g = d * torch.tanh(x.g + U.g(h))
    return torch.sigmoid(s) * h + (1 - torch.sigmoid(s - beta)) * g

"""JANET, "just another network" (van der Westhuizen & Lasenby 2018, arXiv:1804.04849): an LSTM's forget gate alone."""

import torch

from ..cell import cell


@cell(gates="f g", states="h", constants="beta=1")
def janet(x, U, h, beta):
    """JANET (van der Westhuizen & Lasenby 2018). The paper initializes it by seqcells.init.chrono_."""
    s = x.f + U.f(h)
    return torch.sigmoid(s) * h + (1 - torch.sigmoid(s - beta)) * torch.tanh(x.g + U.g(h))

"""MinimalRNN (Chen 2017, arXiv:1711.06788): the input moves into the space of the states, and one gate mixes."""

import torch

from ..cell import cell


@cell(gates="z u v", states="h", bias="z u")
def minimal_rnn(x, U, h):
    """MinimalRNN (Chen 2017)."""
    z = torch.tanh(x.z)
    u = torch.sigmoid(U.u(h) + U.v(z))
    return u * h + (1 - u) * z

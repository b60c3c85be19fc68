"""GRU-D (Che et al. 2018, arXiv:1606.01865): the state decays between observations, before every product with it."""

import torch

from ..cell import cell


@cell(gates="r z n", states="h", params="decay shift", inputs="gap", dropout="d")
def gru_d(x, U, h, decay, shift, gap, d=1):
    """GRU-D's step (Che et al. 2018). gap: the time since the last observation, one for all units or one for each.

    x has the imputed features and, beside them, their mask: its weights are then rows of weight_ih.
    """
    h = torch.exp(-torch.relu(decay * gap + shift)) * h
    r, z = torch.sigmoid(x.r + U.r(h)), torch.sigmoid(x.z + U.z(h))
    n = d * torch.tanh(x.n + U.n(r * h))
    return h + z * (n - h)

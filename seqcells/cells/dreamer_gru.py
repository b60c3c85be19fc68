"""DreamerV3's GRU (Hafner et al. 2023, arXiv:2301.04104): one layer norm of all gates, and z that starts low."""

import torch

from ..cell import cell
from .norm import normed


@cell(gates="r n z", states="h", params="gr=1 gn=1 gz=1 br=0 bn=0 bz=0", constants="eps=1e-3", bias="")
def dreamer_gru(x, U, h, gr, gn, gz, br, bn, bz, eps):
    """The recurrence of DreamerV3's world model (Hafner et al. 2023): W x + U h is normalized over all three gates."""
    r, n, z = normed(x.r + U.r(h), x.n + U.n(h), x.z + U.z(h), eps=eps)
    n = torch.tanh(torch.sigmoid(gr * r + br) * (gn * n + bn))
    z = torch.sigmoid(gz * z + bz - 1)
    return h + z * (n - h)

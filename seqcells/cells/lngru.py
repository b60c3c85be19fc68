"""GRU with layer normalization (Ba, Kiros and Hinton 2016, arXiv:1607.06450), of W x and of U h."""

import torch

from ..cell import cell
from .norm import normed

PARAMS = "xr=1 xz=1 xn=1 hr=1 hz=1 hn=1 br=0 bz=0 bn=0 shift=0"  # gains of W x and of U h, then shifts


@cell(gates="r z n", states="h", params=PARAMS, constants="eps=1e-5", bias="")
def lngru(x, U, h, xr, xz, xn, hr, hz, hn, br, bz, bn, shift, eps):
    """GRU with layer normalization (Ba et al. 2016): r and z are normalized together, n by itself. shift: inside r."""
    (a, b), (c, d) = normed(x.r, x.z, eps=eps), normed(U.r(h), U.z(h), eps=eps)
    r, z = torch.sigmoid(xr * a + hr * c + br), torch.sigmoid(xz * b + hz * d + bz)
    n, u = normed(x.n, eps=eps)[0], normed(U.n(h), eps=eps)[0]
    return h + z * (torch.tanh(xn * n + bn + r * (hn * u + shift)) - h)

"""LSTM with layer normalization (Ba, Kiros and Hinton 2016, arXiv:1607.06450), of W x, of U h, and of the memory."""

import torch

from ..cell import cell
from .norm import normed

GAINS = "xi=1 xf=1 xg=1 xo=1 hi=1 hf=1 hg=1 ho=1 gain=1"  # of the norms of W x, U h and the memory


@cell(gates="i f g o", states="h c", params=f"{GAINS} bi=0 bf=0 bg=0 bo=0 shift=0", constants="eps=1e-5", bias="")
def lnlstm(x, U, h, c, xi, xf, xg, xo, hi, hf, hg, ho, gain, bi, bf, bg, bo, shift, eps):
    """LSTM with layer normalization (Ba et al. 2016): W x and U h each over all four gates. bi to bo: all shifts."""
    a, b = normed(x.i, x.f, x.g, x.o, eps=eps), normed(U.i(h), U.f(h), U.g(h), U.o(h), eps=eps)
    i, f = torch.sigmoid(xi * a[0] + hi * b[0] + bi), torch.sigmoid(xf * a[1] + hf * b[1] + bf)
    g, o = torch.tanh(xg * a[2] + hg * b[2] + bg), torch.sigmoid(xo * a[3] + ho * b[3] + bo)
    c = f * c + i * g
    return o * torch.tanh(gain * normed(c, eps=eps)[0] + shift), c

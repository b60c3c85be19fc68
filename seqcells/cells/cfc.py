"""Closed-form continuous-time network (Hasani et al. 2022, Nature Machine Intelligence 4, arXiv:2106.13898)."""

import torch

from ..cell import cell


@cell(gates="f g a b", states="h", inputs="t")
def cfc(x, U, h, t):
    """CfC without a backbone (Hasani et al. 2022): the time t since the step before moves the state from f to g."""
    f, g = torch.tanh(x.f + U.f(h)), torch.tanh(x.g + U.g(h))
    s = torch.sigmoid((x.a + U.a(h)) * t + x.b + U.b(h))
    return f + s * (g - f)

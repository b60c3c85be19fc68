"""Antisymmetric RNN (Chang et al. 2019, arXiv:1902.09689): an ODE that neither explodes nor forgets."""

import torch

from ..cell import cell


@cell(gates="n", states="h", constants="eps=0.1 gamma=0.1")
def antisymmetric(x, U, h, eps, gamma):
    """Antisymmetric RNN (Chang et al. 2019): a forward Euler step of size eps, with diffusion gamma.

    It is antisymmetric if weight_hh is: parametrize weight_hh_l[k] by W - W.T (torch.nn.utils.parametrize).
    """
    return h + eps * torch.tanh(x.n + U.n(h) - gamma * h)

"""Antisymmetric RNN with input gating (Chang et al. 2019, arXiv:1902.09689)."""

import torch

from ..cell import cell


@cell(gates="z n", states="h", constants="eps=0.1 gamma=0.1")
def antisymmetric_gated(x, U, h, eps, gamma):
    """Antisymmetric RNN with input gating (Chang et al. 2019). The paper has one matrix for both of U's blocks."""
    z = torch.sigmoid(x.z + U.z(h) - gamma * h)
    return h + eps * z * torch.tanh(x.n + U.n(h) - gamma * h)

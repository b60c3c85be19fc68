"""Long expressive memory (Rusch et al. 2022, arXiv:2110.04744): two states, each with a step size for each unit."""

import torch

from ..cell import cell


@cell(gates="a b z y", states="y z", constants="dt=1")
def lem(x, U, y, z, dt):
    """LEM (Rusch et al. 2022): y, the output, is computed from the new z."""
    a, b = dt * torch.sigmoid(x.a + U.a(y)), dt * torch.sigmoid(x.b + U.b(y))
    z = z + a * (torch.tanh(x.z + U.z(y)) - z)
    return y + b * (torch.tanh(x.y + U.y(z)) - y), z

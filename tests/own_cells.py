"""Five cells of different kinds for the tests of layers, and layers of them."""

import pytest
import torch
from conftest import DEVICE

import seqcells

sigmoid, tanh = torch.sigmoid, torch.tanh


@seqcells.cell(gates="f n", states="h")
def minimal(x, U, h):
    """Zhou et al. 2016."""
    f = sigmoid(x.f + U.f(h))
    n = tanh(x.n + U.n(f * h))
    return h + f * (n - h)


@seqcells.cell(gates="f g o", states="h c")
def coupled(x, U, h, c):
    """Greff et al. 2017."""
    f, g, o = sigmoid(x.f + U.f(h)), tanh(x.g + U.g(h)), sigmoid(x.o + U.o(h))
    c = f * c + (1 - f) * g
    return o * tanh(c), c


@seqcells.cell(gates="a b d", states="h c n m", params="p q:1", inputs="w", constants="leak=0.3", bias="a d")
def four(x, U, h, c, n, m, p, q, w, leak):
    """Four states; a vector, a scalar, an input for each step and a constant; a gate without product, one without x."""
    a = torch.nn.functional.silu(x.a + U.a(h) + p * c)
    b = torch.nn.functional.softplus(x.b - q * n)
    d = w * sigmoid(U.d(h))
    c = (1 - leak) * c * d + a
    n = leak * n + b
    m = torch.maximum(m - 0.1, a)
    return tanh(c) / (1 + n) + 0.1 * m, c, n, m


@seqcells.cell(gates="n", states="h", params="u")
def independent(x, U, h, u):
    """Without a recurrent product (Li et al. 2018, IndRNN)."""
    return torch.relu(x.n + u * h)


@seqcells.cell(gates="g r", states="c", outputs="y", inputs="w")
def shown(x, U, c, w):
    """Its output is no state."""
    c = tanh(x.g + U.g(c)) + w * c
    return c, sigmoid(x.r) * c


CELLS = {cell.name: cell for cell in (minimal, coupled, four, independent, shown)}
I, H, T, B = 3, 4, 5, 3  # noqa: E741
LENGTHS = [3, 5, 2]


@pytest.fixture(name="on_the_device")
def device():
    """Tensors and modules are made where the kernels run."""
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


def made(cell, *args, **options):
    layer = seqcells.Recurrent(cell, I, H, *args, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)
    return layer


def given_to(cell, *shape, dtype=torch.float64):
    """Its per-step inputs: one value a unit."""
    return {name: torch.rand(*shape, H, dtype=dtype) for name in cell.inputs}

"""Cells as ten lines of PyTorch: the built-in ones once more, some that are not built in, and a peculiar one."""

import inspect

import pytest
import torch

import seqcells
from seqcells import reference
from seqcells.kernels import registry

sigmoid, tanh = torch.sigmoid, torch.tanh


def my_lstm(x, U, h, c):
    i, f = sigmoid(x.i + U.i(h)), sigmoid(x.f + U.f(h))
    g, o = tanh(x.g + U.g(h)), sigmoid(x.o + U.o(h))
    c = f * c + i * g
    return o * tanh(c), c


def my_gru(x, U, h):
    r, z = sigmoid(x.r + U.r(h)), sigmoid(x.z + U.z(h))
    n = tanh(x.n + r * U.n(h))
    return (1 - z) * n + z * h


def my_gru_before(x, U, h):
    r, z = sigmoid(x.r + U.r(h)), sigmoid(x.z + U.z(h))
    n = tanh(x.n + U.n(r * h))
    return (1 - z) * n + z * h


def my_rnn_tanh(x, U, h):
    return tanh(x.n + U.n(h))


def my_rnn_relu(x, U, h):
    return torch.relu(x.n + U.n(h))


def mgu(x, U, h):
    """Zhou et al. 2016."""
    f = sigmoid(x.f + U.f(h))
    n = tanh(x.n + U.n(f * h))
    return h + f * (n - h)


def ugrnn(x, U, h):
    """Collins et al. 2017."""
    c, g = tanh(x.c + U.c(h)), sigmoid(x.g + U.g(h))
    return g * h + (1 - g) * c


def cifg(x, U, h, c):
    """Greff et al. 2017."""
    f, g, o = sigmoid(x.f + U.f(h)), tanh(x.g + U.g(h)), sigmoid(x.o + U.o(h))
    c = f * c + (1 - f) * g
    return o * tanh(c), c


def product_with_c(x, U, h, c):
    """A second product whose operand is a state."""
    f, g = sigmoid(x.f + U.f(h)), tanh(x.g + U.g(h))
    o = sigmoid(x.o + U.o(c))
    return o * tanh(f * c + g), f * c + g


def peculiar(x, U, h, c):
    """What no built-in cell has: an inner gate before a plain one, a product inside and outside, a state that is
    another before the step, steps that are not zero at zero, and functions of each kind."""
    a, b = x.a + 0.5 * U.a(h), torch.nn.functional.silu(x.b + U.b(h))
    new = torch.exp(-a * a) * b + torch.maximum(c, a) / (1.5 + a * a) + x.a.exp().clamp(max=2)
    return torch.where(new > 0.3, new, 0.2 * new - c.abs()), h


# step: its gates, and how many tiles it saves; and the hand-written cell that it is
STEPS = {
    my_lstm: ("i f g o", 4, "lstm"),
    my_gru: ("r z n", 4, "gru"),
    my_gru_before: ("r z n", 3, "gru_before"),
    my_rnn_tanh: ("n", 0, "rnn_tanh"),
    my_rnn_relu: ("n", 0, "rnn_relu"),
    mgu: ("f n", 2, None),
    ugrnn: ("c g", 2, None),
    cifg: ("f g o", 3, None),
    product_with_c: ("f g o", 3, None),
    peculiar: ("a b", 3, None),
}
NAMES = [step.__name__ for step in STEPS]


def define(step, gates):
    return seqcells.cell(gates=gates, states=" ".join(list(inspect.signature(step).parameters)[2:]))(step)


@pytest.fixture(name="registered")
def registries(monkeypatch):
    """The steps as cells, by name; which are none of other tests'."""
    for of, name in ((reference, "CELLS"), (registry, "_CELLS"), (registry, "_LATER")):
        monkeypatch.setattr(of, name, dict(getattr(of, name)))
    return {step.__name__: define(step, gates) for step, (gates, *_) in STEPS.items()}

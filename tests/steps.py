"""Cells as ten lines of PyTorch: the built-in ones once more, published ones of every kind, and peculiar ones."""

import inspect
import sys

import pytest
import torch
from torch.nn import functional as F

import seqcells
from seqcells import products
from seqcells.engines import triton
from seqcells.engines.loop import derived, layer
from seqcells.kernels import registry

sigmoid, tanh, exp, relu = torch.sigmoid, torch.tanh, torch.exp, torch.relu


def my_lstm(x, U, h, c):
    i, f = sigmoid(x.i + U.i(h)), sigmoid(x.f + U.f(h))
    g, o = tanh(x.g + U.g(h)), sigmoid(x.o + U.o(h))
    c = f * c + i * g
    return o * tanh(c), c


def my_gru(x, U, h):
    r, z = sigmoid(x.r + U.r(h)), sigmoid(x.z + U.z(h))
    n = tanh(x.n + r * U.n(h))
    return n + z * (h - n)


def my_gru_before(x, U, h):
    r, z = sigmoid(x.r + U.r(h)), sigmoid(x.z + U.z(h))
    n = tanh(x.n + U.n(r * h))
    return n + z * (h - n)


def my_rnn_tanh(x, U, h):
    return tanh(x.n + U.n(h))


def my_rnn_relu(x, U, h):
    return relu(x.n + U.n(h))


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


def peephole(x, U, h, c, p_i, p_f, p_o):
    """Gers et al. 2002: gates see the memory by a trained vector."""
    i, f = sigmoid(x.i + U.i(h) + p_i * c), sigmoid(x.f + U.f(h) + p_f * c)
    c = f * c + i * tanh(x.g + U.g(h))
    return sigmoid(x.o + U.o(h) + p_o * c) * tanh(c), c


def indrnn(x, U, h, u):
    """Li et al. 2018: no product at all."""
    return relu(x.n + u * h)


def slstm(x, U, h, c, n, m):
    """Beck et al. 2024 (xLSTM): an exponential input gate, with what it and the forget gate have summed up."""
    z, o = tanh(x.z + U.z(h)), sigmoid(x.o + U.o(h))
    i, f = x.i + U.i(h), F.logsigmoid(x.f + U.f(h)) + m
    m = torch.maximum(f, i)
    i, f = exp(i - m), exp(f - m)
    c, n = f * c + i * z, f * n + i
    return o * c / n.clamp(min=1e-6), c, n, m


def augru(x, U, h, a):
    """Zhou et al. 2019 (DIEN): a score from outside scales the update gate."""
    r, z = sigmoid(x.r + U.r(h)), a * sigmoid(x.z + U.z(h))
    n = tanh(x.n + r * U.n(h))
    return (1 - z) * h + z * n


def gru_d(x, U, h, decay, shift, delta):
    """Che et al. 2018: the state decays with the time since the last step, before the product."""
    h = h * exp(-relu(decay * delta + shift))
    r, z = sigmoid(x.r + U.r(h)), sigmoid(x.z + U.z(h))
    n = tanh(x.n + U.n(r * h))
    return (1 - z) * h + z * n


def lem(x, U, y, z, dt):
    """Rusch et al. 2022: two operands, of which the second needs the first's products."""
    a, b = dt * sigmoid(x.a + U.a(y)), dt * sigmoid(x.b + U.b(y))
    z = (1 - a) * z + a * tanh(x.z + U.z(y))
    return (1 - b) * y + b * tanh(x.y + U.y(z)), z


def cornn(x, U, y, z, dt, gamma, epsilon):
    """Rusch & Mishra 2021: two states multiplied, one gate without an input of its own."""
    z = z + dt * (tanh(x.y + U.y(y) + U.z(z)) - gamma * y - epsilon * z)
    return y + dt * z, z


def mut3(x, U, h):
    """Jozefowicz et al. 2015: a second level, and two operands in the first."""
    z = sigmoid(x.z + U.z(tanh(h)))
    r = sigmoid(x.r + U.r(h))
    n = tanh(x.h + U.h(r * h))
    return n * z + h * (1 - z)


def write_only(x, U, h, c, seen):
    """A state that the step writes and never reads, and one that it hands on."""
    a = tanh(x.a + U.a(h))
    return a * sigmoid(c), a + 0.5 * h, x.a


def scaled(x, U, h, alpha, p):
    """A trained number and what is computed from trained numbers alone."""
    leak = sigmoid(p)
    return (1 - leak) * h + leak * tanh(alpha * (x.a + U.a(h)) + torch.log(1 + p * p))


def params_alone(x, U, h, c, p):
    """A state, and an operand, that no tensor of full size is in."""
    return tanh(x.a + U.a(exp(p)) + U.b(h)) * c, sigmoid(p)


def euler(x, U, h, dt, gamma):
    """Chang et al. 2019 (antisymmetric RNN), numbers that a layer may set."""
    return h + dt * (tanh(x.a + U.a(h)) - gamma * h)


def one_product_twice(x, U, h):
    """A recurrent product, and an input, inside and outside their sum."""
    a = x.a + U.a(h)
    return tanh(a) * sigmoid(U.a(h)) + 0.1 * x.b * tanh(x.b + U.b(h))


def with_output(x, U, h, c):
    """What it gives is no state."""
    c = 0.8 * c + tanh(x.a + U.a(h))
    h = sigmoid(x.b + U.b(c)) * c
    return h, c, h * tanh(c) + x.a


def late(x, U, h):
    """What reaches an input through the operand, and not: its product is apart; a third operand that is a state."""
    gate = sigmoid(x.g + U.g(h))
    return tanh(x.a + U.a(h * sigmoid(x.g))) * gate + U.b(x.b) * h


def product_with_c(x, U, h, c):
    """An operand that is another state."""
    f, g = sigmoid(x.f + U.f(h)), tanh(x.g + U.g(h))
    o = sigmoid(x.o + U.o(c))
    return o * tanh(f * c + g), f * c + g


def peculiar(x, U, h, c):
    """A product apart before a plain one, a product inside and outside, a state that is another before the step, steps
    that are not zero at zero, and functions of each kind."""
    a, b = x.a + 0.5 * U.a(h), F.silu(x.b + U.b(h))
    new = exp(-a * a) * b + torch.maximum(c, a) / (1.5 + a * a) + x.a.exp().clamp(max=2)
    return torch.where(new > 0.3, new, 0.2 * new - c.abs()), h


def nobody(x, U, h, c, n, s, p, q, a):
    """What nobody has derived by hand."""
    i, o = F.silu(x.i + U.i(h)), sigmoid(x.o + U.o(h) + q * c)
    decay = exp(-F.softplus(x.d + U.d(n) + p * a))
    c = decay * c + (1 - decay) * i
    n = torch.maximum(decay * n, i * tanh(x.n + U.n(o * h)))
    s = s + 0.1 * (a * tanh(c) - s)
    return o * tanh(c + n) + p * s, c, n, s


def _declared(gates, states="h", params="", inputs="", constants="", outputs="", saved=0):
    given = {"params": params, "inputs": inputs, "constants": constants, "outputs": outputs}
    return {"gates": gates, "states": states, **{k: v for k, v in given.items() if v}}, saved


# step: how it is declared, and how many tiles it saves
STEPS = {
    my_lstm: _declared("i f g o", "h c", saved=4),
    my_gru: _declared("r z n", saved=4),
    my_gru_before: _declared("r z n", saved=3),
    my_rnn_tanh: _declared("n", saved=0),
    my_rnn_relu: _declared("n", saved=0),
    mgu: _declared("f n", saved=2),
    ugrnn: _declared("c g", saved=2),
    cifg: _declared("f g o", "h c", saved=3),
    peephole: _declared("i f g o", "h c", "p_i p_f p_o", saved=4),
    indrnn: _declared("n", params="u", saved=0),
    slstm: _declared("z i f o", "h c n m", saved=6),
    augru: _declared("r z n", inputs="a", saved=5),
    gru_d: _declared("r z n", params="decay shift", inputs="delta", saved=4),
    lem: _declared("a b z y", "y z", constants="dt=0.5", saved=4),
    cornn: _declared("y z", "y z", constants="dt=0.042 gamma=2.7 epsilon=4.7", saved=1),
    mut3: _declared("z r h", saved=3),
    write_only: _declared("a", "h c seen", saved=1),
    scaled: _declared("a", params="alpha:1 p", saved=1),
    params_alone: _declared("a b", "h c", params="p", saved=1),
    euler: _declared("a", constants="dt=0.1 gamma=0.01", saved=1),
    one_product_twice: _declared("a b", saved=4),
    with_output: _declared("a b", "h c", outputs="y", saved=2),
    late: _declared("g a b", saved=5),
    product_with_c: _declared("f g o", "h c", saved=3),
    peculiar: _declared("a b", "h c", saved=4),
    nobody: _declared("i o d n", "h c n s", "p q", "a", saved=6),
}
NAMES = [step.__name__ for step in STEPS]


def define(step, gates="", **others):
    """The step as a cell: declared as in STEPS, or of these gates and states by its arguments."""
    arguments = " ".join(list(inspect.signature(step).parameters)[2:])
    declared = STEPS[step][0] if step in STEPS and not gates else {"gates": gates, "states": arguments}
    return seqcells.cell(**{**declared, **others})(step)


@pytest.fixture(name="registered")
def registries(monkeypatch):
    """The steps as cells, by name; which are none of other tests'."""
    cells = sys.modules["seqcells.cell"]  # seqcells.cell is the function
    registries = [(cells, "_BY_KEY"), (cells, "_BY_NAME"), (registry, "REGISTERED"), (registry, "_LATER")]
    # What is remembered of a cell by its key must not outlive it: the gallery has cells of these names.
    registries += [(products, "_PLACES"), (derived, "_FOUND"), (layer, "_ORDERS")]
    for of, name in registries:
        others = {key: made for key, made in getattr(of, name).items() if key.partition("#")[0] not in NAMES}
        monkeypatch.setattr(of, name, others)
    triton.plan_for.cache_clear()
    yield {step.__name__: define(step) for step in STEPS}
    triton.plan_for.cache_clear()

"""Gate initialisers, tested by the gates' values, and weights of other libraries, by those libraries' formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqcells
from seqcells import init, interop
from seqcells.tasks.handwritten import HandwrittenGRUCell, HandwrittenLSTMCell

LAYOUTS = [{}, {"num_layers": 2, "bidirectional": True}]
SPACES = [seqcells, nn]


@pytest.fixture(autouse=True)
def on_the_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def biases(module):
    """The sums bias_ih + bias_hh, [gates, H], of every layer and direction."""
    named = dict(module.named_parameters())
    sums = [p + named[n.replace("_ih", "_hh")] for n, p in named.items() if n.startswith("bias_ih")]
    return [s.detach().view(-1, module.hidden_size) for s in sums]


def modules(name, *args, **options):
    """One layer and several, and the cell, of both libraries."""
    for space in SPACES:
        yield getattr(space, f"{name}Cell")(*args, **options)
        for layout in LAYOUTS:
            yield getattr(space, name)(*args, **layout, **options)


def test_forget_bias():
    for module in modules("LSTM", 3, 4):
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        assert init.forget_bias_(module, 2.5) is module
        for i, f, *_ in biases(module):
            assert (f == 2.5).all() and (i != 2.5).all()
        rows = torch.zeros(16, dtype=torch.bool)
        rows[4:8] = True
        for name, p in module.named_parameters():
            touched = rows if "bias" in name else torch.zeros_like(rows)
            assert torch.equal(p[~touched], before[name][~touched]), "nothing else changes"
            assert "bias_hh" not in name or (p[rows] == 0).all()
            assert p.requires_grad and p.grad_fn is None
    (_, f, *_), *_ = biases(init.forget_bias_(seqcells.LSTM(3, 4, dtype=torch.bfloat16)))
    assert (f == 1).all()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_chrono(name):
    for module in modules(name, 3, 200):
        generator = torch.Generator(DEVICE).manual_seed(0)
        random = torch.get_rng_state()
        assert init.chrono_(module, 100, generator=generator) is module
        assert torch.equal(torch.get_rng_state(), random)
        drawn = []
        for gates in biases(module):
            keep = gates[1]  # f of i f g o, z of r z n
            drawn.append(keep)
            assert keep.min() >= 0 and keep.max() <= math.log(99)
            assert 35 < keep.exp().mean() < 65, "u is uniform on [1, 99]"
            if name == "LSTM":
                assert torch.equal(gates[0], -keep)
        assert len(drawn) == len(drawn[0].new_tensor([d.sum() for d in drawn]).unique())
        again = init.chrono_(module, 100, generator=torch.Generator(DEVICE).manual_seed(0))
        assert all(torch.equal(a[1], d) for a, d in zip(biases(again), drawn, strict=True))
    for form in (True, False):
        half = init.chrono_(seqcells.GRU(3, 50, dtype=torch.bfloat16, reset_after=form), 1000)
        assert len(biases(half)[0][1].unique()) > 25


def test_accumulators():
    for module in modules("LSTM", 3, 4):
        for i, f, *_ in biases(init.accumulator_(module)):
            assert (f == 14).all() and (i == -9).all()
        for i, f, *_ in biases(init.accumulator_(module, keep=6.0, add=-3.0)):
            assert (f == 6).all() and (i == -3).all()
    for module in [*modules("GRU", 3, 4), seqcells.GRU(3, 4, reset_after=False)]:
        for _, z, _ in biases(init.accumulator_(module)):
            assert (z == 8).all()
        for _, z, _ in biases(init.accumulator_(module, keep=4.0)):
            assert (z == 4).all()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_an_accumulator_adds(name):
    """Long after its ones, the state is what they added, and three add three times what one adds."""
    torch.manual_seed(0)
    layer = init.accumulator_(getattr(seqcells, name)(1, 8, dtype=torch.float64))
    x = torch.zeros(100, 3, 1, dtype=torch.float64)
    x[5, 1] = 1
    x[[5, 20, 60], 2] = 1
    y = layer(x)[0].detach()
    one, three = y[-1, 1] - y[-1, 0], y[-1, 2] - y[-1, 0]
    at_once = y[6, 1] - y[6, 0]
    assert (one / at_once - 1).abs().median() < 0.2 and (three / one - 3).abs().median() < 0.2


def test_gate_bias():
    layer = seqcells.Recurrent("minimal_rnn", 3, 4, num_layers=2)  # gates z u v, of which u has b_hh alone
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    assert init.gate_bias_(layer, u=4.0) is layer
    for n, p in layer.named_parameters():
        assert (p == 4).all() if n.startswith("bias_hh") else torch.equal(p, before[n])
    one, two = seqcells.LSTM(3, 4), nn.LSTM(3, 4)
    two.load_state_dict(one.state_dict())
    init.forget_bias_(one, 2.0)
    init.gate_bias_(two, f=2.0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("heads", [1, 3])
def test_orthogonal(heads):
    layer = seqcells.Recurrent("lem", 3, 12, num_layers=2, bidirectional=True, heads=heads, dtype=torch.bfloat16)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    one, two = (torch.Generator().manual_seed(0) for _ in range(2))
    assert init.orthogonal_(layer, 2.0, generator=one) is layer
    for n, p in layer.named_parameters():
        if not n.startswith("weight_hh"):
            assert torch.equal(p, before[n])
            continue
        for block in p.detach().double().split(12 // heads):
            torch.testing.assert_close(block @ block.T, 4 * torch.eye(12 // heads).double(), rtol=0, atol=0.1)
    again = init.orthogonal_(copy.deepcopy(layer), 2.0, generator=two)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
    gru = init.orthogonal_(nn.GRU(3, 4))
    torch.testing.assert_close(gru.weight_hh_l0[4:8] @ gru.weight_hh_l0[4:8].T, torch.eye(4))


def test_indrnn():
    layer = init.indrnn_(seqcells.Recurrent("indrnn", 3, 500, num_layers=2), 10)
    assert 0 <= layer.u_l1.min() < 0.1 and 1.0 < layer.u_l1.max() <= 2**0.1
    cell = init.indrnn_(seqcells.RecurrentCell("indrnn", 3, 500), 10, last=True)
    assert cell.u.min() >= 2**-0.1 and cell.u.max() <= 2**0.1


def test_initialisers_refuse():
    for call, words in (
        (
            lambda: init.forget_bias_(nn.Linear(1, 1)),
            "forget_bias_: module must be an LSTM or LSTMCell of .* got a Linear",
        ),
        (lambda: init.forget_bias_(seqcells.GRU(1, 1)), "got a GRU"),
        (
            lambda: init.chrono_(nn.RNN(1, 1), 10),
            "chrono_: module must be an LSTM or LSTMCell or GRU or GRUCell .* got an RNN",
        ),
        (lambda: init.accumulator_(nn.RNNCell(1, 1)), "got an RNNCell"),
        (lambda: init.gate_bias_(nn.GRU(1, 1), f=1.0), "gate_bias_: module must be .* gate f, got a GRU"),
        (lambda: init.gate_bias_(seqcells.Recurrent("minimal_rnn", 1, 1), v=1.0), "a gate v, got a Recurrent, whose"),
        (lambda: init.gate_bias_(nn.GRU(1, 1), z="1"), "z must be a number"),
        (lambda: init.gate_bias_(nn.GRU(1, 1)), "at least one gate, by its name"),
        (lambda: init.orthogonal_(nn.Linear(1, 1)), "orthogonal_: module must be a recurrent module .* got a Linear"),
        (lambda: init.orthogonal_(seqcells.Recurrent("indrnn", 1, 1)), "with recurrent weights, got a Recurrent"),
        (lambda: init.orthogonal_(nn.GRU(1, 1), "1"), "gain must be a number"),
        (lambda: init.orthogonal_(nn.GRU(1, 1), generator=0), "generator must be a torch.Generator or None"),
        (lambda: init.indrnn_(nn.RNN(1, 1), 10), "indrnn_: module must be a Recurrent .* got an RNN"),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    for call, words in (
        (lambda: init.forget_bias_(seqcells.LSTM(1, 1, bias=False)), "this LSTM has no bias"),
        (lambda: init.chrono_(nn.GRUCell(1, 1, bias=False), 10), "this GRUCell has no bias"),
        (lambda: init.chrono_(nn.GRU(1, 1), 2), "max_length must be more than 2"),
        (lambda: init.chrono_(nn.GRU(1, 1), math.nan), "max_length must be more than 2"),
        (lambda: init.indrnn_(seqcells.Recurrent("indrnn", 1, 1), 0), "max_length must be positive and finite, got 0"),
        (lambda: init.accumulator_(seqcells.GRU(1, 1), add=-9.0), "add is for an LSTM's input gate"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_biases_that_are_computed():
    """Through a parametrization that has an inverse; not past a hook, which would undo it."""

    class Doubled(nn.Module):
        def forward(self, bias):
            return 2 * bias

        def right_inverse(self, bias):
            return bias / 2

    for space in SPACES:
        cell = space.LSTMCell(3, 4)
        parametrize.register_parametrization(cell, "bias_ih", Doubled())
        init.forget_bias_(cell, 3.0)
        assert (cell.bias_ih[4:8] == 3).all() and (cell.parametrizations.bias_ih.original[4:8] == 1.5).all()
        prune.random_unstructured(cell, "bias_hh", amount=0.5)
        with pytest.raises(ValueError, match=r"bias_hh is no parameter of this .*LSTMCell"):
            init.forget_bias_(cell, 1.0)
        assert (cell.bias_ih[4:8] == 3).all(), "nothing was changed"
        layer = parametrizations.weight_norm(space.LSTM(3, 4), "weight_ih_l0")
        values = {k: torch.randn_like(v) for k, v in space.LSTMCell(3, 4).state_dict().items()}
        interop.load_(layer, values)
        torch.testing.assert_close(layer.weight_ih_l0.detach(), values["weight_ih"])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def keras_lstm(x, states, kernel, recurrent_kernel, bias):
    h, c = states
    z = x @ kernel + h @ recurrent_kernel + bias
    i, f, g, o = np.split(z, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def keras_gru_after(x, states, kernel, recurrent_kernel, bias):
    (h,) = states
    x_z, x_r, x_h = np.split(x @ kernel + bias[0], 3, axis=1)
    u_z, u_r, u_h = np.split(h @ recurrent_kernel + bias[1], 3, axis=1)
    z, r = sigmoid(x_z + u_z), sigmoid(x_r + u_r)
    return (z * h + (1 - z) * np.tanh(x_h + r * u_h),)


def keras_gru_before(x, states, kernel, recurrent_kernel, bias):
    (h,) = states
    H = h.shape[1]
    x_z, x_r, x_h = np.split(x @ kernel + bias, 3, axis=1)
    z = sigmoid(x_z + h @ recurrent_kernel[:, :H])
    r = sigmoid(x_r + h @ recurrent_kernel[:, H : 2 * H])
    return (z * h + (1 - z) * np.tanh(x_h + (r * h) @ recurrent_kernel[:, 2 * H :]),)


def keras_rnn(x, states, kernel, recurrent_kernel, bias):
    return (np.tanh(x @ kernel + bias + states[0] @ recurrent_kernel),)


def haste_lstm(x, states, kernel, recurrent_kernel, bias):
    h, c = states
    i, g, f, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def haste_gru(x, states, kernel, recurrent_kernel, bias, recurrent_bias):
    return keras_gru_after(x, states, kernel, recurrent_kernel, np.stack([bias, recurrent_bias]))


I, H = 3, 4  # noqa: E741
# name: (formula, gates, shapes of the biases, class, options)
FORMULAS = {
    "keras lstm": (keras_lstm, 4, [(4 * H,)], "LSTM", {}),
    "keras gru": (keras_gru_after, 3, [(2, 3 * H)], "GRU", {}),
    "keras gru before": (keras_gru_before, 3, [(3 * H,)], "GRU", {"reset_after": False}),
    "keras rnn": (keras_rnn, 1, [(H,)], "RNN", {}),
    "haste lstm": (haste_lstm, 4, [(4 * H,)], "LSTM", {}),
    "haste gru": (haste_gru, 3, [(3 * H,), (3 * H,)], "GRU", {}),
}


def arrays(name, input_size=I):
    _, gates, bias_shapes, *_ = FORMULAS[name]
    random = np.random.default_rng(0)
    shapes = [(input_size, gates * H), (H, gates * H), *bias_shapes]
    return [random.normal(size=s) for s in shapes]


def loaded(name, module, given, *place):
    if name.startswith("keras"):
        return interop.load_keras_(module, given, *place)
    return interop.load_(module, interop.from_haste(*given, cell=name.split()[1]), *place)


@pytest.mark.parametrize("name", FORMULAS)
def test_other_libraries_formulas(name):
    formula, _, _, cls, options = FORMULAS[name]
    given = arrays(name)
    cell = getattr(seqcells, f"{cls}Cell")(I, H, dtype=torch.float64, **options)
    layer = getattr(seqcells, cls)(I, H, dtype=torch.float64, **options)
    for module in (cell, layer):
        assert loaded(name, module, given) is module
    random = np.random.default_rng(1)
    x = random.normal(size=(5, 2, I))
    states = [random.normal(size=(2, H)) for _ in range(2 if cls == "LSTM" else 1)]
    hx = tuple(torch.tensor(s, device=DEVICE) for s in states)
    y, _ = layer(torch.tensor(x, device=DEVICE), tuple(s[None] for s in hx) if cls == "LSTM" else hx[0][None])
    for step, expected in zip(x, y.detach().cpu().numpy(), strict=True):
        states = formula(step, states, *given)
        hx = cell(torch.tensor(step, device=DEVICE), hx if cls == "LSTM" else hx[0])
        hx = hx if cls == "LSTM" else (hx,)
        np.testing.assert_allclose([s.detach().cpu().numpy() for s in hx], states, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(expected, states[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in FORMULAS if n.startswith("keras")])
def test_to_keras_is_the_inverse(name):
    _, _, _, cls, options = FORMULAS[name]
    given = arrays(name)
    for module in (getattr(seqcells, c)(I, H, dtype=torch.float64, **options) for c in (cls, f"{cls}Cell")):
        found = interop.to_keras(interop.load_keras_(module, given))
        assert all(a.flags.c_contiguous and a.flags.writeable for a in found)
        for a, b in zip(found, given, strict=True):
            np.testing.assert_array_equal(a, b)
    drawn = getattr(seqcells, f"{cls}Cell")(I, H, **options)
    again = interop.load_keras_(getattr(seqcells, f"{cls}Cell")(I, H, **options), interop.to_keras(drawn))
    x = torch.randn(2, I)
    torch.testing.assert_close(again(x), drawn(x))
    half = getattr(seqcells, cls)(I, H, bias=False, dtype=torch.bfloat16, **options)
    assert [a.dtype for a in interop.to_keras(half)] == [np.float32] * 2


def test_one_layer_and_direction_of_several():
    first, second = arrays("keras gru"), arrays("keras gru", 2 * H)
    for space in SPACES:
        layer = space.GRU(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        interop.load_keras_(layer, first, 0, reverse=True)
        interop.load_keras_(layer, second, layer=1)
        changed = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if n.endswith(("_l0_reverse", "_l1"))}
        for given, *place in ((first, 0, True), (second, 1, False)):
            for a, b in zip(interop.to_keras(layer, *place), given, strict=True):
                np.testing.assert_array_equal(a, b)


def test_loading_without_bias():
    kernels = arrays("keras lstm")[:2]
    bare = interop.load_keras_(seqcells.LSTM(I, H, bias=False), kernels)
    full = interop.load_keras_(seqcells.LSTM(I, H), [torch.tensor(k) for k in kernels])
    x = torch.randn(5, 2, I)
    torch.testing.assert_close(full(x), bare(x))
    assert set(interop.from_haste(*kernels)) == {"weight_ih", "weight_hh"}


def test_handwritten_cells():
    torch.manual_seed(0)
    x, h, c = torch.randn(2, I), torch.randn(2, H), torch.randn(2, H)
    hand = HandwrittenLSTMCell(I, H)
    cell = interop.load_(seqcells.LSTMCell(I, H), interop.from_handwritten_lstm(hand.state_dict()))
    torch.testing.assert_close(cell(x, (h, c)), hand(x, (h, c)))
    hand = HandwrittenGRUCell(I, H)
    cell = interop.load_(seqcells.GRUCell(I, H, reset_after=False), interop.from_handwritten_gru(hand.state_dict()))
    torch.testing.assert_close(cell(x, h), hand(x, h))
    assert all(torch.equal(v, cell.state_dict()[k]) for k, v in hand.cell_state_dict().items())


def refused_arrays():
    """(call, exception, words)"""
    kernel, recurrent, bias = arrays("keras lstm")
    gru = arrays("keras gru")
    return {
        "recurrent": (
            lambda: interop.from_keras(kernel, recurrent.T),
            ValueError,
            r"recurrent_kernel: expected shape \(16, 64\), got \(16, 4\)",
        ),
        "rank": (
            lambda: interop.from_keras(kernel, recurrent[0]),
            ValueError,
            r"recurrent_kernel: expected shape \(H, 4\*H\), got \(16,\)",
        ),
        "kernel": (
            lambda: interop.from_keras(kernel.T, recurrent),
            ValueError,
            r"kernel: expected shape \(I, 16\), got \(16, 3\)",
        ),
        "bias": (
            lambda: interop.from_keras(kernel, recurrent, bias[1:]),
            ValueError,
            r"bias: expected shape \(16,\), got \(15,\)",
        ),
        "gru form": (
            lambda: interop.load_keras_(seqcells.GRU(I, H, reset_after=False), gru),
            ValueError,
            r"bias of a GRU with reset_after=False: expected shape \(12,\), got \(2, 12\)",
        ),
        "other form": (
            lambda: interop.from_keras(*gru[:2], gru[2][0], cell="gru"),
            ValueError,
            r"bias of a GRU with reset_after=True: expected shape \(2, 12\), got \(12,\)",
        ),
        "cell": (lambda: interop.from_keras(kernel, recurrent, cell="LSTM"), ValueError, "unknown cell 'LSTM'"),
        "haste cell": (lambda: interop.from_haste(kernel, recurrent, cell="rnn"), ValueError, "one of lstm, gru"),
        "haste biases": (lambda: interop.from_haste(*gru[:2], gru[2][0], cell="gru"), ValueError, "has two biases"),
        "haste lstm": (lambda: interop.from_haste(kernel, recurrent, bias, bias), ValueError, "has one bias"),
        "count": (lambda: interop.load_keras_(seqcells.LSTM(I, H), [kernel]), ValueError, "got 1"),
    }


def refused_modules_and_states():
    hand = HandwrittenLSTMCell(I, H).state_dict()
    hand_gru = HandwrittenGRUCell(I, H).state_dict()
    state = interop.from_keras(*arrays("keras lstm"))
    lstm = seqcells.LSTM(I, H)
    return {
        "module": (
            lambda: interop.load_(nn.Linear(1, 1), state),
            TypeError,
            "load_: module must be an LSTM .*got a Linear",
        ),
        "size": (
            lambda: interop.load_(seqcells.LSTM(I + 1, H), state),
            ValueError,
            r"weight_ih: expected shape \(16, 4\), got \(16, 3\)",
        ),
        "no bias": (lambda: interop.load_(nn.LSTM(I, H, bias=False), state), ValueError, "no bias to load into"),
        "layer": (lambda: interop.load_(lstm, state, 1), ValueError, "layer 1 is not there: num_layers is 1"),
        "direction": (lambda: interop.to_keras(lstm, reverse=True), ValueError, "this LSTM is not bidirectional"),
        "cell layer": (lambda: interop.load_(seqcells.LSTMCell(I, H), state, 1), ValueError, "neither layers nor"),
        "projection": (lambda: interop.to_keras(nn.LSTM(I, H, proj_size=2)), ValueError, "proj_size=2"),
        "names": (
            lambda: interop.load_(lstm, {k: v for k, v in state.items() if k != "bias_hh"}),
            ValueError,
            r"missing \['bias_hh'\], unknown \[\]",
        ),
        "hand names": (lambda: interop.from_handwritten_gru(hand), ValueError, r"unknown \['h_fc.bias'"),
        "hand shape": (
            lambda: interop.from_handwritten_lstm(hand | {"x_fc.bias": torch.zeros(3)}),
            ValueError,
            r"x_fc.bias: expected shape \(16,\), got \(3,\)",
        ),
        "hand gru shape": (
            lambda: interop.from_handwritten_gru(hand_gru | {"h_fc_z.weight": torch.zeros(3, 4)}),
            ValueError,
            r"h_fc_z.weight: expected shape \(4, 4\), got \(3, 4\)",
        ),
    }


REFUSED = refused_arrays() | refused_modules_and_states()


@pytest.mark.parametrize("name", list(REFUSED))
def test_loaders_refuse(name):
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_nothing_is_loaded_if_anything_does_not_fit():
    lstm = seqcells.LSTM(I, H)
    before = {k: v.clone() for k, v in lstm.state_dict().items()}
    state = interop.from_keras(*arrays("keras lstm"))
    with pytest.raises(ValueError, match="bias_hh: expected"):
        interop.load_(lstm, state | {"bias_hh": torch.zeros(3)})
    assert all(torch.equal(v, before[k]) for k, v in lstm.state_dict().items())


def test_the_handwritten_cells_former_names():
    for cls in (HandwrittenLSTMCell, HandwrittenGRUCell):
        with pytest.warns(DeprecationWarning, match="use seqcells.tasks.handwritten"):
            assert getattr(seqcells.reference, cls.__name__) is cls
    with pytest.raises(AttributeError):
        seqcells.reference.nothing  # noqa: B018

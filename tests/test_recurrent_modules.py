"""Recurrent and RecurrentCell as modules: parameters, copies, constants, gates by name, and wrong calls."""

import copy
import io
import pickle

import pytest
import torch
from own_cells import B, H, I, T, coupled, device, four, given_to, independent, made, minimal, shown  # noqa: F401
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqcells
from seqcells import init, interop

sigmoid, tanh = torch.sigmoid, torch.tanh
pytestmark = pytest.mark.usefixtures("on_the_device")


def test_parameters():
    """Rows of the gates whose x is read, of those whose U is used, of those among them with a bias; the cell's own."""
    layer = seqcells.Recurrent(four, I, H, num_layers=2, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    one = {"weight_ih": (2 * H, I), "weight_hh": (2 * H, H), "bias_ih": (H,), "bias_hh": (2 * H,), "p": (H,), "q": (1,)}
    two = one | {"weight_ih": (2 * H, 2 * H)}
    expected = {}
    for k, of in enumerate((one, two)):
        for suffix in ("", "_reverse"):
            expected |= {f"{name}_l{k}{suffix}": shape for name, shape in of.items()}
    assert shapes == expected and list(shapes) == list(expected)
    assert not hasattr(seqcells.Recurrent(independent, I, H), "weight_hh_l0")
    assert [n for n, _ in seqcells.Recurrent(four, I, H, bias=False).named_parameters()] == [
        "weight_ih_l0",
        "weight_hh_l0",
        "p_l0",
        "q_l0",
    ]
    wide = seqcells.Recurrent(four, 100, 100)
    for name, p in wide.named_parameters():
        assert p.abs().max() <= 0.1 and (p.numel() < 9 or p.std() > 0.05), f"{name} is of U(-1/sqrt(H), 1/sqrt(H))"


def test_the_built_in_layers_are_recurrent():
    for ours, cell in (("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "rnn_tanh")):
        torch.manual_seed(0)
        named = getattr(seqcells, ours)(I, H, 2, bidirectional=True)
        torch.manual_seed(0)
        layer = seqcells.Recurrent(cell, I, H, 2, bidirectional=True)
        assert isinstance(named, seqcells.Recurrent) and named.cell is layer.cell
        x = torch.randn(T, B, I)
        torch.testing.assert_close(named(x), layer(x))
        step = getattr(seqcells, f"{ours}Cell")(I, H)
        assert isinstance(step, seqcells.RecurrentCell) and isinstance(step, getattr(nn, f"{ours}Cell"))
        other = seqcells.RecurrentCell(cell, I, H)
        other.load_state_dict(step.state_dict())
        torch.testing.assert_close(step(x[0]), other(x[0]))


@pytest.mark.parametrize("kind", [seqcells.Recurrent, seqcells.RecurrentCell])
def test_copies(kind):
    """deepcopy, pickle, torch.save and state_dict: the same cell, with the layer's constants."""
    module = kind(four, I, H, leak=0.7)
    x, inputs = torch.randn(T, B, I), given_to(four, T, B, dtype=torch.float32)
    if kind is seqcells.RecurrentCell:
        x, inputs = x[0], {name: v[0] for name, v in inputs.items()}
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    loaded = kind(four, I, H, leak=0.7)
    loaded.load_state_dict(module.state_dict())
    others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False), loaded)
    for other in others:
        assert other.cell.name == "four" and dict(other.cell.constants) == {"leak": 0.7}
        assert all(p is not q for p, q in zip(other.parameters(), module.parameters(), strict=True))
        torch.testing.assert_close(other(x, **inputs), module(x, **inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_modules_that_earlier_versions_pickled(name):
    """They have the name of their cell, an LSTM not even that."""
    module = getattr(seqcells, name)(I, H)
    state = {key: value for key, value in module.__getstate__().items() if key != "cell"}
    state |= {} if name.startswith("LSTM") else {"cell": "gru"}
    other = object.__new__(type(module))
    other.__setstate__(state)
    assert other.cell is module.cell and repr(other) == repr(module)
    x = torch.randn(B, I)
    torch.testing.assert_close(other(x), module(x))


def test_repr():
    own = seqcells.Recurrent(four, I, H, num_layers=2, leak=0.7)
    assert repr(own) == f"seqcells.Recurrent(four, {I}, {H}, num_layers=2, leak=0.7)"
    assert (
        repr(seqcells.RecurrentCell(minimal, I, H, bias=False))
        == f"seqcells.RecurrentCell(minimal, {I}, {H}, bias=False)"
    )


def test_a_cell_that_is_defined_again():
    """A layer keeps the cell that it was made with."""

    def define(factor):
        @seqcells.cell(gates="n", states="h")
        def again(x, U, h):
            return factor * tanh(x.n + U.n(h))

        return seqcells.Recurrent(again, I, H)

    first, second = define(1.0), define(2.0)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, B, I)
    torch.testing.assert_close(2 * first(x)[0], second(x)[0])


def test_fx():
    """One node, per-step inputs among its arguments."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = made(four)

        def forward(self, x, w):
            return self.layer(x, w=w, return_states=True)

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    (node,) = [n for n in graph.graph.nodes if n.op == "call_module"]
    assert node.target == "layer" and set(node.kwargs) == {"w", "return_states"}
    x, w = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B, dtype=torch.float64)
    torch.testing.assert_close(graph(x, w), model(x, w))


def test_initialisers_know_gates_by_name():
    layer = init.forget_bias_(seqcells.Recurrent(coupled, I, H, num_layers=2, bidirectional=True), 2.0)
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        ih, hh = getattr(layer, f"bias_ih{suffix}"), getattr(layer, f"bias_hh{suffix}")
        assert (ih[:H] == 2).all() and (hh[:H] == 0).all() and (hh[H:] != 0).all() and (ih[H:] != 2).all()
    step = init.chrono_(seqcells.RecurrentCell(coupled, I, H), 50)
    drawn = step.bias_ih.detach()
    assert (drawn[:H] > 0).all() and not torch.equal(drawn[H : 2 * H], -drawn[:H]), "there is no input gate to set"
    assert (init.accumulator_(step).bias_ih[:H] == 8).all()

    @seqcells.cell(gates="g f i", states="h", bias="f i")
    def three(x, U, h):
        return sigmoid(U.f(h)) * h + sigmoid(x.i) * tanh(x.g + U.g(h))

    cell = seqcells.RecurrentCell(three, I, H)
    init.accumulator_(cell, keep=3.0, add=-2.0)  # f has no x: its bias is in bias_hh, the only one there
    assert (cell.bias_hh == 3).all() and (cell.bias_ih == -2).all()
    with pytest.raises(
        TypeError, match=r"forget_bias_: module must be .* a gate f, got a Recurrent, whose gates are g, r"
    ):
        init.forget_bias_(seqcells.Recurrent(shown, I, H))
    with pytest.raises(
        TypeError, match=r"chrono_: module must be .* a gate f or z, got a Recurrent, whose gates are n"
    ):
        init.chrono_(seqcells.Recurrent(independent, I, H), 10)
    with pytest.raises(ValueError, match="a RecurrentCell adds by 1 - f"):
        init.accumulator_(step, add=1.0)


def test_weights_of_one_step_go_into_a_layer():
    step, layer = seqcells.RecurrentCell(four, 2 * H, H), made(four, 2, bidirectional=True, dtype=torch.float32)
    assert interop.load_(layer, step.state_dict(), 1, reverse=True) is layer
    for name, value in step.state_dict().items():
        assert torch.equal(getattr(layer, f"{name}_l1_reverse"), value)
    with pytest.raises(ValueError, match=r"missing \['p'\]"):
        interop.load_(step, {n: v for n, v in step.state_dict().items() if n != "p"})
    with pytest.raises(TypeError, match=r"to_keras: module must be .*, whose cell is minimal"):
        interop.to_keras(seqcells.Recurrent(minimal, I, H))


def test_convert_and_revert_leave_it():
    model = nn.ModuleList([seqcells.Recurrent(minimal, I, H), nn.LSTM(I, H)])
    assert type(seqcells.convert(model)[0]) is seqcells.Recurrent
    with pytest.raises(ValueError, match=r"0: torch.nn has no cell minimal; name it in exclude="):
        seqcells.revert(model)
    assert type(seqcells.revert(model, exclude="0")[1]) is nn.LSTM


def test_a_parameter_that_modules_have():
    @seqcells.cell(gates="n", states="h", params="training")
    def named(x, U, h, training):
        return tanh(x.n + training * h)

    assert seqcells.Recurrent(named, I, H).training_l0.shape == (H,)
    with pytest.raises(ValueError, match="cell named: its parameter 'training' has a name that modules have"):
        seqcells.RecurrentCell(named, I, H)


X = torch.zeros(T, B, I)
W = torch.zeros(T, B)
STATE = torch.zeros(1, B, H)
WRONG = {
    "cell": (lambda: seqcells.Recurrent(tanh, I, H), TypeError, "cell"),
    "name": (lambda: seqcells.Recurrent("no_such_cell", I, H), ValueError, "no_such_cell"),
    "constant": (
        lambda: seqcells.Recurrent(four, I, H, decay=1.0),
        TypeError,
        "unexpected keyword argument 'decay': cell four has the constants leak",
    ),
    "no constant": (
        lambda: seqcells.RecurrentCell(minimal, I, H, proj_size=1),
        TypeError,
        "unexpected keyword argument 'proj_size': cell minimal has no constants",
    ),
    "constant's type": (lambda: seqcells.Recurrent(four, I, H, leak="x"), TypeError, "leak must be a number"),
    "missing": (
        lambda: seqcells.Recurrent(four, I, H)(X),
        TypeError,
        "this Recurrent of cell four takes the per-step inputs w, by name: missing w",
    ),
    "unknown": (
        lambda: seqcells.Recurrent(minimal, I, H)(X, a=W),
        TypeError,
        "this Recurrent of cell minimal takes no per-step inputs, by name: unknown a",
    ),
    "step": (lambda: seqcells.RecurrentCell(four, I, H)(X[0]), TypeError, "missing w"),
    "size": (
        lambda: seqcells.Recurrent(four, I, H)(X, w=W[:, :2]),
        RuntimeError,
        r"Expected w size \(5, 3\) or \(5, 3, 4\), got \[5, 2\]",
    ),
    "input's type": (lambda: seqcells.Recurrent(four, I, H)(X, w=[1.0]), TypeError, "w must be a tensor"),
    "dtype": (lambda: seqcells.Recurrent(four, I, H)(X, w=W.double()), RuntimeError, "w must be torch.float32 on"),
    "states": (
        lambda: seqcells.Recurrent(four, I, H)(X, (STATE, STATE), w=W),
        TypeError,
        r"state must be a tuple of 4 tensors \(h, c, n, m\) or None, got a tuple of 2",
    ),
    "one state": (lambda: seqcells.Recurrent(minimal, I, H)(X, (STATE,)), TypeError, "state must be a tensor or None"),
    "state size": (
        lambda: seqcells.Recurrent(coupled, I, H)(X, (STATE, STATE[..., 1:])),
        RuntimeError,
        r"Expected state\[1\] size \(1, 3, 4\), got \[1, 3, 3\]",
    ),
    "state rank": (
        lambda: seqcells.Recurrent(coupled, I, H)(X, (STATE, STATE[0])),
        RuntimeError,
        r"each state should also be 3-D but got \(3-D, 2-D\) tensors",
    ),
    "step's states": (
        lambda: seqcells.RecurrentCell(coupled, I, H)(X[0], STATE[0]),
        TypeError,
        r"state must be a tuple of 2 tensors \(h, c\) or None, got a tensor",
    ),
    "flag": (lambda: seqcells.Recurrent(minimal, I, H)(X, return_states=1), TypeError, "return_states should be"),
    "packed": (
        lambda: seqcells.Recurrent(four, I, H)(
            pack_padded_sequence(X, [5, 4, 2]), w=pack_padded_sequence(W, [5, 3, 2])
        ),
        RuntimeError,
        "w must have the input's batch_sizes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        call()

"""Layers of any cell against a loop over its step: values, gradients, and every option that torch.nn's layers have."""

import copy
import io
import pickle

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.nn.functional import linear, silu
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqcells
from seqcells import init, interop

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
    a = silu(x.a + U.a(h) + p * c)
    b = torch.log(1 + torch.exp(x.b - q * n))  # softplus
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
I, H, T, B = 3, 4, 5, 3
LENGTHS = [3, 5, 2]


@pytest.fixture(autouse=True)
def on_the_device():
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


def blocks(weight, gates):
    return dict(zip(gates, weight.chunk(len(gates)), strict=True)) if gates else {}


class Gates:
    def __init__(self, of):
        self.__dict__.update(of)


def one_step(layer, suffix, x, states, inputs):
    """The step itself, on this layer's parameters: x [1, I]; states [1, H]. The output and the states after it."""
    cell = layer.cell
    w_ih, w_hh = (blocks(getattr(layer, f"weight_{k}{suffix}", None), g) for k, g in parts(cell))
    b_ih, b_hh = ({}, {})
    if layer.bias:
        b_ih, b_hh = (
            blocks(getattr(layer, f"bias_{k}{suffix}", None), [n for n in g if n in cell.biased])
            for k, g in parts(cell)
        )
    of_x = Gates({g: linear(x, w, b_ih.get(g)) for g, w in w_ih.items()})
    of_u = Gates({g: lambda v, w=w, b=b_hh.get(g): linear(v, w, b) for g, w in w_hh.items()})
    params = {name: getattr(layer, name + suffix).expand(H) for name in cell.params}
    found = cell.step(of_x, of_u, *states, **params, **inputs, **cell.constants)
    found = found if isinstance(found, tuple) else (found,)
    return (found[-1], found[:-1]) if cell.outputs else (found[0], found)


def parts(cell):
    return ("ih", cell.x_gates), ("hh", cell.u_gates)


def loop(layer, x, states, inputs, resets=None, lengths=None):
    """What the layer should give, sequence after sequence: output, final states, states after every step.

    x [T, B, I]; states [layers * directions, B, H] each; inputs [T, B, H]."""
    count = 2 if layer.bidirectional else 1
    lengths = [len(x)] * x.shape[1] if lengths is None else lengths
    finals = []
    for k in range(layer.num_layers):
        columns = []
        for d in range(count):
            suffix, row = f"_l{k}{'_reverse' * d}", k * count + d
            rows = []
            for b, n in enumerate(lengths):
                now = [s[row, b][None] for s in states]
                zero = torch.zeros(1, H, dtype=x.dtype)
                every = [(zero, *([zero] * len(now)))] * len(x)
                for t in reversed(range(n)) if d else range(n):
                    begins = t + 1 < n and resets[t + 1, b] if d else resets[t, b]
                    now = [torch.zeros_like(s) for s in now] if begins else now
                    y, now = one_step(layer, suffix, x[t, b][None], now, {i: v[t, b][None] for i, v in inputs.items()})
                    every[t] = y, *now
                rows.append(([torch.cat(of) for of in zip(*every, strict=True)], [torch.cat([s]) for s in now]))
            columns.append([torch.stack(of, 1) for of in zip(*(every for every, _ in rows), strict=True)])
            finals.append([torch.cat(of) for of in zip(*(now for _, now in rows), strict=True)])
        x, *every = (torch.cat(of, 2) for of in zip(*columns, strict=True))
    return x, [torch.stack(of) for of in zip(*finals, strict=True)], every


def tuples(value):
    return list(value) if isinstance(value, tuple) and not isinstance(value, PackedSequence) else [value]


def weighted(outputs):
    return sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)


FORMS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True, "num_layers": 2},
    "unbatched": {"bidirectional": True},
    "resets": {"num_layers": 2, "bidirectional": True},
    "lengths": {"num_layers": 2, "bidirectional": True},
    "packed": {"num_layers": 2, "bidirectional": True},
    "packed inputs": {"bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CELLS)
def test_a_layer_is_a_loop_over_the_step(name, form, backend):
    cell, options = CELLS[name], FORMS[form]
    layer = made(cell, backend=backend, **options)
    batch = 1 if form == "unbatched" else B
    x, inputs = torch.randn(T, batch, I, dtype=torch.float64), given_to(cell, T, batch)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(rows, batch, H, dtype=torch.float64) for _ in cell.states]
    resets = torch.rand(T, batch) < (0.3 if form in ("resets", "packed") else 0)
    lengths = LENGTHS if form in ("lengths", "packed", "packed inputs") else None
    leaves = [t.requires_grad_() for t in (x, *states, *inputs.values(), *layer.parameters())]

    y, final, every = loop(layer, x, states, inputs, resets, lengths)
    expected = [y, *final, *every]
    wanted = torch.autograd.grad(weighted(expected), leaves, allow_unused=True)

    def laid(t):
        """As the layer takes and gives it."""
        return t.transpose(0, 1) if layer.batch_first else t[:, 0] if form == "unbatched" else t

    def of_state(s):
        return s[:, 0] if form == "unbatched" else s

    def packed(t):
        return pack_padded_sequence(laid(t), LENGTHS, layer.batch_first, enforce_sorted=False)

    own = tuple(of_state(s) for s in states)
    call = {"resets": laid(resets) if resets.any() else None, "return_states": True}
    if form == "lengths":
        nan = (torch.arange(T)[:, None, None] >= torch.tensor(LENGTHS)[:, None]).expand(T, B, 1)
        call |= {i: v.masked_fill(nan, torch.nan) for i, v in inputs.items()} | {"lengths": LENGTHS}
        found = layer(x.masked_fill(nan, torch.nan), own if len(own) > 1 else own[0], **call)
    elif form.startswith("packed"):
        call |= {i: packed(v) if form == "packed inputs" else laid(v) for i, v in inputs.items()}
        found = layer(packed(x), own if len(own) > 1 else own[0], **call)
    else:
        found = layer(laid(x), own if len(own) > 1 else own[0], **call | {i: laid(v) for i, v in inputs.items()})
    y, final, every = found
    assert isinstance(final, torch.Tensor) == (len(cell.states) == 1), "of one state a tensor, of several a tuple"
    flat = [y, *tuples(final), *tuples(every)]
    if form.startswith("packed"):
        flat = [
            pad_packed_sequence(t, layer.batch_first, total_length=T)[0] if isinstance(t, PackedSequence) else t
            for t in flat
        ]
    ends = len(cell.states)
    # In the loop's own layout.
    flat = [t.transpose(0, 1) if layer.batch_first and not 1 <= i <= ends else t for i, t in enumerate(flat)]
    flat = [t.unsqueeze(1) if form == "unbatched" else t for t in flat]
    torch.testing.assert_close(flat, expected, rtol=1e-9, atol=1e-11)
    gradients = torch.autograd.grad(weighted(flat), leaves, allow_unused=True)
    for leaf, got, want in zip(leaves, gradients, wanted, strict=True):
        got, want = (torch.zeros_like(leaf) if g is None else g for g in (got, want))  # a gradient of none is zero
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_one_step_is_a_sequence_of_one(name):
    cell, x = CELLS[name], torch.randn(B, I, dtype=torch.float64)
    module = seqcells.RecurrentCell(cell, I, H, dtype=torch.float64)
    layer = made(cell)
    layer.load_state_dict({f"{part}_l0": value for part, value in module.state_dict().items()})
    states = tuple(torch.randn(B, H, dtype=torch.float64) for _ in cell.states)
    inputs = given_to(cell, B)
    given = states if len(states) > 1 else states[0]
    found = module(x, given, **inputs)
    y, final = layer(x[None], *[_with_axis(given)], **{i: v[None] for i, v in inputs.items()})
    final = tuple(s[0] for s in final) if isinstance(final, tuple) else final[0]
    torch.testing.assert_close(found, (y[0], final) if cell.outputs else final, rtol=1e-9, atol=1e-11)
    alone = module(
        x[0], tuple(s[0] for s in states) if len(states) > 1 else states[0][0], **{i: v[0] for i, v in inputs.items()}
    )
    first = [t[0] for t in torch.utils._pytree.tree_leaves(found)]
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(alone), first, rtol=1e-9, atol=1e-11)
    zeros = tuple(torch.zeros(B, H, dtype=torch.float64) for _ in states)
    torch.testing.assert_close(module(x, **inputs), module(x, zeros if len(zeros) > 1 else zeros[0], **inputs))


def _with_axis(given):
    return tuple(s[None] for s in given) if isinstance(given, tuple) else given[None]


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


def test_one_value_for_all_units():
    """A per-step input [T, B], and its gradient, which is a sum over the units, layers and directions."""
    layer = made(four, 2, bidirectional=True)
    x, w = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B, dtype=torch.float64, requires_grad=True)
    wide = w.detach()[..., None].expand(T, B, H).clone().requires_grad_()
    (y, _), (other, _) = layer(x, w=w), layer(x, w=wide)
    torch.testing.assert_close(y, other)
    y.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(w.grad, wide.grad.sum(2))
    assert torch.autograd.gradcheck(lambda w: layer(x, w=w)[0], w)


@pytest.mark.parametrize("backend", ["triton:resident", "triton:grid", "triton:stepwise"])
@pytest.mark.parametrize("name", CELLS)
def test_kernels(name, backend):
    """Two directions of two layers, with all options; what the schedules do in more cases is for other tests."""
    cell = CELLS[name]
    layer = made(cell, 2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    inputs = given_to(cell, T, B)
    call = {"resets": torch.rand(T, B) < 0.3, "lengths": LENGTHS, "return_states": True}
    leaves = [t.requires_grad_() for t in (x, *inputs.values(), *layer.parameters())]
    found = []
    for layer.backend in ("reference", backend):
        outputs = torch.utils._pytree.tree_leaves(layer(x, **call, **inputs))
        found.append((outputs, torch.autograd.grad(weighted(outputs), leaves)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_dropout():
    """Between layers, in training only, of a packed input as of others; per-step inputs are not dropped."""
    layer = made(four, 2, dropout=0.5)
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(four, T, B)
    layer.eval()
    still, _ = layer(x, **inputs)
    torch.testing.assert_close(still, layer(x, **inputs)[0], rtol=0, atol=0)
    layer.train()
    assert not torch.equal(still, layer(x, **inputs)[0])
    layer.dropout = 1.0
    lower, upper = made(four), made(four)
    for module, k in ((lower, 0), (upper, 1)):
        module.load_state_dict(
            {f"{n[:-1]}0": p for n, p in layer.state_dict().items() if n.endswith(f"_l{k}")}
        ) if k == 0 else None
    nothing, _ = layer(x, **inputs)
    with torch.no_grad():
        layer.weight_ih_l1.zero_()
    layer.eval()
    torch.testing.assert_close(nothing, layer(x, **inputs)[0])


def test_parametrizations():
    """An orthogonal and an antisymmetric U, which optimizers keep so; read afresh at every call."""

    class Antisymmetric(nn.Module):
        def forward(self, weight):
            return torch.cat([u.triu(1) - u.triu(1).T for u in weight.chunk(2)])

    x = torch.randn(T, B, I)
    layer = seqcells.Recurrent(minimal, I, H, num_layers=2)
    parametrizations.orthogonal(layer, "weight_hh_l1")
    parametrize.register_parametrization(layer, "weight_hh_l0", Antisymmetric())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    outputs = []
    for _ in range(3):
        y, _ = layer(x)
        outputs.append(y.detach())
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    for name, p in layer.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} is trained"
    torch.testing.assert_close(layer.weight_hh_l1.T @ layer.weight_hh_l1, torch.eye(H))
    for u in layer.weight_hh_l0.chunk(2):
        torch.testing.assert_close(u, -u.T)
    plain = seqcells.Recurrent(minimal, I, H, num_layers=2)
    plain.load_state_dict({name: getattr(layer, name) for name in plain.state_dict()})
    torch.testing.assert_close(plain(x)[0], layer(x)[0])


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


def test_constants():
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(four, T, B)
    own, usual = made(four, leak=0.7), made(four)
    own.load_state_dict(usual.state_dict())
    zero = [torch.zeros(1, B, H, dtype=torch.float64)] * 4
    never = torch.zeros(T, B, dtype=torch.bool)
    y, _, _ = loop(own, x, zero, inputs, never)
    torch.testing.assert_close(own(x, **inputs)[0], y)
    assert not torch.allclose(own(x, **inputs)[0], usual(x, **inputs)[0])
    assert repr(own) == f"seqcells.Recurrent(four, {I}, {H}, leak=0.7)"
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


@pytest.mark.parametrize("name", CELLS)
def test_per_sample_gradients(name):
    """By vmap over grad, as opposed to one backward for each sample."""
    cell = CELLS[name]
    layer = made(cell, num_layers=2, bidirectional=True)
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(cell, T, B)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x, inputs):
        y, _ = torch.func.functional_call(layer, weights, (x[:, None],), {i: v[:, None] for i, v in inputs.items()})
        return y.square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 1, 1))(weights, x, inputs)
    for b in range(B):
        y, _ = layer(x[:, b : b + 1], **{i: v[:, b : b + 1] for i, v in inputs.items()})
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        for name, grad in zip(weights, grads, strict=True):
            torch.testing.assert_close(found[name][b], grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_compile(name):
    """In one graph, forward and backward."""
    cell = CELLS[name]
    layer = made(cell, num_layers=2, bidirectional=True)
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(cell, T, B)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for module in (layer, compiled):
        y, final = module(x, resets=torch.zeros(T, B, dtype=torch.bool), **inputs)
        found.append((y, final, torch.autograd.grad(y.sum(), list(layer.parameters()), allow_unused=True)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_export(name):
    cell = CELLS[name]
    layer = made(cell, bidirectional=True)
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(cell, T, B)

    class Model(nn.Module):  # torch.export knows no dynamic shapes of arguments that have no name in the signature
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, w=None):
            return self.layer(x, **({} if w is None else {"w": w}))

    batch = torch.export.Dim("batch", min=2)
    model, dynamic = Model(), {name: {1: batch} for name in ("x", *inputs)}
    program = torch.export.export(model, (x,), inputs, dynamic_shapes=dynamic)
    x, inputs = torch.randn(T, B + 2, I, dtype=torch.float64), given_to(cell, T, B + 2)
    torch.testing.assert_close(program.module()(x, **inputs), model(x, **inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_autocast(name):
    """In autocast's dtype, parameters and per-step inputs too, and with gradients in the parameters' own."""
    cell = CELLS[name]
    layer = seqcells.Recurrent(cell, I, H, num_layers=2)
    x, inputs = torch.randn(T, B, I), given_to(cell, T, B, dtype=torch.float32)
    y, _ = layer(x, **inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        low, _ = layer(x, **inputs)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.05)
    low.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


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
        TypeError, match="forget_bias_: module must be .* a gate f, got a Recurrent, whose gates are g, r"
    ):
        init.forget_bias_(seqcells.Recurrent(shown, I, H))
    with pytest.raises(TypeError, match="chrono_: module must be .* a gate f or z, got a Recurrent, whose gates are n"):
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
    with pytest.raises(TypeError, match="to_keras: module must be .*, whose cell is minimal"):
        interop.to_keras(seqcells.Recurrent(minimal, I, H))


def test_convert_and_revert_leave_it():
    model = nn.ModuleList([seqcells.Recurrent(minimal, I, H), nn.LSTM(I, H)])
    assert type(seqcells.convert(model)[0]) is seqcells.Recurrent
    with pytest.raises(ValueError, match="0: torch.nn has no cell minimal; name it in exclude="):
        seqcells.revert(model)
    assert type(seqcells.revert(model, exclude="0")[1]) is nn.LSTM


X = torch.zeros(T, B, I)
W = torch.zeros(T, B)
STATE = torch.zeros(1, B, H)
WRONG = {
    "cell": (lambda: seqcells.Recurrent(tanh, I, H), TypeError, "cell"),
    "name": (lambda: seqcells.Recurrent("nobody", I, H), ValueError, "nobody"),
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


def test_a_parameter_that_modules_have():
    @seqcells.cell(gates="n", states="h", params="training")
    def named(x, U, h, training):
        return tanh(x.n + training * h)

    assert seqcells.Recurrent(named, I, H).training_l0.shape == (H,)
    with pytest.raises(ValueError, match="cell named: its parameter 'training' has a name that modules have"):
        seqcells.RecurrentCell(named, I, H)

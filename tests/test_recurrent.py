"""Layers of any cell against a loop over its step: values, gradients, and every option that torch.nn's layers have."""

from functools import partial

import pytest
import torch
from conftest import DEVICE
from own_cells import CELLS, LENGTHS, B, H, I, T, device, four, given_to, made, minimal  # noqa: F401
from shapes import spread
from steps import registries  # noqa: F401  (a fixture)
from torch import nn
from torch.nn.functional import dropout, linear
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqcells

NAMES = [*CELLS, "nobody"]  # the last one: see steps
pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture(name="cells")
def every_cell(registered):
    return registered | CELLS


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
    of_u = Gates({g: partial(linear, weight=w, bias=b_hh.get(g)) for g, w in w_hh.items()})
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
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_a_loop_over_the_step(name, form, backend, cells):
    cell, options = cells[name], FORMS[form]
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


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_a_sequence_of_one(name, cells):
    cell, x = cells[name], torch.randn(B, I, dtype=torch.float64)
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


@pytest.mark.parametrize(
    ("name", "backend"), spread(NAMES, ["triton:resident", "triton:grid", "triton:stepwise"], most=2)
)
def test_kernels(name, backend, cells):
    """Two directions of two layers, with all options; what the schedules do in more cases is for other tests."""
    cell = cells[name]
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


def test_constants():
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(four, T, B)
    own, usual = made(four, leak=0.7), made(four)
    own.load_state_dict(usual.state_dict())
    zero = [torch.zeros(1, B, H, dtype=torch.float64)] * 4
    never = torch.zeros(T, B, dtype=torch.bool)
    y, _, _ = loop(own, x, zero, inputs, never)
    torch.testing.assert_close(own(x, **inputs)[0], y)
    assert not torch.allclose(own(x, **inputs)[0], usual(x, **inputs)[0])


@pytest.mark.parametrize("packed", [False, True])
def test_dropout(packed):
    """Of what one layer hands to the next, in training; of a packed input's rows alone, as torch.nn draws them."""
    layer = made(four, 2, dropout=0.5)
    lower, upper = made(four), seqcells.Recurrent(four, H, H, dtype=torch.float64)
    for module, k in ((lower, 0), (upper, 1)):
        module.load_state_dict({f"{n[:-1]}0": p for n, p in layer.state_dict().items() if n.endswith(f"_l{k}")})
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(four, T, B)
    if packed:
        x = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)

    def dropped(y):
        return y._replace(data=dropout(y.data, 0.5)) if packed else dropout(y, 0.5)

    torch.manual_seed(1)
    y, _ = layer(x, **inputs)
    torch.manual_seed(1)
    expected, _ = upper(dropped(lower(x, **inputs)[0]), **inputs)
    torch.testing.assert_close(y, expected)
    layer.eval()
    torch.testing.assert_close(layer(x, **inputs)[0], upper(lower(x, **inputs)[0], **inputs)[0])


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


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients(name, cells):
    """By vmap over grad, as opposed to one backward for each sample."""
    cell = cells[name]
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


@pytest.mark.parametrize("name", NAMES)
def test_compile(name, cells):
    """In one graph, forward and backward."""
    cell = cells[name]
    layer = made(cell, num_layers=2, bidirectional=True)
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(cell, T, B)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for module in (layer, compiled):
        y, final = module(x, resets=torch.zeros(T, B, dtype=torch.bool), **inputs)
        found.append((y, final, torch.autograd.grad(y.sum(), list(layer.parameters()), allow_unused=True)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_export(name, cells):
    cell = cells[name]
    layer = made(cell, bidirectional=True)
    x, inputs = torch.randn(T, B, I, dtype=torch.float64), given_to(cell, T, B)

    class Model(nn.Module):  # torch.export knows no dynamic shapes of arguments that have no name in the signature
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, inputs):
            return self.layer(x, **inputs)

    batch = torch.export.Dim("batch", min=2)
    model, dynamic = Model(), {"x": {1: batch}, "inputs": {name: {1: batch} for name in inputs}}
    program = torch.export.export(model, (x, inputs), dynamic_shapes=dynamic)
    x, inputs = torch.randn(T, B + 2, I, dtype=torch.float64), given_to(cell, T, B + 2)
    torch.testing.assert_close(program.module()(x, inputs), model(x, inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, cells):
    """In autocast's dtype, parameters and per-step inputs too, and with gradients in the parameters' own."""
    cell = cells[name]
    layer = seqcells.Recurrent(cell, I, H, num_layers=2)
    x, inputs = torch.randn(T, B, I), given_to(cell, T, B, dtype=torch.float32)
    y, _ = layer(x, **inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        low, _ = layer(x, **inputs)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.05)
    low.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())

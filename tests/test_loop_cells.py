"""The loop of derived cells: every kind of step against itself, in float64; compiled, vmapped, in other precisions."""

import sys

import pytest
import torch
from shapes import spread
from steps import STEPS, define
from torch.utils._pytree import tree_leaves

from seqcells import functional
from seqcells.engines.loop import part_of, steps

T, B, I, H = 7, 4, 3, 5  # noqa: E741
KINDS = ["plain", "resets", "lengths", "both"]
WAYS = [(False,), (True,), (False, True)]


def swap(x, U, h, k):
    """Each state is the other before the step, or of it."""
    return torch.tanh(x.a + U.a(h) + k), h


def rotate(x, U, h, k, l):  # noqa: E741
    """Three states that change places: their gradients do, too."""
    return l, torch.tanh(x.a + U.a(h) + U.b(l)), k


def one_tile(x, U, h, c):
    """Two products added to one tile, of different operands, and of one."""
    return torch.tanh(x.a + U.a(h) + U.b(c) + U.d(h)), torch.sigmoid(x.e) * c


def doubled(x, U, h):
    """What the product adds to is no plain sum, and a gate that is saved before it is bent."""
    a = 0.5 * x.a + 0.5 * U.a(h)
    return torch.sin(a) * torch.exp(-a * a) + torch.cos(x.b + U.b(h))


def x_alone(x, U, h):
    """No product, and a decay made of the input alone."""
    return torch.exp(-torch.relu(x.d)) * h + (1 - torch.exp(-torch.relu(x.d))) * torch.tanh(x.n)


OWN = {swap: "a", rotate: "a b", one_tile: "a b d e", doubled: "a b", x_alone: "d n"}
EVERY = {step.__name__: step for step in (*STEPS, *OWN)}


def defined():
    """All of them as cells. What their names mean to other tests stays."""
    names = sys.modules["seqcells.cell"]._BY_NAME  # seqcells.cell is the function
    before = dict(names)
    found = {name: define(step, OWN.get(step, "")) for name, step in EVERY.items()}
    names.clear()
    names.update(before)
    return found


CELLS = defined()


def case(cell, kind="plain", ways=(False,), dtype=torch.float64, bias=True, hx=True, sizes=(T, B, I, H)):
    """The arguments of scan_groups, and all that are leaves."""
    generator, K = torch.Generator().manual_seed(1), len(ways)
    T, B, I, H = sizes  # noqa: E741

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).mul(0.7).to(dtype).requires_grad_()

    rows = cell.rows
    w_hh = drawn(K, rows[1] * H, H) if rows[1] else None
    biases = [drawn(K, n * H) if bias and n else None for n in rows[2:]]
    weights = [drawn(K, rows[0] * H, I), w_hh, *biases]
    x, states = drawn(T, B, I), tuple(drawn(K, B, H) for _ in cell.states) if hx else None
    options = {"reverse": ways}
    if cell.params:
        options["params"] = {n: drawn(K, 1 if n in cell.scalars else H) for n in cell.params}
    if cell.inputs:
        options["inputs"] = {n: drawn(T, B, *([H] if k else [])) for k, n in enumerate(cell.inputs)}
    given = [x, *(states or ()), *weights, *(t for n in ("params", "inputs") for t in options.get(n, {}).values())]
    if kind in ("resets", "both"):
        options["resets"] = torch.rand(T, B, generator=generator) < 0.3
    if kind in ("lengths", "both"):
        options["lengths"] = torch.tensor([T, 0, 3, 1])
    return (cell, x, states, *weights), options, [t for t in given if t is not None]


def answer(made, **more):
    """Every state after each step, and every gradient, of all results weighted at random."""
    arguments, options, leaves = made
    y, final, every = functional.scan_groups(*arguments, **options, **more, return_states=True)
    generator, results = torch.Generator().manual_seed(2), [y, *final, *every]
    weighted = [(o * torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype)).sum() for o in results]
    found = torch.autograd.grad(sum(weighted), leaves, allow_unused=True)
    return [*results, *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True))]


@pytest.mark.parametrize("name, kind, ways", spread(list(EVERY), KINDS, WAYS, most=2))
def test_as_the_step_in_small_pieces(name, kind, ways, monkeypatch, poison):
    """Pieces of two rows, so that there are many, and batches of as many stretches; and all in one."""
    for save, bias, hx in (("gates", True, True), ("states", False, True), ("gates", True, False)):
        made = case(CELLS[name], kind, ways, bias=bias, hx=hx)
        expected = answer(made, backend="reference")
        largest = max(t.abs().max().item() for t in expected)  # a quotient by little makes all rounding as large
        for chunk in (2 * H, 1 << 16):
            monkeypatch.setattr(steps, "CHUNK", chunk)
            torch.testing.assert_close(
                answer(made, backend="loop", save=save), expected, atol=1e-12 * largest, rtol=1e-11
            )


def test_gradients_of_gradients():
    """Through the reference: of a cell with everything."""
    arguments, options, leaves = case(CELLS["nobody"], sizes=(2, 1, 1, 2))

    def run(*tensors):
        again = dict(zip(map(id, leaves), tensors, strict=True))
        swapped = lambda t: again[id(t)] if isinstance(t, torch.Tensor) else t  # noqa: E731
        cell, x, states, *weights = arguments
        more = {n: {k: swapped(t) for k, t in options[n].items()} for n in ("params", "inputs")}
        states, weights = tuple(map(swapped, states)), map(swapped, weights)
        return functional.scan_groups(cell, swapped(x), states, *weights, **more, backend="loop")[0]

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mgu", "peephole", "nobody", "with_output"])
def test_other_precisions(name, dtype):
    """No further from float64 than the reference is: half precision is computed in float32."""
    given = case(CELLS[name], "both", dtype=dtype)
    leaves = [t.detach().double().requires_grad_() for t in given[2]]
    same = dict(zip(map(id, given[2]), leaves, strict=True))
    arguments = tuple(tuple(same[id(t)] for t in a) if isinstance(a, tuple) else same.get(id(a), a) for a in given[0])
    options = {n: {k: same[id(t)] for k, t in o.items()} if isinstance(o, dict) else o for n, o in given[1].items()}
    expected = answer((arguments, options, leaves), backend="reference")
    for found, theirs, right in zip(
        answer(given, backend="loop"), answer(given, backend="reference"), expected, strict=True
    ):
        assert found.dtype == dtype
        error, allowed = ((t.double() - right).norm() for t in (found, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("name", ["mgu", "indrnn", "nobody"])
def test_one_operator_to_a_compiler(name):
    """torch.compile has no break in it, and sees scan_forward; what it makes is the same."""
    torch._dynamo.reset()  # it takes facts of the cell that it compiled this function for before for this one's
    arguments, options, _ = case(CELLS[name], dtype=torch.float32)
    cell, x, states, *weights = arguments
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def run(x, states, weights, options):
        return functional.scan_groups(cell, x, states, *weights, **options, backend="loop")[0]

    with torch.no_grad():
        found = torch.compile(run, fullgraph=True, backend=backend)(x, states, weights, options)
        torch.testing.assert_close(found, run(x, states, weights, options))
    assert any("scan_forward" in t for t in targets)


def test_gradients_a_sample_by_vmap():
    arguments, options, _ = case(CELLS["nobody"], sizes=(3, 4, 2, 3))
    cell, x, states, *weights = arguments
    params, inputs = options["params"], options["inputs"]

    def loss(weights, params, x, states, inputs):
        given = tuple(s[:, None] for s in states), {n: t[:, None] for n, t in inputs.items()}
        y, _ = functional.scan_groups(
            cell, x[:, None], given[0], *weights, params=params, inputs=given[1], backend="loop"
        )
        return y.sin().sum()

    own = (tuple(s.detach() for s in states), {n: t.detach() for n, t in inputs.items()})
    dims = (None, None, 1, (1,) * len(states), dict.fromkeys(inputs, 1))
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), dims)(tuple(weights), params, x.detach(), *own)
    for b in range(4):
        mine = tuple(s[:, b] for s in own[0]), {n: t[:, b] for n, t in own[1].items()}
        one = torch.func.grad(loss, argnums=(0, 1))(tuple(weights), params, x.detach()[:, b], *mine)
        for found, expected in zip(tree_leaves(each), tree_leaves(one), strict=True):
            torch.testing.assert_close(found[b], expected)


def test_what_is_printed_has_few_operations():
    """What gates have in common is one operation, and what torch has as one is one."""
    source = part_of(CELLS["my_lstm"].key).source
    walk = source[source.index("for n,") : source.index("def activate")]
    assert [line.split("(")[0].strip() for line in walk.splitlines() if "out=" in line or "addmm_" in line] == [
        "x0_3.addmm_", "torch.sigmoid", "torch.tanh", "torch.mul", "torch.addcmul", "torch.tanh", "torch.mul",
    ]  # fmt: skip

"""The loop of derived cells: every kind of step against itself, in float64; compiled, vmapped, in other precisions."""

import pytest
import torch
from shapes import spread
from steps import STEPS, define
from torch.autograd import gradcheck

import seqcells
from seqcells import functional
from seqcells.loop import part_of, steps

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
CELLS = {name: define(step, OWN.get(step, "")) for name, step in EVERY.items()}


def case(cell, kind="plain", ways=(False,), dtype=torch.float64, bias=True, hx=True, sizes=(T, B, I, H)):
    """The arguments of scan_groups, and all that are leaves."""
    generator, K = torch.Generator().manual_seed(1), len(ways)
    T, B, I, H = sizes  # noqa: E741

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).mul(0.7).to(dtype).requires_grad_()

    rows = cell.rows
    w_hh = drawn(K, rows[1] * H, H) if rows[1] else None
    weights = [drawn(K, rows[0] * H, I), w_hh, *((drawn(K, n * H) if n else None for n in rows[2:]) if bias else (None, None))]
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
        for chunk in (2 * H, 1 << 16):
            monkeypatch.setattr(steps, "CHUNK", chunk)
            torch.testing.assert_close(answer(made, backend="loop", save=save), expected, atol=1e-11, rtol=1e-11)

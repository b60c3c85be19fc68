"""Cells of every kind through `functional`: each engine against the reference, and the reference against plain steps."""

from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from steps import NAMES, registries  # noqa: F401  (a fixture)

from seqcells import functional

T, B, I, H = 4, 3, 2, 5  # noqa: E741
ENGINES = ["loop", "triton:resident", "triton:grid", "triton:stepwise"]


def drawn(cell, groups=(), heads=False, seed=0):
    """x, states, the four weights, params and inputs of a scan in float64."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=0.5):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE).requires_grad_()

    of_x, of_u, *biases = cell.rows
    weights = [leaf(*groups, n * H, size) if n else None for n, size in ((of_x, I), (of_u, H))]
    weights += [leaf(*groups, n * H) if n else None for n in biases]
    params = {name: leaf(*groups, 1 if name in cell.scalars else H) for name in cell.params}
    inputs = {name: leaf(T, B, *((H,) if n % 2 else ())) for n, name in enumerate(cell.inputs)}
    states = tuple(leaf(*groups, B, H) for _ in cell.states)
    return leaf(T, B, *groups[: int(heads)], I, scale=1.0), states, weights, params, inputs


def leaves(given):
    x, states, weights, params, inputs = given
    return [t for t in (x, *states, *weights, *params.values(), *inputs.values()) if t is not None]


def answer(cell, given, scan=functional.scan, **how):
    """Outputs, and the gradients of all outputs weighted at random."""
    x, states, weights, params, inputs = given
    how |= {"params": params or None, "inputs": inputs or None, "return_states": True}
    y, final, every = scan(cell, x, states, *weights, **how)
    outputs = [y, *final, *every]
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves(given), outer, materialize_grads=True)]


def masks(kind):
    lengths = torch.tensor([T, 2, 1], device=DEVICE)
    resets = torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool, device=DEVICE)
    return {"": {}, "resets": {"resets": resets}, "both": {"resets": resets, "lengths": lengths}}[kind]


def close(found, expected):
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_step(name, registered):
    """Written out without anything of ours but the cell."""
    cell = registered[name]
    given = x, states, (w_ih, w_hh, b_ih, b_hh), params, inputs = drawn(cell)
    wide = [t if t.dim() == 3 else t[..., None].expand(T, B, H) for t in inputs.values()]
    vectors = [p.expand(H) for p in params.values()]
    now, outputs, every = states, [], []

    def by_gate(gates, weight, bias):
        biases, found = iter(() if bias is None else bias.chunk(len(bias) // H)), {}
        for n, gate in enumerate(gates):
            found[gate] = (weight[n * H : (n + 1) * H], next(biases) if gate in cell.biased else 0)
        return found

    for t in range(T):
        gates = {g: x[t] @ w.t() + b for g, (w, b) in by_gate(cell.x_gates, w_ih, b_ih).items()}
        products = {g: lambda v, w=w, b=b: v @ w.t() + b for g, (w, b) in by_gate(cell.u_gates, w_hh, b_hh).items()}
        now = cell(SimpleNamespace(**gates), SimpleNamespace(**products), *now, *vectors, *(a[t] for a in wide))
        now = [s.expand(B, H) for s in (now if isinstance(now, tuple) else (now,))]
        outputs.append(now[-1] if cell.outputs else now[0])
        now = now[: len(states)]
        every.append(now)
    expected = [torch.stack(outputs), *now, *(torch.stack(s) for s in zip(*every, strict=True))]
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in expected]
    expected += torch.autograd.grad(expected, leaves(given), outer, materialize_grads=True)
    close(answer(cell, given, backend="reference"), expected)


@pytest.mark.parametrize("kind", ["", "both"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_engines(name, engine, kind, registered):
    cell = registered[name]
    given = drawn(cell)
    save = "states" if kind else "gates"
    close(
        answer(cell, given, backend=engine, save=save, **masks(kind)),
        answer(cell, given, backend="reference", **masks(kind)),
    )

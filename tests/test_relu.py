"""relu's derivative at 0, inf and NaN: every backend returns what torch.nn.RNN does."""

import pytest
import torch
from conftest import DEVICE
from torch.autograd import grad

import seqcells

T, B, I, H = 3, 2, 3, 4  # noqa: E741
PLACES = {"x": (1, 0, 1), "h0": (0, 0, 1), "dy": (1, 0, 1), "dh": (0, 0, 1)}


def inputs(place, value):
    """x, h0, dy, dh: at random, with the value somewhere in one of them; place "zero": x and h0 are zero, dy is."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (T, B, I), "h0": (1, B, H), "dy": (T, B, H), "dh": (1, B, H)}
    made = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    if place == "zero":
        made |= {"x": torch.zeros(T, B, I, device=DEVICE), "h0": torch.zeros(1, B, H, device=DEVICE)}
        made["dy"].fill_(value)
    else:
        made[place][PLACES[place]] = value
    return made.values()


def answer(module, x, h0, dy, dh, create_graph):
    """Outputs, gradients and, if asked for, the gradients of their squares."""
    leaves = [x.requires_grad_(), h0.requires_grad_(), *module.parameters()]
    out = module(x, h0)
    first = grad(out, leaves, (dy, dh), create_graph=create_graph)
    second = grad(sum(g.square().sum() for g in first), leaves, allow_unused=True) if create_graph else ()
    found = (*out, *first, *(torch.zeros(()) if s is None else s for s in second))
    return [t.detach().cpu() for t in found]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", ["auto", "loop", "triton", "reference", "aten"])
def test_gradients_at_what_is_no_number_are_torchs(backend, create_graph):
    torch.manual_seed(0)
    theirs = torch.nn.RNN(I, H, nonlinearity="relu")
    ours = seqcells.RNN(I, H, nonlinearity="relu", backend=backend, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    inf, nan = torch.inf, torch.nan
    cases = [(place, value) for place in PLACES for value in (nan, inf, -inf)] + [("zero", 1), ("zero", nan)]
    for place, value in cases:
        if place == "zero":
            for module in (ours, theirs):
                torch.nn.init.zeros_(module.bias_ih_l0)
                torch.nn.init.zeros_(module.bias_hh_l0)
        found = answer(ours, *inputs(place, value), create_graph)
        expected = answer(theirs, *(t.cpu() for t in inputs(place, value)), create_graph)
        torch.testing.assert_close(
            found, expected, equal_nan=True, atol=1e-5, rtol=1e-5, msg=lambda m, p=place, v=value: f"{p} {v}: {m}"
        )


@pytest.mark.parametrize("masked", [False, True])
def test_long_ones_by_the_loop(masked):
    """Of which "auto" gives the loop more: in pieces, with resets, and compiled."""
    torch.manual_seed(0)
    module, x = seqcells.RNN(I, H, nonlinearity="relu"), torch.randn(30, B, I)
    x[20, 0, 1] = torch.nan
    masks = {"resets": torch.rand(30, B) < 0.2} if masked else {}

    def gradients(function=module):
        y, h = function(x, **masks)
        return grad(y.sum() + h.sum(), list(module.parameters()))

    with seqcells.backend("reference"):
        expected = gradients()
    for backend in ("auto", "loop"):
        with seqcells.backend(backend):
            compiled = torch.compile(module, backend="aot_eager")
            torch.testing.assert_close(gradients(), expected, equal_nan=True)
            torch.testing.assert_close(gradients(compiled), expected, equal_nan=True)

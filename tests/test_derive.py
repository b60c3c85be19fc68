"""A cell's kernels derived from its step: as the reference, as those written by hand; and the compiler's parts."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import DEVICE
from shapes import SAVES, SCHEDULES, spread
from steps import NAMES, STEPS, cifg, define, mgu, registries  # noqa: F401  (a fixture)

import seqcells
from seqcells import fallback, functional
from seqcells.check import Shape, errors, inputs, relative, run
from seqcells.derive.cut import smallest
from seqcells.derive.values import BOOLEAN, Graph, ancestors
from seqcells.kernels import cells

cell_module = sys.modules["seqcells.cell"]  # seqcells.cell is the function
sigmoid, tanh = torch.sigmoid, torch.tanh
pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize(("name", "save", "schedule"), spread(NAMES, SAVES, SCHEDULES, most=1))
def test_parity(name, schedule, save, poison):
    """H smaller than any tile, and one that fills a tile in part; resets."""
    for H, resets in ((5, True), (20, False)):
        found = errors(
            name, Shape(3, 3, 2, H), torch.float64, DEVICE, backend=f"triton:{schedule}", save=save, resets=resets
        )
        assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize(
    ("step", "known"), [(s, k) for s, (_, _, k) in STEPS.items() if k], ids=lambda s: getattr(s, "__name__", s)
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_as_written_by_hand(step, known, schedule):
    tensors = inputs(known, Shape(3, 3, 2, 20), torch.float64, DEVICE)
    mine, theirs = (run(n, tensors, None, backend=f"triton:{schedule}") for n in (step.__name__, known))
    assert max(relative(mine[n], theirs[n]) for n in theirs) <= 1e-14
    derived, written = cells.get(step.__name__), cells.get(known)
    for fact in ("gates", "states", "saved", "inner", "first"):
        assert getattr(derived, fact) == getattr(written, fact), fact


def test_tiles_saved(registered):
    for step, (_, saved, _) in STEPS.items():
        assert len(registered[step.__name__].saved) == cells.get(step.__name__).saved == saved, step


@pytest.mark.parametrize(("name", "schedule"), spread(["mgu", "cifg", "peculiar"], SCHEDULES, most=1))
def test_gradcheck(name, schedule):
    tensors = [t.requires_grad_() for t in inputs(name, Shape(2, 2, 1, 2), torch.float64, DEVICE)]

    def function(x, w_ih, w_hh, b_ih, b_hh, *states):
        y, final = functional.scan(name, x, states, w_ih, w_hh, b_ih, b_hh, backend=f"triton:{schedule}")
        return y, *final

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    if schedule == "resident":
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a.exp() - b,
        lambda a, b: (a * a + 0.1).log() + b,
        lambda a, b: (a * a + 0.1).sqrt() * b.abs(),
        lambda a, b: a.sin() + b.cos() / 3,
        lambda a, b: torch.minimum(a, b) - torch.maximum(0.1 * a, b),
        lambda a, b: a.clamp(-0.5, 0.5) * torch.clamp(b, min=0.1),
        lambda a, b: a**3 - b**2 + (1 + a * a) ** -1 + (1 + b * b) ** 0.5,
        lambda a, b: torch.rsqrt(1 + a * a) + torch.reciprocal(2 + b.square()),
        lambda a, b: torch.where((a > 0) & ~(b > 0.2) | (a < -1), a * b, -b),
        lambda a, b: torch.where((a > 0) * (b > 0), a, b) + torch.where((a < 0) + (b < 1) + (a > 2), b * b, a),
        lambda a, b: torch.where((a > 0) == (b > 0), a, -b) * torch.logical_not(a + 9).logical_or(b > 0).to(a.dtype),
        lambda a, b: (0.3 * (a > 0).to(a.dtype)).exp() * b + (b > a).to(a.dtype) - a.sign() * b,
        lambda a, b: torch.nn.functional.silu(a) - torch.relu(b) + 2 - 0.25 * torch.sgn(b),
        lambda a, b: torch.sub(a, b, alpha=0.5) + a.detach() * torch.tanh(b) * torch.full_like(a, 0.3),
    ],
)
def test_every_operation(function, schedule):
    """Of states that are not zero where their inputs are: a tile's units beyond H."""

    def step(x, U, h):
        a, b = x.a + U.a(h), x.b + U.b(h)
        return torch.cos(function(a, b) + 0.1 * (h + a))

    define(step, "a b")
    for resets in (False, True):
        found = errors("step", Shape(3, 3, 2, 5), torch.float64, DEVICE, backend=f"triton:{schedule}", resets=resets)
        assert max(found.values()) <= 1e-11, found  # a cosine of large numbers makes rounding larger


def brute_force(needed, free):
    """The least number of values from which, and from the free ones, the needed ones follow."""
    values = [v for v in ancestors(needed) if v.op != "constant" and v not in free]
    for count in range(len(values) + 1):
        for saved in itertools.combinations([v for v in values if v.op not in BOOLEAN], count):
            left = ancestors(needed, [*saved, *free])
            if not any(v.op in ("gx", "hu") and v not in saved and v not in free for v in left):
                return count
    raise AssertionError


@pytest.mark.parametrize("seed", range(30))
def test_no_fewer_tiles_would_do(seed):
    random, graph = Random(seed), Graph()
    values = [graph.make(kind, n) for kind, n in (("gx", 0), ("hu", 0), ("hu", 1), ("before", 0))]
    for _ in range(7):
        op = random.choice(["div", "sub", "tanh", "where", "lt"])
        count = {"tanh": 1, "where": 2}.get(op, 2)
        chosen = random.sample(values, count)
        if op == "where":
            chosen.insert(0, graph.make("lt", *random.sample(values, 2)))
        values.append(graph.make(op, *chosen))
    numbers = [v for v in values if v.op not in BOOLEAN]
    needed, free = random.sample(values, 3), [values[3], *random.sample(numbers[4:], 1)]
    saved = smallest(needed, free)
    assert len(saved) == brute_force(needed, free) and not any(v.op in BOOLEAN or v in free for v in saved)
    assert all(v not in ancestors(needed, [*saved, *free]) or v in saved for v in values[:3] if v not in free)


def test_values_are_simplified():
    g = Graph()
    d, e, a, b = g.make("dstate", 0), g.make("dstate", 1), g.make("hu", 0), g.make("hu", 1)
    one = g.number(1)
    assert g.sum(a, b) is g.sum(b, a) and g.product(d, a, b) is g.product(b, g.product(a, d))
    assert g.difference(d, g.product(d, a)) is g.product(d, g.difference(one, a))
    assert g.sum(g.product(d, a), g.product(b, d)) is g.product(d, g.sum(a, b))
    assert g.sum(g.product(d, a), g.product(e, a)).op == "add", "what is shared is no gradient"
    assert g.sum(a, g.negative(a)).op == "sub" and g.negative(g.difference(a, b)) is g.difference(b, a)
    assert g.product(d, g.number(0)) is g.number(0) and g.product(a, one) is a and g.sum(a, g.number(0)) is a
    assert g.product(g.negative(d), g.number(2), a) is g.negative(g.product(d, a, g.number(2)))
    written = g.difference(a, g.product(a, b))
    assert written.op == "sub", "forward is left as it was written"


def test_names_that_the_source_cannot_have():
    """Of the step's variables: those of the functions' arguments, of Triton, and of values that have one already."""

    @seqcells.cell(gates="a b", states="h")
    def step(x, U, h):
        tl, saved = sigmoid(x.a + U.a(h)), tanh(x.b + U.b(h))
        v0 = tl * saved
        gx = states = v0 * v0 - saved
        h = dm = gx * tl + states
        return torch.exp(-h * dm) * saved

    found = errors("step", Shape(3, 3, 2, 5), torch.float64, DEVICE, backend="triton")
    assert max(found.values()) <= 1e-12 and "tl_0 = sigmoid(" in step.source


def test_nothing_is_derived_before_it_is_wanted(monkeypatch):
    asked = []
    monkeypatch.setattr(cell_module, "derive", lambda *a: asked.append(a))
    define(mgu, "f n")
    x, w_ih, w_hh, *_ = inputs("mgu", Shape(1, 1, 1, 1), torch.float64, "cpu")
    functional.scan("mgu", x, None, w_ih, w_hh, backend="reference")
    assert "mgu" in cells.names() and not asked
    with pytest.raises(AttributeError):
        cells.get("mgu")
    assert asked == [(mgu, ("f", "n"), ("h",))]


def test_a_name_defined_again():
    """The later step is what runs, also where the first has run already."""
    x, one, zero = (torch.full((1, 1), n, dtype=torch.float64, device=DEVICE) for n in (1.0, 1.0, 0.0))
    for factor in (2.0, 3.0):

        @seqcells.cell(gates="a", states="h")
        def again(x, U, h):
            return factor * (x.a + U.a(h))  # noqa: B023

        for backend in ("reference", *(f"triton:{s}" for s in SCHEDULES)):
            y, _ = functional.scan("again", x[None], (zero,), one, one, backend=backend)
            assert y.item() == factor
        assert f"* {factor}" in again.source


def test_a_name_defined_again_has_a_new_start(monkeypatch):
    """Kernels of that name that failed on the device were other kernels."""
    failed, others = (fallback.Kernel(n, "forward", torch.float32, 5, torch.device("cuda")) for n in ("mgu", "cifg"))
    monkeypatch.setattr(fallback, "_failed", {(failed, "grid"), (others, "grid")})
    monkeypatch.setattr(fallback, "_refused", {failed, others})
    define(mgu, "f n")
    assert fallback._failed == {(others, "grid")} and fallback._refused == {others}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_without_a_break(backend):
    """Also where the kernels are first wanted by the compiler."""
    x, w_ih, w_hh, b_ih, b_hh, h = (t.requires_grad_() for t in inputs("mgu", Shape(3, 3, 2, 4), torch.float64, DEVICE))

    def total(x):
        return functional.scan("mgu", x, (h,), w_ih, w_hh, b_ih, b_hh, backend=backend)[0].square().sum()

    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(x), x)
    (expected,) = torch.autograd.grad(total(x), x)
    torch.testing.assert_close(found, expected)


COMPILES = """
import sys
import seqcells
from seqcells.kernels import report
sys.path.insert(0, {folder!r})
import steps
steps.define(steps.peculiar, "a b")
steps.define(steps.my_gru_before, "r z n")
for cell, direction, dtype in (
    ("peculiar", "train", "bf16"), ("peculiar", "backward", "bf16"), ("peculiar", "backward", "fp64"),
    ("my_gru_before", "train", "bf16"), ("my_gru_before", "backward", "bf16"),
):
    (row,) = report.measure(report.Case(cell, direction, dtype, 8, 20, "sm_90", precision="ieee"))
    print(row.good, row.spills)
"""


def test_the_kernels_compile():
    """Here they are interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = COMPILES.format(folder=str(Path(__file__).parent))
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert found.stdout.splitlines() == ["True 0"] * 5, found.stdout + found.stderr


def test_a_transform_around_the_first_call():
    """The step is traced apart from what the caller is in the middle of."""
    tensors = inputs("mgu", Shape(3, 3, 2, 4), torch.float64, DEVICE)
    x, w_ih, w_hh, b_ih, b_hh, h = tensors

    def total(x):
        return functional.scan("mgu", x, (h,), w_ih, w_hh, b_ih, b_hh, backend="triton")[0].sum()

    found = torch.func.vmap(torch.func.grad(total))(torch.stack([x, 2 * x]))
    define(mgu, "f n")  # not derived yet
    with torch.no_grad(), torch.autocast(DEVICE):
        functional.scan("mgu", x, (h,), w_ih, w_hh, b_ih, b_hh, backend="triton")
    x.requires_grad_()
    (expected,) = torch.autograd.grad(total(x), x)
    torch.testing.assert_close(found[0], expected)


def test_what_is_shown(registered):
    shown = registered["my_gru_before"].explain()
    assert shown.splitlines() == [
        "my_gru_before: gates r z n; states h, of which h is the output",
        "product with h: r z",
        "second product, with r * h: n",
        "saved for backward, 3 tiles a step: the fewest from which, with the states before and after it, backward "
        "follows",
        "  r = sigmoid(x.r + U.r(h)): for the gradients of gate r, h, U.n's weight",
        "  z = sigmoid(x.z + U.z(h)): for the gradients of gate z, gate n, h",
        "  n = tanh(x.n + U.n(r * h)): for the gradients of gate z, gate n",
    ]
    assert "used for more than adding to the input's: n" in registered["my_gru"].explain()
    source = registered["mgu"].source
    assert [line[4 : line.index("(")] for line in source.splitlines() if line.startswith("def ")] == [
        "forward",
        "backward",
        "middle",
        "backward_middle",
    ]
    assert "    f = sigmoid(gx[0] + hu[0], FAST)\n" in source and "d_f = " in source
    assert registered["mgu"].__doc__ == "Zhou et al. 2016."

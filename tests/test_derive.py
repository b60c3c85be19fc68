"""A cell's kernels derived from its step: the built-in cells once more, as ten lines, and what is refused."""

import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import DEVICE
from shapes import SAVES, SCHEDULES

import seqcells
from seqcells import derive, fallback, functional, reference
from seqcells.cell import CellError
from seqcells.check import Shape, errors, inputs, relative, run
from seqcells.derive.cut import smallest
from seqcells.derive.values import BOOLEAN, Graph, ancestors
from seqcells.kernels import cells, registry

cell_module = sys.modules["seqcells.cell"]  # seqcells.cell is the function
sigmoid, tanh = torch.sigmoid, torch.tanh


def my_lstm(x, U, h, c):
    i, f = sigmoid(x.i + U.i(h)), sigmoid(x.f + U.f(h))
    g, o = tanh(x.g + U.g(h)), sigmoid(x.o + U.o(h))
    c = f * c + i * g
    return o * tanh(c), c


def my_gru(x, U, h):
    r, z = sigmoid(x.r + U.r(h)), sigmoid(x.z + U.z(h))
    n = tanh(x.n + r * U.n(h))
    return (1 - z) * n + z * h


def my_gru_before(x, U, h):
    r, z = sigmoid(x.r + U.r(h)), sigmoid(x.z + U.z(h))
    n = tanh(x.n + U.n(r * h))
    return (1 - z) * n + z * h


def my_rnn_tanh(x, U, h):
    return tanh(x.n + U.n(h))


def my_rnn_relu(x, U, h):
    return torch.relu(x.n + U.n(h))


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


def product_with_c(x, U, h, c):
    """A second product whose operand is a state."""
    f, g = sigmoid(x.f + U.f(h)), tanh(x.g + U.g(h))
    o = sigmoid(x.o + U.o(c))
    return o * tanh(f * c + g), f * c + g


def peculiar(x, U, h, c):
    """What no built-in cell has: an inner gate before a plain one, a product inside and outside, a state that is
    another before the step, steps that are not zero at zero, and functions of each kind."""
    a, b = x.a + 0.5 * U.a(h), torch.nn.functional.silu(x.b + U.b(h))
    new = torch.exp(-a * a) * b + torch.maximum(c, a) / (1.5 + a * a) + x.a.exp().clamp(max=2)
    return torch.where(new > 0.3, new, 0.2 * new - c.abs()), h


# step: its gates, and how many tiles it saves; and the hand-written cell that it is
STEPS = {
    my_lstm: ("i f g o", 4, "lstm"),
    my_gru: ("r z n", 4, "gru"),
    my_gru_before: ("r z n", 3, "gru_before"),
    my_rnn_tanh: ("n", 0, "rnn_tanh"),
    my_rnn_relu: ("n", 0, "rnn_relu"),
    mgu: ("f n", 2, None),
    ugrnn: ("c g", 2, None),
    cifg: ("f g o", 3, None),
    product_with_c: ("f g o", 3, None),
    peculiar: ("a b", 3, None),
}
NAMES = [step.__name__ for step in STEPS]


def define(step, gates):
    return seqcells.cell(gates=gates, states=" ".join(list(inspect.signature(step).parameters)[2:]))(step)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Cells of these tests are none of other tests'."""
    for of, name in ((reference, "CELLS"), (registry, "_CELLS"), (registry, "_LATER")):
        monkeypatch.setattr(of, name, dict(getattr(of, name)))
    return {step.__name__: define(step, gates) for step, (gates, *_) in STEPS.items()}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name, schedule, save, poison):
    """H smaller than any tile, and one that fills a tile in part; resets."""
    for H, resets in ((5, True), (20, False)):
        found = errors(
            name, Shape(3, 3, 2, H), torch.float64, DEVICE, backend=f"triton:{schedule}", save=save, resets=resets
        )
        assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize(("step", "known"), [(s, k) for s, (_, _, k) in STEPS.items() if k], ids=lambda s: str(s))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_as_written_by_hand(step, known, schedule):
    tensors = inputs(known, Shape(3, 3, 2, 20), torch.float64, DEVICE)
    mine, theirs = (run(n, tensors, None, backend=f"triton:{schedule}") for n in (step.__name__, known))
    assert max(relative(mine[n], theirs[n]) for n in theirs) <= 1e-14
    derived, written = cells.get(step.__name__), cells.get(known)
    for fact in ("gates", "states", "saved", "inner", "first"):
        assert getattr(derived, fact) == getattr(written, fact), fact


def test_tiles_saved(registries):
    for step, (_, saved, _) in STEPS.items():
        assert len(registries[step.__name__].saved) == cells.get(step.__name__).saved == saved, step


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mgu", "cifg", "peculiar"])
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
import test_derive
test_derive.define(test_derive.peculiar, "a b")
test_derive.define(test_derive.my_gru_before, "r z n")
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


def unknown(x, U, h):
    return torch.erfinv(x.a + U.a(h))


def branch(x, U, h):
    a = x.a + U.a(h)
    if a > 0:
        return a
    return h


def in_place(x, U, h):
    a = x.a + U.a(h)
    a += 1
    return a


def in_place_method(x, U, h):
    return (x.a + U.a(h)).relu_()


def an_element(x, U, h):
    h = x.a + U.a(h)
    h[0] = 0
    return h


def over_units(x, U, h):
    a = x.a + U.a(h)
    return a / a.sum(-1, keepdim=True)


def softmax(x, U, h):
    return torch.softmax(x.a + U.a(h), -1)


def transposed(x, U, h):
    return x.a + U.a(h).T


def third_level(x, U, h):
    a = x.a + U.a(h)
    b = x.b + U.b(a * h)
    return x.c + U.c(b * h)


def captured(x, U, h):
    return x.a + U.a(h) * TENSOR


TENSOR = torch.ones(5, dtype=torch.float64)


def no_such_gate(x, U, h):
    return x.a + U.q(h)


def two_operands(x, U, h):
    return x.a + U.a(h) + U.a(2 * h)


def another_dtype(x, U, h):
    return (x.a + U.a(h)).float()


def a_boolean(x, U, h):
    a = x.a + U.a(h)
    return a + (a > 0) * 0.3


def an_odd_power(x, U, h):
    return (x.a + U.a(h)) ** 1.7


# What is wrong: the error, what its text says, and the line of the step (of its first, 0) that it names.
WRONG = [
    (unknown, "a", derive.UnknownOperation, "no erfinv; they have abs, add.* tanh, where", 1),
    (branch, "a", derive.DataDependentBranch, r"torch\.where", 2),
    (in_place, "a", derive.InPlaceChange, "make a new one", 2),
    (in_place_method, "a", derive.InPlaceChange, "relu_", 1),
    (an_element, "a", derive.InPlaceChange, r"torch\.where for a\[i\] = b", 2),
    (over_units, "a", derive.MixesUnits, r"only U\.k\(v\) takes something from other units", 2),
    (softmax, "a", derive.UnknownOperation, "no _?softmax", 1),
    (transposed, "a", derive.MixesUnits, "one value for each row and unit", 1),
    (third_level, "a b c", derive.TooManyProducts, r"computed from U\.b.* third", 3),
    (captured, "a", derive.CapturedTensor, "a tensor from outside", 1),
    (no_such_gate, "a", CellError, "no gate 'q'; gates are a", 1),
    (two_operands, "a", CellError, "one recurrent product", 1),
    (another_dtype, "a", CellError, r"float32, whatever the states' dtype is.*\.to\(h.dtype\)", 1),
    (a_boolean, "a", CellError, r"float32, whatever the states' dtype is.*\.to\(h.dtype\)", 2),
    (an_odd_power, "a", derive.UnknownOperation, "pow", 1),
]


@pytest.mark.parametrize(("step", "gates", "error", "says", "line"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_a_wrong_step_names_its_line(step, gates, error, says, line):
    made = define(step, gates)
    with pytest.raises(error, match=says) as raised:
        made.explain()
    text, first = inspect.getsourcelines(step)
    assert raised.value.line == (__file__, first + line)
    assert text[line].strip() in str(raised.value)
    with pytest.raises(error):  # and where the kernels are wanted, once more
        cells.get(step.__name__)


def no_product(x, U, h):
    return tanh(x.a + U.a(h)) * sigmoid(x.b)


def no_input(x, U, h):
    return tanh(x.a + U.a(h)) * sigmoid(U.b(h))


def two_others(x, U, h):
    a = x.a + U.a(h)
    return x.b + U.b(a * h) + x.c + U.c(a + h)


def second_first(x, U, h):
    b = x.b + U.b(h)
    return x.a + U.a(b * h)


def only_second(x, U, h):
    return x.a + U.a(2 * h)


def inner_and_second(x, U, h):
    a = x.a * U.a(h)
    return x.b + U.b(a * h)


def not_finite_at_zero(x, U, h):
    a = x.a + U.a(h)
    return a / (a * a)


NOT_YET = [
    (no_product, "a b", r"gate b has no recurrent product, U\.b"),
    (no_input, "a b", r"x\.b is not used"),
    (two_others, "a b c", "a second operand that is not h"),
    (second_first, "a b", "put a at the end of gates="),
    (only_second, "a", "no gate's product is with h"),
    (inner_and_second, "a b", "gate a whose U.a does more than add"),
    (not_finite_at_zero, "a", "all zero .* not finite"),
]


@pytest.mark.parametrize(("step", "gates", "says"), NOT_YET, ids=[w[0].__name__ for w in NOT_YET])
def test_what_todays_kernels_cannot_run_says_so(step, gates, says):
    """And runs as the reference, which asks for no kernels."""
    made = define(step, gates)
    with pytest.raises(derive.NotYet, match=f"{says}.* backend='reference' runs it"):
        made.explain()
    found = errors(step.__name__, Shape(3, 3, 2, 5), torch.float64, "cpu", backend="reference")
    assert all(e == 0 for e in found.values())


def test_wrong_declarations():
    decorate = seqcells.cell(gates="f n", states="h")
    with pytest.raises(TypeError, match=r"mgu\(x, U, s\), got mgu\(x, U, h\)"):
        seqcells.cell(gates="f n", states="s")(mgu)
    with pytest.raises(TypeError, match="step must be a function, got a Linear"):
        decorate(torch.nn.Linear(1, 1))

    def lstm(x, U, h):
        return h

    with pytest.raises(ValueError, match="'lstm' is a cell of seqcells itself"):
        decorate(lstm)
    with pytest.raises(ValueError, match="'<lambda>' is no name"):
        decorate(lambda x, U, h: h)
    for gates, says in (("", "no name"), ("a a", "occurs twice"), ("a 1", "'1' is no name")):
        with pytest.raises(ValueError, match=f"gates .*{says}"):
            seqcells.cell(gates=gates, states="h")
    with pytest.raises(TypeError, match="states must be a string of names"):
        seqcells.cell(gates="a", states=["h"])
    with pytest.raises(ValueError, match="one or two, got 3"):
        seqcells.cell(gates="a", states="h c m")

    def too_few(x, U, h, c):
        return x.a + U.a(h)

    with pytest.raises(CellError, match="gives 1 values for the states h c"):
        define(too_few, "a").explain()


def test_what_is_shown(registries):
    shown = registries["my_gru_before"].explain()
    assert shown.splitlines() == [
        "my_gru_before: gates r z n; states h, of which h is the output",
        "product with h: r z",
        "second product, with r * h: n",
        "saved for backward, 3 tiles a step: the fewest from which, with the states before and after it, backward "
        "follows",
        "  r = sigmoid(x.r + U.r(h))",
        "  z = sigmoid(x.z + U.z(h))",
        "  n = tanh(x.n + U.n(r * h))",
    ]
    assert "used for more than adding to the input's: n" in registries["my_gru"].explain()
    source = registries["mgu"].source
    assert [line[4 : line.index("(")] for line in source.splitlines() if line.startswith("def ")] == [
        "forward",
        "backward",
        "middle",
        "backward_middle",
    ]
    assert "    f = sigmoid(gx[0] + hu[0], FAST)\n" in source and "d_f = " in source
    assert registries["mgu"].__doc__ == "Zhou et al. 2016."

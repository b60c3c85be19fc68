"""A cell's functions derived from its step: as autograd has them, for cells of every kind; and the compiler's parts."""

import copy
import inspect
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from steps import NAMES, STEPS, cifg, define, euler, mgu, registries, slstm  # noqa: F401  (a fixture)
from torch.nn import functional as F
from walk import differences, drawn, functions

import seqcells
from seqcells.derive.cut import smallest
from seqcells.derive.values import BOOLEAN, FORWARD, FROM_TRITON, Graph, ancestors
from seqcells.kernels import cells, math
from seqcells.kernels.form import Form, Operand

cell_module = sys.modules["seqcells.cell"]  # seqcells.cell is the function
sigmoid, tanh = torch.sigmoid, torch.tanh
pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("name", NAMES)
def test_all_gradients(registered, name):
    """As autograd has them of the step, walked by a schedule in plain torch."""
    for resets in (False, True):
        found = differences(registered[name], functions(registered[name]), resets)
        assert max(found.values()) <= 1e-13, found


@pytest.mark.parametrize("seed", range(40))
def test_steps_drawn_at_random(seed):
    step, declared, source = drawn(seed)
    made = seqcells.cell(**declared)(step)
    found = differences(made, functions(made), resets=True)
    assert max(found.values()) <= 1e-11 and not made.form.problems(), (source, found)


def test_an_exponential_gate_far_out(registered):
    found = differences(registered["slstm"], functions(registered["slstm"]), scale=15.0)
    assert max(found.values()) <= 1e-12, found


def test_what_rounding_would_ruin_is_saved(registered):
    """Tiles and states are stored in the data's type: no exponential is formed again of a rounded sum."""
    made = registered["slstm"]
    errors = [differences(made, functions(made), stored=torch.bfloat16, scale=s) for s in (1.0, 5.0, 15.0)]
    assert max(max(found.values()) for found in errors) <= 0.03, errors
    assert sum("= exp(" in tile for tile in made.saved) == 2 and any(
        tile.startswith("which is larger, ") for tile in made.saved
    )


BUILT_IN = {
    "lstm": Form("lstm", 4, 2, 4, (Operand(1, 4, 0),), (0, 1, 2, 3)),
    "gru": Form("gru", 3, 1, 4, (Operand(1, 3, 0),), (0, 1, -1)),
    "gru_before": Form("gru_before", 3, 1, 3, (Operand(1, 2, 0), Operand(2, 1)), (0, 1, 2)),
    "rnn_tanh": Form("rnn_tanh", 1, 1, 0, (Operand(1, 1, 0),), (0,)),
    "rnn_relu": Form("rnn_relu", 1, 1, 0, (Operand(1, 1, 0),), (0,)),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_forms_of_the_built_in_cells(name):
    """Buffers and operators are laid out by them; compiled, they cost what kernels written by hand did."""
    assert getattr(seqcells.cells, name).form == BUILT_IN[name]


def test_tiles_saved(registered):
    for step, (_, saved) in STEPS.items():
        made = registered[step.__name__]
        assert len(made.saved) == made.form.saved == cells.get(made.key).saved == saved, step


# (level, products, state) of the operands; adds; late; x_gates; u_gates; order.
FORMS = {
    "indrnn": ([], (), (), "n", "", ()),
    "lem": ([(1, 3, 0), (2, 1, None)], (0, 1, 2, 3), (), "a b z y", "a b z y", (0, 1, 2, 3)),
    "cornn": ([(1, 1, 0), (1, 1, 1)], (0, 0), (), "y", "y z", (0, 1)),
    "mut3": ([(1, 1, 0), (1, 1, None), (2, 1, None)], (1, 0, 2), (), "z r h", "z r h", (1, 0, 2)),
    "gru_d": ([(1, 2, None), (2, 1, None)], (0, 1, 2), (3,), "r z n", "r z n", (0, 1, 2)),
    "late": ([(1, 1, 0), (1, 1, None), (1, 1, None)], (-1, 1, -1), (0, 2), "g a b", "g a b", (0, 1, 2)),
    "with_output": ([(1, 1, 1), (2, 1, None)], (-1, 1), (), "a b", "a b", (0, 1)),
    "write_only": ([(1, 1, 0)], (-1,), (), "a", "a", (0,)),
    "one_product_twice": ([(1, 2, 0)], (-1, -1), (), "a b", "a b", (0, 1)),
    "peculiar": ([(1, 2, 0)], (1, -1), (), "a b", "a b", (1, 0)),
    "nobody": ([(1, 2, 0), (1, 1, 2), (2, 1, None)], (0, 1, 2, 3), (), "i o d n", "i o d n", (0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_found(registered, name):
    made = registered[name]
    operands = [(o.level, o.products, o.state) for o in made.form.operands]
    found = (operands, made.form.adds, made.form.late, " ".join(made.x_gates), " ".join(made.u_gates), made.order)
    assert found == FORMS[name] and not made.form.problems()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gx + hu", (0,)),
        ("0.5 * (gx + hu) - h", (0,)),
        ("h - (hu - 2 + gx)", (0,)),
        ("gx + 0.5 * hu", (-1,)),
        ("gx - hu", (-1,)),
        ("gx + hu + gx", (-1,)),
        ("(gx + hu) * (gx > 0).to(h.dtype)", (-1,)),
        ("(gx + hu) + (gx > 0).to(h.dtype)", (-1,)),
        ("gx.detach() + hu", (-1,)),
        ("tanh(gx + hu) + torch.sign(hu)", (-1,)),
        ("tanh(gx + hu) + (gx + hu) * h", (0,)),
        ("h * gx * hu", (-1,)),
    ],
)
def test_when_a_product_only_adds(kind, expected):
    """Its bias is then added to the input's, and both have one gradient: gx and hu are used in their sum alone."""
    code = compile(kind, "kind", "eval")

    def step(x, U, h):
        return eval(code, {"gx": x.a, "hu": U.a(h), "h": h, "torch": torch, "tanh": tanh})

    made = define(step, "a")
    assert made.form.adds == expected
    found = differences(made, functions(made))
    assert max(found.values()) <= 1e-13, found


OPERATIONS = {
    "exp": lambda a, b: a.exp() - b,
    "log": lambda a, b: (a * a + 0.1).log() + torch.log2(b * b + 0.2) + torch.log1p(a * a),
    "sqrt": lambda a, b: (a * a + 0.1).sqrt() * b.abs() + torch.rsqrt(1 + a * a),
    "sin": lambda a, b: a.sin() + b.cos() / 3 + torch.exp2(-a * a) + torch.expm1(0.1 * a) + torch.erf(b),
    "minimum": lambda a, b: torch.minimum(a, b) - torch.maximum(0.1 * a, b) + torch.max(a, torch.zeros_like(b)),
    "ties": lambda a, b: torch.maximum(a.clamp(0, 0.1), b.clamp(0, 0.1)) * torch.minimum(a.sign(), b.sign()) * a,
    "clamp": lambda a, b: a.clamp(-0.5, 0.5) * torch.clamp(b, min=0.1) + F.hardtanh(b, -0.2, 0.9),
    "pow": lambda a, b: a**3 - b**2 + (1 + a * a) ** -1 + (1 + b * b) ** 0.5 + torch.tanh(a) ** 9 + (1 + a * a) ** -2.5,
    "pow of a number": lambda a, b: 1.7**a - (0.1 + b * b) ** 1.7 + (0.1 + b * b) ** 1.5,
    "reciprocal": lambda a, b: torch.reciprocal(2 + b.square()) - a / (1 + b.abs()),
    "where": lambda a, b: torch.where((a > 0) & ~(b > 0.2) | (a < -1), a * b, -b),
    "booleans": lambda a, b: torch.where((a > 0) * (b > 0), a, b) + torch.where((a < 0) + (b < 1) + (a > 2), b * b, a),
    "logical": lambda a, b: (
        torch.where((a > 0) == (b > 0), a, -b) * torch.logical_not(a + 9).logical_or(b > 0).to(a.dtype)
    ),
    "a boolean": lambda a, b: (0.3 * (a > 0).to(a.dtype)).exp() * b + (b > a).to(a.dtype) - a.sign() * b,
    "silu": lambda a, b: F.silu(a) - torch.relu(b) + 2 - 0.25 * torch.sgn(b),
    "softplus": lambda a, b: (
        F.softplus(a) + F.softplus(3 * b, beta=2, threshold=1.5) - F.logsigmoid(3 * b) + F.softplus(b, 1, 0.1)
    ),
    "elu": lambda a, b: F.elu(a) + F.elu(b, 0.3) + F.selu(a * b) + F.celu(b, 2.0),
    "leaky": lambda a, b: F.leaky_relu(a, 0.2) + F.leaky_relu(b) + F.relu6(4 * a) + F.threshold(b, 0.1, -2.0),
    "gelu": lambda a, b: F.gelu(a) + F.gelu(b, approximate="tanh"),
    "softsign": lambda a, b: F.softsign(a) + F.tanhshrink(b),
    "lerp": lambda a, b: torch.lerp(a, b, sigmoid(a)) + a.lerp(b, 0.3) + torch.addcmul(a, a, b, value=0.1),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, 2 + a.cos(), value=0.5),
    "alpha": lambda a, b: torch.sub(a, b, alpha=0.5) + a.detach() * torch.tanh(b) * torch.full_like(a, 0.3),
    "numbers": lambda a, b: (
        a * torch.full_like(a, 0.25).exp() + b * torch.tensor(0.3, dtype=a.dtype) + torch.ones_like(a)
    ),
    "square": lambda a, b: torch.square(a) + b.pow(2) - torch.neg(a) + torch.positive(b),
}


# torch's own derivative has a sixth in float32 in it.
INEXACT = {"hardsigmoid": lambda a, b: F.hardsigmoid(2 * a) - b}


@pytest.mark.parametrize("name", [*OPERATIONS, *INEXACT])
def test_every_operation(name):
    def step(x, U, h):
        a, b = x.a + U.a(h), x.b + U.b(h)
        return torch.cos({**OPERATIONS, **INEXACT}[name](a, b) + 0.1 * (h + a))

    made = define(step, "a b")
    found = differences(made, functions(made), resets=True)
    assert max(found.values()) <= (1e-7 if name in INEXACT else 1e-12), found


@triton.jit
def apply(x_ptr, y_ptr, FUNCTION: tl.constexpr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(y_ptr + index, FUNCTION(tl.load(x_ptr + index)))


@triton.jit
def log1p_exp(x):
    return math.log1p(tl.exp(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["log1p", "expm1"])
def test_functions_near_zero(name, dtype):
    """And far from it; relative errors."""
    most = 80.0
    magnitudes = torch.logspace(-12, 1.9, 60, dtype=torch.float64).clamp(max=most)
    x = torch.cat([magnitudes, -magnitudes, torch.zeros(8, dtype=torch.float64)]).to(DEVICE, dtype)
    if name == "log1p":
        x = torch.where(x <= -1, x.abs(), x)
    y = torch.empty_like(x)
    apply[(1,)](x, y, getattr(math, name), x.numel())
    expected = getattr(torch, name)(x.double())
    error = ((y.double() - expected).abs() / expected.abs().clamp(min=1e-300)).max()
    assert error <= 4 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("name", FROM_TRITON)
def test_functions_of_triton(name):
    x = torch.linspace(0.1, 3, 16, dtype=torch.float64, device=DEVICE)
    y = torch.empty_like(x)
    apply[(1,)](x, y, getattr(tl, name), x.numel())
    torch.testing.assert_close(y, getattr(torch, name)(x), rtol=1e-14, atol=0)


def brute_force(needed, free):
    """The least number of values from which, and from the free ones, the needed ones follow."""
    values = [v for v in ancestors(needed) if v.op != "constant" and v not in free]
    for count in range(len(values) + 1):
        for saved in itertools.combinations([v for v in values if v.op not in BOOLEAN], count):
            left = ancestors(needed, [*saved, *free])
            if not any(v.op in FORWARD and v not in saved and v not in free for v in left):
                return count
    raise AssertionError


@pytest.mark.parametrize("seed", range(30))
def test_no_fewer_tiles_would_do(seed):
    random, graph = Random(seed), Graph()
    leaves = (("gx", 0), ("hu", 0), ("input", 1), ("before", 0), ("param", 0))
    values = [graph.make(kind, n) for kind, n in leaves]
    for _ in range(7):
        op = random.choice(["div", "sub", "tanh", "where", "lt"])
        count = {"tanh": 1, "where": 2}.get(op, 2)
        chosen = random.sample(values, count)
        if op == "where":
            chosen.insert(0, graph.make("lt", *random.sample(values, 2)))
        values.append(graph.make(op, *chosen))
    numbers = [v for v in values if v.op not in BOOLEAN]
    needed, free = random.sample(values, 3), [*values[3:5], *random.sample(numbers[5:], 1)]
    saved = smallest(needed, free)
    assert len(saved) == brute_force(needed, free) and not any(v.op in BOOLEAN or v in free for v in saved)
    assert all(v not in ancestors(needed, [*saved, *free]) or v in saved for v in values[:3] if v not in free)


def test_values_are_simplified():
    g = Graph()
    d, e, a, b = g.make("dstate", 0), g.make("dv", 1), g.make("hu", 0), g.make("hu", 1)
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
    assert g.function("exp", g.number(0)) is one and g.compared("lt", one, g.number(2)) is one
    assert g.choice(g.compared("gt", one, one), a, b) is b
    assert g.logical("and", g.compared("lt", a, b), one) is g.compared("lt", a, b)
    assert g.logical("or", a, one) is one and g.logical("not", one) is g.number(0)


def test_names_that_the_source_cannot_have():
    """Of the step's variables: those of the functions' arguments, of Triton, and of values that have one already."""

    @seqcells.cell(gates="a b", states="h")
    def step(x, U, h):
        tl, saved = sigmoid(x.a + U.a(h)), tanh(x.b + U.b(h))
        v0 = tl * saved
        gx = states = v0 * v0 - saved
        params = h = dm = gx * tl + states
        return torch.exp(-h * dm) * saved + params

    found = differences(step, functions(step))
    assert max(found.values()) <= 1e-13 and "tl_0 = sigmoid(" in step.source


def test_nothing_is_derived_before_it_is_wanted(monkeypatch):
    asked = []
    monkeypatch.setattr(cell_module, "derive", lambda *a: asked.append(a[0]))
    made = define(mgu)
    assert made.key in cells.names() and made.rows if asked else not asked
    with pytest.raises(AttributeError):
        cells.get(made.key)
    assert asked == [made.key]


def test_a_name_defined_again():
    """Has another key; what holds the earlier cell is not disturbed."""
    made = []
    for factor in (2.0, 3.0):

        @seqcells.cell(gates="a", states="h")
        def again(x, U, h):
            return factor * (x.a + U.a(h))  # noqa: B023

        made.append(again)
        again.source  # noqa: B018  (the number is taken)
    assert [c.key for c in made] == ["again", "again#2"] and cell_module.named("again") is made[1]
    for c, factor in zip(made, ("2.0", "3.0"), strict=True):
        assert cell_module.get(c.key) is cell_module.named(c) is c
        assert f"* {factor}" in c.source and cells.get(c.key).name == c.key
    assert cell_module.named("again#2") is made[1] and {"again", "again#2"} <= set(cell_module.keys())
    with pytest.raises(ValueError, match=r"unknown cell 'no_cell': expected one of .*ugrnn.*again") as raised:
        cell_module.named("no_cell")
    assert "again#2" not in str(raised.value)
    with pytest.raises(TypeError, match=r"got a function: decorate again with @seqcells\.cell\(gates="):
        seqcells.Recurrent(made[0].step, 3, 4)
    for wrong in (3, [3]):
        with pytest.raises(TypeError, match="cell must be"):
            cell_module.get(wrong)


def test_constants(registered):
    made = registered["euler"]
    other = made.with_constants(dt=0.25)
    assert other is made.with_constants(dt=0.25, gamma=0.01) is other.with_constants(dt=0.25)
    assert other.with_constants(dt=0.1) is made and other.key == "euler(dt=0.25, gamma=0.01)"
    assert dict(made.constants) == {"dt": 0.1, "gamma": 0.01} and "* 0.25" in other.source
    assert cell_module.named("euler") is made and cell_module.get(other.key) is other
    found = differences(other, functions(other))
    assert max(found.values()) <= 1e-13


@seqcells.cell(gates="a", states="h", constants="rate=0.5")
def of_this_module(x, U, h, rate):
    """A cell that a layer may hold when it is pickled."""
    return h + rate * tanh(x.a + U.a(h))


def test_copies_are_the_cell_itself():
    for made in (of_this_module, of_this_module.with_constants(rate=0.75)):
        assert copy.copy(made) is copy.deepcopy([made])[0] is pickle.loads(pickle.dumps(made)) is made
    assert of_this_module.__doc__ == "A cell that a layer may hold when it is pickled."


def test_what_layers_ask_for(registered):
    made = registered["cornn"]
    assert made.rows == (1, 2, 1, 2) and made.biased == ("y", "z") and made.outputs == ()
    assert registered["scaled"].scalars == ("alpha",) and registered["scaled"].params == ("alpha", "p")
    assert define(cifg, bias="f o").rows == (3, 3, 2, 2) and define(cifg, bias="").rows == (3, 3, 0, 0)
    assert registered["with_output"].outputs == ("y",)
    x, h = torch.rand(2, 3, 4)
    assert torch.equal(registered["my_rnn_tanh"](_All(x), _All(lambda v: 2 * v), h), tanh(x + 2 * h))
    assert torch.equal(define(euler)(_All(x), _All(lambda v: v), h), h + 0.1 * (tanh(x + h) - 0.01 * h))


class _All:
    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        return self.value


def test_facts_while_dynamo_traces():
    """Also where the first question is the compiler's; the derivation is none of its graph."""
    made = define(cifg)

    def function(t):
        form = made.form
        gates = len(made.x_gates) + len(made.u_gates) + made.rows[1] + made.order[1]
        return t * gates + form.saved + form.first_products + len(made.biased) + (made.key == "mgu")

    torch._dynamo.reset()
    found = torch.compile(function, fullgraph=True, backend="eager")(torch.ones(2))
    assert found.tolist() == [10.0 + 9] * 2 and torch.equal(found, function(torch.ones(2)))


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "default device": lambda: torch.device("meta"),
    "vmap": None,
    "grad": None,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_the_caller_is_in_the_middle_of(context, registered):
    """The step is traced apart from it."""
    made, expected = define(slstm), registered["slstm"].source

    def function(t):
        return t * len(made.source)

    if context == "vmap":
        torch.vmap(function)(torch.ones(3))
    elif context == "grad":
        torch.func.grad(lambda t: torch.vmap(function)(t).sum())(torch.ones(3))
    else:
        with CONTEXTS[context]():
            function(torch.ones(3))
    assert made.source == expected


FRESH = """
import sys, time
import seqcells, torch
before = set(sys.modules)
sys.path.insert(0, {folder!r})
{steps}
start = time.process_time()
for made in (seqcells.cell(gates="f n", states="h")(mgu),):
    made.source
print(time.process_time() - start)
slow = {{"torch._dynamo", "sympy", "torch.fx.experimental.proxy_tensor", "triton"}}
print(sorted(slow & set(sys.modules) - before))
"""


def test_the_first_derivation_is_quick():
    """Without Dynamo, sympy and the like, whose import alone takes a second."""
    steps = "sigmoid, tanh = torch.sigmoid, torch.tanh\n" + inspect.getsource(mgu)
    file = Path(__file__).parent / "steps.py"
    code = FRESH.format(folder=str(file.parent), steps=steps)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    seconds, imported = found.stdout.splitlines()
    assert float(seconds) <= 0.25 and imported == "[]", found.stdout + found.stderr


def test_what_is_shown(registered):
    assert registered["my_gru_before"].explain().splitlines() == [
        "my_gru_before: gates r z n; states h; the output is h",
        "product with h: r z",
        "product with r * h, after the others: n",
        "saved for backward, 3 tiles a step: the fewest from which, with the states before and after it, backward "
        "follows",
        "  r = sigmoid(x.r + U.r(h)): for the gradients of gate r, h, U.n's weight",
        "  z = sigmoid(x.z + U.z(h)): for the gradients of gate z, gate n, h",
        "  n = tanh(x.n + U.n(r * h)): for the gradients of gate z, gate n",
    ]
    assert "used for more than adding to an input's: n" in registered["my_gru"].explain()
    assert "trained vectors u\nwithout recurrent product: n\n" in registered["indrnn"].explain()
    shown = registered["cornn"].explain()
    assert "without input product: z" in shown and "product with y: y\nproduct with z: z\n" in shown
    assert "the output is y" in registered["with_output"].explain()
    assert "per-step inputs delta" in registered["gru_d"].explain()
    source = registered["gru_d"].source
    assert [line[4 : line.index("(")] for line in source.splitlines() if line.startswith("def ")] == [
        "operands_1",
        "operands_2",
        "forward",
        "backward_2",
        "backward",
        "finish",
    ]
    source = registered["mgu"].source
    assert "    f = sigmoid(gx[0] + hu[0], FAST)\n" in source and "d_f = " in source
    assert registered["mgu"].__doc__ == "Zhou et al. 2016."


COMPILES = """
import sys
from seqcells.kernels import report
sys.path.insert(0, {folder!r})
import steps
kinds = ("train", "bf16"), ("backward", "bf16"), ("backward", "fp32")
every = steps.my_gru_before, steps.peculiar, steps.gru_d, steps.params_alone, steps.slstm, steps.nobody
for n, step in enumerate(every):
    made = steps.define(step)
    for direction, dtype in kinds if {whole} else kinds[n % 3 :][:1]:
        case = report.Case(made.key, direction, dtype, 8, 20, "sm_90", schedule="resident", precision="ieee")
        (row,) = report.measure(case)
        print(row.good, row.spills)
"""


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_kernels_compile(whole):
    """Here they are interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = COMPILES.format(folder=str(Path(__file__).parent), whole=whole)
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert found.stdout.splitlines() == ["True 0"] * (18 if whole else 6), found.stdout + found.stderr

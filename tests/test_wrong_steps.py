"""Steps that no kernels can be derived from: each error names the line and says what to write."""

import inspect

import pytest
import torch
from steps import define, mgu, registries  # noqa: F401  (a fixture)

import seqcells
from seqcells import derive
from seqcells.cell import CellError
from seqcells.check import Shape, errors
from seqcells.kernels import cells

sigmoid, tanh = torch.sigmoid, torch.tanh
pytestmark = pytest.mark.usefixtures("registered")


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


def grows(x, U, h):
    return (1 + 2 * h) * torch.exp(-x.a * x.a) + U.a(h)


NOT_YET = [
    (no_product, "a b", r"gate b has no recurrent product, U\.b"),
    (no_input, "a b", r"x\.b is not used"),
    (two_others, "a b c", "a second operand that is not h"),
    (second_first, "a b", "put a at the end of gates="),
    (only_second, "a", "no gate's product is with h"),
    (inner_and_second, "a b", "gate a whose U.a does more than add"),
    (not_finite_at_zero, "a", "all zero .* not finite"),
    (grows, "a", "grow beyond float32's numbers in 1000 steps"),
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

"""Steps that no kernels can be derived from: each error names the line and says what to write."""

import inspect

import numpy as np
import pytest
import torch
from steps import define, mgu, registries  # noqa: F401  (a fixture)

import seqcells
from seqcells import derive
from seqcells.cell import CellError
from seqcells.kernels import registry

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


def over_rows(x, U, h):
    return x.a + U.a(h) - h.mean(0, keepdim=True)


def of_all(x, U, h):
    return torch.nn.functional.layer_norm(x.a + U.a(h), h.shape)


def without_eps(x, U, h):
    return torch.nn.functional.rms_norm(x.a + U.a(h), h.shape[-1:])


def normalized(x, U, h):
    return torch.nn.functional.normalize(x.a + U.a(h), dim=-1)


def accumulated(x, U, h):
    return (x.a + U.a(h)).cumsum(-1)


def flipped(x, U, h):
    return (x.a + U.a(h)).flip(-1)


def one_unit(x, U, h):
    return x.a + U.a(h) * h[:, :1]


def multiplied(x, U, h):
    return x.a + U.a(h) + (h @ h.T).mean(-1, keepdim=True)


def a_mean_as_operand(x, U, h):
    return x.a + U.a(h.mean(-1, keepdim=True))


def a_mean_as_state(x, U, h):
    a = x.a + U.a(h)
    return a.mean(-1, keepdim=True)


def of_a_captured_tensor(x, U, h):
    return x.a + U.a(h) * TENSOR.mean(-1, keepdim=True)


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


def captured_by_a_product(x, U, h):
    return x.a + U.a(TENSOR)


TENSOR = torch.ones(3, 5, dtype=torch.float64)
OF_A_LAYER = torch.ones(4)


def captured_of_a_layers_size(x, U, h):
    return (x.a + U.a(h)) * OF_A_LAYER


def made_in_the_step(x, U, h):
    return (x.a + U.a(h)) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def by_numpy(x, U, h):
    return torch.from_numpy(np.tanh((x.a + U.a(h)).detach().numpy()))


def by_a_numpy_function(x, U, h):
    return np.tanh(x.a + U.a(h))


def product_without_a_call(x, U, h):
    a = x.a
    return a + U.a * h


def for_one_size(x, U, h):
    return torch.nn.functional.layer_norm(x.a + U.a(h), (4,))


def no_such_gate(x, U, h):
    return x.a + U.q(h)


def two_operands(x, U, h):
    return x.a + U.a(h) + U.a(2 * h)


def another_dtype(x, U, h):
    return (x.a + U.a(h)).float()


def a_boolean(x, U, h):
    a = x.a + U.a(h)
    return a + (a > 0) * 0.3


def a_random_number(x, U, h):
    return torch.nn.functional.dropout(x.a + U.a(h))


def a_number_for_a_state(x, U, h):
    h = x.a + U.a(h)
    return 0.0


def a_boolean_for_a_state(x, U, h):
    return x.a > U.a(h)


def too_few(x, U, h, c):
    h = x.a + U.a(h) * c
    return h


def too_many(x, U, h):
    return x.a + U.a(h), h


def of_units(x, U, h):
    return x.a + U.a(h.mean(-1))


def of_a_number(x, U, h):
    return x.a + U.a(0.5)


def joined(x, U, h):
    return torch.cat([x.a, U.a(h)], -1)[:, :5]


def as_a_number(x, U, h):
    return x.a + U.a(h) * float(h.max())


def a_derivative(x, U, h):
    return WITHOUT.apply(x.a + U.a(h))


class WITHOUT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a.tanh()

    @staticmethod
    def backward(ctx, d):
        return d * torch.digamma(ctx.saved_tensors[0])


def unused(x, U, h):
    return x.a + U.a(h)


def no_input(x, U, h):
    return torch.tanh(U.a(h))


# What is wrong: the error, what its text says, and the line of the step (of its first, 0) that it names.
WRONG = [
    (
        unknown,
        "a",
        derive.UnknownOperation,
        "no erfinv; write it with what they have: abs, add.* tanh, threshold, where",
        1,
    ),
    (branch, "a", derive.DataDependentBranch, r"torch\.where", 2),
    (as_a_number, "a", derive.MixesUnits, r"max gives no tensor of the states' shape", 1),
    (in_place, "a", derive.InPlaceChange, "make a new one", 2),
    (in_place_method, "a", derive.InPlaceChange, "relu_", 1),
    (an_element, "a", derive.InPlaceChange, r"torch\.where for a\[i\] = b", 2),
    (over_units, "a", derive.MixesUnits, r"only U\.k\(v\), v\.mean\(-1, keepdim=True\), and layer_norm", 2),
    (over_rows, "a", derive.MixesUnits, "mean gives no tensor of the states' shape", 1),
    (of_all, "a", derive.MixesUnits, "layer_norm gives no tensor of the states' shape", 1),
    (without_eps, "a", derive.MixesUnits, r"rms_norm \(with eps=\)", 1),
    (normalized, "a", derive.MixesUnits, "norm gives no tensor of the states' shape", 1),
    (accumulated, "a", derive.UnknownOperation, "no cumsum", 1),
    (flipped, "a", derive.UnknownOperation, "no flip", 1),
    (one_unit, "a", derive.MixesUnits, "one value for each row and unit", 1),
    (multiplied, "a", derive.MixesUnits, "one value for each row and unit", 1),
    (a_mean_as_operand, "a", CellError, r"U\.a takes a state, or something of a state's shape .*; got a tensor", 1),
    (a_mean_as_state, "a", derive.MixesUnits, "the new h gives no tensor of the states' shape", 2),
    (of_a_captured_tensor, "a", derive.CapturedTensor, "a tensor from outside", 1),
    (softmax, "a", derive.UnknownOperation, "no _?softmax; it mixes units", 1),
    (transposed, "a", derive.MixesUnits, "one value for each row and unit", 1),
    (joined, "a", derive.MixesUnits, "cat gives no tensor of the states' shape", 1),
    (of_units, "a", derive.MixesUnits, "mean gives no tensor of the states' shape", 1),
    (of_a_number, "a", CellError, r"U\.a takes a state, or something of a state's shape .*; got 0\.5", 1),
    (third_level, "a b c", derive.TooManyProducts, r"computed from U\.b.* third.* hand the result", 3),
    (captured, "a", derive.CapturedTensor, r"params= .* inputs= .* float\(t\)", 1),
    (captured_by_a_product, "a", derive.CapturedTensor, r"params= .* inputs= .* float\(t\)", 1),
    (captured_of_a_layers_size, "a", derive.CapturedTensor, r"params= .* inputs= .* float\(t\)", 1),
    (made_in_the_step, "a", derive.UnknownOperation, "made in the step: take a number, or a trained vector", 1),
    (by_numpy, "a", CellError, r"numpy makes a NumPy array.*: use torch's functions", 1),
    (by_a_numpy_function, "a", CellError, r"makes a NumPy array.*torch\.tanh for np\.tanh", 1),
    (product_without_a_call, "a", CellError, r"TypeError: .*; it may use x\.k and U\.k\(v\)", 2),
    (for_one_size, "a", derive.MixesUnits, r"layer_norm .* over v\.shape\[-1:\]", 1),
    (no_such_gate, "a", CellError, "no gate 'q'; gates= has a", 1),
    (two_operands, "a", CellError, "one recurrent product: name another gate", 1),
    (another_dtype, "a", CellError, r"float32, whatever the states' dtype is.*\.to\(h.dtype\)", 1),
    (a_boolean, "a", CellError, r"float32, whatever the states' dtype is.*\.to\(h.dtype\)", 2),
    (a_random_number, "a", derive.UnknownOperation, "(no .*dropout|no bernoulli_?); a step draws no random", 1),
    (a_number_for_a_state, "a", CellError, r"new h must be a tensor, got 0\.0: for a number torch\.full_like", 2),
    (a_boolean_for_a_state, "a", CellError, r"new h is of torch\.bool: .*\.to\(h\.dtype\)", 1),
    (too_few, "a", CellError, "gives 1 value for the states h c: return 2, in this order", 2),
    (too_many, "a", CellError, "gives 2 values for the states h: return 1", 1),
    (a_derivative, "a", derive.UnknownOperation, "derivative of the step needs .*: digamma; write it with", 0),
    (unused, "a b", CellError, r"neither x\.b nor U\.b; take it out of gates=, or use it", 0),
    (no_input, "a", CellError, r"no x\.k and no per-step input.* add x\.k", 0),
]


@pytest.mark.parametrize(("step", "gates", "error", "says", "line"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_a_wrong_step_names_its_line(step, gates, error, says, line):
    made = define(step, gates)
    with pytest.raises(error, match=says) as raised:
        made.explain()
    text, first = inspect.getsourcelines(step)
    assert raised.value.line == (__file__, first + line)
    assert text[line].strip() in str(raised.value)
    for asked in (lambda: made.form, lambda: registry.get(made.key)):  # and where anything else is wanted
        with pytest.raises(error):
            asked()


def test_a_layer_refuses_numpy():
    """It ran by the reference, and the gradient was lost without a word."""
    layer = seqcells.Recurrent(define(by_numpy, "a"), 3, 4)
    with pytest.raises(CellError, match="use torch's functions"):
        layer(torch.randn(2, 1, 3))


def lstm(x, U, h):
    return h


def with_a_param(x, U, h, p):
    return x.a + U.a(h) * p


DECLARATIONS = [
    (lambda: seqcells.cell(gates="f n", states="s")(mgu), TypeError, r"mgu\(x, U, s\), got mgu\(x, U, h\)"),
    (
        lambda: seqcells.cell(gates="a", states="h")(with_a_param),
        TypeError,
        r"then params, inputs, constants and the dropout mask",
    ),
    (lambda: seqcells.cell(gates="a", states="h")(torch.nn.Linear(1, 1)), TypeError, "a function, got a Linear"),
    (lambda: seqcells.cell(gates="a", states="h")(lambda x, U, h: h), ValueError, "'<lambda>' is no name"),
    (lambda: seqcells.cell(gates="a", states="h")(lstm), ValueError, "'lstm' is a cell of seqcells itself"),
    (lambda: seqcells.cell(gates="", states="h"), ValueError, "gates .*no name"),
    (lambda: seqcells.cell(gates="a a", states="h"), ValueError, "gates .*occurs twice"),
    (lambda: seqcells.cell(gates="a 1", states="h"), ValueError, "gates .*'1' is no name"),
    (lambda: seqcells.cell(gates="a", states=["h"]), TypeError, "states must be a string of names"),
    (lambda: seqcells.cell(gates="a", states="h", params=3), TypeError, "params must be a string of names"),
    (lambda: seqcells.cell(gates="a", states="h", params="p:2"), ValueError, "p:2 is neither p, .* nor p:1"),
    (lambda: seqcells.cell(gates="a", states="h", params="p p:1"), ValueError, "params .*occurs twice"),
    (lambda: seqcells.cell(gates="a", states="h", inputs="h"), ValueError, "'h' is named twice among states"),
    (lambda: seqcells.cell(gates="a", states="h", inputs="lengths"), ValueError, "'lengths' cannot be .*: a layer's"),
    (lambda: seqcells.cell(gates="a", states="x"), ValueError, "'x' cannot be .*: the step's first two"),
    (lambda: seqcells.cell(gates="a", states="h", params="weight_hh"), ValueError, "'weight_hh' cannot be"),
    (
        lambda: seqcells.cell(gates="a", states="h", constants="dt"),
        ValueError,
        "in 'dt' 'dt' is none",
    ),
    (lambda: seqcells.cell(gates="a", states="h", constants="dt=inf"), ValueError, "in 'dt=inf' 'dt=inf' is none"),
    (lambda: seqcells.cell(gates="a", states="h", constants="a=1 a=2"), ValueError, "constants .*occurs twice"),
    (lambda: seqcells.cell(gates="a", states="h", constants={"dt": 1}), TypeError, "constants must be a string"),
    (lambda: seqcells.cell(gates="a", states="h", outputs="y z"), ValueError, "one output, got 2"),
    (lambda: seqcells.cell(gates="a", states="h c", outputs="c"), ValueError, "'c' is a state; .*put it first"),
    (lambda: seqcells.cell(gates="a", states="h", bias="b"), ValueError, "bias= names 'b', which is none of gates='a'"),
]


@pytest.mark.parametrize("number", range(len(DECLARATIONS)))
def test_wrong_declarations(number):
    declare, error, says = DECLARATIONS[number]
    with pytest.raises(error, match=says):
        declare()


def test_wrong_constants():
    made = define(define.__globals__["euler"])
    with pytest.raises(TypeError, match="'euler' has no constant 'df': it has dt, gamma"):
        made.with_constants(df=0.1)
    with pytest.raises(TypeError, match="dt must be a number"):
        made.with_constants(dt="fast")
    with pytest.raises(TypeError, match=r"'mgu' has no constant 'dt': it has none \(constants= of seqcells.cell\)"):
        define(mgu).with_constants(dt=0.1)

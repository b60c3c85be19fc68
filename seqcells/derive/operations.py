"""The operations that a step may use: aten's operations as values.

A new operation that is not a combination of these must also be added to `emit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .values import COMPARISONS, FUNCTIONS, Graph, Value, constant

aten = torch.ops.aten
Operation = Callable[..., "Value | None"]


def spoken(target: object) -> str:
    return str(target).removeprefix("aten.").partition(".")[0]


def _function(name: str) -> Callable[..., Value]:
    return lambda g, a: g.function(name, a)


def _exponential(name: str) -> Callable[..., Value]:
    return lambda g, a: g.exponential(name, a)


def _comparison(name: str) -> Callable[..., Value]:
    return lambda g, a, b: g.compared(name, a, b)


def _scaled(g: Graph, b: Value, alpha: Value | None) -> Value:
    return b if alpha is None else g.product(b, alpha)


def _clamp(g: Graph, a: Value, low: Value | None = None, high: Value | None = None) -> Value:
    for limit, op in ((low, "lt"), (high, "gt")):
        if limit is not None:
            a = g.choice(g.compared(op, a, limit), limit, a)
    return a


def _larger(g: Graph, a: Value, b: Value, op: str = "lt") -> Value:
    # NaN if either is NaN, as in torch: comparisons with NaN are false, and the second test is for b.
    a, b = g.as_number(a), g.as_number(b)
    found = g.choice(g.compared(op, a, b), b, a)
    return g.choice(g.make("ne", b, b), b, found) if constant(b) is None else found


def _same(g: Graph, a: Value, **_: object) -> Value:
    return a


def _cast(g: Graph, a: Value, dtype: object = None, **_: object) -> Value | None:
    """A boolean as a number; a number is returned as it is."""
    return g.as_number(a) if dtype in (torch.float64, None) else None


def _lerp(g: Graph, a: Value, b: Value, weight: Value) -> Value:
    return g.sum(a, g.product(weight, g.difference(b, a)))


def _log_sigmoid(g: Graph, a: Value) -> tuple[Value, Value]:
    """log_sigmoid, and the buffer that torch's derivative uses and ours does not."""
    small = g.function("log1p", g.function("exp", g.negative(g.function("abs", a))))
    return g.difference(_clamp(g, a, None, g.number(0)), small), g.number(0)


def _softplus(g: Graph, a: Value, beta: Value | None = None, limit: Value | None = None) -> Value:
    beta = g.number(1) if beta is None else beta
    scaled = g.product(a, beta)
    soft = g.quotient(g.function("log1p", g.function("exp", scaled)), beta)
    return g.choice(g.compared("gt", scaled, limit or g.number(20)), a, soft)


def _softplus_backward(g: Graph, d: Value, a: Value, beta: Value, limit: Value) -> Value:
    scaled = g.product(a, beta)
    return g.choice(g.compared("gt", scaled, limit), d, g.product(d, g.function("sigmoid", scaled)))


def _elu(
    g: Graph, a: Value, alpha: Value | None = None, scale: Value | None = None, inner: Value | None = None
) -> Value:
    alpha, scale, inner = (g.number(1) if v is None else v for v in (alpha, scale, inner))
    low = g.product(g.function("expm1", g.product(a, inner)), g.product(alpha, scale))
    return g.choice(g.compared("gt", a, g.number(0)), g.product(a, scale), low)


def _elu_backward(
    g: Graph, d: Value, alpha: Value, scale: Value, inner: Value, of_result: Value, a: Value
) -> Value | None:
    if constant(of_result):
        return None  # a change in place
    low = g.product(d, g.function("exp", g.product(a, inner)), g.product(alpha, scale, inner))
    return g.choice(g.compared("gt", a, g.number(0)), g.product(d, scale), low)


def _leaky_relu(g: Graph, a: Value, slope: Value | None = None) -> Value:
    return g.choice(g.compared("gt", a, g.number(0)), a, g.product(a, slope or g.number(0.01)))


def _between(g: Graph, d: Value, a: Value, low: Value, high: Value) -> Value:
    """d where a is between the two."""
    outside = g.logical("or", g.compared("le", a, low), g.compared("ge", a, high))
    return g.choice(outside, g.number(0), d)


def _gelu(g: Graph, a: Value, approximate: str = "none") -> Value:
    return g.product(a, _gelu_gate(g, a, approximate)[0])


def _gelu_gate(g: Graph, a: Value, approximate: str) -> tuple[Value, Value]:
    """The factor that gelu multiplies a with, and the factor's derivative."""
    half, one = g.number(0.5), g.number(1)
    square = g.product(a, a)
    if approximate == "none":
        gate = g.product(half, g.sum(one, g.function("erf", g.product(a, g.number(2**-0.5)))))
        bell = g.function("exp", g.product(square, g.number(-0.5)))
        return gate, g.product(bell, g.number((2 * math.pi) ** -0.5))
    slope, cubic = g.number((2 / math.pi) ** 0.5), g.number(0.044715)
    t = g.function("tanh", g.product(slope, g.sum(a, g.product(cubic, g.product(square, a)))))
    inner = g.product(slope, g.sum(one, g.product(g.number(3 * 0.044715), square)))
    return g.product(half, g.sum(one, t)), g.product(half, g.difference(one, g.product(t, t)), inner)


def _gelu_backward(g: Graph, d: Value, a: Value, approximate: str = "none") -> Value:
    gate, slope = _gelu_gate(g, a, approximate)
    return g.product(d, g.sum(gate, g.product(a, slope)))


def _silu_backward(g: Graph, d: Value, x: Value) -> Value:
    s, one = g.function("sigmoid", x), g.number(1)
    return g.product(d, s, g.sum(one, g.product(x, g.difference(one, s))))


def _sign(g: Graph, a: Value) -> Value:
    zero = g.number(0)
    above = g.choice(g.compared("gt", a, zero), g.number(1), zero)
    return g.choice(g.compared("lt", a, zero), g.number(-1), above)


def _both(operation: torch._ops.OpOverloadPacket, value: Operation) -> dict[object, Operation]:
    """An operation whose second operand may be a number."""
    return {operation.Tensor: value, operation.Scalar: value}


# A value, or a tuple of them; None for arguments that are not known.
OPERATIONS: dict[object, Callable[..., Value | tuple[Value, ...] | None]] = {
    **_both(aten.add, lambda g, a, b, alpha=None: g.sum(a, _scaled(g, b, alpha))),
    **_both(aten.sub, lambda g, a, b, alpha=None: g.difference(a, _scaled(g, b, alpha))),
    **_both(aten.rsub, lambda g, a, b, alpha=None: g.difference(b, _scaled(g, a, alpha))),
    **_both(aten.mul, lambda g, a, b: g.product(a, b)),
    **_both(aten.div, lambda g, a, b: g.quotient(a, b)),
    **_both(aten.lerp, _lerp),
    aten.addcmul.default: lambda g, a, b, c, value=None: g.sum(a, _scaled(g, g.product(b, c), value)),
    aten.addcdiv.default: lambda g, a, b, c, value=None: g.sum(a, _scaled(g, g.quotient(b, c), value)),
    aten.neg.default: lambda g, a: g.negative(a),
    aten.reciprocal.default: lambda g, a: g.quotient(g.number(1), a),
    aten.pow.Tensor_Scalar: lambda g, a, n: g.power(a, constant(n)),
    aten.pow.Scalar: lambda g, n, a: g.power_of(constant(n), a),
    **{getattr(aten, n).default: _function(n) for n in FUNCTIONS},
    **{getattr(aten, n).default: _exponential(n) for n in ("exp", "exp2", "expm1")},
    aten.rsqrt.default: lambda g, a: g.power(a, -0.5),
    aten.relu.default: lambda g, a: g.choice(g.compared("lt", a, g.number(0)), g.number(0), a),
    aten.leaky_relu.default: _leaky_relu,
    aten.threshold.default: lambda g, a, limit, low: g.choice(g.compared("le", a, limit), low, a),
    aten.silu.default: lambda g, a: g.product(a, g.function("sigmoid", a)),
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.celu.default: lambda g, a, alpha=None: _elu(
        g, a, alpha, None, None if alpha is None else g.quotient(g.number(1), alpha)
    ),
    aten.softplus.default: _softplus,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.hardtanh.default: lambda g, a, low=None, high=None: _clamp(g, a, low or g.number(-1), high or g.number(1)),
    aten.hardsigmoid.default: lambda g, a: g.quotient(
        _clamp(g, g.sum(a, g.number(3)), g.number(0), g.number(6)), g.number(6)
    ),
    aten.maximum.default: _larger,
    aten.minimum.default: lambda g, a, b: _larger(g, a, b, "gt"),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda g, a, high: _clamp(g, a, None, high),
    aten.where.self: lambda g, c, a, b: g.choice(c, a, b),
    **{k: v for n in COMPARISONS for k, v in _both(getattr(aten, n), _comparison(n)).items()},
    aten.logical_and.default: lambda g, a, b: g.logical("and", a, b),
    aten.logical_or.default: lambda g, a, b: g.logical("or", a, b),
    aten.logical_not.default: lambda g, a: g.logical("not", a),
    aten.bitwise_and.Tensor: lambda g, a, b: g.logical("and", a, b),
    aten.bitwise_or.Tensor: lambda g, a, b: g.logical("or", a, b),
    aten.bitwise_not.default: lambda g, a: g.logical("not", a),
    aten._to_copy.default: _cast,
    **dict.fromkeys((aten.detach.default, aten.alias.default, aten.clone.default), _same),
    aten.zeros_like.default: lambda g, a, **_: g.number(0),
    aten.ones_like.default: lambda g, a, **_: g.number(1),
    aten.full_like.default: lambda g, a, x, **_: x,
    aten.empty_like.default: lambda g, a, **_: g.number(float("nan")),  # filled by the next operation
    aten.fill.Scalar: lambda g, a, x: x,
    aten.scalar_tensor.default: lambda g, x, **_: x,
    aten.zeros.default: lambda g, _size, **_: g.number(0),
    aten.new_zeros.default: lambda g, a, _size, **_: g.number(0),
    aten.full.default: lambda g, _size, x, **_: x,
    aten.expand.default: lambda g, a, _size: a,  # a number, or one number for each row
    # Derivatives.
    aten.sum.dim_IntList: lambda g, a, dims, keepdim=False, **_: g.mean(a) if dims == [1] and keepdim else None,
    aten.sigmoid_backward.default: lambda g, d, y: g.product(d, y, g.difference(g.number(1), y)),
    aten.tanh_backward.default: lambda g, d, y: g.product(d, g.difference(g.number(1), g.product(y, y))),
    aten.threshold_backward.default: lambda g, d, y, limit: g.choice(g.compared("le", y, limit), g.number(0), d),
    aten.leaky_relu_backward.default: lambda g, d, a, slope, _result: g.choice(
        g.compared("gt", a, g.number(0)), d, g.product(d, slope)
    ),
    aten.silu_backward.default: _silu_backward,
    aten.gelu_backward.default: _gelu_backward,
    aten.elu_backward.default: _elu_backward,
    aten.softplus_backward.default: _softplus_backward,
    aten.log_sigmoid_backward.default: lambda g, d, a, _buffer: g.product(d, g.function("sigmoid", g.negative(a))),
    aten.hardtanh_backward.default: _between,
    aten.hardsigmoid_backward.default: lambda g, d, a: _between(
        g, g.quotient(d, g.number(6)), a, g.number(-3), g.number(3)
    ),
    aten.masked_fill.Scalar: lambda g, a, c, x: g.choice(c, x, a),
    aten.masked_fill.Tensor: lambda g, a, c, x: g.choice(c, x, a),
    aten.sgn.default: _sign,
    aten.sign.default: _sign,
}
BACKWARD_ONLY = (aten.sum.dim_IntList,)  # the gradient of one number for each row: see `trace._Mean`
_MAKING = "alias expand empty_like fill zeros_like ones_like _to_copy scalar_tensor full zeros new_zeros full_like"


def known() -> str:
    """The names of the operations that a step may use, except those that make tensors of numbers."""
    targets = [target for target in OPERATIONS if target not in BACKWARD_ONLY]
    names = {spoken(target).removesuffix("_forward") for target in targets} - set(_MAKING.split())
    return ", ".join(sorted(n for n in names if not n.endswith("_backward")))

"""What a step may use: aten's operations as values.

A new one that is no combination of these is also to be printed (`emit`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .values import COMPARISONS, Graph, Value, constant

aten = torch.ops.aten


def spoken(target: Any) -> str:
    return str(target).removeprefix("aten.").partition(".")[0]


def _function(name: str) -> Callable[..., Value]:
    return lambda g, a: g.make(name, g.as_number(a))


def _comparison(name: str) -> Callable[..., Value]:
    return lambda g, a, b: g.compared(name, a, b)


def _scaled(g: Graph, b: Value, alpha: Value | None) -> Value:
    return b if alpha is None else g.product(b, alpha)


def _clamp(g: Graph, a: Value, low: Value | None = None, high: Value | None = None) -> Value:
    for limit, op in ((low, "lt"), (high, "gt")):
        if limit is not None:
            a = g.choice(g.make(op, a, limit), limit, a)
    return a


def _larger(g: Graph, a: Value, b: Value, op: str = "lt") -> Value:
    # Of a NaN, NaN, as in torch: no comparison with it holds, and the second asks for b's.
    found = g.choice(g.make(op, a, b), b, a)
    return g.choice(g.make("ne", b, b), b, found) if constant(b) is None else found


def _same(g: Graph, a: Value, **_: Any) -> Value:
    return a


def _cast(g: Graph, a: Value, dtype: Any = None, **_: Any) -> Value | None:
    """A boolean as a number; a number stays what it is."""
    return g.as_number(a) if dtype == torch.float64 else None


def _both(operation: Any, value: Callable[..., Value | None]) -> dict[Any, Callable[..., Value | None]]:
    """An operation whose second operand may be a number."""
    return {operation.Tensor: value, operation.Scalar: value}


# What is known: aten's operations as values. A new one that is no combination of these is also to be printed (`emit`).
OPERATIONS: dict[Any, Callable[..., Value | None]] = {
    **_both(aten.add, lambda g, a, b, alpha=None: g.sum(a, _scaled(g, b, alpha))),
    **_both(aten.sub, lambda g, a, b, alpha=None: g.difference(a, _scaled(g, b, alpha))),
    **_both(aten.rsub, lambda g, a, b, alpha=None: g.difference(b, _scaled(g, a, alpha))),
    **_both(aten.mul, lambda g, a, b: g.product(a, b)),
    **_both(aten.div, lambda g, a, b: g.quotient(a, b)),
    aten.neg.default: lambda g, a: g.negative(a),
    aten.reciprocal.default: lambda g, a: g.quotient(g.number(1), a),
    aten.pow.Tensor_Scalar: lambda g, a, n: g.power(a, constant(n)),
    **{getattr(aten, n).default: _function(n) for n in ("sigmoid", "tanh", "exp", "log", "sqrt", "abs", "sin", "cos")},
    aten.rsqrt.default: lambda g, a: g.power(a, -0.5),
    aten.relu.default: lambda g, a: g.choice(g.make("lt", a, g.number(0)), g.number(0), a),
    aten.silu.default: lambda g, a: g.product(a, g.make("sigmoid", a)),
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
    aten.empty_like.default: lambda g, a, **_: g.number(float("nan")),  # it is filled next
    aten.fill.Scalar: lambda g, a, x: x,
    aten.scalar_tensor.default: lambda g, x, **_: x,
    aten.zeros.default: lambda g, _size, **_: g.number(0),
    aten.new_zeros.default: lambda g, a, _size, **_: g.number(0),
    aten.full.default: lambda g, _size, x, **_: x,
    aten.expand.default: lambda g, a, _size: a,  # of one number: all else has the shape already
    # Derivatives.
    aten.sigmoid_backward.default: lambda g, d, y: g.product(d, y, g.difference(g.number(1), y)),
    aten.tanh_backward.default: lambda g, d, y: g.product(d, g.difference(g.number(1), g.product(y, y))),
    aten.threshold_backward.default: lambda g, d, y, limit: g.choice(g.make("le", y, limit), g.number(0), d),
    aten.silu_backward.default: lambda g, d, x: _silu_backward(g, d, x),
    aten.masked_fill.Scalar: lambda g, a, c, x: g.choice(c, x, a),
    aten.masked_fill.Tensor: lambda g, a, c, x: g.choice(c, x, a),
    aten.sgn.default: lambda g, a: _sign(g, a),
    aten.sign.default: lambda g, a: _sign(g, a),
}


def _silu_backward(g: Graph, d: Value, x: Value) -> Value:
    s, one = g.make("sigmoid", x), g.number(1)
    return g.product(d, s, g.sum(one, g.product(x, g.difference(one, s))))


def _sign(g: Graph, a: Value) -> Value:
    zero = g.number(0)
    above = g.choice(g.make("gt", a, zero), g.number(1), zero)
    return g.choice(g.make("lt", a, zero), g.number(-1), above)


_INNER = "alias expand empty_like fill zeros_like ones_like _to_copy scalar_tensor full zeros new_zeros full_like"


def known() -> str:
    """The operations a step may use, but for those by which torch makes numbers."""
    names = {spoken(target) for target in OPERATIONS} - set(_INNER.split())
    return ", ".join(sorted(n for n in names if not n.endswith("_backward")))

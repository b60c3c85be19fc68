"""The step, run once on small tensors: one graph with its forward and its backward.

`make_fx` over `torch.func.vjp` lists the operations of both, decomposed to what autograd itself calls. The recurrent
products are not in the list: the step's U.k(v) gives an input `hu` and notes the operand v, which is one more output.

Everything of torch.fx that is used is in this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode

from .errors import (
    CapturedTensor,
    CellError,
    DataDependentBranch,
    InPlaceChange,
    Line,
    MixesUnits,
    NotYet,
    TooManyProducts,
    UnknownOperation,
)
from .values import COMPARISONS, Graph, Value, ancestors, constant

aten = torch.ops.aten
SHAPE = (3, 5)  # rows and units of the tensors it is run on


@dataclass
class Traced:
    """What a step does, as values.

    new: the states after the step. operand: of the second product; None where there is none. second: for each gate that
    has a recurrent product, whether it is the second one. dgx, dhu, dbefore: gradients of the gates' input products and
    recurrent products, and of the states before the step. names: what the step calls its values.
    """

    graph: Graph
    new: list[Value]
    operand: Value | None
    second: dict[int, bool]
    dgx: list[Value]
    dhu: list[Value]
    dbefore: list[Value]
    names: dict[Value, str]


class _Run:
    """What is noted while the step runs. operands: of the recurrent products, h first; products: for each gate that has
    one, the number of its operand, and where; lines: of the operations, by their names in the graph."""

    def __init__(self, code: CodeType, gates: tuple[str, ...]) -> None:
        self.code, self.gates = code, gates
        self.frame: FrameType | None = None
        self.operands: list[Tensor] = []
        self.products: dict[int, tuple[int, Line | None]] = {}
        self.names: list[str] = []
        self.lines: dict[str, Line] = {}

    def line(self) -> Line | None:
        """The line of the step that is being run; None outside it."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        self.frame = frame or self.frame
        return None if frame is None else Line(self.code.co_filename, frame.f_lineno)

    def gate(self, of: str, name: str) -> int:
        if name not in self.gates:
            raise CellError(f"{of}.{name}: there is no gate {name!r}; gates are {' '.join(self.gates)}", self.line())
        return self.gates.index(name)

    def product(self, gate: int, v: Any) -> None:
        """Note U.gate(v)."""
        line, name = self.line(), self.gates[gate]
        if not isinstance(v, Tensor) or not v.is_floating_point():
            raise CellError(f"U.{name} takes a state, or something computed in the step; got {v!r}", line)
        known = [n for n, operand in enumerate(self.operands) if operand is v]
        number = known[0] if known else len(self.operands)
        if not known:
            self.operands.append(v)
        if self.products.setdefault(gate, (number, line))[0] != number:
            raise CellError(f"U.{name} is used with two operands: a gate has one recurrent product", line)


class _Inputs:
    """The step's x: x.k is gate k's input product."""

    def __init__(self, run: _Run, tiles: list[Tensor]) -> None:
        self._run, self._tiles = run, tiles

    def __getattr__(self, gate: str) -> Tensor:
        return self._tiles[self._run.gate("x", gate)]


class _Products:
    """The step's U: U.k(v) is gate k's recurrent product with v."""

    def __init__(self, run: _Run, tiles: list[Tensor]) -> None:
        self._run, self._tiles = run, tiles

    def __getattr__(self, gate: str) -> Callable[[Tensor], Tensor]:
        number = self._run.gate("U", gate)

        def product(v: Tensor) -> Tensor:
            self._run.product(number, v)
            return self._tiles[number]

        return product


_ASKS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "any", "all", "equal", "allclose")
_CHANGES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")


class _Watch(TorchFunctionMode):
    """Sees each torch function of the step while its line is known, and refuses what cannot be derived."""

    def __init__(self, run: _Run) -> None:
        self.run, self.seen = run, len(_nodes())
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line, name, kwargs = self.run.line(), getattr(func, "__name__", str(func)), kwargs or {}
        if line is None:
            return func(*args, **kwargs)
        if name in _ASKS:
            raise DataDependentBranch(
                f"{name} asks for the value of a tensor, and the kernels have one path for all rows and units: choose "
                "with torch.where(condition, a, b)",
                line,
            )
        if name in _CHANGES or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
            raise InPlaceChange(
                f"{name} changes a tensor in place: make a new one, a = a + b for a += b, torch.where for a[i] = b",
                line,
            )
        out = func(*args, **kwargs)
        nodes, self.seen = _nodes()[self.seen :], len(_nodes())
        if any(node.op == "get_attr" for node in nodes):
            raise CapturedTensor(
                "a tensor from outside the step: the kernels have none but x, U and the states. Of a tensor with one "
                "element use its number, float(t), taken outside the step",
                line,
            )
        results = out if isinstance(out, (tuple, list)) else [out]
        if any(isinstance(r, Tensor) and r.shape != SHAPE for r in results):
            raise MixesUnits(
                f"{name} gives no tensor of the states' shape: a step computes one value for each row and unit, and "
                "only U.k(v) takes something from other units",
                line,
            )
        if any(isinstance(r, Tensor) and r.is_floating_point() and r.dtype != torch.float64 for r in results):
            raise CellError(
                f"{name} gives {torch.get_default_dtype()}, whatever the states' dtype is: of a boolean take "
                ".to(h.dtype), before it is multiplied",
                line,
            )
        self.run.lines.update({node.name: line for node in nodes})
        return out


def _nodes() -> list[Any]:
    mode = get_proxy_mode()
    assert mode is not None
    return list(mode.tracer.graph.nodes)


def trace(step: Callable[..., Any], gates: tuple[str, ...], states: tuple[str, ...]) -> Traced:
    """Run the step on small tensors. CellError, with the line, for what cannot be derived."""
    run, G, S = _Run(step.__code__, gates), len(gates), len(states)

    def joint(gx: list[Tensor], hu: list[Tensor], before: list[Tensor], dnew: list[Tensor], dm: list[Tensor]) -> Any:
        def forward(gx: list[Tensor], hu: list[Tensor], before: list[Tensor]) -> Any:
            run.operands, run.products = [before[0]], {}
            with _Watch(run):
                found = step(_Inputs(run, gx), _Products(run, hu), *before)
            new = list(found) if isinstance(found, (tuple, list)) else [found]
            _check_states(new, run, states)
            results = [*new, *run.operands[1:]]
            return results, [*results, *_locals(run).values()]

        results, back, outputs = torch.func.vjp(forward, gx, hu, before, has_aux=True)  # type: ignore[misc]
        gradients = back([*dnew, *dm[: len(results) - S]])
        return [*outputs, *(g for part in gradients for g in part)]

    def tiles(n: int) -> list[Tensor]:
        return [torch.rand(SHAPE, dtype=torch.float64) + 0.25 for _ in range(n)]

    try:
        graph = make_fx(torch.func.functionalize(joint))(tiles(G), tiles(G), tiles(S), tiles(S), tiles(G)).graph
    finally:
        run.frame = None
    return _read(graph, run, G, S)


def _check_states(new: list[Any], run: _Run, states: tuple[str, ...]) -> None:
    where = Line(run.code.co_filename, run.code.co_firstlineno)
    if len(new) != len(states):
        raise CellError(f"the step gives {len(new)} values for the states {' '.join(states)}", where)
    for name, value in zip(states, new, strict=True):
        if not isinstance(value, Tensor):
            raise CellError(f"the new {name} must be a tensor, got {value!r}", where)
        if value.shape != SHAPE or not value.is_floating_point():
            raise MixesUnits(f"the new {name} must be one number for each row and unit", where)


def _locals(run: _Run) -> dict[str, Tensor]:
    """The step's variables, {name: tensor}: names for the source."""
    variables = {} if run.frame is None else run.frame.f_locals
    found = {n: t for n, t in variables.items() if isinstance(t, Tensor) and t.shape == SHAPE}
    run.names = list(found)
    return found


def _read(graph: Any, run: _Run, G: int, S: int) -> Traced:
    """The nodes as values."""
    values, made = Graph(), {}
    counts = {"gx": G, "hu": G, "before": S, "dstate": S, "dm": G}
    leaves = iter([values.make(kind, n) for kind, count in counts.items() for n in range(count)])
    outputs: list[Value] = []
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "placeholder":
            made[node] = next(leaves)
        elif node.op == "output":
            outputs = [made[n] for n in node.args[0]]
        elif node.op == "call_function":
            made[node] = _value(values, node, made, run.lines.get(node.name))
    found = iter(outputs)

    def take(n: int) -> list[Value]:
        return [next(found) for _ in range(n)]

    new, operands = take(S), take(len(run.operands) - 1)
    names = dict(zip(reversed(take(len(run.names))), reversed(run.names), strict=True))
    dgx, dhu, dbefore = take(G), take(G), take(S)
    _check_levels(run, values, operands)
    second = {gate: number > 0 for gate, (number, _) in sorted(run.products.items())}
    return Traced(values, new, operands[0] if operands else None, second, dgx, dhu, dbefore, names)


def _check_levels(run: _Run, values: Graph, operands: list[Value]) -> None:
    """Raise unless all operands but h are one, computed from no product but those with h."""
    late = {values.make("hu", gate): gate for gate, (number, _) in run.products.items() if number > 0}
    for number, operand in enumerate(operands, 1):
        line = next(line for n, line in run.products.values() if n == number)
        for inner in (late[v] for v in ancestors([operand]) if v in late):
            raise TooManyProducts(
                f"the operand of this product is computed from U.{run.gates[inner]}, whose own is not "
                "h: products may depend on each other in two levels, this is a third",
                line,
            )
        if number > 1:
            raise NotYet("a second operand that is not h: today's kernels have one", line)


def _value(values: Graph, node: Any, made: dict[Any, Value], line: Line | None) -> Value:
    """The value of a node. line: of the step's; autograd's have none."""
    whose = "the kernels have no" if line else "the derivative of the step needs what the kernels do not have:"
    if node.target not in OPERATIONS:
        raise UnknownOperation(f"{whose} {_spoken(node.target)}; they have {known()}", line)

    def operand(a: Any) -> Any:
        if isinstance(a, torch.fx.Node):
            return made[a]
        return values.number(a) if isinstance(a, (bool, int, float)) else a

    arguments = [operand(a) for a in node.args]
    named = {k: operand(v) for k, v in node.kwargs.items()}
    found = OPERATIONS[node.target](values, *arguments, **named)
    if found is None:
        raise UnknownOperation(f"{whose} {_spoken(node.target)} with {list(node.args[1:])}; they have {known()}", line)
    return found


def _spoken(target: Any) -> str:
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
    names = {_spoken(target) for target in OPERATIONS} - set(_INNER.split())
    return ", ".join(sorted(n for n in names if not n.endswith("_backward")))

"""Traces a step: runs it once on small tensors, and records it and its derivative as one graph of values.

A dispatch mode intercepts every aten operation, first those of the step and then those of its backward in autograd, and
records its value. The recurrent products are leaves: the step's U.k(v) returns a tensor `hu` and records the operand v,
which is one more result. Operands receive gradients from outside, as new states do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import over_units
from .errors import (
    CellError,
    DataDependentBranch,
    InPlaceChange,
    Line,
    TooManyProducts,
    UnknownOperation,
    captured,
    mixes_units,
)
from .operations import BACKWARD_ONLY, OPERATIONS, aten, known, spoken
from .values import COMPARISONS, Graph, Value, ancestors, constant

Keywords = dict[str, object] | None
SHAPE = (3, 5)  # rows and units of the tensors that a step is run on
ROW = (3, 1)  # of a mean over units


@dataclass(frozen=True)
class Names:
    """The names of the step's arguments. output: the name of a result that is the output without being a state; "" if
    the first state is the output. drawn: the dropout masks, and for each whether it is
    drawn once for a sequence."""

    gates: tuple[str, ...]
    states: tuple[str, ...]
    params: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    output: str = ""
    drawn: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Gradients:
    """The gradients of a step's arguments, in the order of `Names`, including every gate (zero if it is not used)."""

    x: list[Value]
    inputs: list[Value]
    products: list[Value]
    before: list[Value]
    params: list[Value]


@dataclass(frozen=True)
class Traced:
    """What a step does, as values.

    new: the states after the step, preceded by an output that is not a state. read: the gates whose x is read.
    operands: those of the recurrent products, in the order of first use. products: for each gate that has a product,
    the number of its operand. levels: the level of each operand, 1 or 2. gradients: those from `new` and the operands
    of level 2; finish: those from the operands of level 1. names: the step's names of values. lines: the line of each
    gate's product.
    """

    graph: Graph
    new: list[Value]
    read: set[int]
    operands: list[Value]
    products: dict[int, int]
    levels: list[int]
    gradients: Gradients
    finish: Gradients
    names: dict[Value, str]


class _Run:
    """What is recorded while the step runs.

    values: the tensors' values, by their memory address, so that tensors that autograd saves, and views, are found.
    tensors: keeps the tensors, and so their addresses, in use. operands: (tensor, value, line). extremes: pairs of
    which the larger or smaller is taken. at: the line whose derivative is being run.
    """

    def __init__(self, code: CodeType, gates: tuple[str, ...]) -> None:
        self.code, self.gates, self.graph = code, gates, Graph()
        self.frame: FrameType | None = None
        self.at: Line | None = None
        self.values: dict[int, Value] = {}
        self.tensors: list[Tensor] = []
        self.read: set[int] = set()
        self.extremes: set[tuple[Value, Value]] = set()
        self.operands: list[tuple[Tensor, Value, Line | None]] = []
        self.products: dict[int, int] = {}

    @property
    def start(self) -> Line:
        return Line(self.code.co_filename, self.code.co_firstlineno)

    def line(self) -> Line | None:
        """The line of the step that is being run; None outside it."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        self.frame = frame or self.frame
        return None if frame is None else Line(self.code.co_filename, frame.f_lineno)

    def tile(self, leaf: Value) -> Tensor:
        """A tensor that stands for a leaf."""
        found = torch.full(SHAPE, 0.5, dtype=torch.float64, device="cpu")
        self.note(found, leaf)
        return found if leaf.gradient or leaf.op == "drawn" else found.requires_grad_()

    def note(self, t: Tensor, value: Value) -> None:
        self.tensors.append(t)
        self.values[t.untyped_storage().data_ptr()] = value

    def value(self, t: Tensor | None) -> Value:
        """The value of a recorded tensor; zero for None, a missing gradient."""
        return self.graph.number(0) if t is None else self.values[t.untyped_storage().data_ptr()]

    def knows(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.values

    def fits(self, t: Tensor) -> bool:
        """Whether a tensor is a tile, one number for each row, or a number."""
        if t.shape == SHAPE:
            return True
        return self.knows(t) and (t.dim() == 0 or (t.shape == ROW and self.value(t).row))

    def gate(self, of: str, name: str) -> int:
        if name not in self.gates:
            raise CellError(f"{of}.{name}: there is no gate {name!r}; gates= has {' '.join(self.gates)}", self.line())
        return self.gates.index(name)

    def product(self, gate: int, v: object) -> None:
        """Record U.gate(v)."""
        line, name = self.line(), self.gates[gate]
        if not isinstance(v, Tensor) or v.shape != SHAPE or not v.is_floating_point():
            shown = f"a tensor of shape {tuple(v.shape)}, {v.dtype}" if isinstance(v, Tensor) else repr(v)
            raise CellError(
                f"U.{name} takes a state, or something of a state's shape computed in the step; got {shown}", line
            )
        if not self.knows(v):
            raise captured(line)
        value = self.value(v)
        known = [n for n, (_, operand, _) in enumerate(self.operands) if operand is value]
        number = known[0] if known else len(self.operands)
        if not known:
            self.operands.append((v, value, line))
        if self.products.setdefault(gate, number) != number:
            raise CellError(
                f"U.{name} is used with two operands, and a gate has one recurrent product: name another gate in "
                "gates= for the second",
                line,
            )


class _Inputs:
    """The step's x: x.k is gate k's input product."""

    def __init__(self, run: _Run, tiles: list[Tensor]) -> None:
        self._run, self._tiles = run, tiles

    def __getattr__(self, gate: str) -> Tensor:
        number = self._run.gate("x", gate)
        self._run.read.add(number)
        return self._tiles[number]


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
_LEAVES = ("numpy", "__array__")
_CHANGES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")


class _Watch(TorchFunctionMode):
    """Intercepts each torch function of the step while its line is known, and refuses what cannot be derived."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: Keywords = None
    ) -> object:
        line, name, kwargs = self.run.line(), getattr(func, "__name__", str(func)), kwargs or {}
        if line is None:
            return func(*args, **kwargs)
        if name in _ASKS:
            raise DataDependentBranch(
                f"{name} asks for the value of a tensor, and the kernels have one path for all rows and units: choose "
                "with torch.where(condition, a, b)",
                line,
            )
        if name in _LEAVES:
            raise CellError(
                f"{name} makes a NumPy array of a tensor, of which neither autograd nor the kernels know: use torch's "
                "functions, as torch.tanh for np.tanh",
                line,
            )
        if name in _CHANGES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None:
            raise InPlaceChange(
                f"{name} changes a tensor in place: make a new one, a = a + b for a += b, torch.where for a[i] = b",
                line,
            )
        if name in over_units.FUNCTIONS:
            func = partial(over_units.FUNCTIONS[name], partial(self._mean, line))
        try:
            out = func(*args, **kwargs)
        except CellError:
            raise
        except Exception:  # it may be of another size than the tensors of the trace
            if any(isinstance(a, Tensor) and not self.run.knows(a) for a in (*args, *kwargs.values())):
                raise captured(line) from None
            raise
        if out is None:
            raise mixes_units(name, line)
        for result in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(result, Tensor):
                continue
            if not self.run.fits(result):
                raise mixes_units(name, line)
            if result.grad_fn is not None:
                result.grad_fn.register_prehook(partial(self._enter, line))
        return out

    def _enter(self, line: Line, *_: object) -> None:
        self.run.at = line

    def _mean(self, line: Line, v: Tensor) -> Tensor:
        if not self.run.knows(v):
            raise captured(line)
        found: Tensor = _Mean.apply(v, self.run)
        return found


class _Mean(torch.autograd.Function):
    """The mean over units of a tile [3, 5], as [3, 1]. Torch's own would have a number of units in its derivative."""

    @staticmethod
    def forward(ctx: object, v: Tensor, run: _Run) -> Tensor:
        value = run.graph.mean(run.value(v))
        run.note(found := v.new_zeros(ROW), value)
        return found

    @staticmethod
    def backward(ctx: object, d: Tensor) -> tuple[Tensor, None]:
        # A row's gradient is a sum over units, and each unit gets a share of it: it is recorded as its mean.
        return d.expand(SHAPE), None


class _Recorder:
    """Records the value of each operation."""

    run: _Run

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: Keywords = None
    ) -> object:
        run, line, kwargs = self.run, self.run.line(), kwargs or {}
        if func is aten._efficientzerotensor.default:
            func = aten.zeros.default  # whose result has an address
        out = func(*args, **kwargs)
        results = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        if not results:
            return out  # a number, which `_Watch` refuses
        if (
            func is aten.lift_fresh.default and isinstance(out, Tensor) and out.dim() == 0
        ):  # torch.tensor(2.0) in the step
            run.note(out, run.graph.number(float(out)))
            return out
        shapes = {t.shape for t in results}
        # Autograd itself changes a tensor in place: the result replaces its value.
        target = func if func in OPERATIONS else _functional(func)
        if target not in OPERATIONS or (line and target in BACKWARD_ONLY):
            mixed = line and shapes != {SHAPE} and spoken(func) not in _ADVICE
            raise mixes_units(spoken(func), line) if mixed else self.unknown(func, line)

        def operand(a: object) -> Any:  # a Value, or what is neither a tensor nor a number
            if isinstance(a, Tensor):
                if not run.knows(a):
                    raise captured(line or run.at)
                return run.value(a)
            return run.graph.number(a) if isinstance(a, (bool, int, float)) else a

        values = [operand(a) for a in args]
        value = OPERATIONS[target](run.graph, *values, **{k: operand(v) for k, v in kwargs.items()})
        if spoken(func) in ("maximum", "minimum"):
            run.extremes.add((values[0], values[1]))
        elif line is None and spoken(func) in COMPARISONS and tuple(values) in run.extremes:
            # The derivative depends on which of two values was larger. It has neither; one saved tile says it exactly.
            value = run.graph.compared(spoken(func), run.graph.order(*values), run.graph.number(0))
        if line and any(t.shape == SHAPE and t.is_floating_point() and t.dtype != torch.float64 for t in results):
            raise CellError(
                f"{spoken(func)} gives {results[0].dtype}, whatever the states' dtype is: of a boolean take "
                ".to(h.dtype), before it is multiplied",
                line,
            )
        if value is None:
            raise self.unknown(func, line, f" with {', '.join(repr(a) for a in args[1:] if not isinstance(a, Tensor))}")
        for t, v in zip(results, value if isinstance(value, tuple) else [value], strict=True):
            if t.shape != SHAPE and constant(v) is None and not (t.shape == ROW and v.row):
                raise mixes_units(spoken(func), line or run.at)
            run.note(t, v)
        return out

    def unknown(self, func: object, line: Line | None, how: str = "") -> UnknownOperation:
        of = "this line" if self.run.at else "the step"
        whose = "the kernels have no" if line else f"the derivative of {of} needs what the kernels do not have:"
        advice = _ADVICE.get(spoken(func)) or f"write it with what they have: {known()}"
        return UnknownOperation(
            f"{whose} {spoken(func)}{how}; {advice}",
            line or self.run.at or self.run.start,
        )


class _Record(_Recorder, TorchDispatchMode):
    # A method of this class would be wrapped so that Dynamo skips it, and importing Dynamo takes a second or two.
    def __init__(self, run: _Run) -> None:
        self.run = run
        super().__init__()


# What to do without some operations, where no other operation would help.
_ADVICE = {
    **dict.fromkeys(
        ["_softmax", "_log_softmax", "native_layer_norm", "cumsum", "cumprod", "logcumsumexp", "roll", "flip", "sort"],
        "it mixes units: a step may take U.k(v), means over the units, layer_norm and rms_norm",
    ),
    **dict.fromkeys(
        ["bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like", "normal_", "uniform_"],
        "a step draws no random numbers: name a mask, dropout=, or draw them before the call and take them as an input "
        "of each step, inputs=",
    ),
    "lift_fresh": "for a tensor that is made in the step: take a number, or a trained vector, params=, or an input of "
    "each step, inputs=",
}


def _functional(func: object) -> object:
    """The out-of-place version of an operation whose name ends in _; other operations are returned as they are."""
    _, name, overload = str(func).split(".")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    return func if packet is None else getattr(packet, overload, func)


def trace(step: FunctionType, names: Names, constants: Mapping[str, float]) -> Traced:
    """Run the step on small tensors. CellError, with the line, for what cannot be derived."""
    run = _Run(step.__code__, names.gates)
    make, first = run.graph.make, len(names.output.split())  # the output counts as a state that is never read

    def tiles(kind: str, count: int, start: int = 0) -> list[Tensor]:
        return [run.tile(make(kind, start + n)) for n in range(count)]

    G = len(names.gates)
    x, inputs, hu = tiles("gx", G), tiles("input", len(names.inputs)), tiles("hu", G)
    before, params = tiles("before", len(names.states), first), tiles("param", len(names.params))
    drawn = tiles("drawn", len(names.drawn))
    with _Record(run), _Watch(run):
        try:
            found = step(_Inputs(run, x), _Products(run, hu), *before, *params, *inputs, *drawn, *constants.values())
        except CellError:
            raise
        except Exception as error:
            raise _fails(error, run) from error
    new = _results(found, run, names)
    variables = {} if run.frame is None else dict(run.frame.f_locals)
    run.frame = None
    _check_gates(run, names)
    levels = _levels(run)

    def back(results: list[tuple[Tensor, Value]]) -> Gradients:
        """Gradients of all that the step takes, from those of results, which are leaves."""
        total = sum((t * run.tile(leaf)).sum() for t, leaf in results if t.requires_grad)
        parts = (x, inputs, hu, before, params)
        every = [t for part in parts for t in part]
        gradients: Sequence[Tensor | None] = [None] * len(every)
        if isinstance(total, Tensor):
            run.note(total, run.graph.number(0))  # whatever it is: its gradient is one
            # With create_graph, autograd makes new sums instead of changing them. Its anomaly mode is not wanted here.
            with torch.autograd.set_detect_anomaly(False), _Record(run):
                gradients = torch.autograd.grad(total, every, create_graph=True, allow_unused=True)
        values = iter([run.value(g) for g in gradients])
        return Gradients(*([next(values) for _ in part] for part in parts))

    second = [(t, make("dm", n)) for n, (t, _, _) in enumerate(run.operands) if levels[n] == 2]
    gradients = back([*((t, make("dstate", n)) for n, t in enumerate(new)), *second])
    computed = [n for n, (_, v, _) in enumerate(run.operands) if v.op != "before" and levels[n] == 1]
    finish = back([(run.operands[n][0], make("dv", n)) for n in computed])
    called = {run.value(t): n for n, t in reversed(variables.items()) if isinstance(t, Tensor) and run.knows(t)}
    operands = [v for _, v, _ in run.operands]
    values = [run.value(t) for t in new]
    return Traced(run.graph, values, run.read, operands, run.products, levels, gradients, finish, called)


def _fails(error: Exception, run: _Run) -> CellError:
    """The error for a step that does not run."""
    at, line = error.__traceback__, run.start
    while at is not None:
        if at.tb_frame.f_code is run.code:
            line = Line(run.code.co_filename, at.tb_lineno)
        at = at.tb_next
    return CellError(
        f"the step fails when it is traced, with tensors of shape {list(SHAPE)}: {type(error).__name__}: {error}; it "
        "may use x.k and U.k(v) of a gate k, its other arguments, elementwise torch functions and numbers",
        line,
    )


def _results(found: object, run: _Run, names: Names) -> list[Tensor]:
    """The states after the step, preceded by an output that is not a state."""
    values, new = list(found) if isinstance(found, (tuple, list)) else [found], list[Tensor]()
    expected = (*names.states, *names.output.split())
    frame = run.frame
    where = run.start if frame is None else Line(run.code.co_filename, frame.f_lineno)
    if len(values) != len(expected):
        what = f"the states {' '.join(names.states)}" + (f" and the output {names.output}" if names.output else "")
        raise CellError(
            f"the step gives {len(values)} value{'s' * (len(values) != 1)} for {what}: return {len(expected)}, "
            "in this order",
            where,
        )
    for name, value in zip(expected, values, strict=True):
        if not isinstance(value, Tensor):
            raise CellError(
                f"the new {name} must be a tensor, got {value!r}: for a number torch.full_like(h, 1.0)", where
            )
        if value.shape != SHAPE:
            raise mixes_units(f"the new {name}", where)
        if not value.is_floating_point():
            raise CellError(
                f"the new {name} is of {value.dtype}: choose numbers with torch.where, or .to(h.dtype)", where
            )
        if not run.knows(value):
            raise captured(where)
        new.append(value)
    return [*new[len(names.states) :], *new[: len(names.states)]]


def _check_gates(run: _Run, names: Names) -> None:
    if not run.read and not names.inputs:
        raise CellError(
            "the step reads no x.k and no per-step input: what it computes is the same at each step; add x.k", run.start
        )
    for n, gate in enumerate(run.gates):
        if n not in run.read and n not in run.products:
            raise CellError(
                f"gate {gate}: the step has neither x.{gate} nor U.{gate}; take it out of gates=, or use it", run.start
            )


def _levels(run: _Run) -> list[int]:
    """The level of each operand: 1 if it needs no recurrent product, 2 if it needs some of level 1."""
    depends = [
        {v.number for v in ancestors([operand]) if v.op == "hu"} for _, operand, _ in run.operands
    ]  # the gates whose products an operand is computed from
    levels = [2 if gates else 1 for gates in depends]
    for gates, (_, _, line) in zip(depends, run.operands, strict=True):
        for gate in gates:
            if levels[run.products[gate]] == 2:
                name = run.gates[gate]
                raise TooManyProducts(
                    f"the operand of this product is computed from U.{name}, whose own operand is computed from "
                    "another product: products may depend on each other in two levels, and this is a third. Take an "
                    "operand that needs fewer, or hand the result to the next step as a state",
                    line,
                )
    return levels

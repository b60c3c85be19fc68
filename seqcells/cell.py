"""Custom cells: one step in PyTorch, from which the fused kernels are derived.

@seqcells.cell(gates="f n", states="h")
def mgu(x, U, h):
    f = torch.sigmoid(x.f + U.f(h))
    n = torch.tanh(x.n + U.n(f * h))
    return h + f * (n - h)
"""

from __future__ import annotations

import inspect
import keyword
import math
from collections import namedtuple
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from torch.compiler import is_compiling

from . import checks
from .derive import (
    CellError,
    DataDependentBranch,
    Derived,
    MixesUnits,
    Names,
    TooManyProducts,
    UnknownOperation,
    derive,
)
from .kernels import registry

if TYPE_CHECKING:
    from .kernels.form import Form

__all__ = ["Cell", "CellError", "cell"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])
_BY_KEY: dict[str, Cell] = {}
_BY_NAME: dict[str, Cell] = {}  # the last one defined under each name
# Names that a step's arguments cannot have, and why.
_TAKEN = {
    **dict.fromkeys(("x", "U"), "the step's first two arguments are x and U"),
    **dict.fromkeys(
        ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"), "a layer's own parameters are called so"
    ),
    **dict.fromkeys(
        ("input", "state", "hx", "resets", "lengths", "return_states"), "a layer's call has an argument of that name"
    ),
}


_FACTS: list[str] = []  # the names of the _Found attributes


def constant_to_compilers(function: F) -> F:
    """Decorate a function that torch.compile calls while tracing, without tracing it, as
    torch.compiler.assume_constant_result does, which imports the compiler."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


class _Found(Generic[T]):
    """An attribute of a cell that is computed when it is first read."""

    def __init__(self, find: Callable[[Cell], T]) -> None:
        self.find, self.name, self.__doc__ = find, find.__name__, find.__doc__

    @overload
    def __get__(self, made: None, owner: object) -> _Found[T]: ...

    @overload
    def __get__(self, made: Cell, owner: object = None) -> T: ...

    def __get__(self, made: Cell | None, owner: object = None) -> _Found[T] | T:
        if made is None:
            return self
        if is_compiling():
            # Numbers are not read from the cell: if those of a second cell differ, Dynamo makes them symbolic, and
            # `0 in cell.rows` is false. But a Form returned by a constant function would lose its properties, and a
            # type could not be called.
            fact = _find(made.key, self.name)
            return made._facts[self.name][0] if self.name in ("form", "by_gate") else fact
        if not made._facts[self.name]:
            _find(made.key, self.name)
        return made._facts[self.name][0]

    def __set__(self, made: Cell, value: T) -> None:
        raise AttributeError(f"{self.name} is derived from the cell's step")


@constant_to_compilers
def _find(key: str, name: str) -> Any:  # each fact has its own type
    made = _BY_KEY[key]
    if not made._facts[name]:
        made._facts[name].append(vars(Cell)[name].find(made))
    return made._facts[name][0]


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell, as made by `cell`.

    name: its name in functions. key: its name in operators and registries; a cell that is defined again under the same
    name has a new key. gates, states, params, inputs: their names, in order. scalars: those params that are one number.
    starts: {param: number}, where a layer does not start at random. constants: {name: number}. outputs: (), or the name
    of a result that is the output in place of the first state. biased: the gates that have biases. step: the function.
    base: the cell that this one is with other constants; None if it is not. dropout: the name of the step's last
    argument, a dropout mask; "" if it has none. drawn: of a cell made by `drawn.dropped`, the names of its masks, and
    whether one is drawn once for a sequence.

    Attributes that are derived from the step (form, x_gates and the rest) are computed when they are first read. This
    raises CellError if no kernels can be derived from the step.

        >>> seqcells.cells.mgu.gates, seqcells.cells.mgu.states, seqcells.cells.mgu.saved
        (('f', 'n'), ('h',), ('f = sigmoid(x.f + U.f(h))', 'n = tanh(x.n + U.n(f * h))'))
    """

    name: str
    key: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    params: tuple[str, ...]
    scalars: tuple[str, ...]
    starts: Mapping[str, float]
    inputs: tuple[str, ...]
    constants: Mapping[str, float]
    outputs: tuple[str, ...]
    biased: tuple[str, ...]
    step: FunctionType = field(repr=False)
    base: Cell | None = field(default=None, repr=False)
    dropout: str = field(default="", repr=False)
    drawn: Mapping[str, bool] = field(default_factory=dict, repr=False)
    _variants: dict[tuple[float, ...], Cell] = field(default_factory=dict, init=False, repr=False)
    # Each, of its own type, in a list of its own, empty until it is computed: Dynamo reads no list before that.
    _facts: dict[str, list[Any]] = field(default_factory=lambda: {n: [] for n in _FACTS}, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.step.__doc__)
        object.__setattr__(self, "__module__", self.step.__module__)
        _BY_KEY[self.key] = self
        registry.register_later(self.key, lambda: self._derived.kernels())

    @cached_property
    def _derived(self) -> Derived:
        names = Names(self.gates, self.states, self.params, self.inputs, " ".join(self.outputs), dict(self.drawn))
        return derive(self.key, self.step, names, self.constants)

    @cached_property
    def _gates(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
        """x_gates, u_gates, and for each u gate the number of the state it is multiplied with (-1: not a state).

        Found by running the step once, because the derivation takes longer and may fail. If running it fails, the
        derivation is tried, for its error message.
        """
        with ThreadPoolExecutor(1) as apart:  # without the caller's transforms and modes
            found = apart.submit(_gates_read, self).result()
        if found is not None:
            return found
        parts = self._derived.parts
        return parts.x_gates, parts.u_gates, (-1,) * len(parts.u_gates)

    @_Found
    def form(self) -> Form:
        """The numbers of the kernels' inputs and outputs."""
        return self._derived.form

    @_Found
    def x_gates(self) -> tuple[str, ...]:
        """The gates that have an input product, in the order of `gates`: the rows of weight_ih."""
        return self._gates[0]

    @_Found
    def u_gates(self) -> tuple[str, ...]:
        """The gates that have a recurrent product, in the order of `gates`: the rows of weight_hh."""
        return self._gates[1]

    @_Found
    def by_gate(self) -> tuple[type, type]:
        """The types of the step's x and U: with an attribute for each gate, and traceable by torch.compile."""
        return namedtuple("x", self.x_gates), namedtuple("U", self.u_gates)  # names are the cell's

    @_Found
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Runs of neighbours among u_gates that are multiplied with the same state: (the state's number, or -1 for a
        value that the step computes; the first gate of the run; the number of gates)."""
        found: list[tuple[int, int, int]] = []
        for n, state in enumerate(self._gates[2]):
            if found and found[-1][0] == state:
                found[-1] = (state, found[-1][1], found[-1][2] + 1)
            else:
                found.append((state, n, 1))
        return tuple(found)

    @_Found
    def problem(self) -> str:
        """Why no kernels can be derived from a step that still runs on other backends; "" if they can be derived.
        CellError for a step that would give wrong results."""
        try:
            _ = self._derived
        except (UnknownOperation, DataDependentBranch, MixesUnits, TooManyProducts) as error:
            return str(error)
        return ""

    @_Found
    def operations(self) -> frozenset[str]:
        """The operations in the step and its gradients, by `derive.values`' names; empty if no kernels can be
        derived."""
        return frozenset() if self.problem else self._derived.parts.operations

    @_Found
    def order(self) -> tuple[int, ...]:
        """The kernels' product n is u_gates[order[n]]."""
        return self._derived.parts.order

    @_Found
    def rows(self) -> tuple[int, int, int, int]:
        """The number of blocks of hidden_size rows in weight_ih, weight_hh, bias_ih and bias_hh."""
        x, u = self._gates[:2]
        return len(x), len(u), sum(g in self.biased for g in x), sum(g in self.biased for g in u)

    @property
    def source(self) -> str:
        """The source of the Triton functions, see seqcells.kernels.cells."""
        return self._derived.source

    @property
    def saved(self) -> tuple[str, ...]:
        """The values that forward saves for backward at each step, in the step's own terms."""
        return self._derived.saved

    def explain(self) -> str:
        """What was derived from the step, in a few lines: gates, products, and what is saved for backward."""
        return f"{self.key}: {self._derived.explain()}"

    def with_constants(self, **constants: float) -> Cell:
        """The same cell with other constants, by name. The same numbers always return the same object."""
        base = self.base or self
        if unknown := sorted(set(constants) - set(self.constants)):
            has = f"has {', '.join(self.constants)}" if self.constants else "has none (constants= of seqcells.cell)"
            raise TypeError(f"cell {self.name!r} has no constant {unknown[0]!r}: it {has}")
        for name, value in constants.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise checks.wrong(name, "a number", value)
        values = {n: float(v) for n, v in {**self.constants, **constants}.items()}
        if values == base.constants:
            return base
        numbers = tuple(values.values())
        if numbers not in base._variants:
            key = f"{base.key}({', '.join(f'{n}={v!r}' for n, v in values.items())})"
            facts = {n: getattr(base, n) for n in base.__dataclass_fields__ if not n.startswith("_")}
            base._variants[numbers] = Cell(**{**facts, "key": key, "constants": values, "base": base})
        return base._variants[numbers]

    def __call__(self, x: object, U: object, *arguments: object) -> Any:
        """Call the step with x, U, the states before it, the params, the inputs and masks; constants are the cell's.

        Returns what the step returns."""
        return self.step(x, U, *arguments, *self.constants.values())

    def __reduce__(self) -> str | tuple[object, ...]:
        """Pickle and copy by reference, as functions are: the result is the same object."""
        return self.step.__qualname__ if self.base is None else (_with_constants, (self.base, dict(self.constants)))


_FACTS.extend(name for name, value in vars(Cell).items() if isinstance(value, _Found))


def _with_constants(base: Cell, constants: dict[str, float]) -> Cell:
    return base.with_constants(**constants)


def _gates_read(cell: Cell) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]] | None:
    count = len(cell.states) + len(cell.params) + len(cell.inputs) + len(cell.drawn)
    given = [torch.ones(1, 1) for _ in range(count)]
    states = given[: len(cell.states)]

    def product(gate: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def times(v: torch.Tensor) -> torch.Tensor:
            u.found[gate] = next((n for n, s in enumerate(states) if s is v), -1)
            return v.clone()

        return times

    x, u = _GateRecorder(cell.gates, lambda gate: torch.ones(1, 1)), _GateRecorder(cell.gates, product)
    try:
        with torch.no_grad():
            results = cell(x, u, *given)
    except Exception:
        return None
    results = results if isinstance(results, (tuple, list)) else (results,)
    whole = len(results) == len(cell.states) + len(cell.outputs) and set(cell.gates) == set(x.found) | set(u.found)
    if not whole or any(not isinstance(r, torch.Tensor) or r.shape != (1, 1) for r in results):
        return None
    u_gates = tuple(g for g in cell.gates if g in u.found)
    return tuple(g for g in cell.gates if g in x.found), u_gates, tuple(u.found[g] for g in u_gates)


class _GateRecorder:
    """x or U of a step that records which attributes are read."""

    def __init__(self, gates: tuple[str, ...], give: Callable[[str], object]) -> None:
        self.gates, self.give, self.found = gates, give, dict[str, int]()

    def __getattr__(self, name: str) -> object:
        if name not in self.gates:
            raise AttributeError(name)
        self.found[name] = -1
        return self.give(name)


def get(key: str | Cell) -> Cell:
    """The cell with that key (which stays valid when the name is defined again); a Cell is returned as it is.

    ValueError if there is none.
    """
    if isinstance(key, Cell):
        return key
    if isinstance(key, FunctionType):
        how = f"decorate {key.__name__} with @seqcells.cell(gates=..., states=...)"
        raise TypeError(f"cell must be a cell or its name, got a function: {how}")
    if not isinstance(key, str) or key not in _BY_KEY:
        checks.one_of("cell", key, _BY_NAME)
    return _BY_KEY[key]


def named(cell: str | Cell) -> Cell:
    """The cell last defined under that name, or the one with that key; a Cell is returned as it is.

    ValueError if there is none, TypeError if cell is neither a Cell nor a string.
    """
    return _BY_NAME[cell] if isinstance(cell, str) and cell in _BY_NAME else get(cell)


def keys() -> list[str]:
    """The keys of all cells, including those whose names were defined again."""
    return list(_BY_KEY)


def cell(
    *,
    gates: str,
    states: str,
    params: str = "",
    inputs: str = "",
    constants: str = "",
    outputs: str = "",
    bias: str | None = None,
    dropout: str = "",
) -> Callable[[Callable[..., object]], Cell]:
    """Decorator that makes a cell of a step written in PyTorch.

    gates: the gates' names, in the order of the weights' rows. states: the states' names; the first is the output.
    The step takes x, U and the states, by their names, and returns the states after the step: one tensor, or a tuple.
    x.k is gate k's input product, including its bias b_ih. U.k(v) is gate k's recurrent product with v, including its
    bias b_hh. v is a state, or any value of a state's shape that the step computes. It may itself depend on recurrent
    products, in at most two levels. A gate may have only one of the two products. All tensors are [B, H]. Otherwise the
    step may use elementwise torch functions and numbers, means over the units, v.mean(-1, keepdim=True), and
    torch.nn.functional's layer_norm and rms_norm over v.shape[-1:]. The values of numbers from outside the step are
    read once, when its kernels are derived.

    After the states, the step takes by their names, in this order:
    params: trained vectors with one number for each unit, [H]; "alpha:1" is one number for all units, and "gain=1"
        starts at 1 in a layer (the others are drawn at random).
    inputs: inputs of each step besides x, [B, H]; layers take them as [T, B] or [T, B, H].
    constants: numbers that a layer may set, such as "dt=0.042 gamma=2.7".
    dropout: one mask, [B, H], by which the step multiplies what a layer's candidate_dropout drops: 0 with that
    probability, else 1/(1-p), drawn anew at each step. Its default in the step must be 1, the value without dropout.

    outputs: the name of a further result, returned after the states, that is the output in place of the first state.
    bias: the names of the gates that have biases. Default: None, all gates

    Functions that take a cell also take the step's name, which means the last cell defined under that name:

        >>> @seqcells.cell(gates="f n", states="h")
        ... def mgu(x, U, h):
        ...     f = torch.sigmoid(x.f + U.f(h))
        ...     n = torch.tanh(x.n + U.n(f * h))
        ...     return h + f * (n - h)
        >>> x, w_ih, w_hh = torch.randn(5, 3, 10), torch.randn(2 * 20, 10), torch.randn(2 * 20, 20)
        >>> y, (h_n,) = seqcells.functional.scan(mgu, x, None, w_ih, w_hh)
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))

    TypeError or ValueError for wrong names or a step that does not match them. CellError, at the first use and with the
    step's line, if no kernels can be derived from the step.
    """
    gate_names, state_names = _names("gates", gates), _names("states", states)
    param_names, scalars, starts = _params(params)
    input_names, numbers = _names("inputs", inputs, none=True), _constants(constants)
    output_names = _names("outputs", outputs, none=True)
    if len(output_names) > 1:
        raise ValueError(f"outputs: a cell has one output, got {len(output_names)}: {outputs}")
    biased = gate_names if bias is None else _names("bias", bias, none=True)
    if unknown := [g for g in biased if g not in gate_names]:
        raise ValueError(f"bias= names {unknown[0]!r}, which is none of gates={gates!r}")
    mask = _names("dropout", dropout, none=True)
    if len(mask) > 1:
        raise ValueError(f"dropout: a step has one mask, got {len(mask)}: {dropout}")
    arguments = (*state_names, *param_names, *input_names, *numbers, *mask)
    for name in arguments:
        if name in _TAKEN:
            raise ValueError(f"{name!r} cannot be the name of a state, param, input, constant or mask: {_TAKEN[name]}")
        if arguments.count(name) > 1:
            raise ValueError(f"{name!r} is named twice among states, params, inputs, constants and dropout")
    if output_names and output_names[0] in state_names:
        raise ValueError(f"outputs: {outputs!r} is a state; to output it put it first in states=, or give a new name")

    def make(step: Callable[..., object]) -> Cell:
        if not isinstance(step, FunctionType):
            raise checks.wrong("step", "a function", step)
        name = step.__name__
        own = name in registry.BUILT_IN and not step.__module__.startswith("seqcells.")
        if own or not name.isidentifier():
            reason = "is a cell of seqcells itself" if own else "is no name"
            raise ValueError(f"the step's name is the cell's, and {name!r} {reason}: give it another")
        taken = list(inspect.signature(step).parameters.values())
        plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in taken)
        if not plain or tuple(p.name for p in taken)[2:] != arguments or len(taken) < 2:
            expected = f"{name}({', '.join(('x', 'U', *arguments))})"
            raise TypeError(
                "the step must take x, U, the states, and then params, inputs, constants and the dropout mask: "
                f"{expected}, got {name}{inspect.signature(step)}"
            )
        if mask and taken[-1].default != 1:
            raise TypeError(f"the dropout mask {mask[0]} of {name} must have the default 1: {mask[0]}=1")
        keys = (name, *(f"{name}#{n}" for n in range(2, len(_BY_KEY) + 2)))
        key = next(k for k in keys if k not in _BY_KEY)
        facts = (gate_names, state_names, param_names, scalars, starts, input_names, numbers, output_names, biased)
        _BY_NAME[name] = Cell(name, key, *facts, step, dropout=dropout)
        return _BY_NAME[name]

    return make


def _names(argument: str, value: str, none: bool = False) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise checks.wrong(argument, "a string of names, as 'f n'", value)
    names = tuple(value.split())
    wrong = [n for n in names if not n.isidentifier() or n.startswith("_") or keyword.iskeyword(n)]
    if not (names or none) or wrong or len(set(names)) < len(names):
        problem = "no name" if not names else f"{wrong[0]!r} is no name" if wrong else "a name occurs twice"
        raise ValueError(f"{argument} must be different names, separated by spaces; in {value!r} {problem}")
    return names


def _params(value: str) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, float]]:
    """The names of all params, those that are one number, and the numbers that some start at."""
    if not isinstance(value, str):
        raise checks.wrong("params", "a string of names, as 'p q=1 alpha:1'", value)
    names, scalars, starts = list[str](), list[str](), dict[str, float]()
    for part in value.split():
        sized, equals, start = part.partition("=")
        name, colon, size = sized.partition(":")
        if colon and size != "1":
            raise ValueError(f"params: {sized} is neither {name}, one number a unit, nor {name}:1, one for all units")
        if equals:
            starts[name] = _number(start)
            if not math.isfinite(starts[name]):
                raise ValueError(f"params: {part} does not say a number that {name} starts at, as {name}=1 does")
        names.append(name)
        scalars += [name] if colon else []
    return _names("params", " ".join(names), none=True), tuple(scalars), starts


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _constants(value: str) -> dict[str, float]:
    if not isinstance(value, str):
        raise checks.wrong("constants", "a string of names and numbers, as 'dt=0.042'", value)
    found: dict[str, float] = {}
    for part in value.split():
        name, equals, number = part.partition("=")
        found[name] = _number(number)
        if not equals or not math.isfinite(found[name]):
            raise ValueError(
                f"constants must be names with numbers, as 'dt=0.042 gamma=2.7'; in {value!r} {part!r} is none"
            )
    if len(found) < len(value.split()):
        raise ValueError(f"constants must be different names; in {value!r} a name occurs twice")
    _names("constants", " ".join(found), none=True)
    return found

"""A cell of one's own: one step in PyTorch, from which the fused kernels are derived.

@seqcells.cell(gates="f n", states="h")
def mgu(x, U, h):
    f = torch.sigmoid(x.f + U.f(h))
    n = torch.tanh(x.n + U.n(f * h))
    return h + f * (n - h)
"""

from __future__ import annotations

import inspect
import keyword
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from . import checks, fallback, reference
from .derive import CellError, Derived, derive, kernels_of
from .kernels import registry
from .kernels.form import Form

__all__ = ["Cell", "CellError", "cell"]

_BUILT_IN = tuple(reference.CELLS)


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell as its author wrote it; `cell` makes one.

    name: what functions know it by. gates, states: their names, in order. step: the function. The kernels are derived
    when they, or what is said here about them, are first wanted; that raises CellError for a step that they cannot be
    derived from.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: FunctionType = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.step.__doc__)

    @cached_property
    def _derived(self) -> Derived:
        return derive(self.step, self.gates, self.states)

    @property
    def source(self) -> str:
        """The Triton functions: forward and backward; and, of a cell with a second product, middle and backward_middle.
        seqcells.kernels.cells says what they take and give."""
        return self._derived.source

    @property
    def saved(self) -> tuple[str, ...]:
        """What a step forward saves for backward, in the step's words."""
        return self._derived.saved

    def explain(self) -> str:
        """What was found in the step: gates and products, and what is saved for backward; a few lines."""
        return f"{self.name}: {self._derived.explain()}"

    def __call__(self, *arguments: Any) -> Any:
        """The step itself: x, U, and the states before."""
        return self.step(*arguments)


def cell(*, gates: str, states: str) -> Callable[[Callable[..., Any]], Cell]:
    """Make a cell of a step written in PyTorch: a decorator.

    gates: the gates' names, in the order of the weights' rows. states: the states' names; the first is the output.
    The step takes x, U and the states, by their names, and returns the states after it: one tensor, or a tuple.
    x.k is gate k's input product, with its bias b_ih. U.k(v) is its recurrent product with v, with its bias b_hh; v is
    the first state, or one other thing that the step computes. Everything is [B, H]. The rest is torch functions of one
    value for each row and unit, and numbers. Numbers from outside the step are taken when its kernels are derived.

    The cell is known by the step's name to everything that takes one, until a cell of the same name takes its place:

        >>> @seqcells.cell(gates="f n", states="h")
        ... def mgu(x, U, h):
        ...     f = torch.sigmoid(x.f + U.f(h))
        ...     n = torch.tanh(x.n + U.n(f * h))
        ...     return h + f * (n - h)
        >>> x, w_ih, w_hh = torch.randn(5, 3, 10), torch.randn(2 * 20, 10), torch.randn(2 * 20, 20)
        >>> y, (h_n,) = seqcells.functional.scan("mgu", x, None, w_ih, w_hh)
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))

    Backends: reference, which is the step itself and differentiated by autograd, and triton, whose kernels are derived
    from it at their first launch; "auto" is triton on CUDA and reference on the CPU.

    TypeError or ValueError for names, or a step, that do not fit. CellError, at the first launch and with the line, for
    a step that no kernels can be derived from.
    """
    gate_names, state_names = _names("gates", gates), _names("states", states)
    if len(state_names) > 2:
        raise ValueError(f"states: a cell has one or two, got {len(state_names)}: {states}")

    def make(step: Callable[..., Any]) -> Cell:
        if not isinstance(step, FunctionType):
            raise checks.wrong("step", "a function", step)
        name = step.__name__
        if name in _BUILT_IN or not name.isidentifier():
            reason = "is a cell of seqcells itself" if name in _BUILT_IN else "is no name"
            raise ValueError(f"the step's name is the cell's, and {name!r} {reason}: give it another")
        taken = list(inspect.signature(step).parameters.values())
        plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in taken)
        if not plain or tuple(p.name for p in taken)[2:] != state_names or len(taken) < 3:
            expected = f"{name}(x, U, {', '.join(state_names)})"
            raise TypeError(f"the step must take x, U and the states: {expected}, got {name}{inspect.signature(step)}")
        made = Cell(name, gate_names, state_names, step)
        fallback.forget(name)
        reference.CELLS[name] = _Specification(made)
        registry.register_later(name, lambda: kernels_of(name, made._derived))
        return made

    return make


def _names(argument: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise checks.wrong(argument, "a string of names, as 'f n'", value)
    names = tuple(value.split())
    wrong = [n for n in names if not n.isidentifier() or n.startswith("_") or keyword.iskeyword(n)]
    if not names or wrong or len(set(names)) < len(names):
        problem = "no name" if not names else f"{wrong[0]!r} is no name" if wrong else "a name occurs twice"
        raise ValueError(f"{argument} must be different names, separated by spaces; in {value!r} {problem}")
    return names


class _Specification(reference.Cell):
    """A cell as `reference` has it; what only the step's derivation tells, when it is asked for."""

    made: Cell

    def __init__(self, made: Cell) -> None:
        for name, value in (("key", made.name), ("step", _step(made)), ("gates", made.gates), ("states", made.states)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "made", made)

    @property
    def form(self) -> Form:
        found = self.made._derived
        sizes = len(self.gates), len(self.states), len(found.saved)
        return reference._form(self.key, *sizes, found.inner, found.first)


def _step(made: Cell) -> reference.Step:
    """The step on weights instead of products, as `reference` calls it."""

    by_gate: Any = namedtuple("by_gate", made.gates)  # type: ignore[misc]  # x.k and U.k, which torch.compile follows

    def step(
        x: Tensor, states: tuple[Tensor, ...], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
    ) -> tuple[Tensor, ...]:
        G = len(made.gates)
        u, biases = w_hh.chunk(G), [None] * G if b_hh is None else b_hh.chunk(G)

        products = (partial(linear, weight=w, bias=b) for w, b in zip(u, biases, strict=True))
        found = made.step(by_gate(*linear(x, w_ih, b_ih).chunk(G, -1)), by_gate(*products), *states)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    step.rows = (len(made.gates),) * 4  # type: ignore[attr-defined]
    return step

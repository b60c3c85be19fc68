"""A cell's kernels, derived from its step.

    errors    what can be wrong with a step
    trace     the step, run once: forward and backward in one graph
    values    that graph: equal values once, gradients as products and sums
    cut       what forward saves for backward
    emit      the values as Triton source

Read in that order, and `derive` here last. What comes out is what `kernels.cells` describes, as if it had been written
by hand: pointwise functions, and a declaration of what they are for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from . import emit
from .cut import smallest
from .errors import (
    CapturedTensor,
    CellError,
    DataDependentBranch,
    InPlaceChange,
    MixesUnits,
    NotYet,
    TooManyProducts,
    UnknownOperation,
)
from .trace import Traced, trace
from .values import LEAVES, Value, ancestors, share

__all__ = [
    "CapturedTensor",
    "CellError",
    "DataDependentBranch",
    "Derived",
    "InPlaceChange",
    "MixesUnits",
    "NotYet",
    "TooManyProducts",
    "UnknownOperation",
    "derive",
    "kernels_of",
]


@dataclass(frozen=True)
class Derived:
    """What was found in a step.

    saved: what forward saves for backward, a line each. uses: what each is for. inner, first: as in
    `kernels.cells.Cell`. operand: of the second product, in words. source: the Triton functions.
    """

    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    uses: tuple[str, ...]
    inner: int
    first: int | None
    operand: str
    source: str

    def explain(self) -> str:
        """A few plain lines."""
        split = len(self.gates) if self.first is None else self.first
        lines = [
            f"gates {' '.join(self.gates)}; states {' '.join(self.states)}, of which {self.states[0]} is the output"
        ]
        lines.append(f"product with {self.states[0]}: {' '.join(self.gates[:split])}")
        if self.inner:
            lines.append(
                f"  used for more than adding to the input's: {' '.join(self.gates[-self.inner :])} "
                "(gradients of both are kept apart)"
            )
        if split < len(self.gates):
            lines.append(f"second product, with {self.operand}: {' '.join(self.gates[split:])}")
        count = len(self.saved)
        why = "the fewest from which, with the states before and after it, backward follows"
        lines.append(f"saved for backward, {count} tile{'s' * (count != 1)} a step: " + (why if count else "nothing"))
        lines += [f"  {s}: for the gradients of {use}" for s, use in zip(self.saved, self.uses, strict=True)]
        return "\n".join(lines)


def derive(step: Callable[..., Any], gates: tuple[str, ...], states: tuple[str, ...]) -> Derived:
    """Derive the kernels of a step. Takes about a tenth of a second. CellError for what cannot be derived.

    In a thread of its own: what the caller is in the middle of (a transform, a mode, autocast) stays out of it.
    """
    with _LOCK, ThreadPoolExecutor(1) as apart:
        return apart.submit(_derive, step, gates, states).result()


_LOCK = threading.Lock()
_STEPS = 1000  # for which `_check_padding` follows the states


def kernels_of(name: str, derived: Derived) -> Any:
    """The `kernels.cells.Cell`. Imports triton."""
    from ..kernels.cells import Cell

    made = emit.functions(derived.source, name)
    sizes = {"gates": len(derived.gates), "states": len(derived.states), "saved": len(derived.saved)}
    return Cell(name, **sizes, inner=derived.inner, first=derived.first, **made)


def _derive(step: Callable[..., Any], gates: tuple[str, ...], states: tuple[str, ...]) -> Derived:
    found = trace(step, gates, states)
    inner, first = _shape(found, gates)
    _check_padding(step, gates, states)
    G, split = len(gates), len(gates) if first is None else first
    gradients = share(found.graph, [*found.dgx, *found.dhu, *found.dbefore])
    dgx, dhu, dbefore = gradients[:G], gradients[G : 2 * G], gradients[2 * G :]
    middle = [] if found.operand is None else [found.operand]

    before = [found.graph.make("before", n) for n in range(len(states))]
    free = [*before, *found.new]
    used = {v for value in ancestors(gradients, free) if value.gradient for v in value.inputs if not v.gradient}
    saved = smallest([*sorted(used, key=lambda v: v.index), *middle], free)
    saved.sort(key=lambda v: (v.op in LEAVES, v.index))

    leaf = found.graph.make
    there = {leaf(kind, n): f"{kind}[{n}]" for kind in ("gx", "hu") for n in range(G)}
    there |= {v: f"states[{n}]" for n, v in enumerate(before)}
    back = {leaf("dstate", n): f"dstates[{n}]" for n in range(len(states))} | {leaf("dm", 0): "dm"}
    back |= {v: f"states[{n}]" for n, v in enumerate(found.new) if v.op != "constant"}
    back |= {v: f"states_prev[{n}]" for n, v in enumerate(before)}
    names = {v: n for v, n in found.names.items() if v.inputs}
    named = dict(names)
    for gate, dx, du in zip(gates, dgx, dhu, strict=True):
        named.setdefault(dx, f"d_{gate}")
        named.setdefault(du, f"d_{gate}_product")

    def function(head: str, leaves: dict[Value, str], *results: list[Value] | Value) -> str:
        made = emit.Function(f"def {head}, FAST: tl.constexpr):", leaves, named if leaves is back else names)
        if saved and leaves is back:
            made.unpack(saved, "saved")
        made.give(*results)
        return made.source()

    texts = [function("forward(gx, hu, states", there, found.new, saved)]
    texts.append(function("backward(dstates, dm, saved, states_prev, states", back, dgx, dhu, dbefore))
    if found.operand is not None:
        texts.append(function("middle(gx, hu, states", there, found.operand))
        head = "backward_middle(dstates, saved, states_prev, states"
        texts.append(function(head, back, dhu[split:], found.operand))

    words = {leaf("gx", n): f"x.{gate}" for n, gate in enumerate(gates)}
    words |= {leaf("hu", n): f"U.{gate}({states[0]})" for n, gate in enumerate(gates) if not found.second[n]}
    words |= dict(zip(before, states, strict=True))
    operand = "" if found.operand is None else _described(found.operand, words, names)
    words |= {leaf("hu", n): f"U.{gate}({operand})" for n, gate in enumerate(gates) if found.second[n]}
    shown = tuple(_described(v, words, names) for v in saved)
    outputs = [(f"gate {g}", {dx, du}) for g, dx, du in zip(gates, dgx, dhu, strict=True)]
    outputs += [(s, {d}) for s, d in zip(states, dbefore, strict=True)]
    outputs += [(f"U.{g}'s weight", set(middle)) for n, g in enumerate(gates) if found.second[n]]
    reached = [(name, set(ancestors(values, [*saved, *free]))) for name, values in outputs]
    uses = tuple(", ".join(name for name, values in reached if v in values) for v in saved)
    return Derived(gates, states, shown, uses, inner, first, operand, "\n\n".join(texts))


def _described(value: Value, words: dict[Value, str], names: dict[Value, str]) -> str:
    """A value in the step's words."""
    text = emit.Function("", words | {v: n for v, n in names.items() if v is not value}, {}).text(value)
    text = text.replace(", FAST)", ")").replace("tl.", "")
    return f"{names[value]} = {text}" if value in names else text


def _shape(found: Traced, gates: tuple[str, ...]) -> tuple[int, int | None]:
    """inner and first, as `kernels.cells.Cell` has them. NotYet for a cell that does not fit that contract."""
    for n, gate in enumerate(gates):
        if n not in found.second:
            raise NotYet(f"gate {gate} has no recurrent product, U.{gate}: today's kernels form one for every gate")
        if found.dgx[n].op == "constant":
            raise NotYet(
                f"x.{gate} is not used, or has no gradient: today's kernels form an input product for every gate"
            )
        if found.dhu[n].op == "constant":
            raise NotYet(f"U.{gate} has no gradient: today's kernels want one of every gate's product")
    seconds = [n for n in range(len(gates)) if found.second[n]]
    first = None
    if seconds:
        first = seconds[0]
        if first == 0 or seconds != list(range(first, len(gates))):
            late = " ".join(gates[n] for n in seconds)
            if len(seconds) == len(gates):
                raise NotYet("no gate's product is with h: today's kernels want one")
            raise NotYet(f"gates of the second product must be the last ones: put {late} at the end of gates=")
    apart = [n for n in range(len(gates)) if found.dgx[n] is not found.dhu[n]]
    if apart and seconds:
        raise NotYet(
            f"a second product, and gate {gates[apart[0]]} whose U.{gates[apart[0]]} does more than add to "
            f"x.{gates[apart[0]]}: today's kernels have one of both"
        )
    return (len(gates) - apart[0] if apart else 0), first


def _check_padding(step: Callable[..., Any], gates: tuple[str, ...], states: tuple[str, ...]) -> None:
    """A tile's units beyond H are computed too, from zeros, and what they give is multiplied by zero: raise if it is
    not finite, or grows without end, because the product with it is then NaN for every unit."""
    zero = torch.zeros(1, 1, dtype=torch.float64)

    def run(gx: torch.Tensor, hu: torch.Tensor, *before: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = SimpleNamespace(**dict.fromkeys(gates, gx))
        U = SimpleNamespace(**dict.fromkeys(gates, lambda v: hu + 0 * v))
        found = step(x, U, *before)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    leaves = [zero.clone().requires_grad_() for _ in range(2 + len(states))]
    now = run(*leaves)
    slopes = torch.autograd.grad(torch.stack(now).sum(), leaves, allow_unused=True)
    with torch.no_grad():
        for _ in range(_STEPS):
            now = run(zero, zero, *now)
    most = torch.finfo(torch.float32).max
    if not all(bool((t.abs() < most).all()) for t in (*now, *slopes) if t is not None):
        raise NotYet(
            "where x, U and the first states are all zero the step or its derivative is not finite, as a / b with b "
            f"zero, or its states grow beyond float32's numbers in {_STEPS} steps: today's kernels compute a tile's "
            "unused units from zeros, and would spread that. For a / b, add a small number to b"
        )

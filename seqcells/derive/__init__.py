"""A cell's kernels, derived from its step.

    errors       the errors for steps that cannot be derived
    operations   the operations that a step may use
    over_units   means over units, and norms
    trace        runs the step once: forward and backward in one graph
    values       that graph: equal values once, gradients as products and sums
    cut          selects what forward saves for backward
    parts        the result, in the order of the kernels
    emit         prints the values as Triton source

Read them in that order, and `derive` in this file last. The result is what `kernels.cells` describes: pointwise
functions, and the form that describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import FunctionType
from typing import TYPE_CHECKING

from ..kernels.form import FUNCTIONS, Form
from . import emit
from .errors import (
    CapturedTensor,
    CellError,
    DataDependentBranch,
    InPlaceChange,
    MixesUnits,
    TooManyProducts,
    UnknownOperation,
)
from .parts import Parts, arrange
from .trace import Names, trace
from .values import Value, ancestors

if TYPE_CHECKING:
    from ..kernels.cells import Cell

__all__ = [
    "CapturedTensor",
    "CellError",
    "DataDependentBranch",
    "Derived",
    "InPlaceChange",
    "MixesUnits",
    "Names",
    "TooManyProducts",
    "UnknownOperation",
    "derive",
]


@dataclass(frozen=True)
class Derived:
    """The kernels derived from a step; `parts` contains them as values."""

    parts: Parts

    @cached_property
    def _emitted(self) -> tuple[str, dict[str, tuple[int, ...]]]:
        return emit.triton_source(self.parts)

    @property
    def source(self) -> str:
        """The Triton functions."""
        return self._emitted[0]

    @cached_property
    def form(self) -> Form:
        """The form of the cell, with the means that its functions take."""
        if "mean" not in self.parts.operations:
            return self.parts.form
        return replace(self.parts.form, means=tuple(self._emitted[1].get(name, ()) for name in FUNCTIONS))

    def kernels(self) -> Cell:
        """The kernels' functions and their form. Imports triton."""
        from ..kernels.cells import Cell

        form = self.form
        facts = {f.name: getattr(form, f.name) for f in fields(form) if f.init}
        return Cell(**facts, **emit.triton_functions(self.source, form.name))

    @cached_property
    def saved(self) -> tuple[str, ...]:
        """What forward saves for backward, in the step's own terms."""
        words = self._words
        return tuple(self._described(v, words) for v in self.parts.saved)

    def explain(self) -> str:
        """A description in a few lines."""
        parts, form, words = self.parts, self.parts.form, self._words
        names = parts.names
        output = names.output or names.states[0]
        lines = [f"gates {' '.join(names.gates)}; states {' '.join(names.states)}; the output is {output}"]
        for what, found in (
            ("trained vectors", names.params),
            ("per-step inputs", names.inputs),
            ("masks", names.drawn),
        ):
            if found:
                lines.append(f"{what} {' '.join(found)}")
        for what, having in (("recurrent", parts.u_gates), ("input", parts.x_gates)):
            without = [g for g in names.gates if g not in having]
            if without:
                lines.append(f"without {what} product: {' '.join(without)}")
        start = 0
        for operand, value in zip(form.operands, parts.operands, strict=True):
            gates = parts.products[start : start + operand.products]
            again = "" if operand.level == 1 else ", after the others"
            lines.append(f"product with {self._described(value, words)}{again}: {' '.join(gates)}")
            start += operand.products
        if apart := [parts.products[n] for n in form.apart]:
            lines.append(
                f"used for more than adding to an input's: {' '.join(apart)} (gradients of both are kept apart)"
            )
        count = len(parts.saved)
        why = "the fewest from which, with the states before and after it, backward follows"
        lines.append(f"saved for backward, {count} tile{'s' * (count != 1)} a step: " + (why if count else "nothing"))
        lines += [
            f"  {s}: for the gradients of {', '.join(use)}" for s, use in zip(self.saved, self._uses, strict=True)
        ]
        return "\n".join(lines)

    @property
    def _words(self) -> dict[Value, str]:
        """The leaves' names in the step."""
        parts = self.parts
        tiles = [*(f"x.{g}" for g in parts.x_gates), *parts.names.inputs]
        words = dict(zip(parts.gx, tiles, strict=True))
        words |= dict(zip(parts.before, parts.states, strict=True))
        words |= dict(zip(parts.params, parts.names.params, strict=True))
        words |= dict(zip(parts.drawn, parts.names.drawn, strict=True))
        for n, (value, gate) in enumerate(zip(parts.hu, parts.products, strict=True)):
            words[value] = f"U.{gate}({self._described(parts.operands[parts.of_product[n]], words, short=True)})"
        return words

    def _described(self, value: Value, words: dict[Value, str], short: bool = False) -> str:
        """A value in the step's own terms. short: by its name, if it has one."""
        called = self.parts.called
        if short and value in called:
            return called[value]
        if value in self.parts.graph.orders:
            a, b = (self._described(v, words, short=True) for v in self.parts.graph.orders[value])
            return f"which is larger, {a} or {b}"
        text = emit.Function("", words | {v: n for v, n in called.items() if v is not value}, {}, "h").text(value)
        text = text.replace(", FAST)", ")").replace("tl.", "")
        return f"{called[value]} = {text}" if value in called else text

    @property
    def _uses(self) -> list[list[str]]:
        """For each saved tile, which gradients need it."""
        parts = self.parts
        totals = parts.totals
        outputs: dict[str, list[Value]] = {}
        for tile, dx in zip(parts.tiles, totals.dgx, strict=True):
            kind = "gate" if tile in parts.x_gates else "input"
            outputs.setdefault(f"{kind} {tile}", []).append(dx)
        for gate, du in zip(parts.products, parts.dhu, strict=True):
            outputs.setdefault(f"gate {gate}", []).append(du)
        for name, value in zip((*parts.states, *parts.names.params), (*totals.dbefore, *totals.dparams), strict=True):
            outputs.setdefault(name, []).append(value)
        for n, gate in enumerate(parts.products):
            if parts.form.operands[parts.of_product[n]].state is None:
                outputs[f"U.{gate}'s weight"] = [parts.operands[parts.of_product[n]]]
        stop = [*parts.saved, *parts.free]
        reached = [(name, set(ancestors(values, stop))) for name, values in outputs.items()]
        return [[name for name, values in reached if v in values] for v in parts.saved]


def derive(name: str, step: FunctionType, names: Names, constants: Mapping[str, float]) -> Derived:
    """Derive a step's kernels, which takes some hundredths of a second. CellError if that is not possible.

    Runs in a thread of its own, so that the caller's transforms, modes and autocast have no effect.
    """
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(lambda: Derived(arrange(name, names, trace(step, names, constants)))).result()

"""Cells: what one time step computes for one hidden unit, forward and backward.

A cell is a form (`kernels.form`) and pointwise ``@triton.jit`` functions on tuples of tiles [units, rows], in the
accumulation type. They are derived from a step in PyTorch (`seqcells.cell`); written by hand they may be registered in
place of those. Every schedule (`resident`, `grid`, `stepwise`), dtype, mask and save mode then works for the cell.

``operands_1(gx, states, params, FAST) -> operands``
    All operands of level 1, also those that are a state. None where the form is not published: there is no operand, or
    only the first state, and the schedules take it themselves.
``operands_2(gx, hu, states, params, FAST) -> operands``
    The operands of level 2. hu: the products of level 1. None where there is no level 2.
``forward(gx, hu, states, params, FAST) -> (new_states, saved)``
    gx: G tiles, the input products with the biases that only add, and the per-step inputs. hu: all products; those that
    are apart include their b_hh. states: before the step, zero where it is reset. saved: tiles for backward.
    params: the trained vectors, as tiles [units, 1], then the dropout masks; the last is what `exchange.means`
    takes.
``backward_2(dstates, saved, before, after, params, FAST) -> (dhu, operands)``
    The gradients of the products of level 2, and the operands of level 2 again. None where there is no level 2.
    dstates: gradients of the states after the step. before, after: the states.
``backward(dstates, dm, saved, before, after, params, FAST) -> (dgx, dhu, dbefore, dparams, operands)``
    dm: gradients of the operands of level 2. dgx: gradients of gx, the late tiles' still without what comes through the
    operands of level 1. dhu: gradients of all products. dbefore: what reaches the states before the step without
    passing through U; the schedule adds what reaches a state that is itself an operand. dparams: tiles [units, rows],
    which the schedule sums over rows. operands: those of level 1 that are computed, again.
``finish(dgx, dbefore, dparams, dv, saved, before, after, params, FAST) -> (dgx, dbefore, dparams)``
    With what comes through the operands of level 1 that are computed, whose gradients are dv. None where there is none.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from .form import Form
from .registry import get, names, register


@dataclass(frozen=True, eq=False)
class Cell(Form):
    """A form with its functions (see the module). Each equals itself alone: what is cached by cell is found at once."""

    _: KW_ONLY
    forward: object
    backward: object
    operands_1: object = None
    operands_2: object = None
    backward_2: object = None
    finish: object = None
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self.problems()
        two = self.level < len(self.operands)
        for name, wanted in (
            ("operands_1", self.published),
            ("operands_2", two),
            ("backward_2", two),
            ("finish", self.finishes),
        ):
            if (getattr(self, name) is not None) != wanted:
                problems.append(f"{name} {'is missing' if wanted else 'is not asked for'}")
        if problems:
            raise ValueError(f"cell {self.name!r}: {'; '.join(problems)}")


__all__ = ["Cell", "get", "names", "register"]

"""Checks of the arguments of `reference`'s functions."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import arguments, checks
from .cell import Cell

NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")
States = tuple[Tensor, ...]
Step = Callable[..., States]


def explained(cell: Cell, step: Step, doc: str) -> Step:
    """A cell's step by itself. If it fails, the error says which argument is wrong.

    To check before each step would take as long as a small step.
    """

    def call(
        x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> States:
        try:
            return step(x, states, w_ih, w_hh, b_ih, b_hh)
        except checks.FAILURES as error:
            raise checks.clearer(error, _step, cell, x, states, w_ih, w_hh, b_ih, b_hh) from None

    call.__name__ = call.__qualname__ = f"{cell.key}_cell"
    call.__module__, call.__doc__ = step.__module__, doc
    vars(call).update(vars(step))
    return call


def _step(cell: Cell, x: Any, states: Any, *weights: Any) -> None:
    count = len(cell.states)
    checks.tensors("states", states, f"a tuple of {count} tensor{'s' * (count > 1)}", count)
    arguments.types(x, None, dict(zip(NAMES, weights, strict=True)), rank=None)
    if x.dim() not in (1, 2):
        raise RuntimeError(f"x must have 1 or 2 dimensions, got {x.dim()}")
    if x.dim() == 1:
        x, states = x[None], [s[None] for s in states]
    arguments.fit(x[None], states, [weights], cell.rows)


def _types(step: Any, x: Any, states: Any, weights: Sequence[Any], rank: int | None) -> None:
    if not callable(step) or isinstance(step, (type, types.BuiltinFunctionType)):
        raise checks.wrong("step", "a function", step)
    missing = [name for name, n in zip(NAMES, _rows(step, weights), strict=True) if not n]
    arguments.types(x, None, dict(zip(NAMES, weights, strict=True)), rank, missing)
    checks.tensors("states", states, "a tuple of tensors")


def _rows(step: Any, weights: Sequence[Any]) -> tuple[int, ...]:
    """How many blocks of H rows each weight has: the step's `rows`, or, where it has none, as many as w_hh has."""
    if (known := getattr(step, "rows", None)) is not None:
        return known
    w_hh = weights[1]
    H = w_hh.shape[-1] if isinstance(w_hh, Tensor) and w_hh.dim() else 0
    return (w_hh.shape[0] // H if H else 1,) * 4


def scan(step: Any, x: Any, states: Any, weights: Sequence[Any], params: Any, inputs: Any, reverse: Any) -> None:
    """Those of reference.scan_states, but for resets and lengths."""
    _types(step, x, states, weights, rank=3)
    checks.boolean("reverse", reverse)
    arguments.fit(x, states, [weights], _rows(step, weights))
    shape, H = x.shape[:2], states[0].shape[-1]
    for name, given, expected in (("params", params, (H,)), ("inputs", inputs, (*shape, H))):
        checks.tensors(name, given, "a tuple of tensors")
        for i, t in enumerate(given):
            if t.shape != expected and (name != "params" or t.shape != (1,)):
                raise RuntimeError(f"{name}[{i}] must have shape {tuple(expected)}, got {tuple(t.shape)}")


def groups(step: Any, x: Any, states: Any, weights: Sequence[Any], reversed: Any) -> None:
    """Those of reference.scan_groups that each group's scan does not check."""
    _types(step, x, states, weights, rank=None)
    checks.integer("reversed", reversed, least=0)
    name, of = ("w_ih", weights[0]) if weights[1] is None else ("w_hh", weights[1])
    if of.dim() not in (2, 3):
        raise RuntimeError(f"{name} must have 2 or 3 dimensions, got {of.dim()}")
    K, H = of.shape[0] if of.dim() == 3 else 1, states[0].shape[-1] if states else 0
    for other, t in zip(NAMES, weights, strict=True):
        rank = of.dim() - other.startswith("b_")
        if t is not None and (t.dim() != rank or (of.dim() == 3 and t.shape[0] != K)):
            raise RuntimeError(f"{other} must have {rank} dimensions, as {name} has {of.dim()}, got {list(t.shape)}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != K):
        raise RuntimeError(f"x must have shape (T, B, I) or (T, B, {K}, I), got {tuple(x.shape)}")
    expected = (K, x.shape[1], H)
    for i, s in enumerate(states):
        if s.shape != expected and (K > 1 or s.shape != expected[1:]):
            raise RuntimeError(f"states[{i}] must have shape {expected}, got {tuple(s.shape)}")

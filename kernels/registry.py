"""Cells by name: a declaration, or a function that makes it when it is first needed.

Does not import triton, so a cell with derived kernels can be registered without it; nothing is derived before it is
needed. Other modules use it through `kernels.cells`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cells import Cell

BUILT_IN = ("lstm", "gru", "gru_before", "rnn_tanh", "rnn_relu")  # names that layers of seqcells rely on
REGISTERED: dict[str, Cell] = {}
_LATER: dict[str, Callable[[], Cell]] = {}


def register(cell: Cell) -> Cell:
    """Register a cell by its name, replacing one of that name. Returns it."""
    _LATER.pop(cell.name, None)
    REGISTERED[cell.name] = cell
    return cell


def register_later(name: str, make: Callable[[], Cell]) -> None:
    """Register a cell whose declaration make() returns when it is first needed, replacing one of that name."""
    REGISTERED.pop(name, None)
    _LATER[name] = make


def get(name: str) -> Cell:
    """The cell of that name. ValueError if there is none."""
    if name in _LATER:
        register(_LATER[name]())
    if name not in REGISTERED:
        raise ValueError(f"unknown cell {name!r}: expected one of {', '.join(sorted(names()))}")
    return REGISTERED[name]


def names() -> list[str]:
    return [*REGISTERED, *_LATER]

"""What can be wrong with a cell's step: each with the line of the step that it is about, and what to write instead."""

from __future__ import annotations

import linecache
from typing import NamedTuple


class Line(NamedTuple):
    """A line of the step as its author wrote it."""

    file: str
    number: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.number).strip()
        return f"{self.file}:{self.number}" + (f": {text}" if text else "")


class CellError(ValueError):
    """A step that no kernels can be derived from. what: what is wrong, and what to write instead. line: where in the
    step, if that is known."""

    def __init__(self, what: str, line: Line | None = None) -> None:
        self.line = line
        super().__init__(what + (f"\n  {line}" if line else ""))


class UnknownOperation(CellError):
    """An operation, or its derivative, that the kernels have no counterpart of."""


class DataDependentBranch(CellError):
    """Python asks for the value of a tensor: the kernels have one path for all units."""


class InPlaceChange(CellError):
    """A tensor is changed instead of a new one being made."""


class MixesUnits(CellError):
    """A result that is not one value for each row and unit: a sum over units, a transpose, a slice."""


class TooManyProducts(CellError):
    """A recurrent product whose operand needs two others, one after the other."""


class CapturedTensor(CellError):
    """A tensor from outside the step."""

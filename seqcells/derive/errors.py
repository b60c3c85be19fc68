"""The errors for a cell's step: each names the line of the step and says what to write instead."""

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
    """No kernels can be derived from a step. what: what is wrong, and what to write instead. line: the line of the
    step; None if it is not known.

        >>> @seqcells.cell(gates="n", states="h")
        ... def sorts(x, U, h):
        ...     return torch.sort(x.n + U.n(h), dim=1).values
        >>> try:
        ...     sorts.explain()
        ... except seqcells.CellError as error:
        ...     print(type(error).__name__)
        UnknownOperation
    """

    def __init__(self, what: str, line: Line | None = None) -> None:
        self.line = line
        super().__init__(what + (f"\n  {line}" if line else ""))


class UnknownOperation(CellError):
    """An operation, or its derivative, has no counterpart in the kernels."""


class DataDependentBranch(CellError):
    """Python reads the value of a tensor, but the kernels have one path for all units."""


class InPlaceChange(CellError):
    """A tensor is changed in place."""


class MixesUnits(CellError):
    """A result that is not one value for each row and unit: a sum over units, a transpose, a slice."""


class TooManyProducts(CellError):
    """A recurrent product whose operand needs two others, one after the other."""


class CapturedTensor(CellError):
    """The step uses a tensor from outside."""


def mixes_units(name: str, line: Line | None) -> MixesUnits:
    """The error for something that gives no tensor of the states' shape."""
    return MixesUnits(
        f"{name} gives no tensor of the states' shape: a step computes one value for each row and unit, and only "
        "U.k(v), v.mean(-1, keepdim=True), and layer_norm and rms_norm (with eps=) over v.shape[-1:] take something "
        "from other units",
        line,
    )


def captured(line: Line | None) -> CapturedTensor:
    """The error for a tensor from outside."""
    return CapturedTensor(
        "a tensor from outside the step: name it in params= if it is trained, one number for each unit, or in inputs= "
        "if it is given at each step. Of a tensor with one element that stays as it is use its number, float(t), "
        "taken outside the step",
        line,
    )

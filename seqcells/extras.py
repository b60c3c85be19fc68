"""What some cells take besides x, states and weights: trained vectors and per-step inputs, by name.

Both functions check them and concatenate them into the one tensor that `autograd` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks, masks

if TYPE_CHECKING:
    from .cell import Cell


def params(cell: Cell, groups: Sequence[Mapping[str, object] | None] | None, x: Tensor, H: int) -> Tensor | None:
    """The trained vectors of all groups [K, P*H] in the cell's order; for one group [P*H]. None if the cell has none.

    groups: for each group a mapping from names to tensors [H], scalars [1]. TypeError, ValueError or RuntimeError for
    wrong names, values, shapes, dtypes and devices.
    """
    every = []
    for given in groups or (None,):
        found = []
        for name, t in _by_name("params", cell.params, given, cell.name).items():
            size = 1 if name in cell.scalars else H
            if t.shape != (size,):
                raise RuntimeError(f"params[{name!r}] must have shape ({size},), got {tuple(t.shape)}")
            _fit(f"params[{name!r}]", t, x)
            found.append(t.expand(H) if size < H else t)
        if found:
            every.append(found[0] if len(found) == 1 else torch.cat(found))
    if not every:
        return None
    return every[0] if len(every) == 1 else torch.stack(every)


def inputs(cell: Cell, given: Mapping[str, object] | None, x: Tensor, H: int, lengths: Tensor | None) -> Tensor | None:
    """The per-step inputs [T, B, N*H] in the cell's order. None if the cell has none.

    given: a mapping from names to tensors [T, B] or [T, B, H]. lengths: the padding beyond them may have any values,
    and is zero in the result. TypeError, ValueError or RuntimeError for wrong names, values, shapes, dtypes and
    devices.
    """
    found, shape = [], tuple(x.shape[:2])
    past = None if lengths is None else masks.ended(lengths, x.shape[0])
    for name, t in _by_name("inputs", cell.inputs, given, cell.name).items():
        if tuple(t.shape) not in (shape, (*shape, H)):
            raise RuntimeError(f"inputs[{name!r}] must have shape {shape} or {(*shape, H)}, got {tuple(t.shape)}")
        _fit(f"inputs[{name!r}]", t, x)
        t = t if t.dim() == 3 else t[..., None]
        if past is not None:
            t = t.masked_fill(past[..., None], 0)
        found.append(t.expand(*shape, H))
    if not found:
        return None
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _fit(name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise RuntimeError(f"{name} must be of the dtype of x, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise RuntimeError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def _by_name(argument: str, names: Sequence[str], given: Mapping[str, object] | None, cell: str) -> dict[str, Tensor]:
    """The tensors of those names, in that order."""
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise checks.wrong(argument, "a mapping from names to tensors or None", given)
    expected = f"{argument} of {cell} must be {', '.join(names) if names else 'None, for it has none'}"
    found: dict[str, Tensor] = {}
    for name in names:
        if name not in given:
            raise ValueError(f"{expected}: {name} is missing")
        value = given[name]
        checks.tensor(f"{argument}[{name!r}]", value)
        assert isinstance(value, Tensor)
        found[name] = value
    for name in given:
        if name not in names:
            raise ValueError(f"{expected}: got {name!r}")
    return found

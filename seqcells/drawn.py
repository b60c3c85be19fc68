"""Cells with dropout masks, and the masks' numbers.

Such a cell is a cell of its own, whose step multiplies by its masks, so that its kernels and gradients are derived like
any other's. The kernels draw the masks themselves (`kernels.random`), in forward and again in backward. Other engines
take them as per-step inputs, with the same numbers.

The tensor `dropout` [2 + 2*M], for M masks, float32 (float64 for float64 data): two seeds, integers below 2^24; then
for each mask the probability that an element is kept, of which 16 bits are used, and the value of those that are. The
others are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks
from .cell import Cell, constant_to_compilers, get

if TYPE_CHECKING:
    from .dispatch import Call

RECURRENT, CANDIDATE, ZONEOUT = "recurrent", "candidate", "zoneout"


@cache
def dropped(cell: Cell, kinds: tuple[str, ...]) -> Cell:
    """The cell with a mask for each of the kinds, in that order: RECURRENT, CANDIDATE, ZONEOUT with a state's name."""
    rest = len(cell.states) + len(cell.params) + len(cell.inputs)

    def step(x: object, U: Any, *arguments: Tensor) -> tuple[Tensor, ...]:  # U: one of the types that cells take
        masks = dict(zip(kinds, arguments[rest:], strict=True))
        if RECURRENT in masks:
            U = _Dropped(U, masks[RECURRENT])
        own = (masks[CANDIDATE],) if CANDIDATE in masks else ()
        found = cell.step(x, U, *arguments[:rest], *cell.constants.values(), *own)
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        for n, name in enumerate(cell.states):
            if (mask := masks.get(f"{ZONEOUT} {name}")) is not None:
                results[n] = mask * results[n] + (1 - mask) * arguments[n]
        return tuple(results)

    key = f"{cell.key}({', '.join(kinds)})"
    masks = {kind: kind == RECURRENT for kind in kinds}
    return replace(cell, key=key, constants={}, base=None, dropout="", drawn=masks, step=step)  # type: ignore[arg-type]  # a function


def every_mask(cell: Cell) -> tuple[str, ...]:
    """All kinds of masks that a cell may have, for `dropped`."""
    return (RECURRENT, *[CANDIDATE] * bool(cell.dropout), *(f"{ZONEOUT} {state}" for state in cell.states))


@cache
def averaged(cell: Cell, kept: tuple[float, ...]) -> Cell:
    """The cell with zoneout outside training: each state is the mean of old and new. kept: the old one's shares."""
    count = len(cell.states) + len(cell.params) + len(cell.inputs)

    def step(x: object, U: object, *arguments: Tensor) -> tuple[Tensor, ...]:
        found = cell.step(x, U, *arguments[:count], *cell.constants.values())
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        for n, p in enumerate(kept):
            if p:
                results[n] = (1 - p) * results[n] + p * arguments[n]
        return tuple(results)

    key = f"{cell.key}({', '.join(f'{ZONEOUT} {s}={p}' for s, p in zip(cell.states, kept, strict=True) if p)})"
    return replace(cell, key=key, constants={}, base=None, dropout="", step=step)  # type: ignore[arg-type]  # a function


class _Dropped:
    """A step's U, of operands multiplied by a mask."""

    def __init__(self, U: Any, mask: Tensor) -> None:
        self._products, self._mask = U, mask
        self._last: tuple[object, Tensor] = (None, mask)  # an operand, and what became of it

    def __getattr__(self, gate: str) -> Callable[[Tensor], Tensor]:
        product = getattr(self._products, gate)

        def times(v: Tensor) -> Tensor:
            if self._last[0] is not v:
                self._last = v, v * self._mask
            return product(self._last[1])

        return times


@cache
def explicit(cell: Cell) -> Cell:
    """A cell made by `dropped` with its masks as per-step inputs, the last ones."""
    return replace(cell, key=f"{cell.key} explicit", inputs=(*cell.inputs, *cell.drawn), drawn={})


def example(cell: Cell, dtype: torch.dtype) -> Tensor:
    """A tensor dropout for checks of a cell on data of that dtype, in which all of its numbers are exact."""
    numbers = [5.0, 7.0, *(0.75, 1.25) * len(cell.drawn)]
    return torch.tensor(numbers, dtype=torch.promote_types(dtype, torch.float32), device="cpu")


@constant_to_compilers
def _explicit_key(cell: str) -> str:
    return explicit(get(cell)).key


def as_inputs(cell: Cell, call: Call, dropout: Tensor, H: int) -> tuple[Cell, Call]:
    """`explicit` of the cell, and its call."""
    size = (*call.x.shape[:2], len(call.groups), H)
    return get(_explicit_key(cell.key)), call._replace(inputs=given(cell, call.inputs, dropout, size, call.x.dtype))


def checked(cell: Cell, dropout: Tensor | None) -> Tensor:
    """The tensor dropout of a cell. TypeError or RuntimeError if it is not one."""
    checks.tensor("dropout", dropout)
    assert dropout is not None
    if dropout.shape != (size := (2 + 2 * len(cell.drawn),)):
        raise RuntimeError(f"dropout of {cell.key} must have shape {size}, got {tuple(dropout.shape)}")
    return dropout


def given(
    cell: Cell, inputs: Tensor | None, dropout: Tensor, size: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor:
    """The per-step inputs of `explicit`: [T, B, (N+M)*H], or with several groups [T, B, K, (N+M)*H].

    inputs: those of the cell itself [T, B, N*H] or [T, B, K, N*H]. size: T, B, K and H.
    """
    T, B, K, H = size
    counters = torch.arange(T * B * K * H, device=dropout.device).view(T, B, K, H)
    seeds, flags = dropout[:2].to(torch.int64), tuple(cell.drawn.values())
    parts = []
    if inputs is not None:
        parts.append((inputs if inputs.dim() == 4 else inputs[:, :, None]).expand(T, B, K, -1))
    bits = counters
    for n, once in enumerate(flags):
        pair, second = divmod(flags[:n].count(once), 2)
        if second:
            bits = bits >> 16
        else:
            bits = _squares(counters[:1] if once else counters, _key(seeds[0] + (seeds[1] << 24), 2 * pair + once))
        keep, value = (dropout[2 + 2 * n] * (1 << 16)).to(torch.int64), dropout[3 + 2 * n]
        parts.append(torch.where((bits & 0xFFFF) < keep, value, 0.0).to(dtype).expand(T, B, K, H))
    found = torch.cat(parts, 3) if len(parts) > 1 else parts[0]
    return found[:, :, 0] if K == 1 else found


def _shifted(x: Tensor, n: int) -> Tensor:
    """x >> n of the bits as an unsigned number."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _key(seed: Tensor, n: int) -> Tensor:
    """The n-th key, as in kernels.random."""
    golden, first, second = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    key = seed + (golden * (n + 1) + (1 << 63)) % (1 << 64) - (1 << 63)
    key = (key ^ _shifted(key, 30)) * first
    key = (key ^ _shifted(key, 27)) * second
    return (key ^ _shifted(key, 31)) | 1


def _squares(counters: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each counter, as in kernels.random."""

    def swapped(x: Tensor) -> Tensor:
        return _shifted(x, 32) | (x << 32)

    y = counters * key
    z = y + key
    x = swapped(y * y + y)
    x = swapped(x * x + z)
    x = swapped(x * x + y)
    return _shifted(x * x + z, 32)

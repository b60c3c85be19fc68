"""Plans of cells that take means over units (`Form.means`): a launch that computes one has all units of its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

MOST_UNITS = 1024  # of one program; more, and a thread would have too much of a step


def unfit(H: int) -> dict[str, str | None]:
    """Why schedules cannot run such a cell, where they cannot, by their names."""
    why: dict[str, str | None] = {"grid": "its step takes means over units, which are spread over programs"}
    if H > MOST_UNITS:
        why["stepwise"] = f"its step takes means over units, and one program has {MOST_UNITS} at most"
    return why


def whole(plan: Plan, H: int, itemsize: int) -> Plan:
    """The plan of those launches of `stepwise`, and of `recompute`, in which a program has all units of a few rows."""
    block_h = 16
    while block_h < H:
        block_h *= 2
    # A thread has four elements of each tile, or two of float64.
    warps = min(8, max(4, block_h // (128 if itemsize < 8 else 64)))
    block_b = max(1, warps * 32 * (4 if itemsize < 8 else 2) // block_h)
    return replace(plan, block_h=block_h, block_b=min(8, block_b), num_warps=warps, num_stages=1, waits=False)

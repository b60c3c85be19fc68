"""Plans of cells that take means over units (`Form.means`).

In `resident` and `stepwise` a program that takes one has all units of its rows; in `grid` programs exchange their sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .devices import INTERPRETER, Device

if TYPE_CHECKING:
    from .form import Form
    from .plan import Plan


def refusals(cell: Form, H: int, itemsize: int, tiles: int, backward: bool, device: Device) -> dict[str, str]:
    """Why schedules cannot run such a cell, by their names, beside what keeps them from others. tiles: see `plan`."""
    why = {}
    if not cell.products:
        why["grid"] = "without products its programs do not wait for each other, as means over units would have to"
    # More, and a step would spill a thread's registers (found with the report).
    most = 512 if itemsize == 8 else 2048 if cell.gates + len(cell.apart) + cell.params < 10 else 1024
    if most < H:
        why["stepwise"] = f"its step takes means over units, and one program has {most} at most"
    blackwell = device.capability >= 100
    many = tiles > 16 and (itemsize == 4 or blackwell) if backward else tiles > 6 and H > 64 and blackwell
    if device is not INTERPRETER and (itemsize == 8 or many):
        why["resident"] = "the tiles of a step with means over units spill registers"  # likewise
    elif device is not INTERPRETER and itemsize == 4 and H % 2:
        # Rows of an odd number of 32-bit words are loaded one by one, in a register layout whose sums over units
        # Triton 3.7 compiles to shuffles of the wrong lanes; not in grid, whose tiles are small.
        why["resident"] = "Triton adds up an odd number of float32 units wrongly in the layout that they are loaded in"
    return why


def most_rows(cell: Form, H: int, itemsize: int, tiles: int, device: Device) -> int:
    """Rows of a `grid` program beyond which the step would spill registers for its means alone (found with the report).
    tiles: see `plan`."""
    if not cell.means or device is INTERPRETER:
        return 64
    if itemsize == 8:
        return 8 if (64 if tiles > 10 else 128) >= H and tiles <= 16 else 0
    if itemsize == 4 and H > 512 and cell.gates + len(cell.apart) > 6:
        return 0
    return 8 if tiles > 10 else 32


def parts(phases: Sequence[int], exchanges: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """The launches of a step of `grid`, interpreted: (phase, exchanges of means done). exchanges: `Form.means` of a
    direction's three functions, of which a phase calls the one of its number; the last phase also those after it."""
    done = 0
    for phase in phases:
        needed = sum(map(len, exchanges[: 3 if phase == phases[-1] else phase + 1]))
        for done in range(done, needed + 1):  # noqa: B020  (each phase goes on where the one before ended)
            yield phase, done


def whole(plan: Plan, H: int, itemsize: int) -> Plan:
    """The plan of those launches of `stepwise`, and of `recompute`, in which a program has all units of a few rows."""
    block_h = 16
    while block_h < H:
        block_h *= 2
    elements = 4 if itemsize < 8 else 2  # that a thread has of each tile
    warps = max(4, block_h // (32 * elements))
    block_b = min(8, warps * 32 * elements // block_h)
    registers = min(plan.registers, 65536 // (32 * warps))
    tile = replace(plan, block_h=block_h, block_b=block_b, num_warps=warps, num_stages=1)
    return replace(tile, registers=registers, waits=False)

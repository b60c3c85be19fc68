"""Which kernels a process launched last, for whoever is left when it hangs, dies or is killed.

The process writes into a file that it has mapped, one slice before each launch (a fraction of a microsecond, and
nothing of the disk); the pages outlive it. Launches are asynchronous: the last one need not be the one that hangs,
unless CUDA_LAUNCH_BLOCKING=1 is set, as it is where kernels are checked.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOTS, WIDTH = 8, 320  # the launches that are kept, and bytes of the words of one
SHOWN = ("H", "B", "T", "GROUPS", "REVERSED", "LAYERS", "PHASE", "PRECISION", "SAVED", "DRAWN")


def words(launch: Any) -> str:
    """The variant of a launch: kernel, tile, and what else it is compiled for."""
    plan, given, fn = launch.plan, launch.arguments, launch.kernel.fn
    tile = (
        f"{plan.block_h}x{plan.block_b}x{plan.block_k}, {plan.num_warps} warps"
        + ", U in registers" * plan.u_in_registers
    )
    step = getattr(given.get("STEP"), "fn", None)  # the cell's function
    shown = [f"{name}={given[name]}" for name in SHOWN if name in given]
    shown += [str(t.dtype).removeprefix("torch.") for n, t in given.items() if n in ("u_ptr", "y_ptr")][:1]
    shown += ["masked"] * (given.get("mask_ptr") is not None)
    kernel = f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"
    return f"{kernel} {getattr(step, '__name__', '')} {tile}, {', '.join(shown)}"


def _padded(text: str) -> bytes:
    return text.encode()[:WIDTH].ljust(WIDTH, b"\0")


class Launches:
    """The process's side. path: of the file, which is made."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(SLOTS * WIDTH + 1))
        with path.open("r+b") as file:
            self.page = mmap.mmap(file.fileno(), 0)
        self.known: dict[tuple[object, ...], tuple[bytes, Any, Any]] = {}
        self.next = 0

    def note(self, launch: Any) -> None:
        """Write a launch down. Its words are put together once for each variant."""
        given = launch.arguments
        at = id(launch.kernel), id(launch.plan), given.get("PHASE"), given.get("SAVED"), given.get("mask_ptr") is None
        found = self.known.get(at)
        if found is None:
            if len(self.known) > 1000:
                self.known.clear()
            found = self.known[at] = _padded(words(launch)), launch.kernel, launch.plan  # what has the ids; no tensors
        self._write(found[0])

    def say(self, text: str) -> None:
        """Write down what is about to run and is no launch of seqcells' kernels."""
        self._write(_padded(text))

    def _write(self, text: bytes) -> None:
        first = 1 + self.next * WIDTH
        self.page[first : first + WIDTH] = text
        self.next = (self.next + 1) % SLOTS
        self.page[0] = self.next

    def clear(self) -> None:
        """For another job."""
        self.page[:] = bytes(len(self.page))
        self.next = 0
        self.known.clear()

    def watch(self) -> None:
        """Note every launch of seqcells' kernels in this process from now on."""
        from seqcells.kernels import scan, single

        run: Callable[[Any], None] = scan.run

        def noted(launch: Any) -> None:
            self.note(launch)
            run(launch)

        scan.run = noted
        for launcher in (scan.forward, scan.backward, scan.recompute, single.forward):
            launcher.__kwdefaults__["launch"] = noted


def last(path: Path) -> list[str]:
    """The variants that were launched last, the last one first, each once. Empty if nothing was."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    if len(content) <= SLOTS * WIDTH:
        return []
    slots = [content[1 + n * WIDTH : 1 + (n + 1) * WIDTH].rstrip(b"\0").decode(errors="replace") for n in range(SLOTS)]
    ordered = [slots[(content[0] - 1 - n) % SLOTS] for n in range(SLOTS)]
    return list(dict.fromkeys(text for text in ordered if text))

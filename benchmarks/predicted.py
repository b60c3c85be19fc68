"""The latency model (kernels/latency.py) against what gpu.py measured.

    python benchmarks/predicted.py benchmarks/results/gpu-h200.json      # needs no GPU

Compiles the kernels that were timed alone, as the code and Triton are now, predicts a step of each at the clock that
the file names, and says by group how the measured times compare. If the kernels have changed since they were measured,
so has what is compared: put this file and kernels/latency.py into a checkout of the commit that was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a checkout without installing

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "tf32": "fp32"}


def model(launches: list[Any], capability: int, clock: float, behind: bool = False) -> list[float] | None:
    """Microseconds a step (low, middle, high) of a scan that is one launch; None of others, and without a model.
    behind: see latency.cycles."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    from seqcells.kernels import latency, report

    if len(launches) != 1 or capability not in latency.CAPABILITIES or knobs.runtime.interpret:
        return None
    compiled = report.compile_launch(launches[0], GPUTarget("cuda", capability, 32))
    # Not report.disassemble, so that this file can be put into the commit that was measured.
    more = {"behind": True} if behind else {}  # which an earlier commit does not know
    found = latency.cycles(report._tool(["-sass"], compiled.asm["cubin"]), launches[0].plan.num_warps, **more)
    return None if found is None else [c / (clock * 1000) for c in (found.low, found.middle, found.high)]


@dataclass(frozen=True)
class Timed:
    """A kernel that was timed alone: its name in gpu.py's table, and microseconds a step."""

    name: str
    measured: float
    capability: int
    clock: float


@dataclass(frozen=True)
class Compared:
    timed: Timed
    schedule: str
    model: list[float] | None

    @property
    def group(self) -> str:
        return f"{self.schedule} {'backward' if ' backward ' in self.timed.name else 'forward'}"

    @property
    def times(self) -> float:
        """Measured, in units of the model's middle."""
        assert self.model is not None
        return self.timed.measured / self.model[1]

    @property
    def within(self) -> bool:
        assert self.model is not None
        return self.model[0] <= self.timed.measured <= self.model[2]


def read(content: Any, target: str) -> Iterator[Timed]:
    """The timed kernels of gpu.py's JSON, or of a list of several runs'."""
    from seqcells.kernels import devices

    known = devices.KNOWN[target]
    for run in content if isinstance(content, list) else [content["parts"]]:
        heads, _, values = run.get("device", {}).get("nvidia-smi", "").partition("\n")
        facts = dict(zip(heads.split(", "), values.split(", "), strict=False))
        clock = re.match(r"\d+", facts.get("clocks.max.sm [MHz]", ""))
        for name, found in run.get("kernels", {}).items():
            # Earlier files have a sentence instead of numbers.
            said = re.match(r"([\d.]+) us", found) if isinstance(found, str) else None
            measured = float(said[1]) if said else found.get("measured") if isinstance(found, dict) else None
            if measured is not None:
                yield Timed(name, measured, known.capability, int(clock[0]) / 1000 if clock else known.clock)


def compare(timed: Timed) -> Compared:
    from seqcells.kernels import report

    cell, direction, dtype, batch, hidden, *by = timed.name.split()
    case = report.Case(cell, direction, DTYPES[dtype], int(batch[2:]), int(hidden[2:]), f"sm_{timed.capability}")
    launches = report.launches(replace(case, schedule=by[1] if by else None))
    schedule = launches[0].plan.schedule
    found = None if schedule == "stepwise" else model(launches, timed.capability, timed.clock)  # each distinct one once
    return Compared(timed, schedule, found)


def summary(found: list[Compared]) -> str:
    """By schedule and direction: the median ratio of measured to model, the worst, and how many are in the interval."""
    lines = ["| | kernels | median | least | most | within the interval |", "|---|---:|---:|---:|---:|---:|"]
    for group in sorted({c.group for c in found}):
        mine = [c for c in found if c.group == group]
        times = [c.times for c in mine]
        middle = f"{statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f}"
        lines.append(f"| {group} | {len(mine)} | {middle} | {sum(c.within for c in mine)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of gpu.py")
    parser.add_argument("--target", default="sm_90")
    options = parser.parse_args()
    timed = list(read(json.loads(options.file.read_text()), options.target))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        every = list(pool.map(compare, timed))
    found = [c for c in every if c.model is not None]
    print("| kernel | measured, us | model | times the middle | |\n|---|---:|---:|---:|---|")
    for c in found:
        assert c.model is not None
        low, middle, high = c.model
        outside = "" if c.within else "outside"
        name = f"{c.timed.name}, {c.schedule}"
        print(f"| {name} | {c.timed.measured:.3f} | {low:.3f}-{middle:.3f}-{high:.3f} | {c.times:.2f} | {outside} |")
    print(f"\n{summary(found)}\n\nMedian, least and most: measured time in units of the model's middle.")
    print(f"{len(every) - len(found)} without a model: a step of theirs is several launches.")


if __name__ == "__main__":
    main()

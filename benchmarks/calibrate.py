"""The constants of the plan's model (kernels/cost.py), fitted to what gpu.py measured; and where the plan is wrong.

    python benchmarks/calibrate.py benchmarks/results/gpu-h200.json      # needs no GPU

Takes every kernel that was timed alone, with the tile it was timed with, and prints: each constant, in cost.py, fitted,
and how well the measurements determine it; the model's error before and after, and for kernels of a shape that the fit
did not see; the cases in which torch.nn was faster; which schedule was faster where several were timed; and at which
hidden sizes the plan changes its mind. It changes no file. What the model says is predicted; only "measured" is.

A file tells its kernels' tiles. An older one (as gpu-h200.json) does not tell where U was: then `grid` kept it in
shared memory, and `resident` as the plan does now. If the kernels have changed since, their constants may have, too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a checkout without installing

from seqcells.kernels import cells, cost, devices
from seqcells.kernels import plan as plans

LATENCIES = ("CHAIN", "LINK", "BARRIER", "LAUNCH")  # each adds to a step; of the rates, what they are divided by
RATES = ("EXCHANGE_RATE", "MEMORY_RATE", "SHARED_RATE", "ACTIVATION_RATE")
NAMES = (*LATENCIES, *RATES)
NOW = {name: float(getattr(cost, name)) for name in NAMES}
MOST = 4.0  # times, or a part of, what is in cost.py
ITEMSIZES = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4, "float64": 8}
# Probes of gpu.py that measure a constant by itself: its name there, and the constant that it makes.
PROBES = {
    "LINK": ("mma m16n8k16 bf16", lambda cycles: cycles),
    "MEMORY_RATE": ("st.global.v4, 4 warps: 2 KB", lambda cycles: 2048 / cycles),
    "TRIP": ("ld.global.cg from L2", lambda cycles: cycles),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel that was timed alone. measured: clocks a step. amounts: by constant, how many of it, or what is divided
    by it. tensor: clocks of the products, which the reading of U overlaps; read: those of reading it at another rate.
    """

    name: str
    schedule: str
    measured: float
    amounts: dict[str, float]
    tensor: float
    read: float = 0.0

    @property
    def group(self) -> str:
        return f"{self.schedule} {'backward' if ' backward ' in self.name else 'forward'}"

    @property
    def shape(self) -> str:
        """Kernels of one shape are much alike."""
        return " ".join(self.name.split()[3:5])

    def clocks(self, constants: dict[str, float]) -> float:
        """A step by the model."""
        parts = {n: a * constants[n] if n in LATENCIES else a / constants[n] for n, a in self.amounts.items()}
        return max(parts.pop("SHARED_RATE", 0.0) + self.read, self.tensor) + sum(parts.values())


class Unknown(Exception):
    """Why a kernel's cost cannot be told."""


class _Noted(plans._Problem):
    """A scan to plan, with U where it was when it was timed."""

    in_registers: bool | None = None  # None: as the plan has it

    def _u_in_registers(self, block_b: int, u_bytes: int) -> bool:
        return super()._u_in_registers(block_b, u_bytes) if self.in_registers is None else self.in_registers

    def cost(self, *arguments: Any, **named: Any) -> cost.Cost:
        self.last = super().cost(*arguments, **named)
        return self.last

    def found(self, schedule: str, block_b: int) -> Iterator[tuple[tuple[int, int, int, int], bool, cost.Cost]]:
        """Tiles and warps of a schedule, whether U is in registers, and the cost."""
        if schedule == "resident":
            made = self._resident(block_b)
            yield (made.block_h, made.block_b, made.block_k, made.num_warps), made.u_in_registers, self.last
        elif schedule == "grid":
            for parts, made, _ in self._grids():
                yield (made.block_h, made.block_b, made.block_k, made.num_warps), made.u_in_registers, parts
        else:
            for tile, warps, _, _, parts, _ in self._tiles():
                yield (*tile, warps), False, parts


def timed_as(row: Any) -> tuple[float, dict[str, Any]]:
    """Microseconds, and of the plan what the row tells. Earlier files have a sentence."""
    said = re.match(r"([\d.]+) us .*\((\w+) (\d+)x(\d+), (\d+) warps\)", row) if isinstance(row, str) else None
    if said is None and not isinstance(row, dict):
        raise Unknown(str(row))
    if said is None and "measured" not in row:
        raise Unknown(str(row.get("failed", "not reached")))
    measured, text = (float(said[1]), said[0]) if said else (float(row["measured"]), row["plan"])
    if not said and "tile" in row:
        return measured, row["tile"]
    told = re.search(r"(\w+) (\d+)x(\d+), (\d+) warps", text)
    if told is None:
        raise Unknown(f"its plan is not told: {text}")
    tile = {"schedule": told[1], "block_h": int(told[2]), "block_b": int(told[3]), "num_warps": int(told[4])}
    return measured, tile | ({"u_in_registers": False} if told[1] == "grid" else {})


def kernel(name: str, row: Any, device: devices.Device) -> Kernel:
    """A kernel with its parts, from gpu.py's name and row. Raises Unknown."""
    measured, tile = timed_as(row)
    cell, direction, dtype, batch, hidden, *_ = name.split()
    B, H, precision = int(batch[2:]), int(hidden[2:]), dtype if dtype == "tf32" else "ieee"
    problem = _Noted(cells.get(cell), B, H, 1, ITEMSIZES[dtype], device, precision, direction == "backward")
    problem.in_registers = tile.get("u_in_registers")
    wanted = [tile.get(key) for key in ("block_h", "block_b", "block_k", "num_warps")]
    for found, in_registers, parts in problem.found(tile["schedule"], tile["block_b"]):
        same = all(w is None or w == f for w, f in zip(wanted, found, strict=True))
        if same and tile.get("u_in_registers") in (None, in_registers):
            return Kernel(name, tile["schedule"], measured * device.clock * 1000, *_amounts(problem, tile, parts))
    raise Unknown(f"the plan has no such tile now: {tile}")


def _amounts(problem: _Noted, tile: dict[str, Any], parts: cost.Cost) -> tuple[dict[str, float], float, float]:
    """The amounts of a Kernel, its tensor and its read: a Cost is made of today's constants."""
    clocks = problem.device.clock * 1000
    levels = max(1, problem.levels)
    found = {"CHAIN": float(levels), "LINK": (parts.chain * clocks - levels * cost.CHAIN) / cost.LINK}
    found |= {"EXCHANGE_RATE": parts.exchange * clocks * cost.EXCHANGE_RATE}
    found |= {"MEMORY_RATE": parts.memory * clocks * cost.MEMORY_RATE}
    found |= {"ACTIVATION_RATE": parts.activations * clocks * cost.ACTIVATION_RATE}
    if tile["schedule"] == "stepwise":  # U comes from L2, at the device's own rate
        return found | {"LAUNCH": parts.start * clocks / cost.LAUNCH}, parts.tensor * clocks, parts.u * clocks
    found |= {"SHARED_RATE": parts.u * clocks * cost.SHARED_RATE, "BARRIER": parts.start * clocks / cost.BARRIER}
    return found, parts.tensor * clocks, 0.0


def runs(content: Any) -> list[dict[str, Any]]:
    """gpu.py's JSON, or a list of several runs' parts."""
    return content if isinstance(content, list) else [content["parts"]]


def device_of(run: dict[str, Any], target: str) -> devices.Device:
    """The facts by which the plan was made. Earlier files do not tell all of them: then the target's."""
    like, told = devices.KNOWN[target], run.get("device", {})
    sizes = [int(told.get(key, getattr(like, key))) for key in ("capability", "processors", "shared")]
    return devices.present(told.get("gpu", like.name), *sizes)


def read(content: Any, target: str) -> tuple[list[Kernel], dict[str, str]]:
    """Every kernel that was timed alone; and of those that cannot be used, why."""
    found, left = [], {}
    for run in runs(content):
        device = device_of(run, target)
        for name, row in run.get("kernels", {}).items() if isinstance(run.get("kernels"), dict) else ():
            try:
                found.append(kernel(name, row, device))
            except Unknown as reason:
                left[name] = str(reason)
    return found, left


def fit(
    kernels: Sequence[Kernel], names: Sequence[str] = NAMES, weights: Sequence[float] | None = None
) -> dict[str, float]:
    """The constants that make the squares of the relative errors least (of the logarithms of the ratios), each within
    MOST of what it is now. What no kernel needs stays as it is, and what they hardly determine close to it."""
    free = [n for n in names if any(k.amounts.get(n, 0.0) > 0 for k in kernels)]
    if not free:
        return dict(NOW)
    of = {n: torch.tensor([k.amounts.get(n, 0.0) for k in kernels], dtype=torch.float64) for n in NAMES}
    tensor, read, measured = (
        torch.tensor([getattr(k, key) for k in kernels], dtype=torch.float64) for key in ("tensor", "read", "measured")
    )
    share = torch.ones_like(measured) if weights is None else torch.tensor(weights, dtype=torch.float64)
    place = torch.zeros(len(free), dtype=torch.float64, requires_grad=True)

    def constants() -> dict[str, Any]:
        scale = torch.exp(math.log(MOST) * torch.tanh(place))
        return NOW | {n: NOW[n] * s for n, s in zip(free, scale, strict=True)}

    def loss() -> torch.Tensor:
        now = constants()
        parts = {n: of[n] * now[n] if n in LATENCIES else of[n] / now[n] for n in NAMES}
        model = torch.maximum(parts.pop("SHARED_RATE") + read, tensor) + sum(parts.values())
        found = (share * (model / measured).log().square()).sum() / share.sum() + 1e-6 * place.square().sum()
        optimizer.zero_grad()
        found.backward()
        return found

    optimizer = torch.optim.LBFGS(
        [place], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    optimizer.step(loss)
    with torch.no_grad():
        return {n: float(v) for n, v in constants().items()}


def ranges(kernels: Sequence[Kernel], names: Sequence[str], resamples: int) -> dict[str, tuple[float, float]]:
    """Where nine tenths of the fits lie if the shapes are drawn again, with repetition."""
    shapes = sorted({k.shape for k in kernels})
    generator = torch.Generator().manual_seed(0)
    every = []
    for _ in range(resamples):
        drawn = torch.randint(len(shapes), (len(shapes),), generator=generator).tolist()
        count = {shape: drawn.count(n) for n, shape in enumerate(shapes)}
        every.append(fit(kernels, names, [count[k.shape] for k in kernels]))
    if not every:
        return dict.fromkeys(NAMES, (math.nan, math.nan))
    cut = {n: sorted(found[n] for found in every) for n in NAMES}
    end = round(0.05 * (resamples - 1))
    return {n: (values[end], values[-1 - end]) for n, values in cut.items()}


def left_out(kernels: Sequence[Kernel], names: Sequence[str]) -> list[float]:
    """Of each kernel, measured in units of the model, fitted to the kernels of other shapes alone."""
    by_shape = {s: fit([k for k in kernels if k.shape != s], names) for s in {k.shape for k in kernels}}
    return [k.measured / k.clocks(by_shape[k.shape]) for k in kernels]


def off(ratios: Sequence[float]) -> str:
    """How far measured times are from the model: the median, in percent, and the worst ratio."""
    worst = max(ratios, key=lambda r: abs(math.log(r)))
    middle = statistics.median(math.exp(abs(math.log(r))) - 1 for r in ratios)
    return f"{100 * middle:.0f} % | {worst:.2f}"


def errors(kernels: Sequence[Kernel], constants: dict[str, float], others: Sequence[float]) -> str:
    """By schedule and direction: the model's error with cost.py's constants, fitted, and fitted to other shapes."""
    head = "| | kernels | cost.py: median | worst | fitted: median | worst | to other shapes: median | worst |"
    lines = [head, f"|---|{'---:|' * 7}"]
    for group in [*sorted({k.group for k in kernels}), "all"]:
        mine = [n for n, k in enumerate(kernels) if group in (k.group, "all")]
        now, then = ([kernels[n].measured / kernels[n].clocks(c) for n in mine] for c in (NOW, constants))
        lines.append(f"| {group} | {len(mine)} | {off(now)} | {off(then)} | {off([others[n] for n in mine])} |")
    return "\n".join(lines)


def table(found: dict[str, float], between: dict[str, tuple[float, float]], free: Sequence[str], probes: Any) -> str:
    """Each constant, in cost.py and fitted."""
    lines = [
        "| constant | in cost.py | by a probe | fitted | nine tenths of resamplings | |",
        f"|---|{'---:|' * 4}---|",
    ]
    for name in (*NAMES, "TRIP"):
        now = float(getattr(cost, name))
        probe, of = PROBES.get(name, ("", float))
        alone = f"{of(probes[probe]):.3g}" if probe in probes else ""
        if name not in free:
            lines.append(f"| {name} | {now:g} | {alone} | | | not fitted: not in these kernels, or not asked for |")
            continue
        low, high = between[name]
        note = "hardly determined" if high > 2 * low else ""
        if not NOW[name] / MOST * 1.01 < found[name] < NOW[name] * MOST * 0.99:
            note = f"at its bound, {MOST:g} times what it is"
        lines.append(f"| {name} | {now:g} | {alone} | {found[name]:.3g} | {low:.3g} - {high:.3g} | {note} |")
    return "\n".join(lines)


def slower(run: dict[str, Any]) -> list[str]:
    """The cases in which torch.nn was faster, and what the plan's model has to say."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in run.get("grid", []):
        if "seconds" in row:
            by_case.setdefault(row["name"], {})[row["provider"]] = row
    lines = []
    for name, rows in by_case.items():
        ours, theirs = rows.get("triton"), rows.get("torch.nn")
        if not ours or not theirs or ours["seconds"] <= theirs["seconds"]:
            continue
        floor, step, why = ours.get("floor_us_a_step"), ours.get("us_a_step"), "no model in the file"
        if floor and step:
            rival = theirs["seconds"] / ours["seconds"] * step
            many = f"{step / floor:.1f} times the plan's model, {floor:.2f} us"
            why = f"{step:.2f} us a step, {many}; torch.nn {rival:.2f} us"
            why += ": less than the model allows this plan" * (rival < floor)
        lines.append(f"- {name}: {ours['seconds'] / theirs['seconds']:.2f} of torch.nn's time ({why})")
    return lines


def rivals(kernels: Sequence[Kernel], constants: dict[str, float]) -> list[str]:
    """Where several schedules were timed: which was faster, and which the model takes."""
    same: dict[str, list[Kernel]] = {}
    for k in kernels:
        same.setdefault(" ".join(k.name.split()[:5]), []).append(k)
    lines = []
    for name, those in same.items():
        if len({k.schedule for k in those}) < 2:
            continue
        best = min(those, key=lambda k: k.measured).schedule
        by = [min(those, key=lambda k: k.clocks(c)).schedule for c in (NOW, constants)]
        lines.append(f"| {name} | {best} | {by[0]} | {by[1]} |")
    return lines


def changes(device: devices.Device, constants: dict[str, float]) -> list[str]:
    """At which hidden sizes the plan changes its mind, with other constants: predicted."""
    lines = []
    with mock.patch.multiple(plans, **constants):
        for cell in ("lstm", "gru"):
            for B in (8, 64, 512):
                for backward in (False, True):
                    at: list[str] = []
                    for H in (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048):
                        size = {"B": B, "H": H, "itemsize": 2, "precision": "ieee", "backward": backward}
                        made = plans.plan.__wrapped__(cells.get(cell), device=device, **size)
                        if not at or at[-1].split()[0] != made.schedule:
                            at.append(f"{made.schedule} from {H}")
                    lines.append(f"{cell} {'backward' if backward else 'forward'} bfloat16 B={B} | {', '.join(at)}")
    return lines


def report(content: Any, target: str, resamples: int, names: Sequence[str]) -> str:
    """All that is printed."""
    kernels, left = read(content, target)
    lines = [f"{len(kernels)} kernels that were timed alone; {len(left)} that cannot be used."]
    lines += [f"- {name}: {why}" for name, why in left.items()]
    found = NOW
    if kernels:
        free = [n for n in names if any(k.amounts.get(n, 0.0) > 0 for k in kernels)]
        found = fit(kernels, names)
        probes = {k: v for run in runs(content) for k, v in run.get("instructions", {}).items()}
        clock = device_of(runs(content)[0], target).clock
        lines += ["", f"Clocks of {clock:g} GHz, and bytes (of ACTIVATION_RATE functions) a clock; LAUNCH in us:"]
        lines += ["", table(found, ranges(kernels, names, resamples), free, probes)]
        lines += ["", "How far measured times are from the model (worst: measured / model):", ""]
        lines += [errors(kernels, found, left_out(kernels, names))]
        lines += ["", "Where several schedules were timed, the fastest: measured, and by the model:", ""]
        several = rivals(kernels, found)
        head = ["| kernel | measured | cost.py | fitted |", "|---|---|---|---|"]
        lines += [*head, *several] if several else ["Nowhere."]
    lines += ["", "Slower than torch.nn:", ""]
    for run in runs(content):
        where = f", at commit {run['commit']}" if "commit" in run else ""
        count = len({row["name"] for row in run.get("grid", []) if row.get("provider") == "torch.nn"})
        slow = slower(run)
        lines += [f"{len(slow)} of the {count} cases that torch.nn has{where}.", *slow]
    device = device_of(runs(content)[0], target)
    lines += ["", "Schedules by hidden size, predicted; with the fitted constants where that differs:", ""]
    for now, then in zip(changes(device, NOW), changes(device, found), strict=True):
        lines.append(f"- {now}" + f"; fitted: {then.partition('| ')[2]}" * (now != then))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of gpu.py")
    parser.add_argument("--target", default="sm_90", choices=devices.KNOWN, help="what the file does not tell")
    parser.add_argument("--resamples", type=int, default=200, metavar="N", help="fits to shapes drawn again")
    parser.add_argument("--only", action="append", choices=NAMES, help="fit only this constant (may be repeated)")
    options = parser.parse_args()
    content = json.loads(options.file.read_text())
    print(report(content, options.target, options.resamples, options.only or NAMES))


if __name__ == "__main__":
    main()

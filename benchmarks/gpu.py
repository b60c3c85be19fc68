"""All measurements of the kernels on a GPU, in one command and within a time limit.

    python benchmarks/gpu.py --out DIR [--minutes 8]              # on a CUDA machine
    python benchmarks/gpu.py --out DIR --device cpu --dry         # the same code at tiny sizes, interpreted

In order: the device and its clocks; what it can do (copy, product, barrier, L2) and what single instructions cost;
parity of every kernel, in as many processes as there are cores, the most in doubt first; compute-sanitizer if it is
there; torch.nn and the kernels on every case, the most telling first; then the loops and peers; the task suite with the
kernels. All but the first run in processes of their own (see jobs.py): a kernel that hangs or an illegal access is
recorded, with its job, and the next one begins. DIR/gpu.json and DIR/gpu.md are rewritten after each part, so that an
interruption loses only the current one. Needs no network and no build tool.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to run from a checkout without installing

import cases
import compare
import jobs
from providers import PROVIDERS

from seqcells import cells as seqcells_cells
from seqcells import testing
from seqcells.kernels.registry import BUILT_IN
from seqcells.tasks import suite

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}


def said(command: list[str], seconds: float) -> dict[str, Any]:
    """What a command printed, and how it ended."""
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
        code, out, error = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        code, out, error = -1, str(stopped.stdout or ""), f"stopped after {seconds:.0f} s"
    took = time.monotonic() - started
    shown = " ".join("python" if part == sys.executable else part for part in command)  # results name no paths
    return {"command": shown, "code": code, "out": out, "error": error[-2000:], "seconds": took}


def seqcells(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "seqcells", *arguments]


def facts(device: str) -> dict[str, Any]:
    """The machine, and nvidia-smi's clocks and limits."""
    found: dict[str, Any] = dict(compare.machine(device))
    if shutil.which("nvidia-smi"):
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        found["nvidia-smi"] = said(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], 20)["out"].strip()
    return found


class Report:
    """The results so far, written after each part."""

    def __init__(self, out: Path, command: str) -> None:
        self.out, self.content = out, {"command": command, "parts": {}}

    def part(self, name: str, find: Callable[[], Any]) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            self.content["parts"][name] = find()
        except Exception as error:  # continue with the other parts
            self.content["parts"][name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        suite.write(self.out / "gpu.json", json.dumps(self.content, indent=1))
        suite.write(self.out / "gpu.md", self.document())

    def document(self) -> str:
        parts = self.content["parts"]
        lines = ["# One run on a device", "", f"Written by `{self.content['command']}`.", ""]
        for name, found in parts.items():
            lines += [f"## {name}", ""]
            if name == "grid" and isinstance(found, list):
                lines += [compare.table(found), "", "### Against the plan's model", "", floors(found), ""]
                lines += ["### Slower than torch.nn", "", slower(found), "", "### Saved for backward", ""]
                lines += [
                    compare.memory(found),
                    "",
                    "### Peak memory, MiB",
                    "",
                    peaks(found),
                    "",
                    "### What failed",
                    "",
                ]
                lines += [compare.failures(found), ""]
            elif name == "kernels" and "failed" not in found:
                lines += [model_table(found), ""]
            elif isinstance(found, dict) and "out" in found:
                lines += [f"`{found['command']}` ended with {found['code']} after {found['seconds']:.0f} s.", "", "```"]
                lines += [(found["out"] or found["error"])[-8000:].strip(), "```", ""]
            else:
                lines += [f"- {k}: {v}" for k, v in found.items()] + [""]
        return "\n".join(lines)


def floors(rows: list[dict[str, Any]]) -> str:
    """Microseconds a step of the kernels, the plan's model, and how far from it they are."""
    lines = ["| case | us a step | the plan's model | times | plan |", "|---|---:|---:|---:|---|"]
    for row in rows:
        floor = row.get("floor_us_a_step")
        if row.get("provider") == "triton" and "seconds" in row and floor:
            times = f"{row['us_a_step'] / floor:.1f}"
            lines.append(f"| {row['name']} | {row['us_a_step']:.2f} | {floor:.2f} | {times} | {row['plan']} |")
    return "\n".join(lines)


def slower(rows: list[dict[str, Any]]) -> str:
    """The cases in which torch.nn was faster than the kernels."""
    lines = []
    for name, providers in compare.by_case(rows).items():
        ours, theirs = providers.get("triton"), providers.get("torch.nn")
        if ours and theirs and ours["seconds"] > theirs["seconds"]:
            ratio = ours["seconds"] / theirs["seconds"]
            lines.append(f"- {name}: {ratio:.2f} of torch.nn's time")
    return "\n".join(lines) or "None."


def peaks(rows: list[dict[str, Any]]) -> str:
    timed = compare.by_case(rows)
    present = [p for p in PROVIDERS if any(p in r for r in timed.values())]
    lines = [f"| case | {' | '.join(present)} |", f"|---|{'---:|' * len(present)}"]
    for name, providers in timed.items():
        sizes = [providers.get(p, {}).get("peak_bytes") for p in present]
        lines.append(f"| {name} | {' | '.join('' if s is None else f'{s / 2**20:.1f}' for s in sizes)} |")
    return "\n".join(lines)


FIRST = ("torch.nn", "triton", "triton, states")
GALLERY = [name for name in seqcells_cells.__all__ if name not in BUILT_IN]


def checks(device: str, dry: bool) -> Iterator[jobs.Job]:
    """Jobs for parity: the grid schedule before the others, since it alone depends on programs that wait."""
    if dry:
        yield {"do": "parity", "cell": "lstm", "backend": "triton:grid", "kind": "float32", "shape": [2, 3, 2, 5]}
        return
    shapes = [testing.LARGE[n] for n in (1, 3, 0, 2, 4)]
    kinds = ["bfloat16", "tf32", "float16", "float64", "float32", "tf32x3"]
    schedules = ["triton:grid", "triton:resident", "triton:stepwise"]
    for kind in kinds:
        for shape in shapes:
            for backend in schedules:
                for cell in BUILT_IN:
                    sizes = [shape.T, shape.B, shape.I, shape.H]
                    yield {"do": "parity", "cell": cell, "backend": backend, "kind": kind, "shape": sizes}
        if kind in ("bfloat16", "float64"):
            for cell in (*GALLERY, "gru_before"):
                for backend in schedules:
                    small = {"backend": backend, "kind": kind, "shape": [9, 17, 3, 33]}
                    yield {"do": "parity", "cell": cell, **small}
                    if cell in ("gru_before", "slstm", "dreamer_gru"):
                        yield {"do": "parity", "cell": cell, "dropout": True, **small}


def parity(device: str, workers: int, deadline: float, dry: bool) -> dict[str, Any]:
    """Every check's largest error, and what failed."""
    asked = [{**job, "device": device} for job in checks(device, dry)]
    lines, good, missed, worst = [], 0, 0, {}
    for job, found in jobs.run(asked, workers, 60, deadline):
        name = f"{job['cell']} {job['backend']} {job['kind']} {job['shape']}"
        if "not_reached" in found:
            missed += 1
        elif found.get("good"):
            good += 1
            if found["errors"]:
                key = f"{job['backend']} {job['kind']}"
                worst[key] = max(worst.get(key, (0.0, "")), (max(found["errors"].values()), name))
        else:
            lines.append(f"{name}: {found.get('failed') or found['errors']}")
    shown = {key: f"{error:.1e} ({name})" for key, (error, name) in sorted(worst.items())}
    return {"within tolerance": good, "not reached": missed, "wrong": lines, **shown}


Running = dict[str, subprocess.Popen[str]]


def sanitizers(device: str) -> Running:
    """compute-sanitizer on the smallest checks, its tools side by side, begun."""
    tool, running = shutil.which("compute-sanitizer"), {}
    if tool is None or torch.device(device).type == "cpu":
        return {}
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for schedule in ("grid", "resident", "stepwise"):
            start = {"do": "parity", "backend": f"triton:{schedule}", "shape": [2, 3, 2, 33], "device": device}
            asked = [{**start, "cell": cell, "kind": kind} for cell, kind in
                     (("lstm", "bfloat16"), ("gru_before", "tf32"), ("gru", "float32"))]  # fmt: skip
            # Without PyTorch's cache, so that each tensor is an allocation of its own.
            environment = ENVIRONMENT | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "benchmarks/jobs.py"]
            running[f"{name}, {schedule}"] = subprocess.Popen(
                [*command, json.dumps(asked)], env=environment, cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT
            )
    return running


def sanitized(running: Running, deadline: float) -> dict[str, Any]:
    """What compute-sanitizer found."""
    found = {}
    for name, process in running.items():
        try:
            printed = process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
            end = [line for line in printed.splitlines() if "SUMMARY" in line]
            found[name] = f"ended with {process.returncode}: {' '.join(end)}"
            if process.returncode:
                found[name] += "\n" + printed[:1500] + "\n...\n" + printed[-1500:]
        except subprocess.TimeoutExpired:
            process.kill()
            found[name] = "stopped: out of time"
    return found or {"left out": "it is for CUDA, or not there"}


def kernels(device: str, dry: bool) -> Iterator[jobs.Job]:
    """The kernels whose steps are timed alone."""
    if dry:
        yield {"do": "kernel", "cell": "lstm", "direction": "train", "dtype": "float32", "B": 3, "H": 5, "T": 3}
        return
    for dtype in ("bfloat16", "tf32"):
        for B, H in ((8, 64), (16, 64), (8, 128), (16, 768), (16, 1024), (16, 512), (16, 256), (8, 32), (64, 1024)):
            for cell in ("lstm", "gru"):
                for direction in ("infer", "train", "backward"):
                    if dtype == "bfloat16" or H in (64, 128, 512):
                        yield {"do": "kernel", "cell": cell, "direction": direction, "dtype": dtype, "B": B, "H": H}


def kernel_times(device: str, deadline: float, dry: bool) -> dict[str, jobs.Job]:
    """Of each kernel, microseconds a step: measured, by the latency model (low, middle, high), and the plan's model."""
    asked = [{**job, "device": device, "seconds": 0.0 if dry else 0.15} for job in kernels(device, dry)]
    return {
        f"{job['cell']} {job['direction']} {job['dtype']} B={job['B']} H={job['H']}": found
        for job, found in jobs.run(asked, 1, 40, deadline)
    }


def model_table(found: dict[str, jobs.Job]) -> str:
    """Model against measured, a kernel a line."""
    lines = ["| kernel, us a step | measured | model | times the middle | the plan's model | plan |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for name, row in found.items():
        if "measured" not in row:
            lines.append(f"| {name} | {row.get('failed', 'not reached')} | | | | |")
            continue
        model, times = "-", "-"
        if row["model"] is not None:
            model, times = "-".join(f"{v:.3f}" for v in row["model"]), f"{row['measured'] / row['model'][1]:.2f}"
        lines.append(f"| {name} | {row['measured']:.3f} | {model} | {times} | {row['floor']:.3f} | {row['plan']} |")
    return "\n".join(lines)


def timed(
    chosen: list[cases.Case],
    device: str,
    names: list[str],
    deadline: float,
    dry: bool,
    checked: bool,
    note: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Rows of the cases, as compare.sweep has them, from one process at a time."""
    rows: list[dict[str, Any]] = []
    each = 0.0 if dry else max(0.1, min(3.0, 0.4 * (deadline - time.monotonic()) / len(chosen)))
    same = {"do": "case", "device": device, "seconds": each, "providers": names, "checked": checked}
    asked = [{**same, "case": asdict(c)} for c in chosen]
    for job, found in jobs.run(asked, 1, 300 if dry else 40, deadline):
        start = {"case": job["case"], "name": cases.Case(**job["case"]).name, "device": device}
        rows += found["rows"] if "rows" in found else [start | found]
        note(rows)
    return rows


class Run:
    """The parts of a run, each a method that returns what it found, and until when each may take."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.device, self.dry, self.report = options.device, options.dry, report
        self.cuda = torch.device(options.device).type == "cuda"
        self.started, self.box = time.monotonic(), 60 * options.minutes
        self.workers = 2 if options.dry else os.cpu_count() or 1
        self.running: Running = {}  # compute-sanitizer
        every = cases.grid()
        self.cases = list(dict.fromkeys(c.small() for c in every)) if options.dry else every
        if options.case:
            self.cases = [c for c in self.cases if any(text in f"{c.name} {c.why}" for text in options.case)]
        parts = {
            "device": lambda: facts(self.device),
            "ceilings": lambda: self.probe("ceilings"),
            "instructions": lambda: self.probe("instructions"),
            "parity": lambda: parity(self.device, self.workers, self.until(0.3), self.dry),
            "compute-sanitizer": lambda: sanitized(self.running, self.until(0.35)),
            "compile": self.compiled,
            "kernels": lambda: kernel_times(self.device, self.until(0.55), self.dry),
            "grid": self.timed,
            "task suite": self.suite,
        }
        self.parts = {name: find for name, find in parts.items() if not options.part or name in options.part}

    def until(self, share: float) -> float:
        """When that share of the time is up; the dry run takes what it takes."""
        return self.started + (3600 if self.dry else share * self.box)

    def perform(self) -> None:
        for name, find in self.parts.items():
            if name == "parity" and "compute-sanitizer" in self.parts:
                self.running = sanitizers(self.device)  # they take long, and little of the device
            self.report.part(name, find)

    def probe(self, name: str) -> Any:
        job = {"do": "probe", "name": name, "device": self.device, "dry": self.dry}
        return next(found for _, found in jobs.run([job], 1, 60, self.until(0.95)))

    def compiled(self) -> dict[str, Any]:
        """Compile and check all that is timed after it, on all cores."""
        alone = {"device": self.device, "seconds": -1}
        asked = [{**alone, **job} for job in kernels(self.device, self.dry)]
        asked += [{"do": "case", "case": asdict(c), **alone, "providers": list(FIRST)} for c in self.cases]
        wrong = []
        for job, found in jobs.run(asked, self.workers, 60, self.until(0.5)):
            name = cases.Case(**job["case"]).name if "case" in job else str(job)
            rows = found.get("rows", [found])
            wrong += [f"{name}, {r.get('provider', '')}: {r['failed']}" for r in rows if "failed" in r]
        return {"cases": len(asked), "wrong": wrong}

    def timed(self) -> list[dict[str, Any]]:
        """torch.nn and the kernels on every case, then the others on a few."""

        def note(rows: list[dict[str, Any]]) -> None:
            self.report.content["parts"]["grid"] = [*rows]
            self.report.write()

        if self.dry:
            return timed(self.cases, self.device, list(PROVIDERS), self.until(1), True, False, note)
        good = "compile" in self.parts and not self.report.content["parts"]["compile"].get("wrong", True)
        first = timed(self.cases, self.device, list(FIRST), self.until(0.85), False, good, note)
        few = [
            c for c in self.cases if c.mode == cases.TRAINING and (c.T <= 200 or (c.B, c.H, c.heads) == (16, 768, 1))
        ]
        others = [name for name in PROVIDERS if name not in (*FIRST, "auto")]
        more = timed(few, self.device, others, self.until(0.95), False, False, lambda rows: note(first + rows))
        return first + more

    def suite(self) -> dict[str, Any]:
        wanted = ("memorize", "--case", "1", "--cell", "lstm") if self.dry else ("--all",)
        command = seqcells("run", *wanted, "--device", self.device, "--backend", "reference" if self.dry else "triton")
        return said(command, max(30.0, self.until(1.05) - time.monotonic()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="about how long it may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part (may be repeated)")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only cases whose name or purpose has this")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, hardly timed: does it all run?")
    options = parser.parse_args()
    cuda = torch.device(options.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: no CUDA device is available")
    if not cuda and not options.dry:
        parser.error("--device cpu only with --dry; to time the CPU: python benchmarks/compare.py")
    torch.set_num_threads(1)
    report = Report(options.out, " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]))
    Run(options, report).perform()
    found = report.content["parts"]
    failed = [n for n, p in found.items() if isinstance(p, dict) and ("failed" in p or p.get("code") or p.get("wrong"))]
    rows = found.get("grid", [])
    failed += [f"{r['name']}, {r.get('provider')}" for r in rows if "failed" in r]
    missed = sum("not_reached" in r for r in rows)
    print((options.out / "gpu.md").read_text())
    print(f"{len(failed)} failed: {'; '.join(failed) or 'nothing'}; {missed} cases not reached", file=sys.stderr)
    return 1 if options.dry and (failed or missed) else 0


if __name__ == "__main__":
    sys.exit(main())

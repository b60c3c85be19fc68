"""What gpu.py checks: parity of every kernel with the float64 reference, verification's verdicts, compute-sanitizer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jobs
import torch

from seqcells import cells as seqcells_cells
from seqcells import testing
from seqcells.kernels.registry import BUILT_IN

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
GALLERY = [name for name in seqcells_cells.__all__ if name not in BUILT_IN]
SCHEDULES = ("triton:grid", "triton:resident", "triton:stepwise")
NORMS = ("lnlstm", "lngru", "dreamer_gru")  # cells with means over units


def in_doubt() -> Iterator[jobs.Job]:
    """What is least certain, first: the products that were wrong on an H200; stacks of layers, masks drawn in kernels
    and means over units, which never ran on a GPU; how far verification's verdicts are from a false alarm in low
    precision."""
    wide = [40, 130, 20, 128]
    for kind in ("bfloat16", "float16"):
        for cell in ("lstm", "gru"):
            yield {"cell": cell, "backend": "triton:stepwise", "kind": kind, "shape": wide}
    for kind in ("bfloat16", "tf32", "float16"):
        for cell in ("lstm", "gru", "gru_before", "rnn_tanh"):
            for shape in ([3, 17, 64], [2, 5, 20], [4, 8, 128]):
                yield {"do": "stack", "cell": cell, "backend": "triton", "kind": kind, "shape": shape}
    small = [9, 17, 3, 33]
    for kind in ("bfloat16", "tf32"):
        for cell in ("lstm", "gru", "gru_before", "slstm", "dreamer_gru"):
            for backend in SCHEDULES:
                yield {"cell": cell, "dropout": True, "backend": backend, "kind": kind, "shape": small}
        for cell in NORMS:
            for backend in SCHEDULES:
                yield {"cell": cell, "backend": backend, "kind": kind, "shape": [9, 17, 3, 64]}


def checks(dry: bool) -> Iterator[jobs.Job]:
    """Jobs for parity, each once: what is most in doubt; then the grid schedule before the others, since it alone
    depends on programs that wait."""
    if dry:
        yield {"do": "parity", "cell": "lstm", "backend": "triton:grid", "kind": "float32", "shape": [2, 3, 2, 5]}
        yield {"do": "stack", "cell": "lstm", "backend": "triton", "kind": "float32", "shape": [2, 3, 6]}
        return
    seen = []
    for job in (*in_doubt(), *_others()):
        if job not in seen:
            seen.append(job)
            yield {"do": "parity", **job}


def _others() -> Iterator[jobs.Job]:
    shapes = [testing.LARGE[n] for n in (1, 3, 0, 2, 4)]
    for kind in ("bfloat16", "tf32", "float16", "float64", "float32", "tf32x3"):
        for shape in shapes:
            for backend in SCHEDULES:
                for cell in BUILT_IN:
                    sizes = [shape.T, shape.B, shape.I, shape.H]
                    yield {"cell": cell, "backend": backend, "kind": kind, "shape": sizes}
        if kind in ("bfloat16", "float64"):
            for cell in (*GALLERY, "gru_before"):
                for backend in SCHEDULES:
                    yield {"cell": cell, "backend": backend, "kind": kind, "shape": [9, 17, 3, 33]}


class Checked:
    """What came of the jobs of parity."""

    def __init__(self) -> None:
        self.counts = {"within tolerance": 0, "no schedule": 0, "not reached": 0}
        self.wrong: list[str] = []
        self.worst: dict[str, tuple[float, str]] = {}
        self.verdicts: dict[str, list[tuple[float, str]]] = {}
        self.alarms: list[str] = []
        self.missed: list[str] = []

    def add(self, job: jobs.Job, found: jobs.Job) -> None:
        name = f"{job['cell']}{' with masks' * job.get('dropout', False)} {job['backend']} {job['kind']} {job['shape']}"
        key = f"{job['backend']} {job['kind']}"
        if "not_reached" in found:
            self.counts["not reached"] += 1
            return
        if "failed" in found:
            self.wrong.append(f"{name}: {found['failed']}")
            return
        for variant, worst, tensor in found.get("verdicts", []):
            self.verdicts.setdefault(key, []).append((worst, f"{variant}, its {tensor}"))
        if found["good"] and found["errors"]:
            self.counts["within tolerance"] += 1
            self.worst[key] = max(self.worst.get(key, (0.0, "")), (max(found["errors"].values()), name))
        elif found["good"]:
            self.counts["no schedule"] += 1
        else:
            self.wrong.append(f"{name}: {found['errors']}")
        if found.get("refused") and found["good"]:
            self.alarms.append(f"{name}: {found['refused']}")
        if not found["good"] and not found.get("refused"):
            self.missed.append(name)

    def content(self) -> dict[str, Any]:
        """Counts, what is wrong, the largest errors; and of verification the verdicts' worst errors in units of what is
        allowed, what it refused though it was right, and what it let pass though it was wrong."""
        margins = {}
        for key, found in sorted(self.verdicts.items()):
            worst, which = max(found)
            middle = statistics.median(w for w, _ in found)
            margins[key] = f"{len(found)} verdicts, median {middle:.2f} of what is allowed, worst {worst:.2f} ({which})"
        verification = {"false alarms": self.alarms, "wrong and not refused": self.missed, **margins}
        worst = {key: f"{error:.1e} ({name})" for key, (error, name) in sorted(self.worst.items())}
        return {**self.counts, "wrong": self.wrong, "verification": verification, **worst}


def parity(
    device: str, workers: int, deadline: float, dry: bool, note: Callable[[dict[str, Any]], None] = lambda found: None
) -> dict[str, Any]:
    """See Checked. note: told what there is so far, at most once a second."""
    asked = [{**job, "device": device} for job in checks(dry)]
    every, told = Checked(), time.monotonic()
    for job, found in jobs.run(asked, workers, 60, deadline, blocking=True):
        every.add(job, found)
        if time.monotonic() > told + 1:
            note(every.content())
            told = time.monotonic()
    return every.content()


Running = dict[str, subprocess.Popen[str]]


def sanitizers(device: str) -> Running:
    """compute-sanitizer on the smallest checks, its tools side by side, begun."""
    tool, running = shutil.which("compute-sanitizer"), {}
    if tool is None or torch.device(device).type == "cpu":
        return {}
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for schedule in ("grid", "resident", "stepwise"):
            start = {"do": "parity", "backend": f"triton:{schedule}", "shape": [2, 3, 2, 33], "device": device}
            start |= {"verify": False}  # once is enough
            asked = [{**start, "cell": cell, "kind": kind} for cell, kind in
                     (("lstm", "bfloat16"), ("gru_before", "tf32"), ("gru", "float32"))]  # fmt: skip
            # Without PyTorch's cache, so that each tensor is an allocation of its own.
            environment = ENVIRONMENT | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "benchmarks/jobs.py"]
            how: dict[str, Any] = {"env": environment, "cwd": ROOT, "text": True, "start_new_session": True}
            how |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            if schedule == "resident":
                stacks = {"do": "stack", "backend": "triton", "shape": [3, 9, 32], "device": device}
                asked += [
                    {**stacks, "cell": cell, "kind": kind} for cell, kind in (("lstm", "bfloat16"), ("gru", "tf32"))
                ]
            running[f"{name}, {schedule}"] = subprocess.Popen([*command, json.dumps(asked)], **how)
    return running


def sanitized(running: Running, deadline: float) -> dict[str, Any]:
    """What compute-sanitizer found."""
    found = {}
    for name, process in running.items():
        try:
            printed = process.communicate(timeout=max(0.3, deadline - time.monotonic()))[0]
            end = [line for line in printed.splitlines() if "SUMMARY" in line]
            found[name] = f"ended with {process.returncode}: {' '.join(end)}"
            if process.returncode:
                found[name] += "\n" + printed[:1500] + "\n...\n" + printed[-1500:]
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the tool, and what it runs
            found[name] = "stopped: out of time"
    return found or {"left out": "it is for CUDA, or not there"}

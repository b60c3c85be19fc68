"""All measurements of the kernels on a GPU, in one command and within a time limit.

    python benchmarks/gpu.py --out DIR [--minutes 8]              # on a CUDA machine
    python benchmarks/gpu.py --out DIR --device cpu --dry         # the same code at tiny sizes, interpreted

In order: the device and its clocks; parity of every kernel with verification's verdicts, in as many processes as there
are cores, the most in doubt first; compute-sanitizer if it is there; every kernel's steps timed alone; what the device
can do (copy, product, barrier, L2) and what single instructions cost; torch.nn and the kernels on every case, the most
telling first; then the loops and peers; the task suite with the kernels. All but the first run in processes of their
own (see jobs.py): a kernel that hangs or an illegal access is recorded, with its job and the kernel's variant, and the
next one begins. DIR/gpu.json and DIR/gpu.md are rewritten after each part and during the long ones, and say which part
they end in. Needs no network and no build tool. Afterwards: python benchmarks/calibrate.py DIR/gpu.json
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
from checked import ENVIRONMENT, Running, parity, sanitized, sanitizers
from providers import PROVIDERS

from seqcells.kernels.scan import device_facts
from seqcells.tasks import suite


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
    if torch.device(device).type == "cuda":
        known = device_facts(torch.device(device))
        found |= {name: str(getattr(known, name)) for name in ("capability", "processors", "shared")}
    if shutil.which("nvidia-smi"):
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        found["nvidia-smi"] = said(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], 20)["out"].strip()
    return found


class Report:
    """The results so far, written before and after each part."""

    def __init__(self, out: Path, command: str) -> None:
        self.out, self.content = out, {"command": command, "ends in": "", "parts": {}}

    def part(self, name: str, find: Callable[[], Any]) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        self.content["ends in"] = name
        self.write()
        try:
            self.content["parts"][name] = find()
        except Exception as error:  # continue with the other parts
            self.content["parts"][name] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        self.content["ends in"] = ""
        self.write()

    def note(self, name: str, found: Any) -> None:
        """What there is so far of a part."""
        self.content["parts"][name] = found
        self.write()

    def write(self) -> None:
        suite.write(self.out / "gpu.json", json.dumps(self.content, indent=1))
        suite.write(self.out / "gpu.md", self.document())

    def document(self) -> str:
        parts = self.content["parts"]
        lines = ["# One run on a device", "", f"Written by `{self.content['command']}`.", ""]
        if self.content["ends in"]:
            lines += [f"Interrupted, or not done yet: it ends in the part {self.content['ends in']}.", ""]
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
                lines += [line for k, v in found.items() for line in listed(k, v)] + [""]
        return "\n".join(lines)


def listed(name: str, found: Any) -> list[str]:
    """Lines of a list, with what is within below."""
    if isinstance(found, list):
        return [f"- {name}: {len(found) or 'none'}", *(f"  - {each}" for each in found)]
    if isinstance(found, dict):
        return [f"- {name}:", *(f"  {line}" for k, v in found.items() for line in listed(k, v))]
    return [f"- {name}: {found}"]


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


def kernels(dry: bool) -> Iterator[jobs.Job]:
    """The kernels whose steps are timed alone: as they are planned, and where schedules meet, by each that fits."""
    if dry:
        yield {"do": "kernel", "cell": "lstm", "direction": "train", "dtype": "float32", "size": [3, 5, 3]}
        yield {
            "do": "kernel",
            "cell": "lstm",
            "direction": "backward",
            "dtype": "float32",
            "size": [3, 6, 9],
            "layers": 2,
        }
        return
    for dtype in ("bfloat16", "tf32"):
        for B, H in ((8, 64), (16, 64), (8, 128), (16, 768), (16, 1024), (16, 512), (16, 256), (8, 32), (64, 1024)):
            for cell in ("lstm", "gru"):
                for direction in ("infer", "train", "backward"):
                    if dtype == "bfloat16" or H in (64, 128, 512):
                        yield {
                            "do": "kernel",
                            "cell": cell,
                            "direction": direction,
                            "dtype": dtype,
                            "size": [B, H, 1000],
                        }
    for B, H in ((8, 64), (64, 64), (8, 128), (8, 32)):
        for cell in ("lstm", "gru"):
            for direction in ("infer", "train", "backward"):
                one = {"do": "kernel", "cell": cell, "direction": direction, "dtype": "bfloat16", "size": [B, H, 1000]}
                yield one | {"layers": 3}
    for B, H in ((16, 128), (64, 256), (512, 256), (512, 384), (64, 1024), (64, 1536)):
        for schedule in ("resident", "grid", "stepwise"):
            for direction in ("train", "backward"):
                one = {"do": "kernel", "cell": "lstm", "direction": direction, "dtype": "bfloat16", "size": [B, H, 100]}
                yield one | {"schedule": schedule}


def kernel_name(job: jobs.Job) -> str:
    B, H, _ = job["size"]
    by = f" by {job['schedule']}" if "schedule" in job else f" of {job['layers']} layers" if "layers" in job else ""
    return f"{job['cell']} {job['direction']} {job['dtype']} B={B} H={H}{by}"


def kernel_times(device: str, deadline: float, dry: bool) -> dict[str, jobs.Job]:
    """Of each kernel, microseconds a step: measured, by the latency model (low, middle, high), and the plan's model."""
    asked = [{**job, "device": device, "seconds": 0.0 if dry else 0.15} for job in kernels(dry)]
    done = jobs.run(asked, 1, 40, deadline)
    return {kernel_name(job): found for job, found in done if "left_out" not in found}


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
            "parity": lambda: parity(
                self.device, self.workers, self.until(0.3), self.dry, lambda found: report.note("parity", found)
            ),
            "compute-sanitizer": lambda: sanitized(self.running, self.until(0.35)),
            "compile": self.compiled,
            "kernels": lambda: kernel_times(self.device, self.until(0.55), self.dry),
            "ceilings": lambda: self.probe("ceilings"),
            "instructions": lambda: self.probe("instructions"),
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
        return next(found for _, found in jobs.run([job], 1, 60, self.until(0.65)))

    def compiled(self) -> dict[str, Any]:
        """Compile and check all that is timed after it, on all cores."""
        alone = {"device": self.device, "seconds": -1}
        asked = [{**alone, **job} for job in kernels(self.dry)]
        asked += [{"do": "case", "case": asdict(c), **alone, "providers": list(FIRST)} for c in self.cases]
        wrong = []
        for job, found in jobs.run(asked, self.workers, 60, self.until(0.5), blocking=True):
            name = cases.Case(**job["case"]).name if "case" in job else str(job)
            rows = found.get("rows", [found])
            wrong += [f"{name}, {r.get('provider', '')}: {r['failed']}" for r in rows if "failed" in r]
        return {"cases": len(asked), "wrong": wrong}

    def timed(self) -> list[dict[str, Any]]:
        """torch.nn and the kernels on every case, then the others on a few."""

        def note(rows: list[dict[str, Any]]) -> None:
            self.report.note("grid", [*rows])

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
        return said(command, max(1.0, self.until(1) - time.monotonic()))


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

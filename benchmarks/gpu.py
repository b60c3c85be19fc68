"""All measurements of the kernels on a GPU, in one command and within a time limit.

    python benchmarks/gpu.py --out DIR [--minutes 8]              # on a CUDA machine
    python benchmarks/gpu.py --out DIR --device cpu --dry         # the same code at tiny sizes, interpreted

In order: the device and its clocks; what it can do (copy, product, barrier, L2); parity (`python -m seqcells check`);
compute-sanitizer if it is there; every provider on every case, the most telling first, while there is time; the task
suite with the kernels. DIR/gpu.json and DIR/gpu.md are rewritten after each part, so that an interruption loses only
the current part. A part or a peer that fails is recorded, and the next one begins. Needs no network and no build tool.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to run from a checkout without installing

import cases
import compare
from providers import PROVIDERS

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
                lines += [compare.table(found), "", "### Against the model's floor", "", floors(found), ""]
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
            elif isinstance(found, dict) and "out" in found:
                lines += [f"`{found['command']}` ended with {found['code']} after {found['seconds']:.0f} s.", "", "```"]
                lines += [(found["out"] or found["error"])[-8000:].strip(), "```", ""]
            else:
                lines += [f"- {k}: {v}" for k, v in found.items()] + [""]
        return "\n".join(lines)


def floors(rows: list[dict[str, Any]]) -> str:
    """Microseconds a step of the kernels, the model's floor, and how far from it they are."""
    lines = ["| case | us a step | floor | times | plan |", "|---|---:|---:|---:|---|"]
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


def sanitized(device: str) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None or device == "cpu":
        return {"left out": "compute-sanitizer is not there" if tool is None else "it is for CUDA"}
    check = seqcells("check", "--device", device, "--cell", "lstm", "--dtype", "float32")
    return said([tool, "--tool", "memcheck", "--error-exitcode", "9", *check], 240)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="about how long it may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, hardly timed: does it all run?")
    options = parser.parse_args()
    device, cuda = options.device, torch.device(options.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error(f"--device {device}: no CUDA device is available")
    if not cuda and not options.dry:
        parser.error("--device cpu only with --dry; to time the CPU: python benchmarks/compare.py")
    torch.set_num_threads(1)
    started, box = time.monotonic(), 60 * options.minutes
    report = Report(options.out, " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]))

    def left() -> float:
        return box - (time.monotonic() - started)

    import probes  # compiles

    report.part("device", lambda: facts(device))
    report.part("ceilings", lambda: probes.ceilings(device, options.dry))
    few = ("--cell", "lstm", "--dtype", "float32") if options.dry else ()
    report.part("parity", lambda: said(seqcells("check", "--device", device, *few), 0.3 * box))
    report.part("compute-sanitizer", lambda: sanitized(device))
    chosen = list(dict.fromkeys(c.small() for c in cases.grid())) if options.dry else cases.grid()

    def grid() -> list[dict[str, Any]]:
        def note(rows: list[dict[str, Any]]) -> None:
            report.content["parts"]["grid"] = rows
            report.write()

        minutes = max(1.0, (left() - (0.25 * box if cuda else 0)) / 60)
        return compare.sweep(chosen, device, minutes, note=note, dry=options.dry)

    report.part("grid", grid)
    wanted = ("memorize", "--case", "1", "--cell", "lstm") if options.dry else ("--all",)
    backend = "reference" if options.dry else "triton"
    suite_run = seqcells("run", *wanted, "--device", device, "--backend", backend)
    report.part("task suite", lambda: said(suite_run, max(60.0, left())))
    failed = [n for n, p in report.content["parts"].items() if isinstance(p, dict) and ("failed" in p or p.get("code"))]
    failed += [f"{r['name']}, {r.get('provider')}" for r in report.content["parts"]["grid"] if "failed" in r]
    missed = sum("not_reached" in r for r in report.content["parts"]["grid"])
    print((options.out / "gpu.md").read_text())
    print(f"{len(failed)} failed: {'; '.join(failed) or 'nothing'}; {missed} cases not reached", file=sys.stderr)
    return 1 if options.dry and (failed or missed) else 0


if __name__ == "__main__":
    sys.exit(main())

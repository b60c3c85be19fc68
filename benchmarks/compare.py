"""Compare providers: all that support a case, interleaved in one run, after a parity check; medians and ratios.

    make bench        or        python benchmarks/compare.py [--device cuda] [--minutes 3] [--json FILE] [--table FILE]

A provider that fails is recorded with its error, and the others go on. Nothing here claims a speed across machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a checkout without installing

import cases
import measure
from cases import NAMES, Case, Problem, Unavailable
from providers import PROVIDERS, judge

import seqcells
from seqcells import explanation
from seqcells.tasks import suite
from seqcells.tasks.progress import bar


def planned(problem: Problem) -> tuple[str, float | None]:
    """The plan of the case's scan, in words, and its model of a step, in microseconds (both directions)."""
    case = problem.case
    size = {"batch": case.B, "hidden_size": case.H, "dtype": problem.dtype, "groups": case.heads}
    try:
        size |= {"steps": case.T, "grad": case.mode != cases.INFERENCE}
        masks = {"resets": case.resets > 0, "lengths": case.lengths}
        found = explanation.explain(NAMES[case.cell], device=problem.device, **size, **masks)
    except (ValueError, RuntimeError) as error:
        return str(error), None
    said = " ".join(str(found).split())  # one line, for a table
    if found.plan is None:
        return said, None
    floor = found.plan.microseconds + (found.backward.microseconds if case.mode == cases.TRAINING else 0)
    return said, floor


def compared(
    case: Case,
    device: str,
    seconds: float,
    names: Iterable[str] | None = None,
    checked: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One row for each provider: its error against the judge and its times, or why there are none.

    seconds: about how long to time them; negative: not at all, only parity. checked: parity was seen before. note: told
    what is about to run.
    """
    problem = Problem(case, device)
    plan, floor = planned(problem)
    start = {"case": asdict(case), "name": case.name, "device": device, "plan": plan, "floor_us_a_step": floor}
    rows, runs, alone = [], {}, "products alone"
    judged = None if checked else cases.answer(problem, judge(problem))
    allowed = cases.tolerance(case, problem.device)
    for name in names or PROVIDERS:
        row: dict[str, Any] = {**start, "provider": name}
        rows.append(row)
        note(f"the provider {name}")
        try:
            work = PROVIDERS[name](problem)
            if judged is not None:
                row["error"] = cases.parity(cases.answer(problem, work), judged, allowed)
            row["saved_bytes"] = measure.saved_bytes(problem, work)
            run = cases.repeated(problem, work)
            row["peak_bytes"] = measure.peak_bytes(run, problem.device)
            runs[name] = run
        except Unavailable as reason:
            row["unavailable"] = str(reason)
        except Exception as error:  # a peer's failure is a result
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    if not runs or seconds < 0:
        return rows
    if (floor := measure.products(problem)) is not None:
        runs[alone] = floor
    note(f"timing {', '.join(runs)} in turn")
    samples = measure.interleaved(runs, problem.device, seconds)
    if floor is not None:
        for row in rows:
            row["floor_us_a_step"] = median(samples[alone]) * 1e6 / case.T
        del samples[alone]
    for name, found in samples.items():
        row = next(r for r in rows if r["provider"] == name)
        low, middle, high = quantiles(found, n=4)
        row |= {"seconds": middle, "quartiles": [low, high], "rounds": len(found)}
        row["us_a_step"] = middle * 1e6 / case.T
    return rows


def sweep(
    chosen: list[Case],
    device: str,
    minutes: float,
    names: Iterable[str] | None = None,
    note: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    dry: bool = False,
) -> list[dict[str, Any]]:
    """All cases, in order, until the time is up; those after it are recorded as not reached.

    note: called after each case with all rows so far. dry: hardly timed.
    """
    deadline, rows = time.monotonic() + 60 * minutes, []
    with bar(total=len(chosen), desc="cases") as progress:
        for number, case in enumerate(chosen):
            left = deadline - time.monotonic()
            if left <= 0:
                rows.append({"case": asdict(case), "name": case.name, "device": device, "not_reached": True})
                continue
            try:
                seconds = 0.0 if dry else min(20.0, 0.5 * left / (len(chosen) - number))
                rows += compared(case, device, seconds, names)
            except Exception as error:  # the case itself: too large for the device, say
                reason = f"{type(error).__name__}: {error}"[:300]
                rows.append({"case": asdict(case), "name": case.name, "device": device, "failed": reason})
            note(rows)
            progress.update()
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
    return rows


def machine(device: str) -> dict[str, str]:
    """What it ran on."""
    facts = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seqcells": seqcells.__version__,
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        pass
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        facts["cpu"] = next((v.strip() for k, v in lines if k.strip() == "model name"), platform.processor())
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        facts |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return facts


def by_case(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{case: {provider: row}} of what was timed."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:
            found.setdefault(row["name"], {})[row["provider"]] = row
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row for each case, with the microseconds of auto and the other providers' times relative to it."""
    timed = by_case(rows)
    present = [p for p in PROVIDERS if any(p in r for r in timed.values())]
    others = [p for p in present if p != "auto"]
    lines = [
        f"| case | for | auto, us | a step | floor | {' | '.join(others)} |",
        f"|---|---|---:|---:|---:|{'---:|' * len(others)}",
    ]
    for name, providers in timed.items():
        case, auto = next(iter(providers.values()))["case"], providers.get("auto", providers.get("triton"))
        shown = [
            name,
            case["why"],
            f"{auto['seconds'] * 1e6:.0f}" if auto else "-",
            f"{auto['us_a_step']:.2f}" if auto else "-",
            f"{floor:.2f}" if (floor := next(iter(providers.values()))["floor_us_a_step"]) else "",
        ]
        for other in others:
            row = providers.get(other)
            if row is None or auto is None:
                shown.append("" if row is None else f"{row['seconds'] * 1e6:.0f} us")
            else:
                shown.append(f"{row['seconds'] / auto['seconds']:.2f}")
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def memory(rows: list[dict[str, Any]]) -> str:
    """Markdown: what is saved for backward beyond input, weights and output, in units of T*B*H elements."""
    timed = {n: r for n, r in by_case(rows).items() if next(iter(r.values()))["case"]["mode"] == cases.TRAINING}
    present = [p for p in PROVIDERS if any(p in r for r in timed.values())]
    lines = [f"| case | {' | '.join(present)} |", f"|---|{'---:|' * len(present)}"]
    for name, providers in timed.items():
        case = next(iter(providers.values()))["case"]
        width = case["T"] * case["B"] * case["H"] * case["heads"] * case["layers"] * (1 + case["bidirectional"])
        unit = width * cases.DTYPES[case["dtype"]].itemsize
        shown = [f"{providers[p]['saved_bytes'] / unit:.1f}" if p in providers else "" for p in present]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


GOALS = {"torch.nn": 0.95, "reference": 3.0}
BY_HAND = 1 / 1.15  # of a step with resets to one whose state torch.nn's user masks


def goals(rows: list[dict[str, Any]]) -> str:
    """Markdown, for the CPU: the goals for auto, and its ratio if only the matrix products took time.

    torch.nn's speed within 5% where it has the cell, within 15% for one step with resets, where torch.nn's users mask
    the state; for training what torch.nn lacks, or supports only packed, three times the speed of the hand-written
    loop, `reference`.
    """
    lines = ["| case | against | times as fast | asked | with products alone | |", "|---|---|---:|---:|---:|---|"]
    for name, providers in by_case(rows).items():
        case, auto = next(iter(providers.values()))["case"], providers.get("auto")
        lacking = case["cell"] == "gru-before" or (case["resets"] and case["T"] > 1)
        lacking = lacking or (case["lengths"] and not case.get("packed"))
        peer = "reference" if lacking else "torch.nn"
        if auto is None or peer not in providers or (lacking and case["mode"] != cases.TRAINING):
            continue
        found, floor = providers[peer]["seconds"] / auto["seconds"], auto["floor_us_a_step"]
        most = providers[peer]["us_a_step"] / floor if floor else None
        goal = BY_HAND if case["resets"] and not lacking else GOALS[peer]
        note = "" if found >= goal else "not reached" if most is None or most > goal else "out of reach"
        shown = "" if most is None else f"{most:.1f}"
        lines.append(f"| {name} | {peer} | {found:.2f} | {goal:.2g} | {shown} | {note} |")
    return "\n".join(lines)


def failures(rows: list[dict[str, Any]]) -> str:
    lines = [f"- {r['name']}, {r.get('provider', 'the case')}: {r['failed']}" for r in rows if "failed" in r]
    missed = sum("not_reached" in r for r in rows)
    return "\n".join(lines + [f"- {missed} cases were not reached in the time."] * (missed > 0)) or "None."


def document(rows: list[dict[str, Any]], facts: dict[str, str], command: str) -> str:
    shown = ", ".join(f"{k} {v}" for k, v in facts.items())
    return (
        f"# Side by side\n\nWritten by `{command}`: {shown}.\n\n"
        'Medians of interleaved samples. "auto" in microseconds, of the whole and of a step; every other provider as\n'
        "a multiple of auto's time in the same run (above 1: auto is faster). Empty: it lacks the case.\n"
        "Training is forward and backward, gradients of all weights; inference forward without gradients.\n"
        "floor: the matrix products alone, each a call, in us a step (CPU); the plan's model of a step (CUDA).\n\n"
        f"{table(rows)}\n\n## What was asked of auto\n\n{goals(rows)}\n\n"
        "## Saved for backward\n\nBeyond input, weights and output, in units of T*B*H elements of the case's type.\n\n"
        f"{memory(rows)}\n\n## What failed\n\n{failures(rows)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument(
        "--case", action="append", metavar="TEXT", help="only cases whose name or purpose has this in it"
    )
    parser.add_argument("--scaling", action="store_true", help="on the CPU, also how it scales with H and with B")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="only this one (may be repeated)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_cpu = torch.device(options.device).type == "cpu"
    chosen = cases.grid()
    if on_cpu:
        chosen = [
            *cases.LACKING,
            *cases.PLAIN,
            *cases.SHORT,
            *cases.ACTING,
            *cases.TASKS,
            *(cases.SCALING if options.scaling else ()),
        ]
    if options.case:
        chosen = [c for c in chosen if any(text in f"{c.name} {c.why}" for text in options.case)]
    names = options.provider or [p for p in PROVIDERS if not on_cpu or p != "compiled loop"]
    rows = sweep(chosen, options.device, options.minutes, names)
    facts = machine(options.device)
    command = " ".join(["python benchmarks/compare.py", *sys.argv[1:]])
    asked = f"What was asked of auto:\n\n{goals(rows)}\n\n" if on_cpu else ""
    print(f"{table(rows)}\n\n{asked}Saved for backward, in units of T*B*H elements:\n\n{memory(rows)}")
    if options.json:
        suite.write(options.json, json.dumps({"command": command, "machine": facts, "rows": rows}, indent=1))
    if options.table:
        suite.write(options.table, document(rows, facts, command))
    wrong = [r for r in rows if "failed" in r]
    print("\n".join(f"failed: {r['name']}, {r.get('provider')}: {r['failed']}" for r in wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

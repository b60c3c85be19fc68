"""The report's JSON as Markdown, a file a target: python benchmarks/static.py out/report.json benchmarks/results

Static cost: what the compiled code shows without running. Cycles are predicted (kernels/latency.py), and so are the
plan's microseconds; neither is a measurement. In sm_90's file also FlashRNN's and TorchRL's kernels, where they are
installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a checkout without installing

import peers_static

from seqcells.kernels import devices, report

CELLS = ("lstm", "gru", "gru_before")
LEGEND = """\
Made by `make report`: every kernel that the plan would launch, compiled for {target} with Triton {triton}; nothing was
run.

- cycles: what a step takes of a multiprocessor's cycles, as a model of latencies predicts it from the machine code
  (kernels/latency.py), from its low bound to its high one; in brackets the same in microseconds at {clock} GHz; then
  the number of barriers in the loop. The step is one iteration of the loop of `resident` and `grid`. For `stepwise` it
  is one turn of the loop over U inside a step's launch (whole: all of the launch, where that loop was unrolled), and
  says nothing of the pointwise step behind it. Of 78 kernels timed on an H200, with which the model was adjusted, 74
  took a time within the interval (benchmarks/NOTES.md).
- tile: hidden units x batch rows of a program; regs: registers a thread, KB: shared memory (the larger of the
  directions); plan: its own model of a step, in microseconds, at the smallest batch.
- fp32 products are in TF32.
{note}"""
OTHER = "- The latencies are an H200's; none was measured on this target.\n"
NO_MODEL = """\
- There is no model for this target: none of its latencies was measured here, and its tensor cores have instructions of
  their own. Instead of cycles, issue slots (instructions x warps / 4) of the loop's body.
"""


def cost(row: dict[str, Any]) -> str:
    """Cycles and microseconds of a step, and its barriers; issue slots where there is no model."""
    found, barriers = row.get("cycles"), row["counts"].get("BAR", 0)
    if found is None:
        return f"{row['slots']:.0f} slots, {barriers}" if row["instructions"] else "-"
    return f"{interval(found, row['case']['target'])}, {barriers if found['loop'] else 'whole'}"


def interval(found: dict[str, Any], target: str) -> str:
    low, high = (devices.KNOWN[target].microseconds(found[end]) for end in ("low", "high"))
    return f"{found['low']:.0f}-{found['high']:.0f} ({low:.2f}-{high:.2f})"


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def step_costs(rows: list[dict[str, Any]]) -> str:
    """The step of the small layers, 8 rows a program, by direction."""
    lines = []
    for cell in CELLS:
        for hidden in (32, 64, 128):
            line = [cell, str(hidden)]
            for dtype in ("bf16", "fp32"):
                found = {
                    r["case"]["direction"]: cost(r)
                    for r in rows
                    if is_plain(r)
                    and key(r) == (cell, dtype, hidden)
                    and 8 in r["batches"]
                    and r["schedule"] == "resident"
                }
                line += [found.get(d, "not resident") for d in ("infer", "train", "backward")]
            lines.append(line)
    head = ["cell", "H", *(f"{t} {d}" for t in ("bf16", "fp32") for d in ("inference", "training", "backward"))]
    return markdown_table(head, lines)


def stack_costs(rows: list[dict[str, Any]]) -> str:
    """The step of all layers of a stack, 8 rows a program, by direction."""
    lines = []
    for cell in CELLS:
        for dtype in ("bf16", "fp32"):
            for hidden in (32, 64, 128):
                mine = [r for r in rows if is_plain(r) and key(r) == (cell, dtype, hidden)]
                found = {r["case"]["direction"]: cost(r) for r in mine}
                each = [found.get(d) for d in ("stack", "stack train", "stack backward")]
                if any(each):
                    lines.append([cell, dtype, str(hidden), *(c or "-" for c in each)])
    return markdown_table(["cell", "dtype", "H", "inference", "training", "backward"], lines)


def mask_costs(rows: list[dict[str, Any]]) -> str:
    """What resets and lengths add to a step, bf16: hidden size 64 on one program, 512 over many."""
    lines = []
    for cell in CELLS:
        for hidden in (64, 512):
            line = [cell, str(hidden)]
            for direction in ("train", "backward"):
                for mask in ("", "resets", "lengths"):
                    found = [
                        r
                        for r in rows
                        if is_plain(r | {"case": r["case"] | {"mask": ""}})
                        and key(r) == (cell, "bf16", hidden)
                        and (r["case"]["mask"], r["case"]["direction"]) == (mask, direction)
                        and (8 if hidden == 64 else 16) in r["batches"]
                    ]
                    line.append(cost(found[0]) if found else "-")
            lines.append(line)
    head = ["cell", "H", *(f"{d} {m}" for d in ("training", "backward") for m in ("plain", "resets", "lengths"))]
    return markdown_table(head, lines)


def is_plain(row: dict[str, Any]) -> bool:
    case = row["case"]
    usual = "tf32" if case["dtype"] != "fp64" else "ieee"
    plain = (case["mask"], case["dcs"], case["groups"], case["schedule"]) == ("", False, 1, None)
    return plain and case["precision"] == usual


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["case"]["cell"], row["case"]["dtype"], row["case"]["hidden"]


def all_shapes(rows: list[dict[str, Any]], cell: str, dtype: str) -> str:
    """One line for each hidden size and set of batches that share a kernel in both directions."""
    mine = [r for r in rows if is_plain(r) and key(r)[:2] == (cell, dtype) and "FIRST" not in r["phase"]]
    mine = [r for r in mine if "LAST" not in r["phase"]]
    lines = []
    for hidden in sorted({r["case"]["hidden"] for r in mine}):
        sized = [r for r in mine if r["case"]["hidden"] == hidden and r["case"]["direction"] in ("train", "backward")]
        batches = sorted({b for r in sized for b in r["batches"]})
        groups: dict[tuple[int, ...], list[int]] = {}
        for b in batches:
            groups.setdefault(tuple(i for i, r in enumerate(sized) if b in r["batches"]), []).append(b)
        for members, served in groups.items():
            found = [sized[i] for i in members]
            line = [str(hidden), ", ".join(map(str, served))]
            for direction in ("train", "backward"):
                of = [r for r in found if r["case"]["direction"] == direction]
                if not of:
                    line += ["-"] * 4
                    continue
                shown = " + ".join(cost(r) for r in of)
                line += [of[0]["schedule"], of[0]["block"], shown, f"{of[0]['microseconds']:.2f}"]
            line += [str(max(r["registers"] for r in found)), str(max(r["shared"] for r in found) // 1024)]
            line.append("" if all(r["good"] for r in found) else "BAD")
            lines.append(line)
    head = ["H", "B"]
    head += [f"{d} {c}" for d in ("forward", "backward") for c in ("schedule", "tile", "cycles, bar", "plan")]
    return markdown_table([*head, "regs", "KB", ""], lines)


def document(target: str, content: dict[str, Any], more: str = "") -> str:
    """Everything of one target; more: a section for the end."""
    rows = [r for r in content["rows"] if r["case"]["target"] == target and r["case"]["cell"] in CELLS]
    bad = sum(not r["good"] for r in rows)
    facts = {"target": target, "triton": content["triton"], "clock": devices.KNOWN[target].clock}
    modelled = any(r.get("cycles") for r in rows)
    facts["note"] = NO_MODEL if not modelled else OTHER if target != peers_static.TARGET else ""
    parts = [f"# Static cost of the kernels on {target}", LEGEND.format(**facts)]
    parts.append(f"{len(rows)} kernels; {bad} spill in a loop or do not fit.")
    parts += ["## A step, 8 rows a program (cycles, barriers)", step_costs(rows)]
    parts += [f"## A step of all {report.LAYERS} layers of a stack (cycles, barriers)", stack_costs(rows)]
    parts += ["## What a mask adds (cycles, barriers)", mask_costs(rows)]
    for cell in CELLS:
        for dtype in ("bf16", "fp16", "fp32"):
            parts += [f"## {cell}, {dtype}", all_shapes(rows, cell, dtype)]
    parts += [more] if more else []
    return "\n\n".join(parts) + "\n"


def beside(rows: list[dict[str, Any]]) -> str:
    """FlashRNN's and TorchRL's kernels beside seqcells', which have the same code with 8 rows as with 16."""

    def ours(cell: str, direction: str, hidden: int) -> str:
        for r in rows:
            same = is_plain(r) and r["case"]["target"] == peers_static.TARGET and key(r) == (cell, "bf16", hidden)
            if same and r["case"]["direction"] == direction and {8, 16} & set(r["batches"]) and r.get("cycles"):
                return interval(r["cycles"], peers_static.TARGET)
        return "-"

    return peers_static.section(ours)


def against(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """How the kernels of two reports of the same cases differ: how many by how much, and each whose cost grew by more
    than 1 % forward or 3 % backward, or that spills."""

    def found(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
        """By case, and by position among its kernels: the numbers of phases may differ."""
        cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for r in rows:
            cases.setdefault((*sorted(r["case"].items()), r["schedule"], r["block"]), []).append(r)
        return {(*case, n): r for case, launches in cases.items() for n, r in enumerate(launches)}

    old, new = found(before), found(after)
    both = [(old[k], new[k]) for k in old.keys() & new.keys()]
    ratios = [(_work(b) / _work(a), a, b) for a, b in both]
    lines = [
        f"{len(both)} kernels in both, {len(old) - len(both)} only before, {len(new) - len(both)} only after.",
        f"The same work: {sum(r == 1 for r, *_ in ratios)}; less: {sum(r < 1 for r, *_ in ratios)}; "
        f"more: {sum(r > 1 for r, *_ in ratios)}.",
        f"Other barriers: {sum(a['counts'].get('BAR', 0) != b['counts'].get('BAR', 0) for a, b in both)}. "
        f"Spill before: {sum(a['spills'] > 0 for a, _ in both)}; after: {sum(b['spills'] > 0 for _, b in both)}.",
    ]
    dearer = [
        [
            *(str(a["case"][n]) for n in ("cell", "direction", "dtype", "hidden", "batch", "mask")),
            *(a[n] for n in ("schedule", "phase", "block")),
            f"{_work(a):.0f} -> {_work(b):.0f}",
            f"{100 * (ratio - 1):+.1f} %",
            f"{a['spills']} -> {b['spills']}",
        ]
        for ratio, a, b in sorted(ratios, key=lambda found: -found[0])
        if ratio > (1.03 if a["case"]["direction"] == "backward" else 1.01) or b["spills"] > a["spills"]
    ]
    head = ["cell", "direction", "dtype", "H", "B", "mask", "schedule", "phase", "tile", "slots", "more", "spills"]
    return "\n\n".join([*lines, markdown_table(head, dearer)])


def _work(row: dict[str, Any]) -> float:
    """Slots of the loop; where there is none, instructions of the kernel."""
    return row["slots"] or row["code"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="JSON written by python -m seqcells.kernels.report --json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, metavar="JSON", help="an earlier report: only say how they differ")
    options = parser.parse_args()
    content = json.loads(options.report.read_text())
    if options.against:
        print(against(json.loads(options.against.read_text())["rows"], content["rows"]))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for target in sorted({r["case"]["target"] for r in content["rows"]}):
        path = options.folder / f"static-{target}.md"
        temporary = path.with_name(path.name + ".tmp")
        peers = beside(content["rows"]) if target == peers_static.TARGET else ""
        temporary.write_text(document(target, content, peers))
        temporary.replace(path)
        print(path)


if __name__ == "__main__":
    main()

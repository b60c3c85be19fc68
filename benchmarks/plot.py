"""Pictures from compare.py's or gpu.py's JSON: how many times as fast, microseconds a step, what is kept for backward.

    python benchmarks/plot.py FILE.json DIR [--static TABLE.md]      # make pictures

Transparent, in colours that are read on white and on black.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")

import cases
import compare
from matplotlib import pyplot
from providers import PROVIDERS

GREY = "#808080"
COLOURS = dict(zip(PROVIDERS, pyplot.get_cmap("tab20").colors, strict=False))
STYLE = {
    **{f"{name}.color": GREY for name in ("text", "xtick", "ytick")},
    **{"axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.titlecolor": GREY, "grid.color": GREY},
    **{"legend.labelcolor": GREY, "font.size": 8, "savefig.transparent": True},
}


def save(figure: Any, path: Path) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
    temporary.replace(path)
    print(path)


OURS = ("auto", "triton", "triton, states")
PARTS = ("aten", "loop")  # what auto chooses from on the CPU
SCALING = ("by H", "by B")


def bars(
    timed: dict[str, dict[str, Any]], path: Path, title: str, value: Any, label: str, names: Any = PROVIDERS
) -> None:
    """A group of bars a case, one bar a provider of names. value(row, rows of the case): None where there is none."""
    shown = {n: {p: value(r, rows) for p, r in rows.items() if p in names} for n, rows in timed.items()}
    shown = {n: {p: v for p, v in found.items() if v is not None} for n, found in shown.items()}
    shown = {n: found for n, found in shown.items() if found}
    if not shown:
        return
    present = [p for p in PROVIDERS if any(p in found for found in shown.values())]
    height = 0.8 / len(present)
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.13 * (len(present) + 1) * len(shown)), layout="constrained")
    for k, provider in enumerate(present):
        rows = [(i + k * height, found[provider]) for i, found in enumerate(shown.values()) if provider in found]
        axes.barh([y for y, _ in rows], [v for _, v in rows], height, label=provider, color=COLOURS[provider])
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(shown))], list(shown))
    axes.set_ylim(len(shown) - 0.1, -0.3)  # downward
    axes.set(xscale="log", xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    if label.startswith("speed-up"):
        axes.axvline(1, color=GREY, linewidth=1)
    figure.legend(frameon=False, ncols=4, loc="outside lower center")
    save(figure, path)


def against(peer: str) -> Any:
    def value(row: dict[str, Any], rows: dict[str, Any]) -> float | None:
        if peer not in rows or row["provider"] == peer:
            return None
        return rows[peer]["seconds"] / row["seconds"]

    return value


def kept(row: dict[str, Any], _: dict[str, Any]) -> float | None:
    case = row["case"]
    if case["mode"] != cases.TRAINING or not row["saved_bytes"]:
        return None
    width = case["T"] * case["B"] * case["H"] * case["heads"] * case["layers"] * (1 + case["bidirectional"])
    return row["saved_bytes"] / width / cases.DTYPES[case["dtype"]].itemsize


def scaling(timed: dict[str, dict[str, Any]], axis: str, path: Path) -> None:
    """Against H or B, where cases differ in that alone: microseconds a step, a line a provider and the floor; and how
    many times as fast the first of ours there is."""
    families: dict[str, list[dict[str, Any]]] = {}
    for rows in timed.values():
        case = next(iter(rows.values()))["case"]
        if case["why"] == {"H": "H, float32", "B": "batch"}[axis] or f"by {axis}" in case["why"]:
            families.setdefault(case["cell"], []).append(rows)
    for name, members in families.items():
        values = [next(iter(rows.values()))["case"][axis] for rows in members]
        if len(set(values)) < 3:
            continue
        placed = sorted(zip(values, members, strict=True), key=lambda pair: pair[0])
        figure, (times, ratios) = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
        present = [p for p in PROVIDERS if p not in PARTS and any(p in rows for _, rows in placed)]
        ours = next((p for p in ("triton", *OURS) if p in present), None)
        for provider in present:
            points = [(v, rows[provider]["us_a_step"]) for v, rows in placed if provider in rows]
            times.plot(*zip(*points, strict=True), marker="o", ms=3, label=provider, color=COLOURS[provider])
            faster = [
                (v, rows[provider]["seconds"] / rows[ours]["seconds"])
                for v, rows in placed
                if ours in rows and provider in rows and provider not in OURS
            ]
            if faster:
                ratios.plot(*zip(*faster, strict=True), marker="o", ms=3, color=COLOURS[provider])
        floors = [(v, next(iter(rows.values())).get("floor_us_a_step")) for v, rows in placed]
        if all(floor for _, floor in floors):
            times.plot(*zip(*floors, strict=True), ":", color=GREY, label="floor")
        ratios.axhline(1, color=GREY, linewidth=1)
        times.set(ylabel="microseconds a step", title=f"{name}, by {axis}")
        ratios.set(ylabel="times as fast", title=f"{ours} against each")
        for axes in (times, ratios):
            axes.set(xscale="log", yscale="log", xlabel=axis)
            axes.set_xticks(values, [str(v) for v in values], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        ratios.yaxis.set_major_formatter("{x:g}")
        ratios.set_yticks([r for r in (0.5, 1, 2, 3, 5, 10, 20) if r <= 1.2 * ratios.get_ylim()[1]])
        figure.legend(frameon=False, ncols=7, loc="outside lower center")
        save(figure, path.with_name(f"{path.stem}-{name}-{axis}.png"))


def static(table: Path, folder: Path) -> None:
    """What a step costs by its machine code, from the first table of static.py's document: issue slots against H."""
    lines = table.read_text().split("## A step")[1].split("##")[0].splitlines()
    head, _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    phases = [(k, title) for k, title in enumerate(head) if title.startswith("bf16")]
    figure, panels = pyplot.subplots(1, len(phases), figsize=(8, 2.8), layout="constrained", sharey=True)
    for (k, title), axes in zip(phases, panels, strict=True):
        for cell in dict.fromkeys(row[0] for row in rows):
            points = [(int(row[1]), int(row[k].split(",")[0])) for row in rows if row[0] == cell and "," in row[k]]
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=cell if k == phases[0][0] else None)
        axes.set(xlabel="H", title=title.removeprefix("bf16 "))
        axes.set_xticks([int(row[1]) for row in rows])
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"issue slots a step, {table.stem.removeprefix('static-')}")
    figure.legend(frameon=False, ncols=3, loc="outside lower center")
    save(figure, folder / f"{table.stem}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--static", type=Path, metavar="FILE.md", help="also the cost by machine code, from this table")
    options = parser.parse_args(arguments)
    content = json.loads(options.file.read_text())
    rows = content["rows"] if "rows" in content else content["parts"]["grid"]
    timed = compare.by_case(rows)
    single = {n: r for n, r in timed.items() if not next(iter(r.values()))["case"]["why"].startswith(SCALING)}
    device = rows[0]["device"]
    with pyplot.rc_context(STYLE):
        stem = f"{options.file.stem}-"
        for peer in ("torch.nn", "cell loop"):
            title, path = f"times as fast as {peer}, {device}", options.folder / f"{stem}{peer.replace(' ', '-')}.png"
            bars(single, path, title, against(peer), f"speed-up over {peer}", OURS)
        bars(single, options.folder / f"{stem}memory.png", "kept for backward", kept, "elements, in T*B*H")
        for axis in ("H", "B"):
            scaling(timed, axis, options.folder / f"{stem}scaling.png")
        if options.static is not None:
            static(options.static, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

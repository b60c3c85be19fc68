"""Pictures from compare.py's or gpu.py's JSON: how many times as fast, microseconds a step, what is kept for backward.

    python benchmarks/plot.py FILE.json DIR      # make pictures

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
    """Microseconds a step against H or B, a line a provider and the model's floor, where cases differ in that alone."""
    families: dict[str, list[dict[str, Any]]] = {}
    for rows in timed.values():
        case = next(iter(rows.values()))["case"]
        if case["why"] in ("H, float32", "batch"):
            families.setdefault(f"{case['cell']}, {case['why']}", []).append(rows)
    for name, members in families.items():
        values = [next(iter(rows.values()))["case"][axis] for rows in members]
        if len(set(values)) < 3:
            continue
        figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
        for provider in PROVIDERS:
            points = [
                (v, rows[provider]["us_a_step"]) for v, rows in zip(values, members, strict=True) if provider in rows
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=provider, color=COLOURS[provider])
        floors = [(v, next(iter(r.values())).get("floor_us_a_step")) for v, r in zip(values, members, strict=True)]
        if all(floor for _, floor in floors):
            axes.plot(*zip(*sorted(floors), strict=True), ":", color=GREY, label="the model's floor")
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="microseconds a step", title=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        save(figure, path.with_name(f"{path.stem}-{name.split(',')[0]}-{axis}.png"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    content = json.loads(options.file.read_text())
    rows = content["rows"] if "rows" in content else content["parts"]["grid"]
    timed = compare.by_case(rows)
    device = rows[0]["device"]
    with pyplot.rc_context(STYLE):
        stem = f"{options.file.stem}-"
        for peer in ("torch.nn", "cell loop"):
            title, path = f"times as fast as {peer}, {device}", options.folder / f"{stem}{peer.replace(' ', '-')}.png"
            bars(timed, path, title, against(peer), f"speed-up over {peer}", OURS)
        bars(timed, options.folder / f"{stem}memory.png", "kept for backward", kept, "elements, in T*B*H")
        for axis in ("H", "B"):
            scaling(timed, axis, options.folder / f"{stem}scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

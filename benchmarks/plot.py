"""Plots from compare.py's or gpu.py's JSON: speed ratios, microseconds per step, and what is saved for backward.

    python benchmarks/plot.py FILE.json DIR [--static TABLE.md]      # make pictures

Transparent, in colours that are readable on white and on black; none is higher than a screen.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cases
import compare
import matplotlib
from matplotlib import pyplot, ticker
from providers import PROVIDERS

from seqcells.tasks import plots

matplotlib.use("Agg")

GREY = "#808080"
STYLE = {
    **{f"{name}.color": GREY for name in ("text", "xtick", "ytick")},
    **{"axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.titlecolor": GREY, "grid.color": GREY},
    **{"legend.labelcolor": GREY, "font.size": 8, "axes.titlesize": 8, "savefig.transparent": True},
}
# Of each provider its colour, ours the strongest, and its name for a reader of the picture alone.
LOOKS = {
    "torch.nn": ("#4c72b0", "torch.nn"),
    "auto": ("#e8000b", "seqcells"),
    "triton": ("#b30059", "seqcells' kernels"),
    "triton, states": ("#ff7f0e", "seqcells' kernels, save='states'"),
    "aten": ("#9fb4d8", "backend 'aten'"),
    "loop": ("#f2a7a0", "backend 'loop'"),
    "reference": ("#937860", "loop by hand"),
    "split": ("#c9a94e", "torch.nn between resets"),
    "cell loop": ("#55a868", "loop over torch.nn's cell"),
    "compiled loop": ("#64b5cd", "that loop, compiled"),
    "graphed loop": ("#8172b3", "that loop, as a CUDA graph"),
    "flashrnn": ("#b47cc7", "FlashRNN"),
    "torchrl": ("#5a9e9e", "TorchRL"),
}
CELLS = {"lstm": "LSTM", "gru": "GRU", "gru-before": "reset-before GRU", "rnn": "RNN"}
OURS = ("auto", "triton", "triton, states")
PARTS = ("aten", "loop")  # what auto chooses from on the CPU
SCALING = ("by H", "by B")
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000)


def save(figure: Any, path: Path) -> None:
    """Write the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=plots.DPI)
    pyplot.close(figure)
    temporary.replace(path)
    print(path)


def machine(content: dict[str, Any]) -> str:
    """What the times were taken on, for a title."""
    facts = content.get("machine") or content.get("parts", {}).get("device") or {}
    threads = f"{facts.get('threads', '?')} thread{'' if facts.get('threads') == '1' else 's'}"
    return ", ".join([facts.get("gpu") or facts.get("cpu") or "an unknown machine", threads] if facts else ["no times"])


def ladder(axis: Any, values: list[float]) -> None:
    """Plain numbers at TICKS on a logarithmic axis from the least of the values to the greatest."""
    low, high = min(values) / 1.12, max(values) * 1.12
    shown = [t for t in TICKS if low <= t <= high]
    axis.set_major_locator(ticker.FixedLocator(shown if len(shown) < 13 else shown[::2]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def labels(named: list[dict[str, Any]]) -> tuple[list[str], str]:
    """A short label for each case, and what all cases have in common."""
    modes, types = ({case[key] for case in named} for key in ("mode", "dtype"))
    said = []
    for case in named:
        _, mode, dtype, rest = cases.Case(**case).name.split(" ", 3)
        parts = [CELLS[case["cell"]], *[mode] * (len(modes) > 1), *[dtype] * (len(types) > 1), rest]
        said.append(" ".join(parts))
    return said, ", ".join([*modes] * (len(modes) == 1) + [*types] * (len(types) == 1))


def rows_of(
    timed: dict[str, dict[str, Any]], path: Path, title: str, value: Any, label: str, names: Any, ratio: bool
) -> None:
    """A row a case, and in it of each provider of names a bar from 1 (ratio) or a dot; as many pictures as it takes.

    value(row, rows of the case): None where there is none. title: its first line; the second says what all cases share.
    """
    shown = {n: {p: value(r, rows) for p, r in rows.items() if p in names} for n, rows in timed.items()}
    shown = {n: {p: v for p, v in found.items() if v is not None} for n, found in shown.items()}
    shown = {n: found for n, found in shown.items() if found}
    if not shown:
        return
    present = [p for p in LOOKS if any(p in found for found in shown.values())]
    said, common = labels([next(iter(timed[n].values()))["case"] for n in shown])
    each = 0.17 + 0.1 * (len(present) - 1) * ratio  # inches
    pages = -(-len(shown) // int((plots.HIGHEST - 1.4) / each))
    page = -(-len(shown) // pages)
    values = [v for found in shown.values() for v in found.values()] + [1.0]
    for start in range(0, len(shown), page):
        part = list(shown.values())[start : start + page]
        size = (8.4, 1.4 + each * len(part))
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        heading, _, more = title.partition("\n")
        figure.suptitle("\n".join([heading, ", ".join(t for t in (common, more) if t)]), fontsize=10)
        draw = _bars if ratio else _dots
        for k, provider in enumerate(present):
            draw(
                axes, [(i, found[provider]) for i, found in enumerate(part) if provider in found], provider, k, present
            )
        axes.set_yticks(range(len(part)), said[start : start + page])
        axes.set_ylim(len(part) - 0.4, -0.6)  # downward
        axes.set(xscale="log", xlabel=label, xlim=(min(values) / 1.2, max(values) * 1.25))
        axes.grid(axis="x", alpha=0.3)
        ladder(axes.xaxis, values)
        if ratio:
            axes.axvline(1, color=GREY, linewidth=1)
        if len(present) > 1:
            figure.legend(frameon=False, ncols=3, loc="outside lower center")
        save(figure, path if start == 0 else path.with_name(f"{path.stem}-{start // page + 1}.png"))


def _bars(axes: Any, found: list[tuple[int, float]], provider: str, k: int, present: list[str]) -> None:
    colour, name = LOOKS[provider]
    height = 0.8 / len(present)
    places = [i + (k - (len(present) - 1) / 2) * height for i, _ in found]
    axes.barh(places, [v - 1 for _, v in found], height * 0.9, left=1, label=name, color=colour)
    for place, (_, v) in zip(places, found, strict=True):
        side = {"xytext": (3, 0), "ha": "left"} if v >= 1 else {"xytext": (-3, 0), "ha": "right"}
        axes.annotate(f"{v:.2f}", (v, place), textcoords="offset points", va="center", fontsize=6.5, **side)


def _dots(axes: Any, found: list[tuple[int, float]], provider: str, k: int, present: list[str]) -> None:
    # Equal ones lie on each other: ours are small and full, the others open, each larger than the next.
    colour, name = LOOKS[provider]
    peers = [p for p in present if p not in OURS]
    look: dict[str, Any] = {"marker": "D", "s": 18, "color": colour, "zorder": 4}
    if provider in peers:
        order = peers.index(provider)
        look = {"marker": "os^vP*"[order % 6], "s": 75 - 10 * order, "facecolors": "none", "edgecolors": colour}
    axes.scatter([v for _, v in found], [i for i, _ in found], label=name, linewidths=1.3, **look)
    if k == 0:
        axes.grid(axis="y", alpha=0.2)


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


def scaling(timed: dict[str, dict[str, Any]], axis: str, path: Path, where: str) -> None:
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
        figure, (times, ratios) = pyplot.subplots(1, 2, figsize=(8.4, 4), layout="constrained")
        figure.suptitle(_of_family(name, axis, [next(iter(r.values()))["case"] for _, r in placed], where), fontsize=10)
        present = [p for p in LOOKS if p not in PARTS and any(p in rows for _, rows in placed)]
        ours = next((p for p in ("triton", *OURS) if p in present), None)
        for provider in present:
            colour, label = LOOKS[provider]
            line = {"marker": "o", "ms": 3, "color": colour, "linewidth": 2.6 if provider in OURS else 1.4}
            points = [(v, rows[provider]["us_a_step"]) for v, rows in placed if provider in rows]
            times.plot(*zip(*points, strict=True), label=label, **line, zorder=1.9 if provider in OURS else 2.1)
            faster = [
                (v, rows[provider]["seconds"] / rows[ours]["seconds"])
                for v, rows in placed
                if ours in rows and provider in rows and provider not in OURS
            ]
            if faster:
                ratios.plot(*zip(*faster, strict=True), **line)
        first = next(iter(placed[0][1].values()))
        floors = [(v, next(iter(rows.values())).get("floor_us_a_step")) for v, rows in placed]
        if all(floor for _, floor in floors):
            label = "the matrix products alone" if first["device"] == "cpu" else "the plan's model"
            times.plot(*zip(*floors, strict=True), ":", color=GREY, label=label)
        times.set(ylabel="microseconds a step", title="time of a step: lower is better")
        ours_name = LOOKS[ours][1] if ours else ""
        ratios.set(ylabel="times as fast", title=f"how many times as fast {ours_name} is as each: above 1 is faster")
        for axes in (times, ratios):
            axes.set(xscale="log", xlabel={"H": "hidden size H", "B": "batch B"}[axis])
            axes.set_xticks(values, [str(v) for v in values], minor=False)
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.grid(alpha=0.3)
        plots.plain_ticks(times, "y")
        found = [v for line in ratios.get_lines() for v in line.get_ydata()] + [1.0]
        ratios.set(yscale="log", ylim=(min(found) / 1.1, max(found) * 1.1))
        ladder(ratios.yaxis, found)
        ratios.axhline(1, color=GREY, linewidth=1)
        figure.legend(frameon=False, ncols=3, loc="outside lower center")
        save(figure, path.with_name(f"{path.stem}-{name}-{axis}.png"))


def _of_family(name: str, axis: str, members: list[dict[str, Any]], where: str) -> str:
    """The title: what is varied, what is not, and where."""
    fixed = [f"{key}={members[0][key]}" for key in ("T", "B", "H") if len({m[key] for m in members}) == 1]
    inputs = {m["I"] for m in members}
    fixed += [f"I={inputs.pop()}"] if len(inputs) == 1 else ["I=H"] * all(m["I"] == m["H"] for m in members)
    varied = {"H": "hidden size", "B": "batch"}[axis]
    what = f"{CELLS[name]}, {members[0]['mode']}, by {varied}"
    return f"{what}\n{' '.join(fixed)}, {members[0]['dtype']}, {where}"


def static(table: Path, folder: Path) -> None:
    """What a step costs by its machine code, from the first table of static.py's document: cycles against H."""
    lines = table.read_text().split("## A step")[1].split("##")[0].splitlines()
    head, _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    phases = [(k, title) for k, title in enumerate(head) if title.startswith("bf16")]
    figure, panels = pyplot.subplots(1, len(phases), figsize=(8.4, 3.4), layout="constrained", sharey=True)
    target = table.stem.removeprefix("static-")
    figure.suptitle(
        f"One step of the resident kernels on {target}, bfloat16, 8 rows a program: lower is better\n"
        "predicted from the machine code: bars from the model's low bound to its high one; nothing was run",
        fontsize=10,
    )
    names = dict.fromkeys(row[0] for row in rows)
    for (k, title), axes in zip(phases, panels, strict=True):
        for n, cell in enumerate(names):
            found = [(int(row[1]), re.match(r"(\d+)-(\d+) ", row[k])) for row in rows if row[0] == cell]
            points = [(h, float(m[1]), float(m[2])) for h, m in found if m]
            if not points:
                continue
            aside = 2.0 * (n - (len(names) - 1) / 2)  # so that intervals do not lie on each other
            middle = [(low + high) / 2 for _, low, high in points]
            half = [(high - low) / 2 for _, low, high in points]
            name = CELLS[cell.replace("_", "-")] if k == phases[0][0] else None
            axes.errorbar([h + aside for h, *_ in points], middle, half, marker="o", ms=3, capsize=2, label=name)
        axes.set(xlabel="hidden size H", title=title.removeprefix("bf16 "))
        axes.set_xticks(list(dict.fromkeys(int(row[1]) for row in rows)))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="cycles a step", ylim=(0, None))
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
    timed, where = compare.by_case(rows), machine(content)
    single = {n: r for n, r in timed.items() if not next(iter(r.values()))["case"]["why"].startswith(SCALING)}
    with pyplot.rc_context(STYLE):
        stem = f"{options.file.stem}-"
        for peer, named in (("torch.nn", "torch.nn"), ("cell loop", "a loop over torch.nn's cell")):
            path = options.folder / f"{stem}{peer.replace(' ', '-')}.png"
            title = f"How many times as fast seqcells is as {named}\n{where}"
            label = "times as fast (bars to the right of 1: seqcells is faster)"
            rows_of(single, path, title, against(peer), label, OURS, True)
        title = f"Saved for backward, beyond input, weights and output: less is better\n{where}"
        label = "elements, in units of T*B*H"
        others = [p for p in PROVIDERS if p not in PARTS]
        rows_of(single, options.folder / f"{stem}memory.png", title, kept, label, others, False)
        for axis in ("H", "B"):
            scaling(timed, axis, options.folder / f"{stem}scaling.png", where)
        if options.static is not None:
            static(options.static, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

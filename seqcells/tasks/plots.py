"""Plots of training runs. They need matplotlib (the extra `examples`)."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cell import keys
from . import TASKS, files
from .base import definition
from .suite import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Color, marker and line width of each cell. Runs that agree overlap, so later ones are thinner. Others take turns.
CELLS = {
    "lstm": ("#1f77b4", "o", 3.0),
    "gru": ("#d95f02", "s", 1.6),
    "gru-before": ("#7b3294", "^", 1.2),
    "rnn": ("#2b8c4b", "D", 1.6),
}
OTHERS = [(f"C{n}", marker, 1.2) for marker in "vPX*" for n in range(10)]
SOLVED = "counts as solved"
DPI = 130
HIGHEST = 1000 / DPI  # inches: the height of a screen


def check(path: Path) -> None:
    """Raise ModuleNotFoundError without matplotlib, ValueError if it cannot draw in the format of path's suffix."""
    figure = _pyplot().figure()
    try:
        _drawn(figure, path)
    except Exception as error:
        raise ValueError(f"cannot draw {path}: {' '.join(str(error).split())}") from error


def learning_curves(outcomes: list[Outcome], how: str, path: Path) -> None:
    """Plot what runs measured against the sequences they were trained on, and, dashed, what counts as solved.

    For one case: test loss and accuracy side by side, with the verdicts below. For several: a panel for each, of the
    measurement that decides it. how: the recipe and the device, for the title.
    """
    cases: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        cases.setdefault((outcome.task, outcome.case), []).append(outcome)
    with _pyplot().rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure = _one(outcomes, how) if len(cases) == 1 else _several(cases, how)
        files.write(path, _drawn(figure, path))


def _one(outcomes: list[Outcome], how: str) -> Figure:
    first = outcomes[0]
    said = [f"{_name(o)}: {'solved' if o.solved else 'NOT solved'}: {o.text}" for o in outcomes]
    said = [line for text in said[:12] for line in textwrap.wrap(text, 150)]
    figure, panels = _pyplot().subplots(1, 2, figsize=(9, 3.9 + 0.15 * len(said)), layout="constrained")
    shows = TASKS[first.task].CASES[first.case].shows
    figure.suptitle(textwrap.fill(f"{first.task}, case {first.case}: {shows}", 110) + f"\n{how}", fontsize=10)
    for axes, measured in zip(panels, ("loss", "accuracy"), strict=True):
        _curves(axes, outcomes, measured)
        axes.set(xlabel="sequences trained on", ylabel=f"test {measured}")
        axes.legend()
    figure.supxlabel("\n".join(said), fontsize=7, x=0.01, ha="left")
    return figure


def _several(cases: dict[tuple[str, str], list[Outcome]], how: str) -> Figure:
    tasks = {task for task, _ in cases}
    columns = next(n for n in range(2, len(cases) + 1) if n * min(n, 4) >= len(cases))
    rows = -(-len(cases) // columns)
    size = (max(7.0, 2.1 * columns), min(0.9 + 1.9 * rows, HIGHEST))
    figure, grid = _pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    solved = sum(o.solved for outcomes in cases.values() for o in outcomes)
    total = sum(len(outcomes) for outcomes in cases.values())
    named = tasks.pop() if len(tasks) == 1 else "the task suite"
    figure.suptitle(f"{named}: {solved} of {total} runs solved ({how})", fontsize=10)
    for axes, ((task, case), outcomes) in zip(grid.flat, cases.items(), strict=False):
        needs = outcomes[0].needs
        measured = "accuracy" if "accuracy" in needs else "loss"
        _curves(axes, outcomes, measured)
        axes.set(title=f"case {case}" if named == task else f"{task}, {case}", ylabel=f"test {measured}")
    for axes in grid.flat[len(cases) :]:
        axes.remove()
    for axes in grid.flat[max(0, len(cases) - columns) : len(cases)]:  # those without a panel below
        axes.set_xlabel("sequences trained on")
    handles: dict[str, object] = {}
    for axes in figure.axes:
        handles |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = sorted(handles, key=lambda cell: (cell == SOLVED, [*CELLS, cell].index(cell)))
    figure.legend([handles[s] for s in shown], shown, frameon=False, ncols=6, loc="outside lower center")
    return figure


def _style(cell: str) -> tuple[str, str, float]:
    if cell in CELLS:
        return CELLS[cell]
    return OTHERS[keys().index(definition(cell).key) % len(OTHERS)]


def _curves(axes: Axes, outcomes: list[Outcome], measured: str) -> None:
    for o in outcomes:
        points = [(r.sequences, r.measured[measured]) for r in o.rows]
        first = o is next(other for other in outcomes if other.cell == o.cell)
        color, marker, width = _style(o.cell)
        (drawn,) = axes.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=width, markersize=3)
        drawn.set(zorder=2 + [*CELLS, o.cell].index(o.cell), label=o.cell if first else None)
    if (needed := outcomes[0].needs.get(measured)) is not None:
        axes.axhline(needed, color="black", linestyle="--", linewidth=1, label=SOLVED, zorder=1)
        at = axes.annotate(f"{needed:.4g}", (1, needed), (3, 0), ("axes fraction", "data"), "offset points")
        at.set(va="center", fontsize=7)
    axes.grid(alpha=0.3)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True, nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}")
    if measured == "accuracy":
        axes.set_ylim(-0.05, 1.05)
        if needed == 0:
            point = "flat at 0 is the point:\nso it counts as solved"
            axes.text(0.5, 0.5, point, ha="center", transform=axes.transAxes)
    else:
        plain_ticks(axes, "y")


def _name(outcome: Outcome) -> str:
    return f"{outcome.cell}, seed {outcome.seed}"


def plain_ticks(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks; leave it linear if its range is small."""
    from matplotlib import ticker

    axis = getattr(axes, f"{which}axis")
    values = [v for line in axes.get_lines() for v in getattr(line, f"get_{which}data")()]
    low, high = min(values), max(values)
    if low <= 0 or high < 2 * low:
        return
    getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1,) if high > 200 * low else (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _pyplot() -> Any:  # a module
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:  # also if it is installed but broken
        why = "" if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib" else f" ({error})"
        raise ModuleNotFoundError(f"pictures need matplotlib: pip install matplotlib{why}") from error
    matplotlib.use("Agg")
    return pyplot


def _drawn(figure: Figure, path: Path) -> bytes:
    """The figure in the format of path's suffix (PNG if it has none), and closed."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format=path.suffix[1:] or None, dpi=DPI)
    finally:
        _pyplot().close(figure)
    return content.getvalue()

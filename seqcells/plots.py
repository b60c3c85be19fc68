"""Pictures of training runs. Needs matplotlib (the extra `examples`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from . import files
from .training import Row


def check(path: Path) -> None:
    """Raise ModuleNotFoundError without matplotlib, ValueError if it cannot draw in the format of path's suffix."""
    figure = _pyplot().figure()
    try:
        _drawn(figure, path)
    except Exception as error:
        raise ValueError(f"cannot draw {path}: {' '.join(str(error).split())}") from error


def learning_curves(title: str, histories: dict[str, list[Row]], path: Path) -> None:
    """Test loss and accuracy against sequences seen, one line a run."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, rows in histories.items():
        seen = [r.sequences for r in rows]
        left.plot(seen, [r.measured["loss"] for r in rows], marker="o", markersize=3, label=name)
        right.plot(seen, [r.measured["accuracy"] for r in rows], marker="o", markersize=3, label=name)
    left.set(yscale="log", xlabel="sequences seen", ylabel="test loss", title=title)
    right.set(xlabel="sequences seen", ylabel="test accuracy", ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    files.write(path, _drawn(figure, path))


def _pyplot() -> Any:
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:  # also of one that is there, and broken
        why = "" if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib" else f" ({error})"
        raise ModuleNotFoundError(f"pictures need matplotlib: pip install matplotlib{why}") from error
    matplotlib.use("Agg")

    return pyplot


def _drawn(figure: Any, path: Path) -> bytes:
    """The figure in the format of path's suffix (PNG if it has none), and closed."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format=path.suffix[1:] or None, dpi=130)
    finally:
        _pyplot().close(figure)
    return content.getvalue()

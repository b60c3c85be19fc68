"""Pictures of training runs. Needs matplotlib (the extra `examples`)."""

from __future__ import annotations

from pathlib import Path

from .training import Row


def learning_curves(title: str, histories: dict[str, list[Row]], path: Path) -> None:
    """Test loss and accuracy against sequences seen, one line a run. Written at once or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, rows in histories.items():
        seen = [r.sequences for r in rows]
        left.plot(seen, [r.measured["loss"] for r in rows], marker="o", markersize=3, label=name)
        right.plot(seen, [r.measured["accuracy"] for r in rows], marker="o", markersize=3, label=name)
    left.set(yscale="log", xlabel="sequences seen", ylabel="test loss", title=title)
    right.set(xlabel="sequences seen", ylabel="test accuracy", ylim=(-0.02, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
    temporary.replace(path)

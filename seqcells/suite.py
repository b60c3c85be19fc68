"""Runs of the task suite: one with a progress bar and its verdict, all of them, and the table of what came out."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .progress import bar
from .tasks import TASKS
from .training import Row, Run, train


@dataclass(frozen=True)
class Outcome:
    """What a run came to. rows: its evaluations. seconds: of training and evaluation, over all sittings."""

    task: str
    case: str
    cell: str
    seed: int
    solved: bool
    text: str
    steps: int
    sequences: int
    seconds: float
    rows: list[Row]


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    task: ModuleType
    case: str
    cell: str
    seed: int
    recipe: Any

    @property
    def label(self) -> str:
        return f"{self.task.NAME}, case {self.case}, {self.cell}, seed {self.seed}"


def jobs(
    task: str | None = None,
    *,
    full: bool = False,
    cases: Iterable[str] | None = None,
    cells: Iterable[str] | None = None,
    seed: int | None = None,
) -> Iterator[Job]:
    """The runs of a task, or of all. cells None: those the case is judged with. seed None: 0, or in full all of them.

    ValueError for a case the task does not have.
    """
    for module in TASKS.values() if task is None else (TASKS[task],):
        wanted = list(module.CASES if cases is None else cases)
        for name in wanted:
            if name not in module.CASES:
                raise ValueError(f"{module.NAME} has no case {name!r}: expected one of {', '.join(module.CASES)}")
            case = module.CASES[name]
            seeds = (seed,) if seed is not None else case.seeds if full and task is None else (0,)
            for cell in cells or case.cells:
                for s in seeds:
                    yield Job(module, name, cell, s, case.full if full else case.quick)


def perform(
    job: Job,
    *,
    backend: str | None,
    device: str,
    dtype: torch.dtype | None,
    save: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Train and judge. save: the folder of checkpoints; resume: from the one there, if there is one."""
    run: Run = job.task.start(job.case, job.cell, job.recipe, job.seed, backend=backend, device=device, dtype=dtype)
    name = f"{job.task.NAME}-{job.case}-{job.cell}-{job.seed}.pt".replace(" ", "-")
    checkpoint = None if save is None else save / name
    if not quiet:
        print(f"\n{job.label}, on {device}")
    if resume and checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
        print(f"resumed after {run.unit} {run.done}")
    with bar(total=run.steps, initial=run.done, leave=False, unit=run.unit, desc=job.label) as progress:
        shown: list[str] = []

        def on_step(done: int, value: float) -> None:
            progress.set_postfix_str(" ".join([f"loss={value:.4f}", *shown]), refresh=False)
            progress.update(done - progress.n)

        def on_row(row: Row) -> None:
            if not quiet:
                if len(run.rows) == 1:
                    progress.write(heading(run.unit, row))
                progress.write(line(row))
            shown[:] = [f"accuracy={row.measured['accuracy']:.4f}"]

        train(run, on_step=on_step, on_row=on_row, checkpoint=checkpoint)
    run.model.eval()
    verdict = run.verdict()
    if not quiet:
        print("\n".join(run.lines()))
    print(f"{'solved' if verdict.solved else 'NOT solved'}{f' ({job.label})' if quiet else ''}: {verdict.text}")
    seconds = sum(row.seconds for row in run.rows)
    counts = run.done, run.sequences, seconds, run.rows
    return Outcome(job.task.NAME, job.case, job.cell, job.seed, verdict.solved, verdict.text, *counts)


def heading(unit: str, row: Row) -> str:
    names = "".join(f"  {name if name != 'loss' else 'test loss':>10}" for name in row.measured)
    return f"{unit:>6}  {'sequences':>9}  {'train loss':>10}{names}  {'seconds':>7}"


def line(row: Row) -> str:
    values = "".join(f"  {value:>10.4f}" for value in row.measured.values())
    return f"{row.step:>6}  {row.sequences:>9}  {row.train_loss:>10.4f}{values}  {row.seconds:>7.1f}"


def table(outcomes: list[Outcome]) -> str:
    """Markdown, a line a run."""
    lines = ["| task | case | cell | seed | solved | criterion and result | steps | sequences | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for o in outcomes:
        text = o.text.replace("|", "\\|")  # which would end the column
        start = f"| {o.task} | {o.case} | {o.cell} | {o.seed} | {'yes' if o.solved else '**no**'} | {text} "
        lines.append(start + f"| {o.steps} | {o.sequences} | {o.seconds:.0f} |")
    return "\n".join(lines)


def report(outcomes: list[Outcome], command: str, device: str) -> str:
    """The table with where it comes from."""
    cuda = torch.device(device).type == "cuda"
    machine = (
        torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}, {torch.get_num_threads()} thread"
    )
    solved, seconds = sum(o.solved for o in outcomes), sum(o.seconds for o in outcomes)
    return (
        f"# The task suite\n\nWritten by `{command}` on {time.strftime('%Y-%m-%d', time.gmtime())}: {machine}, "
        f"torch {torch.__version__}, Python {platform.python_version()}.\n"
        f"{solved} of {len(outcomes)} runs solved, {seconds / 60:.1f} minutes of training. Test data comes from a "
        f"stream of its own;\nthe last columns are the optimizer's steps (or epochs), the sequences "
        f"trained on and seconds.\n\n{table(outcomes)}\n"
    )


def write(path: Path, text: str) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def as_json(outcomes: list[Outcome]) -> str:
    return json.dumps([asdict(o) for o in outcomes], indent=1)

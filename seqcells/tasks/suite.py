"""Runs of the task suite: one with a progress bar and its verdict, or all of them; and the table of their outcomes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

from . import TASKS, files
from .base import AnyRecipe, Case, identity, runs
from .progress import bar
from .training import Row, Run, read_checkpoint, train


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. rows: its evaluations. seconds: of training and evaluation, before and after resuming.
    needs: the verdict's."""

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
    needs: dict[str, float]


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    task: ModuleType
    case: str
    cell: str
    seed: int
    recipe: AnyRecipe

    @property
    def label(self) -> str:
        return f"{self.task.NAME}, case {self.case}, {self.cell}, seed {self.seed}"

    def identity(self, dtype: torch.dtype | None) -> dict[str, str | int]:
        """The identity of the run. dtype None: the recipe's."""
        return identity(self.task.NAME, self.case, self.cell, self.recipe, self.seed, dtype or self.recipe.dtype)

    def checkpoint(self, folder: Path, dtype: torch.dtype | None) -> Path:
        """The path of its checkpoint. A digest of the identity in it keeps quick and full recipes apart."""
        digest = hashlib.sha256(json.dumps(self.identity(dtype)).encode()).hexdigest()[:8]
        name = f"{self.task.NAME}-{self.case}-{self.cell}-{self.seed}-{digest}.pt"
        return folder / name.replace(" ", "-")


def jobs(
    task: str | None = None,
    *,
    full: bool = False,
    cases: Iterable[str] | None = None,
    cells: Iterable[str] | None = None,
    seed: int | None = None,
) -> Iterator[Job]:
    """The runs of a task, or of all tasks. cells: the cells to run, in the cases that are for them; None: each case's.

    seed None: 0, or, if all tasks are run in full, every seed. ValueError for a case that the task lacks, and if no
    case has any of the cells.
    """
    wanted, cases, found = tuple(cells or ()), None if cases is None else tuple(cases), False
    for module, name, case in _cases(task, cases):
        seeds = (seed,) if seed is not None else case.seeds if full and task is None else (0,)
        for cell in [c for c in wanted or case.cells if runs(case, c)]:
            found = True
            for s in seeds:
                yield Job(module, name, cell, s, case.full if full else case.quick)
    if not found:
        raise ValueError(f"nothing to run: {'; '.join(left_out(task, cases=cases, cells=wanted))}")


def left_out(
    task: str | None = None, *, cases: Iterable[str] | None = None, cells: Iterable[str] | None = None
) -> list[str]:
    """Which of the given cases and cells `jobs` leaves out, and why; one line for each case."""
    wanted, lines = tuple(cells or ()), []
    for module, name, case in _cases(task, cases):
        if without := [cell for cell in wanted if not runs(case, cell)]:
            lines.append(f"{module.NAME}, case {name}, is for {', '.join(case.cells)}, not for {', '.join(without)}")
    return lines


def _cases(task: str | None, cases: Iterable[str] | None) -> Iterator[tuple[ModuleType, str, Case]]:
    for module in TASKS.values() if task is None else (TASKS[task],):
        for name in module.CASES if cases is None else cases:
            if name not in module.CASES:
                raise ValueError(f"{module.NAME} has no case {name!r}: expected one of {', '.join(module.CASES)}")
            yield module, name, module.CASES[name]


def check(jobs: Iterable[Job], save: Path, *, dtype: torch.dtype | None, resume: bool) -> None:
    """Check all checkpoints before the first job is trained.

    OSError if one cannot be written or read, or exists already and resume is False; ValueError if one cannot be
    resumed.
    """
    for job in jobs:
        path = job.checkpoint(save, dtype)
        if resume:
            with suppress(FileNotFoundError):
                read_checkpoint(path, job.identity(dtype))
        elif os.path.lexists(path):
            advice = "--resume continues from it; to start anew, remove it or choose another folder"
            raise FileExistsError(f"{path} is there already: {advice}")
        files.check(path)


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
    """Train and evaluate. save: the folder of checkpoints. resume: continue from the run's checkpoint, if it exists.

    Without resume an existing checkpoint is replaced: `check` refuses that earlier.
    """
    run: Run = job.task.start(job.case, job.cell, job.recipe, job.seed, backend=backend, device=device, dtype=dtype)
    checkpoint = None if save is None else job.checkpoint(save, dtype)
    if not quiet:
        print(f"\n{job.label}, on {device}")
    if resume and checkpoint is not None:
        try:
            run.load(checkpoint)
            print(f"resumed after {run.unit} {run.done}")
        except FileNotFoundError:
            if not quiet:
                print(f"starts from the beginning: there is no {checkpoint}")
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
    counts = run.done, run.sequences, seconds, run.rows, verdict.needs
    return Outcome(job.task.NAME, job.case, job.cell, job.seed, verdict.solved, verdict.text, *counts)


def heading(unit: str, row: Row) -> str:
    names = "".join(f"  {name if name != 'loss' else 'test loss':>10}" for name in row.measured)
    return f"{unit:>6}  {'sequences':>9}  {'train loss':>10}{names}  {'seconds':>7}"


def line(row: Row) -> str:
    values = "".join(f"  {value:>10.4f}" for value in row.measured.values())
    return f"{row.step:>6}  {row.sequences:>9}  {row.train_loss:>10.4f}{values}  {row.seconds:>7.1f}"


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table with a line for each run."""
    lines = ["| task | case | cell | seed | solved | criterion and result | steps | sequences | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for o in outcomes:
        text = o.text.replace("|", "\\|")  # which would end the column
        start = f"| {o.task} | {o.case} | {o.cell} | {o.seed} | {'yes' if o.solved else '**no**'} | {text} "
        lines.append(start + f"| {o.steps} | {o.sequences} | {o.seconds:.0f} |")
    return "\n".join(lines)


def report(outcomes: list[Outcome], command: str, device: str) -> str:
    """The table, and how it was made."""
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
    """Write the whole file or nothing: see files.write."""
    files.write(path, text.encode())


def as_json(outcomes: list[Outcome]) -> str:
    return json.dumps([asdict(o) for o in outcomes], indent=1)

"""Every cell of seqcells.cells on the CPU: which of the five stories it solves, and its time beside autograd's loop.

    python benchmarks/gallery.py [--seconds 2] [--table FILE]      # make gallery
    python benchmarks/gallery.py --static sm_90 [--table FILE]     # compiled, not run

Stories: quick recipes of one case of each task (see seqcells/tasks), seed 0. Cells other than LSTM and GRU take the
GRU's recipes; per-step inputs are 1. Times: the reference's, which autograd differentiates step by step, divided by
those of "auto", training / inference, medians of interleaved samples. Below, times of layers with dropout inside the
recurrence.

Static: the kernels that the plan would launch in bfloat16, compiled for a GPU. Nothing is run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure

import seqcells
from seqcells import cells, drawn
from seqcells.cell import named
from seqcells.kernels import devices, report
from seqcells.tasks import suite

STORIES = {
    "count-ones": "strings of 20",
    "count-ones-regression": "goal",
    "memorize": "6",
    "temporal-order": "order",
    "echo": "5-2",
}
T, B, I, H = 100, 16, 64, 64  # noqa: E741
TEXT = """# The cells, on the CPU

Written by `python benchmarks/gallery.py` {made}.

Stories ({cases}):
whether the quick recipe solved it, and if not, the accuracy at its end. LSTM and GRU have recipes of their own. The
others take the GRU's, in "temporal-order" with gates biased so that the state lasts (seqcells/tasks/base.py). They were
tuned for none of these, so a "no" says little about a cell.

Times: autograd's loop over the step, divided by "auto", training / inference, T=100 B=16 I=64 H=64.

{lines}

Dropout inside the recurrence, the same times in training:

{dropouts}
"""


DROPOUTS: dict[str, dict[str, float]] = {
    "none": {},
    "recurrent_dropout": {"recurrent_dropout": 0.25},
    "candidate_dropout": {"candidate_dropout": 0.25},
    "zoneout": {"zoneout": 0.1},
    "weight_dropout": {"weight_dropout": 0.5},
    "all four": {"recurrent_dropout": 0.25, "candidate_dropout": 0.25, "zoneout": 0.1, "weight_dropout": 0.5},
}
STATIC = """# The cells' kernels, compiled for {target}

Written by `python benchmarks/gallery.py --static {target}` with Triton {version}. bfloat16; nothing was run.

For each size the plan's schedule, forward in training / backward: cycles of a step (of `stepwise`: of one turn of a
launch's inner loop), as a model of latencies predicts them from the machine code (kernels/latency.py), low to high;
registers a thread. "spills" if a kernel does; "-" where no schedule fits.

{lines}
"""
SIZES = ((16, 64), (16, 256), (64, 1024))  # batch and hidden size


def compiled(cell: str, target: str, batch: int, hidden: int) -> str:
    """What a cell's kernels of that size cost, in training."""
    found: list[str] = []
    before = ""
    for direction in ("train", "backward"):
        case = report.Case(cell, direction, "bf16", batch, hidden, target)
        try:
            rows = report.measure(case)
        except ValueError:  # no schedule fits
            return "-"
        cycles = [f"{r.cycles.low:.0f}-{r.cycles.high:.0f}" for r in rows if r.cycles is not None]
        spills = "" if all(r.good for r in rows) else ", spills"
        schedule = f"{rows[0].schedule}: " * (rows[0].schedule != before)
        before = rows[0].schedule
        found.append(f"{schedule}{' + '.join(cycles) or '-'} ({max(r.registers for r in rows)}{spills})")
    return " / ".join(found)


def static(target: str, names: Sequence[str]) -> str:
    """The table of STATIC."""
    masked = [named(cell) for cell in ("lstm", "gru") if cell in names]
    with_masks = [drawn.dropped(cell, drawn.every_mask(cell)).key for cell in masked]
    lines = ["| cell |" + "".join(f" B={b} H={h} |" for b, h in SIZES), f"|---|{'---|' * len(SIZES)}"]
    for cell in (*names, *with_masks):
        lines.append(f"| {cell} | {' | '.join(compiled(cell, target, b, h) for b, h in SIZES)} |")
        print(lines[-1], flush=True)
    return STATIC.format(target=target, version=triton.__version__, lines="\n".join(lines))


def story(task: str, case: str, cell: str) -> str:
    """Whether a cell solves a case; if not, its accuracy."""
    (job,) = suite.jobs(task, cases=[case], cells=[cell])
    outcome = suite.perform(job, backend=None, device="cpu", dtype=None, quiet=True)
    return "yes" if outcome.solved else f"no ({outcome.rows[-1].measured['accuracy']:.2f})"


def ratio(cell: str, training: bool, seconds: float, **dropout: float) -> float:
    """The time of autograd's loop divided by that of "auto"."""
    torch.manual_seed(0)
    x = torch.randn(T, B, I)
    inputs = {name: torch.rand(T, B) for name in getattr(cells, cell).inputs}

    def work(backend: str) -> Callable[[], object]:
        layer = seqcells.Recurrent(cell, I, H, backend=backend, **dropout)
        parameters = list(layer.parameters())

        def run() -> object:
            with torch.set_grad_enabled(training):
                y = layer(x, **inputs)[0]
                return torch.autograd.grad(y, parameters, torch.ones_like(y)) if training else y

        return run

    runs = {backend: work(backend) for backend in ("reference", "auto")}
    found = measure.interleaved(runs, x.device, seconds)
    return median(found["reference"]) / median(found["auto"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each pair of times; 0: once")
    parser.add_argument("--cell", nargs="+", choices=cells.__all__, default=cells.__all__)
    parser.add_argument("--story", nargs="*", choices=STORIES, default=list(STORIES))
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--static", choices=devices.KNOWN, metavar="TARGET", help="compile for that GPU instead")
    options = parser.parse_args()
    if options.static:
        text = static(options.static, options.cell)
        if options.table:
            suite.write(options.table, text)
        return
    torch.set_num_threads(1)
    lines = [f"| cell | {' | '.join(options.story)} | times |", f"|---|{'---|' * len(options.story)}---:|"]
    for cell in options.cell:
        times = " / ".join(f"{ratio(cell, training, options.seconds):.2f}" for training in (True, False))
        told = [story(task, STORIES[task], cell) for task in options.story]
        lines.append(f"| {cell} | {' | '.join([*told, times])} |")
        print(lines[-1], flush=True)
    dropouts = ["| | lstm | gru |", "|---|---:|---:|"]
    for name, asked in DROPOUTS.items():
        times = (f"{ratio(cell, True, options.seconds, **asked):.2f}" for cell in ("lstm", "gru"))
        dropouts.append(f"| {name} | {' | '.join(times)} |")
        print(dropouts[-1], flush=True)
    if options.table:
        cases = ", ".join(f"{task} {STORIES[task]!r}" for task in options.story)
        made = f"on {time.strftime('%Y-%m-%d', time.gmtime())}: one thread, torch {torch.__version__}"
        suite.write(
            options.table, TEXT.format(made=made, cases=cases, lines="\n".join(lines), dropouts="\n".join(dropouts))
        )


if __name__ == "__main__":
    main()

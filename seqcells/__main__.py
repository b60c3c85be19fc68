"""python -m seqcells info | check | explain | tasks | run"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import seqcells

from . import backends, explanation, precisions, reference
from .tasks import TASKS
from .tasks.base import CELLS

if TYPE_CHECKING:
    from .suite import Outcome

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(options: argparse.Namespace) -> str:
    """The device asked for, or the default. RuntimeError if it is not there."""
    device = options.device or _default_device()
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {device}: no CUDA device is available")
    return device


def info(_: argparse.Namespace) -> int:
    """What is installed and which backends there are."""
    print(f"seqcells {seqcells.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if backends.installed():
        import triton

        print(f"triton {triton.__version__}{', interpreting' if backends.interpreted() else ''}")
    else:
        print("triton not installed: pip install triton (Linux)")
    print(f"device {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}")
    device = torch.device(_default_device())
    for cell in reference.CELLS:
        chosen = explanation.explain(cell, batch=32, hidden_size=128, device=device)
        print(f"{cell:<11} {chosen.backend:<9} because {chosen.why}")
    return 0


def check(options: argparse.Namespace) -> int:
    """Parity of the kernels with the reference."""
    device = _device(options)
    if not backends.installed():
        print("the kernels need triton: pip install triton (Linux)", file=sys.stderr)
        return 1
    if torch.device(device).type == "cpu" and not backends.interpreted():
        # Triton reads this when it is imported, which has happened: start again.
        command = [sys.executable, "-m", "seqcells", "check", "--device", device]
        command += [a for cell in options.cell or [] for a in ("--cell", cell)]
        command += [a for dtype in options.dtype or [] for a in ("--dtype", dtype)]
        sys.stdout.flush()
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    from . import check as checking
    from .progress import bar

    where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "Triton's interpreter, CPU"
    print(f"largest relative errors against the float64 reference ({where}):\n")
    results = []
    kinds = checking.kinds(device, options.dtype)
    count = len(options.cell or reference.CELLS) * len(backends.SCHEDULES) * len(kinds)
    with bar(total=count, desc="check") as progress:
        for result in checking.sweep(device, options.cell, options.dtype):
            results.append(result)
            progress.update()
    print(checking.table(results))
    wrong = [r for r in results if not r.good]
    print(f"\n{len(results) - len(wrong)} of {len(results)} within tolerance")
    return 1 if wrong else 0


def explain(options: argparse.Namespace) -> int:
    """Which backend and plan a shape gets, and why."""
    found = explanation.explain(
        options.cell.replace("-", "_"),
        batch=options.batch,
        hidden_size=options.hidden,
        dtype=DTYPES[options.dtype],
        device=options.device or _default_device(),
        steps=options.steps,
        resets=options.resets,
        lengths=options.lengths,
        grad=not options.inference,
        backend=options.backend,
        precision=options.precision,
    )
    print(found)
    for direction, plan in (("forward", found.plan), ("backward", found.backward)):
        if plan is not None:
            shown = {name: value for name, value in asdict(plan).items() if name != "why"}
            print(f"\n{direction}")
            for name, value in shown.items():
                print(f"  {name:<14} {value}")
    return 0


def tasks(_: argparse.Namespace) -> int:
    """The task suite."""
    for name, task in TASKS.items():
        print(f"{name}: {task.SHOWS}")
        for case, what in task.CASES.items():
            print(f"    --case {case!r:<18} {what.shows} ({', '.join(what.cells)})")
    return 0


def run(options: argparse.Namespace) -> int:
    """Train and judge a task, or all of them."""
    from . import suite

    device = _device(options)
    if torch.device(device).type == "cpu":
        # Tensors this small gain nothing from a second thread, and lose much where cores are busy.
        torch.set_num_threads(1)
    if options.all == (options.task is not None):
        raise ValueError("expected a task or --all, one of them")
    if options.resume and not options.save:
        raise ValueError("--resume needs --save DIR, where the checkpoints are")
    wanted = list(
        suite.jobs(options.task, full=options.full, cases=options.case, cells=options.cell, seed=options.seed)
    )
    dtype = DTYPES[options.dtype] if options.dtype else None
    save = Path(options.save) if options.save else None
    _check_results(options)
    if save is not None:
        suite.check(wanted, save, dtype=dtype, resume=options.resume)
    again = f"--save {options.save} --resume goes on from the last checkpoint, if there is one"
    outcomes = []
    try:
        for job in wanted:
            outcomes.append(
                suite.perform(
                    job,
                    backend=options.backend,
                    device=device,
                    dtype=dtype,
                    save=save,
                    resume=options.resume,
                    quiet=options.all,
                )
            )
        _write_results(options, outcomes, device)
    except KeyboardInterrupt:
        print(f"interrupted; {again if save else 'nothing was saved'}", file=sys.stderr)
        return 130
    except OSError as error:
        raise OSError(f"{error}; then {again}" if save else str(error)) from error
    return 0 if all(o.solved for o in outcomes) else 1


def _check_results(options: argparse.Namespace) -> None:
    """Raise, before anything is trained, if a file that `run` is to write at its end could not be written."""
    from . import files, plots

    for name in (options.json, options.table, options.plot):
        if name:
            files.check(Path(name))
    if options.plot:
        plots.check(Path(options.plot))


def _write_results(options: argparse.Namespace, outcomes: list[Outcome], device: str) -> None:
    """The table on the terminal, and the files asked for."""
    from . import plots, suite

    if options.all:
        print("\n" + suite.table(outcomes))
    if options.json:
        suite.write(Path(options.json), suite.as_json(outcomes))
    if options.table:
        command = " ".join(["python -m seqcells", *options.command_line])
        suite.write(Path(options.table), suite.report(outcomes, command, device))
    if options.plot:
        histories = {f"{o.case}, {o.cell}, {o.seed}": o.rows for o in outcomes}
        plots.learning_curves(options.task or "all tasks", histories, Path(options.plot))
        print(f"plot: {options.plot}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqcells", description=seqcells.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__).set_defaults(call=info)
    commands.add_parser("tasks", help=tasks.__doc__).set_defaults(call=tasks)

    p = commands.add_parser("check", help=check.__doc__)
    p.add_argument("--device", help="cpu (Triton's interpreter) or cuda; default: cuda if there is one")
    p.add_argument("--cell", action="append", choices=list(reference.CELLS), help="only this cell (may be repeated)")
    p.add_argument(
        "--dtype", action="append", choices=[*DTYPES, "tf32", "tf32x3"], help="only this one (may be repeated)"
    )
    p.set_defaults(call=check)

    p = commands.add_parser("explain", help=explain.__doc__)
    p.add_argument("cell", choices=[n.replace("_", "-") for n in reference.CELLS])
    p.add_argument("--batch", type=int, required=True)
    p.add_argument("--hidden", type=int, required=True)
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", help="cpu, cuda, or one that need not be present, as sm_90, H200 or L4")
    p.add_argument("--steps", type=int, help="of how many steps; default: many")
    p.add_argument("--resets", action="store_true", help="with a reset mask")
    p.add_argument("--lengths", action="store_true", help="rows of different lengths")
    p.add_argument("--inference", action="store_true", help="without gradients")
    p.add_argument("--backend")
    p.add_argument(
        "--precision", choices=precisions.PRECISIONS, help="of float32 products; default: PyTorch's switches"
    )
    p.set_defaults(call=explain)

    p = commands.add_parser("run", help=run.__doc__)
    p.add_argument("task", nargs="?", choices=TASKS)
    p.add_argument("--all", action="store_true", help="every task, case and cell, and with --full every seed")
    p.add_argument("--case", action="append", metavar="K", help="only this case (may be repeated); see tasks")
    p.add_argument("--cell", nargs="+", choices=CELLS, help="default: those the case is judged with")
    p.add_argument("--backend", help="auto, triton, aten, loop or reference")
    p.add_argument("--device", help="default: cuda if there is one")
    p.add_argument("--dtype", choices=["float32", "float64"], help="default: the recipe's")
    p.add_argument("--seed", type=int, help="default: 0; with --all --full every seed of the case")
    p.add_argument("--full", action="store_true", help="the full recipe and criterion")
    p.add_argument("--json", metavar="FILE", help="outcomes with every evaluation")
    p.add_argument("--table", metavar="FILE", help="outcomes as Markdown")
    p.add_argument("--plot", metavar="FILE", help="loss and accuracy against sequences seen")
    p.add_argument(
        "--save", metavar="DIR", help="write a checkpoint there at each evaluation; replaces none without --resume"
    )
    p.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints in --save DIR, where there are some"
    )
    p.set_defaults(call=run)

    options = parser.parse_args(argv)
    options.command_line = sys.argv[1:] if argv is None else argv
    try:
        return options.call(options)
    except (ValueError, RuntimeError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""The command line: python -m seqcells info | check | explain | tune | tasks | run"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import seqcells

from .. import backends, checks, explanation, precisions, testing, tuning, verdicts
from ..cell import Cell, named
from ..kernels.devices import KNOWN
from ..kernels.registry import BUILT_IN
from ..verdicts import VERDICTS
from ..verification import CURRENT
from . import TASKS, files, plots, suite
from .base import CELLS, definition
from .progress import bar

# torch's names of dtypes (and of two precisions), and the aliases of each.
DTYPES = {
    "float64": ("double", "fp64"),
    "float32": ("float", "fp32"),
    "float16": ("half", "fp16"),
    "bfloat16": ("bf16",),
    "tf32": (),
    "tf32x3": (),
}


def _dtype(*allowed: str) -> Callable[[str], str]:
    """The type of an option: one of some names in DTYPES, or an alias of one, in any case."""

    def named(text: str) -> str:
        given = text.lower().removeprefix("torch.")
        found = next((name for name, others in DTYPES.items() if given in (name, *others)), given)
        if found not in allowed:
            shown = (f"{name} ({', '.join(DTYPES[name])})" if DTYPES[name] else name for name in allowed)
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(shown)}, got {text!r}")
        return found

    return named


def _cell(text: str) -> str:
    """The type of an option: the name of a cell, in any case, with - or _."""
    return text.lower().replace("_", "-")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(options: argparse.Namespace) -> str:
    """The device in options, or the default. ValueError if there is no such device, RuntimeError if not here."""
    given = options.device or _default_device()
    try:
        device = torch.device(given.lower())
    except RuntimeError:
        expected = "expected cpu, cuda, cuda:1 or another of torch's devices that is there"
        raise ValueError(f"unknown device {given!r}: {expected}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {given}: no CUDA device is available")
    try:
        torch.empty(1, device=device)
    except Exception as error:
        raise RuntimeError(f"--device {given}: {str(error).splitlines()[0]}") from error
    return str(device)


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
    for cell in BUILT_IN:
        chosen = explanation.explain(cell, batch=32, hidden_size=128, device=device)
        print(f"{cell:<11} {chosen.backend:<9} because {chosen.why}")
    print(f"verification: {CURRENT.policy}; the verdicts are in {verdicts.folder() or 'memory'}")
    file = verdicts.path(device, VERDICTS) if backends.installed() else None
    for key, verdict in verdicts.read(file, VERDICTS).items():
        if not verdict.good:
            print(f"wrong: {key}: its {verdict.tensor} is {verdict.worst:.1f} times as far off as is allowed")
    return 0


def check(options: argparse.Namespace) -> int:
    """Parity of the kernels with the reference."""
    device = _device(options)
    if not backends.installed():
        print("the kernels need triton: pip install triton (Linux)", file=sys.stderr)
        return 1
    if torch.device(device).type == "cpu" and not backends.interpreted():
        # Triton reads this when it is imported, which has already happened: restart the process.
        command = [sys.executable, "-m", "seqcells", "check", "--device", device]
        command += [a for cell in options.cell or [] for a in ("--cell", cell)]
        command += [a for dtype in options.dtype or [] for a in ("--dtype", dtype)]
        sys.stdout.flush()
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    where = "Triton's interpreter, CPU: up to two minutes a cell"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    kinds = testing.kinds(device, options.dtype)
    cells = [_found(name) for name in options.cell or BUILT_IN]
    print(f"largest relative errors against the float64 reference ({where}):\n")
    results = []
    with bar(total=len(cells) * len(testing.BACKENDS) * len(kinds), desc="check") as progress, testing.poisoned():
        for result in testing.sweep(device, cells, options.dtype):
            results.append(result)
            progress.update()
    print(testing.table(results))
    wrong = [r for r in results if not r.good]
    print(f"\n{len(results) - len(wrong)} of {len(results)} within tolerance")
    if options.cell and torch.float64 in kinds and not wrong:
        for cell in cells:
            testing.derivatives(cell, device)
        print("gradcheck and gradgradcheck pass")
    return 1 if wrong else 0


def _found(name: str) -> Cell:
    """The cell of that name; of FILE.py:NAME or MODULE:NAME, the one defined there."""
    where, _, name = name.rpartition(":")
    if not where:
        try:
            return named(name.replace("-", "_"))
        except ValueError as error:
            raise ValueError(f"{error}; or one of your own, as FILE.py:NAME") from None
    made = runpy.run_path(where) if where.endswith(".py") else vars(importlib.import_module(where))
    if not isinstance(made.get(name), Cell):
        raise ValueError(f"--cell {where}:{name}: there is no cell {name!r} in {where}")
    return made[name]


def _of_task(text: str) -> str:
    """The type of an option: what the tasks call a cell. One that is defined in a file is then known by its name."""
    if (known := _cell(text)) in CELLS:
        return known
    try:
        return _found(text if ":" in text else known).name
    except (ValueError, OSError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{error}; or one of {', '.join(CELLS)}") from None


def explain(options: argparse.Namespace) -> int:
    """Which backend and plan a shape gets, and why."""
    found = explanation.explain(
        _found(options.cell if ":" in options.cell else options.cell.lower()),
        batch=options.batch,
        hidden_size=options.hidden,
        dtype=getattr(torch, options.dtype),
        device=options.device or _default_device(),
        layers=options.layers,
        groups=2 if options.bidirectional else 1,
        steps=options.steps,
        resets=options.resets,
        lengths=options.lengths,
        grad=not options.inference,
        backend=options.backend,
        precision=options.precision,
    )
    print(found)
    return 0


def tune(options: argparse.Namespace) -> int:
    """Measure which backend is the fastest for a layer, for "auto" to use from now on."""
    if options.clear:
        tuning.clear()
        print("what was measured on this machine is forgotten")
        return 0
    for name in ("cell", "hidden", "batch"):
        if getattr(options, name) is None:
            raise ValueError(f"expected --{name}, or --clear")
    for name in ("hidden", "batch", "input", "steps", "layers"):
        if getattr(options, name) is not None:
            checks.integer(f"--{name}", getattr(options, name), least=1)
    device, dtype = _device(options), getattr(torch, options.dtype)
    cell, width = _found(options.cell if ":" in options.cell else options.cell.lower()), options.input or options.hidden
    both = {"num_layers": options.layers, "bidirectional": options.bidirectional, "device": device, "dtype": dtype}
    layer = seqcells.Recurrent(cell, width, options.hidden, precision=options.precision, **both)
    size = options.steps, options.batch
    x = torch.zeros(*size, width, device=device, dtype=dtype)
    inputs = {name: x.new_zeros(size) for name in cell.inputs}
    with torch.set_grad_enabled(not options.inference):
        tuned = tuning.tune(layer, x, **inputs)
    print(tuned)
    if any(m.medians for m in tuned.measurements):
        print(f"\nstored in {verdicts.folder() or 'memory, for no longer than this command'}")
    return 0


def tasks(_: argparse.Namespace) -> int:
    """The task suite."""
    for name, task in TASKS.items():
        print(f"{name}: {task.SHOWS}")
        for case, what in task.CASES.items():
            print(f"    --case {case!r:<18} {what.shows} ({', '.join(what.cells)})")
    return 0


def run(options: argparse.Namespace) -> int:
    """Train and evaluate a task, or all of them."""
    device = _device(options)
    if torch.device(device).type == "cpu":
        # Tensors this small gain nothing from a second thread, and lose much if cores are busy.
        torch.set_num_threads(1)
    if options.all == (options.task is not None):
        raise ValueError("expected a task or --all, one of them")
    if options.resume and not options.save:
        raise ValueError("--resume needs --save DIR, where the checkpoints are")
    cases, cells = options.case, options.cell
    wanted = list(suite.jobs(options.task, full=options.full, cases=cases, cells=cells, seed=options.seed))
    dtype = getattr(torch, options.dtype) if options.dtype else None
    save = Path(options.save) if options.save else None
    _check_results(options)
    _check_backend(wanted, device, options.backend, dtype)
    if save is not None:
        suite.check(wanted, save, dtype=dtype, resume=options.resume)
    for line in suite.left_out(options.task, cases=cases, cells=cells):
        print(f"left out: {line}")
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


def _check_backend(wanted: list[suite.Job], device: str, backend: str | None, dtype: torch.dtype | None) -> None:
    """Raise, before training, if the backend cannot run the cell of a job on the device."""
    for job in wanted:
        cell, of = definition(job.cell), dtype or job.recipe.dtype
        try:
            explanation.explain(cell, batch=1, hidden_size=1, dtype=of, device=device, backend=backend)
        except RuntimeError as error:
            raise RuntimeError(f"{job.label}: {error}") from None


def _check_results(options: argparse.Namespace) -> None:
    """Raise, before training, if a file that `run` writes at the end could not be written."""
    for name in (options.json, options.table, options.plot):
        if name:
            files.check(Path(name))
    if options.plot:
        plots.check(Path(options.plot))


def _write_results(options: argparse.Namespace, outcomes: list[suite.Outcome], device: str) -> None:
    """Print the table and write the files of options."""
    if options.all:
        print("\n" + suite.table(outcomes))
    if options.json:
        suite.write(Path(options.json), suite.as_json(outcomes))
    if options.table:
        command = " ".join(["python -m seqcells", *options.command_line])
        suite.write(Path(options.table), suite.report(outcomes, command, device))
    if options.plot:
        recipe = f"{'full' if options.full else 'quick'} recipe, {device}"
        plots.learning_curves(outcomes, recipe, Path(options.plot))
        print(f"plot: {options.plot}")


Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_check(commands: Commands) -> None:
    p = commands.add_parser("check", help=check.__doc__)
    p.add_argument("--device", help="cpu (Triton's interpreter) or cuda; default: cuda if there is one")
    where = "only this cell, by its name or as FILE.py:NAME or MODULE:NAME (may be repeated); with gradcheck"
    p.add_argument("--cell", action="append", help=where)
    p.add_argument("--dtype", action="append", type=_dtype(*DTYPES), help="only this one (may be repeated)")
    p.set_defaults(call=check)


def _add_explain(commands: Commands) -> None:
    p = commands.add_parser("explain", help=explain.__doc__)
    p.add_argument("cell", help="by its name or as FILE.py:NAME or MODULE:NAME")
    p.add_argument("--batch", type=int, required=True)
    p.add_argument("--hidden", "--hidden-size", type=int, required=True)
    dtype = _dtype("float64", "float32", "float16", "bfloat16")
    p.add_argument("--dtype", type=dtype, default="float32", help="default: float32; short names too, as bf16")
    p.add_argument("--device", help=f"cpu, cuda, or one that need not be present: {', '.join(KNOWN)}")
    p.add_argument("--steps", type=int, help="of how many steps; default: many")
    p.add_argument("--layers", type=int, default=1, help="default: 1")
    p.add_argument("--bidirectional", action="store_true")
    p.add_argument("--resets", action="store_true", help="with a reset mask")
    p.add_argument("--lengths", action="store_true", help="rows of different lengths")
    p.add_argument("--inference", action="store_true", help="without gradients")
    p.add_argument("--backend", type=str.lower)
    more = "of float32 products; default: PyTorch's switches"
    p.add_argument("--precision", type=str.lower, choices=precisions.PRECISIONS, help=more)
    p.set_defaults(call=explain)


def _add_tune(commands: Commands) -> None:
    p = commands.add_parser("tune", help=tune.__doc__)
    p.add_argument("--cell", help="by its name or as FILE.py:NAME or MODULE:NAME")
    p.add_argument("--hidden", "--hidden-size", type=int, help="the hidden size")
    p.add_argument("--batch", type=int, help="the result holds for batches up to the next power of two")
    p.add_argument("--input", type=int, metavar="I", help="the input size; default: the hidden size")
    p.add_argument("--steps", type=int, default=128, help="default: 128; matters on the CPU only")
    dtype = _dtype("float64", "float32", "float16", "bfloat16")
    p.add_argument("--dtype", type=dtype, default="float32", help="default: float32; short names too, as bf16")
    p.add_argument("--device", help="default: cuda if there is one")
    p.add_argument("--layers", type=int, default=1, help="default: 1")
    p.add_argument("--bidirectional", action="store_true")
    p.add_argument("--inference", "--infer", action="store_true", help="without gradients")
    more = "of float32 products; default: PyTorch's switches"
    p.add_argument("--precision", type=str.lower, choices=precisions.PRECISIONS, help=more)
    p.add_argument("--clear", action="store_true", help="forget what was measured on this machine, and exit")
    p.set_defaults(call=tune)


def _add_run(commands: Commands) -> None:
    p = commands.add_parser("run", help=run.__doc__)
    p.add_argument("task", nargs="?", type=str.lower, choices=TASKS)
    p.add_argument("--all", action="store_true", help="every task, case and cell, and with --full every seed")
    p.add_argument("--case", action="append", metavar="K", help="only this case (may be repeated); see tasks")
    more = f"{', '.join(CELLS)}, or any other as for check; only in cases that are for it; default: each case's"
    p.add_argument("--cell", nargs="+", type=_of_task, metavar="CELL", help=more)
    p.add_argument("--backend", type=str.lower, help="auto, triton, aten, loop or reference")
    p.add_argument("--device", help="default: cuda if there is one")
    p.add_argument("--dtype", type=_dtype("float32", "float64"), help="default: the recipe's")
    p.add_argument("--seed", type=int, help="default: 0; with --all --full every seed of the case")
    p.add_argument("--full", action="store_true", help="the full recipe and criterion")
    p.add_argument("--json", metavar="FILE", help="outcomes with every evaluation")
    p.add_argument("--table", metavar="FILE", help="outcomes as Markdown")
    p.add_argument("--plot", metavar="FILE", help="loss and accuracy against sequences trained on")
    more = "write a checkpoint there at each evaluation; replaces none without --resume"
    p.add_argument("--save", metavar="DIR", help=more)
    more = "continue from the checkpoints in --save DIR, where there are some"
    p.add_argument("--resume", action="store_true", help=more)
    p.set_defaults(call=run)


def main(argv: list[str] | None = None) -> int:
    """Run a command; argv: its arguments, None: the process's. Returns the exit status; errors are one line each."""
    parser = argparse.ArgumentParser(prog="python -m seqcells", description=seqcells.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__).set_defaults(call=info)
    commands.add_parser("tasks", help=tasks.__doc__).set_defaults(call=tasks)
    for add in (_add_check, _add_explain, _add_tune, _add_run):
        add(commands)
    options = parser.parse_args(argv)
    options.command_line = sys.argv[1:] if argv is None else argv
    try:
        return options.call(options)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

"""The task suite, every task and case alike: solved, the kernels following the reference, stopped and resumed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import seqcells
from seqcells import suite
from seqcells.__main__ import main
from seqcells.tasks import TASKS, count_ones, temporal_order
from seqcells.tasks.base import CELLS
from seqcells.training import read_checkpoint, train

ROOT = Path(__file__).parents[1]
# What makes a case small enough for the interpreter: the model's form and the recipe's other values stay.
SMALL = {
    "count-ones": {"length": 6, "hidden": 5, "training": 24, "test": 16, "batch": 8, "epochs": 4},
    "count-ones-regression": {"length": 4, "lengths": (5, 6), "long": (7, 8), "batch": 4},
    "memorize": {"string": "ABA", "hidden": 6, "epochs": 40},
    "temporal-order": {"batch": 4, "test": 4, "hidden": 6, "window": 8},
    "echo": {"inputs": 5, "hidden": 5, "symbols": 7, "batch": 4, "windows": 3, "test": 6},
}
# The strings of temporal-order are 110 long by definition: for the kernels every eleventh symbol does.
LONG = temporal_order.strings
EACH = [(task, case) for task in TASKS for case in TASKS[task].CASES]


def small(task, case):
    case = TASKS[task].CASES[case]
    names = set(type(case.quick).__dataclass_fields__)
    return replace(case.quick, **{k: v for k, v in SMALL[task].items() if k in names})


def begin(task, case, cell, backend=None, seed=0, dtype=None):
    torch.manual_seed(99)  # of no consequence: a run seeds itself
    recipe = small(task, case)
    return TASKS[task].start(case, cell, recipe, seed, backend=backend, device=DEVICE, dtype=dtype)


def thinned(count, generator):
    symbols, classes = LONG(count, generator)
    return symbols[:, ::11], classes


def taking_turns():
    """Every task with every cell, its cases by turns; the other cases behind `slow`."""
    for task in TASKS:
        cases = list(TASKS[task].CASES)
        for turn, cell in enumerate(CELLS):
            for case in cases:
                marks = () if case == cases[turn % len(cases)] else pytest.mark.slow
                yield pytest.param(task, case, cell, marks=marks, id=f"{task}-{case}-{cell}".replace(" ", "-"))


@pytest.mark.parametrize(("task", "case", "cell"), list(taking_turns()))
def test_ten_steps_with_the_kernels_follow_the_reference(task, case, cell, monkeypatch):
    monkeypatch.setattr(temporal_order, "strings", thinned)
    reference, fused = (begin(task, case, cell, backend) for backend in ("reference", "triton"))
    for step in range(10):
        expected, got = (run.step()[0].item() for run in (reference, fused))
        for run in (reference, fused):
            run.done += 1
            if run.schedule is not None:
                run.schedule.step()
        assert math.isclose(expected, got, rel_tol=1e-3, abs_tol=1e-4), (step, expected, got)
    # What was learnt on one backend is as good on the other.
    fused.model.load_state_dict(reference.model.state_dict())
    fused.restore(reference.extra())
    with torch.no_grad():
        expected, got = reference.measure(), fused.measure()
    assert expected.keys() == got.keys() and {"loss", "accuracy"} <= got.keys()
    for name, value in expected.items():
        assert math.isclose(got[name], value, rel_tol=1e-4, abs_tol=1e-5), name


def label(job):
    return f"{job.task.NAME}-{job.case}-{job.cell}".replace(" ", "-")


def solve(job, dtype=None):
    outcome = suite.perform(job, backend=None, device=DEVICE, dtype=dtype, quiet=True)
    assert outcome.solved, outcome.text


@pytest.mark.parametrize(
    "job",
    [pytest.param(j, marks=[pytest.mark.slow] * (j.cell == "gru-before"), id=label(j)) for j in suite.jobs()],
)
def test_quick_is_solved(job):
    solve(job)


@pytest.mark.slow
@pytest.mark.parametrize("job", list(suite.jobs(full=True)), ids=lambda job: f"{label(job)}-{job.seed}")
def test_full_is_solved(job):
    solve(job)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("task", "case"), EACH)
def test_a_run_that_was_stopped_resumes_to_the_same_bits(task, case, tmp_path):
    def begun():
        run = begin(task, case, "lstm")
        if task != "count-ones":  # whose evaluations are its epochs
            run.every = 2
        run.steps = 4 * run.every
        return run

    whole, first, second = begun(), begun(), begun()
    train(whole)
    path = tmp_path / "run.pt"

    def killed(row):
        if row.step == 2 * first.every:
            first.step()  # in the midst of what is lost
            raise Killed

    with pytest.raises(Killed):
        train(first, checkpoint=path, on_row=killed)
    torch.manual_seed(999)
    second.load(path)
    assert second.done == 2 * second.every
    train(second, checkpoint=path)
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [(r.train_loss, r.measured) for r in whole.rows] == [(r.train_loss, r.measured) for r in second.rows]
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    with pytest.raises(ValueError, match="written by another run"):
        begin(task, case, "gru").load(path)


def command(folder, *more):
    return [
        *(sys.executable, "-m", "seqcells", "run", "memorize", "--case", "7", "--cell", "gru", "--device", "cpu"),
        *("--save", str(folder), "--json", str(folder / "out.json"), *more),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(folder), check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_was_killed_resumes_to_the_same_bits(how, tmp_path, whole):
    """SIGINT as Ctrl-C; SIGKILL whenever it comes, so that nothing can be put in order first."""
    # A shell that runs its jobs in the background has them ignore SIGINT, and children inherit that.
    usual = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **usual)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert how == signal.SIGKILL or "--resume goes on" in error
    assert not (tmp_path / "out.json").exists()
    again = subprocess.run(command(tmp_path, "--resume"), check=True, capture_output=True, text=True, timeout=300)
    assert "resumed after epoch" in again.stdout
    (expected,), (got,) = (json.loads((folder / "out.json").read_text()) for folder in (whole, tmp_path))
    for outcome in (expected, got):
        del outcome["seconds"]
        for row in outcome["rows"]:
            del row["seconds"]
    assert expected == got
    (job,) = suite.jobs("memorize", cases=["7"], cells=["gru"])
    paths = (job.checkpoint(folder, None) for folder in (whole, tmp_path))
    expected, got = (read_checkpoint(path, job.identity(None))["model"] for path in paths)
    assert all(torch.equal(expected[k], got[k]) for k in expected)


@pytest.fixture
def only_small(monkeypatch):
    """The suite with count-ones alone, and that small."""
    (name,) = count_ones.CASES
    case = count_ones.CASES[name]
    tiny = replace(case, quick=small("count-ones", name), full=small("count-ones", name), cells=("lstm", "gru"))
    monkeypatch.setattr(count_ones, "CASES", {name: tiny})
    monkeypatch.setattr(suite, "TASKS", {"count-ones": count_ones})


def test_command_line(tmp_path, capsys, only_small):
    plot, out, table, saved = (tmp_path / name for name in ("p.png", "r.json", "t.md", "ck"))
    command = ["run", "count-ones", "--device", "cpu", "--save", str(saved)]
    assert main([*command, "--plot", str(plot), "--json", str(out)]) == 1  # four epochs of 24 strings solve nothing
    printed = capsys.readouterr().out
    assert "NOT solved: test accuracy" in printed and "sequences" in printed and "count " in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    outcomes = json.loads(out.read_text())
    assert [o["cell"] for o in outcomes] == ["lstm", "gru"] and len(outcomes[0]["rows"]) == 4
    assert len(list(saved.iterdir())) == 2
    assert main([*command, "--resume"]) == 1
    assert "resumed after step 12" in capsys.readouterr().out
    assert main(["run", "--all", "--full", "--device", "cpu", "--table", str(table)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("| count-ones |") == 6 == table.read_text().count("| **no** |")  # two cells, three seeds
    for wrong, message in (
        (["run"], "expected a task or --all"),
        (["run", "count-ones", "--all"], "expected a task or --all"),
        (["run", "count-ones", "--resume"], "--resume needs --save"),
        (["run", "count-ones", "--case", "9"], "has no case '9': expected one of strings of 20"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    assert main(["tasks"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TASKS) and "strings of 20" in printed
    assert main(["info"]) == 0 and "lstm" in capsys.readouterr().out
    assert main(["explain", "lstm", "--batch", "8", "--hidden", "64", "--device", "sm_90"]) == 0
    assert "resident" in capsys.readouterr().out
    assert main(["explain", "lstm", "--batch", "0", "--hidden", "64"]) == 2
    assert "batch must be greater than zero" in capsys.readouterr().err


def test_a_solved_run_exits_with_zero(monkeypatch, only_small):
    ((name, case),) = count_ones.CASES.items()
    monkeypatch.setitem(count_ones.CASES, name, replace(case, quick=replace(case.quick, accuracy=0.0)))
    assert main(["run", "count-ones", "--cell", "gru-before", "--device", "cpu"]) == 0


def test_an_unknown_cell_is_named():
    with pytest.raises(ValueError, match="unknown cell 'elman': expected one of lstm"):
        begin("count-ones", next(iter(count_ones.CASES)), "elman")


def test_check_command_starts_the_interpreter_itself():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "seqcells", "check", "--device", "cpu", "--cell", "rnn_tanh"]
    command += ["--dtype", "float32"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 within tolerance" in result.stdout and "stepwise" in result.stdout


def test_check_fails_on_a_wrong_kernel(monkeypatch):
    wrong = dict.fromkeys(("y", "h_n", "dx"), 1e-3)
    monkeypatch.setattr(seqcells.check, "errors", lambda *a, **k: wrong)
    results = list(seqcells.check.sweep(DEVICE, ["rnn_tanh"]))
    assert not any(r.good for r in results if r.dtype in ("float64", "float32"))
    assert "WRONG" in seqcells.check.table(results)


EXAMPLES = {
    "count_ones.py": ("1", "GRU epoch 1: test accuracy"),
    "count_ones_regression.py": ("5", "GRU: worst error"),
    "memorize.py": ("2", "GRU produced V"),
    "temporal_order.py": ("5", "GRU: 0."),
    "echo.py": ("5", "GRU: 0."),
}


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_the_examples_run(file, tmp_path):
    """Cut short; what they say is in EXAMPLES."""
    steps, printed = EXAMPLES[file]
    command = [sys.executable, str(ROOT / "examples" / file), steps]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert printed in result.stdout and (tmp_path / file).with_suffix(".png").exists()

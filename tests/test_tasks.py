"""The task suite, every task and case alike: solved, the kernels following the reference, stopped and resumed."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import seqcells
from seqcells.tasks import TASKS, count_ones, plots, suite, temporal_order
from seqcells.tasks.base import CELLS
from seqcells.tasks.cli import _dtype, main
from seqcells.tasks.training import Row, read_checkpoint, train

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
        for turn, cell in enumerate([*CELLS, "augru", "slstm"]):  # a per-step input, and four states
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


# One or two a task, of different kinds: what each guards is in its task's file. The others: make test-slow.
QUICK = {
    "count-ones-regression-goal-gru",
    "count-ones-strings-of-20-lstm",
    "memorize-3-gru",
    "memorize-6-replay-lstm",
    "temporal-order-order-lstm",
    "echo-whole-lstm",
    "echo-stateful-gru",
}


def quick_ones():
    for job in suite.jobs():
        yield pytest.param(job, marks=[] if label(job) in QUICK else pytest.mark.slow, id=label(job))


@pytest.mark.parametrize("job", list(quick_ones()))
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


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
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
    assert size(plot)[1] <= 1000
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
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "lstm" in said and "verification: first use; the verdicts are in memory" in said
    shown = []
    for device, dtype, cell in (("sm_90", "bfloat16", "gru-before"), ("H100", "BF16", "GRU_BEFORE")):
        assert main(["explain", cell, "--batch", "8", "--hidden", "64", "--device", device, "--dtype", dtype]) == 0
        shown.append(capsys.readouterr().out.replace("sm_90", "H100"))
    assert shown[0] == shown[1] and "resident" in shown[0] and max(map(len, shown[0].splitlines())) <= 80
    assert main(["explain", "lstm", "--batch", "0", "--hidden", "64"]) == 2
    assert "batch must be greater than zero" in capsys.readouterr().err


def test_a_solved_run_exits_with_zero(monkeypatch, only_small):
    ((name, case),) = count_ones.CASES.items()
    monkeypatch.setitem(count_ones.CASES, name, replace(case, quick=replace(case.quick, accuracy=0.0)))
    assert main(["run", "COUNT-ONES", "--cell", "GRU", "--device", "CPU", "--dtype", "FP64"]) == 0


def size(png):
    """Width and height of a picture."""
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_a_dtypes_short_names(capsys):
    names = {"float64": "fp64 double FP64", "float32": "fp32 float torch.float32", "float16": "half fp16 Half"}
    for name, others in (names | {"bfloat16": "bf16 BF16 BFloat16"}).items():
        assert {_dtype(*names, "bfloat16")(other) for other in (name, *others.split())} == {name}
    for command, words in (
        (
            ["run", "echo", "--dtype", "bf16"],
            "one of float32 (float, fp32), float64 (double, fp64), got 'bf16'",
        ),
        (["explain", "lstm", "--batch", "1", "--hidden", "1", "--dtype", "int8"], "bfloat16 (bf16), got 'int8'"),
        (["check", "--dtype", "fp8"], "tf32, tf32x3, got 'fp8'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_a_cell_runs_the_cases_that_are_for_it(capsys, only_small, monkeypatch):
    (case,) = count_ones.CASES.values()
    solved = replace(case, quick=replace(case.quick, accuracy=0.0))
    monkeypatch.setattr(count_ones, "CASES", {"one": solved, "other": replace(solved, cells=("lstm",))})
    assert [(j.case, j.cell) for j in suite.jobs("count-ones")] == [("one", "lstm"), ("one", "gru"), ("other", "lstm")]
    assert main(["run", "count-ones", "--cell", "gru", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "left out: count-ones, case other, is for lstm, not for gru\n" in printed
    assert printed.count("\nsolved: ") == 1
    assert main(["run", "count-ones", "--cell", "gru", "--case", "other", "--device", "cpu"]) == 2
    assert "nothing to run: count-ones, case other, is for lstm, not for gru" in capsys.readouterr().err
    assert main(["run", "--all", "--cell", "rnn", "--device", "cpu"]) == 2


@pytest.mark.parametrize(("task", "case"), EACH)
def test_what_a_run_needs_is_what_solves_it(task, case):
    """The lines of pictures, and the verdict, agree: on either side of a line it is solved, and it is not."""
    made = TASKS[task].CASES[case]
    run = TASKS[task].start(case, made.cells[0], small(task, case), 0, device=DEVICE)
    run.stopped = True
    with torch.no_grad():
        measured = run.measure()

    def verdict(**values):
        run.rows = [Row(1, 1, 0.0, measured | {"worst": 0.0} | values, 0.0)]
        return run.verdict()

    for recipe in (made.quick, made.full):
        judged = {n: getattr(recipe, n) for n in ("accuracy", "loss", "exact") if hasattr(recipe, n)}
        run.recipe = replace(run.recipe, **judged)
        needs = verdict().needs
        reached = {n: v - 1e-6 if n == "loss" else v for n, v in needs.items()}
        assert needs and needs.keys() <= {"accuracy", "loss"} and verdict(**reached).solved
        for name, value in needs.items():
            missed = value + 1e-4 if name == "loss" else 1.0 if value == 0 else value - 1e-4
            assert not verdict(**reached | {name: missed}).solved, name


def outcome(task, case, cell, needs, solved=True, seed=0):
    rows = [Row(n, 8 * n, 1.0, {"loss": 2.0**-n, "accuracy": n / 20}, 0.1) for n in range(1, 9)]
    return suite.Outcome(task, case, cell, seed, solved, "what came of it", 8, 64, 1.0, rows, needs)


def drawn(monkeypatch, outcomes, path):
    """The picture's figure, before it is closed."""
    figures, own = [], plots._drawn
    with monkeypatch.context() as patched:
        patched.setattr(plots, "_drawn", lambda figure, path: figures.append(figure) or own(figure, path))
        plots.learning_curves(outcomes, "quick recipe, cpu", path)
    assert max(size(path)) <= 1920 and size(path)[1] <= 1000
    return figures[0]


def test_a_cases_picture_says_what_counts_as_solved(tmp_path, monkeypatch):
    cells = [outcome("count-ones", "strings of 20", c, {"accuracy": 0.995, "loss": 0.05}) for c in ("lstm", "gru")]
    figure = drawn(monkeypatch, cells, tmp_path / "p.png")
    assert "count-ones, case strings of 20" in figure.get_suptitle() and "quick recipe, cpu" in figure.get_suptitle()
    loss, accuracy = figure.axes
    for axes, value in ((loss, 0.05), (accuracy, 0.995)):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines.keys() == {"lstm", "gru", plots.SOLVED} and not axes.get_title()
        assert list(lines[plots.SOLVED].get_ydata()) == [value] * 2
    assert "$" not in "".join(t.get_text() for t in loss.get_yticklabels()), "no powers of ten"
    assert "gru, seed 0: solved: what came of it" in figure.get_supxlabel()
    flat = drawn(monkeypatch, [outcome("memorize", "3", "lstm", {"accuracy": 0.0})], tmp_path / "f.png")
    assert "impossible" in flat.get_suptitle() and "flat at 0 is the point" in flat.axes[1].texts[-1].get_text()


def test_a_picture_of_many_cases_has_a_panel_for_each(tmp_path, monkeypatch):
    every = [
        outcome(task, case, cell, {"loss": 0.1} if case == "notebook" else {"accuracy": 0.9}, seed == 0, seed)
        for task, case in EACH
        for cell in TASKS[task].CASES[case].cells
        for seed in (0, 1)
    ]
    figure = drawn(monkeypatch, every, tmp_path / "p.png")
    assert f"the task suite: {len(every) // 2} of {len(every)} runs solved" in figure.get_suptitle()
    assert len(figure.axes) == len(EACH) and {a.get_ylabel() for a in figure.axes} == {"test loss", "test accuracy"}
    assert all(any(line.get_label() == plots.SOLVED for line in a.get_lines()) for a in figure.axes)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["lstm", "gru", "gru-before", "rnn", plots.SOLVED]


def test_an_unknown_cell_is_named(capsys):
    with pytest.raises(ValueError, match="unknown cell 'no_such': expected one of agru"):
        begin("count-ones", next(iter(count_ones.CASES)), "no_such")
    with pytest.raises(SystemExit):
        main(["run", "count-ones", "--cell", "no_such"])
    error = capsys.readouterr().err
    assert "--cell: unknown cell 'no_such': expected one of agru" in error
    assert "or one of lstm, gru, gru-before" in error


def test_cells_of_the_gallery_run_where_a_gru_does():
    every = {(job.task.NAME, job.case) for job in suite.jobs(cells=["mgu", "cornn"])}
    assert every == {(task, case) for task in TASKS for case, of in TASKS[task].CASES.items() if "gru" in of.cells}
    assert suite.left_out("temporal-order", cells=["mgu"])[0].endswith("is for rnn, not for mgu")


def test_a_cell_of_a_file_trains(tmp_path, capsys):
    """Its name need not be a part of the library's; the curves have a colour for it."""
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\nimport seqcells\n\n\n@seqcells.cell(gates='n', states='h')\ndef leaky_of_a_file(x, U, h):\n"
        "    return 0.5 * h + 0.5 * torch.tanh(x.n + U.n(h))\n"
    )
    plot = tmp_path / "curve.png"
    command = ["run", "memorize", "--case", "1", "--cell", f"{file}:leaky_of_a_file", "cifg", "--device", "cpu"]
    assert main([*command, "--plot", str(plot)]) in (0, 1)
    shown = capsys.readouterr().out
    assert "memorize, case 1, leaky_of_a_file" in shown and "memorize, case 1, cifg" in shown
    assert plot.stat().st_size > 1000


@pytest.mark.slow
def test_check_command_starts_the_interpreter_itself():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "seqcells", "check", "--device", "cpu", "--cell", "indrnn"]
    command += ["--dtype", "float32"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "4 of 4 within tolerance" in result.stdout and "stepwise" in result.stdout


def test_check_fails_on_a_wrong_kernel(monkeypatch):
    wrong = dict.fromkeys(("y", "h_n", "dx"), 1e-3)
    monkeypatch.setattr(seqcells.testing, "errors", lambda *a, **k: wrong)
    results = list(seqcells.testing.sweep(DEVICE, ["rnn_tanh"]))
    assert not any(r.good for r in results if r.dtype in ("float64", "float32"))
    assert "WRONG" in seqcells.testing.table(results)


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

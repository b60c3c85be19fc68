"""The task suite and its command line: data, learning, the kernels following the reference, resuming."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

import seqcells
from seqcells.__main__ import main
from seqcells.tasks import count_ones
from seqcells.training import train

ROOT = Path(__file__).parents[1]
TINY = replace(count_ones.QUICK, training=96, test=32, epochs=2)


@given(count=st.integers(1, 50), length=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_strings_and_their_counts(count, length, seed):
    data = count_ones.strings(count, length, torch.Generator().manual_seed(seed))
    assert data.inputs.shape == (count, length, 1) and data.targets.shape == (count,)
    assert set(data.inputs.unique().tolist()) <= {0.0, 1.0}
    assert data.targets.tolist() == [sum(x) for x in data.inputs[..., 0].tolist()]
    again = count_ones.strings(count, length, torch.Generator().manual_seed(seed))
    assert torch.equal(again.inputs, data.inputs)


def test_shares_of_ones_are_spread_evenly():
    counts = count_ones.strings(20_000, 20, torch.Generator().manual_seed(0)).targets
    assert abs(counts.mean().item() - 10.5) < 0.1  # P(one) is uniform on 1/20 ... 1
    assert (counts == 20).double().mean().item() > 1 / 20


def test_training_and_test_strings_come_from_different_streams():
    training, test = count_ones.data(count_ones.QUICK, 0)
    assert training.inputs.shape[0] == 10_000 and not torch.equal(training.inputs[:1000], test.inputs)


def fit(cell, backend, recipe, seed=0, dtype=torch.float32):
    run = count_ones.start(cell, recipe, seed, backend=backend, device=DEVICE, dtype=dtype)
    losses = []
    training, test = (d.to(DEVICE, dtype) for d in count_ones.data(recipe, seed))

    def loss(answers, counts):
        value = count_ones.loss(answers, counts)
        losses.append(value.item())
        return value

    options = {"epochs": recipe.epochs, "batch": recipe.batch, "loss": loss, "right": count_ones.right}
    return run, train(run, training, test, **options), losses


@pytest.mark.parametrize(
    ("cell", "schedule"),
    [
        ("lstm", "resident"),
        ("gru", "stepwise"),
        *(
            pytest.param(cell, schedule, marks=pytest.mark.slow)
            for cell, schedule in (
                ("gru", "resident"),
                ("gru-before", "resident"),
                ("gru", "grid"),
                ("lstm", "stepwise"),
            )
        ),
    ],
)
def test_ten_steps_with_the_kernels_follow_the_reference(cell, schedule):
    recipe = replace(count_ones.QUICK, training=10 * 16, test=16, epochs=1)
    _, _, reference = fit(cell, "reference", recipe)
    _, _, fused = fit(cell, f"triton:{schedule}", recipe)
    assert len(reference) == len(fused) == 11  # ten steps and the test
    for a, b in zip(reference, fused, strict=True):
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_quick_is_solved(cell):
    run, rows, _ = fit(cell, "auto", count_ones.QUICK)
    assert count_ones.solved(rows, count_ones.QUICK)[0], rows[-1]
    # What was learnt does not depend on who computes it.
    _, test = count_ones.data(count_ones.QUICK, 0)
    with torch.no_grad():
        answers = {}
        for backend in ("reference", "triton"):
            run.model.layer.backend = backend
            answers[backend] = run.model(test.inputs[:64].to(DEVICE))
    torch.testing.assert_close(answers["triton"], answers["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_full_is_solved(cell, seed, backend):
    _, rows, _ = fit(cell, backend, count_ones.FULL, seed)
    assert count_ones.solved(rows, count_ones.FULL)[0], rows[-1]


def test_a_run_that_was_stopped_resumes_to_the_same_bits(tmp_path):
    training, test = count_ones.data(TINY, 3)
    options = {"batch": 16, "loss": count_ones.loss, "right": count_ones.right}
    place = {"backend": "auto", "device": "cpu", "dtype": torch.float32}
    whole = count_ones.start("lstm", TINY, 3, **place)
    train(whole, training, test, epochs=3, **options)

    path = tmp_path / "run.pt"
    first = count_ones.start("lstm", TINY, 3, **place)
    train(first, training, test, epochs=1, checkpoint=path, **options)

    class Killed(Exception):
        pass

    def killed(step, loss):
        raise Killed

    with pytest.raises(Killed):
        train(first, training, test, epochs=3, checkpoint=path, on_step=killed, **options)
    second = count_ones.start("lstm", TINY, 3, **place)
    torch.manual_seed(999)
    second.load(path)
    assert len(second.rows) == 1
    train(second, training, test, epochs=3, checkpoint=path, **options)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [r.test_loss for r in whole.rows] == [r.test_loss for r in second.rows]
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    other = count_ones.start("gru", TINY, 3, **place)
    with pytest.raises(ValueError, match="written by another run"):
        other.load(path)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(count_ones, "QUICK", TINY)
    plot, out, checkpoints = tmp_path / "p.png", tmp_path / "r.json", tmp_path / "ck"
    command = ["run", "count-ones", "--cell", "lstm", "gru", "--device", "cpu", "--save", str(checkpoints)]
    assert main([*command, "--plot", str(plot), "--json", str(out)]) == 1  # two epochs of 96 strings solve nothing
    printed = capsys.readouterr().out
    assert "NOT solved: test accuracy" in printed and "sequences" in printed and "count " in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(json.loads(out.read_text())["cells"]) == {"lstm", "gru"}
    assert len(list(checkpoints.iterdir())) == 2
    assert main([*command, "--resume", "--epochs", "3"]) == 1
    assert "lstm: resumed after epoch 2" in capsys.readouterr().out
    assert main(["tasks"]) == 0 and "count-ones" in capsys.readouterr().out
    assert main(["info"]) == 0 and "lstm" in capsys.readouterr().out
    assert main(["explain", "lstm", "--batch", "8", "--hidden", "64", "--device", "sm_90"]) == 0
    assert "resident" in capsys.readouterr().out
    assert main(["explain", "lstm", "--batch", "0", "--hidden", "64"]) == 2
    assert "batch must be greater than zero" in capsys.readouterr().err


def test_a_solved_run_exits_with_zero(monkeypatch):
    monkeypatch.setattr(count_ones, "QUICK", replace(TINY, accuracy=0.0))
    assert main(["run", "count-ones", "--cell", "gru-before", "--device", "cpu"]) == 0


def test_check_command_starts_the_interpreter_itself():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "seqcells", "check", "--device", "cpu", "--cell", "rnn_tanh"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "12 of 12 within tolerance" in result.stdout and "stepwise" in result.stdout


def test_check_fails_on_a_wrong_kernel(monkeypatch):
    wrong = dict.fromkeys(("y", "h_n", "dx"), 1e-3)
    monkeypatch.setattr(seqcells.check, "errors", lambda *a, **k: wrong)
    results = list(seqcells.check.sweep(DEVICE, ["rnn_tanh"]))
    assert not any(r.good for r in results if r.dtype in ("float64", "float32"))
    assert "WRONG" in seqcells.check.table(results)


def test_the_example_runs(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "count_ones.py"), "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "GRU epoch 1: test accuracy" in result.stdout and (tmp_path / "count_ones.png").exists()

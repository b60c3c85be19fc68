"""What `tune` measures on the CPU, where nothing else measures; its command; and what an import reads."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from timed import clock, explained, forget, fresh
from torch.nn.utils.rnn import pack_sequence

import seqcells
from seqcells import dispatch, measured, verdicts
from seqcells.tasks.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    with fresh(monkeypatch, tmp_path):
        monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cuda",))
        torch.backends.cudnn.benchmark = True  # which says nothing about the CPU
        yield


@pytest.mark.parametrize("winner", ["aten", "loop"])
@pytest.mark.parametrize("kind", [seqcells.LSTM, seqcells.GRU, "functional", "packed"])
def test_on_the_cpu_what_tune_measured_decides(kind, winner, monkeypatch):
    """And nothing is measured without it."""
    seen, ran = clock(monkeypatch, winner), []
    made = seqcells.RNN if isinstance(kind, str) else kind
    module, x = made(3, 4), torch.randn(5, 2, 3)
    weights = list(module.parameters())

    def call():
        if kind == "functional":
            return seqcells.rnn(x, None, *weights)
        return module(pack_sequence([x[:, 0], x[:3, 1]])) if kind == "packed" else module(x)

    expected = call()
    assert not seen
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda case: ran.append(choose(case)) or ran[-1])
    (m,) = seqcells.tune(module, x).measurements
    assert m.chosen == winner
    for again in (False, True):
        if again:
            forget()  # another process reads it
        ran.clear()
        found = call()
        if kind == "packed" or (winner == "aten" and kind != "functional"):  # packed: its times depend on the lengths
            assert not ran, "torch's own, by the first rule"
        else:
            assert ran[-1].engine == winner and ran[-1].why.startswith(f"measured here: {winner} 1 ms, ")
        for a, b in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(a, b)
    assert len(seen) == 1


def flat(found):
    for t in found:
        yield from [t] if isinstance(t, torch.Tensor) else flat([t.data] if hasattr(t, "batch_sizes") else t)


def test_classes_on_the_cpu(monkeypatch):
    """Here the number of steps and of threads matter, and resets and lengths are left to the model."""
    clock(monkeypatch, "loop")
    module, threads = seqcells.GRU(3, 4), torch.get_num_threads()

    def chosen(T, B=2, **options):
        return explained("gru", steps=T, batch=B, device="cpu", dtype=torch.float32, **options).choice.engine

    seqcells.tune(module, torch.randn(5, 2, 3))
    assert [chosen(T) for T in (4, 5, 8, 9)] == ["aten", "loop", "loop", "aten"]
    assert [chosen(5, B) for B in (1, 2, 3)] == ["aten", "loop", "aten"]
    assert chosen(5, grad=False) == chosen(5, layers=2) == chosen(5, groups=2) == "aten"
    try:
        torch.set_num_threads(threads + 1)
        assert chosen(5) == "aten"
    finally:
        torch.set_num_threads(threads)
    (m,) = seqcells.tune(module, torch.randn(5, 2, 3), resets=torch.zeros(5, 2, dtype=torch.bool)).measurements
    assert not m.medians
    (m,) = seqcells.tune(seqcells.Recurrent("mgu", 3, 4), torch.randn(5, 2, 3)).measurements
    assert not m.medians and str(m).endswith("  loop             not measured: there is no choice")
    seqcells.tune(module, torch.randn(600, 1, 3))
    assert chosen(5000, 1) == chosen(None, 1) == "loop" and chosen(500, 1, grad=False) == "aten"


def test_a_compiled_program_on_the_cpu_does_not_look(monkeypatch):
    """A cell and a layer are compiled as before, whatever was measured."""
    clock(monkeypatch, "loop")
    seqcells.tune(seqcells.LSTM(3, 4), torch.randn(5, 2, 3))
    for module, x in ((seqcells.LSTMCell(3, 4), torch.randn(2, 3)), (seqcells.LSTM(3, 4), torch.randn(5, 2, 3))):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for a, b in zip(flat(compiled(x)), flat(module(x)), strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_a_step_of_a_cell_is_torchs_own(monkeypatch):
    """It is not measured, and what was measured of layers costs it nothing."""
    cell, x = seqcells.LSTMCell(3, 4), torch.randn(2, 3)
    (m,) = seqcells.tune(cell, x).measurements
    assert "a cell's step" in m.calls and not m.medians and m.chosen == m.before == "aten"
    seqcells.tune(seqcells.LSTM(3, 4), torch.randn(5, 2, 3))
    monkeypatch.setattr(dispatch, "choose", lambda case: pytest.fail("a Case was gathered"))
    cell(x)


def test_a_file_that_is_none_costs_a_warning(tmp_path):
    seqcells.tune(seqcells.GRU(3, 4), torch.randn(5, 2, 3))
    (file,) = tmp_path.glob("measurements-*")
    file.write_text(file.read_text()[:-20])
    measured.forget()
    verdicts._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        measured.load()
    assert len(said) == 1 and not measured.ON_CPU


def test_the_command(capsys, tmp_path):
    command = ["tune", "--cell", "gru", "--hidden", "4", "--batch", "2", "--steps", "5", "--device", "cpu"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("gru, float32, hidden size 4, batches of 2, training, saving gates, up to 8 steps, ")
    assert " aten " in out and " loop " in out and f"stored in {tmp_path}" in out
    more = ["--bidirectional", "--layers", "2", "--infer", "--dtype", "double", "--input", "7"]
    assert main([*command, *more]) == 0
    assert "gru, float64, hidden size 4, batches of 2, 2 groups, 2 layers, inference" in capsys.readouterr().out
    explain = ["explain", "gru", "--hidden", "4", "--batch", "2", "--steps", "5", "--device", "cpu"]
    for given in ([], ["--bidirectional", "--layers", "2", "--inference", "--dtype", "double"]):
        assert main([*explain, *given]) == 0
        assert "measured here: " in capsys.readouterr().out
    assert main(["tune", "--clear"]) == 0 and "is forgotten" in capsys.readouterr().out
    assert main(explain) == 0 and "measured here" not in capsys.readouterr().out
    assert main(["tune", "--hidden", "4", "--batch", "2"]) == 2
    assert capsys.readouterr().err == "error: expected --cell, or --clear\n"
    assert main([*command, "--batch", "0"]) == 2
    assert "--batch must be " in capsys.readouterr().err


def test_import_looks_for_a_file_only_where_there_may_be_one(tmp_path):
    """And no call does, on the CPU."""
    program = """
import sys
seen = []
sys.addaudithook(lambda name, given: seen.append(str(given[0])) if name in ("open", "os.scandir") else None)
import torch, seqcells
seen = [path for path in seen if CACHE in path]
print(seen)
seen.clear()
seqcells.GRU(3, 4)(torch.randn(5, 2, 3))
print([path for path in seen if CACHE in path])
""".replace("CACHE", repr(str(tmp_path)))
    environment = os.environ | {"SEQCELLS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, then = run.stdout.splitlines()
    assert "measurements" not in first and then == "[]"

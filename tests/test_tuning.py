"""What "auto" chooses by measurement: by `tune`, and in a class's first call with torch.backends.cudnn.benchmark.

The CPU here counts as a device that "auto" gives to the kernels, but for the tests of the CPU itself. The clock is one
that a test sets: which backend is how slow.
"""

import copy
import gc
import importlib
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import own_cells
import pytest
import torch
from conftest import DEVICE
from corrupted import Corrupted, close, schedule_of, told, trained
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import seqcells
from seqcells import dispatch, fallback, measured, tuning, verdicts
from seqcells.kernels import scan
from seqcells.tasks.cli import main
from seqcells.verdicts import MEASUREMENTS

verification = importlib.import_module("seqcells.verification")  # the class hides the module
ROOT = Path(__file__).parents[1]
KERNELS = ("triton", "triton:grid", "triton:stepwise")  # of small layers, which the plan gives to `resident`


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    for name in ("_failed", "refused_kernels"):
        monkeypatch.setattr(fallback, name, set())
    for name, value in (("_STEPS", 2), ("_WARM", 1), ("_LEAST", 1), ("_MOST", 1)):
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(tuning, "_given_up", set())
    forget()
    monkeypatch.setattr(verification.CURRENT, "policy", "first use")
    yield
    forget()


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.backends.cudnn.benchmark = False


@pytest.fixture
def cpu(monkeypatch):
    """The CPU as it is, without kernels."""
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cuda",))


def forget():
    """As in another process."""
    verification.forget()
    measured.forget()
    measured.load()


def clock(monkeypatch, *fastest):
    """Set the clock: those backends are the fastest, in that order. Returns the cases that are measured."""
    seen, medians = [], tuning._medians

    def count(case, names):
        seen.append(case)
        return medians(case, names)

    def milliseconds(call, name, device):
        return 1.0 + fastest.index(name) if name in fastest else 50.0

    monkeypatch.setattr(tuning, "_medians", count)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return seen


def layer(kind=seqcells.LSTM, **options):
    """A layer under "auto", the same by the reference, and an input."""
    torch.manual_seed(0)
    made = kind(3, 4, dtype=torch.float64, device=DEVICE, **options)
    exact = copy.deepcopy(made)
    exact.backend = "reference"
    return made, exact, torch.randn(3, 2, 3, dtype=torch.float64, device=DEVICE)


def explained(cell="lstm", **options):
    given = {"batch": 2, "hidden_size": 4, "dtype": torch.float64, "device": DEVICE} | options
    return seqcells.explain(cell, **given)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("winner", [*KERNELS, "aten"])
def test_the_fastest_runs(winner, grad, benchmark, monkeypatch):
    module, exact, x = layer(seqcells.GRU)
    seen = clock(monkeypatch, winner)
    with torch.set_grad_enabled(grad):
        module(x)
        launches = Corrupted(monkeypatch, "y_ptr", "forward", schedules=())
        if grad:
            close(trained(module, x), trained(exact, x))
        else:
            close(module(x), exact(x))
        choice = explained("gru", grad=grad)
    expected = {"triton": "resident", "aten": ""}.get(winner, winner.removeprefix("triton:"))
    assert {*launches.right} == {expected} - {""}
    assert len(seen) == 1 and choice.backend == winner.partition(":")[0]
    assert choice.why.startswith(f"measured here: {winner} 1 ms, ") and choice.why.endswith(" 50 ms (batches of 2)")
    if choice.plan is not None:
        assert choice.plan.schedule == expected and choice.backward.schedule == expected


def test_a_slow_launcher(benchmark, monkeypatch):
    """By the real clock: the plan's schedule is slow here, and the next is taken."""
    module, exact, x = layer()

    class Slow(Corrupted):
        def __call__(self, launch):
            if schedule_of(launch) == "resident":
                time.sleep(0.1)
            super().__call__(launch)

    launches = Slow(monkeypatch, "y_ptr", "forward", schedules=())
    close(trained(module, x), trained(exact, x))
    choice = explained()
    assert choice.backend == "aten" or choice.plan.schedule != "resident"
    launches.right = []
    trained(module, x)
    assert "resident" not in launches.right


def test_classes(benchmark, monkeypatch):
    """Another length is never measured again; another batch only beyond the next power of two."""
    module, _, x = layer(seqcells.GRU)
    seen = clock(monkeypatch, "triton:grid")
    for _ in range(2):
        for T, B in ((3, 2), (2, 2), (7, 2), (3, 3), (3, 4), (5, 3)):
            with torch.no_grad():
                module(x.new_zeros(T, B, 3))
    assert [(case.steps, case.batch) for case in seen] == [(3, 2), (3, 3)]
    with torch.no_grad():
        module(x[:1])
        module(x, resets=torch.ones(3, 2, dtype=torch.bool, device=DEVICE))
        module(x, lengths=[3, 2])
    module(x)
    facts = [(case.steps == 1, case.resets, case.lengths, case.grad) for case in seen[2:]]
    assert facts == [
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, False),
        (False, False, False, True),
    ]
    stored = verdicts.read(verdicts.path(x.device, MEASUREMENTS), MEASUREMENTS)
    assert len(stored) == 6
    forget()  # another process only reads
    module(x)
    assert len(seen) == 6 and explained("gru").choice.schedule == "auto:grid"


def test_only_if_asked(monkeypatch):
    module, _, x = layer()
    seen = clock(monkeypatch, "aten")
    assert not torch.backends.cudnn.benchmark
    module(x)
    assert not seen and explained().why == "the tensors are on CUDA"


@pytest.mark.parametrize("where", ["capture", "compiled", "vmap", "counting", "deterministic", "by name"])
def test_not_where_nothing_can_be_measured(where, benchmark, monkeypatch):
    """What was measured before decides there, but where a compiler, a transform or determinism wants the model's."""
    module, exact, x = layer()
    seen = clock(monkeypatch, "triton:stepwise")
    torch._dynamo.reset()
    if where == "by name":
        module.backend = "triton:resident"

    def call():
        with torch.no_grad():
            if where == "compiled":
                return torch.compile(module, backend="aot_eager")(x)[0]
            if where == "vmap":
                return torch.func.vmap(lambda t: module(t)[0])(x[None])[0]
            if where == "counting":
                with FlopCounterMode(display=False):
                    return module(x)[0]
            if where == "deterministic":
                torch.use_deterministic_algorithms(True)
            try:
                return module(x)[0]
            finally:
                torch.use_deterministic_algorithms(False)

    possible = verification.possible
    for known in (False, True):
        if where == "capture":
            monkeypatch.setattr(tuning, "possible", lambda device: False)
        launches = Corrupted(monkeypatch, "y_ptr", "forward", schedules=())
        close([call()], [exact(x)[0]])
        taken = known and where in ("capture", "counting")
        assert {*launches.right} >= {"stepwise" if taken else "resident"}
        assert len(seen) == known
        monkeypatch.setattr(tuning, "possible", possible)
        with torch.no_grad():
            again = copy.deepcopy(module)
            again.backend = None
            again(x)  # which measures
        assert len(seen) == 1
    torch._dynamo.reset()


def test_what_fails_is_no_candidate(benchmark, monkeypatch):
    module, exact, x = layer()
    run = scan.run

    def fail(launch):
        if schedule_of(launch) == "grid":
            raise RuntimeError("out of resources: shared memory")
        run(launch)

    launches = Corrupted(monkeypatch, "y_ptr", "forward", schedules=())
    launches.run = fail
    clock(monkeypatch, "triton:grid", "triton:stepwise")
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert not said
    (record,) = measured.of(x.device).values()
    assert set(record) == {"triton", "triton:stepwise", "aten"}


def test_no_memory_to_measure(benchmark, monkeypatch):
    module, exact, x = layer()
    seen = clock(monkeypatch, "aten")

    def full(case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(tuning, "_like", full)
    for _ in range(2):
        found, said = told(trained, module, x)
        close(found, trained(exact, x))
        assert not said and len(seen) == 1
    assert not measured.of(x.device) and explained().choice.schedule == "auto"
    assert "not measured: there is no choice" in str(seqcells.tune(module, x))


def test_an_error_of_ours_costs_a_warning(benchmark, monkeypatch):
    module, exact, x = layer()
    monkeypatch.setattr(tuning, "_like", lambda case: 1 / 0)
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    (message,) = said
    assert message.startswith("seqcells: lstm, float64, hidden size 4, batches of 2, training")
    assert message.endswith("could not be measured: ZeroDivisionError: division by zero")
    assert not told(trained, module, x)[1]


@pytest.mark.parametrize("kernel, how", [("forward", "y_ptr"), ("backward", "dgx_ptr")])
def test_a_wrong_kernel_does_not_win(kernel, how, benchmark, monkeypatch):
    """It is the fastest, so that it is tried first; it is refused, and the plan's choice runs."""
    module, exact, x = layer()
    clock(monkeypatch, "triton:stepwise")
    Corrupted(monkeypatch, how, kernel, ["stepwise"])
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert len(said) == 1 and "by stepwise: Wrong: its " in said[0] and "Instead the resident kernel runs" in said[0]
    assert not told(trained, module, x)[1]


def test_one_measurement_for_all_threads(benchmark, monkeypatch):
    module, _, x = layer()
    seen = clock(monkeypatch, "aten")

    def call(_):
        with torch.no_grad():
            return module(x)[0]

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(call, range(4)))
    assert len(seen) == 1


def test_candidates():
    """Only what gives what the call asks for, at a cost that does not depend on its values."""

    def of(module, *given, grad=True, **how):
        with torch.set_grad_enabled(grad):
            (found,) = seqcells.tune(module, *given, **how).measurements
        return [*found.medians], found.calls

    new = {"device": DEVICE}
    x, flags = torch.randn(2, 3, 4, **new), torch.zeros(2, 3, dtype=torch.bool, **new)
    everything, kernels = [*KERNELS, "aten"], [*KERNELS]
    lstm, gru = seqcells.LSTM(4, 4, **new), seqcells.GRU(4, 4, **new)
    precision = "tf32" if DEVICE == "cuda" else "ieee"
    assert of(lstm, x) == (
        everything,
        f"lstm, float32 ({precision}), hidden size 4, batches of 3 to 4, training, saving gates",
    )
    assert of(gru, x, resets=flags)[0] == kernels
    assert of(lstm, pack_sequence([x[:, 0], x[:1, 1]]))[0] == kernels
    assert of(lstm, x, return_cell_states=True)[0] == kernels
    assert of(seqcells.GRU(4, 4, precision="ieee", **new), x, grad=False)[0] == kernels
    assert of(seqcells.GRU(4, 4, save="states", **new), x)[0] == kernels
    assert of(seqcells.GRU(4, 4, save="states", **new), x, grad=False)[0] == everything
    both, words = of(seqcells.GRU(4, 4, 2, bidirectional=True, batch_first=True, **new), x, grad=False)
    assert both == everything and ", 2 groups, 2 layers, inference" in words
    assert of(seqcells.LSTM(4, 4, proj_size=2, **new), x, grad=False)[1].endswith("projection 2, inference")
    assert of(seqcells.GRUCell(4, 4, **new), x[0])[0] == ["triton", "aten"]
    heads, words = of(seqcells.Recurrent("gru", 4, 8, heads=2, **new), x, grad=False)
    assert heads == kernels and "hidden size 4, " in words and ", 2 groups, heads, " in words
    own, words = of(seqcells.Recurrent(own_cells.four, 4, 4, **new), x, w=torch.rand(2, 3, **new), grad=False)
    assert own == kernels and words.endswith(verification.source_of(own_cells.four.key)[:16])
    assert of(seqcells.GRU(4, 4, recurrent_dropout=0.5, **new), x)[0] == []


class Net(nn.Module):
    """A module with everything that a measurement could disturb."""

    def __init__(self):
        super().__init__()
        self.before, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.rnn, self.cell = seqcells.GRU(5, 4, 2, dropout=0.5), seqcells.LSTMCell(4, 4)
        self.weight = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
        self.calls = 0

    def forward(self, x, *, scale):
        self.calls += 1
        y, _ = self.rnn(self.norm(self.before(x).flatten(0, 1)).unflatten(0, x.shape[:2]))
        h, _ = self.cell(nn.functional.dropout(y[-1]))
        return self.weight(h) * scale


def tensors():
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("kernels", [True, False])
def test_no_side_effects(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cuda",))
    torch.manual_seed(0)
    net, x, hooked = Net().to(DEVICE if kernels else "cpu"), torch.randn(6, 3, 3), []
    x = x.to(next(net.parameters()).device).requires_grad_()
    net.rnn.register_forward_hook(lambda *given: hooked.append("rnn"))
    net.rnn.weight_hh_l0.register_hook(lambda grad: hooked.append("gradient"))
    net(x, scale=2).sum().backward()
    hooked.clear()
    state, before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    grads = [p.grad.clone() for p in (*net.parameters(), x)]
    tuned = seqcells.tune(net, x, scale=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, (*net.parameters(), x), strict=True))
    assert hooked == ["rnn"] and net.calls == 2 and net.training and net.rnn.backend is None
    held = tensors()
    seqcells.tune(net, x, scale=2)
    assert tensors() <= held, "no graph is kept"
    layers, cell = tuned.measurements
    assert "gru, float32" in layers.calls and "2 layers" in layers.calls
    assert "lstm, float32" in cell.calls and "a cell's step" in cell.calls
    for m in tuned.measurements:
        assert m.chosen == min(m.medians, key=m.medians.get) and m.before in m.medians
        (line,) = (row for row in str(m).splitlines() if " chosen" in row)
        assert line.split()[0] == m.chosen


def test_the_callers_modes_do_not_matter(benchmark, monkeypatch):
    module, _, x = layer()
    modes = [torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16), torch.device("meta"), torch.no_grad()]
    seen, state = clock(monkeypatch, "aten"), torch.get_rng_state()
    for mode in modes:
        monkeypatch.setattr(tuning, "_given_up", set())
        forget()
        seqcells.tuning.clear()
        with mode:
            module(x)
        assert seen and seen.pop().plain
        assert torch.equal(torch.get_rng_state(), state)
    with seqcells.backend("loop"):
        module(x)
    assert not seen


def test_clear(monkeypatch, tmp_path):
    module, _, x = layer()
    seen = clock(monkeypatch, "aten")
    seqcells.tune(module, x)
    (file,) = tmp_path.glob("measurements-*")
    assert explained().backend == "aten"
    seqcells.tuning.clear()
    assert not file.exists() and explained().backend == "triton"
    seqcells.tune(module, x)
    seqcells.tune(module, x)
    assert len(seen) == 3, "tune measures again what it knows"


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got a function"):
        seqcells.tune(lambda x: x, 3)
    for module in (nn.LSTM(3, 4), seqcells.LSTM(3, 4, backend="loop"), nn.Linear(3, 4)):
        with pytest.raises(
            ValueError, match=f"module: .* in {type(module).__name__} chose a backend by 'auto'; expected"
        ):
            seqcells.tune(module, torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size"):
        seqcells.tune(seqcells.LSTM(3, 4), torch.zeros(2, 5))
    assert not measured.ON_CPU
    layer = seqcells.GRU(3, 4)
    with pytest.raises(RuntimeError, match="tune cannot measure while a CUDA graph is captured"):
        torch.func.vmap(lambda t: seqcells.tune(layer, t))(torch.zeros(1, 2, 3))


# --- the CPU itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("winner", ["aten", "loop"])
@pytest.mark.parametrize("kind", [seqcells.LSTM, seqcells.GRU, seqcells.LSTMCell, "functional", "packed"])
def test_on_the_cpu_what_tune_measured_decides(kind, winner, cpu, benchmark, monkeypatch):
    """And nothing is measured without it."""
    seen, ran = clock(monkeypatch, winner), []
    made = seqcells.RNN if isinstance(kind, str) else kind
    module, x = made(3, 4), torch.randn(5, 2, 3)
    x = x[0] if kind is seqcells.LSTMCell else x
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
        if kind != "packed":  # whose times depend on the lengths
            assert ran[-1].engine == winner and ran[-1].why.startswith(f"measured here: {winner} 1 ms, ")
        assert ran
        for a, b in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(a, b)
    assert len(seen) == 1


def flat(found):
    for t in found:
        yield from [t] if isinstance(t, torch.Tensor) else flat([t.data] if hasattr(t, "batch_sizes") else t)


def test_classes_on_the_cpu(cpu, monkeypatch):
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


def test_a_compiled_program_on_the_cpu_does_not_look(cpu, monkeypatch):
    """A cell is compiled once, as before, whatever was measured."""
    cell, x = seqcells.LSTMCell(3, 4), torch.randn(2, 3)
    clock(monkeypatch, "loop")
    torch._dynamo.reset()
    seqcells.tune(cell, x)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x), cell(x), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_a_file_that_is_none_costs_a_warning(cpu, tmp_path):
    seqcells.tune(seqcells.GRU(3, 4), torch.randn(5, 2, 3))
    (file,) = tmp_path.glob("measurements-*")
    file.write_text(file.read_text()[:-20])
    measured.forget()
    verdicts._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        measured.load()
    assert len(said) == 1 and not measured.ON_CPU


def test_the_command(cpu, capsys, tmp_path):
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

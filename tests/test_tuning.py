"""What "auto" chooses by measurement: by `tune`, and in a class's first call with torch.backends.cudnn.benchmark.

The CPU here counts as a device that "auto" gives to the kernels. The clock is one that a test sets: which backend is
how slow. `test_tuning_cpu.py` has the CPU itself, the command, and what an import reads.
"""

import copy
import gc
import time
from concurrent.futures import ThreadPoolExecutor

import own_cells
import pytest
import torch
from conftest import DEVICE
from corrupted import Corrupted, close, schedule_of, told, trained
from timed import clock, explained, forget, fresh, layer, verification
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import seqcells
from seqcells import dispatch, measured, tuning, verdicts
from seqcells.kernels import scan
from seqcells.verdicts import MEASUREMENTS

KERNELS = ("triton", "triton:grid", "triton:stepwise")  # of small layers, which the plan gives to `resident`


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    with fresh(monkeypatch, tmp_path):
        yield


@pytest.fixture
def benchmark():
    torch.backends.cudnn.benchmark = True


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


def test_a_schedule_that_does_not_fit():
    """Backward, where forward was measured; or of a file that somebody edited: the plan's choice."""
    H = 40 if DEVICE == "cpu" else 1000
    case = explained(hidden_size=H, grad=False).case
    measured.add(case.device, measured.class_of(case, True), {"triton:resident": 1.0, "aten": 2.0})
    choice = explained(hidden_size=H, grad=False)
    assert choice.choice.schedule == "auto:resident" and choice.plan.schedule != "resident"
    module = seqcells.LSTM(3, H, dtype=torch.float64, device=DEVICE)
    exact = copy.deepcopy(module)
    exact.backend = "reference"
    with torch.no_grad():
        x = torch.randn(2, 2, 3, dtype=torch.float64, device=DEVICE)
        found, said = told(module, x)
        close([found[0]], [exact(x)[0]])
    assert not said


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
    assert of(seqcells.GRU(4, 4, 2, dropout=0.5, **new).eval(), x, grad=False)[0] == everything
    drops, words = of(seqcells.GRU(4, 4, 2, dropout=0.5, **new), x, grad=False)
    assert drops == kernels and ", 2 layers, dropout between layers, inference" in words
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
    assert kernels or not cell.medians
    for m in tuned.measurements[: 1 + kernels]:
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

"""A kernel that does not compile or launch: something else runs, with one warning; or, if asked for by name, the error.

The launches are real (interpreted on the CPU, which here counts as a device that "auto" gives to the kernels), but for
those that a test makes fail.
"""

import copy
import re

import pytest
import torch
from conftest import DEVICE
from corrupted import close, schedule_of, told, trained
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import seqcells
from seqcells import backends, dispatch, fallback, testing
from seqcells.engines import triton
from seqcells.kernels import scan, single, stack
from seqcells.testing import Shape

ERRORS = {
    "does not compile": lambda: CompilationError("x = y", None, "unsupported"),
    "does not assemble": lambda: PTXASError("ptxas fatal: Value 'sm_75' is not defined for option 'gpu-name'"),
    "shared memory": lambda: OutOfResources(300000, 232448, "shared memory"),
    "registers": lambda: RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    "cooperative launch": lambda: RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"),
    "an old driver": lambda: RuntimeError(
        "Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."
    ),
    "no such device": lambda: RuntimeError("0 active drivers ([]). There should only be one."),
    "no C compiler": lambda: FileNotFoundError(2, "No such file or directory: 'cc'"),
}
NOT_CAUGHT = {
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Triton's memory": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "the context is lost": lambda: RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
}
KINDS = {
    "lstm": (seqcells.LSTM, {}),
    "gru": (seqcells.GRU, {}),
    "gru_before": (seqcells.GRU, {"reset_after": False}),
    "rnn_tanh": (seqcells.RNN, {}),
    "rnn_relu": (seqcells.RNN, {"nonlinearity": "relu"}),
}


class Broken:
    """Launches, but for those of some schedules and directions, which fail. started: the schedules of the others."""

    def __init__(self, monkeypatch, error, schedules=("resident", "grid", "stepwise"), kernels=("forward", "backward")):
        self.error, self.schedules, self.kernels, self.run = error, schedules, kernels, scan.run
        self.started, self.failed = [], []
        monkeypatch.setattr(scan, "run", self)
        for launcher in (scan.forward, scan.backward, scan.recompute, single.forward, stack.forward, stack.backward):
            monkeypatch.setitem(launcher.__kwdefaults__, "launch", self)

    def __call__(self, launch):
        schedule = schedule_of(launch)
        kind = launch.kernel.fn.__name__.removesuffix("_kernel")
        if schedule in self.schedules and (kind in self.kernels or kind == "kernel"):
            self.failed.append(schedule)
            raise self.error()
        self.started.append(schedule)
        self.run(launch)


@pytest.fixture(autouse=True)
def a_device_for_the_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "own_step", lambda *arguments: False)
    for name in ("_failed", "refused_kernels"):
        monkeypatch.setattr(fallback, name, set())


def pair(cell="lstm", dtype=torch.float64, **options):
    """A layer under "auto", the same by the reference, and an input."""
    torch.manual_seed(0)
    kind, own = KINDS[cell]
    module = kind(3, 4, dtype=dtype, device=DEVICE, **own, **options)
    exact = copy.deepcopy(module)
    exact.backend = "reference"
    return module, exact, torch.randn(3, 2, 3, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_loop_draws_the_same_dropout_masks(direction, monkeypatch):
    options = {"recurrent_dropout": 0.4, "candidate_dropout": 0.3, "zoneout": 0.3, "bidirectional": True}
    module, exact, x = pair("gru_before", **options)
    torch.manual_seed(7)
    expected = trained(exact, x)
    Broken(monkeypatch, ERRORS["registers"], kernels=[direction])
    torch.manual_seed(7)
    found, said = told(trained, module, x)
    assert len(said) == 1
    close(found, expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS)
def test_the_next_schedule_runs(error, direction, monkeypatch):
    module, exact, x = pair()
    broken = Broken(monkeypatch, ERRORS[error], ["resident"], [direction])
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    (message,) = said
    name = type(ERRORS[error]()).__name__
    for part in (
        f"no kernel for lstm {direction} (float64, hidden size 4, on {DEVICE}",
        f"resident: {name}",
        "stepwise",
    ):
        assert part in message
    assert broken.failed == ["resident"] and {"resident", "stepwise"} == set(broken.started)
    again, said = told(trained, module, x)  # nothing that failed is tried again
    assert not said and broken.failed == ["resident"]
    close(again, found)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS)
def test_torch_runs_where_no_schedule_does(error, direction, monkeypatch):
    module, exact, x = pair()
    broken = Broken(monkeypatch, ERRORS[error], kernels=[direction])
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert len(said) == 1 and "a loop of torch operations" in said[0]
    assert all(f"{schedule}: " in said[0] for schedule in backends.SCHEDULES)
    failed = list(broken.failed)
    assert set(failed) == set(backends.SCHEDULES)
    started = len(broken.started)
    again, said = told(trained, module, x)
    assert not said and broken.failed == failed and len(broken.started) == started
    close(again, found)
    chosen = seqcells.explain("lstm", batch=2, hidden_size=4, dtype=torch.float64, device=DEVICE)
    assert chosen.backend in ("aten", "loop") and "the kernels failed there" in chosen.why


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_without_gradients_only_forward_matters(direction, monkeypatch):
    module, exact, x = pair("gru")
    broken = Broken(monkeypatch, ERRORS["registers"], kernels=[direction])
    for first in (True, False):
        with torch.no_grad():
            (y, h), said = told(module, x)
            close((y, h), exact(x))
        assert len(said) == (first and direction == "forward")
    assert bool(broken.started) == (direction == "backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("cell", KINDS)
def test_the_loop_runs_one_way_and_the_kernels_the_other(cell, direction, dtype, monkeypatch):
    """Both directions of a layer, episodes and lengths; one way by a kernel and the other by the loop."""
    module, exact, x = pair(cell, dtype, bidirectional=True)
    how = {"resets": torch.tensor([[0, 0], [1, 0], [0, 1]], device=DEVICE).bool(), "lengths": [3, 2]}
    kernels = ["forward", "backward"] if direction == "both" else [direction]
    Broken(monkeypatch, ERRORS["shared memory"], kernels=kernels)
    found, said = told(trained, module, x, **how)
    assert len(said) == 1
    expected = trained(exact.double(), x.double(), **how)
    for a, b in zip(found, expected, strict=True):
        assert testing.relative(a, b) <= testing.tolerance(cell, dtype, Shape(3, 2, 3, 4))


def test_save_states_without_its_kernel(monkeypatch):
    module, exact, x = pair("gru", save="states")
    broken = Broken(monkeypatch, ERRORS["does not compile"], schedules=["recompute"])
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert len(said) == 1 and "recompute: CompilationError" in said[0] and broken.failed == ["recompute"]
    assert not told(trained, module, x)[1]


@pytest.mark.parametrize("schedules", [["single"], ["single", "resident"], ["single", *backends.SCHEDULES]], ids=len)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name, schedules, monkeypatch):
    torch.manual_seed(0)
    cell = getattr(seqcells, name)(3, 4, dtype=torch.float64, device=DEVICE)
    exact = copy.deepcopy(cell)
    exact.backend = "reference"
    monkeypatch.setattr(triton, "one_launch", lambda *arguments: True)
    broken = Broken(monkeypatch, ERRORS["an old driver"], schedules)
    x = torch.randn(2, 3, dtype=torch.float64, device=DEVICE)

    def run(module):
        state = module(x)
        outputs = state if isinstance(state, tuple) else (state,)
        return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), list(module.parameters()))]

    for first in (True, False):
        found, said = told(run, cell)
        close(found, run(exact))
        # One for the step; if another schedule is taken, one for each direction of the scan, else one for both.
        assert len(said) == first * {1: 1, 2: 3, 4: 2}[len(schedules)]
    assert "single" in broken.failed


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("error", [*ERRORS, *NOT_CAUGHT])
def test_backend_triton_raises(error, direction, monkeypatch):
    module, _, x = pair(backend="triton")
    Broken(monkeypatch, (ERRORS | NOT_CAUGHT)[error], kernels=[direction])
    for _ in range(2):
        with pytest.raises(type((ERRORS | NOT_CAUGHT)[error]())):
            trained(module, x)
    assert not fallback._failed


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("error", NOT_CAUGHT)
def test_some_errors_are_not_caught(error, direction, monkeypatch):
    module, _, x = pair()
    broken = Broken(monkeypatch, NOT_CAUGHT[error], kernels=[direction])
    for attempts in (1, 2):
        with pytest.raises(type(NOT_CAUGHT[error]()), match=re.escape(str(NOT_CAUGHT[error]()))):
            trained(module, x)
        assert len(broken.failed) == attempts
    assert not fallback._failed


def test_what_the_kernels_cannot_do_at_all(monkeypatch):
    """A plan that fits nowhere is no end either."""
    module, exact, x = pair()

    def refuse(*arguments, **options):
        raise ValueError("hidden size 4 is too large")

    monkeypatch.setattr(triton, "plan_for", refuse)
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert len(said) == 1 and "ValueError: hidden size 4 is too large" in said[0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_in_a_compiled_program(direction, monkeypatch):
    """The graph holds the kernels' operator; compiled again after the failure it holds torch's own."""
    torch._dynamo.reset()
    module, exact, x = pair()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    broken = Broken(monkeypatch, ERRORS["cooperative launch"], kernels=[direction])
    found, said = told(trained, module, x, compiled)
    close(found, trained(exact, x))
    assert len(said) == 1
    failed = len(broken.failed)
    again, said = told(trained, module, x, compiled)
    close(again, found)
    assert not said and len(broken.failed) == failed
    torch._dynamo.reset()

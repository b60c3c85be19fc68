"""Kernels are compared with the float64 reference before they are trusted; what is wrong is refused.

The launches are real (interpreted on the CPU, which here counts as a device that "auto" gives to the kernels), but for
those that a test corrupts.
"""

import contextlib
import copy
import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import own_cells
import pytest
import torch
from conftest import DEVICE
from corrupted import OUTPUTS, Corrupted, close, told, trained
from shapes import SCHEDULES, spread
from timed import layer
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import seqcells
from seqcells import dispatch, fallback, kernel_check, verdicts
from seqcells.cell import named
from seqcells.engines import triton
from seqcells.engines.triton import plan_for
from seqcells.kernel_check import Variant, measure

verification = importlib.import_module("seqcells.verification")  # the class hides the module


@pytest.fixture(autouse=True)
def a_device_for_the_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "own_step", lambda *arguments: False)
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    for name in ("_failed", "refused_kernels"):
        monkeypatch.setattr(fallback, name, set())
    verification.forget()
    monkeypatch.setattr(verification.CURRENT, "policy", "first use")
    yield
    verification.forget()


def measured(cell, direction, schedule, dtype=torch.float64, groups=1, reversed=0, mask=None, save="gates"):
    """The error of a kernel in units of what is allowed, and the tensor."""
    H, like, own = 5, (dtype, torch.device(DEVICE)), named(cell)
    forward, backward = (plan_for(own.key, 40, (groups, H), like, schedule, "ieee", back) for back in (False, True))
    given = (
        (True,) if direction == "forward" else (True, not own.outputs, own.form.states > 1, own.form.states > 1, True)
    )
    v = Variant(direction, own.key, *like, groups, H, reversed, "ieee", save, mask, given)
    plans = [forward] if direction == "forward" else [forward, backward]
    return measure(v, plans, forward.block_b + 3)


CELLS = {"lstm": "lstm", "four": own_cells.four}


def hows():
    """What may go wrong of which cell: kernel, how, cell."""
    for cell, known in CELLS.items():
        form = named(known).form
        there = {"c_ptr": form.states > 1, "dhu_ptr": form.apart, "m_ptr": form.stored, "dparams_ptr": form.params}
        for kernel, names in OUTPUTS.items():
            for how in (*names, "gates", "mask", "step"):
                if there.get(how, True):
                    yield kernel, how, cell


@pytest.mark.parametrize("wrong, schedule", spread(list(hows()), SCHEDULES, most=1))
def test_what_is_wrong_is_noticed(wrong, schedule, monkeypatch):
    """Every output of every kernel, wrong in one element; two gates exchanged, a mask ignored, a step left out."""
    kernel, how, cell = wrong
    direction = "backward" if how == "saved_ptr" else kernel
    for seed in range(2 if how.endswith("_ptr") else 1):
        with monkeypatch.context() as patches:
            corrupted = Corrupted(patches, how, kernel, seed=seed)
            mask = torch.bool if how == "mask" else None
            worst, tensor = measured(CELLS[cell], direction, schedule, mask=mask)
        assert corrupted.wrong and worst > 1, (worst, tensor, seed)


RIGHT = spread(("forward", "backward"), [*CELLS, "shown", "independent", "coupled"], SCHEDULES, most=1)


@pytest.mark.parametrize("direction, cell, schedule", RIGHT)
def test_what_is_right_is_trusted(direction, cell, schedule):
    cell = CELLS.get(cell) or own_cells.CELLS[cell]
    for options in ({"mask": torch.uint8, "groups": 2, "reversed": 2}, {"save": "states"}):
        worst, tensor = measured(cell, direction, schedule, **options)
        assert worst < 0.5, tensor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_in_half_precision(direction, dtype, monkeypatch):
    assert measured("lstm", direction, "resident", dtype)[0] < 0.5
    for how in OUTPUTS[direction][:2] if direction == "forward" else ("dgx_ptr", "dh0_ptr"):
        with monkeypatch.context() as patches:
            Corrupted(patches, how, direction)
            assert measured("lstm", direction, "resident", dtype)[0] > 1, how


WRONG = [("forward", "y_ptr"), ("forward", "step"), ("backward", "dgx_ptr"), ("backward", "gates")]


@pytest.mark.parametrize("kernel, how", WRONG)
@pytest.mark.parametrize("kind", [seqcells.LSTM, seqcells.GRU])
def test_the_next_schedule_runs(kind, kernel, how, monkeypatch):
    module, exact, x = layer(kind)
    corrupted = Corrupted(monkeypatch, how, kernel, ["resident"])
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    (message,) = said
    for part in (
        f"no kernel for {kind.__name__.lower()} {kernel} (float64, hidden size 4, on {DEVICE}",
        "by resident: Wrong: its ",
        "please report this, with what `python -m seqcells info` prints",
        "Instead the stepwise kernel runs",
        "backend='triton' runs a wrong one.",
    ):
        assert part in message
    launched, corrupted.right = corrupted.wrong, []
    again, said = told(trained, module, x)
    assert not said and corrupted.wrong == launched
    close(again, found)


def test_what_is_slow_is_trusted(monkeypatch):
    """Verification compares results, not times. A kernel that hangs cannot be left, here or in the call itself."""
    module, exact, x = layer()
    corrupted = Corrupted(monkeypatch, "slow", "forward")
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert corrupted.wrong >= 2 and not said


@pytest.mark.parametrize("kernel, how", [("forward", "hn_ptr"), ("forward", "saved_ptr"), ("backward", "dgx_ptr")])
def test_torch_runs_where_every_schedule_is_wrong(kernel, how, monkeypatch):
    module, exact, x = layer(bidirectional=True)
    Corrupted(monkeypatch, how, kernel)
    found, said = told(trained, module, x, lengths=[3, 2])
    close(found, trained(exact, x, lengths=[3, 2]))
    assert len(said) == 1 and "a loop of torch operations" in said[0] and said[0].count("Wrong: its ") == 3
    chosen = seqcells.explain("lstm", batch=2, hidden_size=4, dtype=torch.float64, device=DEVICE)
    assert "the kernels failed there" in chosen.why


def explained(**more):
    found = seqcells.explain("lstm", batch=2, hidden_size=4, dtype=torch.float64, device=DEVICE, **more)
    return found, found.verified


def test_explain_says_what_was_verified(monkeypatch):
    """What is stored or known of the kernels that it names, of a device that is present; nothing is measured for it."""
    module, _, x = layer()
    count = counted(monkeypatch)
    assert explained()[1] == ("not verified yet: at its first use",) * 2
    assert explained(backend="triton")[1] == ("not verified: it is asked for by name",) * 2
    with seqcells.verification("off"):
        assert explained()[1] == ("not verified: the policy is off",) * 2
    assert not count
    trained(module, x)
    trained(module, x, lengths=[3, 2])
    verification.forget()  # as in another process
    found, (forward, backward) = explained()
    for text in (forward, backward):
        assert text.startswith("verified on this device (2 of its kind): max error ")
        assert float(text.split()[-5]) < 0.5 and text.endswith(" of what is allowed")
    lines = str(found).splitlines()
    assert lines[lines.index("") + 2] == forward and max(map(len, lines)) <= 80
    elsewhere = seqcells.explain("lstm", batch=2, hidden_size=4, dtype=torch.float64, device="H100")
    assert elsewhere.verified == ("", "") and "verified" not in str(elsewhere)
    assert explained()[0] == found and len(count) == 4


def test_explain_says_what_was_refused(monkeypatch):
    module, _, x = layer()
    Corrupted(monkeypatch, "y_ptr", "forward", ["resident"])
    told(module, x)
    found, (forward, backward) = explained(grad=False)
    assert found.plan.schedule == "resident" and forward.startswith("refused: its y is ")
    assert backward.startswith("not verified yet")
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize("kind", ["heads", "dropout", "states", "own"])
def test_other_layers(kind, monkeypatch):
    """Heads, dropout masks, save="states", a cell with trained vectors and per-step inputs: verified, and right."""
    options = {
        "heads": {"heads": 2},
        "dropout": {"recurrent_dropout": 0.4, "zoneout": 0.3},
        "states": {"save": "states"},
        "own": {},
    }[kind]
    cell = own_cells.four if kind == "own" else "gru"
    how = {"w": torch.rand(3, 2, dtype=torch.float64, device=DEVICE)} if kind == "own" else {}
    module, exact, x = layer(partial(seqcells.Recurrent, cell), **options)
    Corrupted(monkeypatch, "dgx_ptr", "backward", ["resident"])
    torch.manual_seed(7)
    found, said = told(trained, module, x, **how)
    torch.manual_seed(7)
    close(found, trained(exact, x, **how))
    assert len(said) == 1 and "resident: Wrong: its d" in said[0]


def test_what_recomputes_is_wrong(monkeypatch):
    """No backward is right then: the loop's runs, from its own forward."""
    module, exact, x = layer(save="states")
    corrupted = Corrupted(monkeypatch, "saved_ptr", "kernel", ["recompute"])
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert corrupted.wrong and len(said) == 1 and "no kernel for lstm backward" in said[0]


@pytest.mark.parametrize("how, grad", [("hn_ptr", False), ("hn_ptr", True), ("saved_ptr", True), ("gates", False)])
def test_one_step(how, grad, monkeypatch):
    torch.manual_seed(0)
    cell = seqcells.LSTMCell(3, 4, dtype=torch.float64, device=DEVICE)
    exact = copy.deepcopy(cell)
    exact.backend = "reference"
    monkeypatch.setattr(triton, "one_launch", lambda *arguments: True)
    x = torch.randn(2, 3, dtype=torch.float64, device=DEVICE)

    def run(module):
        outputs = module(x)
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), list(module.parameters())) if grad else ()
        return [*outputs, *gradients]

    for wrong in (False, True):
        if wrong:
            verification.forget()
            Corrupted(monkeypatch, how, "kernel", ["single"])
        with torch.set_grad_enabled(grad):
            found, said = told(run, cell)
            close(found, run(exact))
        assert len(said) == wrong and (not wrong or "single: Wrong: its " in said[0])
        monkeypatch.setenv("SEQCELLS_CACHE", "")


def test_in_a_capture_what_is_stored_decides(monkeypatch):
    module, _, x = layer()
    count = counted(monkeypatch)
    captures = verification.possible
    with torch.no_grad():
        monkeypatch.setattr(verification, "possible", lambda device: False)
        module(x)
        assert not count
        monkeypatch.setattr(verification, "possible", captures)
        module(x)
        assert len(count) == 1
        verification.forget()
        file = verdicts.path(x.device, verdicts.VERDICTS)
        stored = json.loads(file.read_text())
        for verdict in stored["verdicts"].values():
            verdict |= {"good": False, "worst": 7.0, "tensor": "y"}
        file.write_text(json.dumps(stored))
        monkeypatch.setattr(verification, "possible", lambda device: False)
        _, said = told(module, x)
        assert len(said) == 1 and "its y is 7.0 times as far from the float64 reference as is allowed" in said[0]


def test_a_capture_and_a_compiler_are_recognized(monkeypatch):
    cuda = torch.device("cuda")
    assert verification.possible(torch.device("cpu"))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        assert verification.possible(cuda) is not capturing
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not verification.possible(torch.device("cpu"))


@pytest.mark.parametrize("where", ["compiled", "vmap", "counting", "inference", "autocast", "checkpoint", "meta"])
def test_the_callers_modes_do_not_reach_a_check(where, monkeypatch):
    """A right kernel is trusted wherever it is first used. What is compiled is verified when it runs."""
    module, exact, x = layer()
    count = counted(monkeypatch)
    torch._dynamo.reset()
    state, modes = torch.get_rng_state(), {"counting": FlopCounterMode(display=False), "meta": torch.device("meta")}
    modes |= {"inference": torch.inference_mode(), "autocast": torch.autocast("cpu", torch.bfloat16, enabled=False)}
    calls = {
        "compiled": lambda: trained(module, x, torch.compile(module, fullgraph=True, backend="aot_eager")),
        "vmap": lambda: [torch.func.vmap(lambda t: module(t)[0])(x[None])[0]],
        "checkpoint": lambda: trained(module, x, lambda t: checkpoint(module, t, use_reentrant=False)),
    }
    with modes.get(where, contextlib.nullcontext()):
        found, said = told(calls.get(where, lambda: [module(x)[0]]))
    assert not said and count
    assert torch.equal(state, torch.get_rng_state())
    close([t.clone() for t in found], trained(exact, x)[: len(found)])
    torch._dynamo.reset()


def test_once(monkeypatch):
    """A kernel is verified once in a process, and not again for other batches and lengths; not in the next process."""
    module, exact, x = layer()
    count = counted(monkeypatch)
    trained(module, x)
    assert [v.direction for v in count] == ["forward", "backward"]
    trained(module, x)
    trained(module, x.repeat(3, 1, 1))
    assert len(count) == 2
    verification.forget()  # as in another process
    trained(module, x)
    assert len(count) == 2
    close(trained(module, x), trained(exact, x))
    with torch.no_grad():
        module(x)
    trained(module, x, resets=torch.ones(3, 2, dtype=torch.bool, device=DEVICE))
    assert [v.direction for v in count] == ["forward", "backward", "forward", "forward", "backward"]
    assert len(json.loads(verdicts.path(x.device, verdicts.VERDICTS).read_text())["verdicts"]) == 5


def test_threads_wait_for_one_check(monkeypatch):
    count, like = counted(monkeypatch), (torch.float64, torch.device(DEVICE))
    plan = plan_for("gru", 2, (1, 4), like, "", "ieee", False)
    of = ("forward", "gru", *like, 1, 4, 0, "ieee", "none", None, (True,))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: verification.verify(of, plan, 2), range(4)))
    assert len(count) == 1 and {(id(plan), *of): plan} == verification.TRUSTED


def test_what_differs_has_another_key():
    """The cell, dtype, hidden size, mask and what is saved; the cell's source."""
    keys = set()
    for cell, dtype, H in (
        ("lstm", 64, 4),
        ("lstm", 32, 4),
        ("lstm", 64, 5),
        ("gru", 64, 4),
        (own_cells.four.key, 64, 4),
    ):
        like = (getattr(torch, f"float{dtype}"), torch.device(DEVICE))
        plan = plan_for(cell, 2, (1, H), like, "", "ieee", False)
        for mask in (None, torch.bool):
            for save in ("none", "gates"):
                v = Variant("forward", cell, *like, 1, H, 0, "ieee", save, mask, (True,))
                keys.add(verification._key(v, [plan], 9))
    assert len(keys) == 20
    other = own_cells.four.with_constants(leak=0.5)
    assert verification.source_of(own_cells.four.key) != verification.source_of(other.key)


def test_policies(monkeypatch):
    module, exact, x = layer()
    count = counted(monkeypatch)
    Corrupted(monkeypatch, "y_ptr", "forward", ["resident"])
    with seqcells.verification("off"):
        found, said = told(trained, module, x)
        assert not count and not said
        with pytest.raises(AssertionError):
            close(found, trained(exact, x))
        seqcells.verification("first use")
        assert verification.CURRENT.policy == "first use"
        seqcells.verification("off")
    assert verification.CURRENT.policy == "first use"
    by_name = copy.deepcopy(module)
    by_name.backend = "triton:resident"
    told(trained, by_name, x)
    assert not count
    close(told(trained, module, x)[0], trained(exact, x))
    assert len(count) == 3  # forward by resident and by stepwise, and backward
    with seqcells.verification("always"):
        with pytest.raises(RuntimeError, match=r"its y is .* please report"):
            by_name(x)
        assert len(count) == 4
        by_name.backend = "triton:stepwise"
        close(trained(by_name, x), trained(exact, x))
        assert len(count) == 6
    with pytest.raises(ValueError, match="unknown policy 'never': expected one of first use, off, always"):
        seqcells.verification("never")


def test_a_check_that_fails_itself(monkeypatch):
    """For lack of memory, say: the kernel runs, with one warning, and nothing is stored."""
    module, exact, x = layer()

    def fail(*arguments):
        raise MemoryError("none left")

    monkeypatch.setattr(kernel_check, "_case", fail)
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    assert len(said) == 2 and "could not be verified, and runs: MemoryError: none left" in said[0]
    assert not told(trained, module, x)[1] and not verdicts.path(x.device, verdicts.VERDICTS).exists()


def test_a_step_that_random_inputs_do_not_suit():
    """It cannot be verified, which is no reason to refuse its kernels."""

    @seqcells.cell(gates="n", states="h")
    def logarithmic(x, U, h):
        return torch.log(x.n + 0 * U.n(h)) + 0.5 * h

    module = seqcells.Recurrent(logarithmic, 3, 4, dtype=torch.float64, device=DEVICE)
    x = torch.rand(3, 2, 3, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        for p in module.parameters():
            p.abs_()
    exact = copy.deepcopy(module)
    exact.backend = "reference"
    found, said = told(trained, module, x)
    close(found, trained(exact, x))
    said = [each for each in said if each.startswith("seqcells: ")]  # NumPy warns, too
    assert len(said) == 2 and all("ValueError: the step is not finite for random inputs" in each for each in said)


def counted(monkeypatch):
    """A list with an entry for each check."""
    found = []

    def measure_and_count(*arguments):
        found.append(arguments[0])
        return measure(*arguments)

    monkeypatch.setattr(kernel_check, "measure", measure_and_count)
    return found

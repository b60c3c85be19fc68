"""How large the kernels' errors are by dtype and length, beside torch.nn's own on the CPU; and the keyword precision=.

Errors are relative and against float64 on the same (rounded) inputs, as everywhere in seqcells.testing. The kernels
interpreted and, behind the slash, torch.nn, on an x86-64 CPU with oneDNN's bfloat16 LSTM; H 20, B 3. `python
tests/test_precision.py` prints all of it (three minutes).

                 y                                    dw_hh
    T            1                 1000               1                 1000
    LSTM fp32    1.1e-7 / 0.9e-7   1.0e-7 / 0.8e-7    1.4e-7 / 1.1e-7   3.4e-7 / 4.4e-7
    GRU fp32     0.8e-7 / 0.7e-7   0.9e-7 / 0.7e-7    1.3e-7 / 1.0e-7   3.1e-7 / 5.2e-7
    LSTM bf16    2.3e-3 / 2.0e-3   2.0e-3 / 2.1e-3    4.3e-3 / 4.2e-3   5.2e-3 / 4.9e-3
    GRU bf16     1.8e-3 / 3.7e-3   1.8e-3 / 3.8e-3    4.2e-3 / 5.1e-3   4.5e-3 / 3.4e-2
    LSTM fp16    2.7e-4 / 5.0e-4   3.0e-4 / 5.1e-4    5.2e-4 / 6.7e-4   5.5e-4 / 4.7e-3
    GRU fp16     2.4e-4 / 4.7e-4   2.3e-4 / 4.9e-4    5.1e-4 / 6.4e-4   4.9e-4 / 4.2e-3

With T the errors of y and dx do not grow: the gates forget old roundings as they forget old inputs. That of dw_hh, a
sum over all steps, grows about 2.5 times over a thousand steps in float32, and hardly in half precision, for one GEMM
sums it in float32; where torch.nn adds the steps' shares up in half precision (fp16, and GRU in bf16), its own grows to
0.4 and 3.4 percent.

Of the bfloat16 error of the LSTM's y, 1.7e-3 is the rounding of y itself, 0.9e-3 that of the input projection, and
0.4e-3 that of h in the recurrent product (emulated one at a time, T 100).
"""

import dataclasses
import os
from contextlib import nullcontext

import pytest
import torch

if __name__ == "__main__":  # before triton is imported, as conftest.py does
    os.environ.setdefault("TRITON_INTERPRET", "1")

from conftest import DEVICE

import seqcells
from seqcells import backends, functional, precisions, reference, testing
from seqcells.engines.loop import steps
from seqcells.kernels import scan
from seqcells.testing import Shape

NAMES = ("y", "dx", "dw_hh")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (1, 10, 100, 1000)
# The kernels' error may be this many times torch.nn's (the most seen is 1.3). Few elements scatter: short lengths are
# the mean of some draws.
FACTOR = 2.0
DRAWS = {1: 12, 10: 3}


def to_nearest(cast):
    """The interpreter's cast, with float32 to bfloat16 rounded to nearest, as devices do. It cuts the lower bits off
    instead: each such error is twice as large and has a sign, which doubles the kernels' in bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def rounding_cast(self, source, kind):
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        return TensorHandle(torch.tensor(source.data).bfloat16().view(torch.uint16).numpy(), kind.scalar)

    return rounding_cast


@pytest.fixture
def rounds_as_devices_do(monkeypatch):
    if backends.interpreted():
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "cast_impl", to_nearest(InterpreterBuilder.cast_impl))


def scanned(cell, tensors, backend):
    """y, and what its gradients are wanted of: x and w_hh."""
    x, w_ih, w_hh, b_ih, b_hh, *states = tensors
    y, _ = functional.scan(cell, x, tuple(states), w_ih, w_hh, b_ih, b_hh, backend=backend, precision="ieee")
    return y, x, w_hh


def torchs(cell, tensors):
    """Likewise from torch.nn's layer, on the CPU."""
    x, w_ih, w_hh, b_ih, b_hh, *states = tensors
    layer = getattr(torch.nn, cell.upper())(x.shape[2], w_hh.shape[1], dtype=x.dtype)
    layer.load_state_dict(dict(zip(layer.state_dict(), (w_ih, w_hh, b_ih, b_hh), strict=True)))
    hx = tuple(s[None] for s in states)
    return layer(x, hx if cell == "lstm" else hx[0])[0], x, layer.weight_hh_l0


def measured(cell, dtype, T, gradients=True):
    """The kernels' and torch.nn's error by quantity, the mean of some draws: {name: (ours, theirs)}."""
    names = NAMES if gradients else NAMES[:1]
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    draws = DRAWS.get(T, 1)
    for seed in range(draws):
        tensors = testing.inputs(cell, Shape(T, 3, 4, 20), dtype, DEVICE, seed=seed)
        found = []
        for run, device, kind in (
            (lambda t: scanned(cell, t, "reference"), "cpu", torch.float64),
            (lambda t: scanned(cell, t, "triton"), DEVICE, dtype),
            (lambda t: torchs(cell, t), "cpu", dtype),
        ):
            with nullcontext() if gradients else torch.no_grad():
                y, *wanted = run([t.to(device, kind, copy=True).requires_grad_() for t in tensors])
            # Ones of either sign: exact in every dtype.
            signs = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 100)).sign().to(y)
            found.append([y.detach(), *(torch.autograd.grad(y, wanted, signs) if gradients else ())])
        exact, *others = found
        for i, got in enumerate(others):
            sums[:, i] += torch.tensor([testing.relative(g, e) for g, e in zip(got, exact, strict=True)])
    return {name: tuple(pair) for name, pair in zip(names, (sums / draws).tolist(), strict=True)}


def line(cell, dtype, T, errors):
    """A line of the table: each quantity's error, torch.nn's and their ratio."""
    shown = (f"{name} {ours:.1e} {theirs:.1e} {ours / theirs:.2f}" for name, (ours, theirs) in errors.items())
    return "   ".join((f"{cell:<5}{str(dtype).removeprefix('torch.'):<9}{T:>5}", *shown))


def assert_small(cell, dtype, T, errors):
    print(line(cell, dtype, T, errors))
    for name, (ours, theirs) in errors.items():
        assert ours <= FACTOR * theirs, f"{name}: {ours} > {FACTOR} * torch.nn's {theirs}"
        assert ours <= testing.TOLERANCE[dtype], f"{name}: {ours}"


@pytest.mark.parametrize("T", LENGTHS[:3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_errors_beside_torchs(cell, dtype, T, rounds_as_devices_do):
    assert_small(cell, dtype, T, measured(cell, dtype, T))


@pytest.mark.parametrize(
    ("cell", "dtype"), [pytest.param("lstm", torch.bfloat16, marks=pytest.mark.slow), ("gru", torch.float32)], ids=str
)
def test_errors_of_a_thousand_steps_forward(cell, dtype, rounds_as_devices_do):
    assert_small(cell, dtype, 1000, measured(cell, dtype, 1000, gradients=False))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_errors_of_a_thousand_steps(cell, dtype, rounds_as_devices_do):
    assert_small(cell, dtype, 1000, measured(cell, dtype, 1000))


# --- half precision on the CPU, without kernels -----------------------------------------------------------------------

CPU_BACKENDS = ("auto", "loop", "reference", "aten")
BESIDE_TORCH = 1.1


def rounded_everywhere(cell, x, states, weights):
    """The reference with every operation rounded: what is written by hand where torch.nn has no such cell."""
    return reference.scan(reference.step_of(cell), x, states, *weights)


def torch_nn(cell, x, states, weights):
    """torch.nn's layer."""
    name, options = ("RNN", {"nonlinearity": cell[4:]}) if cell.startswith("rnn") else (cell.upper(), {})
    layer = getattr(torch.nn, name)(x.shape[2], states[0].shape[1], **options)
    hx = tuple(s[None] for s in states)
    parameters = dict(zip(layer.state_dict(), weights, strict=True))
    y, final = torch.func.functional_call(layer, parameters, (x, hx if cell == "lstm" else hx[0]))
    return y, tuple(s[0] for s in (final if cell == "lstm" else (final,)))


def outputs_and_gradients(run, cell, tensors, dtype):
    """What run gives, and the gradients of all tensors, by name."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    x, *weights = leaves[:5]
    y, final = run(cell, x, tuple(leaves[5:]), weights)
    generator = torch.Generator().manual_seed(7)
    signs = [torch.randn(o.shape, generator=generator).sign().to(o.dtype) for o in (y, *final)]
    gradients = torch.autograd.grad((y, *final), leaves, signs)
    named = dict(zip(testing.outputs(cell), (o.detach() for o in (y, *final)), strict=True))
    return named | {f"d{n}": g for n, g in zip(testing.names(cell), gradients, strict=True)}


@pytest.mark.parametrize("T", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before", "rnn_tanh", "rnn_relu"])
def test_no_larger_errors_than_torchs(cell, dtype, T):
    """Outputs and gradients of every backend, of weights as torch.nn draws them and of larger ones."""
    backends = [b for b in CPU_BACKENDS if (cell, b) != ("gru_before", "aten")]
    runs = {"theirs": rounded_everywhere if cell == "gru_before" else torch_nn}
    for backend in backends:
        runs[backend] = lambda cell, x, states, weights, b=backend: functional.scan(
            cell, x, states, *weights, backend=b
        )
    for scale in (1.0, 0.5):
        sums = {}
        for seed in range(2):
            tensors = testing.inputs(cell, Shape(T, 8, 4, 20), dtype, "cpu", scale=scale, seed=seed)
            exact = outputs_and_gradients(runs["reference"], cell, tensors, torch.float64)
            for name, run in runs.items():
                for what, got in outputs_and_gradients(run, cell, tensors, dtype).items():
                    sums[name, what] = sums.get((name, what), 0) + testing.relative(got, exact[what])
        for backend in backends:
            ratios = {what: sums[backend, what] / sums["theirs", what] for what in exact}
            assert max(ratios.values()) <= BESIDE_TORCH, f"{backend}, scale {scale}: {ratios}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before", "rnn_tanh"])
def test_the_loop_rounds_only_what_it_keeps(cell, masked, dtype, monkeypatch):
    """In pieces of two steps, with masks, saving either: y is float32's, rounded once."""
    monkeypatch.setattr(steps, "CHUNK", 2 * 3 * 20)
    resets = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.1
    masks = {"resets": resets, "lengths": torch.tensor([30, 17, 4])} if masked else {}
    x, *weights, h0, c0 = [*testing.inputs(cell, Shape(30, 3, 4, 20), dtype, "cpu"), None][:7]
    states, found = (h0, c0) if cell == "lstm" else (h0,), []
    for kind, save in ((torch.float32, "gates"), (dtype, "gates"), (dtype, "states")):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (x, *weights, *states)]
        y, final = functional.scan(cell, leaves[0], tuple(leaves[5:]), *leaves[1:5], **masks, backend="loop", save=save)
        gradients = torch.autograd.grad((y, *final), leaves, [torch.ones_like(o) for o in (y, *final)])
        assert {t.dtype for t in (y, *final, *gradients)} == {kind}
        found.append([y, *final, *gradients])
    exact, *others = found
    for got in others:
        for i, (a, b) in enumerate(zip(got, exact, strict=True)):
            # Rounded once, an output is off by less than half of eps; a gradient, from what is kept, by a few of them.
            assert testing.relative(a.detach(), b.detach()) < torch.finfo(dtype).eps * (0.5 if i <= len(states) else 3)


@pytest.fixture
def launched(monkeypatch):
    """The PRECISION of every kernel launched."""
    found = []
    run = scan.run

    def note(launch):
        found.append(launch.arguments.get("PRECISION"))
        run(launch)

    # The launchers' default, which was bound when they were made.
    for launcher in (scan.forward, scan.backward):
        monkeypatch.setitem(launcher.__kwdefaults__, "launch", note)
    return found


def other_switch():
    """A precision that PyTorch's switches do not ask for."""
    return "tf32" if precisions.rnn_precision() == "ieee" else "ieee"


def trained(module, dtype):
    """Forward and backward of a layer or cell."""
    module = module.to(DEVICE, dtype)
    x = torch.randn(2, 2, 3, device=DEVICE, dtype=dtype)
    result = module(x[0] if type(module).__name__.endswith("Cell") else x)
    while isinstance(result, tuple):
        result = result[0]
    result.sum().backward()


MODULES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


@pytest.mark.parametrize("precision", [None, *precisions.PRECISIONS])
@pytest.mark.parametrize("schedule", ["resident", "stepwise"])
@pytest.mark.parametrize("name", MODULES)
def test_precision_reaches_the_kernels(name, schedule, precision, launched):
    module = getattr(seqcells, name)(3, 4, backend=f"triton:{schedule}", precision=precision)
    assert ("precision" in repr(module)) == (precision is not None)
    trained(module, torch.float32)
    assert len(launched) >= 2 and set(launched) == {
        precisions.of_products(precision, torch.float32, torch.device(DEVICE))
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_other_dtypes_ignore_precision(name, dtype, launched):
    for precision in precisions.PRECISIONS:
        trained(getattr(seqcells, name)(3, 4, backend="triton", precision=precision), dtype)
    assert launched and set(launched) == {"ieee"}


def test_autocast_keeps_precision_for_float32_alone(launched):
    layer = seqcells.LSTM(3, 4, backend="triton", precision="tf32x3", device=DEVICE)
    x = torch.randn(2, 2, 3, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        layer(x)
    layer(x)
    assert launched == ["ieee", "tf32x3"]


def test_functions_take_precision(launched):
    asked = other_switch()
    x = torch.randn(2, 2, 3, device=DEVICE)
    for function, gates in ((functional.lstm, 4), (functional.gru, 3), (functional.rnn, 1)):
        weights = torch.randn(gates * 4, 3, device=DEVICE), torch.randn(gates * 4, 4, device=DEVICE)
        function(x, None, *weights, backend="triton", precision=asked)
    assert launched == [asked] * 3


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_other_backends_ignore_precision(backend):
    x, w_ih, w_hh = torch.randn(2, 2, 3), torch.randn(16, 3), torch.randn(16, 4)
    ys = [functional.lstm(x, None, w_ih, w_hh, backend=backend, precision=p)[0] for p in (None, *precisions.PRECISIONS)]
    assert all(torch.equal(y, ys[0]) for y in ys)


@pytest.mark.parametrize("backend", ["auto", "aten", "reference", "triton"])
def test_an_unknown_precision_is_refused(backend, launched):
    words = "unknown precision 'fp32': expected one of ieee, tf32, tf32x3"
    x = torch.ones(2, 2, 3, device=DEVICE)
    weights = torch.ones(16, 3, device=DEVICE), torch.ones(16, 4, device=DEVICE)
    calls = [lambda n=n: getattr(seqcells, n)(3, 4, backend=backend, precision="fp32") for n in MODULES]
    calls += [
        lambda: functional.lstm(x, None, *weights, backend=backend, precision="fp32"),
        lambda: functional.lstm(x.double(), None, *weights, backend=backend, precision="fp32"),
        lambda: seqcells.explain("lstm", batch=1, hidden_size=1, device=DEVICE, backend=backend, precision="fp32"),
    ]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == words
    assert not launched


def test_explain_plans_for_the_precision():
    size = {"batch": 8, "hidden_size": 64, "device": "sm_90", "backend": "triton"}
    if DEVICE == "cpu":  # the plan of a device that is not there is explained only by the default backend
        del size["backend"]
    schedules = {p: seqcells.explain("lstm", **size, precision=p).plan.schedule for p in precisions.PRECISIONS}
    assert schedules == {"ieee": "grid", "tf32": "resident", "tf32x3": "grid"}
    assert "three TF32 products" in seqcells.explain("lstm", **size, precision="tf32x3").plan.why
    followed = seqcells.explain("lstm", **size)
    named = seqcells.explain("lstm", **size, precision=precisions.rnn_precision())
    assert followed == dataclasses.replace(named, case=named.case._replace(precision=None))
    half = {seqcells.explain("lstm", **size, dtype=torch.bfloat16, precision=p).plan for p in precisions.PRECISIONS}
    assert len(half) == 1


if __name__ == "__main__":
    from triton.runtime.interpreter import InterpreterBuilder

    torch.set_num_threads(1)
    InterpreterBuilder.cast_impl = to_nearest(InterpreterBuilder.cast_impl)
    for cell in ("lstm", "gru"):
        for dtype in DTYPES:
            for T in LENGTHS:
                print(line(cell, dtype, T, measured(cell, dtype, T)), flush=True)

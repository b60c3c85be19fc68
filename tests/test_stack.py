"""Layers in one launch each way (kernels/stack.py), against the reference and against the layers one by one.

Interpreted on the CPU, programs run one after the other: what waits for what is seen on a device alone, and in the
compiled code.
"""

import copy
import warnings

import hypothesis.strategies as st
import pytest
import torch
from conftest import DEVICE
from corrupted import OUTPUTS, Corrupted
from hypothesis import given, settings
from test_fallback import Broken
from torch.nn.utils.rnn import pack_padded_sequence

import seqcells
from seqcells import cells, dispatch, fallback
from seqcells.cell import named
from seqcells.engines import stack as engine
from seqcells.kernel_check import Variant, measure
from seqcells.kernels import devices, plan, registry, scan, stack

LIKE = torch.device(DEVICE)
BUILT_IN = ("lstm", "gru", "gru_before", "rnn_tanh", "rnn_relu")


def variants(cell, dtype, hidden, layers=3, mask=None, given=(True, True)):
    """The error of both kernels in training, and of a forward that saves nothing, as verification measures."""
    key, form = named(cell).key, named(cell).form
    precision = "tf32" if dtype == torch.float32 and DEVICE == "cuda" else "ieee"
    plans = [engine.planned(key, (layers, 11, hidden), (dtype, LIKE), precision, back) for back in (False, True)]
    of = (key, dtype, LIKE, layers, hidden, 0, precision)
    rows = plans[0].block_b + 3
    forward = Variant("stack", *of, "none", mask, given)
    ends = (not named(cell).outputs, form.states > 1, False)
    backward = Variant("stack backward", *of, "gates", mask, (True, *ends, given[1]))
    yield measure(backward, plans, rows)
    yield measure(forward, plans[:1], rows)


KINDS = {
    "float32": (torch.float32, None),
    "float32 lengths": (torch.float32, torch.uint8),
    "bfloat16 resets": (torch.bfloat16, torch.bool),
    "float16 lengths": (torch.float16, torch.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", BUILT_IN)
def test_parity(cell, kind):
    """Every output and gradient of every layer, in poisoned memory, with sizes that fill no tile."""
    dtype, mask = KINDS[kind]
    for error in variants(cell, dtype, 20, mask=mask):
        assert error.worst <= 1, error


@pytest.mark.parametrize("hidden, layers", [(2, 2), (16, 4), (64, 2)])
def test_parity_at_other_sizes(hidden, layers):
    for error in variants("lstm", torch.bfloat16, hidden, layers, given=(False, False)):
        assert error.worst <= 1, error


def fits(name):
    """Whether a cell runs as a stack."""
    like = (torch.bfloat16, LIKE)
    try:
        return not isinstance(engine.planned(named(name).key, (2, 3, 20), like, "ieee", False), str)
    except ValueError:
        return False


GALLERY = [name for name in cells.__all__ if name not in BUILT_IN and not named(getattr(cells, name)).inputs]


@pytest.mark.parametrize("name", GALLERY)
def test_parity_of_the_gallery(name):
    """Cells with trained vectors, several products, layer norm: what has a plan is as right."""
    cell = getattr(cells, name)
    if not fits(cell):
        form = named(cell).form
        assert form.gates > form.products or not form.gates
        return
    for error in variants(cell, torch.bfloat16, 20, layers=2):
        assert error.worst <= 1, error


LACKING = ("dhu_ptr", "m_ptr", "dparams_ptr")  # which an LSTM has not
WRONG = [(k, how) for k, hows in OUTPUTS.items() for how in (*hows, "gates", "mask") if how not in LACKING]


@pytest.mark.parametrize("kernel, how", WRONG)
def test_what_is_wrong_is_noticed(kernel, how, monkeypatch):
    """An output that is wrong in one element; two gates exchanged, a mask ignored."""
    corrupted = Corrupted(monkeypatch, how, kernel, schedules=("resident",))
    assert next(variants("lstm", torch.float32, 20, mask=torch.bool)).worst > 1 and corrupted.wrong == 1


class Counted:
    """Launches, of which it counts those of each kernel, and how many layers each has."""

    def __init__(self, monkeypatch):
        self.layers, self.run = [], scan.run
        for launcher in (scan.forward, scan.backward, stack.forward, stack.backward):
            monkeypatch.setitem(launcher.__kwdefaults__, "launch", self)

    def __call__(self, launch):
        self.layers.append(launch.arguments.get("LAYERS", 1))
        self.run(launch)


def trained(layer, call, grads=lambda y, ends: y.square().sum() + sum(s.sin().sum() for s in ends)):
    """The results of a call of a layer, and the gradients of its parameters."""
    layer.zero_grad()
    y, ends = call(layer)
    ends = ends if isinstance(ends, tuple) else (ends,)
    data = y if isinstance(y, torch.Tensor) else y.data
    grads(data, ends).backward()
    return [data, *ends, *(p.grad for p in layer.parameters() if p.grad is not None)]


def check(layer, call, **more):
    """One launch each way gives what a launch for each layer does."""
    apart = copy.deepcopy(layer)
    apart.backend = "triton:resident"
    for a, b in zip(trained(layer, call, **more), trained(apart, call, **more), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture
def tf32():
    """On a device, the input's products as precise as the recurrent ones."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


CALLS = {
    "plain": lambda layer: layer(x(9, 5, 7)),
    "unbatched": lambda layer: layer(x(9, 7)),
    "resets": lambda layer: layer(x(9, 5, 7), resets=x(9, 5) > 1),
    "lengths": lambda layer: layer(x(9, 5, 7), lengths=[9, 1, 5, 8, 3]),
    "packed": lambda layer: layer(pack_padded_sequence(x(9, 3, 7), [9, 6, 2])),
    "unsorted": lambda layer: layer(pack_padded_sequence(x(9, 3, 7), [2, 9, 6], enforce_sorted=False)),
}


@pytest.mark.parametrize(
    "kind, save",
    [(seqcells.LSTM, "gates"), (seqcells.GRU, "gates"), (seqcells.RNN, "states")],  # an RNN saves no gates
)
@pytest.mark.parametrize("call", CALLS)
def test_layers(kind, call, save, monkeypatch, tf32):
    counted = Counted(monkeypatch)
    layer = kind(7, 12, num_layers=3, backend="triton", save=save, device=DEVICE)
    y, _ = CALLS[call](layer)
    (y if isinstance(y, torch.Tensor) else y.data).sum().backward()
    assert counted.layers == [3, 3]
    check(layer, CALLS[call])


def test_given_states_and_partial_gradients(monkeypatch, tf32):
    """Initial states and their gradients; layers that are not trained; a loss of the final states alone."""
    layer = seqcells.LSTM(7, 12, num_layers=2, backend="triton", device=DEVICE)
    h, c = x(2, 5, 12, seed=1).requires_grad_(), x(2, 5, 12, seed=2).requires_grad_()
    given = x(9, 5, 7).requires_grad_()
    found = []
    for backend in ("triton", "triton:resident"):
        layer.backend = backend
        y, (h_n, c_n) = layer(given, (h, c))
        found.append(torch.autograd.grad(y.sum() + (h_n * c_n).sum(), (given, h, c)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    layer.backend = "triton"
    check(layer, CALLS["plain"], grads=lambda y, ends: ends[0][0].sum())
    for p in (layer.weight_ih_l1, layer.bias_hh_l0, layer.weight_hh_l0):
        p.requires_grad_(False)
    check(layer, CALLS["plain"])
    with torch.no_grad():
        assert layer(given)[0].grad_fn is None


def test_bias_free_and_custom_cells(tf32):
    check(seqcells.GRU(7, 12, num_layers=2, bias=False, backend="triton", device=DEVICE), CALLS["resets"])
    check(seqcells.GRU(7, 12, num_layers=2, reset_after=False, backend="triton", device=DEVICE), CALLS["lengths"])

    @seqcells.cell(gates="f n", states="h c", params="p")
    def two(x, U, h, c, p):
        f = torch.sigmoid(x.f + U.f(h) + p * c)
        n = torch.tanh(x.n + U.n(f * h))
        return h + f * (n - h), 0.5 * c + n

    check(seqcells.Recurrent(two, 7, 12, num_layers=3, backend="triton", device=DEVICE), CALLS["resets"])


def test_second_derivatives(tf32):
    """A gradient of a gradient, several gradients at a time, and a Jacobian by forward mode."""
    layer = seqcells.GRU(3, 4, num_layers=2, device=DEVICE)
    given = x(6, 2, 3).requires_grad_()
    found = {}
    for backend in ("triton", "reference"):
        layer.backend = backend
        y, h = layer(given)
        (first,) = torch.autograd.grad(y.square().sum() + h.sum(), given, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), given)
        seeds = torch.stack([torch.ones_like(y), y.detach()])
        several = torch.autograd.grad(layer(given)[0], given, seeds, is_grads_batched=True)
        _, forth = torch.func.jvp(lambda t: layer(t)[0], (given.detach(),), (torch.ones_like(given),))
        found[backend] = [first, second, *several, forth]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_runs_give_the_same_bits(tf32):
    layer = seqcells.LSTM(7, 12, num_layers=3, backend="triton", device=DEVICE)
    for a, b in zip(trained(layer, CALLS["lengths"]), trained(layer, CALLS["lengths"]), strict=True):
        assert torch.equal(a, b)


APART = {
    "one layer": {"num_layers": 1},
    "directions": {"bidirectional": True},
    "dropout": {"dropout": 0.5},
    "projection": {"proj_size": 4},
    "recurrent dropout": {"recurrent_dropout": 0.5},
    "little memory": {"save": "states"},
    "a schedule": {"backend": "triton:stepwise"},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("why", [*APART, "few steps", "all states", "half words", "another precision"])
def test_when_layers_are_launched_one_by_one(why, monkeypatch, tf32):
    counted = Counted(monkeypatch)
    options = {"num_layers": 2, "backend": "triton", "device": DEVICE, "dtype": torch.float32} | APART.get(why, {})
    more = {"return_cell_states": True} if why == "all states" else {}
    if why == "half words":
        options["dtype"] = torch.bfloat16
    if why == "another precision":
        options["precision"] = "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    layer = seqcells.LSTM(7, 11 if why == "half words" else 12, **options)
    layer(x(4 if why == "few steps" else 9, 3, 7).to(options["dtype"]), **more)
    assert set(counted.layers) <= {1}


def test_a_stack_that_fails(monkeypatch, tf32):
    """The layers run one by one, with one warning. Forward and backward fail apart."""
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    for name in ("_failed", "refused_kernels"):
        monkeypatch.setattr(fallback, name, set())
    layer = seqcells.LSTM(7, 12, num_layers=2, device=DEVICE)
    apart = copy.deepcopy(layer)
    apart.backend = "triton:resident"
    expected = trained(apart, CALLS["plain"])
    for kernel in ("backward", "forward"):
        with monkeypatch.context() as patches:
            broken = Broken(patches, lambda: RuntimeError("too many blocks in cooperative launch"), kernels=())
            patches.setattr(
                Broken,
                "__call__",
                lambda self, launch, kernel=kernel: (
                    self.fail(launch)
                    if launch.arguments["LAYERS"] > 1 and launch.kernel.fn.__name__.startswith(kernel)
                    else self.run(launch)
                ),
            )
            patches.setattr(Broken, "fail", lambda self, launch: (_ for _ in ()).throw(self.error()), raising=False)
            with pytest.warns(RuntimeWarning, match=f"no kernel for lstm stack{' backward' * (kernel == 'backward')}"):
                found = trained(layer, CALLS["plain"])
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                trained(layer, CALLS["plain"])
            assert broken is not None


ONES = -1  # the fill


def outcomes(programs=3, steps=3, words=2, without=""):
    """What may go wrong in any order of events: programs in a row, each of which needs the words of the one before.

    In each step a program looks at those words until none is all ones, and stores its own, one by one; the value is the
    step's number. A load may return whatever its word ever was from the fill on, since a store becomes visible at any
    time. That holds for a load made a step ahead, too: what it got may be as old, and all ones is looked at again.
    """
    fill = 0 if without == "the fill" else ONES  # 0: what an earlier launch left
    events = [(t, n) for t in range(1, steps + 1) for n in range(1 + words)]  # 0: a look; n: a store
    seen = {start := (0,) * programs}  # how many events of each program are over
    left, wrong = [start], set()
    while left:
        at = left.pop()
        going = []
        for p in range(programs):
            t, n = events[at[p]] if at[p] < len(events) else (0, 0)
            if t == 0:
                continue
            other = p + 1 if without == "the order" and p == 0 else p - 1
            may = [[t]] * words
            if n == 0 and other >= 0:
                made = events[: at[other]]
                rows = [s for s, _ in events if s % 2 == t % 2] if without == "a row for each step" else [t]
                may = [[fill, *(s for s in sorted(set(rows)) if (s, k) in made)] for k in range(1, 1 + words)]
            found = [[value for value in values if value != ONES] for values in may]
            wrong |= {f"{value} for {t}" for values in found for value in values if value != t}
            if all(found):
                going.append((*at[:p], at[p] + 1, *at[p + 1 :]))
        if not going and any(n < len(events) for n in at):
            wrong.add("nobody can go on")
        left += [state for state in going if state not in seen]
        seen |= set(going)
    return wrong


def test_no_word_is_read_too_early():
    assert outcomes() == outcomes(programs=5, steps=4, words=1) == set()
    assert "0 for 1" in outcomes(without="the fill")
    assert {"1 for 3", "3 for 1"} & outcomes(without="a row for each step")
    assert "nobody can go on" in outcomes(without="the order")


@settings(max_examples=15)
@given(
    st.sampled_from(BUILT_IN), st.integers(2, 4), st.integers(5, 9), st.integers(1, 17), st.integers(1, 12), st.data()
)
def test_any_shape(cell, layers, T, B, half, data):
    """The last layer's output and all final states, against the reference."""
    layer = seqcells.Recurrent(cell, 3, 2 * half, num_layers=layers, device=DEVICE)
    given = x(T, B, 3, seed=data.draw(st.integers(0, 9)))
    found = []
    for backend in ("triton", "reference"):
        layer.backend = backend
        y, state = layer(given)
        found.append((y, *(state if isinstance(state, tuple) else (state,))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", [name for name in devices.KNOWN if name.startswith("sm_")])
def test_plans(target):
    """No more programs than processors, since they wait for each other; and a reason where there is none."""
    device = devices.KNOWN[target]
    for name in registry.BUILT_IN:
        for batch in (1, 8, 100, 1000):
            for layers in (1, 2, 3, 8):
                for hidden in (1, 20, 64, 128, 512):
                    form = named(name).form
                    one = plan.plan(form, B=batch, H=hidden, itemsize=2, device=device)
                    found = stack.plan_stack(form, one, layers, batch, hidden, 2, device)
                    if isinstance(found, str):
                        assert found
                        continue
                    assert layers > 1 and device.capability >= 80
                    assert found.waits and found.schedule == one.schedule == "resident"
                    assert found.programs == (2 * layers - 1) * -(-batch // one.block_b) <= device.processors
    assert stack.steps_pay(2, 100) and not stack.steps_pay(2, 1) and not stack.steps_pay(1, 100)


def test_explain():
    shape = {"batch": 16, "hidden_size": 64, "dtype": torch.bfloat16, "device": "H100"}
    assert "all 3 in one launch" in str(seqcells.explain("lstm", layers=3, **shape))
    assert "1000 programs" not in str(seqcells.explain("lstm", layers=1, **shape))
    assert seqcells.explain("lstm", layers=1, **shape).layers == ""
    few = seqcells.explain("lstm", layers=3, steps=2, **shape).layers
    assert few == "layers: one launch each, because 2 steps are too few"
    assert "several directions" in seqcells.explain("lstm", layers=2, groups=2, **shape).layers
    assert "runs by grid" in seqcells.explain("lstm", layers=2, **shape | {"hidden_size": 512}).layers

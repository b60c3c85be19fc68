"""The modules against torch.nn's: values, gradients, parameters, and the errors for bad input."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE
from shapes import SCHEDULES

import seqcells
from seqcells.tasks.handwritten import HandwrittenGRUCell, HandwrittenLSTMCell

LAYERS = ["LSTM", "GRU", "RNN"]
CELL_CLASSES = ["LSTMCell", "GRUCell", "RNNCell"]


@pytest.fixture(autouse=True)
def on_the_device():
    """Tensors and modules are made where the kernels run."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def pair(name, *args, **options):
    """torch.nn's module and ours, with the same seed."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **options)
    torch.manual_seed(0)
    return theirs, getattr(seqcells, name)(*args, **options)


def flat(result):
    y, final = result if isinstance(result, tuple) else (result, ())
    return [y, *(final if isinstance(final, tuple) else (final,))]


def compare(theirs, ours, *args):
    """Outputs and all gradients, of the inputs' too."""
    found = []
    for module in (theirs, ours):
        leaves = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        leaves = [tuple(t.clone().requires_grad_() for t in a) if isinstance(a, tuple) else a for a in leaves]
        outputs = flat(module(*leaves))
        inputs = [*module.parameters()]
        for a in leaves:
            inputs += list(a) if isinstance(a, tuple) else [a]
        weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
        found.append((outputs, torch.autograd.grad(outputs, inputs, weights)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["aten", "reference", "triton:resident", "triton:stepwise"])
@pytest.mark.parametrize("form", ["batched", "batch_first", "unbatched", "no bias", "no hx"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torch_nns(name, form, backend):
    options = {"dtype": torch.float64, "batch_first": form == "batch_first", "bias": form != "no bias"}
    theirs, ours = pair(name, 3, 5, **options)
    ours.backend = backend
    x = torch.randn(4, 3) if form == "unbatched" else torch.randn(4, 2, 3)
    batch = {"unbatched": (), "batch_first": (4,)}.get(form, (2,))
    hx = tuple(torch.randn(1, *batch, 5, dtype=torch.float64) for _ in range(2))
    args = () if form == "no hx" else (hx if name == "LSTM" else hx[0],)
    compare(theirs, ours, x.double(), *args)


def test_relu_layer():
    compare(*pair("RNN", 3, 5, 1, "relu", dtype=torch.float64), torch.randn(4, 2, 3).double())


@pytest.mark.parametrize("backend", ["aten", "reference", "triton"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", CELL_CLASSES)
def test_cells_are_torch_nns(name, batched, backend):
    theirs, ours = pair(name, 3, 5, dtype=torch.float64)
    ours.backend = backend
    batch = (2,) if batched else ()
    hx = tuple(torch.randn(*batch, 5, dtype=torch.float64) for _ in range(2))
    compare(theirs, ours, torch.randn(*batch, 3).double(), hx if name == "LSTMCell" else hx[0])


@pytest.mark.parametrize("name", LAYERS + CELL_CLASSES)
def test_parameters_are_torch_nns(name):
    theirs, ours = pair(name, 3, 5)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    again = getattr(seqcells, name)(3, 5)
    again.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(again.state_dict())
    assert repr(ours) == f"seqcells.{theirs!r}"
    x = torch.randn(2, 3)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(flat(copied(x))[0], flat(ours(x))[0])


def test_reset_before_gru():
    torch.manual_seed(0)
    layer = seqcells.GRU(3, 4, reset_after=False, dtype=torch.float64)
    cell = seqcells.GRUCell(3, 4, reset_after=False, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    assert "reset_after=False" in repr(layer) and "reset_after=False" in repr(cell)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    h, outputs = None, []
    for step in x:
        h = cell(step, h)
        outputs.append(h)
    with seqcells.backend("triton" if DEVICE == "cpu" else "reference"):
        torch.testing.assert_close(layer(x)[0], torch.stack(outputs))


@pytest.mark.parametrize("backend", ["reference", *(f"triton:{s}" for s in SCHEDULES)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_resets_are_separate_runs(name, batch_first, backend):
    """A row that is reset at step 3 is its first three steps and, from zero, the others."""
    torch.manual_seed(0)
    layer = getattr(seqcells, name)(2, 4, batch_first=batch_first, dtype=torch.float64, backend=backend)
    x = torch.randn(2, 5, 2, dtype=torch.float64)
    resets = torch.zeros(2, 5, dtype=torch.bool)
    resets[1, 3] = True
    turned = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    y, _ = layer(turned(x), resets=turned(resets))
    parts = [layer(turned(part))[0] for part in (x[:1], x[1:, :3], x[1:, 3:])]
    expected = torch.cat([turned(parts[0]), torch.cat([turned(parts[1]), turned(parts[2])], 1)])
    torch.testing.assert_close(turned(y), expected)


def layer_calls(m):
    """Calls that torch.nn refuses; m is the namespace of the classes."""
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    lstm, gru = m.LSTM(3, 4), m.GRU(3, 4)
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]])
    return {
        "rank": lambda: lstm(x[0, 0]),
        "input size": lambda: lstm(x[..., :2]),
        "integers": lambda: lstm(x.long()),
        "dtype": lambda: gru(x.double()),
        "no steps": lambda: lstm(x[:0]),
        "hx batch": lambda: lstm(x, (h, h[:, :1])),
        "hx hidden": lambda: gru(x, h[..., :3]),
        "hx rank": lambda: gru(x, h[0]),
        "hx rank of two": lambda: lstm(x, (h[0], h[0])),
        "hx rank unbatched": lambda: lstm(x[0], (h, h)),
        "device": lambda: lstm(x.to("meta")),
        "hx device": lambda: lstm(x, (h.to("meta"), h)),
        "packed hx batch": lambda: gru(packed, h[:, :1]),
        "packed hx of more": lambda: gru(packed, torch.randn(1, 3, 4)),
        "packed rank": lambda: gru(packed._replace(data=packed.data[None])),
        "packed input size": lambda: gru(packed._replace(data=packed.data[:, :2])),
        "packed dtype": lambda: gru(packed._replace(data=packed.data.double())),
        "three hx": lambda: lstm(x, (h, h, h)),
        "hx and rank": lambda: lstm(x[0, 0], (h,)),
        "bias": lambda: m.LSTM(3, 4, bias=1),
        "batch_first": lambda: m.LSTM(3, 4, batch_first="yes"),
        "sizes": lambda: m.LSTM(0, 4),
        "hidden": lambda: m.GRU(3, -4),
        "size type": lambda: m.RNN(3.0, 4),
        "layers": lambda: m.LSTM(3, 4, 0),
        "dropout": lambda: m.LSTM(3, 4, dropout=2),
        "nonlinearity": lambda: m.RNN(3, 4, nonlinearity="gelu"),
        "proj": lambda: m.GRU(3, 4, proj_size=2),
        "cell rank": lambda: m.LSTMCell(3, 4)(x),
        "cell hx rank": lambda: m.GRUCell(3, 4)(x[0], h),
        "cell input": lambda: m.GRUCell(3, 4)(x[0, :, :2]),
        "cell batch": lambda: m.LSTMCell(3, 4)(x[0], (h[0], h[0, :1])),
        "cell dtype": lambda: m.GRUCell(3, 4)(x[0].double()),
        "cell integers": lambda: m.GRUCell(3, 4)(x[0].long()),
        "cell hx dtype": lambda: m.GRUCell(3, 4)(x[0], h[0].double()),
        "cell hidden": lambda: m.GRUCell(3, 4)(x[0], h[0, :, :2]),
    }


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("call", list(layer_calls(torch.nn)))
def test_bad_input_raises_what_torch_raises(call, backend, monkeypatch):
    with pytest.raises(Exception) as theirs:
        layer_calls(torch.nn)[call]()
    launched = []
    monkeypatch.setattr(seqcells.dispatch.autograd, "apply", lambda *a, **k: launched.append(a))
    with seqcells.backend(backend), pytest.raises(type(theirs.value)) as ours:
        layer_calls(seqcells)[call]()
    assert str(ours.value) == str(theirs.value)
    assert not launched


def ours_alone():
    """Calls only seqcells has, or refuses in its own words: (call, exception, words)."""
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    layer = seqcells.LSTM(3, 4)
    return {
        "backend": (lambda: seqcells.LSTM(3, 4, backend="cuda")(x), ValueError, "unknown backend 'cuda'"),
        "schedule": (lambda: seqcells.LSTM(3, 4, backend="triton:fast")(x), ValueError, "unknown backend"),
        "context": (lambda: seqcells.backend("fast").__enter__(), ValueError, "unknown backend 'fast'"),
        "save": (lambda: seqcells.LSTM(3, 4, save="all"), ValueError, "unknown save 'all'"),
        "hx dtype": (lambda: layer(x, (h.double(), h)), RuntimeError, "hidden tensors are not the same dtype"),
        "one hx": (lambda: layer(x, (h,)), TypeError, "hx must be a tuple of two tensors .* got a tuple of 1"),
        "no dropout": (lambda: seqcells.LSTM(3, 4, dropout=None), TypeError, "dropout should be a number .* got None"),
        # torch.nn.LSTM does not look at these, and may crash.
        "packed hx": (
            lambda: layer(torch.nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]]), (h, h[:, :1])),
            RuntimeError,
            r"Expected hidden\[1\] size \(1, 2, 4\), got \[1, 1, 4\]",
        ),
        "bidirectional": (lambda: seqcells.GRU(3, 4, bidirectional=1), TypeError, "should be of type bool"),
        "resets dtype": (
            lambda: layer(x, resets=torch.zeros(5, 2, dtype=torch.complex64)),
            TypeError,
            "must be a tensor or nested list",
        ),
        "resets shape": (
            lambda: layer(x, resets=torch.zeros(2, 5, dtype=torch.bool)),
            RuntimeError,
            r"Expected resets size \(5, 2\), got \[2, 5\]",
        ),
        "aten resets": (
            lambda: seqcells.GRU(3, 4, backend="aten")(x, resets=torch.zeros(5, 2, dtype=torch.bool)),
            RuntimeError,
            "no resets",
        ),
        "aten cell": (lambda: seqcells.GRU(3, 4, reset_after=False, backend="aten")(x), RuntimeError, "gru_before"),
        "dtype": (
            lambda: seqcells.LSTM(3, 4, backend="triton", dtype=torch.complex64)(x.to(torch.complex64)),
            TypeError,
            "floating point",
        ),
        "no fit": (
            lambda: seqcells.LSTM(3, 600, backend="triton:resident")(x),
            ValueError,
            "resident schedule does not fit hidden size 600",
        ),
        "cell hx": (lambda: seqcells.LSTMCell(3, 4)(x[0], h), TypeError, "tuple of two tensors"),
        "w_hh": (
            lambda: seqcells.lstm(x, None, torch.ones(16, 3), torch.ones(15, 4)),
            RuntimeError,
            r"w_hh must have shape \(4\*H, H\), got \(15, 4\)",
        ),
        "states": (
            lambda: seqcells.functional.scan("gru", x, (h[0], h[0]), torch.ones(12, 3), torch.ones(12, 4)),
            RuntimeError,
            "gru has 1 state, got 2",
        ),
        "cell": (lambda: seqcells.explain("gpu", batch=1, hidden_size=1), ValueError, "unknown cell 'gpu'"),
    }


@pytest.mark.parametrize("name", list(ours_alone()))
def test_bad_input_of_our_own(name):
    call, error, words = ours_alone()[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_a_backend_that_can_run_nowhere_is_refused_at_construction(kind):
    """What only cannot run here is refused at the call: the module may be moved."""
    make = getattr(seqcells, kind)
    for unknown in ("trition", "AUTO", "triton:warp", "", 5):
        with pytest.raises(ValueError, match=f"unknown backend {unknown!r}: expected one of auto, triton, aten"):
            make(3, 4, backend=unknown)
        with pytest.raises(ValueError, match=f"unknown backend {unknown!r}"):
            seqcells.convert(getattr(torch.nn, kind)(3, 4), backend=unknown)
    with pytest.raises(ValueError, match="unknown backend 'trition'"):
        seqcells.rnn(torch.zeros(2, 1, 3), None, torch.zeros(4, 3), torch.zeros(4, 4), backend="trition")
    module = make(3, 4, backend="triton", device="meta")
    with pytest.raises(RuntimeError, match="the triton backend needs CUDA tensors, got tensors on meta"):
        module(torch.zeros(2, 3, device="meta"))
    converted = seqcells.convert(getattr(torch.nn, kind)(3, 4, device="meta"), backend="triton")
    with pytest.raises(RuntimeError, match="the triton backend needs CUDA tensors"):
        converted(torch.zeros(2, 3, device="meta"))
    if kind.startswith("GRU"):
        with pytest.raises(RuntimeError, match="torch has no fused gru_before; use backend='triton', 'loop'"):
            make(3, 4, reset_after=False, backend="aten")
        make(3, 4, reset_after=False, backend="loop")
        make(3, 4, backend="aten")


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch(name):
    theirs, ours = pair(name, 3, 4)
    for backend in ("auto", "triton"):
        ours.backend = backend
        assert flat(ours(torch.zeros(5, 0, 3)))[0].shape == flat(theirs(torch.zeros(5, 0, 3)))[0].shape


def test_parameters_are_read_at_each_call():
    """weight_norm, frozen and strided weights just work."""
    torch.manual_seed(0)
    layer = seqcells.LSTM(3, 4, backend="triton", dtype=torch.float64)
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    layer.weight_ih_l0.requires_grad_(False)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    layer(x)[0].sum().backward()
    assert layer.weight_ih_l0.grad is None and layer.parametrizations.weight_hh_l0.original0.grad.abs().sum() > 0
    strided = torch.randn(8, 16, dtype=torch.float64).t()[:, ::2]
    y, _ = seqcells.lstm(x, None, torch.randn(16, 3, dtype=torch.float64), strided, backend="triton")
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_handwritten_cells_load_into_the_fused_ones(kind, dtype):
    torch.manual_seed(0)
    lstm = kind == "lstm"
    hand = (HandwrittenLSTMCell if lstm else HandwrittenGRUCell)(2, 20).to(dtype)
    fused = seqcells.LSTM(2, 20, dtype=dtype) if lstm else seqcells.GRU(2, 20, reset_after=False, dtype=dtype)
    fused.load_state_dict({f"{k}_l0": v for k, v in hand.cell_state_dict().items()})
    x = torch.randn(6, 3, 2, dtype=dtype)
    zero = torch.zeros(3, 20, dtype=dtype)
    state, outputs = (zero, zero) if lstm else zero, []
    for step in x:
        state = hand(step, state)
        outputs.append(state[0] if lstm else state)
    expected = torch.stack(outputs)
    expected.square().sum().backward()
    gradients = type(hand)(2, 20).to(dtype)
    for target, source in zip(gradients.parameters(), hand.parameters(), strict=True):
        target.data = source.grad
    for backend in (f"triton:{s}" for s in SCHEDULES):
        fused.backend = backend
        fused.zero_grad()
        y, _ = fused(x)
        y.square().sum().backward()
        assert seqcells.testing.relative(y.detach(), expected.detach()) < 1e-6
        for name, exact in gradients.cell_state_dict().items():
            assert seqcells.testing.relative(getattr(fused, f"{name}_l0").grad, exact) < 1e-6
    again = type(hand)(2, 20).to(dtype)
    again.load_cell_state_dict({k.removesuffix("_l0"): v for k, v in fused.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), hand.parameters(), strict=True))


@pytest.mark.parametrize("backend", ["aten", "reference", "triton"])
@pytest.mark.parametrize("name", LAYERS + CELL_CLASSES)
def test_states_can_be_detached_in_place(name, backend):
    """As truncated back-propagation does."""
    module = getattr(seqcells, name)(3, 4, backend=backend)
    x = torch.randn(2, 3) if name in CELL_CLASSES else torch.randn(5, 2, 3)
    result = module(x)
    final = result if name in CELL_CLASSES else result[1]
    for state in final if isinstance(final, tuple) else (final,):
        assert state.requires_grad
        state.detach_()


@pytest.mark.parametrize("backend", ["aten", "reference", "triton"])
@pytest.mark.parametrize("name", LAYERS + CELL_CLASSES)
def test_autocast(name, backend):
    """Everything runs in autocast's dtype, whatever mixture comes in; gradients are in the parameters' own."""
    torch.manual_seed(0)
    module, before = getattr(seqcells, name)(3, 20, backend=backend), torch.nn.Linear(3, 3)
    x = torch.randn(2, 3) if name in CELL_CLASSES else torch.randn(5, 2, 3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = flat(module(before(x)))[0]
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    exact = flat(module.double()(before.double()(x.double())))[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert seqcells.testing.relative(y.detach(), exact.detach()) < 0.02


@pytest.mark.parametrize("name", LAYERS)
def test_compile_of_the_default_backend_trains(name):
    torch.manual_seed(0)
    module = getattr(seqcells, name)(3, 4)
    x = torch.randn(5, 2, 3)
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x)[0].sum(), list(module.parameters())), expected)

"""torch.compile, torch.export and torch.jit.trace of whole models. The operators by themselves: test_ops.py."""

import io
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE
from shapes import spread
from test_transforms import Net, batch, loss, net
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import grad
from torch.nn.utils.rnn import pack_padded_sequence

import seqcells
from seqcells import dispatch

BACKENDS = [None, "loop", "triton", "reference"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_without_breaks(backend, resets):
    module, (x, begins) = net(backend, torch.float32), batch(torch.float32, T=2)
    found = torch._dynamo.explain(module)(x, *([begins] if resets else []))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def trained(module, function, x, resets, steps=5):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(function(x, resets)).backward()
        optimizer.step()
    return dict(module.named_parameters())


# Inductor calls the C++ compiler, which takes its time.
INDUCTOR = [(None, "inductor"), *(pytest.param(b, "inductor", marks=pytest.mark.slow) for b in ("loop", "triton"))]


@pytest.mark.parametrize(("backend", "compiler"), [(b, "aot_eager") for b in BACKENDS] + INDUCTOR)
def test_training_compiled_is_training(backend, compiler):
    x, resets = batch(torch.float32, T=2)
    eager, compiled = net(backend, torch.float32), net(backend, torch.float32)
    expected = trained(eager, eager, x, resets)
    function = torch.compile(compiled, fullgraph=True, backend=compiler)
    torch.testing.assert_close(trained(compiled, function, x, resets), expected)


@pytest.mark.parametrize("resets", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("backend", [pytest.param(b, marks=[pytest.mark.slow] * (b == "triton")) for b in BACKENDS[:3]])
def test_other_lengths_and_batches_compile_no_more(backend, resets):
    """The first T compiles, the second compiles for any T, and so with B: no third of either."""
    module, counter = net(backend, torch.float32), CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(module, fullgraph=True, backend=counter), []
    for T, B in ((3, 2), (4, 2), (5, 2), (6, 3), (2, 4), (3, 5)):
        x, begins = batch(torch.float32, T=T, B=B)
        given = (x, begins) if resets else (x,)
        torch.testing.assert_close(compiled(*given), module(*given))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_compile_of_everything_else(backend):
    """Lengths, packed sequences, a projection, cell states, and cells, each one graph."""
    options = {"backend": backend, "device": DEVICE}
    module = seqcells.LSTM(3, 4, proj_size=2, **options)
    plain, cell = seqcells.LSTM(3, 4, bidirectional=True, **options), seqcells.GRUCell(3, 4, **options)
    x, _ = batch(torch.float32)
    lengths = torch.tensor([3, 2], device=DEVICE)
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)

    def run(x, lengths, data):
        y, _, every = module(x, lengths=lengths, return_cell_states=True)
        z, _ = plain(packed._replace(data=data))
        return y, every, z.data, cell(x[0])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    weights = [*module.parameters(), *plain.parameters(), *cell.parameters()]
    expected, found = run(x, lengths, packed.data), compiled(x, lengths, packed.data)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad(sum(map(loss, found)), weights), grad(sum(map(loss, expected)), weights))


@pytest.mark.parametrize(("backend", "resets", "strict"), spread(BACKENDS, [False, True], [False, True], most=1))
def test_export(backend, resets, strict):
    """The exported program, saved and loaded, for any T and B; the reference's, which is unrolled, for its own T."""
    module, (x, begins) = net(backend, torch.float32).eval(), batch(torch.float32)
    given = (x, begins) if resets else (x,)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    sizes = {1: B} if backend == "reference" else {0: T, 1: B}
    shapes = {"x": sizes, "resets": sizes if resets else None}
    exported = torch.export.export(module, given, dynamic_shapes=shapes if resets else {"x": sizes}, strict=strict)
    if not strict:
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        exported = torch.export.load(file)
    for steps, rows in ((3, 2), (3 if backend == "reference" else 5, 4)):
        x, begins = batch(torch.float32, T=steps, B=rows)
        given = (x, begins) if resets else (x,)
        torch.testing.assert_close(exported.module()(*given), module(*given))


# Of torch.jit.trace itself, by torch 2.13.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", [None, "loop", "triton"])
def test_trace(backend):
    """A traced model runs on other shapes and can be saved. "auto" and "aten" can be trained too, through torch's own
    operators; the others' operators have no gradients outside a Function, which a trace cannot hold, and say so."""
    module, (x, begins) = net(backend, torch.float32), batch(torch.float32)
    given = (x,) if backend is None else (x, begins)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, given), file)
    file.seek(0)
    traced = torch.jit.load(file).to(DEVICE)
    for steps, rows in ((3, 2), (5, 3)):
        x, begins = batch(torch.float32, T=steps, B=rows)
        given = (x,) if backend is None else (x, begins)
        torch.testing.assert_close(traced(*given), module(*given))
    if backend is None and DEVICE == "cpu":
        expected = grad(loss(module(*given)), list(module.parameters()))
        torch.testing.assert_close(grad(loss(traced(*given)), list(traced.parameters())), expected)
    else:
        with pytest.raises(RuntimeError, match="no autograd formula"):
            loss(traced(*given)).backward()


@pytest.mark.parametrize("backend", [None, "loop"])
def test_compile_of_torch_func(backend):
    """torch.func inside torch.compile: per-sample gradients."""
    module, (x, _) = net(backend, torch.float32), batch(torch.float32, B=3)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def samples(p, x):
        def one(p, x):
            return loss(torch.func.functional_call(module, p, (x[:, None],)))

        return torch.vmap(torch.func.grad(one), in_dims=(None, 1))(p, x)

    expected = samples(parameters, x)
    torch.testing.assert_close(torch.compile(samples, backend="aot_eager")(parameters, x), expected)


def test_modules_are_compiled_in_place():
    """Module.compile(), and a model of torch.nn's layers beside ours."""
    module = nn.Sequential(nn.Linear(3, 3), Net("loop")).to(DEVICE)
    x, _ = batch(torch.float32)
    expected = module(x)
    module[1].compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    "name", ["LSTM", "GRUCell", *(pytest.param(n, marks=pytest.mark.slow) for n in ("GRU", "RNN", "LSTMCell"))]
)
def test_an_exported_program_needs_no_operator_of_our_own(name, tmp_path):
    """What is saved of plain layers is loaded and run where seqcells is not installed."""
    options = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    module = getattr(seqcells, name)(3, 4, **options).eval()
    x = torch.randn(5, 3) if name.endswith("Cell") else torch.randn(6, 5, 3)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
    torch.save((x, module(x)), tmp_path / "expected.pt")
    program = f"""
import sys, torch
program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(program(x), expected)
assert "seqcells" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_what_an_onnx_export_takes(monkeypatch):
    """ONNX knows torch's fused layers and plain operations; the exporters themselves: tests/integrations."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    chosen = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    x = torch.randn(3, 2, 3)
    resets = torch.zeros(3, 2, dtype=torch.bool)

    def taken(module, **options):
        chosen.clear()
        torch.export.export(module, (x,), options)
        return {c.engine for c in chosen}

    for module in (seqcells.LSTM(3, 4), seqcells.GRU(3, 4, 2, bidirectional=True), seqcells.RNN(3, 4)):
        assert taken(module) == {"aten"}
        assert taken(module, resets=resets) == {"reference"}
        assert taken(module, lengths=torch.tensor([3, 1])) == {"reference"}
    assert taken(seqcells.GRU(3, 4, reset_after=False)) == {"reference"}

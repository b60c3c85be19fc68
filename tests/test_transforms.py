"""What torch does with whole modules: torch.func, forward and second derivatives, checkpoints, autocast, copies.

torch.compile, torch.export and torch.jit: test_compile.py.
"""

import copy
import io
import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.autograd import forward_ad, grad
from torch.utils.checkpoint import checkpoint

import seqcells
from seqcells.engines import operators

BACKENDS = [None, "loop", "triton"]  # None: oneDNN's LSTM, on the CPU
ENGINES = ["loop", "triton"]


class Net(nn.Module):
    def __init__(self, backend=None, **options):
        super().__init__()
        options |= {"backend": backend, "bidirectional": True}
        self.lower = seqcells.LSTM(3, 4, **options)
        self.upper = seqcells.GRU(8, 3, **options)
        self.head = nn.Linear(6, 2)

    def forward(self, x, resets=None):
        return self.head(self.upper(self.lower(x, resets=resets)[0], resets=resets)[0])


def net(backend=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Net(backend, **options).to(DEVICE, dtype)


def batch(dtype=torch.float64, T=3, B=2):
    torch.manual_seed(1)
    return torch.randn(T, B, 3, device=DEVICE, dtype=dtype), torch.rand(T, B, device=DEVICE) < 0.3


def loss(y):
    return y.square().sum()


# --- derivatives of every order and direction -----------------------------------------------------------------------


def small(kind, backend, **options):
    """A tiny layer or cell as a function of x and its parameters, and these, in double precision."""
    torch.manual_seed(2)
    cell = kind.endswith("Cell")
    module = getattr(seqcells, kind)(2, 2, backend=backend, **options).to(DEVICE, torch.float64)
    names = [name for name, _ in module.named_parameters()]
    x = torch.randn(*(() if cell else (2,)), 2, 2, device=DEVICE, dtype=torch.float64)
    resets = torch.tensor([[False, True], [True, False]], device=DEVICE)
    more = {} if cell else {"resets": resets}

    def function(x, *weights):
        out = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,), more)
        if isinstance(out, torch.Tensor):
            return out
        flat = [t for o in out for t in (o if isinstance(o, tuple) else (o,))]
        return torch.cat([t.flatten() for t in flat])

    return function, [x, *(p.detach() for p in module.parameters())]


DERIVED = [
    ("LSTM", {}),
    ("LSTM", {"bidirectional": True}),
    ("LSTM", {"proj_size": 1}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("RNN", {}),
    ("LSTMCell", {}),
    ("GRUCell", {}),
    ("RNNCell", {}),
]


def derived():
    """The kernels, interpreted, by default only on what has parts of its own: the rest takes minutes."""
    for kind, options in DERIVED:
        for backend in BACKENDS:
            slow = backend == "triton" and bool(options or kind not in ("LSTM", "GRUCell"))
            yield pytest.param(kind, options, backend, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("kind", "options", "backend"), list(derived()))
def test_derivatives_of_every_order(kind, options, backend):
    """First and second, backward and forward, each against finite differences."""
    function, tensors = small(kind, backend, **options)
    for t in tensors:
        t.requires_grad_()
    # Forward mode on the kernels: test_forward_mode, in fewer launches.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=backend != "triton")
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend):
    """create_graph=True in float32, where "auto" on the CPU is oneDNN's LSTM, in which nothing differentiates twice."""
    found = []
    for b in (backend, "reference"):
        module = net(b, torch.float32)
        x, resets = batch(torch.float32)
        x.requires_grad_()
        each = []
        for r in (None, resets):
            (dx,) = grad(loss(module(x, r)), x, create_graph=True)
            each += grad(dx.norm() + loss(module(x, r)), list(module.parameters()))
        found.append(each)
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
def test_forward_mode(backend):
    function, tensors = small("LSTM", backend, bidirectional=True)
    reference, _ = small("LSTM", "reference", bidirectional=True)
    tangents = [torch.randn_like(t) for t in tensors]
    expected = torch.func.jvp(reference, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(torch.func.jvp(function, tuple(tensors), tuple(tangents)), expected)
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, tensors, tangents))
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(dual)), expected)
    torch.testing.assert_close(
        torch.func.jacfwd(function, argnums=2)(*tensors), torch.func.jacrev(reference, argnums=2)(*tensors)
    )


@pytest.mark.parametrize("backend", ENGINES)
def test_hessian(backend):
    found = []
    for b in (backend, "reference"):
        function, tensors = small("GRU", b)

        def scalar(w, function=function, tensors=tensors):
            return loss(function(tensors[0], tensors[1], w, *tensors[3:]))

        found.append(torch.func.hessian(scalar)(tensors[2]))
    torch.testing.assert_close(*found)


# --- vmap -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls():
    """The names of the operators that ran, in order."""
    ran = []

    def counted(op):
        name = op._name

        def body(*arguments):
            ran.append(name)
            return op._init_fn(*arguments)

        return body

    kept = []
    for op in (operators.scan_forward, operators.scan_backward):
        kept.append((op, dict(op._backend_fns)))
        op.register_kernel(None, counted(op))
    yield ran
    for op, functions in kept:
        for device, function in functions.items():
            op.register_kernel(device, function)


NAMES = ("scan_forward", "scan_backward")


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_an_ensemble_is_one_launch(kind, backend, calls):
    """Modules with stacked weights: groups of one launch, forward and backward, and the gradients of each module."""
    torch.manual_seed(0)
    options = {"backend": backend, "device": DEVICE, "dtype": torch.float64, "bidirectional": True}
    modules = [getattr(seqcells, kind)(3, 4, **options) for _ in range(3)]
    x, resets = batch()
    parameters, buffers = torch.func.stack_module_state(modules)

    def run(p, b):
        return torch.func.functional_call(modules[0], (p, b), (x,), {"resets": resets})[0]

    del calls[:]
    y = torch.vmap(run)(parameters, buffers)
    assert calls == [NAMES[0]]
    gradients = grad(loss(y), list(parameters.values()))
    assert calls == list(NAMES)
    each = torch.vmap(torch.func.grad(lambda p, b: loss(run(p, b))))(parameters, buffers)
    assert calls == [*NAMES] * 2
    torch.testing.assert_close(gradients, tuple(each.values()))
    for i, module in enumerate(modules):
        expected = module(x, resets=resets)[0]
        torch.testing.assert_close(y[i], expected)
        torch.testing.assert_close([g[i] for g in gradients], list(grad(loss(expected), list(module.parameters()))))


@pytest.mark.parametrize("backend", ENGINES)
def test_gradients_of_each_sample_are_one_launch(backend, calls):
    module = net(backend)
    x, resets = batch(B=3)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def sample(p, x, r):
        return loss(torch.func.functional_call(module, p, (x[:, None], r[:, None])))

    del calls[:]
    found = torch.vmap(torch.func.grad(sample), in_dims=(None, 1, 1))(parameters, x, resets)
    assert calls == [NAMES[i] for i in (0, 0, 1, 1)]
    for b in range(3):
        expected = grad(loss(module(x[:, b : b + 1], resets[:, b : b + 1])), list(module.parameters()))
        torch.testing.assert_close([g[b] for g in found.values()], list(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_outlives_its_transform(backend):
    kept = []
    torch.func.grad(lambda t: (kept.append(t * 2), t.sum())[1])(x := torch.randn(3, 2, 4))
    layer, twin = seqcells.GRU(4, 5, backend=backend), torch.nn.GRU(4, 5)
    twin.load_state_dict(layer.state_dict())
    for module, given in ((layer, kept[0]), (twin, 2 * x)):
        module(given)[0].square().sum().backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(getattr(layer, name).grad, p.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_lengths_and_packed_rows(backend):
    module = seqcells.LSTM(3, 4, bidirectional=True, backend=backend, device=DEVICE, dtype=torch.float64)
    x, _ = batch(T=4, B=6)
    x, lengths = x.reshape(4, 2, 3, 3), torch.tensor([[4, 2, 1], [3, 4, 2]], device=DEVICE)
    y = torch.vmap(lambda x, n: module(x, lengths=n)[0], in_dims=(1, 0), out_dims=1)(x, lengths)
    torch.testing.assert_close(y[:, 1], module(x[:, 1], lengths=lengths[1])[0])
    packed = nn.utils.rnn.pack_padded_sequence(x[:, 0], lengths[0].cpu(), enforce_sorted=False)
    samples = torch.stack([packed.data, 2 * packed.data])
    rows = torch.vmap(lambda d: module(packed._replace(data=d))[0].data)(samples)
    torch.testing.assert_close(rows[1], module(packed._replace(data=2 * packed.data))[0].data)


# --- autograd's other modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend):
    dtype = torch.float32
    module, (x, resets) = net(backend, dtype), batch(dtype)
    tensors = [x.requires_grad_(), *module.parameters()]
    for arguments in ((x, resets),) if backend == "triton" else ((x,), (x, resets)):
        expected = grad(loss(module(*arguments)), tensors)
        for reentrant in (True, False):
            for t in tensors:
                t.grad = None
            loss(checkpoint(module, *arguments, use_reentrant=reentrant)).backward()
            torch.testing.assert_close([t.grad for t in tensors], list(expected))


@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend, save):
    """With retain_graph the same numbers again; without, torch's own error, since what was saved is gone."""
    module, (x, _) = net(backend, torch.float32, save=save), batch(torch.float32)
    value, weights = loss(module(x)), list(module.parameters())
    first = grad(value, weights, retain_graph=True)
    assert all(map(torch.equal, first, grad(value, weights)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        grad(value, weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_saved_is_guarded(backend):
    """An output changed in place is noticed."""
    module = seqcells.LSTM(3, 4, backend=backend, device=DEVICE)
    y, _ = module(batch(torch.float32)[0])
    value = loss(y)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        value.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("backend", BACKENDS)
def test_anomaly_mode(backend):
    """It names the line, of forward, whose gradient is NaN."""
    module, (x, _) = net(backend, torch.float32), batch(torch.float32)
    with torch.autograd.detect_anomaly():
        loss(module(x)).backward()
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="returned nan values"):
            warnings.simplefilter("ignore")
            (module(x) * float("nan")).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensor_hooks_see_everything(backend):
    """Offloading: what is packed is what backward gets."""
    module, (x, resets) = net(backend, torch.float32), batch(torch.float32)
    weights = list(module.parameters())
    expected = grad(loss(module(x, resets)), weights)
    with torch.autograd.graph.save_on_cpu():
        value = loss(module(x, resets))
    torch.testing.assert_close(grad(value, weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast(kind, backend, dtype):
    """Output and states in autocast's dtype, but of a GRU on the CPU in its state's, as torch's; gradients in the
    parameters'."""
    torch.manual_seed(0)
    ours = getattr(seqcells, kind)(3, 4, bidirectional=True, backend=backend, device=DEVICE)
    x, _ = batch(torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        y, final = ours(x)
    expected = torch.float32 if kind == "GRU" and DEVICE == "cpu" else dtype
    assert {t.dtype for t in (y, *(final if kind == "LSTM" else (final,)))} == {expected}
    loss(y.float()).backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(y.float(), ours(x)[0], atol=3e-2, rtol=3e-2)


# --- the host reads nothing of the device ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["plain", "resets", "lengths", "packed"])
def test_no_value_is_read_by_the_host(how, backend):
    """What a CUDA graph asks for: on fake tensors, which have no values, .item() and its like raise."""
    with torch._subclasses.FakeTensorMode():
        module = seqcells.LSTM(3, 4, num_layers=2, bidirectional=True, backend=backend, device=DEVICE)
        x = torch.randn(4, 2, 3, device=DEVICE, requires_grad=True)
        if how == "packed":
            order = torch.arange(2, device=DEVICE)
            x = nn.utils.rnn.PackedSequence(x.flatten(0, 1)[:6], torch.ones(4, dtype=torch.int64), order, order)
        more = {"resets": torch.rand(4, 2, device=DEVICE) < 0.5} if how == "resets" else {}
        if how == "lengths":
            more = {"lengths": torch.ones(2, dtype=torch.int64, device=DEVICE)}
        y, _ = module(x, **more)
        loss(y.data if how == "packed" else y).backward()
        assert all(p.grad.shape == p.shape for p in module.parameters())


# --- copies, and modules elsewhere -----------------------------------------------------------------------------------


def replica(module):
    """What nn.DataParallel runs on another device: modules whose parameters are tensors computed from the module's."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, c in copies.items():
        for name, child in m._modules.items():
            c._modules[name] = copies[child]
        for name, p in m._parameters.items():
            setattr(c, name, p * 1.0)
    return copies[module]


@pytest.mark.parametrize("backend", BACKENDS)
def test_replicas_of_data_parallel(backend):
    module, (x, _) = net(backend, torch.float32), batch(torch.float32)
    other, weights = replica(module), list(module.parameters())
    assert not list(other.parameters())
    torch.testing.assert_close(other(x), module(x))
    torch.testing.assert_close(grad(loss(other(x)), weights), grad(loss(module(x)), weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(backend):
    module, (x, resets) = net(backend, torch.float32), batch(torch.float32)
    expected, file = module(x, resets), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x, resets), expected)
    for dtype in (torch.float64, torch.bfloat16, torch.float16)[1 if backend == "triton" else 0 :]:
        other = copy.deepcopy(module).to(dtype)
        y = other(x.to(dtype), resets)
        torch.testing.assert_close(y.float(), expected, atol=3e-2, rtol=3e-2)
        loss(y).backward()
        assert y.dtype == dtype == other.lower.weight_hh_l0.grad.dtype
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    torch.testing.assert_close(module(x, resets), expected)


@pytest.mark.parametrize("backend", [None, "loop"])
def test_the_meta_device(backend):
    """Shapes without values, forward and backward."""
    module = net(backend).to("meta")
    x, resets = (t.to("meta") for t in batch())
    y = module(x, resets)
    loss(y).backward()
    assert y.shape == (3, 2, 2) and module.lower.weight_hh_l0.grad.is_meta


DDP = """
import torch, seqcells, torch.distributed as dist
from torch import nn
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.upper = seqcells.LSTM(3, 4, bidirectional=True), seqcells.GRU(8, 3)
    def forward(self, x):
        return self.upper(self.lower(x)[0])[0]
torch.manual_seed(0)
whole = Net()
x = torch.randn(5, 4, 3)
wrapped = nn.parallel.DistributedDataParallel(Net() if rank else whole)  # rank 0's weights go to all
wrapped(x[:, 2 * rank : 2 * rank + 2]).square().mean().backward()
mine = [p.grad.clone() for p in wrapped.parameters()]
torch.manual_seed(0)
alone = Net()
alone(x).square().mean().backward()
torch.testing.assert_close(mine, [p.grad for p in alone.parameters()])
print("equal", flush=True)
dist.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    """Two processes with half of the batch each have the gradients of one with all of it."""
    (tmp_path / "train.py").write_text(DDP)
    root = str(pathlib.Path(seqcells.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.count("equal") == 2, result.stderr[-3000:]

"""The custom ops as torch.library and torch.compile see them, and the choice of backend."""

import re
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from conftest import DEVICE
from shapes import CELLS, SAVES
from steps import registries  # noqa: F401  (a fixture)

import seqcells
from seqcells import autograd, backends, dispatch, functional, precisions, testing
from seqcells.cell import get
from seqcells.engines import aten
from seqcells.testing import Shape

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.skipif(not aten.onednn("lstm", torch.device("cpu"), torch.float32), reason="no oneDNN")
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_of_onednn(reverse):
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = testing.inputs("lstm", Shape(3, 2, 2, 4), torch.float32, "cpu")
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    y, h, _ = aten._forward_op(*inputs, reverse)
    # oneDNN's own rounding differs from call to call, so only what does not compare values to the last bit.
    torch.library.opcheck(aten._forward_op, (*inputs, reverse))
    torch.library.opcheck(aten._backward_op, (torch.ones_like(y), h, None, *inputs, reverse))
    leaves = tuple(t.requires_grad_() for t in inputs)
    torch.library.opcheck(aten._forward_op, (*leaves, reverse), test_utils=OPCHECKS)
    torch.library.opcheck(aten._backward_op, (y, None, None, *leaves, reverse), test_utils=OPCHECKS)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("cell", CELLS)
def test_compile_without_a_break(cell, save):
    tensors = [t.requires_grad_() for t in testing.inputs(cell, Shape(3, 2, 2, 4), torch.float64, DEVICE)]

    def step(x, w_ih, w_hh, b_ih, b_hh, *states):
        y, _ = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, save=save, backend="triton")
        return y.square().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


def test_auto_chooses_by_device_cell_and_what_is_asked_for():
    def chosen(cell, device, requested=None, **facts):
        backend = backends.spelled(requested)
        return dispatch.choose(dispatch.Case(cell, backend, torch.device(device), torch.float32, 8, **facts))

    if torch.cuda.is_available():
        assert chosen("lstm", "cuda").engine == "triton"
    small, long = {"steps": 5, "batch": 2}, {"steps": 100, "batch": 200}
    assert chosen("lstm", "cpu", onednn=True, **small).engine == "aten"
    assert chosen("gru", "cpu", **small).engine == "aten"
    assert chosen("gru", "cpu", **long).engine == "loop"
    with mock.patch.object(dispatch, "loop_pays", return_value=True):
        assert chosen("lstm", "cpu", onednn=True, **small).engine == "loop"
    assert chosen("lstm", "cpu", onednn=True, resets=True, **small).reset_steps
    assert not chosen("lstm", "cpu", onednn=True, resets=True, steps=5, batch=2000).reset_steps
    assert chosen("gru_before", "cpu").engine == "loop"
    assert chosen("lstm", "cpu", resets=True).engine == "loop"
    assert "no resets" in chosen("lstm", "cpu", resets=True).why
    with seqcells.backend("reference"):
        assert chosen("lstm", "cpu").engine == "reference"
        assert chosen("lstm", "cpu", requested="aten").engine == "aten"
        with seqcells.backend("auto"):
            assert chosen("lstm", "cpu").engine == "aten"
        assert chosen("lstm", "cpu").engine == "reference"
    assert chosen("lstm", "cpu").engine == "aten"


@pytest.mark.parametrize("layer", [False, True])
def test_auto_on_the_cpu_goes_by_the_size_of_the_work(layer):
    """The same whether a layer or a function is called: with one thread, as the tests run."""

    def chosen(cell, T, B, H, grad=True, **masks):
        kind = {"lstm": "LSTM", "rnn_tanh": "RNN"}.get(cell, "GRU")
        module = getattr(seqcells, kind)(1, H).requires_grad_(grad)
        if not layer:
            options = dispatch.ScanOptions(**masks)
            return dispatch.choose(dispatch.case_of(get(cell), torch.zeros(T, B, 1), (grad, True), options, H)).engine
        with mock.patch.dict(autograd.ENGINES, loop=autograd.ENGINES["loop"]._replace(forward=stop)):
            try:
                module(torch.zeros(T, B, 1), **masks)
            except Stopped:
                return "loop"
        return "aten"

    class Stopped(Exception):
        pass

    def stop(*arguments):
        raise Stopped

    assert torch.get_num_threads() == 1
    assert [chosen("gru", T, 4, 8) for T in (9, 10)] == ["aten", "loop"]
    assert [chosen("rnn_tanh", T, 4, 8) for T in (19, 20)] == ["aten", "loop"]
    assert [chosen("gru", T, 4, 16, grad=False) for T in (95, 96)] == ["aten", "loop"]
    assert chosen("gru", 96, 4, 8, grad=False) == "aten"
    # oneDNN's LSTM, but where its workspace is large; with masks, where the steps are small.
    assert [chosen("lstm", T, 128, 64) for T in (127, 128)] == ["aten", "loop"]
    assert chosen("lstm", 128, 128, 64, grad=False) == "aten" == chosen("lstm", 256, 63, 64)
    for B, backend in ((64, "aten"), (65, "loop")):
        assert chosen("lstm", 2, B, 64, resets=torch.zeros(2, B, dtype=torch.bool)) == backend
        assert chosen("lstm", 2, B, 16, lengths=torch.full((B,), 2)) == backend
    assert [chosen("lstm", 2, B, 64, False, lengths=torch.full((B,), 2)) for B in (32, 33)] == ["aten", "loop"]
    assert seqcells.explain("gru", batch=16, hidden_size=20, device="cpu").backend == "loop"
    assert seqcells.explain("lstm", batch=16, hidden_size=20, device="cpu").backend == "aten"
    assert [seqcells.explain("lstm", batch=B, hidden_size=64, resets=True).backend for B in (64, 65)] == [
        "aten",
        "loop",
    ]


def test_explain_says_why():
    small = seqcells.explain("lstm", batch=8, hidden_size=64, dtype=torch.bfloat16, device="sm_90")
    assert small.backend == "triton" and small.plan.schedule == "resident" and "keeps it" in small.plan.why
    large = seqcells.explain("lstm", batch=8, hidden_size=1024, dtype=torch.bfloat16, device="sm_90")
    assert large.plan.schedule == "grid" == large.backward.schedule
    said = " ".join(str(large).split())
    assert "128 programs" not in str(small) and "64 programs of 16 units" in said and "us a step" in said
    for found in (small, large, seqcells.explain("gru_before", batch=1, hidden_size=4096, device="sm_80")):
        lines = str(found).splitlines()
        assert max(map(len, lines)) <= 80 and str(found).startswith("triton: ")
        assert "forward: the " in str(found) and "backward: the " in str(found) and "at most 255 a thread" in str(found)
        assert not re.search(r"\d\.\d{3}", str(found)), "figures are rounded"
    assert seqcells.explain("gru", batch=8, hidden_size=64).plan is None
    for unknown in ("sm_1", "H1000", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"unknown device '{unknown}': expected a torch device.*, GB200, L4"):
            seqcells.explain("gru", batch=8, hidden_size=64, device=unknown)
    with pytest.raises(ValueError, match="batch must be greater than zero, got 0"):
        seqcells.explain("gru", batch=0, hidden_size=64)


@pytest.mark.usefixtures("registered")
def test_explain_says_what_runs_a_step_without_kernels():
    @seqcells.cell(gates="a", states="h")
    def over_units(x, U, h):
        return torch.softmax(x.a + U.a(h), -1)

    for device in ("cpu", "H100"):
        found = seqcells.explain(over_units, batch=2, hidden_size=4, device=device)
        assert found.backend == "reference" and "no _softmax; it mixes units" in found.why


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("sm_80", ["SM_80", "sm80"]),
        ("A100", ["a100"]),
        ("H100", ["h100"]),
        ("H200", ["h200"]),
        ("GH200", ["gh200"]),
        ("B200", ["b200"]),
        ("GB200", ["gb200", "Gb-200"]),
        ("RTX4090", ["rtx 4090", "RTX-4090"]),
    ],
)
def test_explain_takes_a_gpus_name_in_any_case(name, names):
    size = {"batch": 256, "hidden_size": 1024, "dtype": torch.bfloat16}
    expected = seqcells.explain("lstm", **size, device=name)
    assert expected.plan.capability and all(seqcells.explain("lstm", **size, device=n) == expected for n in names)
    assert seqcells.explain("gru", batch=8, hidden_size=64, device="CPU").backend == "loop"


def test_precision_follows_torchs_switches():
    before = torch.backends.cudnn.rnn.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cudnn.rnn.fp32_precision = setting
            assert precisions.rnn_precision() == expected
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


def test_backward_runs_in_another_thread_and_in_eval_mode():
    layer = seqcells.LSTM(2, 3, backend="triton").to(DEVICE).eval()
    y, _ = layer(torch.randn(3, 2, 2, device=DEVICE))
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert layer.weight_hh_l0.grad is not None


def run_python(code, **environment):
    import os

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def test_cpu_tensors_need_the_interpreter():
    result = run_python(
        "import torch, seqcells\n"
        "try: seqcells.LSTM(2, 3, backend='triton')(torch.ones(1, 1, 2))\n"
        "except RuntimeError as e: print(e)"
    )
    assert "needs CUDA tensors, got tensors on cpu" in result.stdout and "TRITON_INTERPRET=1" in result.stdout, result


@pytest.mark.parametrize(
    ("imported", "expected"), [("seqcells", "ran"), ("triton", "TRITON_INTERPRET=1 was set after triton was imported")]
)
def test_the_interpreter_is_chosen_when_triton_is_imported(imported, expected):
    """And so may be chosen after seqcells is."""
    result = run_python(
        f"import os, torch, {imported}\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "import seqcells\n"
        "try: seqcells.RNN(2, 3, backend='triton')(torch.ones(1, 1, 2)); print('ran')\n"
        "except RuntimeError as e: print(e)"
    )
    assert expected in result.stdout, result.stderr


def test_importing_seqcells_imports_no_triton_nor_a_compiler():
    """They are most of what it would take. The operators are there all the same, for programs of torch.export."""
    result = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import seqcells\n"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))\n"
        "print(sorted(m for m in set(sys.modules) - before if m.startswith(('torch.', 'seqcells.kernels.'))))\n"
        "print(torch.ops.seqcells.scan_forward.default._schema.name)\n"
        "seqcells.LSTM(2, 3)(torch.ones(2, 1, 2))\n"
        "seqcells.explain('gru', batch=2, hidden_size=3)\n"
        "print('triton' in sys.modules)\n"
    )
    others, ours, name, used = result.stdout.splitlines()
    assert eval(others) == ["seqcells"], result.stderr
    assert eval(ours) == [
        f"seqcells.kernels.{n}"
        for n in ("buffers", "cost", "devices", "form", "means", "plan", "plan_single", "registry")
    ]
    assert (name, used) == ("seqcells::scan_forward", "False")


WITHOUT_TRITON = {
    "not installed": "sys.modules['triton'] = None",
    "broken": (
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'triton': raise ImportError('libz.so: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())"
    ),
}


@pytest.mark.parametrize("how", WITHOUT_TRITON)
def test_without_triton_everything_else_works(how):
    result = run_python(
        f"import sys\n{WITHOUT_TRITON[how]}\n"
        "import torch, seqcells\n"
        "x = torch.ones(2, 1, 2)\n"
        "print(seqcells.LSTM(2, 3)(x)[0].shape, seqcells.GRU(2, 3, reset_after=False)(x)[0].shape)\n"
        "print(seqcells.explain('lstm', batch=2, hidden_size=3, device='sm_90'))\n"
        "for call in (seqcells.LSTM(2, 3, backend='triton'), seqcells.GRUCell(2, 3, backend='triton')):\n"
        "    try: call(x if isinstance(call, seqcells.LSTM) else x[0])\n"
        "    except ModuleNotFoundError as e: print(e)"
    )
    assert result.stdout.count("torch.Size([2, 1, 3])") == 2, result.stderr
    assert "aten: the triton backend needs triton" in result.stdout
    assert result.stdout.count("pip install triton (Linux)\n") == 2


@pytest.mark.parametrize(
    "how", [n if n == "not installed" else pytest.param(n, marks=pytest.mark.slow) for n in WITHOUT_TRITON]
)
def test_without_triton_it_compiles(how):
    """One graph, trained, of everything that "auto" takes on the CPU; and a program of the kernels can be loaded."""
    result = run_python(
        f"import sys\n{WITHOUT_TRITON[how]}\n"
        "import torch, seqcells\n"
        "x, resets = torch.ones(3, 2, 2), torch.tensor([[True, False]] * 3)\n"
        "calls = [(seqcells.LSTM(2, 3), {}), (seqcells.GRU(2, 3, reset_after=False), {'resets': resets}),\n"
        "         (seqcells.RNN(2, 3), {'lengths': [3, 2]})]\n"
        "for module, options in calls:\n"
        "    y = torch.compile(module, fullgraph=True, backend='aot_eager')(x, **options)[0]\n"
        "    torch.testing.assert_close(y, module(x, **options)[0])\n"
        "    y.sum().backward()\n"
        "step = torch.compile(seqcells.LSTMCell(2, 3), fullgraph=True, backend='aot_eager')\n"
        "print('compiled', step(x[0])[0].shape)\n"
        "try: torch.compile(seqcells.LSTM(2, 3, backend='triton'), backend='aot_eager')(x)\n"
        "except ModuleNotFoundError as e: print(e)\n"
    )
    assert "compiled torch.Size([2, 3])" in result.stdout and "pip install triton" in result.stdout, result.stderr

"""The custom ops as torch.library and torch.compile see them, and the choice of backend."""

import subprocess
import sys
import threading

import pytest
import torch
from conftest import DEVICE
from shapes import CELLS, SAVES

import seqcells
from seqcells import backends, check, functional, ops, precisions
from seqcells.check import Shape
from seqcells.kernels import cells, scan


def op_arguments(cell, save, groups=1):
    """The arguments of scan_forward, scan_backward and recompute for one small scan; of two groups, one reversed."""
    declared = cells.get(cell)
    x, w_ih, w_hh, b_ih, b_hh, *states = check.inputs(cell, Shape(3, 2, 2, 4), torch.float64, DEVICE)
    w_ih, w_hh, b_ih, b_hh, *states = (torch.stack([t] * groups) for t in (w_ih, w_hh, b_ih, b_hh, *states))
    h0, c0 = states if len(states) == 2 else (states[0], None)
    gx, bias = ops.input_projection(declared, x, w_ih, b_ih, b_hh)
    resets = torch.zeros(3, 2, dtype=torch.bool, device=DEVICE)
    reversed = groups - 1
    forward = (gx, w_hh, bias, h0, c0, resets, cell, save, reversed, "", "ieee")
    y, c, saved, hn, cn = ops.scan_forward(*forward)
    dcn = cn if c0 is not None else None
    dy = torch.ones_like(scan.outputs(y, reversed))
    backward = (dy, hn, dcn, w_hh, y, c, saved, resets, cell, reversed, "", "ieee")
    return forward, backward, (gx, w_hh, bias, y, c, resets, cell, reversed)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, groups):
    forward, backward, recompute = op_arguments(cell, "gates", groups)
    torch.library.opcheck(ops.scan_forward, forward)
    torch.library.opcheck(ops.scan_backward, backward)
    torch.library.opcheck(ops.recompute, recompute)
    for save in ("states", "none"):
        torch.library.opcheck(ops.scan_forward, (*forward[:7], save, *forward[8:]), test_utils="test_faketensor")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("cell", CELLS)
def test_compile_without_a_break(cell, save):
    tensors = [t.requires_grad_() for t in check.inputs(cell, Shape(3, 2, 2, 4), torch.float64, DEVICE)]

    def step(x, w_ih, w_hh, b_ih, b_hh, *states):
        y, _ = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, save=save, backend="triton")
        return y.square().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


def test_auto_chooses_by_device_and_cell():
    def chosen(cell, device, **options):
        return backends.choose(
            cell, torch.device(device), torch.float32, **{"resets": False, "requested": None} | options
        )

    assert chosen("lstm", "cuda").backend == "triton"
    assert chosen("lstm", "cpu").backend == "aten"
    assert chosen("gru_before", "cpu").backend == "reference"
    assert chosen("lstm", "cpu", resets=True).backend == "reference"
    assert "no resets" in chosen("lstm", "cpu", resets=True).why
    with seqcells.backend("reference"):
        assert chosen("lstm", "cuda").backend == "reference"
        assert chosen("lstm", "cpu", requested="aten").backend == "aten"
        with seqcells.backend("auto"):
            assert chosen("lstm", "cpu").backend == "aten"
        assert chosen("lstm", "cpu").backend == "reference"
    assert chosen("lstm", "cpu").backend == "aten"


def test_explain_says_why():
    small = seqcells.explain("lstm", batch=8, hidden_size=64, dtype=torch.bfloat16, device="sm_90")
    assert small.backend == "triton" and small.plan.schedule == "resident" and "keeps it" in str(small)
    large = seqcells.explain("lstm", batch=8, hidden_size=1024, dtype=torch.bfloat16, device="sm_90")
    assert large.plan.schedule == "grid" == large.backward.schedule
    assert "128 programs" not in str(small) and "64 programs of 16 units" in str(large) and "us a step" in str(large)
    assert seqcells.explain("gru", batch=8, hidden_size=64).plan is None
    with pytest.raises(ValueError, match="unknown device 'sm_1'"):
        seqcells.explain("gru", batch=8, hidden_size=64, device="sm_1")
    with pytest.raises(ValueError, match="batch must be greater than zero, got 0"):
        seqcells.explain("gru", batch=0, hidden_size=64)


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


def test_without_triton_everything_else_works():
    result = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, seqcells\n"
        "x = torch.ones(2, 1, 2)\n"
        "print(seqcells.LSTM(2, 3)(x)[0].shape, seqcells.GRU(2, 3, reset_after=False)(x)[0].shape)\n"
        "try: seqcells.LSTM(2, 3, backend='triton')(x)\n"
        "except ModuleNotFoundError as e: print(e)"
    )
    assert result.stdout.count("torch.Size([2, 1, 3])") == 2, result.stderr
    assert "pip install triton" in result.stdout

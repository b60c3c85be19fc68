"""What only a CUDA device can show: of the grid schedule no hang, no race, streams, graphs; what is measured between
events. Skipped without one."""

import pytest
import torch
from conftest import DEVICE

import seqcells
from seqcells import functional, measured
from seqcells.testing import Shape, inputs

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


def problem(cell, shape, dtype=torch.bfloat16):
    """A function that runs forward and backward through the grid schedule and returns all it computes."""
    leaves = [t.requires_grad_() for t in inputs(cell, shape, dtype, DEVICE)]
    x, w_ih, w_hh, b_ih, b_hh, *states = leaves

    def run():
        y, final = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, backend="triton:grid")
        return [y, *final, *torch.autograd.grad((y, *final), leaves, [torch.ones_like(t) for t in (y, *final)])]

    return run


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before"])
def test_a_thousand_launches_give_the_same_bits(cell):
    run = problem(cell, Shape(50, 16, 32, 768))
    first = run()
    for _ in range(1000):
        again = run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_streams_at_once():
    run = problem("lstm", Shape(200, 16, 32, 768))
    want = run()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("hidden", [256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_that_are_their_own_flags_may_be_nan(dtype, hidden):
    """No value that is computed or given keeps a program waiting, and a NaN stays in its row."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = inputs("lstm", Shape(20, 16, 8, hidden), dtype, DEVICE)
    x[5, 0, 0] = torch.nan
    h0.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[1] = -1
    y, _ = functional.scan("lstm", x, (h0, c0), w_ih, w_hh, b_ih, b_hh, backend="triton:grid")
    nan = y.isnan().any(2)
    assert nan[5:, 0].all() and not nan[:5, 0].any() and nan[:, 1].all() and not nan[:, 2:].any()


@pytest.mark.parametrize("schedule", ["resident", "grid", "stepwise"])
def test_a_cuda_graph_replays(schedule):
    hidden = 64 if schedule == "resident" else 512
    x, w_ih, w_hh, b_ih, b_hh, *states = inputs("lstm", Shape(20, 16, 8, hidden), torch.bfloat16, DEVICE)

    def run():
        return functional.scan("lstm", x, states, w_ih, w_hh, b_ih, b_hh, backend=f"triton:{schedule}")[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, run())


@pytest.mark.parametrize("H", [64, 512])
def test_what_was_measured_runs_and_can_be_captured(H):
    """By torch's switch, between CUDA events; a graph of it is captured afterwards, which measures nothing."""
    own = {"device": DEVICE, "dtype": torch.bfloat16}
    layer, x = seqcells.LSTM(32, H, **own), torch.randn(20, 16, 32, **own)
    torch.backends.cudnn.benchmark, before = True, set(measured.of(x.device))
    try:
        with torch.no_grad():
            expected = layer(x)[0]
            (name,) = set(measured.of(x.device)) - before
            record = dict(measured.of(x.device)[name])
            assert len(record) > 1 and all(0 < ms < 1000 for ms in record.values()), record
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                layer(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)[0]
            graph.replay()
            assert torch.equal(y, expected) and measured.of(x.device)[name] == record
    finally:
        torch.backends.cudnn.benchmark = False
        seqcells.tuning.clear()

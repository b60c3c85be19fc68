"""One layer, forward and backward, side by side: seqcells' backends and torch.nn. On CUDA if there is one.

    make bench        or        python -m pytest benchmarks --benchmark-only --benchmark-group-by=group

Nothing is timed before it agrees with torch.nn. On CUDA the clock is read after a synchronisation.
"""

import pytest
import torch

import seqcells

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = ["torch.nn", "auto", "reference"]
# count-ones' net, and a small and a larger layer. T, B, I, H.
SHAPES = [(20, 16, 1, 20), (100, 16, 32, 64), (100, 16, 64, 128)]


def layer(provider, name, input_size, hidden_size):
    torch.manual_seed(0)
    if provider == "torch.nn":
        return getattr(torch.nn, name)(input_size, hidden_size).to(DEVICE)
    return getattr(seqcells, name)(input_size, hidden_size, backend=provider).to(DEVICE)


def step(module, x):
    module.zero_grad(set_to_none=True)
    y, _ = module(x)
    y.sum().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return y


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_forward_and_backward(benchmark, name, shape, provider):
    T, B, input_size, H = shape
    torch.set_num_threads(1)
    x = torch.randn(T, B, input_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    module, judge = layer(provider, name, input_size, H), layer("torch.nn", name, input_size, H)
    allowed = seqcells.check.TOLERANCE["tf32" if DEVICE == "cuda" else torch.float32]
    assert seqcells.check.relative(step(module, x).detach(), step(judge, x).detach().cpu()) <= allowed
    for ours, theirs in zip(module.parameters(), judge.parameters(), strict=True):
        assert seqcells.check.relative(ours.grad, theirs.grad.cpu()) <= allowed
    benchmark.group = f"{name} {DEVICE} T={T} B={B} I={input_size} H={H}"
    benchmark.extra_info |= {"torch": torch.__version__, "provider": provider}
    benchmark.pedantic(step, args=(module, x), rounds=30, warmup_rounds=3)

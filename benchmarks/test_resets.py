"""Episodes in a batch: a rollout of environments that end at different steps, four ways. On CUDA if there is one.

A recurrent policy is trained on T steps of B environments; where one ends (3% of steps), its state starts from zero.

- cell loop: a torch.nn cell a step, the state multiplied by 1 - done, as reinforcement learning code does;
- split: a torch.nn layer over each stretch in which no environment ends, the state multiplied between;
- seqcells: the layer with resets=, one call.

Nothing is timed before it agrees with the loop.
"""

from itertools import pairwise

import pytest
import torch
from test_layers import DEVICE

import seqcells

WAYS = ["cell loop", "split", "reference", "auto"]
SHAPES = [(200, 16, 32, 128), (128, 64, 64, 256)]  # T, B, I, H
ENDS = 0.03


def first(state):
    return state[0] if isinstance(state, tuple) else state


def cell_loop(cell, x, done):
    kept = (~done).to(x.dtype)[..., None]
    state, outputs = None, []
    for t in range(x.shape[0]):
        if state is not None:
            state = tuple(s * kept[t] for s in state) if isinstance(state, tuple) else state * kept[t]
        state = cell(x[t], state)
        outputs.append(first(state))
    return torch.stack(outputs)


def split(layer, x, done):
    kept = (~done).to(x.dtype)[..., None]
    starts = [0, *(t for t in done.any(1).nonzero().flatten().tolist() if t), x.shape[0]]
    state, outputs = None, []
    for start, end in pairwise(starts):
        if state is not None:
            state = tuple(s * kept[start] for s in state) if isinstance(state, tuple) else state * kept[start]
        y, state = layer(x[start:end], state)
        outputs.append(y)
    return torch.cat(outputs)


def way(name, kind, input_size, hidden_size):
    """A function of x and done, and its parameters w_ih, w_hh, b_ih, b_hh."""
    torch.manual_seed(0)
    layer = getattr(torch.nn, kind)(input_size, hidden_size).to(DEVICE)
    if name == "cell loop":
        cell = getattr(torch.nn, f"{kind}Cell")(input_size, hidden_size).to(DEVICE)
        cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
        return lambda x, done: cell_loop(cell, x, done), list(cell.parameters())
    if name == "split":
        return lambda x, done: split(layer, x, done), list(layer.parameters())
    ours = getattr(seqcells, kind)(input_size, hidden_size, backend=name).to(DEVICE)
    ours.load_state_dict(layer.state_dict())
    return lambda x, done: ours(x, resets=done)[0], list(ours.parameters())


def step(run, parameters, x, done):
    y = run(x, done)
    gradients = torch.autograd.grad(y.sum(), parameters)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return y.detach(), gradients


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_rollout(benchmark, kind, shape, name):
    T, B, input_size, H = shape
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, B, input_size, generator=generator).to(DEVICE)
    done = (torch.rand(T, B, generator=generator) < ENDS).to(DEVICE)
    arguments = (*way(name, kind, input_size, H), x, done)
    y, gradients = step(*arguments)
    want, wanted = step(*way("cell loop", kind, input_size, H), x, done)
    allowed = seqcells.check.TOLERANCE["tf32" if DEVICE == "cuda" else torch.float32]
    for ours, theirs in zip((y, *gradients), (want, *wanted), strict=True):
        assert seqcells.check.relative(ours, theirs.cpu()) <= allowed
    benchmark.group = f"{kind} rollout {DEVICE} T={T} B={B} I={input_size} H={H}"
    benchmark.extra_info |= {"torch": torch.__version__, "way": name}
    benchmark.pedantic(step, args=arguments, rounds=5, warmup_rounds=1)

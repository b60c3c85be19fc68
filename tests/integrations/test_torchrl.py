"""torchrl: LSTMModule and GRUModule around a layer of ours return what they do around torch.nn's."""

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch_cases import assert_same
from torchrl.modules import GRUModule, LSTMModule

import seqcells

pytestmark = pytest.mark.integrations
B, T, I, H, L = 3, 9, 4, 5, 2  # noqa: E741
STATES = {"LSTM": ["h", "c"], "GRU": ["h"]}


def module(kind, dtype=torch.float64, recurrent=True):
    torch.manual_seed(0)
    cls = {"LSTM": LSTMModule, "GRU": GRUModule}[kind]
    keys = {"in_keys": ["x", *STATES[kind]], "out_keys": ["y", *[("next", s) for s in STATES[kind]]]}
    return cls(input_size=I, hidden_size=H, num_layers=L, default_recurrent_mode=recurrent, **keys).to(dtype)


def layer(wrapped):
    return wrapped.lstm if isinstance(wrapped, LSTMModule) else wrapped.gru


def batch(kind, dtype, begins, steps=T):
    torch.manual_seed(1)
    found = TensorDict({"x": torch.randn(B, steps, I, dtype=dtype)}, [B, steps])
    found["is_init"] = torch.zeros(B, steps, 1, dtype=torch.bool)
    for b, t in begins:
        found["is_init"][b, t] = True
    for name in STATES[kind]:
        found[name] = torch.randn(B, steps, L, H, dtype=dtype)
    return found


def everything(wrapped, kind, data):
    """y, the states that follow, and the gradients of the parameters."""
    out = wrapped(data.clone())
    states = [out["next", s] for s in STATES[kind]]
    loss = out["y"].sin().sum() + sum(s.cos().sum() for s in states)
    named = dict(wrapped.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    found = {"y": out["y"], **dict(zip(STATES[kind], states, strict=True))}
    return {k: v.detach() for k, v in found.items()} | dict(zip(named, gradients, strict=True))


# An episode that begins in the middle of one row, at the first step of another, twice in a third.
INSIDE = [(0, 4), (1, 0), (2, 3), (2, 7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("begins", [INSIDE, []], ids=["resets inside", "none"])
@pytest.mark.parametrize("kind", list(STATES))
def test_a_batch_in_the_default_mode(kind, begins, dtype):
    """recurrent_backend="pad": torchrl cuts the rows into episodes and packs them."""
    theirs = module(kind, dtype)
    ours = seqcells.convert(copy.deepcopy(theirs), subclass=True)
    assert theirs.recurrent_backend == "pad"
    assert isinstance(layer(ours), getattr(nn, kind)) and isinstance(layer(ours), getattr(seqcells, kind))
    data = batch(kind, dtype, begins)
    assert_same(everything(ours, kind, data), everything(theirs, kind, data), kind)


@pytest.mark.parametrize("subclass", [False, True])
@pytest.mark.parametrize("kind", list(STATES))
def test_step_by_step_as_when_acting(kind, subclass):
    theirs = module(kind, recurrent=False)
    ours = seqcells.convert(copy.deepcopy(theirs), subclass=subclass)
    data = batch(kind, torch.float64, [(1, 0)], steps=1)
    assert_same(everything(ours, kind, data), everything(theirs, kind, data), kind)


@pytest.mark.parametrize("kind", list(STATES))
def test_is_init_is_resets(kind):
    """The layer by itself, with resets=, does in one call what torchrl's splitting and packing does."""
    theirs = module(kind)
    data = batch(kind, torch.float64, INSIDE)
    for name in STATES[kind]:
        data[name].zero_()
    expected = theirs(data.clone())["y"]
    ours = seqcells.convert(copy.deepcopy(layer(theirs)))
    y, _ = ours(data["x"], resets=data["is_init"].squeeze(-1))
    assert_same({"y": y.detach()}, {"y": expected.detach()}, kind)

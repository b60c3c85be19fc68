"""weight_dropout: one mask of the recurrent weights for a call, the same by every engine. Dropout between layers is
torch.nn's, see test_drop_in and test_real_programs."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_sequence

import seqcells

T, B, I, H, P = 5, 3, 4, 6, 0.4  # noqa: E741
KINDS = ("LSTM", "GRU", "RNN")


def pair(kind, backend, dtype=torch.float64, **options):
    """A layer, and torch.nn's with the same parameters."""
    torch.manual_seed(0)
    layer = getattr(seqcells, kind)(I, H, weight_dropout=P, backend=backend, dtype=dtype, device=DEVICE, **options)
    twin = getattr(nn, kind)(I, H, dtype=dtype, device=DEVICE, **options)
    twin.load_state_dict(layer.state_dict())
    return layer, twin


@pytest.mark.parametrize("backend", [None, "loop", "triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_whose_recurrent_weights_were_dropped(kind, backend):
    layer, twin = pair(kind, backend, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
    names = [name for names in layer._all_weights for name in names]
    torch.manual_seed(7)
    masks = {n: dropout(torch.ones_like(getattr(twin, n)), P) for n in names if n.startswith("weight_hh")}
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(twin, name).mul_(mask)
    torch.manual_seed(7)
    y, z = layer(x)[0], twin(x)[0]
    torch.testing.assert_close(y, z)
    grads = [torch.autograd.grad(o.square().sum(), [getattr(m, n) for n in names]) for o, m in ((y, layer), (z, twin))]
    for name, ours, theirs in zip(names, *grads, strict=True):
        torch.testing.assert_close(ours, theirs * masks.get(name, 1))
    layer.eval()
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[0], twin(x)[0])


def test_one_step_and_packed_rows_are_dropped_too():
    for x in (torch.randn(1, B, I), torch.randn(T, I), pack_sequence([torch.randn(n, I) for n in (5, 3)])):
        layer, twin = pair("LSTM", None, torch.float32)
        hx = (torch.ones(1, H), torch.ones(1, H)) if not isinstance(x, tuple) and x.dim() == 2 else None
        if isinstance(x, torch.Tensor) and x.dim() == 3:
            hx = (torch.ones(1, B, H), torch.ones(1, B, H))
        torch.manual_seed(7)
        mask = dropout(torch.ones(4 * H, H), P)
        with torch.no_grad():
            twin.weight_hh_l0.mul_(mask)
        torch.manual_seed(7)
        ours, theirs = layer(x, hx)[0], twin(x, hx)[0]
        torch.testing.assert_close(*(o.data if isinstance(o, tuple) else o for o in (ours, theirs)))


def test_a_cell_of_one_s_own_and_heads():
    layer = seqcells.Recurrent("mgu", I, H, heads=2, weight_dropout=1.0)
    x = torch.randn(T, B, I)
    alone = copy.deepcopy(layer).eval()
    with torch.no_grad():
        alone.weight_hh_l0.zero_()
    torch.testing.assert_close(layer(x)[0], alone(x)[0])
    assert seqcells.Recurrent("indrnn", I, H, weight_dropout=P)(x)[0].shape == (T, B, H), "no recurrent weights"


def test_compiled():
    layer, _ = pair("GRU", "loop", torch.float32)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(T, B, I, device=DEVICE))[0]
    y.sum().backward()
    dropped = (layer.weight_hh_l0.grad == 0).float().mean()
    assert 0.2 < dropped < 0.6


def test_as_modules():
    layer, _ = pair("LSTM", None)
    assert "weight_dropout=0.4" in repr(layer) and "weight_dropout" not in repr(seqcells.LSTM(I, H))
    assert pickle.loads(pickle.dumps(layer)).weight_dropout == P
    with pytest.raises(ValueError, match="layers have no weight_dropout"):
        seqcells.revert(nn.Sequential(layer))
    assert seqcells.convert(nn.LSTM(I, H)).weight_dropout == 0.0


@pytest.mark.parametrize("make", [*(getattr(seqcells, kind) for kind in KINDS), None])
def test_wrong_probabilities(make):
    make = make or (lambda *sizes, **options: seqcells.Recurrent("mgu", *sizes, **options))
    for value, error, words in (
        (1.5, ValueError, "weight_dropout must be a probability, from 0 to 1, got 1.5"),
        (-0.1, ValueError, "weight_dropout must be a probability"),
        (float("nan"), ValueError, "weight_dropout must be a probability"),
        ("0.5", TypeError, "weight_dropout must be a number"),
        (True, TypeError, "weight_dropout must be a number"),
    ):
        with pytest.raises(error, match=words):
            make(I, H, weight_dropout=value)

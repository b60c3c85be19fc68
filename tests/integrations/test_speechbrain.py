"""speechbrain: its recurrent layers, which pack a padded batch, converted."""

import copy

import pytest
import torch
from speechbrain.nnet import RNN
from torch_cases import assert_same, everything

import seqcells

pytestmark = pytest.mark.integrations


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_layer(kind, bidirectional, packed):
    """lengths: relative, unsorted, the longest 1."""
    torch.manual_seed(0)
    theirs = getattr(RNN, kind)(hidden_size=5, input_size=3, num_layers=2, bidirectional=bidirectional)
    ours = seqcells.convert(copy.deepcopy(theirs))
    assert isinstance(ours.rnn, getattr(seqcells, kind))
    x, lengths = torch.randn(4, 8, 3), torch.tensor([0.5, 1.0, 0.25, 0.75]) if packed else None
    found = [everything(m, lambda x, hx, m=m: m(x, hx, lengths), x, None) for m in (ours, theirs)]
    assert_same(*found, kind)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_stack_of_cells(kind):
    torch.manual_seed(0)
    theirs = getattr(RNN, kind)(hidden_size=5, input_size=3, num_layers=2)
    ours = seqcells.convert(copy.deepcopy(theirs))
    assert isinstance(ours.rnn_cells[1], getattr(seqcells, kind))
    found = [
        everything(
            m, lambda x, hx, m=m: m(x, m(x)[1]), torch.randn(4, 3, generator=torch.Generator().manual_seed(2)), None
        )
        for m in (ours, theirs)
    ]
    assert_same(*found, kind)


def test_the_attentional_decoder():
    torch.manual_seed(0)
    sizes = {"enc_dim": 4, "input_size": 3, "hidden_size": 5, "attn_dim": 6, "num_layers": 1}
    theirs = RNN.AttentionalRNNDecoder("gru", "content", **sizes)
    ours = seqcells.convert(copy.deepcopy(theirs))
    x, encoded, lengths = torch.randn(2, 3, 3), torch.randn(2, 7, 4), torch.tensor([1.0, 0.5])
    found = [everything(m, lambda x, hx, m=m: m(x, encoded, lengths), x, None) for m in (ours, theirs)]
    assert_same(*found, "decoder")

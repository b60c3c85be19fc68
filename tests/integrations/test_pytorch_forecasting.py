"""pytorch-forecasting: its subclasses of torch.nn's layers by mapping, and its mixin rebuilt on ours."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import recipes
import torch
from pytorch_forecasting import DeepAR, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.models.nn import rnn
from torch import nn
from torch_cases import assert_same, everything

import seqcells

pytestmark = pytest.mark.integrations


# The page's classes: theirs on ours, and their mixin's forward without its packing. With that each row of no steps
# keeps the state it was given; theirs fills in other rows' states, and h for c (pytorch-forecasting 1.8.0), so they are
# the same where no row is empty, or where the given state is zero.
LAYERS = nn.ModuleList([rnn.LSTM(3, 4), rnn.GRU(3, 4)])
NAMES = recipes.run("PyTorch Forecasting", model=LAYERS, other=nn.ModuleList([rnn.LSTM(3, 4)]))
LSTM, GRU, Rebuilt = NAMES["LSTM"], NAMES["GRU"], NAMES["Rebuilt"]
MAPPING = {rnn.LSTM: LSTM, rnn.GRU: GRU}


def batch(least):
    """Sequences whose encoders have `least` to 6 steps."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    steps = 14
    rows = [{"series": s, "t": t, "y": generator.normal() + t % 3} for s in "abc" for t in range(steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = TimeSeriesDataSet(
            pd.DataFrame(rows),
            "t",
            "y",
            ["series"],
            max_encoder_length=6,
            min_encoder_length=least,
            max_prediction_length=3,
            min_prediction_length=1,
            time_varying_unknown_reals=["y"],
            time_varying_known_reals=["t"],
            static_categoricals=["series"],
            randomize_length=None,
            add_encoder_length=True,
            allow_missing_timesteps=True,
        )
        x, y = next(iter(data.to_dataloader(train=True, batch_size=48, shuffle=True)))
    assert x["encoder_lengths"].min() == least and x["encoder_lengths"].max() == 6
    return data, x, y


def both(cls, data, mapping, **options):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = cls.from_dataset(data, dropout=0.0, **options)
    found = []
    ours = seqcells.convert(copy.deepcopy(theirs), mapping=mapping, report=found)
    assert found and not any(change.skipped for change in found)
    return theirs, ours


def loss_and_gradients(model, x, y):
    """Of a training step."""
    torch.manual_seed(3)
    loss = model.loss(model(x)["prediction"], y)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"loss": loss.detach()} | {n: g for n, g in zip(named, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_deepar_by_mapping(cell):
    data, x, y = batch(1)
    theirs, ours = both(DeepAR, data, MAPPING, cell_type=cell, hidden_size=6, rnn_layers=2)
    assert isinstance(ours.rnn, (LSTM, GRU)) and isinstance(ours.rnn, getattr(seqcells, cell))
    assert_same(loss_and_gradients(ours, x, y), loss_and_gradients(theirs, x, y), cell)
    predicted = []
    for model in (theirs.eval(), ours.eval()):
        torch.manual_seed(4)
        with torch.no_grad():  # by sampling, step by step
            predicted.append({"prediction": model(x, n_samples=5)["prediction"]})
    assert_same(predicted[1], predicted[0], cell)


@pytest.mark.parametrize(("mapping", "least"), [(MAPPING, 0), ({rnn.LSTM: Rebuilt}, 1)], ids=["on ours", "rebuilt"])
def test_tft_by_mapping(mapping, least):
    data, x, y = batch(least)
    options = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4, "lstm_layers": 1}
    theirs, ours = both(TemporalFusionTransformer, data, mapping, **options)
    assert isinstance(ours.lstm_encoder, seqcells.LSTM) and isinstance(ours.lstm_decoder, mapping[rnn.LSTM])
    assert_same(loss_and_gradients(ours, x, y), loss_and_gradients(theirs, x, y), "TFT")


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("lengths", [None, [4, 2, 0, 1], [0, 0, 0, 0]])
def test_a_layer_made_as_ours(cell, lengths):
    """Their constructor's arguments, and every gradient; sequences of no steps keep the state they were given."""
    theirs = getattr(rnn, cell)(3, 5, num_layers=2, batch_first=True)
    ours = {"LSTM": LSTM, "GRU": GRU}[cell](3, 5, num_layers=2, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    lengths = None if lengths is None else torch.tensor(lengths)
    x = torch.randn(4, 4, 3)
    modules = (theirs, ours)
    if lengths is not None and not lengths.any():  # all zero: no parameter has a gradient
        results = [m(x, lengths=lengths) for m in modules]
        assert torch.equal(results[0][0], results[1][0])
        return
    found = [everything(m, lambda x, hx, m=m: m(x, hx, lengths, enforce_sorted=False), x, None) for m in modules]
    assert_same(found[1], found[0], cell)


def test_empty_rows_keep_the_state_they_were_given():
    layer = Rebuilt(3, 5, batch_first=True)
    hx = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    _, states = layer(torch.randn(4, 4, 3), hx, torch.tensor([4, 0, 2, 0]), enforce_sorted=False)
    for given, kept in zip(hx, states, strict=True):
        assert torch.equal(kept[:, [1, 3]], given[:, [1, 3]]) and not torch.isclose(kept[:, 0], given[:, 0]).any()

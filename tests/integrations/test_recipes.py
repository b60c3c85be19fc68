"""docs/frameworks.md: every block runs, and what it makes returns torch.nn's numbers."""

import copy
import logging
import warnings

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import recipes
import torch
from torch import nn
from torch_cases import assert_same

import seqcells
from seqcells.testing import TOLERANCE, relative

pytestmark = pytest.mark.integrations
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers, of what is deprecated in between these packages
        yield


def test_each_is_short():
    found = recipes.blocks()
    wanted = ["Stable-Baselines3", "TorchRL", "Lightning", "Darts and NeuralForecast", "PyTorch Forecasting", "Opacus"]
    assert list(found) == [*wanted, "ONNX", "torch.export"]
    for heading, codes in found.items():
        assert codes and all(len([line for line in c.splitlines() if line.strip()]) <= 10 for c in codes), heading


def test_stable_baselines3():
    """Its numbers: test_sb3.py, by this policy too."""
    names = recipes.run("Stable-Baselines3")
    names["model"].learn(64)
    assert isinstance(names["model"].policy, names["Policy"])
    assert isinstance(names["model"].policy.lstm_actor, seqcells.LSTM)


def test_torchrl():
    torch.manual_seed(0)
    names = recipes.run("TorchRL")
    lstm, data = names["lstm"], names["data"]
    y, _ = seqcells.LSTM.forward(lstm.lstm, data["observation"], resets=data["is_init"].squeeze(-1))
    assert_same({"y": names["features"].detach()}, {"y": y.detach()}, "TorchRL")


def test_lightning():
    """Its numbers and checkpoints: test_lightning.py."""
    names = recipes.run("Lightning")
    model = names["Model"]()
    before = copy.deepcopy(model.state_dict())
    trainer = names["lightning"].Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(8, 5, 3), batch_size=4))
    assert isinstance(model.rnn, seqcells.GRU) and not torch.equal(before["head.weight"], model.head.weight)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_darts(kind):
    from darts import TimeSeries
    from darts.models import RNNModel

    names = recipes.run("Darts and NeuralForecast", only=0)
    series = TimeSeries.from_values(np.sin(np.arange(40) / 3).astype(np.float32))
    found = []
    for cls in (names["Model"], RNNModel):
        sizes = {"input_chunk_length": 6, "training_length": 8, "hidden_dim": 8, "n_epochs": 2, "random_state": 0}
        model = cls(model=kind, pl_trainer_kwargs=QUIET, **sizes)
        model.fit(series)
        predicted = torch.from_numpy(model.predict(4).values().copy())
        found.append({"predicted": predicted} | {n: p.detach() for n, p in model.model.named_parameters()})
        assert isinstance(model.model.rnn, getattr(seqcells if cls is not RNNModel else nn, kind))
    assert_same(*found, kind)


def test_neuralforecast():
    from neuralforecast import NeuralForecast
    from neuralforecast.models import GRU

    ours = recipes.run("Darts and NeuralForecast", only=1)["model"]
    theirs = GRU(h=2, input_size=6, encoder_hidden_size=8, max_steps=2)
    ours.load_state_dict(theirs.state_dict())
    rows = [{"unique_id": s, "ds": t, "y": float(np.sin(t / 3 + s))} for s in range(3) for t in range(30)]
    found = []
    for model in (ours, theirs):
        model.trainer_kwargs |= QUIET
        forecast = NeuralForecast(models=[model], freq=1)
        forecast.fit(pd.DataFrame(rows))
        found.append({"predicted": torch.from_numpy(forecast.predict()["GRU"].to_numpy().copy())})
    assert isinstance(ours.hist_encoder, seqcells.GRU)
    assert_same(*found, "GRU")


def test_pytorch_forecasting():
    """Its numbers: test_pytorch_forecasting.py, by these classes."""
    from pytorch_forecasting.models.nn import rnn

    models = [nn.ModuleList([rnn.LSTM(3, 4), rnn.GRU(3, 4)]), nn.ModuleList([rnn.LSTM(3, 4)])]
    names = recipes.run("PyTorch Forecasting", model=models[0], other=models[1])
    assert [type(m) for m in [*models[0], *models[1]]] == [names["LSTM"], names["GRU"], names["Rebuilt"]]


def test_opacus():
    """Its numbers: test_opacus.py."""
    names = recipes.run("Opacus")
    for x in names["data"]:
        names["optimizer"].zero_grad()
        names["model"](x)[0].square().mean().backward()
        names["optimizer"].step()
    assert all(p.isfinite().all() for p in names["model"].parameters())


def test_onnx():
    """More of it: test_onnx.py."""
    net = recipes.run("ONNX")["net"]
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(4, 5, 3)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    y, (h, c) = net(x)
    for a, b in zip(got, (y, h, c), strict=True):
        assert relative(torch.from_numpy(a), b.detach()) <= TOLERANCE[torch.float32]


def test_torch_export():
    names = recipes.run("torch.export")
    program = torch.export.load("net.pt2").module()
    for steps, batch in ((5, 2), (9, 4)):
        x = torch.randn(steps, batch, 3)
        torch.testing.assert_close(program(x), names["net"](x))

"""Lightning: a fit returns torch.nn's numbers, and a checkpoint of either is loaded by the other."""

import warnings

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_cases import assert_same

import seqcells

pytestmark = pytest.mark.integrations


class Model(lightning.LightningModule):
    def __init__(self, ours):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.lower = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.upper = nn.GRU(5, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 1)
        if ours:
            seqcells.convert(self)

    def training_step(self, batch, index):
        x, target = batch
        y, _ = self.upper(self.lower(x)[0])
        return nn.functional.mse_loss(self.head(y[:, -1]).squeeze(-1), target)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.fixture
def fit(tmp_path):
    """Fits a model, from a checkpoint if one is given, and gives the checkpoint it leaves."""
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(12, 7, 3), torch.randn(12)), batch_size=4)

    def run(model, epochs, start=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of workers and such
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = lightning.Trainer(
                max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet
            )
            trainer.fit(model, data, ckpt_path=start, weights_only=False)
            name = tmp_path / f"{model.hparams.ours}-{epochs}.ckpt"
            trainer.save_checkpoint(name)
        return name

    return run


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_fit_is_torch_nns(fit):
    theirs, ours = Model(False), Model(True)
    assert isinstance(ours.lower, seqcells.LSTM) and isinstance(ours.upper, seqcells.GRU)
    fit(theirs, 2)
    fit(ours, 2)
    assert_same(parameters(ours), parameters(theirs), "two epochs")


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_of_one_is_loaded_by_the_other(fit, first):
    """Weights alone, and a fit that goes on with the optimizer's state."""
    model = Model(first)
    file = fit(model, 1)
    loaded = Model.load_from_checkpoint(file, ours=not first, weights_only=False)
    assert isinstance(loaded.lower, seqcells.LSTM) is not first
    assert_same(parameters(loaded), parameters(model), "loaded")
    other, same = Model(not first), Model(first)
    fit(other, 2, file)
    fit(same, 2, file)
    assert_same(parameters(other), parameters(same), "went on")

"""LSTM, GRU and RNN that are subclasses of torch.nn's, too, for code that asks isinstance(module, torch.nn.LSTM).

Arguments, parameters, results and speed are those of seqcells.LSTM, GRU and RNN, which they are subclasses of. They
cost torch.compile, which refuses every instance of torch.nn.LSTM, GRU and RNN: its graph breaks where one is called,
and with fullgraph=True it raises, unless torch._dynamo.config.allow_rnn is set. (torch.export takes them.) So where
nobody asks isinstance, take seqcells.LSTM.

The cells are subclasses of torch.nn's anyway, which torch.compile takes: they stand here as well.

    seqcells.convert(model, subclass=True)

    class Theirs(torch.nn.LSTM): ...  # what somebody built on torch.nn.LSTM
    class Mine(Theirs, seqcells.subclasses.LSTM): ...  # the same on seqcells': its super().forward is seqcells'
    seqcells.convert(model, mapping={Theirs: Mine})
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import layers
from .cell_modules import GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Parameters(nn.RNNBase):
    """torch.nn's RNNs keep a list of their parameters. Ours are read where they are: nothing keeps or renews a list."""

    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]  # a method is assigned
    _apply = nn.Module._apply
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def _init_flat_weights(self) -> None: ...

    def _update_flat_weights(self) -> None: ...


class LSTM(layers.LSTM, _Parameters, nn.LSTM):  # type: ignore[misc, override]  # forward is ours
    """seqcells.LSTM, and an instance of torch.nn.LSTM. What that costs: see the module."""


class GRU(layers.GRU, _Parameters, nn.GRU):  # type: ignore[misc, override]  # forward is ours
    """seqcells.GRU, and an instance of torch.nn.GRU. What that costs: see the module."""


class RNN(layers.RNN, _Parameters, nn.RNN):  # type: ignore[misc, override]  # forward is ours
    """seqcells.RNN, and an instance of torch.nn.RNN. What that costs: see the module."""

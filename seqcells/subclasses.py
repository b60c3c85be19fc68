"""LSTM, GRU and RNN that also subclass torch.nn's, for code that checks isinstance(module, torch.nn.LSTM).

They are subclasses of seqcells.LSTM, GRU and RNN, with the same arguments, parameters, results and speed. torch.compile
does not support instances of torch.nn.LSTM, GRU and RNN: it breaks its graph where one is called, and raises with
fullgraph=True, unless torch._dynamo.config.allow_rnn is set. (torch.export supports them.) Use seqcells.LSTM unless
some code checks isinstance.

The cells always subclass torch.nn's, and torch.compile supports them. They are included here for completeness.

    seqcells.convert(model, subclass=True)

    class Theirs(torch.nn.LSTM): ...  # a class built on torch.nn.LSTM
    class Mine(Theirs, seqcells.subclasses.LSTM): ...  # the same class, but super().forward is now seqcells'
    seqcells.convert(model, mapping={Theirs: Mine})
"""

from __future__ import annotations

from torch import nn

from . import layers
from .cell_modules import GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Parameters(nn.RNNBase):
    """Replaces the methods by which torch.nn's RNNs maintain a list of their parameters. seqcells reads parameters as
    attributes, so these methods do nothing."""

    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]  # a method is assigned
    _apply = nn.Module._apply
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__.copy()

    def _init_flat_weights(self) -> None: ...

    def _update_flat_weights(self) -> None: ...


class LSTM(layers.LSTM, _Parameters, nn.LSTM):  # type: ignore[misc, override]  # forward is ours
    """seqcells.LSTM as a subclass of torch.nn.LSTM. For its limits see the module."""


class GRU(layers.GRU, _Parameters, nn.GRU):  # type: ignore[misc, override]  # forward is ours
    """seqcells.GRU as a subclass of torch.nn.GRU. For its limits see the module."""


class RNN(layers.RNN, _Parameters, nn.RNN):  # type: ignore[misc, override]  # forward is ours
    """seqcells.RNN as a subclass of torch.nn.RNN. For its limits see the module."""

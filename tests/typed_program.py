"""A user's program, which `make lint` checks with mypy --strict and pyright: what passes, and what must be refused.

Each ignored error must be there, or the checkers complain of the comment. The program runs, too (test_help.py).
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from typing_extensions import assert_type

import seqcells

Pair = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.encoder = seqcells.LSTM(size, 16, num_layers=2, bidirectional=True, device="cpu", dtype=torch.float32)
        self.decoder = seqcells.GRUCell(32, 8, reset_after=False)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor, resets: Tensor | None = None) -> Tensor:
        y, _ = self.encoder(x, resets=resets, lengths=[3, 2])
        h = x.new_zeros(x.shape[1], self.decoder.hidden_size)
        for step in y:
            h = self.decoder(step, h)
        out: Tensor = self.head(h)
        return out


def layers(x: Tensor, packed: PackedSequence, flag: bool) -> None:
    lstm = seqcells.LSTM(4, 8, 1, True, False, 0.0, False, 0, backend="loop", save="states", precision="ieee")
    assert_type(lstm(x), tuple[Tensor, Pair])
    assert_type(lstm(packed), tuple[PackedSequence, Pair])
    assert_type(lstm(x, return_cell_states=True), tuple[Tensor, Pair, Tensor])
    assert_type(lstm(packed, return_cell_states=True), tuple[PackedSequence, Pair, PackedSequence])
    assert_type(lstm.forward(x, None, lengths=torch.tensor([3, 2])), tuple[Tensor, Pair])
    _, hx = lstm(x, resets=torch.zeros(3, 2, dtype=torch.bool))
    found = lstm(x, hx, return_cell_states=flag)
    assert len(found) == 2 + flag
    gru = seqcells.GRU(4, 8, batch_first=True, reset_after=False)
    assert_type(gru(x), tuple[Tensor, Tensor])
    rnn = seqcells.RNN(4, 8, 1, "relu", dropout=0)
    assert_type(rnn(packed), tuple[PackedSequence, Tensor])


def cells(x: Tensor) -> None:
    assert_type(seqcells.LSTMCell(4, 8)(x), Pair)
    assert_type(seqcells.GRUCell(4, 8)(x, torch.zeros(2, 8)), Tensor)
    assert_type(seqcells.RNNCell(4, 8, nonlinearity="relu")(x), Tensor)


def functions(x: Tensor) -> None:
    w_ih, w_hh = torch.zeros(24, 4), torch.zeros(24, 8)
    assert_type(seqcells.gru(x, None, w_ih, w_hh, lengths=[3, 2]), tuple[Tensor, Tensor])
    w_ih, w_hh = torch.zeros(32, 4), torch.zeros(32, 8)
    assert_type(seqcells.lstm(x, None, w_ih, w_hh), tuple[Tensor, Pair])
    assert_type(seqcells.convert(nn.LSTM(4, 8)), nn.LSTM)
    assert_type(seqcells.explain("lstm", batch=2, hidden_size=8).backend, str)
    assert_type(seqcells.tune(seqcells.GRU(4, 8), x), seqcells.tuning.Tuned)
    seqcells.tuning.clear()
    seqcells.verification("first use")
    with seqcells.verification("off"), seqcells.backend("reference"):
        seqcells.init.forget_bias_(seqcells.LSTM(4, 8), 1.0)


def refused(x: Tensor) -> None:
    seqcells.GRU(8, "8")  # type: ignore[arg-type]
    seqcells.LSTM(8, 8, bidirectional="yes")  # type: ignore[arg-type]
    seqcells.RNN(8, 8, proj_size=4)  # type: ignore[call-arg]
    seqcells.LSTMCell(8)  # type: ignore[call-arg]
    seqcells.GRU(4, 8)(x, return_cell_states=True)  # type: ignore[call-overload]
    seqcells.GRUCell(4, 8)(x, (x, x))  # type: ignore[arg-type]
    seqcells.rnn(x, None, x, x, reset_after=True)  # type: ignore[call-arg]


if __name__ == "__main__":
    given = torch.randn(3, 2, 4)
    layers(given, pack_padded_sequence(given, [3, 2]), True)
    cells(given[0])
    functions(given)
    print(Tagger(4, 5)(given).shape)

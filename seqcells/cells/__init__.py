"""The cells, one file for each family: ten lines of PyTorch and the paper.

The layers LSTM, GRU and RNN use lstm, gru, gru_before, rnn_tanh and rnn_relu. Use the others with
`seqcells.Recurrent`:

>>> layer = seqcells.Recurrent(seqcells.cells.mgu, 10, 20)
"""

from .augru import augru
from .cifg import cifg
from .gru import gru, gru_before
from .gru_d import gru_d
from .indrnn import indrnn
from .lstm import lstm
from .mgu import mgu
from .peephole_lstm import peephole_lstm
from .rnn import rnn_relu, rnn_tanh
from .slstm import slstm
from .ugrnn import ugrnn

__all__ = [
    "augru",
    "cifg",
    "gru",
    "gru_before",
    "gru_d",
    "indrnn",
    "lstm",
    "mgu",
    "peephole_lstm",
    "rnn_relu",
    "rnn_tanh",
    "slstm",
    "ugrnn",
]

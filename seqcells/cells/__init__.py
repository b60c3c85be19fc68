"""The cells, one file for each family: ten lines of PyTorch and the paper.

The layers LSTM, GRU and RNN use lstm, gru, gru_before, rnn_tanh and rnn_relu. Use the others with
`seqcells.Recurrent`:

>>> layer = seqcells.Recurrent(seqcells.cells.mgu, 10, 20)
"""

from .agru import agru
from .antisymmetric import antisymmetric
from .antisymmetric_gated import antisymmetric_gated
from .augru import augru
from .cfc import cfc
from .cifg import cifg
from .cornn import cornn
from .dreamer_gru import dreamer_gru
from .gru import gru, gru_before
from .gru_d import gru_d
from .indrnn import indrnn
from .janet import janet
from .lem import lem
from .ligru import ligru
from .lngru import lngru
from .lnlstm import lnlstm
from .lstm import lstm
from .mgu import mgu
from .minimal_rnn import minimal_rnn
from .mlstm import mlstm
from .peephole_lstm import peephole_lstm
from .rnn import rnn_relu, rnn_tanh
from .slstm import slstm
from .star import star
from .ugrnn import ugrnn

__all__ = [
    "agru",
    "antisymmetric",
    "antisymmetric_gated",
    "augru",
    "cfc",
    "cifg",
    "cornn",
    "dreamer_gru",
    "gru",
    "gru_before",
    "gru_d",
    "indrnn",
    "janet",
    "lem",
    "ligru",
    "lngru",
    "lnlstm",
    "lstm",
    "mgu",
    "minimal_rnn",
    "mlstm",
    "peephole_lstm",
    "rnn_relu",
    "rnn_tanh",
    "slstm",
    "star",
    "ugrnn",
]

"""Recurrent cells for PyTorch with fused Triton kernels: torch.nn's API and parameters, plus what torch.nn lacks."""

from . import backends, cells, functional, init, interop, measured, reference, subclasses, testing, tuning
from .backends import backend
from .cell import Cell, CellError, cell
from .cell_modules import GRUCell, LSTMCell, RecurrentCell, RNNCell
from .convert import Change, convert, revert
from .explanation import explain
from .functional import gru, lstm, rnn
from .layers import GRU, LSTM, RNN
from .recurrent import Recurrent
from .tuning import tune
from .verification import verification

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "CellError",
    "Change",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "backend",
    "backends",
    "cell",
    "cells",
    "convert",
    "explain",
    "functional",
    "gru",
    "init",
    "interop",
    "lstm",
    "reference",
    "revert",
    "rnn",
    "subclasses",
    "testing",
    "tune",
    "tuning",
    "verification",
]
measured.load()

"""Cells, one file a family: ten lines of PyTorch and the paper."""

from .gru import gru, gru_before
from .lstm import lstm
from .rnn import rnn_relu, rnn_tanh

__all__ = ["gru", "gru_before", "lstm", "rnn_relu", "rnn_tanh"]

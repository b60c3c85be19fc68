"""What the tasks share: the layer of a cell's name, and a case with its two recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import layers

# The cells that tasks are run with, and what each is called in seqcells.functional.
CELLS = {"lstm": "lstm", "gru": "gru", "gru-before": "gru_before", "rnn": "rnn_tanh"}


@dataclass(frozen=True)
class Case:
    """One experiment of a task. quick, full: the task's own recipes. cells, seeds: what the suite runs it with."""

    shows: str
    quick: Any
    full: Any
    cells: tuple[str, ...] = ("lstm", "gru")
    seeds: tuple[int, ...] = (0, 1, 2)


def recurrent(cell: str, input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    """The layer of that name, [B, T, I] to [B, T, H]. options: the layer's. ValueError for another name."""
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}: expected one of {', '.join(CELLS)}")
    if cell.startswith("gru"):
        return layers.GRU(input_size, hidden_size, batch_first=True, reset_after=cell == "gru", **options)
    kind = layers.LSTM if cell == "lstm" else layers.RNN
    return kind(input_size, hidden_size, batch_first=True, **options)


def identity(task: str, case: str, cell: str, recipe: Any, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """What decides a run's numbers, apart from the machine, in types a checkpoint can hold."""
    values = {"task": task, "case": case, "cell": cell, "seed": seed, "dtype": str(dtype)}
    return values | {"recipe": repr(recipe)}

"""What the tasks share: the cells and their layers, and a case with its two recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import nn

from .. import layers

# The cells that tasks are run with, and their names in seqcells.functional.
CELLS = {"lstm": "lstm", "gru": "gru", "gru-before": "gru_before", "rnn": "rnn_tanh"}


class Place(TypedDict):
    """Where a run's tensors are, as tensor.to(**place) takes it."""

    device: str
    dtype: torch.dtype


class AnyRecipe(Protocol):
    """A task's own record of sizes, rates and what counts as solved."""

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Case:
    """One experiment of a task. quick, full: its recipes. cells, seeds: those that the suite runs it with."""

    shows: str
    quick: AnyRecipe
    full: AnyRecipe
    cells: tuple[str, ...] = ("lstm", "gru")
    seeds: tuple[int, ...] = (0, 1, 2)


def recurrent(cell: str, input_size: int, hidden_size: int, **options: Any) -> nn.Module:  # as the layer declares
    """The layer of a cell, [B, T, I] to [B, T, H]. options: the layer's. ValueError for an unknown cell."""
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}: expected one of {', '.join(CELLS)}")
    if cell.startswith("gru"):
        return layers.GRU(input_size, hidden_size, batch_first=True, reset_after=cell == "gru", **options)
    kind = layers.LSTM if cell == "lstm" else layers.RNN
    return kind(input_size, hidden_size, batch_first=True, **options)


def identity(task: str, case: str, cell: str, recipe: AnyRecipe, seed: int, dtype: torch.dtype) -> dict[str, str | int]:
    """Everything that determines a run's numbers, apart from the machine, in types that a checkpoint can contain."""
    return {"task": task, "case": case, "cell": cell, "seed": seed, "dtype": str(dtype), "recipe": repr(recipe)}

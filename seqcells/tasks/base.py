"""What the tasks share: the cells and their layers, and a case with its two recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from .. import layers
from ..cell import Cell, named
from ..recurrent import Recurrent

# The cells that recipes are made for, and their names in seqcells.functional. Other cells take the GRU's recipes, and
# run in the cases that a GRU runs in.
CELLS = {"lstm": "lstm", "gru": "gru", "gru-before": "gru_before", "rnn": "rnn_tanh"}

# Biases of gates with which a cell's state lasts over many steps: some cells keep it with a gate at 1, others at 0.
LASTING = {
    "augru": {"z": -4.0},
    "cifg": {"f": 4.0},
    "gru_d": {"z": -4.0},
    "janet": {"f": 4.0},
    "lem": {"a": -4.0, "b": -4.0},
    "ligru": {"z": 4.0},
    "mgu": {"f": -4.0},
    "minimal_rnn": {"u": 4.0},
    "mlstm": {"f": 6.0, "i": -3.0},
    "peephole_lstm": {"f": 6.0, "i": -3.0},
    "slstm": {"f": 6.0, "i": -3.0},
    "star": {"k": -4.0},
    "ugrnn": {"g": 4.0},
}


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
    """One experiment of a task. quick, full: its recipes. cells, seeds: what the suite runs it with by default."""

    shows: str
    quick: AnyRecipe
    full: AnyRecipe
    cells: tuple[str, ...] = ("lstm", "gru")
    seeds: tuple[int, ...] = (0, 1, 2)


def runs(case: Case, cell: str) -> bool:
    """Whether a case can be run with a cell."""
    return alike(cell) in case.cells


def alike(cell: str) -> str:
    """The cell whose recipes a cell takes."""
    return cell if cell in CELLS else "gru"


def definition(cell: str) -> Cell:
    """The Cell that the tasks call so: one of CELLS, else a cell's own name. ValueError for an unknown one."""
    return named(CELLS.get(cell, cell))


class _Regular(Recurrent):
    """A layer of any cell whose per-step inputs (times between steps, scores) are 1 at every step."""

    def forward(self, x: Tensor, state: Any = None) -> Any:  # type: ignore[override]  # as `Recurrent` has them
        ones: dict[str, Any] = {name: x.new_ones(x.shape[:2]) for name in self.cell.inputs}
        return super().forward(x, state, **ones)


def recurrent(cell: str, input_size: int, hidden_size: int, **options: Any) -> nn.Module:  # as the layer declares
    """The layer of a cell, [B, T, I] to [B, T, H]. options: the layer's. ValueError for an unknown cell."""
    if cell not in CELLS:
        return _Regular(definition(cell), input_size, hidden_size, batch_first=True, **options)
    if cell.startswith("gru"):
        return layers.GRU(input_size, hidden_size, batch_first=True, reset_after=cell == "gru", **options)
    kind = layers.LSTM if cell == "lstm" else layers.RNN
    return kind(input_size, hidden_size, batch_first=True, **options)


def identity(task: str, case: str, cell: str, recipe: AnyRecipe, seed: int, dtype: torch.dtype) -> dict[str, str | int]:
    """Everything that determines a run's numbers, apart from the machine, in types that a checkpoint can contain."""
    return {"task": task, "case": case, "cell": cell, "seed": seed, "dtype": str(dtype), "recipe": repr(recipe)}

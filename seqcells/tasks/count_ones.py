"""count-ones: a recurrent cell reads a string of zeros and ones and says how many ones there were.

From a notebook of hand-written cells: strings of 20, whose share of ones is drawn anew for each, 20 hidden units, a
linear layer on the last state, mean squared error, Adam at 1e-3, batches of 16 out of 10,000 strings, ten epochs. An
answer is right if it rounds to the count. The notebook's cells reached an accuracy of 1.0 at epoch 10.

The initial weights are the notebook's: the LSTM's all U(-sqrt(3/H), sqrt(3/H)); the GRU's as torch.nn.Linear draws
them, U(-1/sqrt(fan in), 1/sqrt(fan in)) for the input and the recurrent product alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import layers
from ..training import Data, Row, Run

CELLS = ("lstm", "gru", "gru-before", "rnn")
SHOWS = "hand-written LSTM and GRU cells learn to count; fused and reference cells do the same"


@dataclass(frozen=True)
class Recipe:
    """Sizes, and what counts as solved: accuracy on the test set, and (full only) its loss."""

    epochs: int
    accuracy: float
    loss: float
    length: int = 20
    hidden: int = 20
    batch: int = 16
    lr: float = 1e-3
    training: int = 10_000
    test: int = 1_000


QUICK = Recipe(epochs=7, accuracy=0.995, loss=math.inf)
FULL = Recipe(epochs=10, accuracy=0.998, loss=0.05)


def strings(count: int, length: int, generator: torch.Generator) -> Data:
    """Random strings [count, length, 1] of 0. and 1., and their counts [count].

    P(one) is drawn for each string from {1/20, 2/20, ..., 1}.
    """
    share = 1 - torch.randint(20, (count, 1), generator=generator) / 20
    ones = (torch.rand(count, length, generator=generator) < share).float()
    return Data(ones[..., None], ones.sum(1))


class Counter(nn.Module):
    """A recurrent layer over the string, and a linear layer on its last output. Input [B, T, 1], answer [B]."""

    def __init__(self, cell: str, hidden: int, backend: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if cell == "lstm":
            self.layer: nn.Module = layers.LSTM(1, hidden, batch_first=True, backend=backend, dtype=dtype)
        elif cell == "rnn":
            self.layer = layers.RNN(1, hidden, batch_first=True, backend=backend, dtype=dtype)
        elif cell in CELLS:
            after = cell == "gru"
            self.layer = layers.GRU(1, hidden, batch_first=True, reset_after=after, backend=backend, dtype=dtype)
        else:
            raise ValueError(f"unknown cell {cell!r}: expected one of {', '.join(CELLS)}")
        self.head = nn.Linear(hidden, 1, dtype=dtype)
        for name, weight in self.layer.named_parameters():
            fan_in = 1 if "_ih" in name else hidden
            bound = math.sqrt(3 / hidden) if cell == "lstm" else 1 / math.sqrt(fan_in)
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.layer(x)
        return self.head(output[:, -1])[:, 0]


def loss(answers: Tensor, counts: Tensor) -> Tensor:
    return nn.functional.mse_loss(answers, counts)


def right(answers: Tensor, counts: Tensor) -> Tensor:
    """[B] bool: the answer rounds to the count."""
    return answers.round() == counts


def data(recipe: Recipe, seed: int) -> tuple[Data, Data]:
    """The training and the test set, from streams of their own."""
    training = strings(recipe.training, recipe.length, torch.Generator().manual_seed(2 * seed))
    return training, strings(recipe.test, recipe.length, torch.Generator().manual_seed(2 * seed + 1))


def start(cell: str, recipe: Recipe, seed: int, *, backend: str | None, device: str, dtype: torch.dtype) -> Run:
    """A fresh run: the model and its optimizer, seeded."""
    torch.manual_seed(seed)
    model = Counter(cell, recipe.hidden, backend, dtype).to(device)
    identity = {"task": "count-ones", "cell": cell, "seed": seed, "dtype": str(dtype), "hidden": recipe.hidden}
    identity |= {"batch": recipe.batch, "lr": recipe.lr, "length": recipe.length, "training": recipe.training}
    # foreach=True falls back on tiny CPU tensors; the fused CPU loop is one call for all of them.
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    return Run(model, optimizer, torch.Generator().manual_seed(1000 + seed), identity)


def solved(rows: list[Row], recipe: Recipe) -> tuple[bool, str]:
    """Whether the last epoch meets the criterion, and the criterion with what was reached."""
    last = rows[-1]
    text = f"test accuracy {last.accuracy:.4f} (needs >= {recipe.accuracy}) at epoch {last.epoch}"
    if recipe.loss < math.inf:
        text += f", test loss {last.test_loss:.4f} (needs < {recipe.loss})"
    return last.accuracy >= recipe.accuracy and last.test_loss < recipe.loss, text


def examples(model: nn.Module, test: Data, count: int = 5) -> list[str]:
    """A few test strings with their count and the model's answer, as lines."""
    with torch.no_grad():
        answers = model(test.inputs[:count])
    lines = []
    for x, target, answer in zip(test.inputs, test.targets, answers, strict=False):
        digits = "".join(str(int(v)) for v in x[:, 0].tolist())
        lines.append(f"{digits}  count {int(target)}  answer {answer.item():.2f}")
    return lines

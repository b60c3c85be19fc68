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

from .base import Case, Place, identity, recurrent
from .training import Run, Verdict, stream

NAME = "count-ones"
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
    dtype: torch.dtype = torch.float32


CASES = {
    "strings of 20": Case(
        shows="the count of ones in a string of 20, from the last state",
        quick=Recipe(epochs=7, accuracy=0.995, loss=math.inf),
        full=Recipe(epochs=10, accuracy=0.998, loss=0.05),
        cells=("lstm", "gru", "gru-before"),
    )
}


def strings(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random strings [count, length, 1] of 0. and 1., and their counts [count].

    P(one) is drawn for each string from {1/20, 2/20, ..., 1}.
    """
    share = 1 - torch.randint(20, (count, 1), generator=generator) / 20
    ones = (torch.rand(count, length, generator=generator) < share).float()
    return ones[..., None], ones.sum(1)


class Counter(nn.Module):
    """A recurrent layer over the string, and a linear layer on its last output. Input [B, T, 1], answer [B]."""

    def __init__(self, cell: str, hidden: int, backend: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer = recurrent(cell, 1, hidden, backend=backend, dtype=dtype)
        self.head = nn.Linear(hidden, 1, dtype=dtype)
        for name, weight in self.layer.named_parameters():
            fan_in = 1 if "_ih" in name else hidden
            bound = math.sqrt(3 / hidden) if cell == "lstm" else 1 / math.sqrt(fan_in)
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.layer(x)
        return self.head(output[:, -1])[:, 0]


@dataclass(kw_only=True, eq=False, repr=False)
class Counting(Run):
    """Epochs over a fixed set in random order."""

    recipe: Recipe
    seed: int
    place: Place

    def __post_init__(self) -> None:
        recipe = self.recipe
        sets = (recipe.training, "training"), (recipe.test, "test")
        drawn = (strings(n, recipe.length, stream(NAME, purpose, self.seed)) for n, purpose in sets)
        self.training, self.test = (tuple(t.to(**self.place) for t in pair) for pair in drawn)
        self.order: tuple[Tensor, ...] = ()

    def step(self) -> tuple[Tensor, int]:
        inputs, counts = self.training
        at = self.done % self.every  # every: the steps of an epoch
        if at == 0:
            self.order = (
                torch.randperm(len(inputs), generator=self.generator).to(inputs.device).split(self.recipe.batch)
            )
        chosen = self.order[at]
        return self.update(nn.functional.mse_loss(self.model(inputs[chosen]), counts[chosen])), len(chosen)

    def measure(self) -> dict[str, float]:
        inputs, counts = self.test
        answers = self.model(inputs)
        accuracy = (answers.round() == counts).double().mean()
        return {"loss": nn.functional.mse_loss(answers, counts).item(), "accuracy": accuracy.item()}

    def verdict(self) -> Verdict:
        """Judged by the last epoch's test."""
        last, recipe = self.rows[-1].measured, self.recipe
        text = f"test accuracy {last['accuracy']:.4f} (needs >= {recipe.accuracy}) at epoch {len(self.rows)}"
        if recipe.loss < math.inf:
            text += f", test loss {last['loss']:.4f} (needs < {recipe.loss})"
        needs = {"accuracy": recipe.accuracy} | ({"loss": recipe.loss} if recipe.loss < math.inf else {})
        return Verdict(last["accuracy"] >= recipe.accuracy and last["loss"] < recipe.loss, text, needs)

    def lines(self) -> list[str]:
        """A few test strings with their count and the model's answer."""
        inputs, counts = (t[:5] for t in self.test)
        with torch.no_grad():
            answers = self.model(inputs).tolist()
        digits = ["".join(str(int(v)) for v in x) for x in inputs[..., 0].tolist()]
        return [
            f"{d}  count {int(n)}  answer {a:.2f}" for d, n, a in zip(digits, counts.tolist(), answers, strict=True)
        ]


def start(
    case: str,
    cell: str,
    recipe: Recipe,
    seed: int,
    *,
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Counting:
    """A fresh run: the model, its optimizer and its data, seeded. dtype None: the recipe's."""
    dtype = dtype or recipe.dtype
    torch.manual_seed(seed)
    model = Counter(cell, recipe.hidden, backend, dtype).to(device)
    # foreach=True falls back on tiny CPU tensors; the fused CPU loop is one call for all of them.
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    per_epoch = -(-recipe.training // recipe.batch)
    return Counting(
        recipe=recipe,
        seed=seed,
        place={"device": device, "dtype": dtype},
        model=model,
        optimizer=optimizer,
        generator=stream(NAME, "order", seed),
        identity=identity(NAME, case, cell, recipe, seed, dtype),
        steps=recipe.epochs * per_epoch,
        every=per_epoch,
    )

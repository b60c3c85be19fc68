"""count-ones-regression: two hidden units in double precision count ones; then, counting beyond the training lengths.

From a notebook. "literal": all 4096 binary strings of length 12, four fifths of them for training, an LSTM of two units
in float64, the answer the last output times two numbers drawn from N(0, 1) and trained with the rest (as drawn they
could not reach the larger counts: an output is below 1); mean squared error, full batches (quick: 512 strings at a
higher rate), Adam. The notebook's stated goal it never reached: trained on strings of at most 64, be right on lengths
in (64, 128). That is "goal".

A default initialisation does not get there: its gates forget, and what was learnt for 64 steps does not hold for 127.
An accumulator from the start does, `seqcells.init.accumulator_`: the forget gate is open and the input gate nearly
closed, so that each one adds a little where tanh is still linear, and the answer is scaled back up. The loss is taken
at every prefix, the strings' share of ones is uniform, and the rate decays exponentially to 1%. The results are in
benchmarks/results/tasks-cpu.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import init
from .base import Case, Place, alike, identity, recurrent
from .training import Run, Verdict, stream

NAME = "count-ones-regression"
SHOWS = "two hidden units count ones; an accumulator from the start counts right at twice the length it was trained on"


@dataclass(frozen=True)
class Recipe:
    """steps: by cell. accuracy, and one of loss (the test set's) and worst (error of any answer): below those."""

    steps: dict[str, int]
    accuracy: float
    loss: float = math.inf
    worst: float = math.inf
    length: int = 12
    hidden: dict[str, int] | None = None  # by cell; None: two
    lr: dict[str, float] | None = None  # by cell; None: 1e-3
    batch: int = 64  # if there are no more training strings than this, every batch contains all
    lengths: tuple[int, int] = (65, 127)
    long: tuple[int, int] = (128, 1023)
    goal: bool = False
    dtype: torch.dtype = torch.float64


_LITERAL_LR = {"lstm": 2e-2, "gru": 2e-2, "gru-before": 2e-2, "rnn": 2e-2}
_LITERAL_STEPS = dict.fromkeys(_LITERAL_LR, 3000)
_HIDDEN = {"lstm": 8, "gru": 16, "gru-before": 16, "rnn": 16}
_LR = {"lstm": 0.03, "gru": 0.02, "gru-before": 0.02, "rnn": 1e-3}
_SCALE = {"lstm": 1500.0, "gru": 300.0, "gru-before": 300.0, "rnn": 1.0}
CASES = {
    "literal": Case(
        shows="strings of 12, two units, float64, as the notebook has it",
        quick=Recipe(_LITERAL_STEPS, accuracy=0.98, loss=0.05, lr=_LITERAL_LR, batch=512),
        full=Recipe(dict.fromkeys(_LITERAL_LR, 10_000), accuracy=0.0, loss=0.03, batch=4096),
        cells=("lstm",),
    ),
    "goal": Case(
        shows="trained on strings of 64, asked about lengths 65 to 127",
        quick=Recipe(dict.fromkeys(_LR, 1500), 0.99, length=64, hidden=_HIDDEN, lr=_LR, goal=True, dtype=torch.float32),
        full=Recipe(
            dict.fromkeys(_LR, 3000),
            1.0,
            worst=0.25,
            length=64,
            hidden=_HIDDEN,
            lr=_LR,
            goal=True,
            dtype=torch.float32,
        ),
        seeds=(0, 1, 2, 3, 4),
    ),
}


def every_string(length: int) -> tuple[Tensor, Tensor]:
    """All binary strings [2**length, length, 1], the numbers from 0 in order, and their counts."""
    numbers = torch.arange(2**length)
    bits = (numbers[:, None] >> torch.arange(length - 1, -1, -1)) & 1
    return bits[..., None].double(), bits.sum(1).double()


def strings(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random strings [count, length, 1] of 0. and 1., P(one) uniform on (0, 1) for each."""
    share = torch.rand(count, 1, generator=generator)
    return (torch.rand(count, length, generator=generator) < share).float()[..., None]


def test_strings(length: int, generator: torch.Generator) -> Tensor:
    """Strings [66, length, 1]: 48 with P(one) drawn for each, 16 with P = .5, all ones, all zeros."""
    half = (torch.rand(16, length, generator=generator) < 0.5).float()
    rest = torch.stack([torch.ones(length), torch.zeros(length)])
    return torch.cat([strings(48, length, generator), torch.cat([half, rest])[..., None]])


class Counter(nn.Module):
    """Strings [B, T, 1] to the count at every prefix [B, T]: scale * (h @ combine), combine [H] from N(0, 1).

    scale: compensates for the accumulator's small steps.
    """

    def __init__(
        self,
        cell: str,
        hidden: int,
        scale: float = 1.0,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer = recurrent(cell, 1, hidden, backend=backend, dtype=dtype)
        self.scale = scale
        self.combine = nn.Parameter(torch.randn(hidden, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.layer(x)[0] @ self.combine)


@dataclass(kw_only=True, eq=False, repr=False)
class Literal(Run):
    """Four fifths of all strings, in full batches or some drawn from them each step."""

    recipe: Recipe
    seed: int
    place: Place

    def __post_init__(self) -> None:
        inputs, counts = (t.to(**self.place) for t in every_string(self.recipe.length))
        order = torch.randperm(len(inputs), generator=stream(NAME, "split", self.seed)).to(inputs.device)
        cut = len(inputs) * 4 // 5
        self.training, self.test = ((inputs[part], counts[part]) for part in (order[:cut], order[cut:]))

    def step(self) -> tuple[Tensor, int]:
        inputs, counts = self.training
        if self.recipe.batch < len(inputs):
            chosen = torch.randint(len(inputs), (self.recipe.batch,), generator=self.generator).to(inputs.device)
            inputs, counts = inputs[chosen], counts[chosen]
        return self.update(nn.functional.mse_loss(self.model(inputs)[:, -1], counts)), len(inputs)

    def measure(self) -> dict[str, float]:
        inputs, counts = self.test
        answers = self.model(inputs)[:, -1]
        accuracy = (answers.round() == counts).double().mean().item()
        return {"loss": nn.functional.mse_loss(answers, counts).item(), "accuracy": accuracy}

    def verdict(self) -> Verdict:
        last, recipe = self.rows[-1].measured, self.recipe
        text = f"test loss {last['loss']:.4f} (needs < {recipe.loss}), accuracy {last['accuracy']:.4f}"
        if recipe.accuracy:
            text += f" (needs >= {recipe.accuracy})"
        needs = {"loss": recipe.loss} | ({"accuracy": recipe.accuracy} if recipe.accuracy else {})
        return Verdict(last["loss"] < recipe.loss and last["accuracy"] >= recipe.accuracy, text, needs)

    def lines(self) -> list[str]:
        return _lines(self.model, self.test[0][:5])


@dataclass(kw_only=True, eq=False, repr=False)
class Goal(Run):
    """Fresh strings each step, the loss at every prefix; tested on longer ones."""

    recipe: Recipe
    seed: int
    place: Place

    def __post_init__(self) -> None:
        generator = stream(NAME, "test", self.seed)
        first, last = self.recipe.lengths
        self.test = [test_strings(n, generator).to(**self.place) for n in range(first, last + 1)]
        self.long = test_strings(self.recipe.long[1], generator).to(**self.place)

    def step(self) -> tuple[Tensor, int]:
        x = strings(self.recipe.batch, self.recipe.length, self.generator).to(**self.place)
        return self.update(nn.functional.mse_loss(self.model(x), x[..., 0].cumsum(1))), len(x)

    def measure(self) -> dict[str, float]:
        """Evaluate at the strings' ends, for each length separately."""
        # A string's last output does not depend on what follows it, so zeros behind make one batch of all lengths.
        longest = self.test[-1].shape[1]
        padded = torch.cat([nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in self.test])
        ends = torch.cat([torch.full((len(x),), x.shape[1] - 1) for x in self.test]).to(padded.device)
        answers = self.model(padded).gather(1, ends[:, None])[:, 0]
        counts = padded.sum((1, 2))
        return _measured(answers, counts)

    def verdict(self) -> Verdict:
        last, recipe = self.rows[-1].measured, self.recipe
        text = f"{last['accuracy']:.4f} of the counts right on lengths {recipe.lengths[0]}..{recipe.lengths[1]} "
        text += f"(needs >= {recipe.accuracy}), worst error {last['worst']:.3f}"
        if recipe.worst < math.inf:
            text += f" (needs < {recipe.worst})"
        with torch.no_grad():
            first = recipe.long[0] - 1
            far = _measured(self.model(self.long)[:, first:], self.long[..., 0].cumsum(1)[:, first:])
        text += f"; on {recipe.long[0]}..{recipe.long[1]}: {far['accuracy']:.4f} right, worst error {far['worst']:.2f}"
        solved = last["accuracy"] >= recipe.accuracy and last["worst"] < recipe.worst
        return Verdict(solved, text, {"accuracy": recipe.accuracy})

    def lines(self) -> list[str]:
        return _lines(self.model, self.test[0][:5])


def _measured(answers: Tensor, counts: Tensor) -> dict[str, float]:
    accuracy, worst = (answers.round() == counts).double().mean(), (answers - counts).abs().max()
    loss = nn.functional.mse_loss(answers, counts)
    return {"loss": loss.item(), "accuracy": accuracy.item(), "worst": worst.item()}


def _lines(model: nn.Module, x: Tensor) -> list[str]:
    """Strings with their count and the model's answer."""
    with torch.no_grad():
        answers = model(x)[:, -1].tolist()
    rows = ["".join(str(int(v)) for v in row) for row in x[..., 0].tolist()]
    return [f"{row}  count {row.count('1')}  answer {a:.3f}" for row, a in zip(rows, answers, strict=True)]


def start(
    case: str,
    cell: str,
    recipe: Recipe,
    seed: int,
    *,
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Literal | Goal:
    """A fresh run: the model, its optimizer and its data, seeded. dtype None: the recipe's."""
    dtype = dtype or recipe.dtype
    torch.manual_seed(seed)
    like = alike(cell)
    steps, hidden = recipe.steps[like], recipe.hidden[like] if recipe.hidden else 2
    lr = recipe.lr[like] if recipe.lr else 1e-3
    accumulates = recipe.goal and cell in _SCALE
    model = Counter(cell, hidden, _SCALE[cell] if accumulates else 1.0, backend, dtype)
    if accumulates and cell != "rnn":
        init.accumulator_(model.layer)
    model = model.to(device)
    betas = (0.9, 0.99) if recipe.goal else (0.9, 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps)) if recipe.goal else None
    kind = Goal if recipe.goal else Literal
    return kind(
        recipe=recipe,
        seed=seed,
        place={"device": device, "dtype": dtype},
        model=model,
        optimizer=optimizer,
        generator=stream(NAME, "training", seed),
        identity=identity(NAME, case, cell, recipe, seed, dtype),
        steps=steps,
        every=max(1, steps // 10),
        schedule=schedule,
    )

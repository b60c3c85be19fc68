"""temporal-order: three symbols, far apart, decide the class (Hochreiter and Schmidhuber 1997, task 6b).

Symbols E a b c d X Y B, one-hot. A string begins with E and ends with B; it is 100 to 110 long, padded in front with E
to 110; X or Y stands at t1 in [9, 20), t2 in [32, 43) and t3 in [65, 76), and a to d, at random, everywhere else. The
class is which of the eight orders XXX to YYY it was.

In the notebook the loss stuck at 0.37 to 0.38 and the accuracy at 0. The reason: outputs [B, 110, 8] against one-hot
labels [B, 8], so that cross_entropy took time for the class axis. The best answer is then constant, at 1/8 for each of
the eight labels' columns, one of which is asked about: H(1/8) = 0.3768 nats, which case "notebook" reproduces.

What solves it: the cross entropy of the last step, fresh strings, the gradient clipped to norm 1, and states that last
from the start: an LSTM with the forget gate's bias 6 and the input gate's -3, a GRU with orthogonal recurrent weights
and z's bias 4 (`seqcells.init.accumulator_`), a plain RNN with relu and the identity for its recurrent weights. The
rate decays exponentially to a tenth. Training stops when the last 2,000 strings all had every output within .3 before
the update with them: the data that decides when to stop is not used to judge the criterion. So the task must be solved
by the 6,000th string if training is to stop by the 8,000th. With batches of 16 and a rate of .02 the LSTM is too late
with some seeds; with 8 and .03, twice the updates, with none (benchmarks/results/tasks-cpu.md; the paper's net took
571,100). Worse for the LSTM: orthogonal recurrent weights, and biases of 5 and -2.

Attention: alpha_i, normalised from sigmoid(5 cos(W h_T, h_i)), over the hidden states; a linear layer on the context
and h_T. Over one-hot inputs and without h_T, as the notebook describes it, the context forgets the order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import init
from .base import CELLS, LASTING, Case, Place, identity, recurrent
from .training import Run, Verdict, stream

NAME = "temporal-order"
SHOWS = "three symbols far apart in strings of 110 decide the class, and why the notebook's loss could not fall"
SYMBOLS = "EabcdXYB"
LENGTH = 110
PLATEAU = -(math.log(1 / 8) / 8 + 7 / 8 * math.log(7 / 8))  # H(1/8), nats


@dataclass(frozen=True)
class Recipe:
    """limit: sequences to stop within. accuracy: on 3,000 fresh ones. model: "last", "attention" or "notebook"."""

    limit: int
    accuracy: float
    model: str = "last"
    hidden: int = 32
    batch: int = 8
    lr: float = 0.03
    last_lr: float = 0.1
    decay: int = 16_000  # sequences over which the rate falls to last_lr; there it stays
    window: int = 2_000
    test: int = 3_000
    evaluate: int = 1_600  # sequences between evaluations
    dtype: torch.dtype = torch.float32


_RNN = Recipe(160_000, 0.99, hidden=64, batch=32, lr=1e-3, decay=160_000, evaluate=16_000)
_NOTEBOOK = Recipe(32_000, 0.0, model="notebook", batch=16, lr=0.1, last_lr=0.01, decay=32_000)
CASES = {
    "order": Case(
        shows="the class from the last state",
        quick=Recipe(16_000, 0.99),
        full=Recipe(8_000, 0.999, decay=8_000),
        seeds=(0, 1, 2, 3, 4),
    ),
    "rnn": Case(
        shows="the same by a plain RNN, relu, from the identity",
        quick=replace(_RNN, limit=96_000, accuracy=0.95),
        full=_RNN,
        cells=("rnn",),
        seeds=(0,),
    ),
    "attention": Case(
        shows="the same with attention over the hidden states",
        quick=replace(_RNN, limit=96_000, accuracy=0.95, model="attention"),
        full=replace(_RNN, model="attention"),
        cells=("rnn",),
        seeds=(0,),
    ),
    "notebook": Case(
        shows="three layers and the loss that takes time for the class: its plateau, .3768",
        quick=replace(_NOTEBOOK, limit=8_000, decay=8_000),
        full=_NOTEBOOK,
        cells=("lstm", "rnn"),
        seeds=(0,),
    ),
}


def strings(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols [count, 110] and classes [count], 4 for a Y at t1, 2 at t2 and 1 at t3. A string begins after its E's."""
    symbols = torch.randint(1, 5, (count, LENGTH), generator=generator)
    begin = LENGTH - torch.randint(100, LENGTH + 1, (count, 1), generator=generator)
    symbols[torch.arange(LENGTH) <= begin] = SYMBOLS.index("E")
    at = torch.cat([torch.randint(low, low + 11, (count, 1), generator=generator) for low in (9, 32, 65)], 1)
    ys = torch.randint(2, (count, 3), generator=generator)
    symbols.scatter_(1, begin + at, ys + SYMBOLS.index("X"))
    symbols[:, -1] = SYMBOLS.index("B")
    return symbols, (ys * torch.tensor([4, 2, 1])).sum(1)


def orders() -> list[str]:
    """The classes' names, XXX to YYY."""
    return ["".join(order) for order in itertools.product("XY", repeat=3)]


class LastState(nn.Module):
    """Symbols one-hot [B, T, 8] to scores [B, 8], from the last output."""

    def __init__(self, layer: nn.Module, hidden: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(hidden, len(SYMBOLS), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    """Symbols one-hot [B, T, 8] to scores [B, 8], from the last output and a mean of all outputs that it weights."""

    def __init__(self, layer: nn.Module, hidden: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.question = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.head = nn.Linear(2 * hidden, len(SYMBOLS), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)[0]
        last = y[:, -1]
        alpha = (5 * torch.cosine_similarity(self.question(last)[:, None], y, dim=2)).sigmoid()
        context = (alpha / alpha.sum(1, keepdim=True))[:, None] @ y
        return self.head(torch.cat([context[:, 0], last], 1))


class ThreeLayers(nn.Module):
    """Symbols one-hot [B, T, 8] to outputs [B, T, 8], by layers of 2, 4 and 8 units and a linear one: the notebook's.

    Without the linear layer outputs stay in (-1, 1), and no softmax over 110 of them comes near the plateau.
    """

    def __init__(self, cell: str, backend: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        sizes = (8, 2, 4, 8)
        self.layers = nn.ModuleList(
            recurrent(cell, a, b, backend=backend, dtype=dtype) for a, b in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(8, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


def time_for_class(outputs: Tensor, labels: Tensor) -> Tensor:
    """The notebook's loss: cross_entropy of outputs [B, 110, 8] and one-hot labels [B, 8] given as class numbers.

    It takes axis 1, time, for the classes: at each of the 8 columns it asks for step 0, or for step 1 at the label's.
    """
    return nn.functional.cross_entropy(outputs, labels)


def _layer(cell: str, hidden: int, backend: str | None, dtype: torch.dtype | None) -> nn.Module:
    """A layer whose states last from the start."""
    more = {"nonlinearity": "relu"} if cell == "rnn" else {}
    layer = recurrent(cell, len(SYMBOLS), hidden, backend=backend, dtype=dtype, **more)
    if cell == "lstm":
        return init.accumulator_(layer, 6.0, -3.0)
    if cell not in CELLS:
        return init.gate_bias_(layer, **LASTING[cell]) if cell in LASTING else layer
    weight = layer.get_parameter("weight_hh_l0")
    if cell == "rnn":
        nn.init.eye_(weight)
        for name in ("bias_ih_l0", "bias_hh_l0"):
            nn.init.zeros_(getattr(layer, name))
        return layer
    for gate in weight.split(hidden):
        nn.init.orthogonal_(gate)
    return init.accumulator_(layer, 4.0)


@dataclass(kw_only=True, eq=False, repr=False)
class Ordering(Run):
    """Fresh strings each step, until the last `window` of them were all answered before they were learnt from."""

    recipe: Recipe
    seed: int
    place: Place

    def __post_init__(self) -> None:
        self.test, self.classes = strings(self.recipe.test, stream(NAME, "test", self.seed))
        self.streak = torch.zeros((), dtype=torch.int64)

    def _x(self, symbols: Tensor) -> Tensor:
        return nn.functional.one_hot(symbols, len(SYMBOLS)).to(**self.place)

    def step(self) -> tuple[Tensor, int]:
        symbols, classes = strings(self.recipe.batch, self.generator)
        scores, classes = self.model(self._x(symbols)), classes.to(self.place["device"])
        right = nn.functional.one_hot(classes, 8)
        if self.recipe.model == "notebook":
            return self.update(time_for_class(scores, right)), len(symbols)
        good = ((scores.detach().softmax(1) - right).abs() < 0.3).all(1)
        # The number of right answers since the last wrong one, including earlier batches if none is wrong here.
        trailing = good.flip(0).cumprod(0).sum()
        self.streak = torch.where(good.all(), self.streak.to(good.device) + len(good), trailing)
        return self.update(nn.functional.cross_entropy(scores, classes), clip=1.0), len(symbols)

    def stop(self) -> bool:
        return self.recipe.model != "notebook" and self.streak.item() >= self.recipe.window

    def extra(self) -> dict[str, object]:
        return {"streak": self.streak}

    def restore(self, extra: dict[str, Any]) -> None:
        self.streak = extra["streak"]

    def measure(self) -> dict[str, float]:
        losses, right = [], []
        for symbols, classes in zip(self.test.split(500), self.classes.split(500), strict=True):
            scores, classes = self.model(self._x(symbols)), classes.to(self.place["device"])
            if self.recipe.model == "notebook":
                losses.append(time_for_class(scores, nn.functional.one_hot(classes, 8)) * len(symbols))
                scores = scores[:, -1]
            else:
                losses.append(nn.functional.cross_entropy(scores, classes, reduction="sum"))
            right.append(scores.argmax(1) == classes)
        loss = torch.stack(losses).sum() / len(self.test)
        return {"loss": loss.item(), "accuracy": torch.cat(right).double().mean().item()}

    def verdict(self) -> Verdict:
        last, recipe = self.rows[-1], self.recipe
        if recipe.model == "notebook":
            loss = last.measured["loss"]
            text = f"test loss {loss:.4f} (the plateau is {PLATEAU:.4f} +- .002)"
            return Verdict(abs(loss - PLATEAU) <= 0.002, text, {"loss": PLATEAU + 0.002})
        how = f"stopped after {self.sequences}" if self.stopped else f"not stopped within {self.sequences}"
        accuracy = last.measured["accuracy"]
        text = f"{how} sequences (needs <= {recipe.limit}), {accuracy:.4f} of {recipe.test} fresh ones right "
        text += f"(needs >= {recipe.accuracy})"
        return Verdict(self.stopped and accuracy >= recipe.accuracy, text, {"accuracy": recipe.accuracy})

    def lines(self) -> list[str]:
        """Strings with the symbols that count, the class and the answer."""
        with torch.no_grad():
            scores = self.model(self._x(self.test[:3]))
        answers = (scores[:, -1] if scores.dim() == 3 else scores).argmax(1).tolist()
        rows = zip(self.test[:3].tolist(), self.classes[:3].tolist(), answers, strict=True)
        names = orders()
        return [f"{''.join(SYMBOLS[s] for s in row)}  {names[c]}  answer {names[a]}" for row, c, a in rows]


def start(
    case: str,
    cell: str,
    recipe: Recipe,
    seed: int,
    *,
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Ordering:
    """A fresh run: the model, its optimizer and its data, seeded. dtype None: the recipe's."""
    dtype = dtype or recipe.dtype
    torch.manual_seed(seed)
    model: nn.Module
    if recipe.model == "notebook":
        model = ThreeLayers(cell, backend, dtype)
    else:
        kind = Attention if recipe.model == "attention" else LastState
        model = kind(_layer(cell, recipe.hidden, backend, dtype), recipe.hidden, dtype)
    model = model.to(device)
    betas = (0.9, 0.999) if recipe.model == "notebook" else (0.9, 0.99)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, betas=betas, fused=True)
    decay = recipe.decay // recipe.batch
    return Ordering(
        recipe=recipe,
        seed=seed,
        place={"device": device, "dtype": dtype},
        model=model,
        optimizer=optimizer,
        generator=stream(NAME, "training", seed),
        identity=identity(NAME, case, cell, recipe, seed, dtype),
        steps=recipe.limit // recipe.batch,
        every=recipe.evaluate // recipe.batch,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: recipe.last_lr ** min(1.0, done / decay)),
    )

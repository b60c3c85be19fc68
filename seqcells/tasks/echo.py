"""echo: repeat a random sequence of integers, as it comes or through an encoder and a decoder.

From two notebooks. Integers 0..98, one-hot in 100 symbols. "whole": six integers in, the same six out, one a step.
"stateful": the same on sliding windows of a sequence, as with Keras's stateful=True: row j of a batch starts from the
state in which row j of the previous batch ended, and no gradient crosses. "5-2", "5-4", "5-5": five integers in; the
encoder's last state, repeated for each output step, is the input of a decoder that outputs the first two, four or five.
The notebook's 5-4, with 300 units, ended near 39% of the symbols after its loss had blown up.

What makes it work: input weights Glorot, recurrent weights orthogonal, forget bias 1; the gradient clipped to norm 1;
and a learning rate that stays constant until the symbols are learnt (60% of the steps) and then decays to 3%. Decaying
from the first step hurts. Results: benchmarks/results/tasks-cpu.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import init
from .base import Case, Place, identity, recurrent
from .training import Run, Verdict, stream

NAME = "echo"
SHOWS = "random integers repeated: step by step, with state carried over batches, and through an encoder and a decoder"


@dataclass(frozen=True)
class Recipe:
    """exact: the share of 2,000 fresh sequences that must be right in every symbol. outputs 0: step by step."""

    steps: int
    exact: float
    outputs: int
    inputs: int = 5
    hidden: int = 150
    symbols: int = 100
    batch: int = 128
    lr: float = 3e-3
    flat: float = 0.6
    last_lr: float = 0.03
    clip: float | None = 1.0
    stateful: bool = False
    windows: int = 20  # of a sequence of 25, in the stateful form
    test: int = 2_000
    dtype: torch.dtype = torch.float32


_WHOLE = Recipe(steps=200, exact=0.99, outputs=0, inputs=6, hidden=16, batch=64, lr=1e-2, flat=1.0, clip=None)
CASES = {
    "whole": Case(
        shows="six integers in, each out again in its step",
        quick=_WHOLE,
        full=replace(_WHOLE, steps=300, exact=1.0),
    ),
    "stateful": Case(
        shows="the same on sliding windows, each row going on from its state in the batch before",
        quick=replace(_WHOLE, steps=300, stateful=True),
        full=replace(_WHOLE, steps=500, exact=1.0, stateful=True),
    ),
    "5-2": Case(
        shows="five integers in, then the first two out",
        quick=Recipe(steps=700, exact=0.99, outputs=2),
        full=Recipe(steps=1500, exact=1.0, outputs=2),
    ),
    "5-4": Case(
        shows="five integers in, then the first four out (quick: of ten integers, 64 units)",
        quick=Recipe(steps=1000, exact=0.95, outputs=4, symbols=11, hidden=64),
        full=Recipe(steps=4000, exact=0.995, outputs=4),
    ),
    "5-5": Case(
        shows="five integers in, then all five out (quick: of ten integers, 64 units)",
        quick=Recipe(steps=1500, exact=0.95, outputs=5, symbols=11, hidden=64),
        full=Recipe(steps=4000, exact=0.995, outputs=5),
    ),
}


def integers(count: int, length: int, symbols: int, generator: torch.Generator) -> Tensor:
    """Integers [count, length] of 0..symbols-2; the last symbol is never drawn."""
    return torch.randint(symbols - 1, (count, length), generator=generator)


def windows(sequences: Tensor, length: int) -> Tensor:
    """All windows [W, N, length] of sequences [N, W + length - 1]: [k, j] is sequences[j, k : k + length]."""
    return sequences.unfold(1, length, 1).transpose(0, 1)


class Stateful(nn.Module):
    """A recurrent layer, batch first, whose rows continue from their states in the previous call, until reset_states().

    As with Keras's stateful=True, values cross but gradients do not. ValueError if the number of rows changes.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.states: tuple[Tensor, ...] | None = None

    def reset_states(self) -> None:
        self.states = None

    def forward(self, x: Tensor) -> Tensor:
        if self.states is not None and self.states[0].shape[1] != len(x):
            raise ValueError(f"stateful: expected a batch of {self.states[0].shape[1]} rows as before, got {len(x)}")
        hx: Tensor | tuple[Tensor, ...] | None = self.states
        if isinstance(hx, tuple) and len(hx) == 1:
            hx = hx[0]
        y, final = self.layer(x, hx)
        self.states = tuple(s.detach() for s in (final if isinstance(final, tuple) else (final,)))
        return y


def _prepared(layer: nn.Module) -> nn.Module:
    """Weights as Keras draws them: Glorot from the input, orthogonal from the state, no bias but forget gates' 1."""
    for name, weight in layer.named_parameters():
        if name.startswith("weight_ih"):
            nn.init.xavier_uniform_(weight)
        elif name.startswith("weight_hh"):
            for gate in weight.split(weight.shape[1]):
                nn.init.orthogonal_(gate)
        elif name.startswith("bias"):
            nn.init.zeros_(weight)
    return init.forget_bias_(layer) if getattr(layer, "mode", "") == "LSTM" else layer


class Echo(nn.Module):
    """Symbols one-hot [B, T, S] to scores [B, T, S], in step. With stateful, states stay from call to call."""

    def __init__(
        self,
        cell: str,
        symbols: int,
        hidden: int,
        stateful: bool = False,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = _prepared(recurrent(cell, symbols, hidden, backend=backend, dtype=dtype))
        self.layer = Stateful(layer) if stateful else layer
        self.head = nn.Linear(hidden, symbols, dtype=dtype)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(y if isinstance(y, Tensor) else y[0])


class EncoderDecoder(nn.Module):
    """Symbols one-hot [B, T, S] to scores [B, outputs, S]: the encoder's last state is every input of the decoder."""

    def __init__(
        self,
        cell: str,
        symbols: int,
        hidden: int,
        outputs: int,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.encoder = _prepared(recurrent(cell, symbols, hidden, backend=backend, dtype=dtype))
        self.decoder = _prepared(recurrent(cell, hidden, hidden, backend=backend, dtype=dtype))
        self.head = nn.Linear(hidden, symbols, dtype=dtype)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        last = self.encoder(x)[0][:, -1:]
        return self.head(self.decoder(last.repeat(1, self.outputs, 1))[0])


@dataclass(kw_only=True, eq=False, repr=False)
class Echoing(Run):
    """Fresh windows each step; in the stateful form, the windows of fresh sequences in order."""

    recipe: Recipe
    seed: int
    place: Place

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.test = integers(recipe.test, recipe.inputs, recipe.symbols, stream(NAME, "test", self.seed))
        self.windows: Tensor | None = None

    @property
    def layer(self) -> Stateful:
        """The layer of the stateful form."""
        layer = self.model.layer
        assert isinstance(layer, Stateful)
        return layer

    def _scores(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores for rows of integers [B, inputs], and the integers asked for."""
        x = nn.functional.one_hot(rows, self.recipe.symbols).to(**self.place)
        asked = rows[:, : self.recipe.outputs] if self.recipe.outputs else rows
        return self.model(x), asked.to(x.device)

    def step(self) -> tuple[Tensor, int]:
        recipe = self.recipe
        if not recipe.stateful:
            rows = integers(recipe.batch, recipe.inputs, recipe.symbols, self.generator)
        else:
            at = self.done % recipe.windows
            if at == 0 or self.windows is None:
                length = recipe.windows + recipe.inputs - 1
                drawn = integers(recipe.batch, length, recipe.symbols, self.generator)
                self.windows = windows(drawn, recipe.inputs)
            if at == 0:
                self.layer.reset_states()
            rows = self.windows[at]
        scores, asked = self._scores(rows)
        return self.update(nn.functional.cross_entropy(scores.flatten(0, 1), asked.flatten()), recipe.clip), len(rows)

    def extra(self) -> dict[str, object]:
        if not self.recipe.stateful:
            return {}
        return {"windows": self.windows, "states": self.layer.states}

    def restore(self, extra: dict[str, Any]) -> None:
        if extra:
            states = extra["states"]
            self.windows = extra["windows"]
            self.layer.states = None if states is None else tuple(s.to(self.place["device"]) for s in states)

    def _answers(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As _scores. A stateful model is evaluated from zero states, and then continues from its training states."""
        if not self.recipe.stateful:
            return self._scores(rows)
        layer = self.layer
        before = layer.states
        layer.reset_states()
        result = self._scores(rows)
        layer.states = before
        return result

    def measure(self) -> dict[str, float]:
        scores, asked = self._answers(self.test)
        right = scores.argmax(-1) == asked
        value = nn.functional.cross_entropy(scores.flatten(0, 1), asked.flatten()).item()
        exact, each = right.all(1).double().mean().item(), right.double().mean().item()
        return {"loss": value, "accuracy": exact, "symbols": each}

    def verdict(self) -> Verdict:
        """accuracy: the share of sequences right in every symbol."""
        last, need = self.rows[-1].measured, self.recipe.exact
        text = f"{last['accuracy']:.4f} of {self.recipe.test} fresh sequences exact (needs >= {need})"
        return Verdict(last["accuracy"] >= need, f"{text}, {last['symbols']:.5f} of their symbols", {"accuracy": need})

    def lines(self) -> list[str]:
        """Expected and predicted rows."""
        with torch.no_grad():
            scores, asked = self._answers(self.test[:3])
        pairs = zip(asked.tolist(), scores.argmax(-1).tolist(), strict=True)
        return [f"expected {expected}  predicted {got}" for expected, got in pairs]


def start(
    case: str,
    cell: str,
    recipe: Recipe,
    seed: int,
    *,
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Echoing:
    """A fresh run: the model, its optimizer and its data, seeded. dtype None: the recipe's."""
    dtype = dtype or recipe.dtype
    torch.manual_seed(seed)
    model: nn.Module
    if recipe.outputs:
        model = EncoderDecoder(cell, recipe.symbols, recipe.hidden, recipe.outputs, backend, dtype)
    else:
        model = Echo(cell, recipe.symbols, recipe.hidden, recipe.stateful, backend, dtype)
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    flat = recipe.flat * recipe.steps

    def rate(done: int) -> float:
        return 1.0 if done <= flat else recipe.last_lr ** ((done - flat) / (recipe.steps - flat))

    return Echoing(
        recipe=recipe,
        seed=seed,
        place={"device": device, "dtype": dtype},
        model=model,
        optimizer=optimizer,
        generator=stream(NAME, "training", seed),
        identity=identity(NAME, case, cell, recipe, seed, dtype),
        steps=recipe.steps,
        every=max(1, recipe.steps // 10),
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, rate),
    )

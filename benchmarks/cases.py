"""What is timed: the cases, and their tensors.

A case is a layer's work with its shape; a provider (see providers.py) is an implementation of it. All providers receive
the same input and weights and do the same work: every time includes the product of the input, or (`projected=False`)
none does. A provider is timed only if its outputs and all gradients agree with the judge's (`parity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from seqcells import testing
from seqcells.cell import named
from seqcells.tasks.base import CELLS as NAMES  # of each cell here, what it is called in seqcells.functional

KINDS = {"lstm": "LSTM", "gru": "GRU", "gru-before": "GRU", "rnn": "RNN"}
GATES = {cell: len(named(name).gates) for cell, name in NAMES.items()}
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
INFERENCE, TRAINING, STEP = "inference", "training", "step"


@dataclass(frozen=True)
class Case:
    """mode: "inference" (forward, no gradients), "training" (forward and backward) or "step" (a cell's one step, T=1).

    I: the input's size. heads: block-diagonal recurrent weights, of H units each. projected: whether the input's
    product is part of the work; without it x is that product, [T, B, G * heads * H], and there are no biases. resets:
    the share of steps with a reset; if T is 1, the step starts from given states. lengths: rows are T/4 to T long;
    packed: in a PackedSequence that was made before. why: what the case represents.
    """

    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    mode: str = TRAINING
    dtype: str = "float32"
    layers: int = 1
    bidirectional: bool = False
    heads: int = 1
    projected: bool = True
    resets: float = 0.0
    lengths: bool = False
    packed: bool = False
    why: str = ""

    @property
    def name(self) -> str:
        parts = [self.cell, self.mode, self.dtype, f"T={self.T} B={self.B} I={self.I} H={self.H}"]
        parts += [f"x{self.heads}"] * (self.heads > 1) + [f"{self.layers} layers"] * (self.layers > 1)
        parts += ["bidirectional"] * self.bidirectional + ["no input product"] * (not self.projected)
        parts += [f"resets {self.resets:g}"] * (self.resets > 0) + ["lengths"] * self.lengths
        parts += ["packed"] * self.packed
        return " ".join(parts)

    def small(self) -> Case:
        """The same kind of work at a size for the interpreter."""
        few = {
            "T": min(self.T, 2),
            "B": min(self.B, 3),
            "I": min(self.I, 3),
            "H": min(self.H, 16 if self.heads > 1 else 5),
        }
        return replace(self, **few, heads=min(self.heads, 2), layers=min(self.layers, 2), resets=self.resets and 0.3)


class Unavailable(Exception):
    """Raised by a provider that does not support a case, with the reason."""


class Work(NamedTuple):
    """run() returns y. Gradients are taken of leaves: x (if it is one) and the parameters, in torch.nn's order."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]


class Problem:
    """A case's tensors on a device: x [T, B, I], weights as torch.nn draws them, resets, lengths.

    Every provider gets the same values.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, torch.device(device)
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(0)
        width = case.I if case.projected else GATES[case.cell] * case.heads * case.H
        place = {"device": self.device, "dtype": self.dtype}
        self.x = torch.randn(case.T, case.B, width, generator=generator).to(**place)
        torch.manual_seed(0)
        kind = getattr(torch.nn, KINDS[case.cell])
        options = {"num_layers": case.layers, "bidirectional": case.bidirectional}
        self.layer = kind(case.I, case.H, **options) if case.heads == 1 else None
        self.weights = [p.detach().to(**place) for p in self.layer.parameters()] if self.layer is not None else []
        if case.heads > 1 or not case.projected:
            bound = case.H**-0.5
            gates = GATES[case.cell] * case.H

            def drawn(*size: int) -> Tensor:
                return ((torch.rand(size, generator=generator) * 2 - 1) * bound).to(**place)

            self.weights = [drawn(case.heads, gates, case.H)]
            if case.projected:
                self.weights = [
                    drawn(case.heads, gates, case.I),
                    *self.weights,
                    *(drawn(case.heads, gates) for _ in "ih"),
                ]
        starts = torch.rand(case.T, case.B, generator=generator) < case.resets
        self.resets = starts.to(self.device) if case.resets else None
        self.lengths = None
        if case.lengths:
            self.lengths = torch.randint(max(1, case.T // 4), case.T + 1, (case.B,), generator=generator)
            self.lengths[0] = case.T
        signs = torch.randn(case.T, case.B, self.width, generator=generator).sign()
        if self.lengths is not None:  # outputs in the padding do not count
            signs[torch.arange(case.T)[:, None] >= self.lengths] = 0
        self.signs = signs.to(**place)
        self.states: list[Tensor] | None = None
        if case.T == 1 and case.resets:
            size = case.layers * (1 + case.bidirectional), case.B, case.H
            count = 2 if case.cell == "lstm" else 1
            self.states = [torch.randn(size, generator=generator).to(**place) for _ in range(count)]
            self.ends = starts.to(**place)  # 0 and 1, as environments return them
        if case.packed:
            self.signs = self.pack(self.signs).data

    def pack(self, x: Tensor) -> PackedSequence:
        return pack_padded_sequence(x, self.lengths, enforce_sorted=False)

    def hx(self, states: list[Tensor]) -> Any:
        """The states in the form that layers take."""
        return tuple(states) if self.case.cell == "lstm" else states[0]

    @property
    def width(self) -> int:
        """The width of y."""
        return self.case.heads * self.case.H * (1 + self.case.bidirectional)

    def fresh(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x and the weights, copied, as leaves: the weights and an input product have gradients, data does not."""
        x = self.x.to(device or self.device, dtype or self.dtype, copy=True)
        weights = [w.to(device or self.device, dtype or self.dtype, copy=True) for w in self.weights]
        if self.case.mode != INFERENCE:
            for w in weights:
                w.requires_grad_()
            x.requires_grad_(not self.case.projected)
        return x, weights


def repeated(problem: Problem, work: Work) -> Callable[[], object]:
    """The function that is timed."""
    if problem.case.mode == INFERENCE:

        def infer() -> Tensor:
            with torch.no_grad():
                return work.run()

        return infer
    return lambda: torch.autograd.grad(work.run(), work.leaves, problem.signs)


def answer(problem: Problem, work: Work) -> list[Tensor]:
    """y and, in training, every gradient."""
    if problem.case.mode == INFERENCE:
        with torch.no_grad():
            y = work.run()
        return [y * problem.signs.abs()]
    y = work.run()
    return [y.detach() * problem.signs.abs().to(y), *torch.autograd.grad(y, work.leaves, problem.signs.to(y))]


def parity(found: list[Tensor], judged: list[Tensor], allowed: float) -> float:
    """The largest relative error of any output or gradient. ValueError if it is more than allowed."""
    assert len(found) == len(judged)
    worst = max(testing.relative(a.detach(), b.detach()) for a, b in zip(found, judged, strict=True))
    if not worst <= allowed:
        raise ValueError(f"disagrees with the judge by {worst:.1e}, allowed {allowed:.0e}")
    return worst


def tolerance(case: Case, device: torch.device) -> float:
    """testing.TOLERANCE's, in low precision times the number of layers, since each rounds its output."""
    if case.dtype in ("float16", "bfloat16"):
        return case.layers * testing.TOLERANCE[DTYPES[case.dtype]]
    return testing.TOLERANCE["tf32" if device.type == "cuda" and case.dtype == "float32" else DTYPES[case.dtype]]


# The tasks' own layers.
TASKS = [
    Case("lstm", 12, 3276, 1, 2, why="count-ones-regression, literal"),
    Case("lstm", 64, 64, 1, 8, why="count-ones-regression, goal"),
    Case("gru", 64, 64, 1, 16, why="count-ones-regression, goal"),
    Case("lstm", 6, 64, 100, 16, why="echo, whole"),
    Case("lstm", 20, 16, 1, 20, why="count-ones"),
    Case("gru", 20, 16, 1, 20, why="count-ones"),
    Case("gru-before", 20, 16, 1, 20, why="count-ones"),
    Case("lstm", 1, 1, 26, 32, mode=STEP, why="memorize"),
    Case("gru", 1, 1, 26, 32, mode=STEP, why="memorize"),
    Case("lstm", 110, 8, 8, 32, why="temporal-order"),
    Case("gru", 110, 8, 8, 32, why="temporal-order"),
    Case("rnn", 110, 32, 8, 64, why="temporal-order"),
    Case("lstm", 1, 1, 26, 128, mode=STEP, why="memorize, case 7"),
    Case("lstm", 5, 128, 100, 150, why="echo, encoder"),
    Case("gru", 5, 128, 100, 150, why="echo, encoder"),
    Case("lstm", 4, 128, 300, 300, why="echo, the notebook's decoder"),
]

# A rollout of environments that end; rows of different lengths; the textbook GRU.
LACKING = [
    Case("lstm", 128, 128, 64, 256, resets=0.03, why="rollout"),
    Case("gru", 128, 128, 64, 256, resets=0.03, why="rollout"),
    Case("lstm", 200, 16, 32, 64, resets=0.03, why="rollout"),
    Case("gru", 200, 16, 32, 64, resets=0.03, why="rollout"),
    Case("gru-before", 100, 16, 32, 64, why="reset gate before the product"),
    Case("gru-before", 128, 64, 64, 256, why="reset gate before the product"),
    Case("lstm", 100, 16, 32, 64, lengths=True, why="padded batch"),
    Case("gru", 100, 16, 32, 64, lengths=True, why="padded batch"),
    Case("gru-before", 100, 16, 32, 64, lengths=True, why="padded batch"),
]

# What torch.nn supports on the CPU.
PLAIN = [
    Case(cell, T, B, size, H, mode=mode, why="a layer")
    for cell in ("lstm", "gru")
    for mode in (TRAINING, INFERENCE)
    for T, B, size, H in ((100, 16, 32, 64), (100, 16, 64, 128), (128, 64, 64, 256))
]

# Sentences, packed; and acting, a step at a time in environments that end.
SHORT = [
    Case(cell, T, B, H, H, mode=mode, lengths=True, packed=True, why="sentences")
    for cell in ("lstm", "gru", "rnn")
    for mode in (TRAINING, INFERENCE)
    for T, B, H in ((5, 8, 32), (8, 32, 32), (10, 32, 64), (25, 64, 64))
]
ACTING = [
    Case(cell, 1, B, 16, 64, mode=mode, resets=0.2, why="acting")
    for cell in ("lstm", "gru", "rnn")
    for mode in (INFERENCE, TRAINING)
    for B in (1, 16)
]


# How it scales, on the CPU.
SCALING = [
    Case(cell, 64, B, H, H, why=why)
    for cell in ("lstm", "gru", "gru-before")
    for why, sizes in (
        ("by H", [(16, H) for H in (16, 32, 128, 256, 512)]),
        ("by H, by B", [(16, 64)]),
        ("by B", [(B, 64) for B in (1, 4, 64, 256)]),
    )
    for B, H in sizes
]


def public() -> Iterator[Case]:
    """Shapes that the field publishes, for a device: FlashRNN's, and cuDNN's fast paths with their neighbours."""
    for cell in ("lstm", "gru"):
        for mode in (INFERENCE, TRAINING):
            options = {"mode": mode, "dtype": "bfloat16", "why": "FlashRNN's"}
            for heads, H in ((1, 768), (3, 256), (6, 128), (12, 64)):
                yield Case(cell, 1024, 16, 768, H, heads=heads, **options)
                yield Case(cell, 1024, 16, 768, H, heads=heads, projected=False, **options)
    for B in (2, 8, 32, 64, 128, 256):
        yield Case("lstm", 1024, B, 768, 768, dtype="bfloat16", why="batch")
    for T in (256, 512, 2048):
        yield Case("lstm", T, 16, 768, 768, dtype="bfloat16", why="length")
    for mode in (INFERENCE, TRAINING):
        yield Case("lstm", 1024, 16, 768, 768, mode=mode, dtype="float16", why="cuDNN persistent")
    near = {"T": 512, "B": 64, "I": 768, "H": 768}
    yield Case("lstm", **near, dtype="float16", why="cuDNN persistent")
    yield Case("lstm", **near, dtype="bfloat16", why="off cuDNN's path: bf16")
    yield Case("lstm", **near | {"H": 750}, dtype="float16", why="off cuDNN's path: H")
    yield Case("gru", **near, dtype="float16", why="off cuDNN's path: GRU")
    yield Case("lstm", **near, dtype="float16", lengths=True, why="off cuDNN's path: packed")
    yield Case("lstm", 512, 1, 512, 512, mode=INFERENCE, bidirectional=True, why="one sentence")
    yield Case("lstm", 400, 32, 512, 512, layers=3, bidirectional=True, dtype="bfloat16", why="speech encoder")
    for mode in (INFERENCE, TRAINING):
        yield Case("lstm", 512, 16, 64, 64, layers=3, mode=mode, dtype="bfloat16", why="layers at the same time")
    for H in (64, 128, 256, 512, 1024):
        for cell in ("lstm", "gru"):
            yield Case(cell, 512, 32, H, H, why="H, float32")


def grid() -> list[Case]:
    """For a device, the most telling first."""
    public_ones = list(public())
    first = [c for c in public_ones if c.why.startswith("cuDNN")]
    first += [c for c in public_ones if c.why.startswith(("FlashRNN", "off"))]
    return [*LACKING[:2], *first, *[c for c in public_ones if c not in first], *LACKING[2:], *TASKS]

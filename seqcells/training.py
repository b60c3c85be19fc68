"""The one training loop the tasks, the examples and the command line share: epochs over a fixed set, Adam.

Resumable: a checkpoint holds everything that decides what comes next, so that a run that was stopped and resumed ends
with the same numbers, bit for bit, as one that was not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """inputs [N, T, I], targets [N, ...]."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: str, dtype: torch.dtype) -> Data:
        return Data(self.inputs.to(device, dtype), self.targets.to(device, dtype))


@dataclass(frozen=True)
class Row:
    """One epoch: sequences seen so far, mean training loss, loss and accuracy on the test set, seconds it took."""

    epoch: int
    sequences: int
    train_loss: float
    test_loss: float
    accuracy: float
    seconds: float


@dataclass
class Run:
    """A model in training. identity: what a checkpoint must agree with to be resumed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # orders the training set
    identity: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write a checkpoint, at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "rows": [asdict(r) for r in self.rows],
        }
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. ValueError if it is of another run."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity:
            raise ValueError(f"{path} was written by another run: {state['identity']}, this one is {self.identity}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        self.rows = [Row(**r) for r in state["rows"]]


def evaluate(
    model: nn.Module, data: Data, loss: Callable[[Tensor, Tensor], Tensor], right: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Mean loss and the share of right answers on data."""
    model.eval()
    with torch.no_grad():
        answers = model(data.inputs)
        result = loss(answers, data.targets).item(), right(answers, data.targets).double().mean().item()
    model.train()
    return result


def train(
    run: Run,
    training: Data,
    test: Data,
    *,
    epochs: int,
    batch: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    right: Callable[[Tensor, Tensor], Tensor],
    on_step: Callable[[int, float], None] = lambda done, loss: None,
    on_epoch: Callable[[Row], None] = lambda row: None,
    checkpoint: Path | None = None,
) -> list[Row]:
    """Train to the given number of epochs in all, from wherever run stands. Returns run's rows.

    on_step(steps done in this epoch, its loss) is called about twenty times an epoch; on_epoch after each test.
    """
    count = training.inputs.shape[0]
    steps = -(-count // batch)
    for epoch in range(len(run.rows) + 1, epochs + 1):
        started = time.perf_counter()
        order = torch.randperm(count, generator=run.generator).to(training.inputs.device)
        total = torch.zeros((), dtype=torch.float64, device=training.inputs.device)
        for step, chosen in enumerate(order.split(batch), 1):
            run.optimizer.zero_grad(set_to_none=True)
            value = loss(run.model(training.inputs[chosen]), training.targets[chosen])
            value.backward()
            run.optimizer.step()
            total += value.detach() * len(chosen)  # read only once an epoch: a read waits for the device
            if step % max(1, steps // 20) == 0 or step == steps:
                on_step(step, value.item())
        test_loss, accuracy = evaluate(run.model, test, loss, right)
        seconds = time.perf_counter() - started
        row = Row(epoch, epoch * count, total.item() / count, test_loss, accuracy, seconds)
        run.rows.append(row)
        if checkpoint is not None:
            run.save(checkpoint)
        on_epoch(row)
    return run.rows

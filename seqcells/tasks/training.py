"""The training loop of the tasks and the command line, and its checkpoints.

A checkpoint contains everything that determines how a run continues: a run that was stopped, by Ctrl-C or by a kill,
and resumed ends with the same numbers, bit for bit, as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import io
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files

# A checkpoint is this line, the SHA-256 digest of the rest, and the rest: Run.state_dict() as torch.save writes it.
# The number changes with the contents.
HEADER = b"seqcells checkpoint 1\n"


@dataclass(frozen=True)
class Row:
    """One evaluation. train_loss: the mean since the last one. measured: what the run's `measure` returned."""

    step: int
    sequences: int
    train_loss: float
    measured: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """Whether a run solved its task, and the criterion with what was reached.

    needs: the measurements that decide it, by name, and the value each must reach, where a plot draws a line: an
    accuracy of at least that (0: of exactly 0), a loss below it.
    """

    solved: bool
    text: str
    needs: dict[str, float]


def stream(task: str, purpose: str, seed: int) -> torch.Generator:
    """A separate generator for each purpose ("training", "test", ...) and seed of a task."""
    return torch.Generator().manual_seed(zlib.crc32(f"{task} {purpose} {seed}".encode()))


@dataclass(kw_only=True, eq=False, repr=False)
class Run:
    """A model in training. A task's subclass defines a step, what is measured, and what counts as solved.

    generator: the training data is drawn from it, on the CPU. identity: what a checkpoint must agree with to be
    resumed. steps: the most there may be. every: steps between evaluations. Checkpoints are written only there, so a
    subclass that goes through a fixed set should evaluate where it starts again.
    """

    unit = "step"
    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    identity: dict[str, str | int]
    steps: int
    every: int
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    done: int = field(default=0, init=False)
    sequences: int = field(default=0, init=False)
    stopped: bool = field(default=False, init=False)
    rows: list[Row] = field(default_factory=list, init=False)

    def step(self) -> tuple[Tensor, int]:
        """Train on a batch. Returns its loss, detached and not read by the host, and its number of sequences."""
        raise NotImplementedError

    def measure(self) -> dict[str, float]:
        """Evaluate on data that training does not see. Returns "loss", "accuracy" and more."""
        raise NotImplementedError

    def stop(self) -> bool:
        """Whether to stop before `steps`, by what training has measured."""
        return False

    def extra(self) -> dict[str, object]:
        """Further state that decides how training continues: tensors, numbers, lists of them."""
        return {}

    def restore(self, extra: dict[str, Any]) -> None:  # each value has its own type
        """Restore what `extra` returned."""

    def verdict(self) -> Verdict:
        """Judge the model as it is now."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """What the model has learned, on a few examples."""
        return []

    def update(self, loss: Tensor, clip: float | None = None) -> Tensor:
        """One step of the optimizer down loss's gradient, of norm at most clip. Returns loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, object]:
        """Everything that determines how the run continues. Tensors are not copied."""
        return {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "done": self.done,
            "sequences": self.sequences,
            "stopped": self.stopped,
            "rows": [asdict(r) for r in self.rows],
            "extra": self.extra(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:  # each value has its own type
        """Restore what `state_dict` returned. If this fails, the run is left half restored; `load` undoes that."""
        rows = [Row(**r) for r in state["rows"]]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        self.restore(state["extra"])
        self.done, self.sequences, self.stopped = state["done"], state["sequences"], state["stopped"]
        self.rows = rows

    def save(self, path: Path) -> None:
        """Write a checkpoint, or raise OSError and leave an existing one unchanged."""
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        payload = buffer.getvalue()
        files.write(path, HEADER + hashlib.sha256(payload).digest() + payload)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. Raises as `read_checkpoint`; the run is then as it was before."""
        state = read_checkpoint(path, self.identity)
        before = copy.deepcopy(self.state_dict())
        try:
            self.load_state_dict(state)
        except Exception as error:
            self.load_state_dict(before)
            raise ValueError(_refused(path, "does not fit this run", error)) from error


def read_checkpoint(path: Path, identity: dict[str, str | int]) -> dict[str, Any]:  # as torch.load gives it
    """The state in a checkpoint of the run with that identity.

    FileNotFoundError if there is no such file, OSError if it cannot be read, ValueError if it is not a complete
    checkpoint of that run.
    """
    content = files.read(path)
    if not content:
        raise ValueError(_refused(path, "is empty"))
    if content[: len(HEADER)] != HEADER[: len(content)]:
        raise ValueError(_refused(path, "is not a checkpoint of this version of seqcells"))
    at = len(HEADER) + hashlib.sha256().digest_size
    if content[len(HEADER) : at] != hashlib.sha256(content[at:]).digest():
        raise ValueError(_refused(path, "is damaged: it was cut short or changed, its checksum is wrong"))
    try:
        state = torch.load(io.BytesIO(content[at:]), map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:
        raise ValueError(_refused(path, "holds no state of a run", error)) from error
    if found != identity:
        raise ValueError(_refused(path, f"was written by another run: {found}, this one is {identity}"))
    return state


def _refused(path: Path, reason: str, error: Exception | None = None) -> str:
    """One line: why a checkpoint is refused, and what to do."""
    detail = "" if error is None else f" ({type(error).__name__}: {' '.join(str(error).split())})"
    return f"{path} {reason}{detail}; remove it, or choose another folder, to start anew"


def train(
    run: Run,
    *,
    on_step: Callable[[int, float], None] = lambda done, loss: None,
    on_row: Callable[[Row], None] = lambda row: None,
    checkpoint: Path | None = None,
) -> list[Row]:
    """Train from where the run is to its last step, or until it stops itself. Returns its rows.

    on_step(steps done, the last loss) is called about twenty times between evaluations; on_row after each evaluation.
    """
    started, total, weight = time.perf_counter(), torch.zeros((), dtype=torch.float64), 0
    while run.done < run.steps and not run.stopped:
        value, sequences = run.step()
        if run.schedule is not None:
            run.schedule.step()
        run.done += 1
        run.sequences += sequences
        # Stays on its device and is read once per evaluation, because reading waits for the device.
        total = total.to(value.device) + value * sequences
        weight += sequences
        if run.done % max(1, run.every // 20) == 0:
            on_step(run.done, value.item())
        run.stopped = run.stop()
        if run.done % run.every and run.done < run.steps and not run.stopped:
            continue
        run.model.eval()
        with torch.no_grad():
            measured = run.measure()
        run.model.train()
        now = time.perf_counter()
        row = Row(run.done, run.sequences, total.item() / weight, measured, now - started)
        run.rows.append(row)
        started, total, weight = now, torch.zeros((), dtype=torch.float64), 0
        if checkpoint is not None:
            run.save(checkpoint)
        on_row(row)
    return run.rows

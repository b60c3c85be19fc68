"""What was measured on this machine, by which "auto" chooses: `best` is asked in each call, `tuning` measures.

A class of calls holds for many: it knows the batch size up to the next power of two, and on CUDA not the number of
steps, so that another length never needs another measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from . import backends, precisions, verdicts
from .verdicts import MEASUREMENTS
from .verification import source_of

if TYPE_CHECKING:
    from .dispatch import Case

Record = dict[str, float]  # by each backend, its median milliseconds
Answer = tuple[str, str, str]  # an engine, a schedule and a reason
ON_CPU: dict[str, Record] = {}  # by class. While it is empty, calls on the CPU look no further.
_known: dict[torch.device, dict[str, Record]] = {torch.device("cpu"): ON_CPU}
_answers: dict[tuple[torch.device, str], Answer] = {}  # of `best`, by device and class
_here, _recorders = threading.local(), list[object]()
LONGEST = 1 << 10  # steps on the CPU; more make no difference


def load() -> None:
    """Read what was measured on this CPU. Done at import, so that no call looks for a file."""
    with suppress(OSError):
        directory = verdicts.folder()
        if directory is not None and any(directory.glob(f"{MEASUREMENTS.name}-*")):
            cpu = torch.device("cpu")
            ON_CPU.update(verdicts.read(verdicts.path(cpu, MEASUREMENTS), MEASUREMENTS))


def of(device: torch.device) -> dict[str, Record]:
    """What is known about a device, by class. Of a GPU the file is read when this is first asked."""
    if device not in _known:
        _known[device] = verdicts.read(verdicts.path(device, MEASUREMENTS), MEASUREMENTS)
    return _known[device]


def add(device: torch.device, name: str, record: Record) -> None:
    """Keep what was measured of a class, in this process and on disk."""
    of(device)[name] = record
    _answers.clear()
    verdicts.add(verdicts.path(device, MEASUREMENTS), {name: record}, MEASUREMENTS)


def forget() -> None:
    """Forget what this process knows."""
    for known in (ON_CPU, _known, _answers):
        known.clear()
    _known[torch.device("cpu")] = ON_CPU


@contextmanager
def recording() -> Iterator[list[Case]]:
    """A list, to which this thread's calls of `best` add their cases; they measure nothing."""
    before, found = getattr(_here, "seen", None), list["Case"]()
    _recorders.append(found)
    _here.seen, ON_CPU[""] = found, {}  # not empty, so that calls on the CPU ask
    try:
        yield found
    finally:
        _here.seen = before
        _recorders.pop()
        if not _recorders:
            ON_CPU.pop("", None)


def recorded() -> bool:
    """Whether `recording` is active in this thread."""
    return getattr(_here, "seen", None) is not None


def best(case: Case, kernels: bool) -> Answer | None:
    """The engine, the schedule and the reason, if a case's class was measured; else None.

    kernels: the kernels run there. There, `torch.backends.cudnn.benchmark` has a new class measured.
    """
    seen = getattr(_here, "seen", None)
    if case.transforming or case.jit or case.exporting or case.onnx or case.empty or not case.plain:
        return None
    if seen is not None:
        seen.append(case)
    known = of(case.device)
    wanted = kernels and seen is None and torch.backends.cudnn.benchmark
    if not (known or wanted) or torch.are_deterministic_algorithms_enabled():
        return None
    name = class_of(case, kernels)
    if (answer := _answers.get((case.device, name))) is not None:
        return answer
    record = known.get(name)
    if not record and wanted:
        from . import tuning  # which imports what imports this

        record = tuning.at_first_call(case)
    if not record:
        return None
    medians = sorted(record.items(), key=lambda of: of[1])
    engine, _, schedule = medians[0][0].partition(":")
    if engine not in (("triton", "aten") if kernels else ("aten", "loop")):  # a file that somebody edited
        return None
    if engine == "triton":
        schedule = f"auto:{schedule}" if schedule else "auto"
    why = f"measured here: {', '.join(f'{backend} {ms:.3g} ms' for backend, ms in medians)} ({_batches(case.batch)})"
    return _answers.setdefault((case.device, name), (engine, schedule, why))


def power(n: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


def _batches(batch: int | None) -> str:
    most = power(batch or 1)
    return f"batches of {most // 2 + 1} to {most}" if most > 2 else f"batches of {most}"


def class_of(case: Case, kernels: bool) -> str:
    """The class of a case, in words."""
    steps, threads, precision = 0 if case.steps != 1 else 1, 0, ""
    if not kernels:
        steps, threads = min(power(case.steps or LONGEST), LONGEST), torch.get_num_threads()
    elif case.dtype == torch.float32:
        by_name = "" if case.precision is None else " by name"
        precision = f" ({precisions.of_products(case.precision, case.dtype, case.device)}{by_name})"
    size = (case.hidden_size, power(case.batch or 1), case.groups, case.layers, case.projected, steps, threads)
    asked = (case.heads, case.one_step, case.resets, case.lengths, case.all_states, kernels and case.dropping)
    return _words(case.cell, case.dtype, precision, size, asked, case.save if case.grad else "", kernels)


@lru_cache(maxsize=1 << 12)
def _words(
    cell: str,
    dtype: torch.dtype,
    precision: str,
    size: tuple[int, ...],
    asked: tuple[bool, ...],
    save: str,
    kernels: bool,
) -> str:
    """See `class_of`."""
    H, batch, groups, layers, projection, steps, threads = size
    parts = [cell, str(dtype).removeprefix("torch.") + precision, f"hidden size {H}", _batches(batch)]
    parts += [f"{n} {name}" for name, n in (("groups", groups), ("layers", layers)) if n > 1]
    parts += [f"projection {projection}"] * (projection > 0)
    names = ("heads", "a cell's step", "resets", "lengths", "all states", "dropout between layers")
    parts += [name for name, there in zip(names, asked, strict=True) if there]
    parts.append(f"training, saving {save}" if save else "inference")
    if steps == 1 and not asked[1]:
        parts.append("one step")
    elif steps > 1:
        parts.append(f"up to {steps} steps" if steps < LONGEST else f"more than {LONGEST // 2} steps")
    if threads:
        parts.append(f"{threads} threads" if threads > 1 else "1 thread")
    if kernels and cell not in backends.ATEN_CELLS:
        parts.append(source_of(cell)[:16])  # a cell of that name may be another tomorrow
    return ", ".join(parts)

"""What runs if a kernel does not compile or launch or is wrong, and the user did not ask for the kernels by name.

Under "auto", another schedule runs. If none is left, the same computation runs in torch operations (the loop engine).
From the next call on, `dispatch` then chooses torch's own layer or the loop. A RuntimeWarning says once what failed and
what runs instead: what failed is not tried again in this process. backend="triton" raises the error instead, but for a
wrong result, which it does not look for. Not caught: out-of-memory errors, and errors after which the CUDA context is
lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Kernel(NamedTuple):
    """The kernels that fail together, for any batch. direction: forward, backward, recompute or step (of a cell)."""

    cell: str
    direction: str
    dtype: torch.dtype
    hidden_size: int
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.cell} {self.direction} ({dtype}, hidden size {self.hidden_size}, on {self.device})"


class Failed(Exception):
    """A kernel did not compile or launch; __cause__ is the error."""


class Wrong(Failed, RuntimeError):
    """A kernel's results are wrong (see `verification`)."""

    def __init__(self, worst: float, tensor: str) -> None:
        how = f"{worst:.1f} times as far from the float64 reference as is allowed" if worst < 1e300 else "not finite"
        super().__init__(f"its {tensor} is {how}: please report this, with what `python -m seqcells info` prints")


# Parts of messages. The caller must handle lack of memory. After the other errors nothing runs on the device.
_NOT_CAUGHT = (
    "out of memory",
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable",
)
_failed: set[tuple[Kernel, str]] = set()  # and schedule
refused_kernels: set[Kernel] = set()  # those of which all schedules failed


def guarded(call: Callable[[], None]) -> None:
    """Run call(), which compiles and launches a kernel. Raises Failed for an error for which there is a fallback."""
    try:
        call()
    except Exception as error:
        message = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or any(part in message for part in _NOT_CAUGHT):
            raise
        raise Failed from error


def first_that_runs(
    kernel: Kernel, attempts: Iterable[tuple[str, Callable[[], T]]], otherwise: Callable[[], T] | None
) -> T:
    """The result of the first attempt that does not raise Failed (or ValueError, if nothing fits); else otherwise().

    attempts: (schedule, function), the best first. Those that failed before are skipped. If otherwise is None, the
    error of the last one is raised.
    """
    errors: list[tuple[str, BaseException]] = []
    if otherwise is not None and kernel._replace(direction="forward") in refused_kernels:
        return otherwise()  # as forward did, with a warning; the next call chooses another engine
    for schedule, attempt in attempts:
        if (kernel, schedule) in _failed:
            continue
        try:
            result = attempt()
        except (Failed, ValueError) as error:
            errors.append((schedule, error.__cause__ or error))
            _failed.add((kernel, schedule))
            continue
        _warn(kernel, errors, f"the {schedule} kernel")
        return result
    if otherwise is None:
        raise errors[-1][1] if errors else RuntimeError(f"the kernels for {kernel} failed before in this process")
    refused_kernels.add(kernel)
    result = otherwise()
    _warn(kernel, errors, "a loop of torch operations, and from the next call on torch's own layer where it has one,")
    return result


def _warn(kernel: Kernel, errors: list[tuple[str, BaseException]], instead: str) -> None:
    if not errors:
        return
    said = "; ".join(f"{schedule}: {type(e).__name__}: {' '.join(str(e).split())[:300]}" for schedule, e in errors)
    wrong = [isinstance(error, Wrong) for _, error in errors]
    by_name = "raises the error" * (not all(wrong)) + " and " * (len(set(wrong)) > 1) + "runs a wrong one" * any(wrong)
    warnings.warn(
        f"seqcells: no kernel for {kernel} by {said}. Instead {instead} runs, in this process from now on. "
        f"backend='triton' {by_name}.",
        RuntimeWarning,
        stacklevel=3,
    )


def failed(kernel: Kernel, schedule: str) -> bool:
    """Whether a schedule was tried and failed."""
    return (kernel, schedule) in _failed


def refused(device: torch.device, cell: str, dtype: torch.dtype, hidden_size: int, grad: bool) -> bool:
    """Whether the kernels of a scan (with grad, also those of its backward) were tried and failed."""
    directions = ("forward", "backward", "recompute") if grad else ("forward",)
    return any(Kernel(cell, d, dtype, hidden_size, device) in refused_kernels for d in directions)

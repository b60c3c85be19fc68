"""Measure what "auto" chooses from: `tune`, and with `torch.backends.cudnn.benchmark = True` the first call of a class.

A call is measured as a whole, all layers and both directions, forward or forward and backward, by a module of its own
with random weights: nothing of the caller's is read or written, no hook fires and no random number is drawn. Each
backend that can run it takes turns with the others; the medians of their times are kept (see `measured`). Kernels are
timed as by name. What then runs by "auto" is verified first, as always, and if it fails, the next runs.
"""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks, dispatch, fallback, measured, precisions, verdicts
from .cell import get
from .cell_modules import RecurrentCell
from .dispatch import Case
from .engines import triton
from .layers import LSTM
from .measured import Record
from .recurrent import Recurrent
from .verification import possible

__all__ = ["Measurement", "Tuned", "clear", "tune"]

_STEPS = 64  # on CUDA, where every step costs the same
_WARM, _LEAST, _MOST, _SECONDS = 3, 7, 40, 0.4  # calls before; rounds; about how long they take together
_lock = threading.Lock()
_given_up: set[tuple[torch.device, str]] = set()  # classes that could not be measured, or have one backend only


@dataclass(frozen=True)
class Measurement:
    """What was measured of a class of calls.

    calls: the class, in words. medians: by each backend, the median time in milliseconds; empty if only one backend can
    run such calls. before: what "auto" used until now; chosen: what it uses from now on.
    """

    calls: str
    medians: dict[str, float]
    before: str
    chosen: str

    def __str__(self) -> str:
        lines = [self.calls]
        for name, ms in sorted(self.medians.items(), key=lambda of: of[1]):
            notes = ["chosen"] * (name == self.chosen) + ["before"] * (name == self.before)
            lines.append(f"  {name:<16} {ms:9.4g} ms  {', '.join(notes)}".rstrip())
        return "\n".join(lines if self.medians else [*lines, f"  {self.chosen:<16} not measured: there is no choice"])


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`: its measurements, one for each class of calls. str() returns them as a table."""

    measurements: tuple[Measurement, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.measurements))


def tune(module: nn.Module, *inputs: Any, **options: Any) -> Tuned:
    """Measure which backend is the fastest for a module's calls, and have "auto" use it from now on.

    The module is called once, in the mode it is in, to see which calls its layers and cells make. Each class of calls
    is then measured, even if it was before, with gradients if the call itself wants them: for inference call this under
    ``torch.no_grad()``. The results are stored in the user's cache directory (``SEQCELLS_CACHE`` names another one), so
    that later processes on this machine use them, too. On the CPU nothing else measures; on CUDA, so does the first
    call of a class while ``torch.backends.cudnn.benchmark`` is ``True``.

    A class is: the cell, dtype, precision, hidden size, layers and directions, what is saved, resets, lengths, and the
    batch size up to the next power of two; on CUDA for any number of steps, on the CPU for that up to the next power of
    two and the number of threads. Calls with dropout inside the recurrence are not measured, nor on the CPU those with
    resets or lengths, whose time depends on their values, and single steps of cells.

    Args:
        module: A layer or cell of seqcells, or any module that has some. Its buffers, the gradients in ``.grad`` and
            the random numbers stay as they are.
        inputs: What the module is called with.
        options: The same, by name.

    Returns:
        A :class:`Tuned`, whose str() is a table of the medians.

    Raises:
        TypeError: if module is not a module.
        ValueError: if no layer or cell of seqcells chose a backend by "auto" in that call.
        RuntimeError: while a CUDA graph is captured, or something is compiled, traced or transformed.

    Example::

        >>> layer, x = seqcells.GRU(8, 16), torch.randn(20, 4, 8)
        >>> tuned = seqcells.tune(layer, x)
        >>> sorted(tuned.measurements[0].medians)
        ['aten', 'loop']
        >>> seqcells.tuning.clear()
    """
    if not isinstance(module, nn.Module):
        raise checks.wrong("module", "a torch.nn.Module", module)
    devices = {t.device for t in (*module.parameters(), *module.buffers())}
    if not all(map(possible, devices or {torch.device("cpu")})):
        raise RuntimeError("tune cannot measure while a CUDA graph is captured or something is traced or transformed")
    found: dict[tuple[torch.device, str], Case] = {}
    for case in _calls(module, inputs, options, devices):
        found.setdefault((case.device, measured.class_of(case, _on_kernels(case))), case)
    if not found:
        raise ValueError(
            f"module: in this call, no layer or cell of seqcells in {type(module).__name__} chose a backend by 'auto'; "
            "expected one whose backend is not set, and a module that is not compiled"
        )
    return Tuned(tuple(_measurement(name, case) for (_, name), case in found.items()))


def clear() -> None:
    """Forget everything that was measured on this machine, in this process and on disk: "auto" follows its model again.

    Raises:
        OSError: if a file cannot be removed.

    Example::

        >>> seqcells.tuning.clear()
    """
    measured.forget()
    _given_up.clear()
    gpus = torch.cuda.device_count() if backends.installed() else 0
    for device in (torch.device("cpu"), *(torch.device("cuda", n) for n in range(gpus))):
        verdicts.remove(device, verdicts.MEASUREMENTS)


def at_first_call(case: Case) -> Record | None:
    """What is measured of a class when `torch.backends.cudnn.benchmark` asks for it; None if it cannot be."""
    at = case.device, measured.class_of(case, _on_kernels(case))
    if at in _given_up or not possible(case.device):
        return None
    with _lock:
        if (known := measured.of(case.device).get(at[1])) or at in _given_up:  # another thread was quicker
            return known
        try:
            return _kept(case, *at)
        except Exception as error:
            _given_up.add(at)
            said = f"{type(error).__name__}: {str(error)[:300]}"
            warnings.warn(f"seqcells: {at[1]} could not be measured: {said}", RuntimeWarning, stacklevel=4)
            return None


def _on_kernels(case: Case) -> bool:
    return case.device.type in dispatch.KERNEL_DEVICES


def _calls(module: nn.Module, inputs: Any, options: Any, devices: set[torch.device]) -> list[Case]:
    """The cases of the calls that a module's layers and cells make."""
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    gpus = [d for d in devices if d.type == "cuda"]
    with measured.recording() as seen, torch.random.fork_rng(gpus):
        if buffers:
            torch.func.functional_call(module, buffers, inputs, options)
        else:
            module(*inputs, **options)
    return seen


def _measurement(name: str, case: Case) -> Measurement:
    before = _chosen(case)
    with _lock:
        record = _kept(case, case.device, name) or {}
    return Measurement(name, record, before, _chosen(case))


def _chosen(case: Case) -> str:
    """What "auto" uses, as a backend is spelled."""
    with measured.recording():
        choice = dispatch.choose(case)
    return ":".join(part for part in (choice.engine, choice.schedule.removeprefix("auto").strip(":")) if part)


def _kept(case: Case, device: torch.device, name: str) -> Record | None:
    """Measure a case, and keep the result. None if there is none, for lack of memory or of a choice."""
    try:
        record = _measured(case, candidates(case))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error).lower():
            raise
        record = {}
    if len(record) < 2:
        _given_up.add((device, name))
        return None
    measured.add(device, name, record)
    return record


def candidates(case: Case) -> list[str]:
    """The backends that may be the fastest for a case: those that give what it asks for, at a cost that does not depend
    on the values of resets and lengths."""
    if case.problem or get(case.cell).drawn or (case.groups > 2 and not case.heads):
        return []
    own = not (case.resets or case.lengths or dispatch.aten_lacks(case))
    if not _on_kernels(case):  # of one step by a cell, torch's own costs no more than its call
        return ["aten", "loop"] if own and not case.one_step else []
    # torch's own would ignore the first two, and draw the dropout between layers from other random numbers.
    asked = (case.precision and case.dtype == torch.float32) or (case.grad and case.save == "states") or case.dropping
    return [*_schedules(case), *["aten"] * (own and not asked)]


def _schedules(case: Case) -> Iterator[str]:
    """The kernels as the plan chooses them, and by each other schedule that fits forward and, if wanted, backward."""
    precision = precisions.of_products(case.precision, case.dtype, case.device)
    size, like = (case.groups, case.hidden_size), (case.dtype, case.device)
    plans = partial(triton.plan_for, case.cell, case.batch or 1, size, like, precision=precision)
    directions = (False, True)[: 1 + case.grad]
    try:
        own = {plans(schedule="", backward=back).schedule for back in directions}
    except ValueError:  # none fits
        return
    yield "triton"
    for schedule in () if case.one_step else backends.SCHEDULES:
        try:
            for back in directions:
                plans(schedule=schedule, backward=back)
        except ValueError:
            continue
        if own != {schedule} and schedule not in triton.doubtful(case.dtype, case.device):
            yield f"triton:{schedule}"


def _measured(case: Case, names: list[str]) -> Record:
    """The median milliseconds by each backend that runs."""
    if len(names) < 2:
        return {}
    with ThreadPoolExecutor(1) as apart:  # without the caller's modes
        return apart.submit(_medians, case, names).result()


def _medians(case: Case, names: list[str]) -> Record:
    device, taken = case.device, dict[str, list[float]]()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as torch's own of weights that are not in one piece
        call, start = _like(case), 0.0
        for name in names:
            try:
                for _ in range(_WARM):
                    start = time.perf_counter()
                    fallback.guarded(partial(call, name))
                    _wait(device)
            except fallback.Failed:
                continue
            taken[name] = [time.perf_counter() - start]
        together = sum(first for (first,) in taken.values())
        for _ in range(min(_MOST, max(_LEAST, int(_SECONDS / (together or 1))))):
            for name, times in taken.items():
                times.append(_milliseconds(call, name, device))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _milliseconds(call: Callable[[str], None], name: str, device: torch.device) -> float:
    """The time of one call by a backend."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call(name)
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call(name)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def _like(case: Case) -> Callable[[str], None]:
    """A function that runs a call like a case's once, by the backend of that name."""
    cell, B, H, T = get(case.cell), case.batch or 1, case.hidden_size, case.steps or measured.LONGEST
    T = min(T, measured.LONGEST) if not _on_kernels(case) else 1 if T == 1 else _STEPS
    heads, both = (case.groups, False) if case.heads else (1, case.groups == 2)
    how: dict[str, Any] = {}
    module: RecurrentCell | Recurrent
    own: dict[str, Any] = {"device": "meta", "dtype": case.dtype, "precision": case.precision}
    several = own | {"num_layers": case.layers, "bidirectional": both, "save": case.save}
    if case.one_step:
        module = RecurrentCell(cell, case.width, H, **own)
    elif case.projected:
        module, how = LSTM(case.width, H, proj_size=case.projected, **several), {"return_cell_states": case.all_states}
    else:
        module, how = Recurrent(cell, case.width, H * heads, heads=heads, **several), {"return_states": case.all_states}
    module.to_empty(device=case.device)
    random = torch.Generator(case.device).manual_seed(0)  # not torch's own, whose numbers are the caller's
    new = partial(torch.empty, device=case.device, dtype=case.dtype)
    parameters = list(module.parameters())
    with torch.no_grad():
        for p in parameters:
            p.uniform_(-(H**-0.5), H**-0.5, generator=random)
    shape = (B,) if case.one_step else (T, B)
    x = new(*shape, case.width).uniform_(-1, 1, generator=random)
    how |= {name: new(*shape, H * heads).uniform_(generator=random) for name in cell.inputs}
    if case.resets:
        how["resets"] = torch.zeros(shape, dtype=torch.bool, device=case.device)
    if case.lengths:
        how["lengths"] = torch.full((B,), T, device=case.device)

    def call(backend: str) -> None:
        module.backend = backend
        with torch.set_grad_enabled(case.grad):
            y = module(x, **how)
            while not isinstance(y, Tensor):
                y = y[0]
            if case.grad:
                torch.autograd.grad(y, parameters, torch.ones_like(y), allow_unused=True)

    return call

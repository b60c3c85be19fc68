"""How it is timed, on the CPU by the wall clock, on CUDA by events; and what is saved for backward."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from cases import GATES, INFERENCE, STEP, TRAINING, Problem, Work

SHORTEST = 2e-3  # seconds of a sample: below it a clock's own cost shows


def sample(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one run, the mean of `times` of them in a row. On CUDA the device's time, by events.

    One run before is not timed: what another provider left in the caches and in the allocator is not this one's cost.
    """
    run()
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - started) / times
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def repeats(run: Callable[[], object], device: torch.device) -> int:
    """How often to run for one sample. Warms up."""
    for _ in range(2):  # the first may compile
        once = sample(run, device, 1)
    return max(1, round(SHORTEST / max(once, 1e-7)))


def interleaved(runs: dict[str, Callable[[], object]], device: torch.device, seconds: float, least: int = 5) -> dict:
    """Samples of each, in turn, so that what disturbs the machine disturbs all: {name: [seconds of one run]}.

    seconds: about how long it may take in all, 0: just once around; `least` rounds are made in any case.
    """
    times = {name: repeats(run, device) if seconds else 1 for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    least = least if seconds else 2  # quartiles want two
    while len(next(iter(found.values()))) < least or time.perf_counter() < deadline:
        for name, run in runs.items():
            found[name].append(sample(run, device, times[name]))
        if len(next(iter(found.values()))) >= 100:
            break
    return found


def saved_bytes(problem: Problem, work: Work) -> int:
    """Memory that autograd saves for backward beyond the input, the weights and the output, in bytes."""
    if problem.case.mode == INFERENCE:
        return 0
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = work.run()
    known = {t.untyped_storage().data_ptr() for t in (y, problem.x, *work.leaves)}
    return sum(size for pointer, size in saved.items() if pointer not in known)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that one run takes on a CUDA device beyond what was there; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def products(problem: Problem, rows: int = 512) -> Callable[[], object] | None:
    """Only the matrix products of a case, on the CPU, one call each: a lower bound for code that makes such calls.

    One product per step for the recurrence, forward and, in training, backward; those of the input and of the weights'
    gradients in pieces of `rows` rows. (oneDNN makes no such calls, and at the smallest sizes takes less time.) None
    for more than one layer, direction or head.
    """
    case = problem.case
    several = case.layers > 1 or case.bidirectional or case.heads > 1 or not case.projected or case.mode == STEP
    if several or case.T == 1 or problem.device.type != "cpu":
        return None
    active = [case.B] * case.T
    if problem.lengths is not None:
        active = (torch.arange(case.T)[:, None] < problem.lengths).sum(1).tolist()
    pieces = [min(rows, sum(active) - first) for first in range(0, sum(active), rows)]
    width = GATES[case.cell] * case.H
    most = max(case.B, rows)
    x, h, gates = (torch.randn(most, n, dtype=problem.dtype) for n in (case.I, case.H, width))
    w, u, du, dw = (torch.zeros(width, n, dtype=problem.dtype) for n in (case.I, case.H, case.H, case.I))
    forth, into = u.t().contiguous(), w.t().contiguous()

    def run() -> None:
        with torch.inference_mode():
            for n in pieces:
                torch.mm(x[:n], into, out=gates[:n])
            for n in active:
                torch.mm(h[:n], forth, out=gates[:n])
            if case.mode != TRAINING:
                return
            for n in active:
                torch.mm(gates[:n], u, out=h[:n])
            for n in pieces:
                dw.addmm_(gates[:n].t(), x[:n])
                du.addmm_(gates[:n].t(), h[:n])

    return run

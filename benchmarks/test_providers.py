"""The cases of cases.py by the providers of providers.py, under pytest-benchmark, side by side in groups.

    python -m pytest benchmarks --benchmark-only [-m quick] [-k "lstm and training"]
    python -m pytest benchmarks --benchmark-only --benchmark-autosave     # and later --benchmark-compare

On the CPU by the wall clock with one thread; on CUDA by events on the device. Nothing is timed that does not agree with
the judge. pytest-benchmark runs one provider after another. For ratios that are robust to other load on the machine,
use compare.py, which interleaves them.
"""

import functools
import time

import cases
import compare
import measure
import pytest
import torch
from providers import PROVIDERS, judge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = cases.grid() if DEVICE == "cuda" else [*cases.LACKING, *cases.PLAIN, *cases.TASKS]
# One of each kind, small enough for CI.
QUICK = {c.name for c in cases.TASKS if c.T * c.B <= 1000 and "case 7" not in c.why}
QUICK |= {c.name for c in cases.LACKING if c.H == 64}
SLOW_TO_START = ("compiled loop", "graphed loop")


class Events:
    """The device's own clock: the time at which all work so far was done, in seconds."""

    def __init__(self):
        self.start = torch.cuda.Event(enable_timing=True)
        self.start.record()

    def __call__(self):
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self.start.elapsed_time(now) / 1e3


@functools.cache
def posed(case):
    """The problem and the judge's answer to it."""
    problem = cases.Problem(case, DEVICE)
    return problem, cases.answer(problem, judge(problem))


def chosen():
    for case in CASES:
        for provider in PROVIDERS:
            quick = case.name in QUICK and provider not in SLOW_TO_START
            marks = [pytest.mark.quick] * quick
            yield pytest.param(case, provider, marks=marks, id=f"{case.name}-{provider}".replace(" ", "-"))


@pytest.mark.parametrize(("case", "provider"), list(chosen()))
def test_case(benchmark, case, provider):
    torch.set_num_threads(1)
    problem, judged = posed(case)
    try:
        work = PROVIDERS[provider](problem)
    except cases.Unavailable as reason:
        pytest.skip(str(reason))
    error = cases.parity(cases.answer(problem, work), judged, cases.tolerance(case, problem.device))
    run = cases.repeated(problem, work)
    times = measure.repeats(run, problem.device)
    plan, floor = compare.planned(problem)
    benchmark.group = f"{case.name} ({case.why})"
    benchmark.extra_info |= compare.machine(DEVICE) | {"provider": provider, "error": error, "plan": plan}
    benchmark.extra_info |= {"floor_us_a_step": floor, "saved_bytes": measure.saved_bytes(problem, work)}
    benchmark.extra_info["peak_bytes"] = measure.peak_bytes(run, problem.device)
    benchmark._timer = Events() if DEVICE == "cuda" else time.perf_counter
    benchmark.pedantic(run, rounds=10, iterations=times, warmup_rounds=1)
    if benchmark.stats is not None:  # there is none with --benchmark-disable
        benchmark.extra_info["us_a_step"] = benchmark.stats.stats.median * 1e6 / case.T

"""Measured limits of a device: the rates and latencies that the plan's model of a step uses."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import latencies
import torch
import triton
import triton.language as tl
from measure import interleaved

from seqcells.kernels.exchange import arrive, wait


@triton.jit
def barriers(counter_ptr, steps, PROGRAMS: tl.constexpr, PTX: tl.constexpr):
    """Nothing but the grid schedule's barrier, once a step."""
    for step in range(steps):
        arrive(counter_ptr)
        wait(counter_ptr, (step + 1) * PROGRAMS, PTX)


@triton.jit
def chase(next_ptr, out_ptr, steps):
    """One load after another, each from the address that the previous one returned."""
    at = tl.load(next_ptr)
    for _ in range(steps):
        at = tl.load(next_ptr + at, cache_modifier=".cg")
    tl.store(out_ptr, at)


def ceilings(device: str, dry: bool = False) -> dict[str, Any]:
    """Copying (read and write), bf16 products, a barrier of all programs and a trip to L2, with their units."""
    place = torch.device(device)
    size, side = (2**12, 64) if dry else (2**28, 8192)
    source = torch.empty(size, device=place)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=place, dtype=torch.bfloat16) for _ in "ab")
    steps = 4 if dry else 10_000
    most = 1 if dry or place.type != "cuda" else torch.cuda.get_device_properties(place).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device=place)
    options = {"launch_cooperative_grid": True, "num_warps": 4} if place.type == "cuda" else {}
    ptx = place.type == "cuda" and not torch.version.hip
    # A circle through 16 MB, each step to another line of the cache.
    count, stride = (64, 16) if dry else (2**22, 4099 * 32)
    places = (torch.arange(count, dtype=torch.int64) + stride) % count
    circle, out = places.to(place, torch.int32), torch.zeros(1, dtype=torch.int32, device=place)

    def barrier(programs: int) -> Callable[[], object]:
        def run() -> None:
            counter.zero_()
            barriers[(programs,)](counter, steps, PROGRAMS=programs, PTX=ptx, **options)

        return run

    counts = sorted({min(n, most) for n in (1, 2, 4, 16, 64, most)})

    runs = {
        "copy": lambda: target.copy_(source),
        "product": lambda: a @ b,
        **{f"barrier {n}": barrier(n) for n in counts},
        "L2": lambda: chase[(1,)](circle, out, steps, num_warps=1),
    }
    found = {name: median(s) for name, s in interleaved(runs, place, 0.0 if dry else 2.0).items()}
    return {
        "copy, GB/s": 2 * 4 * size / found["copy"] / 1e9,
        "bf16 product, TFLOP/s": 2 * side**3 / found["product"] / 1e12,
        **{f"barrier of {n} programs, us": found[f"barrier {n}"] / steps * 1e6 for n in counts},
        "trip to L2, us": found["L2"] / steps * 1e6,
    }


def instructions(device: str, dry: bool = False) -> dict[str, Any]:
    """Latencies of instructions, in cycles."""
    if torch.device(device).type != "cuda":
        return {"left out": "they are of CUDA"}
    return latencies.cycles(torch.device(device), 10 if dry else 2000)


PROBES: dict[str, Callable[[str, bool], dict[str, Any]]] = {"ceilings": ceilings, "instructions": instructions}

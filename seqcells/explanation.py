"""explain(): what a scan of some shape would run on, and why, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import arguments, aten, backends, checks, fallback, precisions, reference
from .kernels.plan import KNOWN


@dataclass(frozen=True)
class Explanation:
    """Which backend a scan would use and, for triton, the Plan forward and the one backward; why, in words."""

    backend: str
    plan: Any
    why: str
    backward: Any = None

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}"


def explain(
    cell: str,
    *,
    batch: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    groups: int = 1,
    steps: int | None = None,
    resets: bool = False,
    lengths: bool = False,
    grad: bool = True,
    backend: str | None = None,
    precision: str | None = None,
) -> Explanation:
    """What a scan of this shape would run on, without running it.

    cell, batch, hidden_size, dtype, resets, backend: of the scan.
    device: a torch device, or one that need not be present: a name of kernels.plan.KNOWN, as "sm_90" or "L4".
    groups: of `scan_groups`. steps: None, many. lengths: of a batch with little padding. grad: in training. precision:
    as in `scan`. Raises as `scan` does.

        >>> seqcells.explain("gru_before", batch=16, hidden_size=64, device="cpu").backend
        'loop'
    """
    reference.get(cell)
    arguments.options(backend, precision)
    for name, size in (("batch", batch), ("hidden_size", hidden_size), ("groups", groups), ("steps", steps)):
        if size is not None or name != "steps":
            checks.integer(name, size, least=1)
    for name, flag in (("resets", resets), ("lengths", lengths), ("grad", grad)):
        checks.boolean(name, flag)
    checks.dtype(dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point dtype, got {dtype}")
    if not isinstance(device, (str, torch.device)):
        raise checks.wrong("device", "a torch.device or its name", device)
    elsewhere = isinstance(device, str) and (device in KNOWN or device.startswith("sm_"))
    place = torch.device("cuda" if elsewhere else device)
    if place.type == "cuda" and place.index is None and torch.cuda.is_available():
        place = torch.device("cuda", torch.cuda.current_device())
    how: Any = {"resets": resets, "lengths": lengths, "onednn": aten.onednn(cell, place, dtype)}
    how["refused"] = not elsewhere and fallback.refused(place, cell, dtype, hidden_size, grad)
    asks = backends.request(cell, (1 << 10 if steps is None else steps, batch, hidden_size), grad, **how)
    chosen = backends.choose(cell, place, dtype, asks, backend)
    if chosen.backend != "triton":
        return Explanation(chosen.backend, None, chosen.why)
    from .kernels import cells, plan, scan

    if elsewhere and device not in KNOWN:
        raise ValueError(f"unknown device {device!r}: expected a torch device or one of {', '.join(KNOWN)}")
    facts = KNOWN[str(device)] if elsewhere else scan.device_facts(place)
    options: Any = {"B": batch, "H": hidden_size, "groups": groups, "itemsize": dtype.itemsize, "device": facts}
    options |= {
        "schedule": chosen.schedule.removeprefix("auto") or None,
        "precision": precisions.of_products(precision, dtype, place),
    }
    there, back = (plan.plan(cells.get(cell), backward=b, **options) for b in (False, True))
    why = f"{chosen.why}; forward, {there.schedule} schedule: {there.why}; backward, {back.schedule}: {back.why}"
    return Explanation("triton", there, why, back)

"""explain(): which backend a scan would use, and why, without running it."""

from __future__ import annotations

import textwrap
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from . import arguments, backends, checks, dispatch, fallback, measured, precisions, stacked
from .cell import Cell, named
from .dispatch import Case, Choice
from .engines import aten
from .kernels.devices import KNOWN, Device, known
from .kernels.plan import Plan

WIDTH = 80  # of a printed line


@dataclass(frozen=True)
class Explanation:
    """Which backend a scan would use, and why; for triton also the Plans of forward and backward, with their reasons.

    choice: the Choice that the call itself would make; case: the facts it is based on. verified: of a device that is
    present, whether the kernels of forward and of backward were verified on it (see `verification`), in words. layers:
    of several layers, whether they take their steps at the same time, in words. str() returns a description in lines of
    at most 80 characters.
    """

    case: Case
    choice: Choice
    plan: Plan | None = None
    backward: Plan | None = None
    verified: tuple[str, str] = ("", "")
    layers: str = ""

    @property
    def backend(self) -> str:
        return self.choice.engine

    @property
    def why(self) -> str:
        return self.choice.why

    def __str__(self) -> str:
        lines = textwrap.wrap(f"{self.backend}: {self.why}", WIDTH)
        plans = (("forward", self.plan), ("backward", self.backward))
        for (direction, plan), verified in zip(plans, self.verified, strict=True):
            if plan is not None:
                headline = f"{direction}: the {plan.schedule} schedule, {plan.microseconds:.2f} us a step"
                lines += ["", headline, *textwrap.wrap(verified, WIDTH), *_described(plan)]
        if self.layers:
            lines += ["", *textwrap.wrap(self.layers, WIDTH)]
        if self.plan is not None:
            lines += ["", "U: the recurrent weights. us: microseconds, by the plan's model; not measured."]
        return "\n".join(lines)


def _described(plan: Plan) -> list[str]:
    """A plan's reasons, one paragraph each, and its figures."""
    lines = []
    for reason in plan.why.split("; "):
        lines += textwrap.wrap(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    figures = {
        "programs": f"{plan.programs}, of {plan.num_warps} warps each",
        "tile": f"{plan.block_h} hidden units x {plan.block_b} rows, {plan.block_k} terms of a product at a time",
        "stages": f"{plan.num_stages}, loading ahead",
        "registers": f"at most {plan.registers} a thread{', U in them' * plan.u_in_registers}",
    }
    return lines + [f"    {name:<9}  {value}" for name, value in figures.items()]


def explain(
    cell: Cell | str,
    *,
    batch: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    groups: int = 1,
    layers: int = 1,
    steps: int | None = None,
    resets: bool = False,
    lengths: bool = False,
    grad: bool = True,
    backend: str | None = None,
    precision: str | None = None,
) -> Explanation:
    """Explain which backend a scan of this shape would use, and why, without running it. Of kernels on a GPU that is
    present it also says whether they were verified there (see `verification`).

    cell: the cell or its name. batch, hidden_size, dtype, backend, precision: those of the scan. resets: whether there
    are resets.
    device: a torch device; or the name or architecture of a GPU, which need not be present, in upper or lower case:
    "H100", "sm_90", "RTX 4090" (all are in kernels.devices.KNOWN).
    groups: the number of groups, see `scan_groups`; of a layer with both directions 2. layers: the number of layers,
    which may take their steps at the same time. steps: the number of steps; None means many. lengths:
    whether there are lengths, with little padding. grad: whether gradients are wanted, as in training.
    Raises the errors of `scan`, and ValueError for an unknown device.

        >>> print(seqcells.explain("gru", batch=16, hidden_size=64, device="cpu"))
        loop: the tensors are on the CPU, and it is faster than torch's own fused gru
    """
    made = named(cell)
    cell = made.key
    arguments.options(backend, precision)
    sizes = {"batch": batch, "hidden_size": hidden_size, "groups": groups, "layers": layers, "steps": steps}
    for name, size in sizes.items():
        if size is not None or name != "steps":
            checks.integer(name, size, least=1)
    for name, flag in (("resets", resets), ("lengths", lengths), ("grad", grad)):
        checks.boolean(name, flag)
    checks.dtype(dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point dtype, got {dtype}")
    if not isinstance(device, (str, torch.device)):
        raise checks.wrong("device", "a torch.device or its name", device)
    elsewhere = known(device) if isinstance(device, str) else None
    place = torch.device("cuda") if elsewhere else _place(device)
    if place.type == "cuda" and place.index is None and torch.cuda.is_available():
        place = torch.device("cuda", torch.cuda.current_device())
    case = Case(
        cell,
        backends.spelled(backend),
        place,
        dtype,
        hidden_size,
        1 << 10 if steps is None else steps,
        batch,
        grad,
        resets=resets and steps != 1,  # for one step, resets just zero the states before it
        lengths=lengths,
        onednn=aten.onednn(cell, place, dtype),
        problem="" if cell in backends.ATEN_CELLS else made.problem,
        plain=place.type == "cpu" or (not elsewhere and torch.cuda.is_available()),  # else nothing was measured there
        refused=not elsewhere and fallback.refused(place, cell, dtype, hidden_size, grad),
        groups=groups,
        layers=layers,
        precision=precision,
    )
    with measured.recording():  # which measures nothing
        choice = dispatch.choose(case)
    if choice.engine != "triton":
        return Explanation(case, choice)
    forward, backward = (_planned(case, choice, (batch, groups), precision, elsewhere, back) for back in (False, True))
    said = ("", "") if elsewhere else _verified(case, forward, backward)
    return Explanation(case, choice, forward, backward, said, _layers(case, choice, (forward, backward), elsewhere))


def _layers(case: Case, choice: Choice, plans: tuple[Plan, Plan], elsewhere: Device | None) -> str:
    """Whether the layers take their steps at the same time; "" if there is one."""
    if case.layers == 1:
        return ""
    from .kernels import cells, scan, stack

    device, why = elsewhere or scan.device_facts(case.device), stacked.unfit(case, choice, case.precision)
    assert case.batch is not None and case.steps is not None
    size = (case.layers, case.batch, case.hidden_size, case.dtype.itemsize)
    forward, backward = (stack.plan_stack(cells.get(case.cell), plan, *size, device) for plan in plans)
    if not why and not stack.steps_pay(case.layers, case.steps):
        why = f"{case.steps} steps are too few"
    if why or isinstance(forward, str):
        return f"layers: one launch each, because {why or forward}"
    together = f"layers: all {case.layers} in one launch, each some steps behind the one below"
    return together if not isinstance(backward, str) else f"{together}; backward one launch each, because {backward}"


def _verified(case: Case, forward: Plan, backward: Plan) -> tuple[str, str]:
    """What is stored of the kernels of two plans, for a device that is present."""
    from .verification import said  # the package's name is a class

    there = case.device.type != "cuda" or torch.cuda.is_available()
    if case.device.type not in dispatch.KERNEL_DEVICES or not there:
        return "", ""
    of, size, by_name = (case.device, case.cell), (case.dtype, case.hidden_size), case.backend != "auto"
    forth, back = ((direction, p.schedule) for direction, p in (("forward", forward), ("backward", backward)))
    return said(*of, *forth, *size, by_name), said(*of, *back, *size, by_name)


def _planned(
    case: Case,
    choice: Choice,
    size: tuple[int, int],
    precision: str | None,
    elsewhere: Device | None,
    backward: bool,
) -> Plan:
    """The plan of forward or backward. Imports triton. size: batch and groups."""
    from .kernels import cells, plan, scan

    planned = partial(
        plan.plan,
        cells.get(case.cell),
        B=size[0],
        H=case.hidden_size,
        itemsize=case.dtype.itemsize,
        device=elsewhere or scan.device_facts(case.device),
        groups=size[1],
        precision=precisions.of_products(precision, case.dtype, case.device),
        backward=backward,
    )
    name, _, first = choice.schedule.partition(":")
    if first:
        with suppress(ValueError):  # it was measured in inference, and backward does not fit
            return planned(schedule=first)
    return planned(schedule=None if name == "auto" else name or None)


def _place(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device.lower() if isinstance(device, str) else device)
    except RuntimeError:
        expected = f"a torch device, as cpu or cuda, or one of {', '.join(KNOWN)}"
        raise ValueError(f"unknown device {device!r}: expected {expected}") from None

"""Layers of a module that run at the same time: their scans are done ahead, in one launch (see kernels.stack).

Each layer is then executed as ever, but its engine takes the results that are ready. So gradients of any order, hooks
and the rest are those of the layers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import autograd, precisions
from .engines import triton
from .products import places

if TYPE_CHECKING:
    from .dispatch import Call, Case, Choice, ScanOptions


def unfit(case: Case, choice: Choice) -> str:
    """Why the layers of a case are launched one by one; "" if they need not be."""
    if choice.engine != "triton" or case.layers < 2:
        return "there is one layer" if case.layers < 2 else f"{choice.engine} runs them"
    if choice.schedule not in ("", "auto"):
        return f"the {choice.schedule} schedule was asked for, or measured to be the fastest"
    if case.traced:
        return "a compiler, a tracer or a transform is active"
    if case.groups > 1:
        return "a layer has several directions or heads"
    if case.projected:
        return "they have projections"
    return "there is dropout between them" if case.dropping else ""


def ahead(
    calls: Sequence[Call], mask: Tensor | None, case: Case, choice: Choice, options: ScanOptions
) -> Sequence[Any]:
    """The results of the layers' scans, for `Call.ready`; each None if they are launched one by one.

    calls: of each layer, without per-step inputs and dropout masks; x is the first layer's.
    """
    nothing = (None,) * len(calls)
    precision = "ieee"
    if case.dtype == torch.float32 and (options.precision or case.device.type == "cuda"):
        precision = precisions.of_products(options.precision, case.dtype, case.device)
    if case.dtype == torch.float32 and precision != precisions.of_inputs(case.dtype, case.device):
        return nothing  # the input's products would be as precise as the recurrent ones
    of = autograd.Options("triton", case.cell, options.save, 0, choice.schedule, precision)
    save = options.save if case.grad else "states" if options.all_states else "none"
    at = places(case.cell)
    layers = [(c.x, *autograd.starts(at, c.states), *c.groups[0], c.params, None, None) for c in calls]
    with torch.no_grad():
        return triton.stack(of, save, layers, mask) or nothing

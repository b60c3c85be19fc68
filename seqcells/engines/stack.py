"""The engine triton for a stack of layers, in one launch each way (see kernels.stack).

Where its kernel does not compile or launch or is wrong, "auto" runs the layers one by one (see `fallback`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import fallback, kernels, products
from ..autograd import Options, Tensors, grouped
from ..kernels.buffers import Gradients
from ..kernels.plan import Plan
from ..products import hidden_size, places, recurrent
from ..verification import CURRENT, insist
from . import triton

T = TypeVar("T")

# Of each layer the 10 inputs, of which x is the first layer's. They have one group, no per-step inputs and no dropout
# masks.
Layers = Sequence[tuple["Tensor | None", ...]]
STACK = "stack"  # what `fallback` and `verification` call it


@lru_cache(maxsize=1 << 12)
def planned(
    cell: str, size: tuple[int, int, int], like: tuple[torch.dtype, torch.device], precision: str, backward: bool
) -> Plan | str:
    """The plan of a stack of layers in one launch (see kernels.stack), or why there is none. size: L, B and H."""
    (L, B, H), (dtype, device) = size, like
    one = triton.plan_for(cell, B, (1, H), like, "", precision, backward)
    declared, facts = kernels.cells.get(cell), kernels.scan.device_facts(device)
    return kernels.stack.plan_stack(declared, one, L, B, H, dtype.itemsize, facts)


def no_stack(
    cell: str, steps: int, size: tuple[int, int, int], like: tuple[torch.dtype, torch.device], precision: str
) -> str:
    """Why layers are launched one by one; "" if they need not be."""
    if fallback.failed(fallback.Kernel(cell, STACK, like[0], size[2], like[1]), STACK):
        return "the kernel of a stack failed"
    if not kernels.stack.steps_pay(size[0], steps):
        return f"{steps} steps are too few"
    found = planned(cell, size, like, precision, False)
    return found if isinstance(found, str) else ""


def _together(layers: Layers, n: int, first: int = 0) -> Tensor | None:
    """The n-th input of the layers from the first on, along a new axis. All have it, or none."""
    each = [t for layer in layers[first:] if (t := layer[n]) is not None]
    return torch.stack(each) if each else None


def _weights(options: Options, layers: Layers, H: int) -> tuple[Tensor, Tensor]:
    """weight_ih of the layers above the first [L-1, G*H, H], and the kernels' u [L, products*H, H]."""
    w, first = _together(layers, 3, 1), layers[0][3]
    assert w is not None and first is not None
    return w, recurrent(places(options.cell), _together(layers, 4), first[None], H)


def _launched(
    options: Options,
    of: tuple[Any, ...],
    rows: int,
    plans: Sequence[Plan | str],
    call: Callable[..., T],
    one_by_one: Callable[[], T],
) -> T:
    """call's result with the last of the plans, or the layers' one by one if it is none, or if its kernel fails.
    plans: forward's, and of backward its own."""
    if any(isinstance(plan, str) for plan in plans):
        return one_by_one()
    chosen, other = cast(Plan, plans[-1]), None if len(plans) == 1 else lambda: cast(Plan, plans[0])
    if options.schedule[:4] != "auto":
        if CURRENT.policy == "always":
            insist(of, chosen, rows, other)
        return call(plan=chosen)
    stacked: Callable[[], T] = partial(triton.verified, call, of, rows, other, plan=chosen)
    attempts = [(STACK, stacked), ("one-layer", one_by_one)]
    return fallback.first_that_runs(fallback.Kernel(of[1], of[0], of[2], of[5], of[3]), attempts, None)


def forward(options: Options, save: str, layers: Layers, mask: Tensor | None) -> triton.Forward:
    """As autograd.Engine, of all layers: the states and buffers have a first axis of L, and y is the last layer's."""
    cell, at, (x, h0, c0, w_ih, w_hh, *_) = options.cell, places(options.cell), layers[0]
    assert x is not None and w_ih is not None
    L, B, H, like = len(layers), x.shape[1], hidden_size(at, w_ih, w_hh, h0, c0), (x.dtype, x.device)
    adds, apart = products.input_biases(at, _together(layers, 5), _together(layers, 6), H)
    gx = linear(x, w_ih, None if adds is None else adds[0])[:, :, None].contiguous()
    (w, u), b = _weights(options, layers, H), None if adds is None else adds[1:]
    h0, c0 = (None if t is None else t.reshape(L, B, -1) for t in (_together(layers, 1), _together(layers, 2)))
    keywords: Any = {"save": save, "params": _together(layers, 7), "precision": options.precision}
    scan = partial(kernels.stack.forward, kernels.cells.get(cell), gx, w, b, u, apart, h0, c0, mask, **keywords)

    def call(plan: Plan, **launch: Any) -> triton.Forward:
        y, c, saved, hn, cn = scan(plan=plan, **launch)
        ends = triton.finals(at, hn[:, 0], cn[:, 0] if cn.dim() > 2 else cn)
        return (y[-1, 1:].flatten(2), *ends), (y, c, saved)

    def one_by_one() -> triton.Forward:
        last: Tensor = x
        found = []
        for layer in layers:
            found.append(triton.forward(replace(options, layers=1), save, (last, *layer[1:]), mask))
            last = found[-1][0][0]
        ends, buffers = zip(*((outputs[1:], kept) for outputs, kept in found), strict=True)
        together = tuple(torch.stack(cast(Any, each)) for each in zip(*buffers, strict=True))
        return (last, *(torch.cat(each) for each in zip(*ends, strict=True))), together

    how = (0, options.precision, save, None if mask is None else mask.dtype)
    of = (STACK, cell, *like, L, H, *how, (adds is not None, apart is not None))
    return _launched(options, of, B, [planned(cell, (L, B, H), like, options.precision, False)], call, one_by_one)


def backward(
    options: Options, layers: Layers, mask: Tensor | None, buffers: Tensors, grads: Tensors, need: list[list[bool]]
) -> list[Tensors]:
    """As autograd.Engine, of each layer. grads: dy is that of the last layer's y; the others have a first axis of L, as
    the buffers have. need: of each layer."""
    (y, c, saved), (dy, dhn, dcn, _) = buffers, grads
    assert y is not None and c is not None and saved is not None
    cell, alone, like = options.cell, replace(options, layers=1), (y.dtype, y.device)
    size = (len(y), y.shape[2], y.shape[4])
    layers = [(x, *layer[1:]) for x, layer in zip((layers[0][0], *y[:-1, 1:].flatten(3)), layers, strict=True)]

    def one_by_one() -> list[Tensors]:
        d, each = dy, []
        for n in reversed(range(len(layers))):
            ends = (None if t is None else t[n : n + 1] for t in (dhn, dcn))
            wanted = [n > 0 or need[0][0], *need[n][1:]]
            own = (y[n], c[n], saved[n]), (d, *ends, None), wanted
            each.append(triton.scan_backward(alone, layers[n], mask, *own))
            d = None if each[-1][0] is None else each[-1][0][:, :, None]
        return each[::-1]

    w, u = _weights(options, layers, size[2])
    keywords: Any = {"params": _together(layers, 7), "precision": options.precision}
    scan = partial(kernels.stack.backward, kernels.cells.get(cell), dy, dhn, dcn, w, u, y, c, saved, mask, **keywords)

    def call(plan: Plan, **launch: Any) -> list[Tensors]:
        found = (Gradients(*each) for each in zip(*scan(plan=plan, **launch), strict=True))
        every = zip(layers, y, c, found, need, strict=True)
        return [triton.of_inputs(alone, grouped(layer), mask, (h, s), own, n) for layer, h, s, own, n in every]

    plans = [planned(cell, size, like, options.precision, backward) for backward in (False, True)]
    how = (0, options.precision, options.save, None if mask is None else mask.dtype)
    given = (dy is not None, dhn is not None, dcn is not None, False, layers[0][6] is not None)
    of = (f"{STACK} backward", cell, *like, size[0], size[2], *how, given)
    return _launched(options, of, size[1], plans, call, one_by_one)

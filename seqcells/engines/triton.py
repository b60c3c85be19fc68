"""The engine triton: the kernels, and around them the products that do not depend on the step before.

Those products are ordinary tensor operations, which compilers and torch.func can trace: the input's product for all
steps and the weight gradients, one large product each. The kernels are torch.library operators, with fake
implementations for torch.compile and torch.export, and vmap rules. If nothing is tracing, their functions are called
directly, because the dispatcher costs tens of microseconds. Their argument schedule is "" for the plan's choice, a
schedule's name, or "auto": the plan's choice; if that does not compile or launch, another schedule; and at last torch
operations (see `fallback`).

The first call imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import batching, fallback, kernels, masks, products
from ..autograd import ENGINES, Engine, Options, Tensors
from ..cell import get
from ..kernels import registry
from ..kernels.buffers import outputs, pack_saved, unpack_saved
from ..kernels.plan import Plan, plan
from ..kernels.plan_single import Single, plan_single, unfit
from ..products import Places, hidden_size, input_projection, places, recurrent, step_biases
from .loop import part_of, projected


@lru_cache(maxsize=1 << 12)
def _planned(cell: str, batch: int, size: tuple[int, int, int], device: torch.device, asked: tuple[Any, ...]) -> Plan:
    """The cached plan. size: K, H, bytes per element; asked: schedule, precision, backward, avoid."""
    schedule, precision, backward, avoid = asked
    options: Any = {"B": batch, "H": size[1], "groups": size[0], "itemsize": size[2], "avoid": avoid}
    options |= {"device": kernels.scan.device_facts(device), "schedule": schedule or None, "precision": precision}
    return plan(kernels.cells.get(cell), backward=backward, **options)


def plan_for(
    cell: str,
    batch: int,
    size: tuple[int, int],
    like: Tensor,
    schedule: str,
    precision: str,
    backward: bool,
    avoid: tuple[str, ...] = (),
) -> Plan:
    """The plan of a scan. size: K and H; like: a tensor of its dtype and device; schedule: "" for the plan's choice.
    Raises as `plan`."""
    asked = (schedule, precision, backward, avoid)
    return _planned(cell, batch, (*size, like.element_size()), like.device, asked)


def _launch(launch: kernels.scan.Launch) -> None:
    """`scan.run`; raises fallback.Failed if the kernel does not compile or launch."""
    fallback.guarded(partial(kernels.scan.run, launch))


def _attempts(planned: Callable[..., Plan], call: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The schedules for `fallback.first_that_runs`, the best first. planned(avoid=...): the plan without those."""
    avoid: tuple[str, ...] = ()
    while True:
        try:
            chosen = planned(schedule="", avoid=avoid)
        except ValueError as error:
            if not avoid:  # no schedule fits at all: `call` raises the error again
                yield "any", partial(_raise, error)
            return
        yield chosen.schedule, partial(call, plan=chosen, launch=_launch)
        avoid += (chosen.schedule,)


def _raise(error: Exception) -> None:
    raise error


def _kernel(cell: str, direction: str, like: Tensor, u: Tensor) -> fallback.Kernel:
    return fallback.Kernel(cell, direction, like.dtype, u.shape[-1], like.device)


def _tiles(cell: str, saved: Tensor) -> Tensor:
    """What the loop engine saves [T, B, K, S*H], in the kernels' packed format."""
    order = list(part_of(cell).order)
    return pack_saved(saved.unflatten(3, (len(order), -1))[:, :, :, order])


def _untiled(cell: str, words: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_tiles`."""
    order = part_of(cell).order
    back = [order.index(n) for n in range(len(order))]
    return unpack_saved(words, len(order), dtype)[:, :, :, back].flatten(3, 4)


def _scan_forward(
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    mask: Tensor | None,
    cell: str,
    save: str,
    reversed: int,
    schedule: str,
    precision: str,
    params: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.scan.forward."""
    declared = registry.REGISTERED.get(cell) or kernels.cells.get(cell)
    gx = gx.contiguous()  # vmap's rows and groups need not be
    how: Any = {"save": save, "reversed": reversed, "precision": precision, "params": params}
    call = partial(kernels.scan.forward, declared, gx, u, bias, h0, c0, mask, **how)
    planned = partial(plan_for, cell, gx.shape[1], (u.shape[0], u.shape[2]), u, precision=precision, backward=False)
    if schedule != "auto":
        return (*call(plan=planned(schedule=schedule)),)

    def by_loop() -> Any:
        y, c, gates, hn, cn = projected.forward((gx, u, bias, mask, params), (h0, c0), cell, save, reversed)
        like = kernels.scan.allocate(declared, gx, save, reversed)
        saved = _tiles(cell, gates) if like.saved.numel() else like.saved
        return y, c if c.numel() else like.c, saved, hn, cn

    kernel = _kernel(cell, "forward", gx, u)
    return tuple(fallback.first_that_runs(kernel, _attempts(planned, call), by_loop))


def _scan_forward_fake(gx: Tensor, *others: Any) -> tuple[Tensor, ...]:
    cell, save, reversed = others[5:8]
    return tuple(kernels.scan.allocate(kernels.cells.get(cell), gx, save, reversed))


def _scan_backward(
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dcs: Tensor | None,
    u: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    mask: Tensor | None,
    cell: str,
    reversed: int,
    schedule: str,
    precision: str,
    params: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.scan.backward."""
    declared = kernels.cells.get(cell)
    y, c, saved = y.contiguous(), c.contiguous(), saved.contiguous()
    how: Any = {"dcs": dcs, "reversed": reversed, "precision": precision, "params": params}
    call = partial(kernels.scan.backward, declared, dy, dhn, dcn, u, y, c, saved, mask, **how)
    planned = partial(plan_for, cell, y.shape[1], (u.shape[0], u.shape[2]), u, precision=precision, backward=True)
    if schedule != "auto":
        return (*call(plan=planned(schedule=schedule)),)

    def by_loop() -> Any:
        gates = _untiled(cell, saved, y.dtype) if declared.saved else saved
        return projected.backward((dy, dhn, dcn, dcs), (u, mask, params), (y, c, gates), cell, reversed)

    kernel = _kernel(cell, "backward", y, u)
    return tuple(fallback.first_that_runs(kernel, _attempts(planned, call), by_loop))


def _scan_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    y, cell, reversed = arguments[5], *arguments[9:11]
    return tuple(kernels.scan.allocate_gradients(kernels.cells.get(cell), y, reversed))


def _recompute(
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    y: Tensor,
    c: Tensor,
    mask: Tensor | None,
    cell: str,
    reversed: int,
    schedule: str,
    params: Tensor | None = None,
) -> Tensor:
    """See kernels.scan.recompute."""
    declared = kernels.cells.get(cell)
    gx, y, c = gx.contiguous(), y.contiguous(), c.contiguous()
    how: Any = {
        "plan": plan_for(cell, y.shape[1], (u.shape[0], u.shape[2]), u, "", "ieee", False),
        "reversed": reversed,
        "params": params,
    }
    call = partial(kernels.scan.recompute, declared, gx, u, bias, y, c, mask, **how)
    if schedule != "auto":
        return call()
    kernel = _kernel(cell, "recompute", y, u)
    attempts = [("recompute", partial(call, launch=_launch))]
    by_loop = partial(projected.recompute, (gx, u, bias, mask, params), (y, c), cell, reversed)
    return fallback.first_that_runs(kernel, attempts, lambda: _tiles(cell, by_loop()))


def _recompute_fake(gx: Tensor, *others: Any) -> Tensor:
    return kernels.scan.allocate_saved(kernels.cells.get(others[5]), gx)


def _single_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    cell: str,
    save: str,
    schedule: str,
    precision: str,
    input_precision: str,
    params: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.single.forward: one step, x [B, I]. Returns what scan_forward does for one step, with states [B, H].

    Weights and biases in the cell's order."""
    declared, at, w = kernels.cells.get(cell), places(cell), w_ih[None]
    H = hidden_size(at, w_ih, w_hh, h0, c0)
    u = recurrent(at, None if w_hh is None else w_hh[None], w, H)
    chosen = single_plan(cell, x, H, precision, input_precision)
    how: Any = {"save": save, "plan": chosen, "params": params}
    how |= {"precision": precision, "input_precision": input_precision}
    given = (x, w_ih, u[0], *step_biases(at, b_ih, b_hh, H), h0, c0)
    call = partial(kernels.single.forward, declared, *given, **how)
    if schedule != "auto":
        return (*call(),)

    def by_scan() -> Any:
        bi, bh, h, c, vectors = (None if t is None else t[None] for t in (b_ih, b_hh, h0, c0, params))
        gx, bias = input_projection(at, x[None], w, bi, bh, H)
        y, c, saved, hn, cn = _scan_forward(gx, u, bias, h, c, None, cell, save, 0, schedule, precision, vectors)
        return y, c, saved, hn[0], cn[0] if cn.numel() else cn

    attempts = [("single", partial(call, launch=_launch))]
    return tuple(fallback.first_that_runs(_kernel(cell, "step", x, u), attempts, by_scan))


def single_plan(cell: str, x: Tensor, H: int, precision: str, input_precision: str) -> Single:
    """The plan of one step of x [B, I]."""
    options: Any = {"itemsize": x.element_size(), "device": kernels.scan.device_facts(x.device), "precision": precision}
    options |= {"B": x.shape[0], "I": x.shape[1], "H": H, "input_precision": input_precision}
    return plan_single(get(cell).form, **options)


def one_launch(cell: str, x: Tensor, H: int, precision: str, input_precision: str) -> bool:
    """Whether one step of x [B, I] is cheaper by single_forward than by a product and scan_forward."""
    if unfit(get(cell).form, x.shape[1], H) is not None:
        return False
    return single_plan(cell, x, H, precision, input_precision).cheaper


scan_forward = torch.library.custom_op("seqcells::scan_forward", _scan_forward, mutates_args=())
scan_forward.register_fake(_scan_forward_fake)
scan_backward = torch.library.custom_op("seqcells::scan_backward", _scan_backward, mutates_args=())
scan_backward.register_fake(_scan_backward_fake)
recompute = torch.library.custom_op("seqcells::recompute", _recompute, mutates_args=())
recompute.register_fake(_recompute_fake)

single_forward = torch.library.custom_op("seqcells::single_forward", _single_forward, mutates_args=())


@single_forward.register_fake
def _(x: Tensor, w_ih: Tensor, w_hh: Any, b_ih: Any, b_hh: Any, h0: Any, c0: Any, *others: Any) -> tuple[Tensor, ...]:
    H = hidden_size(places(others[0]), w_ih, w_hh, h0, c0)
    return tuple(kernels.single.allocate(kernels.cells.get(others[0]), x, H, others[1]))


def _grouped(*tensors: Tensor | None) -> list[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh and params with an axis of groups, which is added if it was left out."""
    w_ih = tensors[0]
    assert w_ih is not None
    return list(tensors) if w_ih.dim() == 3 else [None if t is None else t[None] for t in tensors]


def forward(options: Options, save: str, inputs: Tensors, mask: Tensor | None) -> tuple[Tensors, Tensors]:
    """See autograd.Engine."""
    x, h0, c0, *weights, extra = inputs
    at = places(options.cell)
    assert x is not None
    told: Any = (options.cell, save)
    if options.single:
        h0, c0 = (None if s is None else s.reshape(s.shape[-2:]) for s in (h0, c0))
        *own, params = weights
        told += (options.schedule, options.precision, options.single, params)
        given: Any = (x[0], *own, h0, c0)
        out = _single_forward(*given, *told)
        return (out[3][None], *_finals(at, *out[3:])), out[:3]
    w_ih, w_hh, b_ih, b_hh, params = _grouped(*weights)
    assert w_ih is not None
    H = hidden_size(at, w_ih, w_hh, h0, c0)
    gx, bias = input_projection(at, x, w_ih, b_ih, b_hh, H, extra)
    B, K = gx.shape[1:3]
    h0, c0 = (s if s is None or s.dim() == 3 else s.reshape(K, B, s.shape[-1]) for s in (h0, c0))
    run: Any = scan_forward if options.traced else _scan_forward
    told += (options.reversed, options.schedule, options.precision, params)
    y, c, saved, *final = run(gx, recurrent(at, w_hh, w_ih, H), bias, h0, c0, mask, *told)
    shown = [outputs(s, options.reversed) for s in ((y, c) if options.states else (y,))]
    padding = None if mask is None else masks.padding_rows(mask)
    if padding is not None and options.reversed and not (h0 is None and c0 is None):
        # In a reversed group, padding comes first: the buffer contains the initial state until the row begins.
        shown = [s.masked_fill(padding[..., None, None], 0) for s in shown]
    return (shown[0].flatten(2), *_finals(at, *final), *(s.flatten(2) for s in shown[1:])), (y, c, saved)


def _finals(at: Places, first: Any, others: Any) -> tuple[Any, ...]:
    """Those of the two final states that users see."""
    return (others,) if at.output else (first, others)[: at.states]


def backward(
    options: Options, inputs: Tensors, mask: Tensor | None, buffers: Tensors, grads: Tensors, need: Sequence[bool]
) -> Tensors:
    """See autograd.Engine."""
    x, _, _, *weights, extra = inputs
    y, c, saved = buffers
    w_ih, w_hh, b_ih, b_hh, params = _grouped(*weights)
    assert x is not None and y is not None and c is not None and w_ih is not None
    at, (K, H) = places(options.cell), y.shape[2:]
    u = recurrent(at, w_hh, w_ih, H)
    if saved is None:
        gx, bias = input_projection(at, x, w_ih, b_ih, b_hh, H, extra)
        run: Any = recompute if options.traced else _recompute
        saved = run(gx, u, bias, y, c, mask, options.cell, options.reversed, options.schedule, params)
    dy, *rest = grads
    dhn = None if at.output else rest.pop(0)
    dcn, dcs = (*rest, None, None)[:2]
    dy, dcs = (None if d is None else d.reshape(*d.shape[:2], K, -1) for d in (dy, dcs))
    if options.single:  # states have no axis of groups
        dhn, dcn = (None if d is None else d[None] for d in (dhn, dcn))
    run = scan_backward if options.traced else _scan_backward
    told = (options.cell, options.reversed, options.schedule, options.precision, params)
    dgx, dhu, m, dh0, dc0, dparams = run(dy, dhn, dcn, dcs, u, y, c, saved, mask, *told)
    dparams = dparams.to(x.dtype) if dparams.numel() else None
    dx, dw_ih, dinputs = products.input_gradients(at, dgx, x, w_ih, (need[0], need[3], need[8]))
    dw_hh = db_ih = db_hh = None
    if need[4]:
        gates = (dgx, dhu, m)
        each = [products.recurrent_gradient(at, gates, (y, c), mask, options.reversed, k) for k in range(K)]
        dw_hh = each[0] if K == 1 else torch.stack(each)
    if need[5] or need[6]:
        db_ih, db_hh = products.bias_gradients(at, dgx, dhu, H)
    found = [dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dparams, dinputs]
    # In the inputs' shapes; the gradient of an input that is None is None.
    return tuple(
        g.reshape(t.shape) if n and g is not None and t is not None else None
        for g, t, n in zip(found, inputs, need, strict=True)
    )


OPERATORS = (scan_forward, scan_backward, recompute)
ENGINES["triton"] = Engine(forward, backward)
batching.register(*OPERATORS)

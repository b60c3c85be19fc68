"""The engine triton: the kernels, and around them the products that do not depend on the step before.

Those are the input's product for all steps and the weight gradients, one large product each. If nothing is tracing,
this engine's functions are called directly, because the dispatcher of operators costs tens of microseconds.

options.schedule is "" for the plan's choice, a schedule's name, or "auto": the plan's choice; if that does not compile
or launch or is wrong (see `verification`), another schedule; and at last the loop engine (see `fallback`). "auto:grid"
is the same, but grid comes first: it was measured to be the fastest.

The first call imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import drawn, fallback, kernels, masks, products
from ..autograd import ENGINES, Engine, Options, Tensors, grouped
from ..cell import get
from ..kernels import registry
from ..kernels.buffers import Gradients, Scanned, outputs
from ..kernels.plan import Plan, plan
from ..kernels.plan_single import Single, plan_single, unfit
from ..products import Places, hidden_size, input_projection, places, recurrent, step_biases
from ..verification import CURRENT, TRUSTED, insist, verify
from . import loop
from .operators import call_forward

T = TypeVar("T")
Forward = tuple[tuple[Tensor, ...], Tensors]  # outputs and buffers


@lru_cache(maxsize=1 << 12)
def plan_for(
    cell: str,
    batch: int,
    size: tuple[int, int],
    like: tuple[torch.dtype, torch.device],
    schedule: str,
    precision: str,
    backward: bool,
    avoid: tuple[str, ...] = (),
) -> Plan:
    """The plan of a scan. size: K and H; like: the tensors' dtype and device; schedule: "" for the plan's choice.
    Raises as `plan`."""
    (K, H), (dtype, device) = size, like
    facts = kernels.scan.device_facts(device)
    return plan(
        kernels.cells.get(cell),
        B=batch,
        H=H,
        itemsize=dtype.itemsize,
        device=facts,
        groups=K,
        schedule=schedule or None,
        precision=precision,
        backward=backward,
        avoid=(*avoid, *doubtful(dtype, device)),
    )


def doubtful(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """The schedules that run there only by name."""
    return kernels.scan.doubtful(kernels.scan.device_facts(device), dtype)


def _launch(launch: kernels.scan.Launch) -> None:
    """`scan.run`; raises fallback.Failed if the kernel does not compile or launch."""
    fallback.guarded(partial(kernels.scan.run, launch))


def _attempts(
    planned: Callable[..., Plan], call: Callable[..., Any], schedule: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The schedules for `fallback.first_that_runs`, the best first, with what gives call's result or raises an error.
    planned(avoid=...): the plan without those. call(plan=...). schedule: "auto", or "auto:" and the first."""
    avoid: tuple[str, ...] = ()
    if first := schedule[5:]:
        with suppress(ValueError):  # it does not fit
            chosen = planned(schedule=first)
            avoid = (first,)
    if avoid:
        yield first, partial(call, plan=chosen)
    while True:
        try:
            chosen = planned(schedule="", avoid=avoid)
        except ValueError:
            if not avoid:  # no schedule fits at all: this raises the error again
                yield "any", partial(planned, schedule="")
            return
        yield chosen.schedule, partial(call, plan=chosen)
        avoid += (chosen.schedule,)


def verified(
    call: Callable[..., T], of: tuple[object, ...], rows: int, other: Callable[[], Plan] | None, *, plan: Plan
) -> T:
    """call's result with a plan that is verified, see `verification.verify`."""
    if TRUSTED.get((id(plan), *of)) is not plan:
        verify(of, plan, rows, other)
    return call(plan=plan, launch=_launch)


def _kernel(cell: str, direction: str, like: Tensor, u: Tensor) -> fallback.Kernel:
    return fallback.Kernel(cell, direction, like.dtype, u.shape[-1], like.device)


def scan(options: Options, save: str, inputs: Tensors, mask: Tensor | None) -> Scanned:
    """See autograd.Engine, and kernels.scan.forward."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, extra, dropout = tensors = grouped(inputs)
    cell, at = options.cell, places(options.cell)
    assert x is not None and w_ih is not None
    declared = registry.REGISTERED.get(cell) or kernels.cells.get(cell)
    H = hidden_size(at, w_ih, w_hh, h0, c0)
    gx, bias = input_projection(at, x, w_ih, b_ih, b_hh, H, extra)
    gx, u = gx.contiguous(), recurrent(at, w_hh, w_ih, H)  # vmap's rows and groups need not be contiguous
    keywords: Any = {"save": save, "reversed": options.reversed, "precision": options.precision}
    keywords |= {"params": params, "dropout": dropout}
    call = partial(kernels.scan.forward, declared, gx, u, bias, h0, c0, mask, **keywords)
    size, rows, like = (gx.shape[2], H), gx.shape[1], (u.dtype, u.device)
    planned = partial(plan_for, cell, rows, size, like, precision=options.precision, backward=False)
    how = (options.reversed, options.precision, save, None if mask is None else mask.dtype)
    of = ("forward", cell, *like, *size, *how, (bias is not None,))
    if options.schedule[:4] != "auto":
        chosen = planned(schedule=options.schedule)
        if CURRENT.policy == "always":
            insist(of, chosen, rows)
        return call(plan=chosen)

    def by_loop() -> Scanned:
        """In the kernels' buffers, for their shapes. Backward does not read them: it runs the loop again."""
        out = kernels.scan.allocate(declared, gx, save, options.reversed)
        own, given = _explicit(options, tensors, H)
        y, c, _, hn, cn = loop.scan(own, "none" if save == "none" else "states", given, mask)
        outputs(out.y, options.reversed).copy_(y)
        if c.dim() > 1:
            outputs(out.c, options.reversed).copy_(c)
        return out._replace(hn=hn if hn.dim() > 1 else out.hn, cn=cn)

    attempts = _attempts(planned, partial(verified, call, of, rows, None), options.schedule)
    return fallback.first_that_runs(_kernel(cell, "forward", gx, u), attempts, by_loop)


def _explicit(options: Options, tensors: Sequence[Tensor | None], H: int) -> tuple[Options, list[Tensor | None]]:
    """The options and inputs for the loop engine, which takes dropout masks as per-step inputs."""
    *others, extra, dropout = tensors
    x, w_ih = others[0], others[3]
    if dropout is None or x is None or w_ih is None:
        return options, list(tensors)
    cell = get(options.cell)
    given = drawn.given(cell, extra, dropout, (*x.shape[:2], w_ih.shape[0], H), x.dtype)
    return replace(options, cell=drawn.explicit(cell).key), [*others, given, None]


def allocate(options: Options, save: str, inputs: Tensors) -> Scanned:
    """See autograd.Engine."""
    x, h0, c0, w_ih, w_hh = inputs[:5]
    assert x is not None and w_ih is not None
    declared, H = kernels.cells.get(options.cell), hidden_size(places(options.cell), w_ih, w_hh, h0, c0)
    gx = x.new_empty(1).expand(*x.shape[:2], w_ih.shape[0], declared.gates * H)  # only its shape is used
    return kernels.scan.allocate(declared, gx, save, options.reversed)


def scan_backward(
    options: Options,
    inputs: Tensors,
    mask: Tensor | None,
    buffers: Tensors,
    grads: Tensors,
    need: Sequence[bool],
    samples: int = 1,
) -> Tensors:
    """See autograd.Engine, and kernels.scan.backward."""
    tensors = grouped(inputs)
    x, _, _, w_ih, w_hh, _, b_hh, params, extra, dropout = tensors
    assert x is not None and w_ih is not None and buffers[0] is not None and buffers[1] is not None
    y, c, saved = buffers[0].contiguous(), buffers[1].contiguous(), buffers[2]
    H = y.shape[3]
    u = recurrent(places(options.cell), w_hh, w_ih, H)
    if saved is None:
        saved = _recomputed(options, tensors, mask, u, (y, c))
    found = None
    if saved is not None:
        found = _gradients(options, grads, u, (y, c, saved.contiguous()), mask, (params, dropout, b_hh))
    if found is None:  # the kernels failed: the loop, from its own forward
        options, given = _explicit(replace(options, traced=False, single="", notes={}), tensors, H)
        _, again = loop.forward(options, "gates", given, mask)
        *of_weights, extra_grad = loop.backward(options, given, mask, again, grads, need, samples)
        if dropout is not None and extra_grad is not None:  # of the masks, too
            extra_grad = None if extra is None else extra_grad[..., : extra.shape[-1]]
            if extra is not None and extra_grad is not None and extra.dim() < extra_grad.dim():
                extra_grad = extra_grad.sum(2)
        return *of_weights, extra_grad
    return of_inputs(options, tensors, mask, (y, c), found, need, samples)


def of_inputs(
    options: Options,
    tensors: Sequence[Tensor | None],
    mask: Tensor | None,
    states: tuple[Tensor, Tensor],
    found: Gradients,
    need: Sequence[bool],
    samples: int = 1,
) -> Tensors:
    """The gradients of the inputs, from those that the kernels give."""
    x, _, _, w_ih, w_hh, *_, extra, _ = tensors
    assert x is not None and w_ih is not None
    at, (K, H) = places(options.cell), states[0].shape[2:]
    dgx, dhu, m, dh0, dc0, dparams = found
    dx, dw_ih = products.input_gradients(dgx, x, w_ih, (need[0], need[3]), samples)
    dw_hh = db_ih = db_hh = dinputs = None
    if need[4] and w_hh is not None:
        gates, back = (dgx, dhu, m), options.reversed
        each = [products.recurrent_gradient(options.cell, gates, states, mask, back, k, samples) for k in range(K)]
        dw_hh = each[0] if K == 1 else torch.stack(each, -3)
    if need[5] or need[6]:
        db_ih, db_hh = products.bias_gradients(at, dgx, dhu, H, samples)
    if need[8] and extra is not None:
        dinputs = dgx[..., w_ih.shape[1] :]
        dinputs = dinputs if extra.dim() == 4 else dinputs.sum(2)
    return dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dparams.to(x.dtype) if dparams.numel() else None, dinputs


def _gradients(
    options: Options,
    grads: Tensors,
    u: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    others: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Gradients | None:
    """kernels.scan.backward; None if the kernels failed. others: params, dropout and b_hh."""
    cell, (dy, dhn, dcn, dcs), (y, c, saved) = options.cell, grads, buffers
    keywords: Any = {"dcs": dcs, "reversed": options.reversed, "precision": options.precision}
    params, dropout, b_hh = others
    keywords |= {"params": params, "dropout": dropout}
    call = partial(kernels.scan.backward, kernels.cells.get(cell), dy, dhn, dcn, u, y, c, saved, mask, **keywords)
    size, rows, like = (u.shape[0], u.shape[2]), y.shape[1], (u.dtype, u.device)
    planned = partial(plan_for, cell, rows, size, like, precision=options.precision)
    how = (options.reversed, options.precision, options.save, None if mask is None else mask.dtype)
    given = (dy is not None, dhn is not None, dcn is not None, dcs is not None, b_hh is not None)
    of = ("backward", cell, *like, *size, *how, given)
    before = partial(_of_forward, partial(planned, backward=False), of, options.schedule)
    planned = partial(planned, backward=True)
    if options.schedule[:4] != "auto":
        chosen = planned(schedule=options.schedule)
        if CURRENT.policy == "always":
            insist(of, chosen, rows, before)
        return call(plan=chosen)
    attempts = _attempts(planned, partial(verified, call, of, rows, before), options.schedule)
    return fallback.first_that_runs(_kernel(cell, "backward", y, u), attempts, lambda: None)


def _of_forward(planned: Callable[..., Plan], of: tuple[Any, ...], schedule: str) -> Plan:
    """The plan by which forward ran, of a scan whose backward is asked for."""
    if schedule[:4] != "auto":
        return planned(schedule=schedule)
    kernel = fallback.Kernel(of[1], "forward", of[2], of[5], of[3])
    attempts = _attempts(planned, lambda plan: plan, schedule)
    return next(attempt() for schedule, attempt in attempts if not fallback.failed(kernel, schedule))


def _recomputed(
    options: Options, inputs: Sequence[Tensor | None], mask: Tensor | None, u: Tensor, states: tuple[Tensor, Tensor]
) -> Tensor | None:
    """kernels.scan.recompute; None if its kernel failed."""
    x, _, _, w_ih, _, b_ih, b_hh, params, extra, dropout = inputs
    cell, H = options.cell, u.shape[2]
    assert x is not None and w_ih is not None
    gx, bias = input_projection(places(cell), x, w_ih, b_ih, b_hh, H, extra)
    schedule = options.schedule if options.schedule[:4] != "auto" else ""
    chosen = plan_for(cell, gx.shape[1], (u.shape[0], H), (u.dtype, u.device), schedule, options.precision, False)
    keywords: Any = {"plan": chosen, "reversed": options.reversed, "params": params, "dropout": dropout}
    call = partial(kernels.scan.recompute, kernels.cells.get(cell), gx.contiguous(), u, bias, *states, mask, **keywords)
    if options.schedule[:4] != "auto":
        return call()
    attempts = [("recompute", partial(call, launch=_launch))]
    return fallback.first_that_runs(_kernel(cell, "recompute", gx, u), attempts, lambda: None)


def single_plan(cell: str, x: Tensor, H: int, precision: str, input_precision: str) -> Single:
    """The plan of one step of x [B, I]."""
    return plan_single(
        get(cell).form,
        B=x.shape[0],
        I=x.shape[1],
        H=H,
        itemsize=x.element_size(),
        device=kernels.scan.device_facts(x.device),
        precision=precision,
        input_precision=input_precision,
    )


def one_launch(cell: str, x: Tensor, H: int, precision: str, input_precision: str) -> bool:
    """Whether one step of x [B, I] is cheaper by single_forward than by a product and scan_forward."""
    if unfit(get(cell).form, x.shape[1], H) is not None:
        return False
    return single_plan(cell, x, H, precision, input_precision).cheaper


def forward(options: Options, save: str, inputs: Tensors, mask: Tensor | None) -> Forward:
    """See autograd.Engine."""
    if options.single:
        return _step(options, save, inputs)
    at, h0, c0 = places(options.cell), *inputs[1:3]
    y, c, saved, *final = (call_forward if options.traced else scan)(options, save, inputs, mask)
    states = [outputs(s, options.reversed) for s in ((y, c) if options.states else (y,))]
    padding = None if mask is None else masks.padding_rows(mask)
    if padding is not None and options.reversed and not (h0 is None and c0 is None):
        # In a reversed group, padding comes first: the buffer contains the initial state until the row begins.
        states = [s.masked_fill(padding[..., None, None], 0) for s in states]
    return (states[0].flatten(2), *finals(at, *final), *(s.flatten(2) for s in states[1:])), (y, c, saved)


def _step(options: Options, save: str, inputs: Tensors) -> Forward:
    """`forward` of one step by kernels.single.forward; its final states have no axis of groups."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, *_ = inputs
    assert x is not None and w_ih is not None
    h0, c0 = (None if s is None else s.reshape(s.shape[-2:]) for s in (h0, c0))
    cell, at = options.cell, places(options.cell)
    H = hidden_size(at, w_ih, w_hh, h0, c0)
    u = recurrent(at, None if w_hh is None else w_hh[None], w_ih[None], H)[0]
    chosen = single_plan(cell, x[0], H, options.precision, options.single)
    call = partial(
        kernels.single.forward,
        *(kernels.cells.get(cell), x[0], w_ih, u, *step_biases(at, b_ih, b_hh, H), h0, c0),
        save=save,
        params=params,
        precision=options.precision,
        input_precision=options.single,
    )

    def by_kernel(plan: Single, launch: Callable[[kernels.scan.Launch], None] = kernels.scan.run) -> Forward:
        y, c, saved, *final = call(plan=plan, launch=launch)
        return (final[0][None], *finals(at, *final)), (y, c, saved)

    def by_scan() -> Forward:
        (y, *final), buffers = forward(replace(options, single=""), save, inputs, None)
        return (y, *(s[0] for s in final if s is not None)), buffers

    like, given = (x.dtype, x.device), (b_ih is not None, b_hh is not None)
    of = ("step", cell, *like, 1, H, 0, options.precision, save, None, given, x.shape[2], options.single)
    rows = x.shape[1]
    back = partial(plan_for, cell, rows, (1, H), like, "", options.precision, True) if save == "gates" else None
    if options.schedule[:4] != "auto":
        if CURRENT.policy == "always":
            insist(of, chosen, rows, back)
        return by_kernel(chosen)
    attempts = [("single", partial(verified, by_kernel, of, rows, back, plan=chosen))]
    return fallback.first_that_runs(_kernel(cell, "step", x, u), attempts, by_scan)


def finals(at: Places, first: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    """Those of the two final states that users see."""
    return (others,) if at.output else (first, others)[: at.states]


ENGINES["triton"] = Engine(forward, scan_backward, scan, scan_backward, allocate)

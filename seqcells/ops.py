"""The Triton kernels as torch.library custom ops: an engine (see `autograd`). triton is imported by the first call.

The ops carry the fakes that torch.compile and torch.export trace, and the rules of vmap. One op a direction: a dispatch
costs tens of microseconds. Their argument schedule: "" for the plan's choice, a schedule's name, or "auto": the plan's
choice, and if it does not compile or launch another, and at last the same in torch operations (see `fallback`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import batching, fallback, kernels
from .autograd import ENGINES, Engine
from .cell import get
from .kernels.buffers import pack_saved, unpack_saved
from .kernels.plan import Plan, plan
from .kernels.plan_single import Single, plan_single, unfit
from .loop import part_of, projected
from .products import hidden_size, input_projection, places, recurrent, step_biases


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
    """The plan of a scan of a size, K and H, in like's dtype. schedule: "" chooses. Raises as `plan` does."""
    options: Any = {"B": batch, "H": size[1], "groups": size[0], "itemsize": like.element_size(), "avoid": avoid}
    options |= {"device": kernels.scan.device_facts(like.device), "schedule": schedule or None, "precision": precision}
    return plan(get(cell).form, backward=backward, **options)


def _launch(launch: kernels.scan.Launch) -> None:
    """`scan.run`; raises fallback.Failed where the kernel does not compile or launch."""
    fallback.guarded(partial(kernels.scan.run, launch))


def _attempts(planned: Callable[..., Plan], call: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The schedules for `fallback.first_that_runs`, the best first. planned(avoid=...): the plan without those."""
    avoid: tuple[str, ...] = ()
    while True:
        try:
            chosen = planned(avoid=avoid)
        except ValueError as error:
            if not avoid:  # nothing ever fitted: `call` raises it again
                yield "any", partial(_raise, error)
            return
        yield chosen.schedule, partial(call, plan=chosen, launch=_launch)
        avoid += (chosen.schedule,)


def _raise(error: Exception) -> None:
    raise error


def _planner(cell: str, batch: int, u: Tensor, precision: str, backward: bool) -> Callable[..., Plan]:
    """plan(schedule, avoid=()) of a scan with these recurrent weights [K, ., H]."""

    def planned(schedule: str = "", avoid: tuple[str, ...] = ()) -> Plan:
        return plan_for(cell, batch, (u.shape[0], u.shape[2]), u, schedule, precision, backward, avoid)

    return planned


def _kernel(cell: str, direction: str, like: Tensor, u: Tensor) -> fallback.Kernel:
    return fallback.Kernel(cell, direction, like.dtype, u.shape[-1], like.device)


def _tiles(cell: str, kept: Tensor) -> Tensor:
    """The kernels' saved words of what the loop engine saves [T, B, K, S*H]."""
    order = list(part_of(cell).order)
    return pack_saved(kept.unflatten(3, (len(order), -1))[:, :, :, order])


def _kept(cell: str, words: Tensor, dtype: torch.dtype) -> Tensor:
    """The opposite of `_tiles`."""
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
    declared = kernels.cells.get(cell)
    gx = gx.contiguous()  # vmap's rows and groups need not be
    how: Any = {"save": save, "reversed": reversed, "precision": precision, "params": params}
    call = partial(kernels.scan.forward, declared, gx, u, bias, h0, c0, mask, **how)
    planned = _planner(cell, gx.shape[1], u, precision, False)
    if schedule != "auto":
        return tuple(call(plan=planned(schedule)))  # type: ignore[return-value]

    def by_loop() -> Any:
        y, c, kept, hn, cn = projected.forward((gx, u, bias, mask, params), (h0, c0), cell, save, reversed)
        like = kernels.scan.allocate(declared, gx, save, reversed)
        saved = _tiles(cell, kept) if like.saved.numel() else like.saved
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
    planned = _planner(cell, y.shape[1], u, precision, True)
    if schedule != "auto":
        return tuple(call(plan=planned(schedule)))  # type: ignore[return-value]

    def by_loop() -> Any:
        kept = _kept(cell, saved, y.dtype) if declared.saved else saved
        return projected.backward((dy, dhn, dcn, dcs), (u, mask, params), (y, c, kept), cell, reversed)

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
    how: Any = {"plan": _planner(cell, y.shape[1], u, "ieee", False)(), "reversed": reversed, "params": params}
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
    """See kernels.single.forward: one step, x [B, I]; what scan_forward gives of one step, but all states [B, H].

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
        return tuple(call())  # type: ignore[return-value]

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


ENGINES["triton"] = Engine(scan_forward, scan_backward, recompute, single_forward)
batching.register(*ENGINES["triton"][:3])

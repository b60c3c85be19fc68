"""The Triton kernels as torch.library custom ops: an engine (see `autograd`). Importing this imports triton.

The ops carry the fakes that torch.compile and torch.export trace, and the rules of vmap. One op a direction: a dispatch
costs tens of microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import batching
from .autograd import ENGINES, Engine
from .kernels import cells, scan, single
from .kernels.cells import Cell
from .kernels.plan import Plan, plan
from .kernels.plan_single import Single, plan_single, unfit


def plan_for(cell: Cell, batch: int, u: Tensor, schedule: str, precision: str, backward: bool) -> Plan:
    """The plan of a scan with these recurrent weights [K, G*H, H]. schedule: "" chooses. Raises as `plan` does."""
    options: Any = {"B": batch, "H": u.shape[2], "groups": u.shape[0], "itemsize": u.element_size()}
    options |= {"device": scan.device_facts(u.device), "schedule": schedule or None, "precision": precision}
    return plan(cell, backward=backward, **options)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.scan.forward."""
    declared = cells.get(cell)
    options: Any = {"plan": plan_for(declared, gx.shape[1], u, schedule, precision, False)}
    options |= {"reversed": reversed, "precision": precision}
    gx = gx.contiguous()  # vmap's rows and groups need not be
    return tuple(scan.forward(declared, gx, u, bias, h0, c0, mask, save=save, **options))  # type: ignore[return-value]


def _scan_forward_fake(gx: Tensor, *others: Any) -> tuple[Tensor, ...]:
    cell, save, reversed = others[5:8]
    return tuple(scan.allocate(cells.get(cell), gx, save, reversed))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.scan.backward."""
    declared = cells.get(cell)
    options: Any = {"plan": plan_for(declared, y.shape[1], u, schedule, precision, True)}
    options |= {"reversed": reversed, "precision": precision}
    options |= {} if dcs is None else {"dcs": dcs}
    y, c, saved = y.contiguous(), c.contiguous(), saved.contiguous()
    return tuple(scan.backward(declared, dy, dhn, dcn, u, y, c, saved, mask, **options))  # type: ignore[return-value]


def _scan_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    y, cell, reversed = arguments[5], *arguments[9:11]
    return tuple(scan.allocate_gradients(cells.get(cell), y, reversed))


def _recompute(
    gx: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, mask: Tensor | None, cell: str, reversed: int
) -> Tensor:
    """See kernels.scan.recompute."""
    declared = cells.get(cell)
    chosen = plan_for(declared, y.shape[1], u, "", "ieee", False)
    gx, y, c = gx.contiguous(), y.contiguous(), c.contiguous()
    return scan.recompute(declared, gx, u, bias, y, c, mask, plan=chosen, reversed=reversed)


def _recompute_fake(
    gx: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, mask: Tensor | None, cell: str, reversed: int
) -> Tensor:
    return scan.allocate_saved(cells.get(cell), gx)


def _single_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    cell: str,
    save: str,
    precision: str,
    input_precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.single.forward: one step, x [B, I]; what scan_forward gives of one step, but all states [B, H]."""
    declared = cells.get(cell)
    chosen = single_plan(cell, x, w_hh, precision, input_precision)
    options: Any = {"plan": chosen, "precision": precision, "input_precision": input_precision}
    return tuple(single.forward(declared, x, w_ih, w_hh, b_ih, b_hh, h0, c0, save=save, **options))  # type: ignore[return-value]


def single_plan(cell: str, x: Tensor, w_hh: Tensor, precision: str, input_precision: str) -> Single:
    """The plan of one step of x [B, I]."""
    options: Any = {"itemsize": x.element_size(), "device": scan.device_facts(x.device), "precision": precision}
    options |= {"B": x.shape[0], "I": x.shape[1], "H": w_hh.shape[1], "input_precision": input_precision}
    return plan_single(cells.get(cell), **options)


def one_launch(cell: str, x: Tensor, w_hh: Tensor, precision: str, input_precision: str) -> bool:
    """Whether one step of x [B, I] is cheaper by single_forward than by a product and scan_forward."""
    if unfit(cells.get(cell), x.shape[1], w_hh.shape[1]) is not None:
        return False
    return single_plan(cell, x, w_hh, precision, input_precision).cheaper


scan_forward = torch.library.custom_op("seqcells::scan_forward", _scan_forward, mutates_args=())
scan_forward.register_fake(_scan_forward_fake)
scan_backward = torch.library.custom_op("seqcells::scan_backward", _scan_backward, mutates_args=())
scan_backward.register_fake(_scan_backward_fake)
recompute = torch.library.custom_op("seqcells::recompute", _recompute, mutates_args=())
recompute.register_fake(_recompute_fake)

single_forward = torch.library.custom_op("seqcells::single_forward", _single_forward, mutates_args=())


@single_forward.register_fake
def _(x: Tensor, w_ih: Tensor, w_hh: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(single.allocate(cells.get(others[4]), x, w_hh.shape[1], others[5]))


ENGINES["triton"] = Engine(scan_forward, scan_backward, recompute, single_forward)
batching.register(*ENGINES["triton"][:3])

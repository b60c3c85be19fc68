"""The kernels as torch.library custom ops, and the autograd.Function over them. Importing this imports triton.

Why both: the ops carry the fakes that torch.compile and torch.export trace; the Function carries the gradient, so that
backward's big products are ordinary matmuls that a compiler sees. One op a direction: a dispatch costs tens of
microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import reference
from .kernels import cells, scan
from .kernels.cells import Cell
from .kernels.plan import Plan, plan


def plan_for(cell: Cell, batch: int, u: Tensor, schedule: str, precision: str) -> Plan:
    """The plan of a scan with these recurrent weights. schedule: "" chooses. Raises ValueError as `plan` does."""
    facts = scan.device_facts(u.device)
    return plan(cell.gates, batch, u.shape[1], u.element_size(), facts, schedule or None, precision)


def _scan_forward(
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    resets: Tensor | None,
    cell: str,
    save: str,
    schedule: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.scan.forward."""
    declared = cells.get(cell)
    chosen = plan_for(declared, gx.shape[1], u, schedule, precision)
    return tuple(scan.forward(declared, gx, u, bias, h0, c0, resets, save=save, plan=chosen, precision=precision))  # type: ignore[return-value]


def _scan_forward_fake(gx: Tensor, *others: Any) -> tuple[Tensor, ...]:
    cell, save = others[5:7]
    return tuple(scan.allocate(cells.get(cell), gx, save))


def _scan_backward(
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    u: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    resets: Tensor | None,
    cell: str,
    schedule: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.scan.backward."""
    declared = cells.get(cell)
    chosen = plan_for(declared, y.shape[1], u, schedule, precision)
    return tuple(scan.backward(declared, dy, dhn, dcn, u, y, c, saved, resets, plan=chosen, precision=precision))  # type: ignore[return-value]


def _scan_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    y, cell = arguments[4], arguments[8]
    return tuple(scan.allocate_gradients(cells.get(cell), y))


def _recompute(
    gx: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, resets: Tensor | None, cell: str
) -> Tensor:
    """See kernels.scan.recompute."""
    declared = cells.get(cell)
    chosen = plan_for(declared, y.shape[1], u, "", "ieee")
    return scan.recompute(declared, gx, u, bias, y, c, resets, plan=chosen)


def _recompute_fake(
    gx: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, resets: Tensor | None, cell: str
) -> Tensor:
    return scan.allocate_saved(cells.get(cell), gx)


scan_forward = torch.library.custom_op("seqcells::scan_forward", _scan_forward, mutates_args=())
scan_forward.register_fake(_scan_forward_fake)
scan_backward = torch.library.custom_op("seqcells::scan_backward", _scan_backward, mutates_args=())
scan_backward.register_fake(_scan_backward_fake)
recompute = torch.library.custom_op("seqcells::recompute", _recompute, mutates_args=())
recompute.register_fake(_recompute_fake)


def input_projection(
    cell: Cell, x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """gx [T, B, G*H] with every bias that only adds, by one GEMM; and b_hh of the inner gates, which does not."""
    if b_hh is None:
        return linear(x, w_ih, b_ih), None
    if not cell.inner:
        return linear(x, w_ih, b_hh if b_ih is None else b_ih + b_hh), None
    plain, inner = b_hh.tensor_split([(cell.gates - cell.inner) * (b_hh.shape[0] // cell.gates)])
    bias = torch.cat([plain, torch.zeros_like(inner)])
    return linear(x, w_ih, bias if b_ih is None else b_ih + bias), inner


class _Scan(torch.autograd.Function):
    """x, h0, c0, w_ih, w_hh, b_ih, b_hh, resets and four options to (y, h_n[, c_n]), through the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, resets, name, save, schedule, precision = inputs
        cell = cells.get(name)
        gx, bias = input_projection(cell, x, w_ih, b_ih, b_hh)
        out = scan_forward(gx, w_hh, bias, h0, c0, resets, name, save, schedule, precision)
        y, c, saved, hn, cn = out
        if save == "states" and cell.saved:
            saved = None
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, resets, y, c, saved)
        ctx.set_materialize_grads(False)
        ctx.options = name, schedule, precision
        return (y[1:], hn, cn) if cell.states == 2 else (y[1:], hn)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        name, schedule, precision = ctx.options
        nothing = (None,) * 5
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(name, ctx.saved_tensors[:8], ctx.needs_input_grad, grads), *nothing
        x, _, _, w_ih, w_hh, b_ih, b_hh, resets, y, c, saved = ctx.saved_tensors
        cell = cells.get(name)
        if saved is None:
            gx, bias = input_projection(cell, x, w_ih, b_ih, b_hh)
            saved = recompute(gx, w_hh, bias, y, c, resets, name)
        dy, dhn, dcn = grads if cell.states == 2 else (*grads, None)
        out = scan_backward(dy, dhn, dcn, w_hh, y, c, saved, resets, name, schedule, precision)
        dgx, dhu, m, dh0, dc0 = out
        need = ctx.needs_input_grad
        dx = dgx @ w_ih if need[0] else None
        flat = dgx.flatten(0, 1)
        dw_ih = flat.t() @ x.flatten(0, 1) if need[3] else None
        dw_hh = _recurrent_weight_gradient(cell, flat, dhu, m, scan.previous_outputs(y, resets)) if need[4] else None
        db_ih = flat.sum(0) if need[5] or need[6] else None
        db_hh = None
        if need[6] and db_ih is not None:
            plain = db_ih[: (cell.gates - cell.inner) * y.shape[2]]
            db_hh = torch.cat([plain, dhu.flatten(0, 1).sum(0)]) if cell.inner else db_ih.clone()
        # The optional inputs answer with None where they were None.
        dh0, dc0 = dh0 if need[1] else None, dc0 if need[2] else None
        return dx, dh0, dc0, dw_ih, dw_hh, db_ih if need[5] else None, db_hh, *nothing


def _recurrent_weight_gradient(cell: Cell, dgx: Tensor, dhu: Tensor, m: Tensor, h: Tensor) -> Tensor:
    """[G*H, H], by one GEMM a kind of gate: with h U^T added, with it used inside, and of the second product."""
    H = h.shape[2]
    h = h.flatten(0, 1)
    parts = [dgx[:, : (cell.split - cell.inner) * H].t() @ h]
    if cell.inner:
        parts.append(dhu.flatten(0, 1).t() @ h)
    if cell.split < cell.gates:
        parts.append(dgx[:, cell.split * H :].t() @ m.flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _differentiable_gradients(
    name: str, saved: tuple[Tensor | None, ...], need: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients once more through the reference, so that they can be differentiated."""
    *inputs, resets = saved
    # Aliases, so that an input computed from another does not hand it its own share a second time.
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = aliases = [None if t is None else t.view_as(t) for t in inputs]
    assert x is not None and w_ih is not None and w_hh is not None
    zero = x.new_zeros(x.shape[1], w_hh.shape[1])
    states = (zero if h0 is None else h0, zero if c0 is None else c0)[: cells.get(name).states]
    y, last = reference.scan(reference.get(name).step, x, states, w_ih, w_hh, b_ih, b_hh, resets=resets)
    final = [s[None] for s in last]
    pairs = [(o, g) for o, g in zip((y, *final), grads, strict=True) if g is not None and o.requires_grad]
    wanted = [t for t, n in zip(aliases, need, strict=False) if n and t is not None]
    outputs, outer = [o for o, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outputs, wanted, outer, create_graph=True, allow_unused=True))
    return tuple(next(found) if n and t is not None else None for t, n in zip(aliases, need, strict=False))


def apply(
    x: Tensor,
    states: tuple[Tensor | None, ...],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    resets: Tensor | None,
    *,
    cell: str,
    save: str,
    schedule: str,
    precision: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y [T, B, H] and the final states [1, B, H], by the kernels. Arguments are taken as checked."""
    h0, c0 = states if len(states) == 2 else (states[0], None)
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, *final = _Scan.apply(*inputs, resets, cell, save, schedule, precision)
        return y, tuple(final)
    declared = cells.get(cell)
    gx, bias = input_projection(declared, x, w_ih, b_ih, b_hh)
    y, _, _, hn, cn = scan_forward(gx, w_hh, bias, h0, c0, resets, cell, "none", schedule, precision)
    return y[1:], (hn, cn) if declared.states == 2 else (hn,)

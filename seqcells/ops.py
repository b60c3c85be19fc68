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
from .kernels.plan import KNOWN, Plan, plan  # noqa: F401  (functional names them)


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
    resets: Tensor | None,
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
    return tuple(scan.forward(declared, gx, u, bias, h0, c0, resets, save=save, **options))  # type: ignore[return-value]


def _scan_forward_fake(gx: Tensor, *others: Any) -> tuple[Tensor, ...]:
    cell, save, reversed = others[5:8]
    return tuple(scan.allocate(cells.get(cell), gx, save, reversed))


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
    reversed: int,
    schedule: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels.scan.backward."""
    declared = cells.get(cell)
    options: Any = {"plan": plan_for(declared, y.shape[1], u, schedule, precision, True)}
    options |= {"reversed": reversed, "precision": precision}
    return tuple(scan.backward(declared, dy, dhn, dcn, u, y, c, saved, resets, **options))  # type: ignore[return-value]


def _scan_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    y, cell, reversed = arguments[4], *arguments[8:10]
    return tuple(scan.allocate_gradients(cells.get(cell), y, reversed))


def _recompute(
    gx: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, resets: Tensor | None, cell: str, reversed: int
) -> Tensor:
    """See kernels.scan.recompute."""
    declared = cells.get(cell)
    chosen = plan_for(declared, y.shape[1], u, "", "ieee", False)
    return scan.recompute(declared, gx, u, bias, y, c, resets, plan=chosen, reversed=reversed)


def _recompute_fake(
    gx: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, resets: Tensor | None, cell: str, reversed: int
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
    """gx [T, B, K, G*H] with every bias that only adds, by one GEMM; and b_hh of the inner gates [K, inner*H], which
    does not. x [T, B, I] for all groups, or [T, B, K, I]; w_ih [K, G*H, I]."""
    K, GH = w_ih.shape[:2]
    bias, inner = b_ih, None
    if b_hh is not None:
        adds = b_hh
        if cell.inner:
            plain = GH - cell.inner * (GH // cell.gates)
            inner = b_hh[:, plain:]
            adds = torch.cat([b_hh[:, :plain], torch.zeros_like(inner)], 1)
        bias = adds if b_ih is None else b_ih + adds
    if x.dim() == 3:
        gx = linear(x, w_ih.reshape(K * GH, -1), None if bias is None else bias.reshape(-1))
        return gx.unflatten(2, (K, GH)), inner
    gx = torch.einsum("tbki,kgi->tbkg", x, w_ih)
    return (gx if bias is None else gx + bias).contiguous(), inner


class _Scan(torch.autograd.Function):
    """x, h0, c0, w_ih, w_hh, b_ih, b_hh, resets and five options to (y, h_n[, c_n]), through the kernels.

    The shapes of `apply`: with a leading axis of groups everywhere, or without.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, resets, *options = inputs
        _, save, reversed, *_ = options
        out, cell = _run(*inputs)
        y, c, saved, hn, cn = out
        kept = None if save == "states" and cell.saved else saved
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, resets, y, c, kept)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return _visible(y, hn, cn, cell, reversed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        name, _, reversed, schedule, precision = ctx.options
        need, nothing = ctx.needs_input_grad, (None,) * 6
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(name, reversed, ctx.saved_tensors[:8], need, grads), *nothing
        x, _, _, *weights, resets, y, c, saved = ctx.saved_tensors
        w_ih, w_hh, b_ih, b_hh = _grouped(*weights)
        assert w_ih is not None and w_hh is not None
        cell = cells.get(name)
        if saved is None:
            gx, bias = input_projection(cell, x, w_ih, b_ih, b_hh)
            saved = recompute(gx, w_hh, bias, y, c, resets, name, reversed)
        dy, dhn, dcn = grads if cell.states == 2 else (*grads, None)
        out = scan_backward(dy, dhn, dcn, w_hh, y, c, saved, resets, name, reversed, schedule, precision)
        dgx, dhu, m, dh0, dc0 = out
        K, H = y.shape[2:]
        dx = dw_ih = dw_hh = db_ih = db_hh = None
        if x.dim() == 3:
            flat = dgx.flatten(2).flatten(0, 1)
            dx = dgx.flatten(2) @ w_ih.flatten(0, 1) if need[0] else None
            dw_ih = flat.t() @ x.flatten(0, 1) if need[3] else None
        else:
            dx = torch.einsum("tbkg,kgi->tbki", dgx, w_ih) if need[0] else None
            dw_ih = torch.einsum("tbkg,tbki->kgi", dgx, x) if need[3] else None
        if need[4]:
            each = [_recurrent_weight_gradient(cell, dgx, dhu, m, y, resets, reversed, k) for k in range(K)]
            dw_hh = each[0] if K == 1 else torch.stack(each)
        if need[5] or need[6]:
            db_ih = dgx.sum((0, 1))
        if need[6] and db_ih is not None:
            plain = db_ih[:, : (cell.gates - cell.inner) * H]
            db_hh = torch.cat([plain, dhu.sum((0, 1))], 1) if cell.inner else db_ih.clone()
        found = [dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh]
        # In the shapes the inputs had; the optional ones answer with None where they were None.
        given = ctx.saved_tensors[:7]
        return *(
            g.view(t.shape) if n and g is not None and t is not None else None
            for g, t, n in zip(found, given, need, strict=False)
        ), *nothing


def _grouped(*tensors: Tensor | None) -> list[Tensor | None]:
    """Weights [G*H, .] with a leading axis of one group; those [K, G*H, .] as they are. w_ih, w_hh, b_ih, b_hh."""
    w_hh = tensors[1]
    assert w_hh is not None
    return list(tensors) if w_hh.dim() == 3 else [None if t is None else t[None] for t in tensors]


def _run(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, *others: Any
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Cell]:
    """What scan_forward gives for `apply`'s arguments."""
    *weights, resets, name, save, reversed, schedule, precision = others
    cell = cells.get(name)
    w_ih, w_hh, b_ih, b_hh = _grouped(*weights)
    assert w_ih is not None
    gx, bias = input_projection(cell, x, w_ih, b_ih, b_hh)
    K, B = gx.shape[2], gx.shape[1]
    h0, c0 = (None if s is None else s.reshape(K, B, s.shape[-1]) for s in (h0, c0))
    return scan_forward(gx, w_hh, bias, h0, c0, resets, name, save, reversed, schedule, precision), cell


def _visible(y: Tensor, hn: Tensor, cn: Tensor, cell: Cell, reversed: int) -> tuple[Tensor, ...]:
    """y [T, B, K*H] and the final states."""
    y = scan.outputs(y, reversed).flatten(2)
    return (y, hn, cn) if cell.states == 2 else (y, hn)


def _recurrent_weight_gradient(
    cell: Cell, dgx: Tensor, dhu: Tensor, m: Tensor, y: Tensor, resets: Tensor | None, reversed: int, k: int
) -> Tensor:
    """[G*H, H] of group k, by one GEMM a kind of gate: with h U^T added, with it used inside, of the second product."""
    H = y.shape[3]
    h = scan.previous_outputs(y, resets, reversed, k).flatten(0, 1)
    d = dgx[:, :, k].flatten(0, 1)
    parts = [d[:, : (cell.split - cell.inner) * H].t() @ h]
    if cell.inner:
        parts.append(dhu[:, :, k].flatten(0, 1).t() @ h)
    if cell.split < cell.gates:
        parts.append(d[:, cell.split * H :].t() @ m[:, :, k].flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _differentiable_gradients(
    name: str,
    reversed: int,
    saved: tuple[Tensor | None, ...],
    need: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients once more through the reference, so that they can be differentiated."""
    *inputs, resets = saved
    # Aliases, so that an input computed from another does not hand it its own share a second time.
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = aliases = [None if t is None else t.view_as(t) for t in inputs]
    assert x is not None and w_ih is not None and w_hh is not None
    spec = reference.get(name)
    zero = x.new_zeros(*w_hh.shape[:-2], x.shape[1], w_hh.shape[-1])
    states = (zero if h0 is None else h0, zero if c0 is None else c0)[: spec.states]
    y, final = reference.scan_groups(spec.step, x, states, w_ih, w_hh, b_ih, b_hh, resets=resets, reversed=reversed)
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
    reversed: int,
    schedule: str,
    precision: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y [T, B, K*H] and the final states [K, B, H], by the kernels. Arguments are taken as checked.

    w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H], states [K, B, H], x [T, B, I] or [T, B, K, I]; of one group
    also without their K.
    """
    h0, c0 = states if len(states) == 2 else (states[0], None)
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y, *final = _Scan.apply(*inputs, resets, cell, save, reversed, schedule, precision)
        return y, tuple(final)
    out, declared = _run(*inputs, resets, cell, "none", reversed, schedule, precision)
    y, *final = _visible(out[0], *out[3:], declared, reversed)
    return y, tuple(final)

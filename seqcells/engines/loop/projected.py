"""The loop over an input that is already projected, in the kernels' buffers (`kernels.buffers`).

It replaces a kernel that fails (see `fallback`). u [K, products*H, H] is in the order of the products. What is saved is
[T, B, K, saved*H], in the loop's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.buffers import Gradients, Scanned, is_reversed, outputs
from . import steps
from .gradients import Sums, scan_back
from .layer import Group, column_order
from .stretches import RowOrder, row_order


def _group(tensors: Sequence[Any], cell: str, k: int, reversed: int) -> Group:
    """Group k, from gx (for backward, any tensor of its shape), u, bias, mask and params."""
    gx, u, bias, mask, params = tensors
    (T, B), H, columns = gx.shape[:2], u.shape[2], column_order(cell, projected=True)
    exact = steps.computed_in(u.dtype)
    order = row_order(mask, is_reversed(k, reversed), T, B, gx.device, steps.most_rows(H, gx.device))
    vectors = () if params is None else params[k].to(exact).split(H)
    apart = None if bias is None else bias[k].to(exact).view(-1, H)
    return Group(columns, columns.part, order, H, u[k].to(exact), vectors, apart, gx[:, :, k].flatten(0, 1))


def _states(group: Group, y: Tensor, c: Tensor, k: int, reversed: int) -> tuple[Tensor, Tensor | None]:
    """Group k's buffers, in the order of its rows, from the kernels' y and c."""
    order, first = group.order, -1 if is_reversed(k, reversed) else 0

    def buffer(of: Tensor) -> Tensor:
        found = of.new_empty(order.head + order.rows, of.shape[3])
        order.fill(found, outputs(of, reversed)[:, :, k].flatten(0, 1), of[first, :, k])
        return found

    return buffer(y), buffer(c) if group.part.states > 1 else None


def forward(tensors: Sequence[Any], starts: Sequence[Tensor | None], cell: str, save: str, reversed: int) -> Scanned:
    """tensors: gx, u, bias, mask, params; starts: h0, c0."""
    gx, u = tensors[:2]
    (T, B, K), H, part = gx.shape[:3], u.shape[2], column_order(cell).part
    rows, C = T + (2 if reversed else 1), (part.states - 1) * H
    widths = (H, C)[: part.states]
    finals = [u.new_empty(K, B, width) for width in widths]
    buffers = [u.new_zeros(rows, B, K, width) for width in widths]
    saved = u.new_empty(T, B, K, part.saved * H) if part.saved and save == "gates" else u.new_empty(0)
    for k in range(K):
        group = _group(tensors, cell, k, reversed)
        order = group.order
        states = [u.new_empty(order.head + order.rows, width) for width in widths]
        for state, start in zip(states, starts, strict=False):
            order.begin(state, None if start is None else start[k])
        gates = u.new_empty(order.rows, part.saved * H) if saved.dim() > 1 else None
        with torch.inference_mode():
            steps.scan(group, states[0], states[1] if C else None, gates)
        for buffer, final, state in zip(buffers, finals, states, strict=True):
            back = is_reversed(k, reversed)
            buffer[-1 if back else 0, :, k] = state[:B]
            buffer[1 : T + 1, :, k] = _placed(order, state, back).view(T, B, -1)
            final[k] = order.final(state)
        if gates is not None:
            saved[:, :, k] = order.placed(gates).view(T, B, -1)
    none = u.new_empty(0)
    y, c = (*buffers, none)[:2]
    return Scanned(y, none if save == "none" else c, saved, *(*finals, none)[:2])


def _placed(order: RowOrder, state: Tensor, back: bool) -> Tensor:
    """A buffer's states after each step [T*B, .]; at padding zero, or, in a reversed group, the initial state."""
    if not back or order.start is None or order.target is None:
        return order.placed_states(state)
    B, target = order.batch, order.target
    return state.index_select(0, torch.where(target == B, torch.arange(len(target), device=target.device) % B, target))


def backward(
    grads: Sequence[Tensor | None], tensors: Sequence[Any], states: Sequence[Tensor], cell: str, reversed: int
) -> Gradients:
    """grads: dy, dhn, dcn, dcs. tensors: u, mask, params. states: y, c, saved."""
    (u, mask, params), (y, c, saved), (dy, dhn, dcn, dcs) = tensors, states, grads
    T, (B, K, H), part = outputs(y, reversed).shape[0], y.shape[1:], column_order(cell).part
    C, exact = (part.states - 1) * H, steps.computed_in(y.dtype)
    gx = y.new_empty(1).expand(T, B, K, part.gates * H)

    def tiles(count: int) -> Tensor:
        return y.new_empty(T, B, K, count * H) if count else y.new_empty(0)

    dparams = y.new_empty(K, part.params * H, dtype=exact) if part.params else y.new_empty(0)
    starts = y.new_empty(K, B, H), y.new_empty(K, B, C) if C else y.new_empty(0)
    out = Gradients(tiles(part.gates), tiles(len(part.apart)), tiles(part.operands), *starts, dparams)
    need = (False, True, part.states > 1, *(False,) * 4, params is not None, True)
    for k in range(K):
        group = _group((gx, u, None, mask, params), cell, k, reversed)
        order = group.order
        gates = order.of(saved[:, :, k].flatten(0, 1), 0, order.rows) if part.saved else None
        sums = _SumsAndOperands(group, need, y)
        rows = [None if d is None else d[:, :, k].flatten(0, 1) for d in (dy, dcs)]
        finals = [None if d is None else d[k] for d in (dhn, dcn)]
        found = scan_back(group, group.states(*_states(group, y, c, k, reversed), gates), rows, finals, sums)
        _, dh0, dc0, *_, of_params, dgx = sums.results(found, need)
        for into, of in ((out.dh0, dh0), (out.dc0, dc0), (out.dparams, of_params)):
            if of is not None:
                into[k] = of
        for buffer, of in zip(out[:3], (dgx, *map(order.placed, (sums.dhu, sums.m))), strict=True):
            if buffer.dim() > 1:
                assert of is not None
                buffer[:, :, k] = of.view(T, B, -1)
    return out


class _SumsAndOperands(Sums):
    """Also collects the gradients of the products apart, and the operands that are not states."""

    def __init__(self, group: Group, need: Sequence[bool], like: Tensor) -> None:
        super().__init__(group, need)
        N, H, part = group.order.rows, group.H, group.part
        self.dhu, self.m = (like.new_empty(N, n * H) for n in (len(part.apart), part.operands))

    def collect(self, a: int, b: int, p: Tensor, others: Any, h: Tensor, c: Any) -> None:
        super().collect(a, b, p, others, h, c)
        part, H = self.group.part, self.group.H
        for n, column in enumerate(part.apart_grads):
            self.dhu[a:b, n * H : (n + 1) * H] = p[:, column * H : (column + 1) * H]
        for n, operand in enumerate(part.stored(others)):
            self.m[a:b, n * H : (n + 1) * H] = operand


def recompute(tensors: Sequence[Any], states: tuple[Tensor, Tensor], cell: str, reversed: int) -> Tensor:
    """Recompute what is saved from the states. tensors: gx, u, bias, mask, params; states: y, c."""
    (T, B, K), y, part = tensors[0].shape[:3], states[0], column_order(cell).part
    if not part.saved:
        return y.new_empty(0)
    saved = y.new_empty(T, B, K, part.saved * y.shape[3])
    for k in range(K):
        group = _group(tensors, cell, k, reversed)
        gates = group.states(*_states(group, *states, k, reversed), None)(0, group.order.rows)[4]
        saved[:, :, k] = group.order.placed(gates.to(y.dtype)).view(T, B, -1)
    return saved

"""The loop engine's backward. The weights' gradients are summed piece by piece, right after the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...autograd import Options
from ...kernels.buffers import is_reversed
from ...products import blocks
from . import steps
from .layer import Group, Inputs, column_order, layer_group
from .stretches import row_order

Gradients = tuple["Tensor | None", ...]


def scan_backward(
    options: Options,
    inputs: Inputs,
    mask: Tensor | None,
    buffers: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    need: Sequence[bool],
    samples: int,
) -> Gradients:
    """`backward` with the buffers of `layer.scan`."""
    x, h0, c0, w_ih = inputs[:4]
    y, c, saved = buffers
    assert x is not None and w_ih is not None and y is not None
    (T, B), K, H = x.shape[:2], *y.shape[2:]
    back = [is_reversed(k, options.reversed) for k in range(K)]
    orders = {of: row_order(mask, of, T, B, x.device, steps.most_rows(H, x.device)) for of in set(back)}
    of_group = [orders[of] for of in back]
    rows, head = of_group[0].rows, of_group[0].head
    states: list[Tensor | None] = []
    for placed, start in ((y, h0), (c, c0)):
        if placed is None or placed.dim() == 1:
            states.append(None)
            continue
        states.append(buffer := x.new_empty(K, head + rows, placed.shape[3]))
        for k, order in enumerate(of_group):
            order.fill(buffer[k], placed[:, :, k].flatten(0, 1), None if start is None else start[k])
    gates = None
    if saved is not None and saved.dim() > 1:
        gates = torch.stack([o.of(saved[:, :, k].flatten(0, 1), 0, rows) for k, o in enumerate(of_group)])
    options = replace(options, notes={"orders": orders})
    return backward(options, inputs, mask, (*states, gates), grads, need, samples)


def backward(
    options: Options,
    inputs: Inputs,
    mask: Tensor | None,
    buffers: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    need: Sequence[bool],
    samples: int = 1,
) -> Gradients:
    """The engine's backward: see autograd.Engine. samples: as in scan_backward.

    buffers: those of `layer.forward`; if saved is None, it is recomputed.
    """
    x, w_ih, given = inputs[0], inputs[3], inputs[8]
    assert x is not None and w_ih is not None
    K = 1 if w_ih.dim() == 2 else w_ih.shape[0]
    columns, orders = column_order(options.cell), (options.notes or {}).pop("orders", {})
    dy, dhn, dcn, dcs = grads
    dy, dcs = (None if d is None else d.flatten(0, 1) for d in (dy, dcs))
    each = []
    for k in range(K):
        group = layer_group(columns, inputs, mask, k, is_reversed(k, options.reversed), orders, buffers[2] is None)
        y, c, gates, *finals = (None if t is None or t.dim() == 1 else t[k] for t in (*buffers, dhn, dcn))
        rows = [None if d is None else d[:, k] for d in (dy, dcs)]
        sums = Sums(group, need, samples)
        assert y is not None
        # The outputs' gradients are in the order of time.
        copies = [
            None if d is None else lambda into, a, b, d=d, order=group.order: into.copy_(order.of(d, a, b))
            for d in rows
        ]
        with torch.inference_mode():
            starts = steps.scan_backward(group, group.states(y, c, gates), copies, finals, sums.collect)
        each.append(sums.results(starts, need))
    dx, *others, extra = zip(*each, strict=True)
    found = [_of_groups(dx, x.dim() == 4)]
    for n, of in enumerate(others):
        axis = 1 if n >= 2 and samples > 1 else 0
        found.append(None if of[0] is None else of[0] if K == 1 else torch.stack(of, axis))
    found.append(_of_groups(extra, given is not None and given.dim() == 4))
    return tuple(found)


def _of_groups(each: Sequence[Tensor | None], apart: bool) -> Tensor | None:
    """The gradient of the groups' input: concatenated if each has its own (apart), else their sum."""
    given = [d for d in each if d is not None]  # of every group, or of none
    if not given:
        return None
    return torch.stack(given, 1) if apart else sum(given[1:], given[0])


class Sums:
    """The gradients of one group's inputs and weights, summed from those of its gates, piece by piece."""

    def __init__(self, group: Group, need: Sequence[bool], samples: int) -> None:
        self.group, order, x = group, group.order, group.x
        rows = order.head + order.rows
        columns = group.columns
        alike = columns.w_ih_back == columns.w_ih
        self.w_back = group.w_columns if alike else blocks(group.w_ih, columns.w_ih_back, group.H, 0)
        self.dx = x.new_empty(rows, x.shape[1]) if need[0] else None
        self.dgiven = None
        if need[8] and group.given is not None:
            self.dgiven = group.given.new_empty(rows, group.given.shape[1])
        self.dtype = x.dtype
        self.samples, self.weights = samples, _WeightSums(group, self.w_back, need, samples)

    def collect(self, a: int, b: int, p: Tensor, others: Sequence[Tensor], h: Tensor, c: Tensor | None) -> None:
        """See steps.scan_backward."""
        group, H, w = self.group, self.group.H, self.w_back
        head = group.order.head
        if self.dx is not None:
            place = self.dx[head + a : head + b]
            for n, (first, end, i, j) in enumerate(group.columns.runs_back):
                d = p[:, first * H : end * H]
                if n:
                    place.add_(d @ w[i * H : j * H])
                elif place.dtype == d.dtype:
                    torch.mm(d, w[i * H : j * H], out=place)
                else:
                    place.copy_(d @ w[i * H : j * H])
        if self.dgiven is not None:
            for first, end, i, j in group.columns.given_back:
                self.dgiven[head + a : head + b, i * H : j * H] = p[:, first * H : end * H]
        weights = self.weights
        x = group.rows(a, b) if weights.dw is not None else None
        pairs = group.part.products(p, others, h, c) if weights.du is not None else []
        if self.samples > 1:
            rows = group.order.by_sample(a, b, self.samples, p.device)
            p, x = _rows_of(p, rows), None if x is None else _rows_of(x, rows)
            pairs = [(_rows_of(d, rows), _rows_of(operand, rows)) for d, operand in pairs]
        weights.add(p, x, pairs)

    def results(self, starts: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
        """The 9 gradients, dx as [T*B, I]; with more than one sample, those of weights are [samples, .].

        starts: the gradients of h0 and c0.
        """
        # Copies, because these are inference tensors.
        dh0, dc0 = (s.to(self.dtype, copy=True) if n else None for s, n in zip(starts, need[1:3], strict=True))
        for d in (self.dx, self.dgiven):
            if d is not None:
                d[: self.group.order.head] = 0  # which padding reads
        dx, dgiven = (None if d is None else self.group.order.placed_states(d) for d in (self.dx, self.dgiven))
        return dx, dh0, dc0, *self.weights.results(self.dtype), dgiven


def _rows_of(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of t by their numbers [samples, .]; zero for numbers after its last row."""
    return torch.cat([t, t.new_zeros(1, t.shape[1])]).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _add_product(into: Tensor, d: Tensor, operand: Tensor) -> None:
    """Add d^T operand to `into`, for each sample if there are samples."""
    if d.dim() == 3:
        into.baddbmm_(d.transpose(1, 2), operand)
    else:
        into.addmm_(d.t(), operand)


class _WeightSums:
    """The gradients of one group's weights; with more than one sample, [samples, .]."""

    def __init__(self, group: Group, w_back: Tensor, need: Sequence[bool], samples: int) -> None:
        self.columns, self.part, self.H, u = group.columns, group.part, group.H, group.u
        lead = (samples,) if samples > 1 else ()
        self.dw = u.new_zeros(*lead, *w_back.shape) if need[3] else None
        self.du = u.new_zeros(*lead, *u.shape) if need[4] else None
        # The columns whose gradients are just sums over rows: those of biases and trained vectors.
        biases, vectors = need[5] or need[6], need[7] and bool(self.part.params)
        self.sums = u.new_zeros(*lead, self.part.gradient_width * self.H) if biases or vectors else None

    def add(self, p: Tensor, x: Tensor | None, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the products of some rows: of the gates' gradients with the input, and, for u, of the pairs."""
        H = self.H
        if self.dw is not None and x is not None:
            for first, end, i, j in self.columns.runs_back:
                _add_product(self.dw[..., i * H : j * H, :], p[..., first * H : end * H], x)
        if self.du is not None:
            for into, (d, operand) in zip(self.du.split([d.shape[-1] for d, _ in pairs], -2), pairs, strict=True):
                _add_product(into, d, operand)
        if self.sums is not None:
            self.sums.add_(p.sum(-2))

    def results(self, dtype: torch.dtype) -> Gradients:
        """The gradients of w_ih, w_hh, b_ih, b_hh and params, in the cell's order."""
        columns, part, H = self.columns, self.part, self.H
        dw, du, sums = (None if t is None else t.to(dtype) for t in (self.dw, self.du, self.sums))
        dw = None if dw is None else blocks(dw, columns.of_w_ih, H, -2)
        du = None if du is None else blocks(du, columns.of_w_hh, H, -2)
        if sums is None:
            return dw, du, None, None, None
        sums, dparams = sums.split([part.param_grads * H, (part.gradient_width - part.param_grads) * H], -1)
        db_ih = blocks(sums, columns.of_b_ih, H)
        if columns.of_b_hh == columns.of_b_ih:
            return dw, du, db_ih, db_ih.clone(), dparams
        db_hh = blocks(sums, columns.of_b_hh, H)
        # Gradients must not share memory.
        same = db_hh.untyped_storage().data_ptr() == db_ih.untyped_storage().data_ptr()
        return dw, du, db_ih, db_hh.clone() if same else db_hh, dparams

"""A layer by the loop, from the input to all gradients, where no compiler and no transform looks on.

The input's product and the weight gradients are formed piece by piece beside the steps that want them or made them. See
`autograd` for what the arguments are; kept are the buffers y and c (see `stretches`) and the gates, [K, rows, .].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import Options
from ..kernels.buffers import is_reversed
from ..products import blocks, hidden_size, input_biases, places
from . import steps
from .derived import get
from .stretches import Walk, walk

Run = tuple[int, int, int, int]  # columns from, to of one thing; from, to of another


def _runs(columns: Sequence[int], H: int) -> list[Run]:
    """Where tiles side by side are columns side by side: columns, and the tiles' own."""
    found: list[list[int]] = []
    for n, column in enumerate(columns):
        if found and found[-1][1] == column:
            found[-1][1] += 1
            found[-1][3] += 1
        else:
            found.append([column, column + 1, n, n + 1])
    return [tuple(k * H for k in run) for run in found]  # type: ignore[misc]


class _Group:
    """One of the groups of a layer: its input, its weights in the order of the part's columns, its walk."""

    def __init__(
        self, options: Options, inputs: tuple[Tensor | None, ...], mask: Tensor | None, k: int, w: Walk | None = None
    ) -> None:
        x, _, _, *weights, extra = inputs
        self.at, self.part = at, part = places(options.cell), get(options.cell)
        w_ih = weights[0]
        assert x is not None and w_ih is not None
        exact = steps.computed_in(x.dtype)
        mine = weights if w_ih.dim() == 2 else [None if t is None else t[k] for t in weights]
        w_ih, u, b_ih, b_hh, params = (None if t is None else t.to(exact) for t in mine)
        assert w_ih is not None
        self.H = H = hidden_size(at, w_ih, u, *inputs[1:3])
        if w is None:
            T, B = x.shape[:2]
            w = walk(mask, is_reversed(k, options.reversed), T, B, x.device, steps.most_rows(H, x.device))
        self.w = w
        self.x = (x if x.dim() == 3 else x[:, :, k]).flatten(0, 1)
        self.extra = None if extra is None else extra.flatten(0, 1)
        self.u = w_ih.new_empty(0, H) if u is None else blocks(u, at.u, H, 0)
        self.params = () if params is None else params.split(H)
        adds, apart = input_biases(at, b_ih, b_hh, H)
        self.apart = None if apart is None else apart.view(-1, H)
        self.w_ih = w_ih
        # The tiles of gx are filled in the order of their columns, so that neighbours are one product.
        self.order, self.fills = self.by_columns(part.columns[: at.x])
        self.w_fill, self.bias, self.bias_of_extra = blocks(w_ih, self.order, H, 0), None, None
        if adds is not None:
            self.bias = blocks(adds[: at.x * H], self.order, H)
            if any(n >= 0 for layer in at.b_hh for n in layer[at.x :]):
                self.bias_of_extra = adds[at.x * H :]

    def by_columns(self, columns: Sequence[int]) -> tuple[list[int], list[Run]]:
        """The tiles in the order of their columns, and runs of these."""
        order = sorted(range(len(columns)), key=columns.__getitem__)
        return order, _runs([columns[n] for n in order], self.H)

    def rows(self, a: int, b: int) -> Tensor:
        """The input of rows a to b."""
        return self.w.of(self.x, a, b).to(self.u.dtype)

    def fill(self, into: Tensor, a: int, b: int) -> None:
        """The input's product of rows a to b, and the inputs of each step."""
        x = self.rows(a, b)
        for first, end, i, j in self.fills:
            place = into[:, first:end]
            if self.bias is None:
                torch.mm(x, self.w_fill[i:j].t(), out=place)
            else:
                torch.addmm(self.bias[i:j], x, self.w_fill[i:j].t(), out=place)
        if self.extra is not None:
            given = self.w.of(self.extra, a, b).to(self.u.dtype)
            if self.bias_of_extra is not None:
                given = given + self.bias_of_extra
            for first, end, i, j in _runs(self.part.columns[self.at.x :], self.H):
                into[:, first:end] = given[:, i:j]

    def states(self, y: Tensor, c: Tensor | None, gates: Tensor | None) -> Any:
        """What steps.scan_back asks of rows; gates None: they are recomputed."""
        w, part, head = self.w, self.part, self.w.head
        operands = [*part.forth(self.u), *self.params] if part.saved and gates is None else []

        def of(a: int, b: int) -> tuple[Any, ...]:
            h, kept = w.before(y, a, b), None
            before, after = (None, None) if c is None else (w.before(c, a, b), c[head + a : head + b])
            if part.saved and gates is not None:
                kept = gates[a:b]
            elif part.saved:
                x = self.u.new_empty(b - a, part.width * self.H)
                steps.before_step(part, x, self.fill, self.apart, a, b, self.H)
                part.activate(x, h.to(x.dtype), None if before is None else before.to(x.dtype), operands)
                kept = x
                if not part.direct:
                    kept = self.u.new_empty(b - a, part.saved * self.H)
                    part.keep(kept, x, self.H)
            return h, before, y[head + a : head + b], after, kept

        return of


def forward(
    options: Options, save: str, inputs: tuple[Tensor | None, ...], mask: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor], list[Walk]]:
    """What `autograd._visible` gives, what is kept, and the walks."""
    x, *starts, w_ih = inputs[:4]
    assert x is not None and w_ih is not None
    (T, B), K = x.shape[:2], 1 if w_ih.dim() == 2 else w_ih.shape[0]
    part, at = get(options.cell), places(options.cell)
    ways: dict[bool, Walk] = {}  # groups that go the same way share a walk
    groups = []
    for k in range(K):
        back = is_reversed(k, options.reversed)
        groups.append(_Group(options, inputs, mask, k, ways.get(back)))
        ways.setdefault(back, groups[-1].w)
    rows, head, H = groups[0].w.rows, groups[0].w.head, groups[0].H
    states = [x.new_empty(K, head + rows, width * H) for width in steps.widths(part)]
    for buffer, start in zip(states, starts, strict=False):
        buffer[:, :head] = 0
        if start is not None:
            buffer[:, :B] = start.reshape(K, B, start.shape[-1])
    gates = x.new_empty(K, rows, part.saved * H) if save == "gates" and part.saved else None
    with torch.inference_mode():  # fewer questions asked in each of many small operations
        for k, group in enumerate(groups):
            y, c = states[0][k], states[1][k] if part.states > 1 else None
            kept = None if gates is None else gates[k]
            steps.scan(part, group.w, group.u, group.params, group.fill, group.apart, y, c, kept)
    walks = [group.w for group in groups]
    finals = [
        walks[0].final(of[0])[None].clone()
        if K == 1
        else torch.stack([w.final(s) for s, w in zip(of, walks, strict=True)])
        for of in states[at.output :]
    ]
    shown = [_shown(of, walks, T, B) for of in (states if options.states else states[:1])]
    if len(states) == 1:
        states.append(x.new_empty(0))
    return (shown[0], *finals, *shown[1:]), (*states, x.new_empty(0) if gates is None else gates), walks  # type: ignore[return-value]


def _shown(buffer: Tensor, walks: list[Walk], T: int, B: int) -> Tensor:
    """The states after each step [T, B, K*width], zero where padding: a tensor of its own, to be changed at will."""
    K, _, width = buffer.shape
    y = buffer.new_empty(T, B, K * width)
    for k, w in enumerate(walks):
        place = y.view(T * B, K, width)[:, k]
        if w.target is None:
            place.copy_(buffer[k, w.head :])
        elif K == 1:
            torch.index_select(buffer[k], 0, w.target, out=place)
        else:
            place.copy_(buffer[k].index_select(0, w.target))
    return y


def backward(
    options: Options,
    inputs: tuple[Tensor | None, ...],
    mask: Tensor | None,
    kept: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    need: tuple[bool, ...],
    walks: list[Walk] | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the 9 inputs, in their shapes; None where `need` says so. kept: gates None are recomputed."""
    x, w_ih = inputs[0], inputs[3]
    assert x is not None and w_ih is not None
    T, B, K = *x.shape[:2], 1 if w_ih.dim() == 2 else w_ih.shape[0]
    dy, *rest = grads
    dhn = None if places(options.cell).output else rest.pop(0)
    dcn, dcs = (*rest, None, None)[:2]
    dy, dcs = (None if d is None else d.reshape(T * B, K, d.shape[2] // K) for d in (dy, dcs))
    each = []
    for k in range(K):
        of = [None if t is None or t.dim() == 1 else t[k] for t in (*kept, dhn, dcn)]
        dys = [None if d is None else d[:, k] for d in (dy, dcs)]
        each.append(_group_back(_Group(options, inputs, mask, k, walks[k] if walks else None), need, of, dys))
    dx, *others, extra = zip(*each, strict=True)
    found = [None if dx[0] is None else sum(dx[1:], dx[0]) if x.dim() == 3 else torch.stack(dx, 1)]
    found += [None if of[0] is None else of[0] if K == 1 else torch.stack(of) for of in others]
    found.append(None if extra[0] is None else sum(extra[1:], extra[0]))
    return tuple(
        d.reshape(t.shape) if n and d is not None and t is not None else None
        for d, t, n in zip(found, inputs, need, strict=True)
    )


def _group_back(group: _Group, need: tuple[bool, ...], of: Any, dys: Any) -> tuple[Tensor | None, ...]:
    """The 9 gradients of one group, dx [T*B, I]. of: its y, c, gates, dhn, dcn; dys: its dy and dcs [T*B, .]."""
    w, u, x, H, part, at = group.w, group.u, group.x, group.H, group.part, group.at
    order, columns = group.by_columns(part.grads[: at.x])
    w_back = blocks(group.w_ih, order, H, 0)
    y, c, gates, dhn, dcn = of
    dx = x.new_empty(w.head + w.rows, x.shape[1]) if need[0] else None
    dextra = x.new_empty(w.head + w.rows, at.inputs * H) if need[8] and group.extra is not None else None
    dw = torch.zeros_like(w_back) if need[3] else None
    du = torch.zeros_like(u) if need[4] else None
    # Of the columns that are sums over rows alone: biases' and trained vectors'.
    sums = u.new_zeros(part.wide * H) if need[5] or need[6] or (need[7] and part.params) else None

    def emit(a: int, b: int, p: Tensor, others: Any, h: Tensor, c: Any) -> None:
        for n, (first, end, i, j) in enumerate(columns):
            d = p[:, first:end]
            if dx is not None:
                place = dx[w.head + a : w.head + b]
                if n:
                    place.add_(d @ w_back[i:j])
                elif dx.dtype == u.dtype:
                    torch.mm(d, w_back[i:j], out=place)
                else:
                    place.copy_(d @ w_back[i:j])
            if dw is not None:
                dw[i:j].addmm_(d.t(), group.rows(a, b))
        if dextra is not None:
            for first, end, i, j in _runs(part.grads[at.x :], H):
                dextra[w.head + a : w.head + b, i:j] = p[:, first:end]
        if du is not None:
            pairs = part.products(p, others, h, c)
            for rows, (d, operand) in zip(du.split([d.shape[1] for d, _ in pairs]), pairs, strict=True):
                rows.addmm_(d.t(), operand)
        if sums is not None:
            sums.add_(p.sum(0))

    fills = [None if d is None else w.copying(d) for d in dys]
    with torch.inference_mode():
        starts = steps.scan_back(part, w, u, group.params, group.states(y, c, gates), fills, (dhn, dcn), emit)
    # Copies, for what is made in inference mode stays of it.
    dh0, dc0 = (s.to(x.dtype, copy=True) if n else None for s, n in zip(starts, need[1:3], strict=True))
    dx, dextra = (None if d is None else _in_place(w, d) for d in (dx, dextra))
    dw, du, sums = (None if t is None else t.to(x.dtype) for t in (dw, du, sums))
    if dw is not None:
        dw = blocks(dw, _inverse(order), H, 0)
    if du is not None:  # its rows are part.rows, in the order of the kernels' products, which have at.u of w_hh
        du = blocks(du, _inverse([at.u[n] for n in part.rows]), H, 0)
    db_ih = db_hh = dparams = None
    if sums is not None:
        sums, dparams = sums.split([part.param_grads * H, (part.wide - part.param_grads) * H])
        every = blocks(sums, (*part.grads, *part.apart_grads), H)
        db_ih, db_hh = blocks(every, at.of_b_ih, H), blocks(every, at.of_b_hh, H)
        if db_hh.data_ptr() == db_ih.data_ptr():
            db_hh = db_hh.clone()
    return dx, dh0, dc0, dw, du, db_ih, db_hh, dparams, dextra


def _in_place(w: Walk, t: Tensor) -> Tensor:
    """Gradients of rows [head+N, .] where the rows are; zero where padding is."""
    t[: w.head] = 0
    return t[w.head :] if w.target is None else t.index_select(0, w.target)


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(n) for n in range(len(order))]

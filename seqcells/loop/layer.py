"""A layer by the loop, from the input to all gradients, where no compiler and no transform looks on.

The input's product and the weight gradients are formed piece by piece beside the steps that want them or made them. See
`autograd` for what the arguments are; kept are the buffers y and c (see `stretches`) and the gates, [K, rows, .].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import Options
from ..kernels.buffers import is_reversed
from ..products import input_biases, places
from . import steps
from .cells import CELLS, first_last, last_first
from .stretches import Walk, walk


class _Group:
    """One of the groups of a layer: its input, its weights in the cell's order, its walk."""

    def __init__(
        self, options: Options, inputs: tuple[Tensor | None, ...], mask: Tensor | None, k: int, w: Walk | None = None
    ) -> None:
        x, _, _, *weights = inputs[:7]
        u = weights[1]
        assert x is not None and u is not None
        exact = steps.computed_in(u.dtype)
        mine = weights if u.dim() == 2 else [None if t is None else t[k] for t in weights]
        w_ih, u, b_ih, b_hh = (None if t is None else t.to(exact) for t in mine)
        assert w_ih is not None and u is not None
        self.part: Any = CELLS[options.cell]
        self.H = H = u.shape[1]
        if w is None:
            T, B = x.shape[:2]
            w = walk(mask, is_reversed(k, options.reversed), T, B, x.device, steps.most_rows(H, x.device))
        self.w = w
        self.x = (x if x.dim() == 3 else x[:, :, k]).flatten(0, 1)
        bias, self.inner = input_biases(places(options.cell), b_ih, b_hh, H)
        if self.part.turned:
            w_ih, bias = last_first(w_ih, H), None if bias is None else last_first(bias, H)
        self.u, self.w_ih, self.bias = u, w_ih, bias

    def rows(self, a: int, b: int) -> Tensor:
        """The input of rows a to b."""
        return self.w.of(self.x, a, b).to(self.u.dtype)

    def fill(self, into: Tensor, a: int, b: int) -> None:
        """The input's product of rows a to b."""
        if self.bias is None:
            torch.mm(self.rows(a, b), self.w_ih.t(), out=into)
        else:
            torch.addmm(self.bias, self.rows(a, b), self.w_ih.t(), out=into)

    def states(self, y: Tensor, c: Tensor | None, gates: Tensor | None) -> Any:
        """What steps.scan_back asks of rows; gates None: they are recomputed."""
        w, part, head = self.w, self.part, self.w.head
        operands = part.forth(self.u) if part.saved and gates is None else ()

        def of(a: int, b: int) -> tuple[Any, ...]:
            h, kept = w.before(y, a, b), None
            if part.saved and gates is not None:
                kept = gates[a:b]
            elif part.saved:
                kept = self.u.new_empty(b - a, part.saved * self.H)
                steps.before_step(part, kept, self.fill, self.inner, a, b, self.u.shape[0])
                part.activate(kept, h.to(kept.dtype), operands)
            cs = (None, None) if c is None else (w.before(c, a, b), c[head + a : head + b])
            return h, cs[0], y[head + a : head + b], cs[1], kept

        return of

    def in_order(self, t: Tensor) -> Tensor:
        """A gradient of w_ih or its bias, in torch's order of gates."""
        return first_last(t, self.H) if self.part.turned else t


def forward(
    options: Options, save: str, inputs: tuple[Tensor | None, ...], mask: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor], list[Walk]]:
    """What `autograd._visible` gives, what is kept, and the walks."""
    x, *starts, _, u = inputs[:5]
    assert x is not None and u is not None
    T, B, H, K = *x.shape[:2], u.shape[-1], 1 if u.dim() == 2 else u.shape[0]
    part = CELLS[options.cell]
    ways: dict[bool, Walk] = {}  # groups that go the same way share a walk
    groups = []
    for k in range(K):
        back = is_reversed(k, options.reversed)
        groups.append(_Group(options, inputs, mask, k, ways.get(back)))
        ways.setdefault(back, groups[-1].w)
    rows, head = groups[0].w.rows, groups[0].w.head
    states = [x.new_empty(K, head + rows, H) for _ in range(part.states)]
    for buffer, start in zip(states, starts, strict=False):
        buffer[:, :head] = 0
        if start is not None:
            buffer[:, :B] = start.reshape(K, B, H)
    gates = x.new_empty(K, rows, part.saved * H) if save == "gates" and part.saved else None
    with torch.inference_mode():  # fewer questions asked in each of many small operations
        for k, group in enumerate(groups):
            y, c = states[0][k], states[1][k] if part.states == 2 else None
            kept = None if gates is None else gates[k]
            steps.scan(part, group.w, group.u, group.fill, group.inner, y, c, kept)
    walks = [group.w for group in groups]
    finals = [
        walks[0].final(of[0])[None].clone()
        if K == 1
        else torch.stack([w.final(s) for s, w in zip(of, walks, strict=True)])
        for of in states
    ]
    shown = [_shown(of, walks, T, B) for of in (states if options.states else states[:1])]
    if len(states) == 1:
        states.append(x.new_empty(0))
    return (shown[0], *finals, *shown[1:]), (*states, x.new_empty(0) if gates is None else gates), walks  # type: ignore[return-value]


def _shown(buffer: Tensor, walks: list[Walk], T: int, B: int) -> Tensor:
    """The states after each step [T, B, K*H], zero where padding: a tensor of its own, to be changed at will."""
    K, _, H = buffer.shape
    y = buffer.new_empty(T, B, K * H)
    for k, w in enumerate(walks):
        place = y.view(T * B, K, H)[:, k]
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
    x, _, _, _, u = inputs[:5]
    assert x is not None and u is not None
    K = 1 if u.dim() == 2 else u.shape[0]
    dy, dhn, *rest = grads
    dcn, dcs = (*rest, None, None)[:2] if CELLS[options.cell].states == 2 else (None, None)
    dy, dcs = (None if d is None else d.reshape(-1, K, u.shape[-1]) for d in (dy, dcs))
    each = []
    for k in range(K):
        of = [None if t is None or t.dim() == 1 else t[k] for t in (*kept, dhn, dcn)]
        dys = [None if d is None else d[:, k] for d in (dy, dcs)]
        each.append(_group_back(_Group(options, inputs, mask, k, walks[k] if walks else None), need, of, dys))
    dx, *others = zip(*each, strict=True)
    found = [None if dx[0] is None else sum(dx[1:], dx[0]) if x.dim() == 3 else torch.stack(dx, 1)]
    found += [None if of[0] is None else of[0] if K == 1 else torch.stack(of) for of in others]
    found += [None, None]  # its cells have neither trained vectors nor inputs
    return tuple(
        d.reshape(t.shape) if n and d is not None and t is not None else None
        for d, t, n in zip(found, inputs, need, strict=True)
    )


def _group_back(group: _Group, need: tuple[bool, ...], of: Any, dys: Any) -> tuple[Tensor | None, ...]:
    """The 7 gradients of one group, dx [T*B, I]. of: its y, c, gates, dhn, dcn; dys: its dy and dcs [T*B, H]."""
    w, u, x, GH, H = group.w, group.u, group.x, group.u.shape[0], group.H
    y, c, gates, dhn, dcn = of
    dx = x.new_empty(w.head + w.rows, x.shape[1]) if need[0] else None
    dw = torch.zeros_like(group.w_ih) if need[3] else None
    du = torch.zeros_like(u) if need[4] else None
    db = u.new_zeros(group.part.wide * H) if need[5] or need[6] else None

    def emit(a: int, b: int, p: Tensor, others: Any, h: Tensor) -> None:
        gates = p[:, :GH]
        if dx is not None and dx.dtype == u.dtype:
            torch.mm(gates, group.w_ih, out=dx[w.head + a : w.head + b])
        elif dx is not None:
            dx[w.head + a : w.head + b] = gates @ group.w_ih
        if dw is not None:
            dw.addmm_(gates.t(), group.rows(a, b))
        if du is not None:
            pairs = group.part.products(p, others, h)
            for rows, (d, operand) in zip(du.split([d.shape[1] for d, _ in pairs]), pairs, strict=True):
                rows.addmm_(d.t(), operand)
        if db is not None:
            db.add_(p.sum(0))

    fills = [None if d is None else w.copying(d) for d in dys]
    with torch.inference_mode():
        starts = steps.scan_back(group.part, w, u, group.states(y, c, gates), fills, (dhn, dcn), emit)
    # Copies, for what is made in inference mode stays of it.
    dh0, dc0 = (s.to(x.dtype, copy=True) if n else None for s, n in zip(starts, need[1:3], strict=True))
    if dx is not None:
        dx[: w.head] = 0
        dx = dx[w.head :] if w.target is None else dx.index_select(0, w.target)
    dw, du, db = (None if t is None else t.to(x.dtype) for t in (dw, du, db))
    db_ih = db_hh = None
    if db is not None:
        db_ih = group.in_order(db[:GH])
        db_hh = db[-GH:] if group.part.saved > group.part.gates else db_ih.clone()
    return dx, dh0, dc0, None if dw is None else group.in_order(dw), du, db_ih, db_hh

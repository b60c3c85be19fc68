"""All steps of one group, forward and backward, in pieces that the CPU's caches hold.

Tensors of half precision are computed in float32: the weights, and a piece's states, gates and
gradients. They are rounded a piece at a time, when they are saved or returned. Rounding c and the gates at every step
would make y's error 2.7 times as large (tests/test_precision.py), and is slower on CPUs without bfloat16 products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .stretches import RowOrder, by_step

if TYPE_CHECKING:
    from .layer import Group

CHUNK = 1 << 16  # elements of a state in a piece: a buffer of all steps would not stay in the caches

CopyRows = Callable[[Tensor, int, int], object]  # (into, a, b): copies rows a to b of a RowOrder
States = Callable[[int, int], "tuple[Tensor | None, ...]"]
Collect = Callable[[int, int, Tensor, Sequence[Tensor], Tensor, "Tensor | None"], None]


def most_rows(H: int, device: torch.device) -> int:
    """The maximum number of rows of a piece, and of a batch of stretches."""
    return max(1, CHUNK // H) if device.type == "cpu" else 1 << 40


def _pieces(order: RowOrder, like: Tensor) -> tuple[list[list[tuple[int, int, int, int]]], int]:
    """The pieces (see RowOrder.pieces), and the number of rows of the largest."""
    found = order.pieces(most_rows(like.shape[1], like.device))
    return found, max((b - a for of_batch in found for _, _, a, b in of_batch), default=0)


def scan(group: Group, y: Tensor, c: Tensor | None, saved: Tensor | None) -> None:
    """Fill y, c (None for a cell with one state) [head+N, .], whose heads contain the initial states, and saved
    [N, saved*H] unless it is None."""
    part, order, u = group.part, group.order, group.u
    (pieces, largest), H = _pieces(order, y), y.shape[1]
    operands = [*part.forward_weights(u), *group.params]
    rounded = y.dtype != u.dtype
    scratch = u.new_empty(part.scratch_forward, max(order.sizes, default=0), H)
    own = rounded or saved is None or not part.saves_all  # x needs a buffer, which all pieces reuse
    gates = u.new_empty(largest, part.width * H) if own or saved is None else saved
    exact = [None if s is None or not rounded else u.new_empty(largest, s.shape[1]) for s in (y, c)]
    for (_, _, i, j), of_batch in zip(order.batches, pieces, strict=True):
        h, c_now = (None if s is None else order.starts(s, i, j).to(u.dtype) for s in (y, c))
        for begin, end, a, b in of_batch:
            x = gates[: b - a] if own else gates[a:b]
            rows = [None if s is None else s[order.head + a : order.head + b] for s in (y, c)]
            outs, cs = (r if e is None else e[: b - a] for r, e in zip(rows, exact, strict=True))
            assert outs is not None
            group.project(x if part.width else outs, a, b)
            h, c_now = part.forward(order.sizes[begin:end], x, h, c_now, outs, cs, operands, scratch)
            if rounded:
                for into, t in zip(rows, (outs, cs), strict=True):
                    if into is not None and t is not None:
                        into.copy_(t)
                # Copied, because the next piece overwrites them.
                h, c_now = (None if s is None else s.clone() for s in (h, c_now))
            if saved is not None and own:
                if part.saves_all:
                    saved[a:b].copy_(x)
                else:
                    part.save(saved[a:b], x, H)


def scan_backward(
    group: Group,
    states: States,
    of_rows: Sequence[CopyRows | None],
    of_finals: Sequence[Tensor | None],
    collect: Collect,
) -> tuple[Tensor, Tensor]:
    """The gradients of the initial states h0 [B, H] and c0 [B, (states-1)*H] (meaningless for a cell with one state),
    in the dtype of group.u.

    states: a function that returns (h, c before, y, c after, saved) of rows a to b. of_rows: functions that copy the
    gradients of outputs and of the other states; None means zero. of_finals: the gradients of the final states.
    collect: a function that is called with rows a to b, their gates' gradients, `others` (see `cells`), and their h and
    c before, in the dtype of group.u.
    """
    part, order, u = group.part, group.order, group.u
    (pieces, largest), H = _pieces(order, u), u.shape[1]
    operands = [*part.backward_weights(u), *group.params]
    (dy, dcs), (dhn, dcn) = of_rows, of_finals
    C = part.states - 1
    p, dh, of_cells = (u.new_empty(largest, n * H) for n in (part.gradient_width, 1, 0 if dcs is None else C))
    carried = u.new_zeros(order.stretches, H)
    scratch = u.new_empty(part.scratch_backward, max(order.sizes, default=0), H)
    ends = order.by_stretch(dhn, carried) if dhn is not None else carried
    dc = order.by_stretch(dcn, u.new_empty(0, C * H)) if C else carried
    for (_, last, i, j), of_batch in reversed(list(zip(order.batches, pieces, strict=True))):
        for begin, end, a, b in reversed(of_batch):
            sizes = order.sizes[begin:end]
            above = (*sizes[1:], order.sizes[end] if end < last else 0)  # the number of rows of each step's next one
            if dy is None:
                dh[: b - a].zero_()
            else:
                dy(dh[: b - a], a, b)
            each = by_step(dh[: b - a], sizes)
            if dhn is not None:
                for n, m, d in zip(sizes, above, each, strict=True):
                    if n > m:
                        d[m:].add_(ends[i + m : i + n])
            each[-1][: above[-1]].add_(carried[i : i + above[-1]])
            below = [carried[i : i + sizes[0]].zero_(), *each[:-1]]
            if sizes[0] != sizes[-1]:
                below[1:] = [d[:m] for d, m in zip(each, above[:-1], strict=False)]
            added = None
            if dcs is not None:
                dcs(of_cells[: b - a], a, b)
                added = by_step(of_cells[: b - a], sizes)
            h, c, y, after, saved = (None if t is None else t.to(u.dtype) for t in states(a, b))
            mine = p[: b - a]
            others = part.coefficients(mine, saved, h, c, y, after, group.params)
            part.backward(sizes, mine, saved, others, (each, dc[i:j], added, below), operands, scratch)
            assert h is not None
            collect(a, b, mine, others, h, c)
    dh0 = order.by_sequence(carried, dhn)
    return dh0, order.by_sequence(dc, dcn) if C else dh0

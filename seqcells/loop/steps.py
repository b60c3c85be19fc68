"""All steps of one group, forward and back, in pieces that the CPU's caches hold.

Tensors of half precision are computed in float32 (`computed_in`): the weights, and a piece's states, gates and
gradients. They are rounded a piece at a time, when they are kept or given back. Rounding c and the gates at every step
would make y's error 2.7 times as large (tests/test_precision.py), and is slower on CPUs without bfloat16 products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .stretches import Walk, by_step

CHUNK = 1 << 16  # elements of a state in a piece: a buffer of all steps would go through memory, and back

Fill = Callable[[Tensor, int, int], object]  # (into, a, b): rows a to b of a walk


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What steps on tensors of that dtype are computed in."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def most_rows(H: int, device: torch.device) -> int:
    """Of a piece, and of a batch of stretches."""
    return max(1, CHUNK // H) if device.type == "cpu" else 1 << 40


def _pieces(w: Walk, like: Tensor) -> tuple[list[list[tuple[int, int, int, int]]], int]:
    """See Walk.pieces; and the rows of the largest."""
    found = w.pieces(most_rows(like.shape[1], like.device))
    return found, max((b - a for of_batch in found for _, _, a, b in of_batch), default=0)


def widths(part: Any) -> tuple[int, ...]:
    """In units of H: of the first state, and of all others side by side, if there are."""
    return (1, part.states - 1)[: 2 if part.states > 1 else 1]


def scan(
    part: Any,
    w: Walk,
    u: Tensor,
    params: Sequence[Tensor],
    fill: Fill,
    bias: Tensor | None,
    y: Tensor,
    c: Tensor | None,
    kept: Tensor | None,
) -> None:
    """Fills y and c (None: a cell of one state) [head+N, .], in whose head are the starts, and kept [N, saved*H], if
    any.

    part: see `cells`. u [products*H, H], params [H] each, in what is computed in. fill: gx with every bias that only
    adds, into part.columns of H. bias: of the products apart [., H].
    """
    (pieces, largest), H = _pieces(w, y), y.shape[1]
    operands = [*part.forth(u), *params]
    rounded = y.dtype != u.dtype
    spare = u.new_empty(part.spares, max(w.sizes, default=0), H)
    own = rounded or kept is None or not part.direct  # a buffer for x, for one piece after another
    scratch = u.new_empty(largest, part.width * H) if own or kept is None else kept
    exact = [None if s is None or not rounded else u.new_empty(largest, s.shape[1]) for s in (y, c)]
    for (_, _, i, j), of_batch in zip(w.batches, pieces, strict=True):
        h, c_now = (None if s is None else w.starts(s, i, j).to(u.dtype) for s in (y, c))
        for begin, end, a, b in of_batch:
            x = scratch[: b - a] if own else scratch[a:b]
            rows = [None if s is None else s[w.head + a : w.head + b] for s in (y, c)]
            outs, cs = (r if e is None else e[: b - a] for r, e in zip(rows, exact, strict=True))
            before_step(part, x if part.width else outs, fill, bias, a, b, H)
            h, c_now = part.walk(w.sizes[begin:end], x, h, c_now, outs, cs, operands, spare)
            if rounded:
                for into, t in zip(rows, (outs, cs), strict=True):
                    if into is not None and t is not None:
                        into.copy_(t)
                # The next piece is written over them.
                h, c_now = (None if s is None else s.clone() for s in (h, c_now))
            if kept is not None and own:
                keep(part, kept[a:b], x, H)


def keep(part: Any, into: Tensor, x: Tensor, H: int) -> None:
    """Copies what is kept of x."""
    if part.direct:
        into.copy_(x)
    else:
        part.keep(into, x, H)


def before_step(part: Any, x: Any, fill: Fill, bias: Tensor | None, a: int, b: int, H: int) -> None:
    """What x's rows a to b have before a recurrent product is added."""
    fill(x, a, b)
    for n, column in enumerate(part.apart):
        x[:, column * H : (column + 1) * H] = 0 if bias is None else bias[n]
    for column in part.empty:
        x[:, column * H : (column + 1) * H] = 0


def scan_back(
    part: Any,
    w: Walk,
    u: Tensor,
    params: Sequence[Tensor],
    states: Callable[[int, int], tuple[Any, ...]],
    of_rows: Sequence[Fill | None],
    of_finals: Sequence[Tensor | None],
    emit: Callable[[int, int, Tensor, Any, Tensor, Any], None],
) -> tuple[Tensor, Tensor]:
    """The gradients of the given starts h0 [B, H] and c0 [B, (states-1)*H] (of a cell with one state, the second means
    nothing).

    u, params as in `scan`; of their dtype is what is given to emit, and what is given back.
    states: (h, c before, y, c after, kept) of rows a to b. of_rows: fill in the gradients of outputs and of the other
    states; None: zero. of_finals: those of the final states. emit: is given rows a to b, their gates' gradients,
    `others` (see `cells`), and their h and c before.
    """
    (pieces, largest), H = _pieces(w, u), u.shape[1]
    operands = [*part.back_again(u), *params]
    (dy, dcs), (dhn, dcn) = of_rows, of_finals
    C = part.states - 1
    p, dh, of_cells = (u.new_empty(largest, n * H) for n in (part.wide, 1, 0 if dcs is None else C))
    carried, spare = u.new_zeros(w.stretches, H), u.new_empty(part.spares_back, max(w.sizes, default=0), H)
    ends = w.by_stretch(dhn, carried) if dhn is not None else carried
    dc = w.by_stretch(dcn, u.new_empty(0, C * H)) if C else carried
    for (_, last, i, j), of_batch in reversed(list(zip(w.batches, pieces, strict=True))):
        for begin, end, a, b in reversed(of_batch):
            sizes = w.sizes[begin:end]
            above = (*sizes[1:], w.sizes[end] if end < last else 0)  # rows of each's next step
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
            found: list[Any] = [None if t is None else t.to(u.dtype) for t in states(a, b)]
            h, c, y, after, kept = found
            mine = p[: b - a]
            others = part.factors(mine, kept, h, c, y, after, params)
            part.back(sizes, mine, kept, others, each, dc[i:j], added, below, operands, spare)
            emit(a, b, mine, others, h, c)
    dh0 = w.by_sequence(carried, dhn)
    return dh0, w.by_sequence(dc, dcn) if C else dh0

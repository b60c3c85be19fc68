"""The loop engine's forward: a layer's groups, with their weights in the order of the products. Backward: `gradients`.

The input's product is computed piece by piece, right before the steps that use it. For the arguments see `autograd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...autograd import Options
from ...kernels.buffers import is_reversed
from ...products import Places, blocks, hidden_size, places
from ..operators import call_forward
from . import steps
from .cells import CELLS
from .derived import Part, get
from .layout import runs_of
from .stretches import RowOrder, row_order

Inputs = Sequence["Tensor | None"]  # x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs; dropout masks are inputs
Buffers = tuple[Tensor, Tensor, Tensor]


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(order.index(n) for n in range(len(order)))


class ColumnOrder:
    """The order in which a cell's blocks of H rows are multiplied, and the columns of their products; one per cell.

    The product of x fills the first tiles of gx; the others are given.
    Forward: w_ih: its blocks in the order of their columns. runs: the runs of these columns; given: those of the given
    tiles. u: the blocks of w_hh in the order of the products; None: they are in that order already. b_ih, b_hh: as
    w_ih. given_b_hh: for the given tiles. one_bias: both biases are added to the same columns.
    Backward: w_ih_back, runs_back, given_back: the same for the gradients' columns. of_w_ih, of_w_hh, of_b_ih, of_b_hh:
    the blocks of a gradient in that order, rearranged to the cell's order.
    """

    def __init__(self, part: Part, at: Places) -> None:
        self.part, self.places, tiles = part, at, at.x
        self.w_ih = tuple(sorted(range(tiles), key=part.columns.__getitem__))
        self.runs, self.given = runs_of(part.columns[n] for n in self.w_ih), runs_of(part.columns[tiles:])
        self.u = None if at.u == tuple(range(len(at.u))) else at.u
        self.b_ih = tuple(at.b_ih[n] for n in self.w_ih)
        self.b_hh = [of for layer in at.b_hh if max(of := tuple(layer[n] for n in self.w_ih), default=-1) >= 0]
        self.one_bias = self.b_hh == [self.b_ih] and len(at.of_b_ih) == len(at.of_b_hh)
        self.given_b_hh = [of for layer in at.b_hh if max(of := layer[tiles:], default=-1) >= 0]
        self.w_ih_back = tuple(sorted(range(tiles), key=part.grads.__getitem__))
        self.runs_back, self.given_back = runs_of(part.grads[n] for n in self.w_ih_back), runs_of(part.grads[tiles:])
        self.of_w_ih, self.of_w_hh = _inverse(self.w_ih_back), _inverse([at.u[n] for n in part.rows])
        columns = (*part.grads, *part.apart_grads)
        self.of_b_ih, self.of_b_hh = (tuple(columns[n] for n in of) for of in (at.of_b_ih, at.of_b_hh))


_ORDERS: dict[str, ColumnOrder] = {}


def column_order(key: str) -> ColumnOrder:
    """The ColumnOrder of the cell of that key."""
    found = _ORDERS.get(key)
    if found is None or (key not in CELLS and found.part is not get(key)):
        found = _ORDERS[key] = ColumnOrder(get(key), places(key))
    return found


@dataclass
class Group:
    """One of the groups of a layer. All but x and given have the dtype of the computation.

    x [T*B, I]; w_ih in the cell's order; w_columns: w_ih in the order of columns. u [products*H, H] in the order of the
    products; params [H] each; given: the tiles of gx that are given [T*B, .*H]. Biases, for `project`: bias, that of
    w_columns; apart [., H], those of the products apart; bias_of_given, what is added to given.
    """

    columns: ColumnOrder
    part: Part
    order: RowOrder
    H: int
    x: Tensor
    w_ih: Tensor
    w_columns: Tensor
    u: Tensor
    params: Sequence[Tensor]
    given: Tensor | None
    bias: Tensor | None
    apart: Tensor | None
    bias_of_given: Tensor | None

    def rows(self, a: int, b: int) -> Tensor:
        """The input in rows a to b."""
        return self.order.of(self.x, a, b).to(self.u.dtype)

    def project(self, into: Tensor, a: int, b: int) -> None:
        """Fill x (see `cells`) for rows a to b with everything except the recurrent products."""
        H, part = self.H, self.part
        x = self.rows(a, b)
        for first, end, i, j in self.columns.runs:
            place, w = into[:, first * H : end * H], self.w_columns[i * H : j * H].t()
            if self.bias is None:
                torch.mm(x, w, out=place)
            else:
                torch.addmm(self.bias[i * H : j * H], x, w, out=place)
        if self.given is not None:
            given = self.order.of(self.given, a, b).to(self.u.dtype)
            if self.bias_of_given is not None:
                given = given + self.bias_of_given
            for first, end, i, j in self.columns.given:
                into[:, first * H : end * H] = given[:, i * H : j * H]
        for n, column in enumerate(part.apart):
            into[:, column * H : (column + 1) * H] = 0 if self.apart is None else self.apart[n]
        for column in part.zeroed:
            into[:, column * H : (column + 1) * H] = 0

    def states(self, y: Tensor, c: Tensor | None, gates: Tensor | None) -> steps.States:
        """The argument `states` of steps.scan_backward. If gates is None, they are recomputed."""
        order, part, head = self.order, self.part, self.order.head
        operands = [*part.forward_weights(self.u), *self.params] if part.saved and gates is None else []

        def of(a: int, b: int) -> tuple[Tensor | None, ...]:
            h, saved = order.before(y, a, b), None
            before, after = (None, None) if c is None else (order.before(c, a, b), c[head + a : head + b])
            if part.saved and gates is not None:
                saved = gates[a:b]
            elif part.saved:
                x = self.u.new_empty(b - a, part.width * self.H)
                self.project(x, a, b)
                part.activate(x, h.to(x.dtype), None if before is None else before.to(x.dtype), operands)
                saved = x
                if not part.saves_all:
                    saved = self.u.new_empty(b - a, part.saved * self.H)
                    part.save(saved, x, self.H)
            return h, before, y[head + a : head + b], after, saved

        return of


def layer_group(
    columns: ColumnOrder,
    inputs: Inputs,
    mask: Tensor | None,
    k: int,
    reversed: bool,
    orders: dict[bool, RowOrder],
    projects: bool = True,
) -> Group:
    """Group k. orders: the RowOrders by direction, as far as they exist; one that is made here is added.

    projects: whether `project` will be called.
    """
    x, h0, c0, *weights, given, _ = inputs
    at = columns.places
    assert x is not None and weights[0] is not None
    exact = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    mine = weights if weights[0].dim() == 2 else [None if t is None else t[k] for t in weights]
    w_ih, u, b_ih, b_hh, params = (None if t is None else t.to(exact) for t in mine)
    assert w_ih is not None
    H = hidden_size(at, w_ih, u, h0, c0)
    order = orders.get(reversed)
    if order is None:
        most = 0 if mask is None else steps.most_rows(H, x.device)
        order = orders[reversed] = row_order(mask, reversed, x.shape[0], x.shape[1], x.device, most)
    rows, given = (None if t is None else (t if t.dim() == 3 else t[:, :, k]).flatten(0, 1) for t in (x, given))
    assert rows is not None
    if u is None:
        u = w_ih.new_empty(0, H)
    elif columns.u is not None:
        u = blocks(u, columns.u, H, 0)
    vectors = () if params is None else params.split(H)
    biases = _biases(columns, b_ih, b_hh, H) if projects else (None, None, None)
    w_columns = blocks(w_ih, columns.w_ih, H, 0)
    return Group(columns, columns.part, order, H, rows, w_ih, w_columns, u, vectors, given, *biases)


def _biases(
    columns: ColumnOrder, b_ih: Tensor | None, b_hh: Tensor | None, H: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A Group's bias, apart and bias_of_given."""
    at = columns.places
    bias = apart = bias_of_given = None
    if b_ih is not None and b_hh is not None and columns.one_bias:
        b_ih, b_hh = b_ih + b_hh, None
    if b_ih is not None and at.of_b_ih:
        bias = blocks(b_ih, columns.b_ih, H)
    if b_hh is not None and at.of_b_hh:
        for which in columns.b_hh:
            added = blocks(b_hh, which, H)
            bias = added if bias is None else bias + added
        for which in columns.given_b_hh:
            added = blocks(b_hh, which, H)
            bias_of_given = added if bias_of_given is None else bias_of_given + added
        if at.apart:
            apart = blocks(b_hh, at.apart, H).view(-1, H)
    return bias, apart, bias_of_given


def forward(options: Options, save: str, inputs: Inputs, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Buffers]:
    """The engine's forward: outputs, and the buffers y, c, saved for backward; an empty tensor means nothing is saved.

    If traced, the operator is used and the buffers are [T, B, K, .]; else [K, head+N, .] and [K, N, .] in `RowOrder`s.
    """
    if options.traced:
        return _traced(options, save, inputs, mask)
    x, *starts, w_ih = inputs[:4]
    assert x is not None and w_ih is not None
    (T, B), K, columns = x.shape[:2], 1 if w_ih.dim() == 2 else w_ih.shape[0], column_order(options.cell)
    part = columns.part
    orders: dict[bool, RowOrder] = {}
    groups = [layer_group(columns, inputs, mask, k, is_reversed(k, options.reversed), orders) for k in range(K)]
    if options.notes is not None:
        options.notes["orders"] = orders
    rows, head, H = groups[0].order.rows, groups[0].order.head, groups[0].H
    widths = (1, part.states - 1) if part.states > 1 else (1,)
    states = [x.new_empty(K, head + rows, width * H) for width in widths]
    for buffer, start in zip(states, starts, strict=False):
        buffer[:, :head] = 0
        if start is not None:
            buffer[:, :B] = start.reshape(K, B, start.shape[-1])
    gates = x.new_empty(K, rows, part.saved * H) if save == "gates" and part.saved else None
    with torch.inference_mode():  # less overhead in each of many small operations
        for k, group in enumerate(groups):
            c = states[1][k] if part.states > 1 else None
            steps.scan(group, states[0][k], c, None if gates is None else gates[k])
    finals = [
        groups[0].order.final(of[0])[None].clone()
        if K == 1
        else torch.stack([group.order.final(s) for s, group in zip(of, groups, strict=True)])
        for of in states[columns.places.output :]
    ]
    outputs = [_visible(of, groups, T, B) for of in (states if options.states else states[:1])]
    c = states[1] if len(states) > 1 else x.new_empty(0)
    return (outputs[0], *finals, *outputs[1:]), (states[0], c, x.new_empty(0) if gates is None else gates)


def scan(
    options: Options, save: str, inputs: Inputs, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` with results in the order of time: y and c [T, B, K, .], saved [T, B, K, saved*H] and the final states;
    [0] for what is missing."""
    x, w_ih = inputs[0], inputs[3]
    assert x is not None and w_ih is not None
    (T, B), K, at = x.shape[:2], w_ih.shape[0], places(options.cell)
    several = at.states > 1 and save != "none"
    options = replace(options, states=several, traced=False, notes={})
    (y, *rest), (_, _, saved) = forward(options, save, inputs, mask)
    if saved.dim() > 1:
        orders = [options.notes["orders"][is_reversed(k, options.reversed)] for k in range(K)]
        placed = [order.placed(of) for order, of in zip(orders, saved, strict=True)]
        saved = torch.stack(placed, 1).unflatten(0, (T, B))
    hn = x.new_empty(0) if at.output else rest.pop(0)
    cn = rest.pop(0) if at.states > 1 else x.new_empty(0)
    y, c = (s.view(T, B, K, s.shape[2] // K) for s in (y, rest.pop(0) if several else x.new_empty(T, B, 0)))
    return y, c if several else x.new_empty(0), saved, hn, cn


def allocate(options: Options, save: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results of `scan`, uninitialised."""
    x, h0, c0, w_ih, w_hh = inputs[:5]
    assert x is not None and w_ih is not None
    (T, B), K, at, saved = x.shape[:2], w_ih.shape[0], places(options.cell), get(options.cell).saved
    H = hidden_size(at, w_ih, w_hh, h0, c0)
    C = (at.states - 1) * H
    return (
        x.new_empty(T, B, K, H),
        x.new_empty(T, B, K, C) if C and save != "none" else x.new_empty(0),
        x.new_empty(T, B, K, saved * H) if saved and save == "gates" else x.new_empty(0),
        x.new_empty(0) if at.output else x.new_empty(K, B, H),
        x.new_empty(K, B, C) if C else x.new_empty(0),
    )


def _visible(buffer: Tensor, groups: list[Group], T: int, B: int) -> Tensor:
    """The states after each step [T, B, K*width], zero at padding: a separate tensor, which users may change."""
    K, _, width = buffer.shape
    y = buffer.new_empty(T, B, K * width)
    for k, group in enumerate(groups):
        place, target = y.view(T * B, K, width)[:, k], group.order.target
        if target is not None and K == 1:
            torch.index_select(buffer[k], 0, target, out=place)
        else:
            place.copy_(group.order.placed_states(buffer[k]))
    return y


def _traced(options: Options, save: str, inputs: Inputs, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Buffers]:
    """`forward` by the operator."""
    y, c, saved, hn, cn = call_forward(options, save, inputs, mask)
    at = places(options.cell)
    outputs = [s.flatten(2) for s in ((y, c) if options.states else (y,))]
    if save != "none":  # backward needs y unchanged, and users may change theirs in place
        outputs = [s.clone() for s in outputs]
    finals = (cn,) if at.output else (hn, cn)[: at.states]
    return (outputs[0], *finals, *outputs[1:]), (y, c, saved)

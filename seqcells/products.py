"""The products around a recurrence: the input's for all steps at once, the weights' gradients; and the kernels' order.

A cell's weights and biases consist of blocks of H rows, in the cell's order, one for each gate that has one. The
kernels use tiles of gx (the gates whose x is read, then the per-step inputs) and products (see `kernels.form`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .cell import Cell, constant_to_compilers, get
from .kernels.buffers import previous_outputs

Blocks = tuple[int, ...]  # numbers of blocks; -1: a block of zeros


@dataclass(frozen=True)
class Places:
    """The positions of a cell's blocks. Plain fields without nested dataclasses, so that torch.compile can trace it.

    states, saved: as in the cell's form. output: whether the kernels' first state is an output that no step reads and
    no user passes. inputs: the number of per-step inputs. x: the number of gates whose x is read. ordered: whether the
    products are in the order of w_hh. joined: whether all biases are added to the tiles of gx, in the tiles' order. u:
    the block of w_hh of each product. w_hh: the product of each block of w_hh.
    Biases: b_ih and b_hh: for each tile of gx the block that is added to it; several of b_hh if several products are
    added to one tile. product, apart: the block of b_hh of each product, and of each product apart. of_b_ih: the tile
    of gx of each block. of_b_hh: the tile of each block, or, for a product apart, its position in dhu, counted from the
    number of tiles on.
    """

    states: int
    saved: int
    output: bool
    inputs: int
    x: int
    ordered: bool
    joined: bool
    u: Blocks
    w_hh: Blocks
    b_ih: Blocks
    b_hh: tuple[Blocks, ...]
    product: Blocks
    apart: Blocks
    of_b_ih: Blocks
    of_b_hh: Blocks


_PLACES: dict[str, Places] = {}


@constant_to_compilers
def places(key: str) -> Places:
    """The Places of the cell with that key."""
    if (found := _PLACES.get(key)) is None:
        found = _PLACES[key] = _places(get(key))
    return found


def _places(cell: Cell) -> Places:
    form, biased = cell.form, cell.biased
    of_x = [g for g in cell.x_gates if g in biased]
    of_u = [g for g in cell.u_gates if g in biased]
    gates = [cell.u_gates[n] for n in cell.order]  # of each product
    block = {g: n for n, g in enumerate(of_u)}
    layers: list[list[int]] = []
    for tile, gate in zip(form.adds, gates, strict=True):
        if tile >= 0 and gate in block:
            free = next((layer for layer in layers if layer[tile] < 0), None)
            if free is None:
                layers.append(free := [-1] * form.gates)
            free[tile] = block[gate]
    there = [tile if tile >= 0 else form.gates + form.apart.index(n) for n, tile in enumerate(form.adds)]
    b_ih = tuple(of_x.index(g) if g in of_x else -1 for g in cell.x_gates) + (-1,) * len(cell.inputs)
    every = tuple(range(form.gates))
    return Places(
        form.states,
        form.saved,
        bool(cell.outputs),
        len(cell.inputs),
        len(cell.x_gates),
        cell.order == tuple(range(len(cell.u_gates))),
        b_ih == every and [tuple(layer) for layer in layers] == [every] and not form.apart,
        cell.order,
        tuple(cell.order.index(n) for n in range(len(cell.order))),
        b_ih,
        tuple(map(tuple, layers)),
        tuple(block.get(g, -1) for g in gates),
        tuple(block.get(gates[n], -1) for n in form.apart),
        tuple(cell.x_gates.index(g) for g in of_x),
        tuple(there[gates.index(g)] for g in of_u),
    )


_RUNS: dict[Blocks, tuple[tuple[int, int], ...]] = {}


def _runs(which: Blocks) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive blocks: the first (-1: zeros), and how many."""
    if which not in _RUNS:
        found: list[tuple[int, int]] = []
        for n in which:
            first, count = found[-1] if found else (-2, 0)
            if first == n == -1 or (first >= 0 and n == first + count):
                found[-1] = (first, count + 1)
            else:
                found.append((n, 1))
        _RUNS[which] = tuple(found)
    return _RUNS[which]


def blocks(t: Tensor, which: Sequence[int], H: int, dim: int = -1) -> Tensor:
    """The given blocks of H along an axis of t, in that order; zeros for -1."""
    runs = _runs(tuple(which))
    if len(runs) == 1 and runs[0][0] == 0 and t.shape[dim] == len(which) * H:
        return t
    parts = [
        t.narrow(dim, first * H, count * H)
        if first >= 0
        else t.new_zeros(*t.shape[: dim % t.dim()], count * H, *t.shape[dim % t.dim() + 1 :])
        for first, count in runs
    ]
    if not parts:
        return t.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def hidden_size(at: Places, w_ih: Tensor, w_hh: Tensor | None, h0: Tensor | None, c0: Tensor | None) -> int:
    """H, from the first of these tensors that is not None and has that size."""
    if at.x:
        return w_ih.shape[-2] // at.x
    if w_hh is not None:
        return w_hh.shape[-1]
    if h0 is not None:
        return h0.shape[-1]
    assert c0 is not None
    return c0.shape[-1] // (at.states - 1)


def recurrent(at: Places, w_hh: Tensor | None, w_ih: Tensor, H: int) -> Tensor:
    """The kernels' u [K, products*H, H], from w_hh [K, Gu*H, H]. If w_hh is None, w_ih [K, Gx*H, I] provides K, dtype
    and device."""
    if w_hh is None:
        return w_ih.new_empty(w_ih.shape[0], 0, H)
    return w_hh if at.ordered else blocks(w_hh, at.u, H, 1)


def input_biases(at: Places, b_ih: Tensor | None, b_hh: Tensor | None, H: int) -> tuple[Tensor | None, Tensor | None]:
    """From biases [K, .] or [.]: the sum of those that are added to the tiles of gx [., G*H], and those of the products
    apart [., apart*H]; None means zero."""
    if at.joined:
        return b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh, None
    adds = None if b_ih is None or not at.of_b_ih else blocks(b_ih, at.b_ih, H)
    if b_hh is None or not at.of_b_hh:
        return adds, None
    for layer in at.b_hh:
        added = blocks(b_hh, layer, H)
        adds = added if adds is None else adds + added
    return adds, blocks(b_hh, at.apart, H) if at.apart else None


def step_biases(at: Places, b_ih: Tensor | None, b_hh: Tensor | None, H: int) -> tuple[Tensor | None, Tensor | None]:
    """b_ih [Gx*H] in the order of gx's tiles, and b_hh [products*H] in that of the products, for a step in one
    launch."""
    of_x = None if b_ih is None or not at.of_b_ih else blocks(b_ih, at.b_ih[: at.x], H)
    return of_x, None if b_hh is None or not at.of_b_hh else blocks(b_hh, at.product, H)


def input_projection(
    at: Places, x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, H: int, inputs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """gx [T, B, K, G*H] by one GEMM, including all biases that can be added to it; and b_hh of the products apart
    [K, apart*H].

    x [T, B, I] for all groups, or [T, B, K, I]; w_ih [K, Gx*H, I]; inputs, the last tiles, [T, B, N*H] or
    [T, B, K, N*H].
    """
    K, GH = w_ih.shape[:2]
    bias, apart = input_biases(at, b_ih, b_hh, H)
    own = bias if bias is None or inputs is None else bias[..., :GH]
    if x.dim() == 3:
        gx = linear(x, w_ih.reshape(K * GH, -1), None if own is None else own.reshape(-1)).unflatten(2, (K, GH))
    else:
        gx = torch.einsum("tbki,kgi->tbkg", x, w_ih)
        gx = (gx if own is None else gx + own).contiguous()
    if inputs is not None:
        more = inputs if inputs.dim() == 4 else inputs[:, :, None].expand(-1, -1, K, -1)
        if bias is not None and any(n >= 0 for layer in at.b_hh for n in layer[at.x :]):
            more = more + bias[..., GH:]
        gx = torch.cat([gx, more], 3)
    return gx, apart


def weight_gradient(d: Tensor, operand: Tensor, samples: int) -> Tensor:
    """The products of d [T, B, m] and operand [T, B, n], summed over the rows: [m, n], or of each of several samples,
    equal parts of the B rows, [samples, m, n]."""
    if samples == 1:
        return d.reshape(-1, d.shape[2]).t() @ operand.reshape(-1, operand.shape[2])
    d, operand = (t.unflatten(1, (samples, -1)) for t in (d, operand))
    return torch.einsum("tsbm,tsbn->smn", d, operand)


def input_gradients(
    dgx: Tensor, x: Tensor, w_ih: Tensor, need: Sequence[bool], samples: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and w_ih, [K, Gx*H, I] or [samples, K, Gx*H, I]. need: which of them are wanted."""
    K, GH = w_ih.shape[:2]
    dgx = dgx[..., :GH]
    if x.dim() == 4:
        dx = torch.einsum("tbkg,kgi->tbki", dgx, w_ih) if need[0] else None
        each = [weight_gradient(dgx[:, :, k], x[:, :, k], samples) for k in range(K)] if need[1] else []
        return dx, torch.stack(each, -3) if each else None
    wide = dgx.reshape(*dgx.shape[:2], K * GH)
    dx = wide @ w_ih.flatten(0, 1) if need[0] else None
    return dx, weight_gradient(wide, x, samples).unflatten(-2, (K, GH)) if need[1] else None


def bias_gradients(
    at: Places, dgx: Tensor, dhu: Tensor, H: int, samples: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of b_ih and b_hh, [K, .] or [samples, K, .]; None if no gate has such a bias."""
    sums, of_apart = (t.unflatten(1, (samples, -1)).sum((0, 2)) if t.dim() > 1 else t for t in (dgx, dhu))
    if samples == 1:
        sums, of_apart = sums[0], of_apart[0] if at.apart else of_apart
    every = torch.cat([sums, of_apart], -1) if at.apart else sums
    db_ih = blocks(sums, at.of_b_ih, H) if at.of_b_ih else None
    db_hh = blocks(every, at.of_b_hh, H) if at.of_b_hh else None
    return db_ih, db_hh.clone() if db_hh is not None and db_hh is db_ih else db_hh


def recurrent_gradient(
    cell: str,
    of_gates: tuple[Tensor, Tensor, Tensor],
    states: tuple[Tensor, Tensor],
    mask: Tensor | None,
    reversed: int,
    k: int,
    samples: int = 1,
) -> Tensor:
    """The gradient of w_hh of group k, [Gu*H, H] or [samples, Gu*H, H], by one GEMM for each segment of the products
    (see kernels.form).

    of_gates: dgx, dhu and m; states: y and c.
    """
    (dgx, dhu, m), (y, c) = of_gates, states
    form, H = get(cell).form, y.shape[3]
    operands: dict[int, Tensor] = {}
    parts = []
    for s in form.segments:
        if s.operand not in operands:
            state = form.operands[s.operand].state
            if state is None:
                operands[s.operand] = m[:, :, k].narrow(2, form.stored.index(s.operand) * H, H)
            else:
                of = y if state == 0 else c.narrow(3, (state - 1) * H, H)
                operands[s.operand] = previous_outputs(of, mask, reversed, k)
        d = (dhu if s.apart else dgx)[:, :, k].narrow(2, s.column * H, s.count * H)
        parts.append(weight_gradient(d, operands[s.operand], samples))
    return blocks(torch.cat(parts, -2) if len(parts) > 1 else parts[0], places(cell).w_hh, H, -2)

"""The steps alone, as operators that compilers and torch.func take for one: buffers as `kernels.buffers` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.buffers import Gradients, Scanned, is_reversed, outputs, previous_outputs, steps
from .cells import CELLS
from .steps import Fill, before_step, computed_in, most_rows, scan, scan_back
from .stretches import Walk, walk


def _allocate(gx: Tensor, u: Tensor, cell: str, save: str, reversed: int) -> Scanned:
    T, B, K, H, part = *gx.shape[:3], u.shape[2], CELLS[cell]
    rows = T + (2 if reversed else 1)
    return Scanned(
        u.new_empty(rows, B, K, H),
        u.new_empty(rows, B, K, H) if part.states == 2 and save != "none" else u.new_empty(0),
        u.new_empty(T, B, K, part.saved * H) if part.saved and save == "gates" else u.new_empty(0),
        u.new_empty(K, B, H),
        u.new_empty(K, B, H) if part.states == 2 else u.new_empty(0),
    )


def _product(part: Any, w: Walk, gx: Tensor, H: int) -> Fill:
    """Fills in gx [T*B, G*H], in the cell's order of gates."""

    def fill(into: Tensor, a: int, b: int) -> None:
        rows = w.of(gx, a, b)
        if part.turned:
            into[:, :H], into[:, H:] = rows[:, -H:], rows[:, :-H]
        else:
            into.copy_(rows)

    return fill


def forward(
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    mask: Tensor | None,
    cell: str,
    save: str,
    reversed: int,
    schedule: str,
    precision: str,
    params: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See autograd.Engine. schedule and precision are the kernels'."""
    part, out = CELLS[cell], _allocate(gx, u, cell, save, reversed)
    (T, B, K), H, u = gx.shape[:3], u.shape[2], u.to(computed_in(u.dtype))
    for k in range(K):
        back = is_reversed(k, reversed)
        w = walk(mask, back, T, B, gx.device, most_rows(H, gx.device))
        states = []
        for start in (h0, c0)[: part.states]:
            states.append(out.y.new_empty(w.head + w.rows, H))
            states[-1][: w.head] = 0
            if start is not None:
                states[-1][:B] = start[k]
        y, c = states[0], states[1] if part.states == 2 else None
        gates = out.saved.new_empty(w.rows, part.saved * H) if out.saved.numel() else None
        fill = _product(part, w, gx[:, :, k].flatten(0, 1), H)
        with torch.inference_mode():
            scan(part, w, u[k], fill, None if bias is None else bias[k], y, c, gates)
        for buffer, state in zip((out.y, out.c), states, strict=False):
            if buffer.numel():
                buffer[T + 1 if back else 0, :, k] = state[:B]
                if reversed:
                    buffer[0 if back else T + 1, :, k] = 0
                buffer[1 : T + 1, :, k] = _in_place(w, state, back).view(T, B, H)
        for final, state in zip((out.hn, out.cn), states, strict=False):
            final[k] = w.final(state)
        if gates is not None:
            # Where padding is, any numbers will do, but NaN would be taken for a defect.
            rows = gates.new_zeros(T * B, gates.shape[1]) if w.start is not None else torch.empty_like(gates)
            out.saved[:, :, k] = _put(w, rows, gates).view(T, B, -1)
    return tuple(out)  # type: ignore[return-value]


def _put(w: Walk, into: Tensor, rows: Tensor) -> Tensor:
    """The walk's rows at their places [T*B, .]."""
    return rows if w.source is None else into.index_copy_(0, w.source, rows)


def _in_place(w: Walk, state: Tensor, back: bool) -> Tensor:
    """A buffer's states after each step, at their places [T*B, H]; where padding is, zero, or what a group that walks
    back waits in: its given start."""
    if w.target is None:
        return state[w.head :]
    B = w.batch
    places = w.target
    if back and w.start is not None:
        places = torch.where(places == B, torch.arange(places.shape[0], device=places.device) % max(B, 1), places)
    return state.index_select(0, places)


def backward(
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dcs: Tensor | None,
    u: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    mask: Tensor | None,
    cell: str,
    reversed: int,
    schedule: str,
    precision: str,
    params: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See autograd.Engine."""
    part, out = CELLS[cell], _allocate_gradients(u, y, cell, reversed)
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    GH, u = part.gates * H, u.to(computed_in(u.dtype))
    for buffer in out[:3]:
        if mask is not None:
            buffer.zero_()
    for k in range(K):
        w = walk(mask, is_reversed(k, reversed), T, B, y.device, most_rows(H, y.device))
        each = [previous_outputs(y, mask, reversed, k), outputs(y, reversed)[:, :, k]]
        if part.states == 2:
            each += [previous_outputs(c, mask, reversed, k), outputs(c, reversed)[:, :, k]]
        flat = [s.flatten(0, 1) for s in each]
        kept = saved[:, :, k].flatten(0, 1) if part.saved else None

        def states(a: int, b: int, flat: list[Tensor] = flat, kept: Tensor | None = kept, w: Walk = w) -> Any:
            h, y, c, after = (*(w.of(s, a, b) for s in flat), None, None)[:4]
            return h, c, y, after, None if kept is None else w.of(kept, a, b)

        found = [y.new_empty(w.rows, d.shape[3] if d.numel() else 0) for d in out[:3]]

        def emit(a: int, b: int, p: Tensor, others: Any, h: Tensor, found: list[Tensor] = found) -> None:
            gates = p[:, :GH]
            if part.turned:
                found[0][a:b, -H:], found[0][a:b, :-H] = gates[:, :H], gates[:, H:]
            else:
                found[0][a:b] = gates
            if found[1].shape[1]:
                found[1][a:b] = p[:, GH:]
            if found[2].shape[1]:
                found[2][a:b] = part.products(p, others, h)[-1][1]

        fills = [None if d is None else w.copying(d[:, :, k].flatten(0, 1)) for d in (dy, dcs)]
        finals = [None if d is None else d[k] for d in (dhn, dcn)]
        with torch.inference_mode():
            starts = scan_back(part, w, u[k], states, fills, finals, emit)
        for buffer, rows in zip(out[:3], found, strict=True):
            if rows.shape[1]:
                into = buffer[:, :, k].flatten(0, 1)  # a copy, of more groups than one
                buffer[:, :, k] = _put(w, into, rows).view(T, B, -1)
        for buffer, start in zip((out.dh0, out.dc0)[: part.states], starts, strict=False):
            buffer[k] = start
    return *out, y.new_empty(0)


def _allocate_gradients(u: Tensor, y: Tensor, cell: str, reversed: int) -> Gradients:
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    part = CELLS[cell]
    inner = part.saved > part.gates
    return Gradients(
        y.new_empty(T, B, K, part.gates * H),
        y.new_empty(T, B, K, H) if inner else y.new_empty(0),
        y.new_empty(T, B, K, H) if cell == "gru_before" else y.new_empty(0),
        y.new_empty(K, B, H),
        y.new_empty(K, B, H) if part.states == 2 else y.new_empty(0),
    )


def recompute_saved(
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    y: Tensor,
    c: Tensor,
    mask: Tensor | None,
    cell: str,
    reversed: int,
    schedule: str = "",
    params: Tensor | None = None,
) -> Tensor:
    """The saved gates of all steps, from the states."""
    part, (T, B, K), H, u = CELLS[cell], gx.shape[:3], u.shape[2], u.to(computed_in(u.dtype))
    saved = y.new_empty(T, B, K, part.saved * H) if part.saved else y.new_empty(0)
    for k in range(K if part.saved else 0):
        whole = walk(None, False, T, B, gx.device, B)
        kept = u.new_empty(T * B, part.saved * H)
        fill = _product(part, whole, gx[:, :, k].flatten(0, 1), H)
        before_step(part, kept, fill, None if bias is None else bias[k], 0, T * B, part.gates * H)
        h = previous_outputs(y, mask, reversed, k).flatten(0, 1).to(u.dtype)
        part.activate(kept, h, part.forth(u[k]))
        saved[:, :, k] = kept.view(T, B, -1)
    return saved


scan_forward = torch.library.custom_op("seqcells::loop_forward", forward, mutates_args=())
scan_backward = torch.library.custom_op("seqcells::loop_backward", backward, mutates_args=())
recompute = torch.library.custom_op("seqcells::loop_recompute", recompute_saved, mutates_args=())
ALL = scan_forward, scan_backward, recompute


@scan_forward.register_fake
def _(gx: Tensor, u: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(_allocate(gx, u, *others[4:7]))


@scan_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    u, y, cell, reversed = *arguments[4:6], *arguments[9:11]
    return *_allocate_gradients(u, y, cell, reversed), y.new_empty(0)


@recompute.register_fake
def _(gx: Tensor, u: Tensor, *others: Any) -> Tensor:
    part = CELLS[others[4]]
    return u.new_empty(*gx.shape[:3], part.saved * u.shape[2]) if part.saved else u.new_empty(0)

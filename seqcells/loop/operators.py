"""The steps alone, as operators that compilers and torch.func take for one: buffers as `kernels.buffers` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.buffers import Gradients, Scanned, is_reversed, outputs, previous_outputs, steps
from .derived import get
from .steps import Fill, before_step, computed_in, keep, most_rows, scan, scan_back, widths
from .stretches import Walk, walk


def _allocate(gx: Tensor, u: Tensor, cell: str, save: str, reversed: int) -> Scanned:
    T, B, K, H, part = *gx.shape[:3], u.shape[2], get(cell)
    rows, CH = T + (2 if reversed else 1), (part.states - 1) * H
    return Scanned(
        u.new_empty(rows, B, K, H),
        u.new_empty(rows, B, K, CH) if CH and save != "none" else u.new_empty(0),
        u.new_empty(T, B, K, part.saved * H) if part.saved and save == "gates" else u.new_empty(0),
        u.new_empty(K, B, H),
        u.new_empty(K, B, CH) if CH else u.new_empty(0),
    )


def _product(part: Any, w: Walk, gx: Tensor, H: int) -> Fill:
    """Fills in gx [T*B, G*H], tile by tile where the part has its own order."""
    plain = part.columns == tuple(range(part.gates))

    def fill(into: Tensor, a: int, b: int) -> None:
        rows = w.of(gx, a, b)
        if plain:
            into[:, : rows.shape[1]] = rows
        else:
            for column, tile in zip(part.columns, rows.split(H, 1), strict=True):
                into[:, column * H : (column + 1) * H] = tile

    return fill


def _of_group(params: Tensor | None, k: int, u: Tensor) -> tuple[Tensor, ...]:
    """The trained vectors of a group, of u's dtype."""
    return () if params is None else params[k].to(u.dtype).split(u.shape[2])


def _bias(bias: Tensor | None, k: int, H: int) -> Tensor | None:
    return None if bias is None else bias[k].view(-1, H)


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
    part, out = get(cell), _allocate(gx, u, cell, save, reversed)
    (T, B, K), H, u = gx.shape[:3], u.shape[2], u.to(computed_in(u.dtype))
    for k in range(K):
        back = is_reversed(k, reversed)
        w = walk(mask, back, T, B, gx.device, most_rows(H, gx.device))
        states: list[Tensor] = []
        for start, width in zip((h0, c0), widths(part), strict=False):
            states.append(out.y.new_empty(w.head + w.rows, width * H))
            states[-1][: w.head] = 0
            if start is not None:
                states[-1][:B] = start[k]
        y, c = states[0], states[1] if len(states) > 1 else None
        gates = out.saved.new_empty(w.rows, part.saved * H) if out.saved.numel() else None
        fill = _product(part, w, gx[:, :, k].flatten(0, 1), H)
        with torch.inference_mode():
            scan(part, w, u[k], _of_group(params, k, u), fill, _bias(bias, k, H), y, c, gates)
        for buffer, state in zip((out.y, out.c), states, strict=False):
            if buffer.numel():
                buffer[T + 1 if back else 0, :, k] = state[:B]
                if reversed:
                    buffer[0 if back else T + 1, :, k] = 0
                buffer[1 : T + 1, :, k] = _in_place(w, state, back).view(T, B, -1)
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
    """A buffer's states after each step, at their places [T*B, .]; where padding is, zero, or what a group that walks
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
    part, out = get(cell), _allocate_gradients(u, y, cell, reversed)
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    u = u.to(computed_in(u.dtype))
    for buffer in out[:3]:
        if mask is not None:
            buffer.zero_()
    for k in range(K):
        w = walk(mask, is_reversed(k, reversed), T, B, y.device, most_rows(H, y.device))
        each = [previous_outputs(y, mask, reversed, k), outputs(y, reversed)[:, :, k]]
        if part.states > 1:
            each += [previous_outputs(c, mask, reversed, k), outputs(c, reversed)[:, :, k]]
        flat = [s.flatten(0, 1) for s in each]
        kept = saved[:, :, k].flatten(0, 1) if part.saved else None

        def states(a: int, b: int, flat: list[Tensor] = flat, kept: Tensor | None = kept, w: Walk = w) -> Any:
            h, y, c, after = (*(w.of(s, a, b) for s in flat), None, None)[:4]
            return h, c, y, after, None if kept is None else w.of(kept, a, b)

        found = [y.new_empty(w.rows, d.shape[3] if d.numel() else 0) for d in out[:3]]
        own = u.new_zeros(part.params * H)

        def emit(
            a: int, b: int, p: Tensor, others: Any, h: Tensor, c: Any, found: list[Tensor] = found, own: Tensor = own
        ) -> None:
            for into, columns in zip(found, (part.grads, part.apart_grads), strict=False):
                if list(columns) == list(range(len(columns))):
                    into[a:b] = p[:, : len(columns) * H]
                else:
                    for n, column in enumerate(columns):
                        into[a:b, n * H : (n + 1) * H] = p[:, column * H : (column + 1) * H]
            for n, operand in enumerate(part.stored(others)):
                found[2][a:b, n * H : (n + 1) * H] = operand
            if part.params:
                own.add_(p[:, part.param_grads * H :].sum(0))

        fills = [None if d is None else w.copying(d[:, :, k].flatten(0, 1)) for d in (dy, dcs)]
        finals = [None if d is None else d[k] for d in (dhn, dcn)]
        with torch.inference_mode():
            starts = scan_back(part, w, u[k], _of_group(params, k, u), states, fills, finals, emit)
        for buffer, rows in zip(out[:3], found, strict=True):
            if rows.shape[1]:
                into = buffer[:, :, k].flatten(0, 1)  # a copy, of more groups than one
                buffer[:, :, k] = _put(w, into, rows).view(T, B, -1)
        for buffer, start in zip((out.dh0, out.dc0), starts[: len(widths(part))], strict=False):
            buffer[k] = start
        if part.params:
            out.dparams[k] = own
    return tuple(out)  # type: ignore[return-value]


def _allocate_gradients(u: Tensor, y: Tensor, cell: str, reversed: int) -> Gradients:
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    part = get(cell)

    def tiles(n: int) -> Tensor:
        return y.new_empty(T, B, K, n * H) if n else y.new_empty(0)

    return Gradients(
        tiles(part.gates),
        tiles(len(part.apart)),
        tiles(part.operands),
        y.new_empty(K, B, H),
        y.new_empty(K, B, (part.states - 1) * H) if part.states > 1 else y.new_empty(0),
        y.new_empty(K, part.params * H, dtype=computed_in(y.dtype)) if part.params else y.new_empty(0),
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
    part, (T, B, K), H, u = get(cell), gx.shape[:3], u.shape[2], u.to(computed_in(u.dtype))
    saved = y.new_empty(T, B, K, part.saved * H) if part.saved else y.new_empty(0)
    for k in range(K if part.saved else 0):
        whole = walk(None, False, T, B, gx.device, B)
        x = u.new_empty(T * B, part.width * H)
        fill = _product(part, whole, gx[:, :, k].flatten(0, 1), H)
        before_step(part, x, fill, _bias(bias, k, H), 0, T * B, H)
        h, before = (
            previous_outputs(s, mask, reversed, k).flatten(0, 1).to(u.dtype) if n < len(widths(part)) else None
            for n, s in enumerate((y, c))
        )
        part.activate(x, h, before, [*part.forth(u[k]), *_of_group(params, k, u)])
        kept = saved.new_empty(T * B, part.saved * H)
        keep(part, kept, x, H)
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
    return tuple(_allocate_gradients(u, y, cell, reversed))


@recompute.register_fake
def _(gx: Tensor, u: Tensor, *others: Any) -> Tensor:
    saved, H = get(others[4]).saved, u.shape[2]
    return u.new_empty(*gx.shape[:3], saved * H) if saved else u.new_empty(0)

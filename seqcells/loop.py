"""The loop over time in torch operations, forward and backward by hand: an engine (see `autograd`) that runs anywhere.

The middle rung between `reference`, where autograd differentiates every step, and the kernels: their saved gates, their
buffers and their gradients, one step after another in Python. What does not depend on a neighbouring step is done for
all steps at once: the derivatives of the activations here, the weight gradients in `autograd`.

In a cell's parts, of one group: gx [B, G*H], u [G*H, H], h, c [B, H], kept [B, S*H] (S saved tiles); of all steps the
same behind an axis T. The formulas are in kernels/cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import batching
from .autograd import ENGINES, Engine
from .kernels.buffers import Gradients, Scanned, held, is_reversed, outputs, previous_outputs, resets_of, steps


class LSTM:
    gates, states, saved, inner = 4, 2, 4, 0
    second = 0

    @staticmethod
    def step(gx: Tensor, h: Tensor, c: Any, u: Tensor, bias: Any, kept: Tensor, out: Tensor) -> Any:
        """One step: h' into out, the gates into kept; c' (nothing, for a cell without)."""
        torch.addmm(gx, h, u.t(), out=kept)
        kept[:, : 2 * h.shape[1]].sigmoid_()
        i, f, g, o = kept.chunk(4, 1)
        c = torch.addcmul(f * c, i, g.tanh_())
        torch.mul(o.sigmoid_(), c.tanh(), out=out)
        return c

    @staticmethod
    def activate(gx: Tensor, hu: Tensor) -> Tensor:
        """kept of all steps at once, given the recurrent products hu [T, B, G*H] (with the inner gates' bias)."""
        i, f, g, o = (gx + hu).chunk(4, 2)
        return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 2)

    @staticmethod
    def derivatives(kept: Tensor, h: Tensor, c: Any, y: Tensor, after: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Of all steps: the factors that become gates' gradients, and the others. h, c before, y, after (c) after."""
        i, f, g, o = kept.chunk(4, 2)
        tc = after.tanh()
        of_cell = torch.cat([g * i * (1 - i), c * f * (1 - f), i * (1 - g * g)], 2)
        return [of_cell, tc * o * (1 - o), o * (1 - tc * tc)], [f]

    @staticmethod
    def back(parts: Any, dh: Tensor, dc: Any, u: Tensor, dgx: Tensor, dhu: Any) -> tuple[Tensor, Any]:
        """One step back: dgx (and dhu) filled; the gradients of the states before it."""
        of_cell, of_output, into_cell, f = parts
        H = dh.shape[1]
        dc = torch.addcmul(dc, dh, into_cell)
        torch.mul(of_cell.unflatten(1, (3, H)), dc[:, None], out=dgx[:, : 3 * H].unflatten(1, (3, H)))
        torch.mul(dh, of_output, out=dgx[:, 3 * H :])
        return dgx @ u, dc * f


class GRU:
    gates, states, saved, inner = 3, 1, 4, 1
    second = 0

    @staticmethod
    def step(gx: Tensor, h: Tensor, c: Any, u: Tensor, bias: Any, kept: Tensor, out: Tensor) -> Any:
        H = h.shape[1]
        first, n, q = kept[:, : 2 * H], kept[:, 2 * H : 3 * H], kept[:, 3 * H :]
        torch.addmm(gx[:, : 2 * H], h, u[: 2 * H].t(), out=first).sigmoid_()
        if bias is None:
            torch.mm(h, u[2 * H :].t(), out=q)
        else:
            torch.addmm(bias, h, u[2 * H :].t(), out=q)
        torch.addcmul(gx[:, 2 * H :], first[:, :H], q, out=n).tanh_()
        torch.lerp(n, h, first[:, H:], out=out)

    @staticmethod
    def activate(gx: Tensor, hu: Tensor) -> Tensor:
        (gx_r, gx_z, gx_n), (hu_r, hu_z, q) = gx.chunk(3, 2), hu.chunk(3, 2)
        r = (gx_r + hu_r).sigmoid()
        return torch.cat([r, (gx_z + hu_z).sigmoid(), (gx_n + r * q).tanh(), q], 2)

    @staticmethod
    def derivatives(kept: Tensor, h: Tensor, c: Any, y: Tensor, after: Any) -> tuple[list[Tensor], list[Tensor]]:
        r, z, n, q = kept.chunk(4, 2)
        return [q * r * (1 - r), (h - n) * z * (1 - z), (1 - z) * (1 - n * n), r], [z]

    @staticmethod
    def back(parts: Any, dh: Tensor, dc: Any, u: Tensor, dgx: Tensor, dhu: Any) -> tuple[Tensor, Any]:
        of_r, of_z, of_n, r, z = parts
        H = dh.shape[1]
        dn = torch.mul(dh, of_n, out=dgx[:, 2 * H :])
        torch.mul(dn, of_r, out=dgx[:, :H])
        torch.mul(dh, of_z, out=dgx[:, H : 2 * H])
        torch.mul(dn, r, out=dhu)
        return torch.addmm(dh * z, dgx[:, : 2 * H], u[: 2 * H]).addmm_(dhu, u[2 * H :]), dc


class GRUBefore:
    gates, states, saved, inner = 3, 1, 3, 0
    second = 3  # which of its gates' factors, times h, is the operand of its second product

    @staticmethod
    def step(gx: Tensor, h: Tensor, c: Any, u: Tensor, bias: Any, kept: Tensor, out: Tensor) -> Any:
        H = h.shape[1]
        first, n = kept[:, : 2 * H], kept[:, 2 * H :]
        torch.addmm(gx[:, : 2 * H], h, u[: 2 * H].t(), out=first).sigmoid_()
        torch.addmm(gx[:, 2 * H :], first[:, :H] * h, u[2 * H :].t(), out=n).tanh_()
        torch.lerp(n, h, first[:, H:], out=out)

    @staticmethod
    def activate(gx: Tensor, hu: Tensor) -> Tensor:
        H = gx.shape[2] // 3
        first = (gx[:, :, : 2 * H] + hu[:, :, : 2 * H]).sigmoid()
        return torch.cat([first, (gx[:, :, 2 * H :] + hu[:, :, 2 * H :]).tanh()], 2)

    @staticmethod
    def derivatives(kept: Tensor, h: Tensor, c: Any, y: Tensor, after: Any) -> tuple[list[Tensor], list[Tensor]]:
        r, z, n = kept.chunk(3, 2)
        return [h * r * (1 - r), (h - n) * z * (1 - z), (1 - z) * (1 - n * n), r], [z]

    @staticmethod
    def back(parts: Any, dh: Tensor, dc: Any, u: Tensor, dgx: Tensor, dhu: Any) -> tuple[Tensor, Any]:
        of_r, of_z, of_n, r, z = parts
        H = dh.shape[1]
        dm = torch.mul(dh, of_n, out=dgx[:, 2 * H :]) @ u[2 * H :]
        torch.mul(dm, of_r, out=dgx[:, :H])
        torch.mul(dh, of_z, out=dgx[:, H : 2 * H])
        return torch.addmm(torch.addcmul(dh * z, dm, r), dgx[:, : 2 * H], u[: 2 * H]), dc


class Tanh:
    gates, states, saved, inner = 1, 1, 0, 0
    second = 0

    @staticmethod
    def step(gx: Tensor, h: Tensor, c: Any, u: Tensor, bias: Any, kept: Any, out: Tensor) -> Any:
        torch.addmm(gx, h, u.t(), out=out).tanh_()

    @staticmethod
    def derivatives(kept: Any, h: Tensor, c: Any, y: Tensor, after: Any) -> tuple[list[Tensor], list[Tensor]]:
        return [1 - y * y], []

    @staticmethod
    def back(parts: Any, dh: Tensor, dc: Any, u: Tensor, dgx: Tensor, dhu: Any) -> tuple[Tensor, Any]:
        return torch.mul(dh, parts[0], out=dgx) @ u, dc


class Relu(Tanh):
    @staticmethod
    def step(gx: Tensor, h: Tensor, c: Any, u: Tensor, bias: Any, kept: Any, out: Tensor) -> Any:
        torch.addmm(gx, h, u.t(), out=out).relu_()

    @staticmethod
    def derivatives(kept: Any, h: Tensor, c: Any, y: Tensor, after: Any) -> tuple[list[Tensor], list[Tensor]]:
        return [(y > 0).to(y.dtype)], []


CHUNK = 1 << 15  # elements of a tile
CELLS: dict[str, Any] = {"lstm": LSTM, "gru": GRU, "gru_before": GRUBefore, "rnn_tanh": Tanh, "rnn_relu": Relu}


def _allocate(gx: Tensor, u: Tensor, cell: str, save: str, reversed: int) -> Scanned:
    T, B, K, H, part = *gx.shape[:3], u.shape[2], CELLS[cell]
    rows = T + (2 if reversed else 1)
    return Scanned(
        gx.new_empty(rows, B, K, H),
        gx.new_empty(rows, B, K, H) if part.states == 2 and save != "none" else gx.new_empty(0),
        gx.new_empty(T, B, K, part.saved * H) if part.saved and save == "gates" else gx.new_empty(0),
        gx.new_empty(K, B, H),
        gx.new_empty(K, B, H) if part.states == 2 else gx.new_empty(0),
    )


def _masks(mask: Tensor | None, back: bool, T: int) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """Each step's resets and ends [B, 1], None where there are none to heed, and all ends [T, B]."""
    nothing: list[Tensor | None] = [None] * T
    if mask is None:
        return nothing, nothing, None
    ended = held(mask)
    found = []
    for all_steps in (resets_of(mask, back), ended):
        rows: list[Tensor | None] = nothing if all_steps is None else list(all_steps[..., None].unbind(0))
        if all_steps is not None and mask.device.type == "cpu":  # elsewhere looking would wait for the device
            rows = [row if any_row else None for row, any_row in zip(rows, all_steps.any(1).tolist(), strict=True)]
        found.append(rows)
    return found[0], found[1], ended


def _forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See autograd.Engine. schedule and precision are the kernels'."""
    part, out = CELLS[cell], _allocate(gx, u, cell, save, reversed)
    T, B, K, H = *gx.shape[:3], u.shape[2]
    cells = part.states == 2 and save != "none"
    scratch = gx.new_empty(B, part.saved * H)
    for k in range(K):
        back = is_reversed(k, reversed)
        resets, ends, _ = _masks(mask, back, T)
        h = gx.new_zeros(B, H) if h0 is None else h0[k]
        c = gx.new_zeros(B, H) if c0 is None else c0[k]
        first, last = (T + 1, 0) if back else (0, T + 1)
        for buffer, start in ((out.y, h), (out.c, c))[: 2 if cells else 1]:
            buffer[first, :, k] = start
            if reversed:
                buffer[last, :, k] = 0
        inputs, kept = gx[:, :, k].unbind(0), out.saved[:, :, k].unbind(0) if out.saved.numel() else None
        rows, c_rows = out.y[1 : T + 1, :, k].unbind(0), out.c[1 : T + 1, :, k].unbind(0) if cells else None
        inner = None if bias is None else bias[k]
        for t in range(T - 1, -1, -1) if back else range(T):
            reset, end = resets[t], ends[t]
            if reset is not None:
                h, c = h.masked_fill(reset, 0), c.masked_fill(reset, 0) if part.states == 2 else c
            before, c_before, row = h, c, rows[t]
            c, h = part.step(inputs[t], h, c, u[k], inner, kept[t] if kept else scratch, row), row
            if end is not None:
                h = torch.where(end, before, row)
                # What a row past its end shows; a reversed group's waits in its start, which the buffer holds.
                row.copy_(h) if back else row.masked_fill_(end, 0)
                c = torch.where(end, c_before, c) if part.states == 2 else c
            if c_rows is not None:
                c_rows[t].copy_(c)
                if end is not None and not back:
                    c_rows[t].masked_fill_(end, 0)
        out.hn[k] = h
        if part.states == 2:
            out.cn[k] = c
    return tuple(out)  # type: ignore[return-value]


def _backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See autograd.Engine."""
    part, out = CELLS[cell], _allocate_gradients(u, y, cell, reversed)
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    # Steps whose derivatives are taken together: on the CPU as many as its caches hold.
    chunk, first, parts = T if y.device.type != "cpu" else max(1, CHUNK // max(B * H, 1)), 0, []
    for k in range(K):
        back = is_reversed(k, reversed)
        resets, ends, ended = _masks(mask, back, T)
        each = [previous_outputs(y, mask, reversed, k), outputs(y, reversed)[:, :, k], None, None]
        if part.states == 2:
            each[2:] = previous_outputs(c, mask, reversed, k), outputs(c, reversed)[:, :, k]
        each += [saved[:, :, k] if part.saved else None, ended, out.m[:, :, k] if part.second else None]
        dys, dc_rows = (_rows(d, k, ended) for d in (dy, dcs))
        dgx, dhu = out.dgx[:, :, k].unbind(0), out.dhu[:, :, k].unbind(0) if part.inner else None
        dh = y.new_zeros(B, H) if dhn is None else dhn[k]
        dc = y.new_zeros(B, H) if dcn is None else dcn[k]
        for t in range(T) if back else range(T - 1, -1, -1):
            if t % chunk == (0 if back else chunk - 1) or t == (0 if back else T - 1):
                first = t - t % chunk
                parts = _parts(part, *(None if s is None else s[first : first + chunk] for s in each))
            if dys is not None:
                dh = dh + dys[t]
            if dc_rows is not None:
                dc = dc + dc_rows[t]
            dh_after, dc_after = dh, dc
            dh, dc = part.back(parts[t - first], dh, dc, u[k], dgx[t], dhu[t] if dhu else None)
            if (end := ends[t]) is not None:
                dh, dc = torch.where(end, dh_after, dh), torch.where(end, dc_after, dc)
            if (reset := resets[t]) is not None:
                dh, dc = dh.masked_fill(reset, 0), dc.masked_fill(reset, 0) if part.states == 2 else dc
        out.dh0[k] = dh
        if part.states == 2:
            out.dc0[k] = dc
    return tuple(out)  # type: ignore[return-value]


def _parts(
    part: Any, h: Any, y: Any, c: Any, after: Any, kept: Any, ended: Tensor | None, m: Tensor | None
) -> list[tuple[Tensor, ...]]:
    """What `back` wants of some steps, one after another; and their operands m of the second product."""
    factors, others = part.derivatives(kept, h, c, y, after)
    if ended is not None:  # a row past its end takes no part, whatever its gates are: NaN, too
        factors = [f.masked_fill(ended[..., None], 0) for f in factors]
    if m is not None:
        torch.mul(factors[part.second], h, out=m)
    return list(zip(*(p.unbind(0) for p in (*factors, *others)), strict=True))


def _rows(d: Tensor | None, k: int, ended: Tensor | None) -> tuple[Tensor, ...] | None:
    """Group k's gradients of each step's output; what padding's are does not matter."""
    if d is None:
        return None
    d = d[:, :, k]
    return (d if ended is None else d.masked_fill(ended[..., None], 0)).unbind(0)


def _allocate_gradients(u: Tensor, y: Tensor, cell: str, reversed: int) -> Gradients:
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    part = CELLS[cell]
    return Gradients(
        y.new_empty(T, B, K, part.gates * H),
        y.new_empty(T, B, K, part.inner * H) if part.inner else y.new_empty(0),
        y.new_empty(T, B, K, H) if part.second else y.new_empty(0),
        y.new_empty(K, B, H),
        y.new_empty(K, B, H) if part.states == 2 else y.new_empty(0),
    )


def _recompute(
    gx: Tensor, u: Tensor, bias: Tensor | None, y: Tensor, c: Tensor, mask: Tensor | None, cell: str, reversed: int
) -> Tensor:
    """The saved gates of all steps, from the states."""
    part, H = CELLS[cell], u.shape[2]
    if not part.saved:
        return gx.new_empty(0)
    groups = []
    for k in range(u.shape[0]):
        h = previous_outputs(y, mask, reversed, k)
        hu = h @ (u[k, : 2 * H] if part.second else u[k]).t()
        if part.second:
            r = (gx[:, :, k, :H] + hu[:, :, :H]).sigmoid()
            hu = torch.cat([hu, (r * h) @ u[k, 2 * H :].t()], 2)
        if bias is not None:
            hu[:, :, -part.inner * H :] += bias[k]
        groups.append(part.activate(gx[:, :, k], hu))
    return torch.stack(groups, 2)


scan_forward = torch.library.custom_op("seqcells::loop_forward", _forward, mutates_args=())
scan_backward = torch.library.custom_op("seqcells::loop_backward", _backward, mutates_args=())
recompute = torch.library.custom_op("seqcells::loop_recompute", _recompute, mutates_args=())


@scan_forward.register_fake
def _(gx: Tensor, u: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(_allocate(gx, u, *others[4:7]))


@scan_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    u, y, cell, reversed = *arguments[4:6], *arguments[9:11]
    return tuple(_allocate_gradients(u, y, cell, reversed))


@recompute.register_fake
def _(gx: Tensor, u: Tensor, *others: Any) -> Tensor:
    part = CELLS[others[4]]
    return gx.new_empty(*gx.shape[:3], part.saved * u.shape[2]) if part.saved else gx.new_empty(0)


ENGINES["loop"] = Engine(scan_forward, scan_backward, recompute)
batching.register(*ENGINES["loop"][:3])

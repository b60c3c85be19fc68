"""A stack of layers in one launch each way: each layer a few steps behind the one before it (see `between`).

Layer by layer, a small batch leaves most of a device idle: its few programs take all steps of a layer, while the layers
above wait. Here all layers take steps at the same time, each on processors of its own, and beside them the products
with the input weights between two layers, which layer by layer are one GEMM. A step costs what it costs in one layer,
so L layers take little more time than one. Results and buffers are those of `scan`, with an axis of layers in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from . import resident, resident_backward, scan
from .buffers import Gradients, Scanned, scratch
from .cells import Cell
from .devices import INTERPRETER, Device
from .form import Form
from .plan import Plan

LAG = 2  # steps that a program is behind the one before: a guess, a round trip through the second-level cache


def steps_pay(layers: int, T: int) -> bool:
    """Whether so many steps take less time in all layers at once."""
    return T + 2 * LAG * (layers - 1) < layers * T


@lru_cache(maxsize=1024)
def plan_stack(cell: Form, one: Plan, layers: int, B: int, H: int, itemsize: int, device: Device) -> Plan | str:
    """The plan of a stack of that many layers, from that of one of them; or why there is none."""
    if layers < 2:
        return "there is one layer"
    if device.capability < 80 and device is not INTERPRETER:
        return f"{device.name} is older than Ampere" if device.capability else f"{device.name} has no PTX"
    if one.schedule != "resident" or not cell.products:
        return f"a layer runs by {one.schedule}"
    if not 0 < cell.gates <= cell.products:
        return "the input has more tiles than the state has products"
    if itemsize == 8 or H * itemsize % 4:
        return "rows are not whole words of 32 bits"
    programs = (2 * layers - 1) * -(-B // one.block_b)
    if programs > device.processors and device is not INTERPRETER:
        return f"{programs} programs are more than {device.name} has processors"
    return replace(one, programs=programs, waits=True)


def forward(
    cell: Cell,
    gx: Tensor,
    w: Tensor,
    b: Tensor | None,
    u: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    mask: Tensor | None,
    *,
    save: str,
    plan: Plan,
    params: Tensor | None = None,
    precision: str = "ieee",
    launch: Callable[[scan.Launch], None] = scan.run,
) -> Scanned:
    """All steps of L layers forward: what `scan.forward` gives, of each layer, along a first axis of L.

    gx [T, B, 1, G*H] of the first layer; of the others w [L-1, G*H, H] (weight_ih) and b [L-1, G*H] (the biases that
    are added to gx), or None. All else as in `scan.forward`, with an axis of layers in place of the groups': u
    [L, products*H, H], bias [L, apart*H], h0 [L, B, H], c0 [L, B, (S-1)*H], params [L, P*H]. mask: of all layers.
    """
    (T, B), (L, H) = gx.shape[:2], (u.shape[0], u.shape[2])
    others, last = (cell.states - 1) * H, T if save != "none" else 0
    y, between = gx.new_empty(L, T + 1, B, 1, H), gx.new_empty(L - 1, *gx.shape)
    for filled in (y, between):
        filled.view(torch.int32).fill_(-1)
    c = gx.new_empty(L, last + 1, B, 1, others) if others else gx.new_empty(L, 0)
    saved = gx.new_empty(L, 0)
    if save == "gates":
        saved = scan.allocate_saved(cell, gx.expand(L, *gx.shape).flatten(0, 1)).unflatten(0, (L, T))
    hn, cn = gx.new_empty(L, 1, B, H), gx.new_empty(L, 1, B, others) if others else gx.new_empty(L, 0)
    scan.fill(y[:, 0, :, 0], h0)
    if others:
        scan.fill(c[:, 0, :, 0], c0)
    w, b, u, bias, params, mask = scan.aligned(w, b, u, bias, params, mask)
    constants = scan.forward_constants(
        cell, plan, (1, H, 0), u.dtype, None if mask is None else mask.dtype, precision, save
    )
    arguments = {
        "gx_ptr": gx, "u_ptr": u, "bias_ptr": bias, "params_ptr": params, "dropout_ptr": None, "y_ptr": y, "c_ptr": c,
        "saved_ptr": saved, "mask_ptr": None if mask is None else mask.view(torch.uint8), "hn_ptr": hn, "cn_ptr": cn,
        "w_ptr": w, "b_ptr": b, "between_ptr": between, "T": T, "B": B, **constants, "LAYERS": L, "LOADS": -1,
    }  # fmt: skip
    programs = (-(-B // plan.block_b), 1, 2 * L - 1)
    launch(scan.Launch(resident.forward_kernel, programs, arguments, plan))
    return Scanned(y, c, saved, hn, cn)


def backward(
    cell: Cell,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    w: Tensor,
    u: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    mask: Tensor | None,
    *,
    plan: Plan,
    params: Tensor | None = None,
    precision: str = "ieee",
    launch: Callable[[scan.Launch], None] = scan.run,
) -> Gradients:
    """All steps of L layers backward: what `scan.backward` gives, of each layer, along a first axis of L.

    dy [T, B, 1, H] of the last layer's y; y, c, saved: those of `forward`, along a first axis of L. All else as in
    `scan.backward`, with an axis of layers in place of the groups'. w: as in `forward`.
    """
    L, T, B, H = y.shape[0], y.shape[1] - 1, y.shape[2], y.shape[4]
    apart, stored, others = len(cell.apart), len(cell.stored), cell.states - 1
    dy = y.new_zeros(T, B, 1, H) if dy is None else dy
    dgx, between = y.new_empty(L, T, B, 1, cell.gates * H), y.new_empty(L - 1, T, B, 1, H)
    for filled in (dgx, between):
        filled.view(torch.int32).fill_(-1)
    dhu, m = (y.new_empty(L, T, B, 1, n * H) if n else y.new_empty(L, 0) for n in (apart, stored))
    dh0, dc0 = y.new_empty(L, 1, B, H), y.new_empty(L, 1, B, others * H) if others else y.new_empty(L, 0)
    tiles = -(-B // plan.block_b)
    shares = scratch(y, tiles, L, cell.params * H).zero_() if cell.params else None
    dy, dhn, dcn, w, u, params, mask = scan.aligned(dy, dhn, dcn, w, u, params, mask)
    constants = scan.backward_constants(cell, plan, (1, H, 0), u.dtype, None if mask is None else mask.dtype, precision)
    arguments = {
        "dy_ptr": dy, "dcs_ptr": None, "dhn_ptr": dhn, "dcn_ptr": dcn, "u_ptr": u, "params_ptr": params,
        "dropout_ptr": None, "y_ptr": y, "c_ptr": c, "saved_ptr": saved,
        "mask_ptr": None if mask is None else mask.view(torch.uint8), "dgx_ptr": dgx, "dhu_ptr": dhu, "m_ptr": m,
        "dparams_ptr": shares, "dh0_ptr": dh0, "dc0_ptr": dc0, "w_ptr": w, "between_ptr": between, "T": T, "B": B,
        **constants, "LAYERS": L,
    }  # fmt: skip
    launch(scan.Launch(resident_backward.backward_kernel, (tiles, 1, 2 * L - 1), arguments, plan))
    dparams = scratch(y, L, 0) if shares is None else shares.sum(0)[:, None]
    return Gradients(dgx, dhu, m, dh0, dc0, dparams)

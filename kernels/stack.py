"""A stack of layers in one launch, forward: each layer a few steps behind the one below (see `between`).

Layer by layer, a small batch leaves most of a device idle: its few programs take all steps of a layer, while the layers
above wait. Here all layers take steps at the same time, each on processors of its own, and beside them the products
with the input weights between two layers, which layer by layer are one GEMM. A step costs what it costs in one layer, so
L layers take little more time than one. The layers' results are those of `scan.forward`, each in its own buffers, so
backward goes through them layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import resident, scan
from .buffers import Scanned
from .cells import Cell
from .devices import INTERPRETER, Device
from .plan import Plan

LAG = 4  # steps that a program is behind the one below: a guess, a round trip through the second-level cache


def plan_stack(cell: Cell, one: Plan, layers: int, B: int, T: int, H: int, itemsize: int, device: Device) -> Plan | str:
    """The plan of a stack of that many layers, from that of one of them; or why there is none."""
    if layers < 2:
        return "there is one layer"
    if one.schedule != "resident" or not cell.products:
        return f"a layer runs by {one.schedule}"
    if not 0 < cell.gates <= cell.products:
        return "the input has more tiles than the state has products"
    if itemsize == 8 or H * itemsize % 4:
        return "rows are not whole words of 32 bits"
    programs = (2 * layers - 1) * -(-B // one.block_b)
    if programs > device.processors and device is not INTERPRETER:
        return f"{programs} programs are more than {device.name} has processors"
    if 2 * LAG * (layers - 1) + T >= layers * T:
        return f"{T} steps are too few"
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
) -> list[Scanned]:
    """All steps of L layers forward: what `scan.forward` gives, of each layer.

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
    return [Scanned(*each) for each in zip(y, c, saved, hn, cn, strict=True)]

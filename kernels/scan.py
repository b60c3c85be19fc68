"""The scan over time: allocates, and launches the kernels of the planned schedule. Tensors in, tensors out.

Legend: B batch, T steps, H hidden units, G gates, S saved tiles (see `cells`), time-major and contiguous throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import recompute as recompute_schedule
from . import resident, stepwise
from .cells import Cell
from .plan import INTERPRETER, Device, Plan

ACCUMULATE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@cache
def device_facts(device: torch.device) -> Device:
    """What `plan` needs to know of a device that is present."""
    if device.type != "cuda":
        return INTERPRETER
    p = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        # 64 KB of local data share a workgroup on every CDNA part before gfx950.
        return Device(p.name, 0, p.multi_processor_count, 64 * 1024)
    return Device(p.name, 10 * p.major + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)  # type: ignore[attr-defined]


class Launch(NamedTuple):
    """One kernel launch. arguments: everything the kernel takes, by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    plan: Plan


def compile_options(plan: Plan) -> dict[str, Any]:
    """What Triton is told beside the arguments. enable_fp_fusion: its default differs between releases."""
    options: dict[str, Any] = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "enable_fp_fusion": True}
    if plan.nvidia:
        options["maxnreg"] = plan.registers
    return options


def run(launch: Launch) -> None:
    """Launch it on the device of its tensors."""
    device = launch.arguments["y_ptr"].device
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.kernel[launch.grid](
            **launch.arguments,
            **compile_options(launch.plan),
        )


def _aligned(x: Tensor | None) -> Tensor | None:
    """x, contiguous and on a 16-byte boundary (else the kernel would be compiled once more for this one tensor)."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.device.type == "cuda" and x.data_ptr() % 16 else x


def _bytes(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else _aligned(resets).view(torch.uint8)  # type: ignore[union-attr]


def _constants(cell: Cell, H: int, plan: Plan, u: Tensor, precision: str) -> dict[str, Any]:
    """The constexprs all kernels share. precision: tl.dot's input_precision for float32."""
    tiles = {"H": H, "BLOCK_H": plan.block_h, "BLOCK_B": plan.block_b, "ACC": ACCUMULATE[u.dtype]}
    shape = {"G": cell.gates, "SPLIT": cell.split, "INNER": cell.inner, "STATES": cell.states, "SAVED": cell.saved}
    fast = u.dtype in (torch.float16, torch.bfloat16) and plan.nvidia
    return {**tiles, **shape, "PACK": 8 // u.element_size(), "PRECISION": precision, "FAST": fast}


def _resident_constants(plan: Plan) -> dict[str, Any]:
    return {"WARPS": plan.num_warps, "U_IN_REGISTERS": plan.u_in_registers}


def _scratch(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised buffer in the accumulation type."""
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


class Scanned(NamedTuple):
    """y [T+1, B, H] (y[0] = h0), c [T+1 or 1, B, H] or [0], saved [T, B, W, H] or [0], hn, cn [1, B, H] (cn [0])."""

    y: Tensor
    c: Tensor
    saved: Tensor
    hn: Tensor
    cn: Tensor


def _fill(state: Tensor, start: Tensor | None) -> None:
    if start is None:
        state.zero_()
    else:
        state.copy_(start.reshape(state.shape))


def allocate_saved(cell: Cell, gx: Tensor) -> Tensor:
    """Room for the saved tiles [T, B, W, H]: W 64-bit words of them, or the one tile of a cell that saves one."""
    T, B, H = gx.shape[0], gx.shape[1], gx.shape[2] // cell.gates
    pack = 8 // gx.element_size() if cell.saved > 1 else 1
    return gx.new_empty(T, B, -(-cell.saved // pack), H, dtype=gx.dtype if pack == 1 else torch.int64)


def allocate(cell: Cell, gx: Tensor, save: str) -> Scanned:
    """The uninitialised outputs of `forward`."""
    T, B, H = gx.shape[0], gx.shape[1], gx.shape[2] // cell.gates
    two = cell.states == 2
    return Scanned(
        gx.new_empty(T + 1, B, H),
        gx.new_empty(1 if save == "none" else T + 1, B, H) if two else gx.new_empty(0),
        allocate_saved(cell, gx) if save == "gates" else gx.new_empty(0),
        # With torch.nn's leading axis of one layer: a view made afterwards could not be detached in place.
        gx.new_empty(1, B, H),
        gx.new_empty(1, B, H) if two else gx.new_empty(0),
    )


def forward(
    cell: Cell,
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    resets: Tensor | None,
    *,
    save: str,
    plan: Plan,
    precision: str = "ieee",
    launch: Callable[[Launch], None] = run,
) -> Scanned:
    """All steps forward.

    gx [T, B, G*H] (contiguous), u [G*H, H], bias [inner*H] (b_hh of the inner gates), h0, c0 [B, H],
    resets [T, B] bool.
    save: "none"; "states" keeps c beside y; "gates" all that backward wants.
    """
    T, B, H = gx.shape[0], gx.shape[1], u.shape[1]
    out = allocate(cell, gx, save)
    _fill(out.y[0], h0)
    if cell.states == 2:
        _fill(out.c[0], c0)
    constants = _constants(cell, H, plan, u, precision)
    constants |= {"SAVE": save != "none", "SAVED": cell.saved if save == "gates" else 0}
    constants |= {"STEP": cell.forward, "MIDDLE": cell.middle}
    arguments = {
        "gx_ptr": gx, "u_ptr": _aligned(u), "bias_ptr": _aligned(bias), "y_ptr": out.y, "c_ptr": out.c,
        "saved_ptr": out.saved, "resets_ptr": _bytes(resets), "B": B,
    }  # fmt: skip
    if plan.schedule == "resident":
        arguments |= {"hn_ptr": out.hn, "cn_ptr": out.cn, "T": T, **_resident_constants(plan)}
        launch(Launch(resident.forward_kernel, (triton.cdiv(B, plan.block_b),), {**arguments, **constants}, plan))
        return out

    sh, sc = _scratch(gx, B, H), _scratch(gx, *out.cn.shape)
    _fill(sh, h0)
    _fill(sc, c0)
    second = cell.split < cell.gates
    arguments |= {
        "sh_ptr": sh,
        "sc_ptr": sc,
        "hu_first_ptr": _scratch(gx, B, cell.split * H) if second else None,
        "m_ptr": gx.new_empty(B, H) if second else None,
    }
    grid = (triton.cdiv(H, plan.block_h), triton.cdiv(B, plan.block_b))
    for t in range(T):
        for phase in (0, 1) if second else (0,):
            varying = {"t": t, "PHASE": phase, "BLOCK_K": plan.block_k}
            launch(Launch(stepwise.forward_kernel, grid, {**arguments, **constants, **varying}, plan))
    out.hn.copy_(sh)
    out.cn.copy_(sc)
    return out


class Gradients(NamedTuple):
    """dgx [T, B, G*H]; dhu [T, B, inner*H] or [0]; m [T, B, H] or [0]; dh0, dc0 [B, H] (dc0 [0])."""

    dgx: Tensor
    dhu: Tensor
    m: Tensor
    dh0: Tensor
    dc0: Tensor


def allocate_gradients(cell: Cell, y: Tensor) -> Gradients:
    """The uninitialised outputs of `backward`."""
    T, B, H = y.shape[0] - 1, y.shape[1], y.shape[2]
    return Gradients(
        y.new_empty(T, B, cell.gates * H),
        y.new_empty(T, B, cell.inner * H) if cell.inner else y.new_empty(0),
        y.new_empty(T, B, H) if cell.split < cell.gates else y.new_empty(0),
        y.new_empty(B, H),
        y.new_empty(B, H) if cell.states == 2 else y.new_empty(0),
    )


def backward(
    cell: Cell,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    u: Tensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    resets: Tensor | None,
    *,
    plan: Plan,
    precision: str = "ieee",
    launch: Callable[[Launch], None] = run,
) -> Gradients:
    """All steps backward.

    dy [T, B, H], dhn, dcn [1, B, H] (None: zero); y, c, saved from `forward`.
    """
    T, B, H = y.shape[0] - 1, y.shape[1], y.shape[2]
    out = allocate_gradients(cell, y)
    constants = _constants(cell, H, plan, u, precision)
    constants |= {"STEP": cell.backward, "MIDDLE": cell.backward_middle}
    arguments = {
        "dy_ptr": _aligned(dy), "u_ptr": _aligned(u), "y_ptr": y, "c_ptr": c, "saved_ptr": saved,
        "resets_ptr": _bytes(resets), "dgx_ptr": out.dgx, "dhu_ptr": out.dhu, "m_ptr": out.m, "B": B,
    }  # fmt: skip
    if plan.schedule == "resident":
        arguments |= {
            "dhn_ptr": _aligned(dhn),
            "dcn_ptr": _aligned(dcn),
            "dh0_ptr": out.dh0,
            "dc0_ptr": out.dc0,
            "T": T,
            **_resident_constants(plan),
        }
        launch(Launch(resident.backward_kernel, (triton.cdiv(B, plan.block_b),), {**arguments, **constants}, plan))
        return out

    dsh, dsc = _scratch(y, B, H), _scratch(y, *out.dc0.shape)
    _fill(dsh, dhn)
    _fill(dsc, dcn)
    arguments |= {"dsh_ptr": dsh, "dsc_ptr": dsc, "BLOCK_K": plan.block_k}
    grid = (triton.cdiv(H, plan.block_h), triton.cdiv(B, plan.block_b))
    for t in range(T - 1, -2, -1):
        for phase in (0, 1) if cell.split < cell.gates and t >= 0 else (0,):
            varying = {"t": t, "PHASE": phase, "FIRST": t == T - 1, "LAST": t < 0}
            launch(Launch(stepwise.backward_kernel, grid, {**arguments, **constants, **varying}, plan))
    out.dh0.copy_(dsh)
    out.dc0.copy_(dsc)
    return out


def recompute(
    cell: Cell,
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    y: Tensor,
    c: Tensor,
    resets: Tensor | None,
    *,
    plan: Plan,
    launch: Callable[[Launch], None] = run,
) -> Tensor:
    """What save="gates" would have kept, from what save="states" keeps."""
    T, B, H = y.shape[0] - 1, y.shape[1], y.shape[2]
    saved = allocate_saved(cell, gx)
    if not cell.saved:
        return saved
    h = previous_outputs(y, resets).view(T * B, H)
    split = cell.split * H
    hu = gx.new_empty(T * B, cell.gates * H)
    m = gx.new_empty(T * B, H) if cell.split < cell.gates else None
    constants = _constants(cell, H, plan, u, "ieee")
    # Pointwise over T*B rows: any tile will do, and this one keeps loads whole.
    constants |= {
        "BLOCK_H": min(128, triton.next_power_of_2(H)),
        "BLOCK_B": 8,
        "STEP": cell.forward,
        "MIDDLE": cell.middle,
    }
    del constants["PRECISION"]
    arguments = {
        "gx_ptr": gx, "hu_ptr": hu, "bias_ptr": _aligned(bias), "y_ptr": y, "c_ptr": c, "saved_ptr": saved,
        "resets_ptr": _bytes(resets), "m_ptr": m, "N": T * B,
    }  # fmt: skip
    grid = (triton.cdiv(T * B, constants["BLOCK_B"]), triton.cdiv(H, constants["BLOCK_H"]))
    hu[:, :split] = h @ u[:split].t()
    if m is not None:
        launch(Launch(recompute_schedule.kernel, grid, {**arguments, **constants, "PHASE": 0}, plan))
        hu[:, split:] = m @ u[split:].t()
    launch(Launch(recompute_schedule.kernel, grid, {**arguments, **constants, "PHASE": 1}, plan))
    return saved


def previous_outputs(y: Tensor, resets: Tensor | None) -> Tensor:
    """h before each step as the recurrent product saw it: y[:-1], zero where reset. [T, B, H]"""
    return y[:-1] if resets is None else y[:-1].masked_fill(resets[..., None], 0)

"""The scan over time: allocates the buffers and launches the kernels of the planned schedule. Tensors in, tensors out.

Legend: B batch, T steps, K groups (see `tiles`), H hidden units, G tiles of gx, S states, P trained vectors (see
`form`); time-major and contiguous throughout. reversed: an integer; group k goes from the last step to the first if
its bit k is set. mask: [T, B], bool (where set, the states before that step are reset to zero) or uint8 codes (see
`buffers`; a row may also end before T), or None.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid, means, resident, resident_backward, stepwise, streamed
from . import recompute as recompute_schedule
from .buffers import Gradients, Scanned, is_reversed, previous_outputs, scratch, steps
from .cells import Cell
from .devices import INTERPRETER, Device, present
from .exchange import flagged
from .plan import Plan, chunks, parts, slices

ACCUMULATE = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# In a pipelined loop, Triton 3.6 puts no fence between what copies to shared memory and the warp group's product that
# reads it (Hopper).
PIPELINES_RACE = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)


def doubtful(device: Device, dtype: torch.dtype) -> tuple[str, ...]:
    """The schedules that no plan chooses by itself. With Triton 3.6 on Hopper (an H200) the LSTM and the GRU by
    `stepwise` were wrong by 0.2 in bfloat16, at H=128 and B=130, and it is not known why."""
    return ("stepwise",) if PIPELINES_RACE and device.capability == 90 and dtype.itemsize == 2 else ()


@cache
def device_facts(device: torch.device) -> Device:
    """The facts about a device of this machine that `plan` needs."""
    if device.type != "cuda":
        return INTERPRETER
    p = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        # 64 KB of local data share a workgroup on every CDNA part before gfx950.
        return present(p.name, 0, p.multi_processor_count, 64 * 1024)
    shared = p.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs
    return present(p.name, 10 * p.major + p.minor, p.multi_processor_count, shared)


class Launch(NamedTuple):
    """One kernel launch. arguments: everything the kernel takes, by name."""

    kernel: Any  # a Triton function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors, numbers and functions
    plan: Plan


@cache
def compile_options(plan: Plan) -> dict[str, object]:
    """What Triton is told beside the arguments. enable_fp_fusion: its default differs between releases."""
    num_stages = 1 if PIPELINES_RACE else plan.num_stages
    options: dict[str, object] = {"num_warps": plan.num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if plan.capability > 0:
        options["maxnreg"] = plan.registers
        # The driver then starts all programs at once, or refuses: none can wait for one that never starts.
        options["launch_cooperative_grid"] = plan.waits
    return options


def run(launch: Launch) -> None:
    """Launch it on the device of its tensors."""
    device = next(given for given in launch.arguments.values() if isinstance(given, Tensor)).device
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.kernel[launch.grid](**launch.arguments, **compile_options(launch.plan))


def aligned(*tensors: Tensor | None) -> list[Any]:  # None only where it is given
    """The tensors, contiguous and on 16-byte boundaries (else the kernel would be compiled once more for this one)."""
    return [
        x if x is None or (x.is_contiguous() and not (x.is_cuda and x.data_ptr() % 16)) else _copied(x) for x in tensors
    ]


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _rounds_before(precision: str, dtype: torch.dtype) -> bool:
    """Whether operands of `stepwise`'s products are rounded to TF32 before they are loaded."""
    return precision == "tf32" and dtype == torch.float32


def _rounded(x: Tensor) -> Tensor:
    """x rounded to TF32, as `math.operand` does."""
    bits = x.view(torch.int32)
    return (torch.where(x.isfinite(), bits + 0x1000, bits) & -0x2000).view(torch.float32)


# The constexprs of a kernel follow from a few facts about the scan. They are put together once for each combination:
# doing it at every call would cost more than the launch.
_per_scan = lru_cache(maxsize=1024)


def _constants(
    cell: Cell, plan: Plan, shape: tuple[int, int, int], dtype: torch.dtype, mask: torch.dtype | None, precision: str
) -> dict[str, object]:
    """The constexprs all kernels share. shape: K, H, reversed. mask: its type. precision: tl.dot's for float32."""
    groups, hidden, reversed = shape
    tiles = {"GROUPS": groups, "REVERSED": reversed, "H": hidden}
    tiles |= {"BLOCK_H": plan.block_h, "BLOCK_B": plan.block_b, "ACC": ACCUMULATE[dtype]}
    # The tuples have an entry for each operand (STATE_OF: of level 1; -1 for one that is computed) or product.
    states = tuple(-1 if o.state is None else o.state for o in cell.operands if o.level == 1)
    layout = {"G": cell.gates, "GATES": tuple(o.products for o in cell.operands), "LEVEL": cell.level}
    layout |= {"STATE_OF": states, "ADDS": cell.adds, "LATE": cell.late, "PUBLISHED": cell.published}
    layout |= {"STATES": cell.states, "SAVED": cell.saved, "PARAMS": cell.params, "PACK": 8 // dtype.itemsize}
    layout |= {"DRAWN": cell.drawn}
    fast = dtype in (torch.float16, torch.bfloat16) and plan.capability > 0
    # Only a mask of codes can mark padding; kernels for resets alone do not pay for it.
    return {**tiles, **layout, "PRECISION": precision, "FAST": fast, "PADDING": mask == torch.uint8}


def _of_schedule(cell: Cell, plan: Plan, hidden: int, backward: bool) -> dict[str, object]:
    """The constexprs of the plan's schedule alone."""
    constants: dict[str, object] = {}
    if plan.schedule != "stepwise":
        constants |= {"WARPS": plan.num_warps, "U_IN_REGISTERS": plan.u_in_registers}
    if plan.schedule == "resident":
        return constants
    if backward:
        # Five numbers for each of the cell's segments (see `form`).
        flat = [(s.operand, s.first, s.count, int(s.apart), s.column) for s in cell.segments]
        constants["SEGMENTS"] = tuple(number for segment in flat for number in segment)
    if plan.schedule == "grid":
        constants["MEANS"] = cell.means[3:] if backward else cell.means[:3]
        constants["PTX"] = plan.capability > 0 and plan.block_b < 64  # with 64 rows its two operands would be spilled
        # Into how many chunks the columns of each slice of U are cut (the last chunk may be smaller).
        cut = slices(cell, hidden, plan.block_h, backward)
        least = [16 * parts(rows, plan.block_b, plan.num_warps) for rows, _ in cut]
        constants["CHUNKS"] = tuple(chunks(c, n, plan.block_k)[0] for (_, c), n in zip(cut, least, strict=True))
    return constants


@_per_scan
def forward_constants(
    cell: Cell,
    plan: Plan,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    mask: torch.dtype | None,
    precision: str,
    save: str,
) -> dict[str, object]:
    constants = _constants(cell, plan, shape, dtype, mask, precision)
    constants |= {"SAVE": save != "none", "SAVED": cell.saved if save == "gates" else 0}
    constants |= {"STEP": cell.forward, "OPERANDS_1": cell.operands_1, "OPERANDS_2": cell.operands_2}
    if plan.schedule == "grid":
        constants["FLAGGED"] = flagged(cell, plan, shape[1], dtype.itemsize)
    elif plan.schedule == "resident":
        constants["LOADS"] = resident.loads(cell, plan, dtype.itemsize, save != "none")
    return constants | _of_schedule(cell, plan, shape[1], False)


@_per_scan
def backward_constants(
    cell: Cell, plan: Plan, shape: tuple[int, int, int], dtype: torch.dtype, mask: torch.dtype | None, precision: str
) -> dict[str, object]:
    constants = _constants(cell, plan, shape, dtype, mask, precision)
    constants |= {"STEP": cell.backward, "BACKWARD_2": cell.backward_2, "FINISH": cell.finish}
    return constants | _of_schedule(cell, plan, shape[1], True)


def fill(state: Tensor, start: Tensor | None) -> None:
    if start is None:
        state.zero_()
    else:
        state.copy_(start)


def _start(rows: Tensor, start: Tensor | None, reversed: int) -> None:
    """start [K, B, .] into the row of the buffer [., B, K, .] that each group starts from; zero at the other end."""
    if start is None:
        rows[0].zero_()
        if reversed:
            rows[-1].zero_()
    elif not reversed:
        rows[0].transpose(0, 1).copy_(start)
    else:
        for k in range(rows.shape[2]):
            first, last = (-1, 0) if is_reversed(k, reversed) else (0, -1)
            rows[first, :, k].copy_(start[k])
            rows[last, :, k].zero_()


def allocate_saved(cell: Cell, gx: Tensor) -> Tensor:
    """Room for the saved tiles [T, B, K, W, H]: W 64-bit words of them, or the one tile of a cell that saves one."""
    T, B, K, H = *gx.shape[:3], gx.shape[3] // cell.gates
    pack = 8 // gx.element_size() if cell.saved > 1 else 1
    return gx.new_empty(T, B, K, -(-cell.saved // pack), H, dtype=gx.dtype if pack == 1 else torch.int64)


def allocate(cell: Cell, gx: Tensor, save: str, reversed: int = 0) -> Scanned:
    """The uninitialised outputs of `forward`."""
    T, B, K, H = *gx.shape[:3], gx.shape[3] // cell.gates
    others = (cell.states - 1) * H
    rows = T + (2 if reversed else 1)
    return Scanned(
        gx.new_empty(rows, B, K, H),
        gx.new_empty(1 if save == "none" else rows, B, K, others) if others else gx.new_empty(0),
        allocate_saved(cell, gx) if save == "gates" else gx.new_empty(0),
        gx.new_empty(K, B, H),
        gx.new_empty(K, B, others) if others else gx.new_empty(0),
    )


def _programs(plan: Plan, B: int, K: int, H: int) -> tuple[int, ...]:
    """The launch grid: batch tiles and groups; where units are spread, unit tiles first."""
    tiles = -(-B // plan.block_b)
    return (tiles, K) if plan.schedule == "resident" else (-(-H // plan.block_h), tiles, K)


def _products(kernel: Any, arguments: dict[str, Any], plan: Plan) -> Launch:
    """A launch of one of `streamed`, with those of stepwise's arguments that it takes, and the plan's own tiles."""
    arguments = {**arguments, "BLOCK_H": plan.block_h, "BLOCK_B": plan.block_b}
    programs = _programs(plan, arguments["B"], arguments["GROUPS"], arguments["H"])
    return Launch(kernel, programs, {name: arguments[name] for name in kernel.arg_names}, plan)


def _launch_grid(
    kernel: object,
    arguments: dict[str, Any],
    phases: tuple[int, ...],
    programs: tuple[int, ...],
    plan: Plan,
    T: int,
    launch: Callable[[Launch], None],
) -> None:
    """The `grid` schedule: one launch for all steps; or, interpreted, one for each part of a step between barriers."""
    counter = sums = None
    exchanges, like = arguments["MEANS"], arguments["y_ptr"]
    if plan.waits:
        # At most two arrivals a program and step, and those of its means.
        if max(2, sum(map(len, exchanges))) * T * programs[0] >= 1 << 31:
            too_long = f"sequence length {T} is too long for the grid schedule's counters"
            raise ValueError(f"{too_long}: ask for triton:stepwise")
        tiles = programs[1] * programs[2]
        counter = torch.zeros((1 + bool(exchanges)) * tiles, dtype=torch.int32, device=like.device)
        if exchanges:
            sums = scratch(like, tiles, sum(map(sum, exchanges)), programs[0], plan.block_b)
    arguments = {**arguments, "counter_ptr": counter, "sums_ptr": sums}
    if plan.capability > 0 or not plan.waits:
        launch(Launch(kernel, programs, {**arguments, "first": 0, "last": T, "done": 0, "PHASE": -1}, plan))
        return
    for t in range(T):
        for phase, done in means.parts(phases, exchanges):
            varying = {"first": t, "last": t + 1, "done": done, "PHASE": phase}
            launch(Launch(kernel, programs, {**arguments, **varying}, plan))


def forward(
    cell: Cell,
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    mask: Tensor | None,
    *,
    save: str,
    plan: Plan,
    params: Tensor | None = None,
    dropout: Tensor | None = None,
    reversed: int = 0,
    precision: str = "ieee",
    launch: Callable[[Launch], None] = run,
) -> Scanned:
    """All steps forward.

    gx [T, B, K, G*H] (contiguous), u [K, products*H, H], bias (b_hh of the products apart) [K, apart*H], h0 [K, B, H],
    c0 (the other states side by side) [K, B, (S-1)*H], mask [T, B] or None, params [K, P*H] or None; dropout: see
    `random`. In padding y and c are zero; a reversed group's are the states it starts from.
    save: "none"; "states" saves c beside y; "gates" saves all that backward needs.
    """
    T, B, K, H = *gx.shape[:3], u.shape[2]
    out = allocate(cell, gx, save, reversed)
    if T > 1 and flagged(cell, plan, H, gx.element_size()):
        out.y.view(torch.int32).fill_(-1)
    _start(out.y, h0, reversed)
    if cell.states > 1 and (save != "none" or plan.schedule == "resident"):
        _start(out.c, c0, reversed if save != "none" else 0)
    u, bias, params, dropout, mask = aligned(u, bias, params, dropout, mask)
    mask_type = None if mask is None else mask.dtype
    units = plan  # of the launches that call the cell's functions
    if cell.means and plan.schedule == "stepwise":
        units = means.whole(plan, H, u.element_size())
    constants = forward_constants(cell, units, (K, H, reversed), u.dtype, mask_type, precision, save)
    arguments = {
        "gx_ptr": gx, "u_ptr": u, "bias_ptr": bias, "params_ptr": params, "dropout_ptr": dropout, "y_ptr": out.y,
        "c_ptr": out.c, "saved_ptr": out.saved, "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "T": T, "B": B, **constants,
    }  # fmt: skip
    programs = _programs(units, B, K, H)
    if plan.schedule == "resident":
        arguments |= {"hn_ptr": out.hn, "cn_ptr": out.cn, "w_ptr": None, "b_ptr": None, "between_ptr": None}
        launch(Launch(resident.forward_kernel, programs, {**arguments, "LAYERS": 1}, plan))
        return out

    sh, sc = scratch(gx, K, B, H), scratch(gx, *out.cn.shape)
    fill(sh, h0)
    fill(sc, c0)
    second = len(cell.operands) - cell.level
    apart = cell.means and plan.schedule == "stepwise"  # products are launches of their own
    kept = cell.products if apart else cell.first_products if second else 0
    arguments |= {
        "sh_ptr": sh,
        "sc_ptr": sc,
        "v_ptr": gx.new_empty(2, B, K, cell.level * H) if cell.published else None,
        "hu_first_ptr": scratch(gx, K, B, kept * H) if kept else None,
        "m_ptr": gx.new_empty(B, K, second * H) if second else None,
    }
    phases = (0,) * cell.published + (1, 2)[: 2 if second else 1]
    if plan.schedule == "grid":
        _launch_grid(grid.forward_kernel, arguments, phases, programs, plan, T, launch)
    else:
        h: list[Tensor | None] = [None, None]
        if _rounds_before(precision, u.dtype):
            arguments["u_ptr"] = _rounded(u)
            if cell.operands and not cell.published:
                h = [_rounded(sh.transpose(0, 1).contiguous()), gx.new_empty(B, K, H)]
        for t in range(T):
            for phase in phases:
                varying: dict[str, object] = {"t": t, "PHASE": phase, "BLOCK_K": plan.block_k}
                varying |= {"h_ptr": h[t % 2], "h_after_ptr": h[1 - t % 2], "WHOLE": bool(cell.means)}
                if phase and cell.means and cell.operands:
                    launch(_products(streamed.forward_kernel, {**arguments, **varying}, plan))
                launch(Launch(stepwise.forward_kernel, programs, {**arguments, **varying}, units))
    out.hn.copy_(sh)
    out.cn.copy_(sc)
    return out


def allocate_gradients(cell: Cell, y: Tensor, reversed: int = 0) -> Gradients:
    """The uninitialised outputs of `backward`."""
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    apart, stored, others = len(cell.apart), len(cell.stored), cell.states - 1
    return Gradients(
        y.new_empty(T, B, K, cell.gates * H),
        y.new_empty(T, B, K, apart * H) if apart else y.new_empty(0),
        y.new_empty(T, B, K, stored * H) if stored else y.new_empty(0),
        y.new_empty(K, B, H),
        y.new_empty(K, B, others * H) if others else y.new_empty(0),
        scratch(y, K, cell.params * H) if cell.params else scratch(y, 0),
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
    mask: Tensor | None,
    *,
    plan: Plan,
    params: Tensor | None = None,
    dropout: Tensor | None = None,
    dcs: Tensor | None = None,
    reversed: int = 0,
    precision: str = "ieee",
    launch: Callable[[Launch], None] = run,
) -> Gradients:
    """All steps backward.

    dy [T, B, K, H], dhn [K, B, H], dcn [K, B, (S-1)*H], dcs [T, B, K, (S-1)*H] of the c after every step (None: zero);
    y, c, saved from `forward`. In padding dy and dcs are not read, and dgx, dhu and m are zero.
    """
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    out = allocate_gradients(cell, y, reversed)
    units = plan  # of the launches that call the cell's functions
    if cell.means and plan.schedule == "stepwise":
        units = means.whole(plan, H, u.element_size())
    programs = _programs(units, B, K, H)
    # A program adds for its own rows, in a fixed order: two runs give the same bits.
    shares = scratch(y, -(-B // units.block_b), *out.dparams.shape).zero_() if cell.params else None
    dy, dhn, dcn, dcs, u, params, dropout, mask = aligned(dy, dhn, dcn, dcs, u, params, dropout, mask)
    mask_type = None if mask is None else mask.dtype
    constants = backward_constants(cell, units, (K, H, reversed), u.dtype, mask_type, precision)
    arguments = {
        "dy_ptr": dy, "dcs_ptr": dcs, "u_ptr": u, "params_ptr": params, "dropout_ptr": dropout, "y_ptr": y,
        "c_ptr": c, "saved_ptr": saved, "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "dgx_ptr": out.dgx, "dhu_ptr": out.dhu, "m_ptr": out.m, "dparams_ptr": shares, "T": T, "B": B, **constants,
    }  # fmt: skip
    if plan.schedule == "resident":
        arguments |= {"dhn_ptr": dhn, "dcn_ptr": dcn, "dh0_ptr": out.dh0, "dc0_ptr": out.dc0}
        arguments |= {"w_ptr": None, "between_ptr": None, "LAYERS": 1}
        launch(Launch(resident_backward.backward_kernel, programs, arguments, plan))
        return out if shares is None else out._replace(dparams=shares.sum(0))

    dsh, dsc = scratch(y, K, B, H), scratch(y, *out.dc0.shape)
    fill(dsh, dhn)
    fill(dsc, dcn)
    arguments |= {"dsh_ptr": dsh, "dsc_ptr": dsc}
    phases = (0, 1) if cell.level < len(cell.operands) else (1,)
    if plan.schedule == "grid":
        _launch_grid(grid.backward_kernel, arguments, phases + (2,) * bool(cell.operands), programs, plan, T, launch)
    else:
        if _rounds_before(precision, u.dtype):
            arguments["u_ptr"] = _rounded(u)
        arguments["dv_ptr"] = dv = scratch(y, K, B, len(cell.operands) * H) if cell.means and cell.operands else None
        for t in range(T - 1, -2, -1):
            for phase in phases if t >= 0 else phases[:1]:
                varying = {"t": t, "PHASE": phase, "FIRST": t == T - 1, "LAST": t < 0, "BLOCK_K": plan.block_k}
                if dv is not None and phase == phases[0] and t < T - 1:
                    of_next = {"t": t + 1, "PHASE": 2}
                    launch(_products(streamed.backward_kernel, {**arguments, **varying, **of_next}, plan))
                if dv is not None and phase and len(phases) > 1:
                    launch(_products(streamed.backward_kernel, {**arguments, **varying}, plan))
                launch(Launch(stepwise.backward_kernel, programs, {**arguments, **varying}, units))
    out.dh0.copy_(dsh)
    out.dc0.copy_(dsc)
    return out if shares is None else out._replace(dparams=shares.sum(0))


def recompute(
    cell: Cell,
    gx: Tensor,
    u: Tensor,
    bias: Tensor | None,
    y: Tensor,
    c: Tensor,
    mask: Tensor | None,
    *,
    plan: Plan,
    params: Tensor | None = None,
    dropout: Tensor | None = None,
    reversed: int = 0,
    launch: Callable[[Launch], None] = run,
) -> Tensor:
    """What save="gates" would have saved, from what save="states" saves."""
    T, B, K, H = steps(y, reversed), *y.shape[1:]
    saved = allocate_saved(cell, gx)
    if not cell.saved:
        return saved
    N, second = T * B, len(cell.operands) - cell.level
    hu = gx.new_empty(N, K, cell.products * H)
    v = gx.new_empty(N, K, cell.level * H) if cell.published else None
    m = gx.new_empty(N, K, second * H) if second else None
    bias, params, dropout, mask = aligned(bias, params, dropout, mask)
    constants = _constants(cell, plan, (K, H, reversed), u.dtype, None if mask is None else mask.dtype, "ieee")
    if cell.means:
        plan = means.whole(plan, H, u.element_size())
        constants |= {"BLOCK_H": plan.block_h, "BLOCK_B": plan.block_b}
    else:  # pointwise over T*B rows: any tile will do, and with this one loads are contiguous
        constants |= {"BLOCK_H": min(128, triton.next_power_of_2(H)), "BLOCK_B": 8}
    constants |= {"STEP": cell.forward, "OPERANDS_1": cell.operands_1, "OPERANDS_2": cell.operands_2}
    del constants["PRECISION"]
    arguments = {
        "gx_ptr": gx, "hu_ptr": hu, "bias_ptr": bias, "params_ptr": params, "dropout_ptr": dropout, "y_ptr": y,
        "c_ptr": c, "saved_ptr": saved, "mask_ptr": None if mask is None else mask.view(torch.uint8),
        "v_ptr": v, "m_ptr": m, "N": N, "B": B,
    }  # fmt: skip
    programs = (triton.cdiv(N, constants["BLOCK_B"]), triton.cdiv(H, constants["BLOCK_H"]), K)
    plan = replace(plan, waits=False)  # these programs do not, and there may be more than the device holds at once

    def run_phase(phase: int) -> None:
        launch(Launch(recompute_schedule.kernel, programs, {**arguments, **constants, "PHASE": phase}, plan))

    if cell.published:
        run_phase(0)
    row = 0
    for n, operand in enumerate(cell.operands):
        if n == cell.level:
            run_phase(1)
        rows = slice(row, row := row + operand.products * H)
        for k in range(K):
            if n >= cell.level:
                assert m is not None
                x = m[:, k].unflatten(1, (second, H))[:, n - cell.level]
            elif v is not None:
                x = v[:, k].unflatten(1, (cell.level, H))[:, n]
            else:
                x = previous_outputs(y, mask, reversed, k).flatten(0, 1)
            hu[:, k, rows] = x @ u[k, rows].t()
    run_phase(2)
    return saved

"""Which schedule, tiles and warps for a shape on a device: a pure function, and its reason in words.

Imports neither torch nor triton: facts in, a frozen Plan out.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULES = ("resident", "stepwise")


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device. shared: bytes a program may have. capability: 90 for sm_90, 0 not CUDA."""

    name: str
    capability: int
    processors: int
    shared: int


# NVIDIA's tuning guides: shared memory a block may opt into, and multiprocessors of the largest part.
KNOWN = {
    "sm_80": Device("sm_80 (A100)", 80, 108, 163 * 1024),
    "sm_90": Device("sm_90 (H100)", 90, 132, 227 * 1024),
    "sm_100": Device("sm_100 (B200)", 100, 148, 227 * 1024),
}
INTERPRETER = Device("interpreter", 0, 132, 227 * 1024)


@dataclass(frozen=True)
class Plan:
    """How a scan runs. registers: the most a thread may take (left to itself, ptxas spills a few to make room for more
    programs on a processor, which a scan does not have). nvidia: PTX may be used
    (the one-instruction tanh of float16 and bfloat16). u_in_registers (resident): each thread keeps its part of U."""

    schedule: str
    block_h: int
    block_b: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int
    nvidia: bool
    why: str
    u_in_registers: bool = False


def _power_of_2(n: int, least: int, most: int) -> int:
    p = least
    while p < n and p < most:
        p *= 2
    return p


def resident_bytes(gates: int, H: int, itemsize: int, block_b: int) -> int:
    """Shared memory of the resident kernels, an upper bound on what the compiler reports.

    U whole, and the larger of what the directions exchange: forward the state and a layout conversion in float32;
    backward an operand tile a gate and a conversion.
    """
    block_h = _power_of_2(H, 16, 1 << 30)
    exchange = max((gates + 1) * itemsize, 4 + itemsize)
    return block_h * (gates * block_h * itemsize + exchange * block_b)


def _resident(gates: int, B: int, H: int, itemsize: int, device: Device, precision: str) -> Plan:
    block_h = _power_of_2(H, 16, 1 << 30)
    # As few rows a program as keep every program on its own processor; more rows only lengthen a step.
    block_b = _power_of_2(-(-B // device.processors), 8, 32 if block_h <= 128 else 8)
    # Gates of a tile beyond 16 KB, and beyond 4 KB or 64 columns a warp, spill registers on some target (found with the
    # report; float64 at half that, and products without tensor cores at half the columns).
    tensor_cores = itemsize < 4 or (itemsize == 4 and precision != "ieee")
    most = min(16384 if itemsize < 8 else 8192, block_h * 256)
    while block_b > 8 and (
        gates * block_b > (64 if tensor_cores else 32)
        or gates * block_h * block_b * itemsize > most
        or resident_bytes(gates, H, itemsize, block_b) > device.shared
    ):
        block_b //= 2
    wide = block_h > 128 or block_h * block_b >= 4096
    num_warps = 8 if wide or gates * block_h * block_b * itemsize > 8192 else 4
    # Triton gives every warp 16 units or more; warps beyond that would repeat the work of others (but float64 spills).
    num_warps = min(num_warps, block_h // 16 if itemsize < 8 else 4)
    # U in registers is read from shared memory once, not at every step. Half of a thread's registers is what it can
    # have beside the tiles of eight rows.
    u_bytes = gates * block_h * block_h * itemsize
    u_in_registers = block_b == 8 and tensor_cores and u_bytes <= 512 * 32 * min(8, block_h // 16)
    if u_in_registers and u_bytes > 512 * 32 * num_warps:
        num_warps = 8
    needed = resident_bytes(gates, H, itemsize, block_b)
    why = (
        f"U ({gates}x{H}x{H}, padded to {block_h}) takes {needed // 1024} KB of the {device.shared // 1024} KB of "
        f"shared memory, so one program keeps it and walks all steps for {block_b} rows"
    )
    return Plan("resident", block_h, block_b, block_h, num_warps, 1, 255, device.capability > 0, why, u_in_registers)


def _stepwise(gates: int, B: int, H: int, itemsize: int, device: Device, reason: str) -> Plan:
    block_b = _power_of_2(B, 8, 16 if itemsize == 8 else 64)
    block_h = _power_of_2(H, 16, 16 if itemsize == 8 else 64)
    # Accumulators of all gates beyond 8192 elements spill on some target (found with the report).
    while gates * block_h * block_b > 8192 and block_b > 16:
        block_b //= 2
    # Smaller tiles while some processors would have none.
    while -(-H // block_h) * -(-B // block_b) < device.processors and (block_h > 16 or block_b > 16):
        if block_h >= block_b and block_h > 16:
            block_h //= 2
        else:
            block_b //= 2
    block_k = _power_of_2(H, 16, 128 // itemsize)
    num_warps = 8 if gates * block_h * block_b > 4096 else 4
    why = f"{reason}, so every step is one launch over tiles of {block_h} units and {block_b} rows"
    return Plan("stepwise", block_h, block_b, block_k, num_warps, 2, 255, device.capability > 0, why)


def plan(
    gates: int, B: int, H: int, itemsize: int, device: Device, schedule: str | None = None, precision: str = "tf32"
) -> Plan:
    """The plan of a scan: gates G, batch B, hidden size H, bytes an element of the data's type, the device's facts.

    precision: what float32 products are done in, "tf32" or "ieee". schedule: None chooses; a name forces it.
    ValueError for an unknown name, for "resident" where it does not fit, and for a U of 2^31 elements or more.
    """
    if schedule not in (None, *SCHEDULES):
        raise ValueError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if gates * H * H >= 1 << 31:
        raise ValueError(f"hidden size {H} is too large: the recurrent weights must have less than 2^31 elements")
    if schedule == "stepwise":
        return _stepwise(gates, B, H, itemsize, device, "stepwise was asked for")
    needed = resident_bytes(gates, H, itemsize, 8)
    if needed > device.shared:
        reason = f"U would take {needed // 1024} KB of the {device.shared // 1024} KB of shared memory on {device.name}"
    elif itemsize == 8 and H > 32:
        reason = "beyond 32 hidden units float64 products spill registers"  # found with the report, sm_90 and sm_100
    elif itemsize == 4 and precision == "ieee" and (most := 32 if gates > 2 else 64) < H:
        reason = f"beyond {most} hidden units float32 products without TF32 spill registers"  # likewise
    else:
        return _resident(gates, B, H, itemsize, device, precision)
    if schedule == "resident":
        raise ValueError(f"the resident schedule does not fit hidden size {H}: {reason}")
    return _stepwise(gates, B, H, itemsize, device, reason)

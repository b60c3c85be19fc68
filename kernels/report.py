"""What the kernels cost, without a GPU: compile what the plan would launch, and read the machine code.

    python -m seqcells.kernels.report --target sm_90 [--quick] [--spills] [--json FILE]

For every kernel: registers, spills, shared memory against the limit, and for its loop (the time loop of `resident` and
`grid`; where a step is a launch, the loop over U of `stepwise`, over W and U of `single`) the number of instructions,
of issue slots (instructions x warps / 4: an SM issues from four schedulers) and of each kind that matters; and for
sm_80 and sm_90 the cycles that one turn of it takes, or the whole launch where there is no loop, as `latency` predicts
them. Exit status 1 if any kernel spills in its loop or does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import cells, devices, latency, plan, plan_single, registry, scan, single, stack

KINDS = ("BAR", "HMMA", "HGMMA", "UTCHMMA", "LDS", "LDSM", "STS", "STSM", "LDG", "STG", "MUFU", "LDL", "STL")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
POINTERS |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
MASKS = {"resets": torch.bool, "lengths": torch.uint8}


# Not all of KNOWN: Triton compiles for sm_89 as for sm_80, with less shared memory, which the plan takes into account;
# and for sm_75 without tensor cores, where a few kernels spill (docs/verification.md).
TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Case:
    """One scan to compile: precision is tl.dot's for float32."""

    cell: str
    # "infer" (forward, nothing saved), "train" (forward, gates saved), "backward", "recompute"; of a cell "step", "step
    # train"; of a stack of LAYERS "stack", "stack train", "stack backward"
    direction: str
    dtype: str
    batch: int
    hidden: int
    target: str
    schedule: str | None = None
    mask: str = ""  # or "resets", of bool, or "lengths", of codes
    dcs: bool = False  # backward: a gradient of every step's c
    precision: str = "tf32"
    groups: int = 1


@dataclass(frozen=True)
class Row:
    """The static cost of one compiled kernel."""

    case: Case
    schedule: str
    kernel: str
    phase: str
    warps: int
    block: str
    registers: int
    spills: int  # loads and stores of spilled registers, in the loop if there is one
    stack: int  # bytes of local memory
    shared: int
    limit: int
    # Instructions of the whole kernel, its loop once: all there is where a short loop was unrolled. 0 and what follows
    # empty, where the machine code was not read: see `measure`.
    code: int
    instructions: int  # of the loop's body; 0 where there is none
    slots: float
    counts: dict[str, int]
    programs: int = 1
    microseconds: float = 0.0  # the plan's model of a step
    batches: tuple[int, ...] = ()  # of the cases that this kernel serves
    cycles: latency.Cycles | None = None  # predicted; None where there is no model of the target

    @property
    def good(self) -> bool:
        return self.spills == 0 and self.shared <= self.limit


STEPS = ("step", "step train")
LAYERS = 3  # of a stack


def inputs(case: Case) -> int:
    """A cell's input size: H, or, where H is even and no more, one whose rows are aligned otherwise."""
    return 3 if case.hidden % 8 and case.hidden % 2 == 0 else case.hidden


def planned(case: Case) -> plan.Plan:
    """The case's plan."""
    cell, itemsize, device = cells.get(case.cell), DTYPES[case.dtype].itemsize, devices.KNOWN[case.target]
    if case.direction in STEPS:
        return plan_single.plan_single(
            cell,
            B=case.batch,
            I=inputs(case),
            H=case.hidden,
            itemsize=itemsize,
            device=device,
            precision=case.precision,
        )
    one = plan.plan(
        cell,
        B=case.batch,
        H=case.hidden,
        itemsize=itemsize,
        device=device,
        groups=case.groups,
        schedule=case.schedule,
        precision=case.precision,
        backward=case.direction.endswith("backward"),
    )
    if not case.direction.startswith("stack"):
        return one
    found = stack.plan_stack(cell, one, LAYERS, case.batch, case.hidden, itemsize, device)
    if isinstance(found, str):
        raise ValueError(f"no stack of {LAYERS} layers: {found}")
    return found


def launches(case: Case) -> list[scan.Launch]:
    """What running this case would launch, each distinct kernel once. On meta tensors: nothing runs."""
    cell = cells.get(case.cell)
    dtype, T, B, H = DTYPES[case.dtype], 3, case.batch, case.hidden
    chosen = planned(case)
    found: dict[str, scan.Launch] = {}

    def note(launch: scan.Launch) -> None:
        found.setdefault(repr(sorted((k, str(v)) for k, v in _split(launch)[1].items())), launch)

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    mask = empty(T, B, like=MASKS[case.mask]) if case.mask else None
    K = case.groups
    gx, u, state = empty(T, B, K, cell.gates * H), empty(K, cell.products * H, H), empty(K, B, H)
    bias = empty(K, len(cell.apart) * H) if cell.apart else None
    params = empty(K, cell.params * H) if cell.params else None
    others = empty(K, B, (cell.states - 1) * H) if cell.states > 1 else None
    back = 2 if K == 2 else 0  # two groups: a layer's directions
    options: dict[str, Any] = {"plan": chosen, "precision": case.precision, "launch": note, "reversed": back}
    wide = torch.promote_types(dtype, torch.float32)
    vectors: dict[str, Any] = {
        "params": params,
        "dropout": empty(2 + 2 * len(cell.drawn), like=wide) if cell.drawn else None,
    }
    if case.direction in STEPS:
        assert isinstance(chosen, plan_single.Single)
        x, w, b = empty(B, inputs(case)), empty(cell.gates * H, inputs(case)), empty(cell.gates * H)
        b_hh = empty(cell.products * H) if cell.products else None
        save = "gates" if case.direction == "step train" else "none"
        single.forward(
            cell,
            *(x, w, u[0], b, b_hh, state[0], None if others is None else others[0]),
            save=save,
            plan=chosen,
            params=None if params is None else params[0],
            precision=case.precision,
            launch=note,
        )
    elif case.direction.startswith("stack"):
        _launch_stack(case, cell, chosen, note)
    elif case.direction == "recompute":
        saved = scan.allocate(cell, gx, "gates")
        scan.recompute(cell, gx, u, bias, saved.y, saved.c, mask, plan=chosen, launch=note, **vectors)
    elif case.direction == "backward":
        saved = scan.allocate(cell, gx, "gates", back)
        options["dcs"] = saved.c[1:] if case.dcs else None
        scan.backward(cell, gx[..., :H], state, others, u, saved.y, saved.c, saved.saved, mask, **vectors, **options)
    else:
        save = "gates" if case.direction == "train" else "none"
        scan.forward(cell, gx, u, bias, state, others, mask, save=save, **vectors, **options)
    return list(found.values())


def _launch_stack(case: Case, cell: cells.Cell, chosen: Any, note: Callable[[scan.Launch], None]) -> None:
    """What a stack of LAYERS would launch, to note."""
    L, T, B, H = LAYERS, 3, case.batch, case.hidden
    empty = torch.empty(0, dtype=DTYPES[case.dtype], device="meta").new_empty

    others, apart, G = (cell.states - 1) * H, len(cell.apart) * H, cell.gates * H
    mask = torch.empty((T, B), dtype=MASKS[case.mask], device="meta") if case.mask else None
    ends = empty(L, B, H), empty(L, B, others) if others else None
    w, u, bias = empty(L - 1, G, H), empty(L, cell.products * H, H), empty(L, apart) if apart else None
    params = empty(L, cell.params * H) if cell.params else None
    own: dict[str, Any] = {"plan": chosen, "params": params, "precision": case.precision}
    save = "none" if case.direction == "stack" else "gates"
    forward = note if case.direction != "stack backward" else lambda launch: None
    gx, b = empty(T, B, 1, G), empty(L - 1, G)
    out = stack.forward(cell, gx, w, b, u, bias, *ends, mask, save=save, launch=forward, **own)
    if case.direction == "stack backward":
        stack.backward(cell, gx[..., :H], *ends, w, u, out.y, out.c, out.saved, mask, launch=note, **own)


def _split(launch: scan.Launch) -> tuple[dict[str, str], dict[str, object]]:
    """The types of the arguments as Triton spells them, and the values of those that are compiled in."""
    types, constants = {}, {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            types[parameter.name] = POINTERS[value.dtype]
        elif value is None or parameter.is_constexpr:
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            types[parameter.name] = "i32"
    return types, constants


def compile_launch(launch: scan.Launch, target: GPUTarget) -> Any:  # Triton's, without a type
    """The compiled kernel, exactly as the launcher would have it: pointers on 16 bytes, T and B not specialised."""
    types, constants = _split(launch)
    attributes = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=scan.compile_options(launch.plan))


def _tool(arguments: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> str:
    """The machine code with its encoding, as text."""
    return _tool(["-sass"], cubin)


def instructions(sass: str) -> list[tuple[int, str]]:
    """The machine code: (address, instruction)."""
    return [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*?)\s*;", sass)]


def widest_loop(code: list[tuple[int, str]]) -> list[str]:
    """The instructions from the backward branch that spans the most to its target; none if nothing branches back."""
    found = latency.bounds(code)
    return [i for a, i in code if found[0] <= a <= found[1]] if found else []


def _opcode(instruction: str) -> str:
    words = [w for w in instruction.split() if not w.startswith("@")]
    return words[0].split(".")[0] if words else ""


def measure(case: Case, spills_only: bool = False) -> list[Row]:
    """Compile the case's kernels and count. spills_only: the machine code is read only of kernels that have a stack or
    local memory; where there is neither, no register can be spilled, and reading takes a third of the time."""
    rows = []
    device = devices.KNOWN[case.target]
    modelled, behind = device.capability in latency.CAPABILITIES, case.direction.startswith("stack")
    for launch in launches(case):
        compiled = compile_launch(launch, GPUTarget("cuda", device.capability, 32))
        cubin = compiled.asm["cubin"]
        usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", _tool(["--dump-resource-usage"], cubin))
        assert usage is not None, "cuobjdump printed no resource usage"
        local = int(usage.group(2)) + int(usage.group(3))
        sass = disassemble(cubin) if local or not spills_only else ""
        code = instructions(sass)
        # An endless branch to itself ends every program; it is not a loop.
        body = widest_loop(code)
        everywhere = Counter(_opcode(i) for _, i in code)
        counts = Counter(_opcode(i) for i in body)
        loops = latency.loops(code)
        within = Counter(_opcode(i) for a, i in code if any(first <= a <= last for first, last in loops))
        p, arguments = launch.plan, launch.arguments
        flags = [k for k in ("FIRST", "LAST") if arguments.get(k)]
        phase = "+".join([str(arguments["PHASE"]), *flags]) if "PHASE" in arguments else "-"
        phase = f"U {phase}" if launch.kernel.fn.__module__.endswith("streamed") else phase  # products alone
        rows.append(
            Row(
                case=case,
                schedule="recompute" if case.direction == "recompute" else p.schedule,
                kernel=launch.kernel.fn.__name__,
                phase=phase,
                warps=p.num_warps,
                block=f"{arguments['BLOCK_H']}x{arguments['BLOCK_B']}",
                registers=int(usage.group(1)),
                # What a set-up spills is paid once; what a loop spills, every step. (A stack has two loops.)
                spills=sum((within if body else everywhere)[k] for k in ("LDL", "STL")),
                stack=local,
                shared=compiled.metadata.shared,
                limit=device.shared,
                code=len(code),
                instructions=len(body),
                slots=len(body) * p.num_warps / 4,
                counts={k: counts[k] for k in KINDS if counts[k]},
                programs=p.programs,
                microseconds=p.microseconds,
                cycles=latency.cycles(sass, p.num_warps, behind=behind) if modelled and sass else None,
            )
        )
    return rows


HIDDEN = (1, 2, 16, 20, 32, 64, 100, 128, 150, 192, 256, 300, 512, 768, 1000, 1024, 1536, 2048, 4096)
BATCHES = (1, 8, 16, 64, 256)


# float64 with masks, at sizes where each schedule is chosen on some target.
FP64_MASKED = (("lengths", 20, 8), ("resets", 64, 1024), ("lengths", 512, 64), ("resets", 1024, 16))


def whole(targets: list[str], names: list[str]) -> Iterator[Case]:
    """Every shape of HIDDEN and BATCHES, those of `quick`, and all `precise` ones."""
    for target in targets:
        for name in names:
            for dtype in ("bf16", "fp16", "fp32"):
                for hidden in HIDDEN:
                    for batch in BATCHES:
                        for direction in ("train", "backward"):
                            yield Case(name, direction, dtype, batch, hidden, target)
            for dtype in ("bf16", "fp32"):
                for hidden in (16, 32, 64, 128):
                    yield Case(name, "infer", dtype, 8, hidden, target)
                yield from stacks(name, target, [(dtype, hidden, "") for hidden in (32, 64, 128)])
    yield from quick(targets, names)
    yield from (case for target in targets for name in names for case in precise(target, name))


def quick(targets: list[str], names: list[str]) -> Iterator[Case]:
    """Shapes at which the plan changes its mind, every schedule, masks, groups; on sm_100 the `precise` ones too."""
    names = [name for name in names if name != "rnn_relu"]  # rnn_tanh but for one function
    shapes = [(20, 8), (32, 8), (64, 8), (128, 8), (256, 16), (300, 64), (1024, 16), (64, 16384), (1024, 1024)]
    for target in targets:
        for name in names:
            for dtype in ("bf16", "fp32"):
                for hidden, batch in shapes:
                    for direction in ("train", "backward"):
                        yield Case(name, direction, dtype, batch, hidden, target)
            for direction in ("train", "backward"):
                case = Case(name, direction, "bf16", 8, 64, target)
                for mask in MASKS:
                    yield replace(case, mask=mask)
                    yield replace(case, hidden=512, batch=16, mask=mask)
                    yield replace(case, schedule="stepwise", mask=mask)
                yield replace(case, hidden=128, mask="lengths")
                yield replace(case, groups=2)
                yield replace(case, groups=2, mask="lengths")
                yield replace(case, hidden=512, batch=16, groups=2)
            if cells.get(name).states > 1:
                yield Case(name, "backward", "bf16", 8, 128, target, mask="lengths", dcs=True)
                yield Case(name, "backward", "bf16", 16, 512, target, dcs=True)
            for hidden in (32, 64, 128):
                yield Case(name, "infer", "bf16", 8, hidden, target)
            yield Case(name, "recompute", "bf16", 8, 64, target)
            sizes = (("bf16", 64, ""), ("bf16", 128, "lengths"), ("fp16", 20, ""), ("fp32", 64, ""))
            yield from stacks(name, target, sizes)
            if not plan_single.unfit(cells.get(name), 1, 1):
                for hidden, batch in ((64, 1), (1024, 16)):
                    for dtype in ("bf16", "fp32"):
                        yield Case(name, "step train", dtype, batch, hidden, target)
                yield Case(name, "step", "bf16", 1, 1024, target)
            for mask, hidden, batch in FP64_MASKED:
                for direction in ("train", "backward"):
                    yield Case(name, direction, "fp64", batch, hidden, target, mask=mask, precision="ieee")
            if target == "sm_100":
                yield from precise(target, name)


def stacks(name: str, target: str, sizes: Iterable[tuple[str, int, str]]) -> Iterator[Case]:
    """Stacks of that cell, where it has any. sizes: of each a dtype, H and the mask."""
    for direction in ("stack", "stack train", "stack backward"):
        for dtype, hidden, mask in sizes:
            case = Case(name, direction, dtype, 8, hidden, target, mask=mask)
            with suppress(ValueError):
                planned(case)
                yield case


def precise(target: str, name: str) -> Iterator[Case]:
    """Every precision and dtype; and a cell's single step. Its large batches are for the GEMM; they are here for those
    who force it."""
    for direction in ("train", "backward"):
        case = Case(name, direction, "bf16", 8, 64, target)
        for hidden, batch in ((20, 8), (64, 8), (64, 16384), (512, 512)):
            yield replace(case, dtype="fp32", hidden=hidden, batch=batch, precision="ieee")
        for hidden, batch in ((10, 16384), (20, 8), (64, 8), (256, 8), (1024, 1024)):
            yield replace(case, dtype="fp32", hidden=hidden, batch=batch, precision="tf32x3")
        for hidden, batch in ((20, 8), (20, 16384), (256, 64)):
            yield replace(case, dtype="fp64", hidden=hidden, batch=batch, precision="ieee")
    # The most registers: masks, and a tile that H does not fill.
    for mask in MASKS:
        yield Case(name, "backward", "fp32", 8, 20, target, mask=mask, precision="tf32x3")
    if plan_single.unfit(cells.get(name), 1, 1):
        return
    for hidden in (20, 64, 256, 1024):
        for batch in (1, 16, 64, 256):
            for dtype in ("bf16", "fp32"):
                yield Case(name, "step train", dtype, batch, hidden, target)
    for dtype in ("bf16", "fp32"):
        yield Case(name, "step train", dtype, 64, 1001, target)
    for hidden, batch in ((20, 1), (1024, 1), (1024, 256)):
        for dtype, precision in (("fp32", "ieee"), ("fp32", "tf32x3"), ("fp64", "ieee")):
            yield Case(name, "step train", dtype, batch, hidden, target, precision=precision)


def distinct(cases: Iterable[Case]) -> dict[Case, tuple[int, ...]]:
    """The cases that need kernels of their own (batches share one where the plan gives them the same tile), and the
    batches of each."""
    first: dict[object, Case] = {}
    batches: dict[Case, list[int]] = {}
    for case in cases:
        try:
            p = planned(case)
        except ValueError:
            if cells.get(case.cell).means:
                continue  # no schedule takes means over so many units
            raise
        tile = p.schedule, p.block_h, p.block_b, p.block_k, p.num_warps, p.num_stages, p.u_in_registers
        representative = first.setdefault((replace(case, batch=0), tile), case)
        served = batches.setdefault(representative, [])
        if case.batch not in served:
            served.append(case.batch)
    return {case: tuple(sorted(served)) for case, served in batches.items()}


def table(rows: list[Row]) -> str:
    """The rows as text, one line a kernel."""
    head: tuple[str, ...] = ("target", "cell", "direction", "dtype", "H", "B", "schedule", "phase", "tile", "warps")
    head += ("regs", "spills", "shared KB", "code", "loop", "slots", "cycles", "BAR", "MMA", "LDS/STS", "LDG/STG")
    head += ("MUFU", "")
    lines = [head]
    for r in rows:
        c, n = r.case, Counter(r.counts)
        name = f"{c.cell}{f'+{c.mask}' if c.mask else ''}{'+dcs' if c.dcs else ''}"
        kind = c.dtype if c.dtype in ("bf16", "fp16", "fp64") or c.precision == "ieee" else c.precision
        moved = f"{n['LDS'] + n['LDSM']}/{n['STS'] + n['STSM']}"
        shared = f"{r.shared / 1024:.0f}/{r.limit // 1024}"
        mma = n["HMMA"] + n["HGMMA"] + n["UTCHMMA"]
        batches = ",".join(map(str, r.batches)) or c.batch
        shown: tuple[object, ...] = (c.target, name, c.direction, kind, c.hidden, batches)
        shown += (r.schedule, r.phase, r.block, r.warps)
        loaded = f"{n['LDG']}/{n['STG']}"
        read = (r.code, r.instructions, f"{r.slots:.0f}", r.cycles or "-", n["BAR"], mma, moved, loaded, n["MUFU"])
        shown += (r.registers, r.spills, shared, *(read if r.code else "-" * len(read)), "" if r.good else "BAD")
        lines.append(tuple(str(x) for x in shown))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_json(path: Path, rows: list[Row]) -> None:
    """All rows to path, at once or not at all."""
    content = {"triton": triton.__version__, "rows": [asdict(r) | {"good": r.good} for r in rows]}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqcells.kernels.report", description=__doc__.split("\n")[0])
    every = [name for name in devices.KNOWN if name.startswith("sm_")]
    parser.add_argument("--target", choices=[*every, "all"], default="sm_90", help=f"all: {', '.join(TARGETS)}")
    parser.add_argument("--cell", choices=cells.names(), action="append", help="only this cell (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="only the shapes at which the plan changes its mind")
    parser.add_argument("--spills", action="store_true", help="only whether kernels spill and fit: a third quicker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there too")
    options = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: the report compiles kernels, it does not interpret them")
    targets = list(TARGETS) if options.target == "all" else [options.target]
    chosen = (quick if options.quick else whole)(targets, options.cell or list(registry.BUILT_IN))
    cases = distinct(chosen)
    rows: list[Row] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        counted = pool.map(partial(measure, spills_only=options.spills), cases)
        for measured, batches in zip(counted, cases.values(), strict=True):
            rows += [replace(row, batches=batches) for row in measured]
    print(table(rows))
    bad = [r for r in rows if not r.good]
    print(f"\n{len(rows)} kernels compiled, {len(bad)} that spill or do not fit")
    if options.json:
        write_json(options.json, rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

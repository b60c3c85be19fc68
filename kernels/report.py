"""What the kernels cost, without a GPU: compile what the plan would launch, and read the machine code.

    python -m seqcells.kernels.report --target sm_90 [--json FILE]

For every kernel: registers, spills, shared memory against the limit, and for its loop (the time loop of `resident`, the
loop over U of `stepwise`, which makes one step of many launches) the number of instructions, of issue slots
(instructions x warps / 4: an SM issues from four schedulers) and of each kind that matters. Exit status 1 if any kernel
spills or does not fit.
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import cells, plan, scan

KINDS = ("BAR", "HMMA", "HGMMA", "UTCHMMA", "LDS", "LDSM", "STS", "STSM", "LDG", "STG", "MUFU", "LDL", "STL")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
POINTERS |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Case:
    """One scan to compile: precision is tl.dot's for float32."""

    cell: str
    direction: str  # "infer" (forward, nothing saved), "train" (forward, gates saved) or "backward"
    dtype: str
    batch: int
    hidden: int
    target: str
    schedule: str | None = None
    resets: bool = False
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
    code: int  # instructions of the whole kernel, its loop once: all there is where a short loop was unrolled
    instructions: int  # of the loop's body; 0 where there is none
    slots: float
    counts: dict[str, int]

    @property
    def good(self) -> bool:
        return self.spills == 0 and self.shared <= self.limit


def launches(case: Case) -> list[scan.Launch]:
    """What running this case would launch, each distinct kernel once. On meta tensors: nothing runs."""
    cell = cells.get(case.cell)
    dtype, T, B, H = DTYPES[case.dtype], 3, case.batch, case.hidden
    device = plan.KNOWN[case.target]
    size = {"B": B, "H": H, "itemsize": dtype.itemsize, "groups": case.groups}
    how = {"schedule": case.schedule, "precision": case.precision, "backward": case.direction == "backward"}
    chosen = plan.plan(cell, device=device, **size, **how)
    found: dict[str, scan.Launch] = {}

    def note(launch: scan.Launch) -> None:
        found.setdefault(repr(sorted((k, str(v)) for k, v in _split(launch)[1].items())), launch)

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    resets = empty(T, B, like=torch.bool) if case.resets else None
    K = case.groups
    gx, u, state = empty(T, B, K, cell.gates * H), empty(K, cell.gates * H, H), empty(K, B, H)
    bias = empty(K, cell.inner * H) if cell.inner else None
    second = state if cell.states == 2 else None
    options: dict[str, Any] = {"plan": chosen, "precision": case.precision, "launch": note}
    if case.direction == "recompute":
        saved = scan.allocate(cell, gx, "gates")
        scan.recompute(cell, gx, u, bias, saved.y, saved.c, resets, plan=chosen, launch=note)
    elif case.direction == "backward":
        saved = scan.allocate(cell, gx, "gates")
        scan.backward(cell, gx[..., :H], state, second, u, saved.y, saved.c, saved.saved, resets, **options)
    else:
        save = "gates" if case.direction == "train" else "none"
        scan.forward(cell, gx, u, bias, state, second, resets, save=save, **options)
    return list(found.values())


def _split(launch: scan.Launch) -> tuple[dict[str, str], dict[str, Any]]:
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


def compile_launch(launch: scan.Launch, target: GPUTarget) -> Any:
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


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """The machine code: (address, instruction)."""
    text = _tool(["-sass"], cubin)
    return [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*?)\s*;", text)]


def widest_loop(code: list[tuple[int, str]]) -> list[str]:
    """The instructions from the backward branch that spans the most to its target; none if nothing branches back."""
    best = (0, 0)
    for address, instruction in code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if branch and (begin := int(branch.group(1), 16)) < address and address - begin > best[1] - best[0]:
            best = (begin, address)
    return [i for a, i in code if best[0] <= a <= best[1]] if best[1] else []


def _opcode(instruction: str) -> str:
    words = [w for w in instruction.split() if not w.startswith("@")]
    return words[0].split(".")[0] if words else ""


def measure(case: Case) -> list[Row]:
    """Compile the case's kernels and count."""
    rows = []
    device = plan.KNOWN[case.target]
    for launch in launches(case):
        compiled = compile_launch(launch, GPUTarget("cuda", device.capability, 32))
        cubin = compiled.asm["cubin"]
        usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", _tool(["--dump-resource-usage"], cubin))
        assert usage is not None, "cuobjdump printed no resource usage"
        code = instructions(cubin)
        # An endless branch to itself ends every program; it is not a loop.
        body = widest_loop(code)
        everywhere = Counter(_opcode(i) for _, i in code)
        counts = Counter(_opcode(i) for i in body)
        p, arguments = launch.plan, launch.arguments
        flags = [k for k in ("FIRST", "LAST") if arguments.get(k)]
        phase = "+".join([str(arguments["PHASE"]), *flags]) if "PHASE" in arguments else "-"
        rows.append(
            Row(
                case=case,
                schedule="recompute" if case.direction == "recompute" else p.schedule,
                kernel=launch.kernel.fn.__name__,
                phase=phase,
                warps=p.num_warps,
                block=f"{arguments['BLOCK_H']}x{arguments['BLOCK_B']}",
                registers=int(usage.group(1)),
                # What a set-up spills is paid once; what a loop spills, every step.
                spills=sum((counts if body else everywhere)[k] for k in ("LDL", "STL")),
                stack=int(usage.group(2)) + int(usage.group(3)),
                shared=compiled.metadata.shared,
                limit=device.shared,
                code=len(code),
                instructions=len(body),
                slots=len(body) * p.num_warps / 4,
                counts={k: counts[k] for k in KINDS if counts[k]},
            )
        )
    return rows


def grid(targets: list[str], names: list[str], full: bool) -> Iterator[Case]:
    """The cases of the report: the shapes at which the plan changes its mind, and with `full` many between."""
    shapes = [(1, 8), (20, 8), (64, 8), (128, 8), (256, 64), (64, 16384), (128, 16384), (64, 2000), (1024, 1024)]
    if full:
        shapes += [(h, b) for h in (2, 16, 32, 100, 150, 192, 512, 768, 1024) for b in (8, 64)]
        shapes += [(h, b) for h in (64, 128, 1024) for b in (1, 64, 256)] + [(200, 4000)]
    dtypes = list(DTYPES) if full else ["bf16", "fp32"]
    for target in targets:
        for name in names:
            for dtype in dtypes:
                for hidden, batch in shapes:
                    for direction in ("infer", "train", "backward"):
                        yield Case(name, direction, dtype, batch, hidden, target)
            yield Case(name, "train", "bf16", 8, 64, target, resets=True)
            yield Case(name, "backward", "bf16", 8, 64, target, resets=True)
            yield Case(name, "train", "bf16", 8, 64, target, schedule="stepwise", resets=True)
            yield Case(name, "backward", "bf16", 8, 64, target, schedule="stepwise", resets=True)
            yield Case(name, "recompute", "bf16", 8, 64, target)
            for hidden, batch in ((20, 8), (64, 8), (128, 8), (64, 16384)):
                for direction in ("train", "backward"):
                    yield Case(name, direction, "fp32", batch, hidden, target, precision="ieee")
            for hidden, batch in ((10, 16384), (20, 8), (20, 16384), (64, 8), (64, 16384), (1024, 1024)):
                for direction in ("train", "backward"):
                    yield Case(name, direction, "fp32", batch, hidden, target, precision="tf32x3")
            # The most registers: resets, and a tile that H does not fill.
            yield Case(name, "backward", "fp32", 8, 20, target, resets=True, precision="tf32x3")
            for hidden, batch in ((20, 8), (64, 8), (20, 16384), (256, 64)):
                for direction in ("train", "backward"):
                    yield Case(name, direction, "fp64", batch, hidden, target, precision="ieee")


def table(rows: list[Row]) -> str:
    """The rows as text, one line a kernel."""
    head: tuple[str, ...] = ("target", "cell", "direction", "dtype", "H", "B", "schedule", "phase", "tile", "warps")
    head += ("regs", "spills", "shared KB", "code", "loop", "slots", "BAR", "MMA", "LDS/STS", "LDG/STG", "MUFU", "")
    lines = [head]
    for r in rows:
        c, n = r.case, Counter(r.counts)
        name = f"{c.cell}{'+resets' if c.resets else ''}"
        kind = c.dtype if c.dtype in ("bf16", "fp16", "fp64") or c.precision == "ieee" else c.precision
        moved = f"{n['LDS'] + n['LDSM']}/{n['STS'] + n['STSM']}"
        shared = f"{r.shared / 1024:.0f}/{r.limit // 1024}"
        mma = n["HMMA"] + n["HGMMA"] + n["UTCHMMA"]
        shown: tuple[Any, ...] = (
            c.target,
            name,
            c.direction,
            kind,
            c.hidden,
            c.batch,
            r.schedule,
            r.phase,
            r.block,
            r.warps,
        )
        shown += (r.registers, r.spills, shared, r.code, r.instructions, f"{r.slots:.0f}", n["BAR"], mma, moved)
        shown += (f"{n['LDG']}/{n['STG']}", n["MUFU"], "" if r.good else "BAD")
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
    parser.add_argument("--target", choices=[*plan.KNOWN, "all"], default="sm_90")
    parser.add_argument("--cell", choices=cells.names(), action="append", help="only this cell (may be repeated)")
    parser.add_argument("--full", action="store_true", help="the large grid of shapes and dtypes (many minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there too")
    options = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: the report compiles kernels, it does not interpret them")
    targets = list(plan.KNOWN) if options.target == "all" else [options.target]
    cases = list(grid(targets, options.cell or cells.names(), options.full))
    rows: list[Row] = []
    seen = set()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for measured in pool.map(measure, cases):
            for row in measured:
                # Batches that share a plan share a kernel: once is enough.
                key = (replace(row.case, batch=0), row.phase, row.block)
                if key not in seen:
                    seen.add(key)
                    rows.append(row)
    print(table(rows))
    bad = [r for r in rows if not r.good]
    print(f"\n{len(rows)} kernels compiled, {len(bad)} that spill or do not fit")
    if options.json:
        write_json(options.json, rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

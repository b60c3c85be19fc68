"""What FlashRNN's and TorchRL's published Triton kernels take by the model of kernels/latency.py, beside seqcells' own.

    python benchmarks/peers_static.py [--hidden 64]      # pip install flashrnn torchrl; needs no GPU

Their Python code is called with tensors without memory, and each kernel that it would launch is compiled for sm_90
instead. Nothing is run. static.py puts the table into results/static-sm_90.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a checkout without installing

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqcells.kernels import devices, latency, report

TARGET = "sm_90"
BATCH, STEPS, DTYPE = 16, 1024, torch.bfloat16
HIDDEN = (16, 32, 64, 128)
DIRECTIONS = ("infer", "train", "backward")
CELLS = {"flashrnn": ("lstm",), "torchrl": ("lstm", "gru")}
NAMES = {"flashrnn": "FlashRNN", "torchrl": "TorchRL"}
POINTERS = report.POINTERS | {torch.bool: "*i1"}


@dataclass(frozen=True)
class Unit:
    """One kernel of a package, as it is called for a shape."""

    package: str
    cell: str
    direction: str
    hidden: int


@dataclass(frozen=True)
class Found:
    """The fastest of the kernel's configurations by the model's middle."""

    cycles: latency.Cycles
    configuration: str
    spills: int  # loads and stores of spilled registers in the loop

    def __str__(self) -> str:
        spills = f", {self.spills} spills" if self.spills else ""
        return f"{shown(self.cycles)}, {self.configuration}{spills}"


def shown(cycles: latency.Cycles) -> str:
    low, high = (devices.KNOWN[TARGET].microseconds(end) for end in (cycles.low, cycles.high))
    return f"{cycles} ({low:.2f}-{high:.2f})"


class Recorder:
    """Stands for a kernel: notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
        self.configurations = getattr(kernel, "configs", None)
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            self.arguments = dict(zip(self.function.arg_names, values, strict=False)) | named

        return launch

    def compiled(self) -> Iterator[tuple[str, int, int, bytes]]:
        """Of each configuration that fits the batch: its name, its warps, how often its loop over the inner sizes of
        a product runs, and its machine code."""
        options = {"num_warps": 4, "num_stages": 3} | {
            k: self.arguments.pop(k) for k in ("num_warps", "num_stages") if k in self.arguments
        }
        if self.configurations is None:
            yield f"{options['num_warps']} warps", options["num_warps"], 1, self._compile({}, options)
            return
        for c in self.configurations:
            rows = c.kwargs.get("BLOCK_B", c.kwargs.get("siz_B"))
            # A product has 16 rows at least; more than the batch are padding.
            size, inner = self.arguments.get("H", 0), c.kwargs.get("BLOCK_K", 0)
            if rows != BATCH or (inner and size % inner):
                continue
            name = f"{c.num_warps} warps" + (f", K {inner}" if inner else "")
            how = {"num_warps": c.num_warps, "num_stages": c.num_stages}
            yield name, c.num_warps, size // inner if inner else 1, self._compile(c.kwargs, how)

    def _compile(self, more: dict[str, Any], options: dict[str, int]) -> bytes:
        """As Triton's launcher has it: pointers on 16 bytes, and numbers that 16 divides."""
        types, constants, attributes = {}, {}, {}
        for n, parameter in enumerate(self.function.params):
            value = (self.arguments | more).get(parameter.name, parameter.default if parameter.has_default else None)
            if isinstance(value, torch.Tensor):
                types[parameter.name] = POINTERS[value.dtype]
                attributes[(n,)] = [["tt.divisibility", 16]]
            elif value is None or parameter.is_constexpr:
                types[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    attributes[(n,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.function, types, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", devices.KNOWN[TARGET].capability, 32)
        return triton.compile(source, target=target, options=options).asm["cubin"]


@triton.jit
def tanh(x):
    """FlashRNN's, in float32: in half precision, as its backward calls it, today's Triton has no exponential."""
    y = tl.exp(-2.0 * x.to(tl.float32))
    return (1.0 - y) / (1.0 + y)


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def flashrnn(unit: Unit) -> Recorder:
    """Its fused Triton kernels; those in CUDA C are built on a machine with a GPU."""
    H, B, T = unit.hidden, BATCH, STEPS
    if unit.direction == "backward":
        module = importlib.import_module("flashrnn.flashrnn.triton_fused.lstm_bw")
        recorder = Recorder(module._backward_sequence_kernel)
        module.triton_tanh = tanh
        with mock.patch.object(module, "_backward_sequence_kernel", recorder):
            states, gates = empty(T + 1, 2, B, 1, H), empty(T, 4, B, 1, H)
            module.backward_sequence(empty(T, 2, B, 1, H), empty(2, B, 1, H), empty(4, 1, H, H), states, gates)
        return recorder
    module = importlib.import_module("flashrnn.flashrnn.triton_fused.lstm_fw")
    recorder = Recorder(module._forward_sequence_kernel)
    with mock.patch.object(module, "_forward_sequence_kernel", recorder):
        inputs = empty(2, B, 1, H), empty(B, T, 4, 1, H), empty(4, 1, H, H), empty(4, 1, H)
        module.forward_sequence(*inputs, output_gates_and_states_initial=unit.direction == "train")
    return recorder


def torchrl(unit: Unit) -> Recorder:
    """Its kernels that take the whole sequence in one launch. They compile with data in float32 alone, with products
    in bfloat16 if that is asked for."""
    module = importlib.import_module("torchrl.modules.tensordict_module._rnn_triton")
    H, B, T = unit.hidden, BATCH, STEPS
    gates = {"lstm": 4, "gru": 3}[unit.cell]
    forward, backward = (getattr(module, f"_{unit.cell}_{way}_kernel") for way in ("fwd", "bwd"))
    recorders = Recorder(forward), Recorder(backward)
    kind = torch.float32
    states = [empty(B, T, H, dtype=kind) for _ in range(2 if unit.cell == "lstm" else 1)]
    weights = [empty(gates * H, n, dtype=kind).requires_grad_(unit.direction != "infer") for n in (H, H)]
    biases = [empty(gates * H, dtype=kind) for _ in range(2)]
    resets = empty(B, T, dtype=torch.bool)
    with (
        mock.patch.object(module, f"_{unit.cell}_fwd_kernel", recorders[0]),
        mock.patch.object(module, f"_{unit.cell}_bwd_kernel", recorders[1]),
        mock.patch.object(torch.cuda, "device", lambda _: contextlib.nullcontext()),
    ):
        call = getattr(module, f"{unit.cell}_triton")
        y = call(empty(B, T, H, dtype=kind), *states, *weights, *biases, resets, compute_dtype=DTYPE)[0]
        if unit.direction == "backward":
            torch.autograd.grad(y.sum(), weights)
    return recorders[unit.direction == "backward"]


PACKAGES = {"flashrnn": flashrnn, "torchrl": torchrl}
CACHED = ("torchrl",)  # they load the weights again in every step


def measure(unit: Unit) -> Found | str:
    """The best configuration, or why there is none."""
    try:
        found = []
        for name, warps, trips, cubin in PACKAGES[unit.package](unit).compiled():
            sass = report.disassemble(cubin)
            cycles = latency.cycles(sass, warps, trips, unit.package in CACHED)
            assert cycles is not None
            loop = report.widest_loop(report.instructions(sass))
            spills = sum(i.split()[i.startswith("@")].split(".")[0] in ("LDL", "STL") for i in loop)
            found.append(Found(cycles, name, spills))
        return min(found, key=lambda f: f.cycles.middle)
    except Exception as error:  # one kernel that cannot be compiled leaves the others
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def measured(hidden: tuple[int, ...] = HIDDEN) -> dict[Unit, Found | str]:
    """Every kernel of what is installed."""
    units = [Unit(p, c, d, h) for p in versions() for c in CELLS[p] for d in DIRECTIONS for h in hidden]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(units, pool.map(measure, units), strict=True))


def section(ours: Callable[[str, str, int], str], hidden: tuple[int, ...] = HIDDEN) -> str:
    """The table. ours(cell, direction, hidden): seqcells' entry."""
    present = versions()
    missing = [NAMES[p] for p in PACKAGES if p not in present]
    title = f"## Beside others (predicted, {TARGET}, bf16, B={BATCH})"
    if missing:
        print(f"{' and '.join(missing)}: not installed, so not in the table", file=sys.stderr)
    if not present:
        return f"{title}\n\nNeither FlashRNN nor TorchRL was installed where this file was made."
    found = measured(hidden)
    said = ", ".join(f"{NAMES[p]} {version}" for p, version in present.items())
    lines = [
        title,
        "",
        f"By the same model: the published Triton kernels of {said}, compiled with Triton {triton.__version__}; "
        "nothing was run. Cycles a step (microseconds), and of others the fastest of their configurations with 16 rows "
        "a program; seqcells has 8 rows in each of two programs. Products of the input with its weights and "
        "rearrangements before and after a kernel are in no column. TorchRL's kernels have resets, and data in float32 "
        "with products in bf16: they compile for no other data. They load the weights in every step, from the "
        "first-level cache where that holds them: the low bound is as if all loads came from there. FlashRNN's "
        "backward computes tanh in bf16, which today's Triton refuses; here it does so in float32.",
        "",
        f"| cell | H | direction | seqcells | {' | '.join(NAMES[p] for p in present)} |",
        f"|{'---|' * (4 + len(present))}",
    ]
    for cell in CELLS["torchrl"]:
        for direction in DIRECTIONS:
            for h in hidden:
                cells = [str(found.get(Unit(p, cell, direction, h), "-")) for p in present]
                lines.append(f"| {cell} | {h} | {direction} | {ours(cell, direction, h)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, action="append", help="only this size (may be repeated)")
    options = parser.parse_args()

    def ours(cell: str, direction: str, hidden: int) -> str:
        (row,) = report.measure(report.Case(cell, direction, "bf16", BATCH, hidden, TARGET))
        return shown(row.cycles) if row.cycles else "-"

    print(section(ours, tuple(options.hidden or HIDDEN)))


if __name__ == "__main__":
    main()

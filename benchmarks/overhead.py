"""The overhead of a call besides its kernels: Python calls and eager time of small layers, on the CPU.

    python benchmarks/overhead.py                        the time of each case
    python benchmarks/overhead.py --against CHECKOUT     beside the same in another checkout of this repository
    TRITON_INTERPRET=1 python benchmarks/overhead.py --calls     the functions that a call goes through
    python benchmarks/overhead.py --verification         what the first use of a kernel costs beside its own work

The kernels of the triton cases are launched by a function that does nothing. Times are the smallest median of runs that
alternate between the two checkouts, one process each; only their ratios mean something.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, sys, time
import torch, seqcells
from seqcells.kernels import scan, single

torch.set_num_threads(1)
for launcher in (scan.forward, scan.backward, scan.recompute, single.forward):
    launcher.__kwdefaults__["launch"] = lambda launch: None
short, long = torch.randn(5, 3, 10), torch.randn(100, 3, 10)
cases = {
    "triton LSTM, T=5": (seqcells.LSTM(10, 20, backend="triton"), short),
    "triton LSTM, T=5, inference": (seqcells.LSTM(10, 20, backend="triton").requires_grad_(False), short),
    "triton GRU, T=5, bidirectional": (seqcells.GRU(10, 20, bidirectional=True, backend="triton"), short),
    "CPU LSTM, T=5": (seqcells.LSTM(10, 20), short),
    "torch.nn.LSTM, T=5": (torch.nn.LSTM(10, 20), short),
    "CPU GRU, T=5": (seqcells.GRU(10, 20), short),
    "CPU GRU, T=100": (seqcells.GRU(10, 20), long),
    "CPU LSTMCell": (seqcells.LSTMCell(10, 20), short[0]),
    "torch.nn.LSTMCell": (torch.nn.LSTMCell(10, 20), short[0]),
}
found = {}
for name, (module, x) in cases.items():
    for _ in range(20):
        module(x)
    each = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(20):
            module(x)
        each.append((time.perf_counter() - start) / 20)
    found[name] = sorted(each)[len(each) // 2] * 1e6
print(json.dumps(found))
"""


LIMITS = {"triton LSTM": (35, 8), "CPU GRU": (45, 9), "CPU LSTM": (8, 5)}  # calls, in files


def calls(name: str) -> list[str]:
    """The package's functions that a call of a layer goes through, as "file: function", up to the first kernel launch
    or the first step of the loop. Comprehensions and lambdas are not counted."""
    import seqcells
    from seqcells.engines.loop import steps
    from seqcells.kernels import scan

    kind = getattr(seqcells, name.split()[1])
    layer = kind(10, 20, backend="triton" if name.startswith("triton") else None)
    x, folder = torch.randn(100 if name == "CPU GRU" else 5, 3, 10), str(ROOT) + os.sep
    package = (f"{folder}seqcells{os.sep}", f"{folder}kernels{os.sep}")  # not what .venv has
    found: list[str] = []
    done = [False]

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        done[0] = done[0] or (event == "call" and code in (steps.scan.__code__, no_launch.__code__))
        if event == "call" and not done[0] and code.co_filename.startswith(package) and code.co_name[0] != "<":
            file = code.co_filename.removeprefix(folder).replace("seqcells/kernels/", "kernels/")
            found.append(f"{file}: {code.co_name}")

    def no_launch(launch: Any) -> None:
        pass

    before = scan.forward.__kwdefaults__["launch"]
    scan.forward.__kwdefaults__["launch"] = no_launch
    try:
        layer(x)  # what is found once a cell or a shape
        sys.setprofile(profile)
        layer(x)
    finally:
        sys.setprofile(None)
        scan.forward.__kwdefaults__["launch"] = before
    return found


def times(checkout: Path) -> dict[str, float]:
    """Microseconds a call, by case."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def first_use() -> None:
    """Print the time of the reference of a check (seqcells/kernel_check.py), and of compiling the kernels it checks."""
    from triton.backends.compiler import GPUTarget

    from seqcells import kernel_check
    from seqcells.kernels import report

    torch.set_num_threads(1)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # not what an earlier run has compiled
    for hidden in (20, 20, 128, 1024, 2048):  # the first also derives the cell
        case = report.Case("lstm", "train", "bf16", 8, hidden, "sm_90")
        launches = [*report.launches(case), *report.launches(dataclasses.replace(case, direction="backward"))]
        start = time.perf_counter()
        for launch in launches:
            report.compile_launch(launch, GPUTarget("cuda", 90, 32))
        compiling, start = time.perf_counter() - start, time.perf_counter()
        size = (torch.bfloat16, torch.device("cpu"), 1, hidden, 0, "ieee", "gates", None)
        v = kernel_check.Variant("backward", "lstm", *size, (True, True, True, False, False))
        exact = kernel_check._Exact(v, kernel_check._case(v, launches[0].plan.block_b + 3))
        exact.backward(kernel_check._grads(v, exact))
        checking = time.perf_counter() - start
        print(
            f"LSTM, H={hidden}: the reference {checking:.3f} s, compiling both directions for sm_90 {compiling:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(str(__doc__)), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout, of the commit to compare with")
    parser.add_argument("--calls", action="store_true", help="print the functions of three calls, and exit")
    parser.add_argument("--verification", action="store_true", help="time what a first use adds, and exit")
    parser.add_argument("--runs", type=int, default=5, help="processes of each checkout (default: 5)")
    options = parser.parse_args()
    if options.verification:
        first_use()
        return
    for name in LIMITS if options.calls else ():
        found = calls(name)
        print(f"{name}: {len(found)} calls in {len({f.partition(':')[0] for f in found})} files", *found, sep="\n    ")
    if options.calls:
        return
    checkouts = [ROOT, *([options.against.resolve()] if options.against else [])]
    found: list[list[dict[str, float]]] = [[] for _ in checkouts]
    for _ in range(options.runs):
        for into, checkout in zip(found, checkouts, strict=True):
            into.append(times(checkout))
    medians = [{name: min(run[name] for run in runs) for name in runs[0]} for runs in found]
    for name, here in medians[0].items():
        line = f"{name:<32} {here:8.1f} us"
        if options.against:
            there = medians[1][name]
            line += f"   before {there:8.1f} us   ratio {here / there:.2f}"
        print(line)


if __name__ == "__main__":
    main()

"""The overhead of a call besides its kernels: Python calls and eager time of small layers, on the CPU.

    python benchmarks/overhead.py                        the calls, and the time of each case
    python benchmarks/overhead.py --against CHECKOUT     the same beside another checkout of this repository

The kernels of the triton cases are launched by a function that does nothing. Times are medians of runs that alternate
between the two checkouts, one process each; only their ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

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


def times(checkout: Path) -> dict[str, float]:
    """Microseconds a call, by case."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(str(__doc__)), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout, of the commit to compare with")
    parser.add_argument("--runs", type=int, default=5, help="processes of each checkout (default: 5)")
    options = parser.parse_args()
    checkouts = [ROOT, *([options.against.resolve()] if options.against else [])]
    found: list[list[dict[str, float]]] = [[] for _ in checkouts]
    for _ in range(options.runs):
        for into, checkout in zip(found, checkouts, strict=True):
            into.append(times(checkout))
    medians = [{name: statistics.median(run[name] for run in runs) for name in runs[0]} for runs in found]
    for name, here in medians[0].items():
        line = f"{name:<32} {here:8.1f} us"
        if options.against:
            there = medians[1][name]
            line += f"   before {there:8.1f} us   ratio {here / there:.2f}"
        print(line)


if __name__ == "__main__":
    main()

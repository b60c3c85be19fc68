"""When the loop is faster than torch's own on the CPU, and reset steps than the loop: for seqcells/dispatch.py.

    python benchmarks/crossover.py [--threads 2] [--table FILE]      # make crossover

torch.nn's time divided by the loop's (above 1: the loop is faster), training / inference, medians of interleaved
samples; the same for packed batches in training; the loop's time divided by that of reset steps, for an LSTM with
masks; and the time of autograd's loop divided by that of the loop derived from a cell's step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import measure

import seqcells
from seqcells import dispatch
from seqcells.tasks import suite

SENTENCES = ((8, 32), (32, 32), (32, 64), (64, 64), (32, 128), (64, 256))
SIZES = ((1, 16), (1, 128), (16, 32), (16, 128), (16, 512), (64, 64), (64, 256), (256, 32), (256, 128), (512, 4))
DERIVED = ("mgu", "ugrnn", "cifg", "peephole_lstm")
MADE = tuple((B, H) for B in (1, 16, 64) for H in (32, 64, 128, 256))
MASKED = ((8, 32), (16, 64), (16, 128), (16, 256), (64, 64), (64, 128), (64, 256), (8, 512))


def ratio(
    modules: list[torch.nn.Module],
    x: torch.Tensor | PackedSequence,
    training: bool,
    seconds: float,
    **masks: torch.Tensor,
) -> float:
    """The ratio of the first's time to the second's."""
    packed = isinstance(x, PackedSequence)

    def work(module: torch.nn.Module) -> Callable[[], object]:
        parameters = list(module.parameters())

        def run() -> object:
            with torch.set_grad_enabled(training):
                y = module(x, **masks)[0].data if packed else module(x, **masks)[0]
                return torch.autograd.grad(y, parameters, torch.ones_like(y)) if training else y

        return run

    runs = {str(k): work(module) for k, module in enumerate(modules)}
    found = measure.interleaved(runs, x.data.device, seconds, least=3)
    return median(found["0"]) / median(found["1"])


def against_torch(kind: str, T: int, seconds: float) -> list[str]:
    line = []
    for B, H in SIZES:
        x = torch.randn(T, B, min(H, 64))
        modules = [getattr(torch.nn, kind)(x.shape[2], H), getattr(seqcells, kind)(x.shape[2], H, backend="loop")]
        line.append(" / ".join(f"{ratio(modules, x, training, seconds):.2f}" for training in (True, False)))
    return line


def by_reset_steps(masks: str, T: int, seconds: float) -> list[str]:
    line = []
    for B, H in MASKED:
        x = torch.randn(T, B, min(H, 64))
        given = {"resets": torch.rand(T, B) < 0.03}
        if masks == "lengths":
            given = {"lengths": torch.randint(T // 4, T + 1, (B,))}
        modules = [seqcells.LSTM(x.shape[2], H, backend=backend) for backend in ("loop", "aten")]
        line.append(" / ".join(f"{ratio(modules, x, training, seconds, **given):.2f}" for training in (True, False)))
    return line


def packed(kind: str, T: int, seconds: float) -> list[str]:
    """torch.nn's time divided by that of padding a packed batch and running the loop or reset steps."""
    line, own = [], dispatch.loop_pays
    for B, H in SENTENCES:
        lengths = torch.randint(max(1, T // 4), T + 1, (B,))
        x = pack_padded_sequence(torch.randn(T, B, min(H, 64)), lengths, enforce_sorted=False)
        modules = [getattr(torch.nn, kind)(min(H, 64), H), getattr(seqcells, kind)(min(H, 64), H)]
        dispatch.loop_pays = lambda *a, **k: True
        try:
            line.append(f"{ratio(modules, x, True, seconds):.2f}")
        finally:
            dispatch.loop_pays = own
    return line


def derived(name: str, T: int, seconds: float) -> list[str]:
    line = []
    for B, H in MADE:
        x = torch.randn(T, B, min(H, 64))
        modules = [
            seqcells.Recurrent(getattr(seqcells.cells, name), x.shape[2], H, backend=backend)
            for backend in ("reference", "loop")
        ]
        line.append(" / ".join(f"{ratio(modules, x, training, seconds):.2f}" for training in (True, False)))
    return line


def table(head: str, sizes: tuple[tuple[int, int], ...], lines: dict[str, list[str]]) -> str:
    shown = [f"| {head} | {' | '.join(f'{B} x {H}' for B, H in sizes)} |", f"|---|{'---|' * len(sizes)}"]
    return "\n".join(shown + [f"| {name} | {' | '.join(line)} |" for name, line in lines.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.25, help="of each pair")
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args()
    parts = []
    for threads in options.threads:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        lines = {}
        for kind, steps in (("GRU", (4, 8, 16, 32, 128)), ("RNN", (8, 16, 32, 128)), ("LSTM", (16, 32, 128))):
            for T in steps:
                lines[f"{kind} T={T}"] = against_torch(kind, T, options.seconds)
                print(kind, T, lines[f"{kind} T={T}"], file=sys.stderr, flush=True)
        sentences = {}
        for kind in ("GRU", "RNN", "LSTM"):
            for T in (8, 16, 24, 32, 48, 64):
                sentences[f"{kind} T={T}"] = packed(kind, T, options.seconds)
                print("packed", kind, T, sentences[f"{kind} T={T}"], file=sys.stderr, flush=True)
        masked = {f"{masks} T=100": by_reset_steps(masks, 100, options.seconds) for masks in ("resets", "lengths")}
        made = {f"{name} T={T}": derived(name, T, options.seconds) for name in DERIVED for T in (1, 4, 100)}
        print("derived", made, file=sys.stderr, flush=True)
        facts = ", ".join(f"{k} {v}" for k, v in compare.machine("cpu").items())
        parts += [
            f"## {threads} thread{'s' * (threads > 1)}\n\n{facts}.\n",
            "torch.nn's time by the loop's, training / inference, by batch x hidden size:\n",
            f"{table('cell', SIZES, lines)}\n",
            "Packed batches of T/4 to T steps in training, torch.nn's time by that of padding them, for the loop or,\n"
            "of an LSTM, reset steps:\n",
            f"{table('cell', SENTENCES, sentences)}\n",
            "An LSTM with masks, the loop's time by that of reset steps, training / inference:\n",
            f"{table('masks', MASKED, masked)}\n",
            "Derived cells, the reference's time by the loop's, training / inference:\n",
            f"{table('cell', MADE, made)}\n",
        ]
    command = " ".join(["python benchmarks/crossover.py", *sys.argv[1:]])
    written = f"# What auto goes by on the CPU\n\nWritten by `{command}`.\n\n" + "\n".join(parts)
    print(written)
    if options.table:
        suite.write(options.table, written)


if __name__ == "__main__":
    main()

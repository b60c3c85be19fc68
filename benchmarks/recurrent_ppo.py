"""The time of sb3-contrib's RecurrentPPO with torch.nn's LSTMs, with seqcells', and written with resets= everywhere.

    make bench-integrations        or        python benchmarks/recurrent_ppo.py [--steps 1024] [--table FILE]

Seconds of CPU time of `learn`, acting and training, the three in turn. All start from the same weights and see the same
episodes: whether they learnt the same is checked. Needs what `make test-integrations` installs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "integrations")]

import compare
import recipes
from sb3_contrib import RecurrentPPO

import seqcells
from seqcells.tasks import suite
from seqcells.testing import AGAINST_TORCH


def variants() -> dict[str, tuple[object, bool]]:
    """For each variant: the policy, and whether it is converted."""
    written = recipes.run("Stable-Baselines3", only=1, RecurrentPPO=RecurrentPPO, seqcells=seqcells)["Policy"]
    return {
        "torch.nn": ("MlpLstmPolicy", False),
        "converted": ("MlpLstmPolicy", True),
        "resets= everywhere": (written, True),
    }


def learn(policy: object, converted: bool, steps: int, environment: str) -> tuple[float, list[torch.Tensor]]:
    """Seconds of CPU time, and the parameters after it."""
    model = RecurrentPPO(policy, environment, seed=0, device="cpu")
    if converted:
        seqcells.convert(model.policy)
    started = time.process_time()
    model.learn(steps)
    return time.process_time() - started, [p.detach() for p in model.policy.parameters()]


def table(found: dict[str, list[float]], steps: int) -> str:
    base = median(found["torch.nn"])
    lines = [f"| RecurrentPPO, {steps} steps | CPU s | least to most | times as fast |", "|---|---:|---:|---:|"]
    for name, seconds in found.items():
        middle = median(seconds)
        lines.append(f"| {name} | {middle:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {base / middle:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1024, help="of the environment, in each run")
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each runs, in turn; a first one is not counted"
    )
    parser.add_argument("--environment", default="CartPole-v1")
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = variants()
    found: dict[str, list[float]] = {name: [] for name in runs}
    failed = False
    for number in range(options.rounds + 1):
        expected = None
        for name, (policy, converted) in runs.items():
            seconds, parameters = learn(policy, converted, options.steps, options.environment)
            expected = expected or parameters
            worst = max(float((a - b).abs().max()) for a, b in zip(parameters, expected, strict=True))
            if number:
                found[name].append(seconds)
            if worst > AGAINST_TORCH[torch.float32]:
                failed = True
                print(f"{name}: other parameters than torch.nn's, by up to {worst:.1e}", file=sys.stderr)
    facts = ", ".join(f"{k} {v}" for k, v in compare.machine("cpu").items())
    command = " ".join(["python benchmarks/recurrent_ppo.py", *(sys.argv[1:] if arguments is None else arguments)])
    written = f"# Inside other frameworks, on the CPU\n\nWritten by `{command}`: {facts}.\n\n"
    written += f"Medians of {options.rounds} runs in turn, {options.environment}, sb3-contrib's defaults.\n\n"
    written += f"{table(found, options.steps)}\n"
    print(written)
    if options.table:
        suite.write(options.table, written)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

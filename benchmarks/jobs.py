"""Jobs in processes of their own: a job that hangs or kills its process is named, and the next one begins.

A job is a dictionary: `do`, the name of a function in JOBS, and its arguments, which JSON can hold. `run` hands jobs to
worker processes, one at a time each, and yields what came of them. A kernel that never ends takes its worker's time
limit; an illegal access leaves the process unusable, so after any CUDA error the worker ends and another one starts.
"""

from __future__ import annotations

import json
import os
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to run from a checkout without installing

Job = dict[str, Any]


def parity(cell: str, backend: str, kind: str, shape: list[int], device: str, dropout: bool = False) -> Job:
    """The largest errors of a cell at one shape, as `python -m seqcells check` finds them. dropout: with all masks."""
    from seqcells import drawn, testing
    from seqcells.cell import named

    known = named(cell)
    if dropout:
        known = drawn.dropped(known, drawn.every_mask(known))
    with testing.poisoned():
        (found,) = testing.sweep(device, [known], [kind], [backend], [testing.Shape(*shape)])
    return {**asdict(found), "good": found.good}


def case(case: Job, device: str, seconds: float, providers: list[str], checked: bool = False) -> Job:
    """Rows of compare.compared: see there."""
    import cases
    import compare

    return {"rows": compare.compared(cases.Case(**case), device, seconds, providers, checked)}


def kernel(cell: str, direction: str, dtype: str, B: int, H: int, device: str, seconds: float, T: int = 1000) -> Job:
    """Microseconds a step of one kernel alone, or of its launches, measured and by the latency model: "infer", "train"
    (forward, with and without saving) or "backward". seconds: as for `case`."""
    import predicted
    import torch
    from measure import interleaved

    from seqcells.kernels import cells, scan
    from seqcells.kernels.plan import plan

    known, place = cells.get(cell), torch.device(device)
    precision = "tf32" if dtype == "tf32" else "ieee"
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    torch.manual_seed(0)
    gx = torch.randn(T, B, 1, known.gates * H, device=place).to(kind)
    u = (torch.randn(1, known.products * H, H, device=place) * H**-0.5).to(kind)
    bias = torch.randn(1, len(known.apart) * H, device=place).to(kind) if known.apart else None
    size = {"B": B, "H": H, "itemsize": kind.itemsize, "precision": precision, "device": scan.device_facts(gx.device)}
    there = plan(known, backward=False, **size)
    chosen = plan(known, backward=True, **size) if direction == "backward" else there
    save = "none" if direction == "infer" else "gates"

    launches: list[scan.Launch] = []

    def forward(**more: Any) -> scan.Scanned:
        how: Job = {"save": save, "plan": there, "precision": precision} | more
        return scan.forward(known, gx, u, bias, None, None, None, **how)

    run: Callable[..., object] = forward
    if direction == "backward":
        out, dy = forward(), torch.randn(T, B, 1, H, device=place).to(kind)

        def run(**more: Any) -> object:
            states = out.y, out.c, out.saved
            return scan.backward(known, dy, None, None, u, *states, None, plan=chosen, precision=precision, **more)

    run()
    if seconds < 0:
        return {}
    found = statistics.median(interleaved({"": run}, gx.device, seconds)[""])
    run(launch=launches.append)  # collected, not launched
    facts = scan.device_facts(place)
    clock = getattr(torch.cuda.get_device_properties(place), "clock_rate", 0) / 1e6 if place.type == "cuda" else 0.0
    model = predicted.model(launches, facts.capability, clock or facts.clock)
    plan_text = f"{chosen.schedule} {chosen.block_h}x{chosen.block_b}, {chosen.num_warps} warps"
    return {"measured": found / T * 1e6, "model": model, "floor": chosen.microseconds, "plan": plan_text}


def probe(name: str, device: str, dry: bool) -> Job:
    """One of the device's limits."""
    import probes

    return probes.PROBES[name](device, dry)


JOBS: dict[str, Callable[..., Job]] = {"parity": parity, "case": case, "kernel": kernel, "probe": probe}


def result(job: Job) -> Job:
    """What the job returns, or why it failed."""
    try:
        return JOBS[job["do"]](**{name: value for name, value in job.items() if name != "do"})
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}


def work() -> None:
    """A worker: a job a line in, a result a line out, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a job prints is not an answer
    for line in sys.stdin:
        text = json.dumps(result(json.loads(line)))
        print(text, file=answers, flush=True)
        if "CUDA error" in text or "CUDA_ERROR" in text or "Triton Error [CUDA]" in text:
            os._exit(1)  # no later call of this process would succeed


class _Worker:
    def __init__(self) -> None:
        # Triton's kernels are compiled once for all workers, in its cache on disk.
        command = [sys.executable, str(Path(__file__)), "--work"]
        one = os.environ | {"OMP_NUM_THREADS": "1"}  # there may be as many workers as cores
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=one)
        self.job: Job = {}
        self.deadline = 0.0
        self.text = b""

    def give(self, job: Job, limit: float) -> None:
        assert self.process.stdin is not None
        self.job, self.deadline, self.text = job, time.monotonic() + limit, b""
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Job | None:
        """The result, if its line has come; of a process that has ended, that it has."""
        assert self.process.stdout is not None
        more = os.read(self.process.stdout.fileno(), 1 << 16)
        self.text += more
        if self.text.endswith(b"\n"):
            return json.loads(self.text)
        return None if more else {"failed": f"its process ended with {self.process.wait()}"}

    def alive(self) -> bool:
        """Whether it takes another job. One that ends after a CUDA error does so at once after its answer."""
        if "CUDA" in self.text.decode(errors="replace"):
            return False
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def run(jobs: list[Job], workers: int, limit: float, deadline: float) -> Iterator[tuple[Job, Job]]:
    """Each job with its result, as they come: {"failed": why} of one that failed or took more than `limit` seconds.

    No job begins after deadline (of time.monotonic), and one that runs then is stopped: {"not_reached": True}.
    """
    waiting = list(reversed(jobs))
    with selectors.DefaultSelector() as busy:

        def begin(worker: _Worker) -> None:
            if not waiting or time.monotonic() > deadline:
                worker.stop()
                return
            worker.give(waiting.pop(), limit)
            busy.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]  # a pipe: see _Worker

        for _ in range(min(workers, len(jobs))):
            begin(_Worker())
        while busy.get_map():
            for key, _ in busy.select(timeout=0.2):
                worker = key.data
                found = worker.answer()
                if found is None:
                    continue
                busy.unregister(key.fileobj)
                yield worker.job, found
                begin(worker if worker.alive() else _Worker())
            now = time.monotonic()
            for key in [key for key in busy.get_map().values() if now > min(key.data.deadline, deadline + 5)]:
                worker = key.data
                busy.unregister(key.fileobj)
                worker.stop()
                yield (
                    worker.job,
                    {"failed": f"no result after {limit:.0f} s: stopped"}
                    if now > worker.deadline
                    else {"not_reached": True},
                )
                begin(_Worker())
    for job in reversed(waiting):
        yield job, {"not_reached": True}


if __name__ == "__main__":
    if "--work" in sys.argv:
        work()
    else:  # jobs as JSON, done here, one after another: for compute-sanitizer
        found = [result(job) for job in json.loads(sys.argv[1])]
        print(json.dumps(found))
        sys.exit(any("failed" in one or not one.get("good", True) for one in found))

"""Jobs in processes of their own: a job that hangs or kills its process is named, and the next one begins.

A job is a dictionary: `do`, the name of a function in JOBS, and its arguments, which JSON can hold. `run` hands jobs to
worker processes, one at a time each, and yields what came of them. A kernel that never ends takes its worker's time
limit; an illegal access leaves the process unusable, so after any CUDA error the worker ends and another one starts.
What failed names the kernels that were launched last (launched.py). Workers end with the process that started them.
"""

from __future__ import annotations

import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to run from a checkout without installing

Job = dict[str, Any]
NOTE: list[Callable[[str], None]] = [lambda text: None]  # the last one: told what is about to run
GRACE = 5.0  # seconds after the deadline that a job which runs then has left
TILE = ("schedule", "block_h", "block_b", "block_k", "num_warps", "u_in_registers")  # of a plan: what it costs by


def parity(
    cell: str, backend: str, kind: str, shape: list[int], device: str, dropout: bool = False, verify: bool = True
) -> Job:
    """The largest errors of a cell at one shape, as `python -m seqcells check` finds them; and the verdicts of
    `seqcells.verification("always")` on the kernels that ran. dropout: with all masks. verify: whether to verify them.

    Where verification refuses a kernel, the errors are those without it: they tell whether it was right to.
    """
    import seqcells
    from seqcells import drawn, testing
    from seqcells.cell import named

    verifying = sys.modules["seqcells.verification"]  # the class hides the module
    known, refused = named(cell), ""
    if dropout:
        known = drawn.dropped(known, drawn.every_mask(known))

    def found(policy: str) -> Any:
        with seqcells.verification(policy), testing.poisoned():
            return next(testing.sweep(device, [known], [kind], [backend], [testing.Shape(*shape)]))

    verifying.forget()
    try:
        errors = found("always" if verify else "off")
    except RuntimeError as error:
        if "please report this" not in str(error):
            raise
        refused, errors = str(error)[:300], found("off")
    verdicts = [[key.rpartition(", ")[0], v.worst, v.tensor] for (_, key), v in verifying._known.items()]
    return {**asdict(errors), "good": errors.good, "verdicts": verdicts, "refused": refused}


def case(case: Job, device: str, seconds: float, providers: list[str], checked: bool = False) -> Job:
    """Rows of compare.compared: see there."""
    import cases
    import compare

    return {"rows": compare.compared(cases.Case(**case), device, seconds, providers, checked, NOTE[-1])}


def stack(cell: str, backend: str, kind: str, shape: list[int], device: str) -> Job:
    """The largest errors of a stack of layers, in units of what is allowed. shape: L, B and H."""
    import torch

    from seqcells.cell import named
    from seqcells.engines import stack as engine
    from seqcells.kernel_check import Variant, measure

    (L, B, H), known, place = shape, named(cell), torch.device(device)
    precision, dtype = ("tf32", torch.float32) if kind == "tf32" else ("ieee", getattr(torch, kind))
    plans = [engine.planned(known.key, (L, B, H), (dtype, place), precision, back) for back in (False, True)]
    if any(isinstance(p, str) for p in plans):
        return {"good": True, "errors": {}}
    errors, ends = {}, (True, not known.outputs, known.form.states > 1, False, True)
    for mask in (None, torch.bool, torch.uint8):
        of = (known.key, dtype, place, L, H, 0, precision)
        for v in (
            Variant("stack", *of, "none", mask, (True, True)),
            Variant("stack backward", *of, "gates", mask, ends),
        ):
            error = measure(v, plans[: 1 + (v.direction != "stack")], B)
            errors[f"{v.direction} {error.tensor} {mask}"] = error.worst
    return {"good": max(errors.values()) <= 1, "errors": errors}


def _plans(known: Any, layers: int, of: Job) -> list[Any]:
    """Those of forward and of backward. of: arguments of kernels.plan.plan. ValueError if there is none."""
    from seqcells.kernels import stack
    from seqcells.kernels.plan import plan

    found = [plan(known, backward=backward, **of) for backward in (False, True)]
    if layers == 1:
        return found
    stacks = [stack.plan_stack(known, p, layers, of["B"], of["H"], of["itemsize"], of["device"]) for p in found]
    for reason in stacks:
        if isinstance(reason, str):
            raise ValueError(f"no stack: {reason}")
    return stacks


def kernel(
    cell: str,
    direction: str,
    dtype: str,
    size: list[int],
    device: str,
    seconds: float,
    schedule: str | None = None,
    layers: int = 1,
) -> Job:
    """Microseconds a step of one kernel alone, or of its launches, measured and by the latency model: "infer", "train"
    (forward, with and without saving) or "backward". size: B, H and T. seconds: as for `case`. schedule: None is the
    plan's; {"left_out": why} if it does not fit. layers: of a stack, whose step is one of all of them."""
    import predicted
    import torch
    from measure import interleaved

    from seqcells.kernels import cells, scan, stack

    known, place, (B, H, T) = cells.get(cell), torch.device(device), size
    precision = "tf32" if dtype == "tf32" else "ieee"
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    torch.manual_seed(0)
    gx = torch.randn(T, B, 1, known.gates * H, device=place).to(kind)
    u = (torch.randn(layers, known.products * H, H, device=place) * H**-0.5).to(kind)
    w = (torch.randn(layers - 1, known.gates * H, H, device=place) * H**-0.5).to(kind)
    bias = torch.randn(layers, len(known.apart) * H, device=place).to(kind) if known.apart else None
    of: Job = {"itemsize": kind.itemsize, "precision": precision, "device": scan.device_facts(gx.device)}
    of |= {"B": B, "H": H, "schedule": schedule}
    try:
        there, back = _plans(known, layers, of)
    except ValueError as error:
        return {"left_out": str(error)}
    by, own = (stack, (w,)) if layers > 1 else (scan, ())
    chosen = back if direction == "backward" else there
    save = "none" if direction == "infer" else "gates"

    launches: list[scan.Launch] = []

    def forward(**more: Any) -> scan.Scanned:
        how = {"save": save, "plan": there, "precision": precision} | more
        return by.forward(known, gx, *own, *[None] * len(own), u, bias, None, None, None, **how)

    run: Callable[..., object] = forward
    if direction == "backward":
        out, dy = forward(), torch.randn(T, B, 1, H, device=place).to(kind)

        def run(**more: Any) -> object:
            states = out.y, out.c, out.saved
            how = {"plan": chosen, "precision": precision} | more
            return by.backward(known, dy, None, None, *own, u, *states, None, **how)

    run()
    if seconds < 0:
        return {}
    found = statistics.median(interleaved({"": run}, gx.device, seconds)[""])
    run(launch=launches.append)  # collected, not launched
    facts = scan.device_facts(place)
    clock = getattr(torch.cuda.get_device_properties(place), "clock_rate", 0) / 1e6 if place.type == "cuda" else 0.0
    model = predicted.model(launches, facts.capability, clock or facts.clock, layers > 1)
    plan_text = f"{chosen.schedule} {chosen.block_h}x{chosen.block_b}, {chosen.num_warps} warps"
    tile = {name: getattr(chosen, name) for name in TILE}
    return {"measured": found / T * 1e6, "model": model, "floor": chosen.microseconds, "plan": plan_text, "tile": tile}


def probe(name: str, device: str, dry: bool) -> Job:
    """One of the device's limits."""
    import probes

    return probes.PROBES[name](device, dry)


JOBS: dict[str, Callable[..., Job]] = {
    "parity": parity, "stack": stack, "case": case, "kernel": kernel, "probe": probe
}  # fmt: skip


def result(job: Job) -> Job:
    """What the job returns, or why it failed."""
    try:
        return JOBS[job["do"]](**{name: value for name, value in job.items() if name != "do"})
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}


def _end_with(parent: int) -> None:
    """End this process when the one that started it has: killed, it cannot stop us, and a kernel may never end."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def work(path: Path, parent: int) -> None:
    """A worker: a job a line in, a result a line out, until there are no more. path: where it notes its launches."""
    import launched

    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a job prints is not an answer
    launches = launched.Launches(path)
    launches.watch()
    NOTE.append(launches.say)
    for line in sys.stdin:
        launches.clear()
        text = json.dumps(result(json.loads(line)))
        print(text, file=answers, flush=True)
        if "CUDA error" in text or "CUDA_ERROR" in text or "Triton Error [CUDA]" in text:
            os._exit(1)  # no later call of this process would succeed


class _Worker:
    def __init__(self, blocking: bool) -> None:
        # Triton's kernels are compiled once for all workers, in its cache on disk.
        handle, name = tempfile.mkstemp(prefix="seqcells-launched-")
        os.close(handle)
        self.launched = Path(name)
        command = [sys.executable, str(Path(__file__)), "--work", name, str(os.getpid())]
        # There may be as many workers as cores. What is verified here is not for other programs.
        own = os.environ | {"OMP_NUM_THREADS": "1", "SEQCELLS_CACHE": ""}
        own |= {"CUDA_LAUNCH_BLOCKING": "1"} if blocking else {}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=own)
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
        return None if more else {"failed": f"its process ended with {self.process.wait()}{self.last()}"}

    def last(self) -> str:
        """The kernels that it launched last, in words."""
        import launched

        names = launched.last(self.launched)
        return f"; launched last: {' | before it: '.join(names[:3])}" if names else ""

    def alive(self) -> bool:
        """Whether it takes another job. One that ends after a CUDA error does so at once after its answer."""
        if "CUDA" in self.text.decode(errors="replace"):
            return False
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver may hold a process that it cannot end
            self.process.wait(10)
        self.launched.unlink(missing_ok=True)


def run(
    jobs: list[Job], workers: int, limit: float, deadline: float, blocking: bool = False
) -> Iterator[tuple[Job, Job]]:
    """Each job with its result, as they come: {"failed": why} of one that failed or took more than `limit` seconds.

    No job begins after deadline (of time.monotonic), and one that runs then is stopped soon: {"not_reached": True}.
    blocking: each launch is waited for, so that the last one is the one that hangs or fails; not for what is timed.
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
            begin(_Worker(blocking))
        while busy.get_map():
            for key, _ in busy.select(timeout=0.2):
                worker = key.data
                found = worker.answer()
                if found is None:
                    continue
                busy.unregister(key.fileobj)
                yield worker.job, found
                if worker.alive():
                    begin(worker)
                else:
                    worker.stop()
                    begin(_Worker(blocking))
            now = time.monotonic()
            for key in [key for key in busy.get_map().values() if now > min(key.data.deadline, deadline + GRACE)]:
                worker = key.data
                busy.unregister(key.fileobj)
                late, why = now > worker.deadline, f"no result after {limit:.0f} s: stopped{worker.last()}"
                worker.stop()
                yield worker.job, {"failed": why} if late else {"not_reached": True}
                begin(_Worker(blocking))
    for job in reversed(waiting):
        yield job, {"not_reached": True}


if __name__ == "__main__":
    if "--work" in sys.argv:
        work(Path(sys.argv[2]), int(sys.argv[3]))
    else:  # jobs as JSON, done here, one after another: for compute-sanitizer
        found = [result(job) for job in json.loads(sys.argv[1])]
        print(json.dumps(found))
        sys.exit(any("failed" in one or not one.get("good", True) for one in found))

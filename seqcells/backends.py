"""Which implementation runs a scan, and why.

    triton     the fused kernels: CUDA, or CPU tensors under TRITON_INTERPRET=1
    aten       torch's own fused RNN (cuDNN on CUDA, oneDNN on the CPU), for what it supports
    loop       a loop over time in torch operations with a backward of its own: any device
    reference  the pure-PyTorch loop that autograd differentiates: everything, slowly

"auto" is triton on CUDA (where a kernel fails: see `fallback`); on the CPU it is aten or loop, whichever was measured
to be faster at such sizes. aten has resets for one cell alone: the LSTM in float32 on the CPU, without a projection
(see `marked`; if something in it is not finite, loop does it). What torch.jit.trace makes of triton and loop runs and
can be saved, but has no gradients; of aten, it has.
"triton:resident", "triton:grid" and "triton:stepwise" name a schedule as well.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad

from . import chosen

NAMES = ("auto", "triton", "aten", "loop", "reference")
SCHEDULES = ("resident", "grid", "stepwise")
ATEN_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NO_TRITON = "the triton backend needs triton: pip install triton (Linux)"

# Of the checks of shapes, under torch.jit.trace. torch does the same for its own.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="seqcells")


def parse(backend: str) -> tuple[str, str]:
    """(name, schedule or "") of a backend's spelling. ValueError if there is no such backend."""
    name, _, schedule = backend.partition(":") if isinstance(backend, str) else (None, "", "")
    if name not in NAMES or (schedule and (name != "triton" or schedule not in SCHEDULES)):
        allowed = [*NAMES, *(f"triton:{s}" for s in SCHEDULES)]
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(allowed)}")
    return name, schedule


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it, layers, cells and functions that name no backend themselves use this one.

    name: "auto", "triton", "aten", "loop" or "reference"; or "triton:resident", "triton:grid" or "triton:stepwise".

        >>> layer = seqcells.GRU(10, 20)
        >>> with seqcells.backend("reference"):
        ...     y, h_n = layer(torch.randn(5, 3, 10))

    The choice belongs to the thread that made it, as with torch.no_grad and torch.autocast, and to the asyncio task.
    Others do not see it. A new thread starts with "auto". A new task and asyncio.to_thread start with the choice of
    their creator, and so does a forked process, such as a DataLoader's worker; a spawned one starts with "auto". A
    generator that yields within it shows its choice to its caller, as torch.no_grad does. Each exit restores what its
    entry found, in whatever order they come.

    Backward does what its forward chose. What torch.utils.checkpoint recomputes follows the choice where backward is
    called: call it within the same one, or give the layers backend=. A compiled function follows the choice where it is
    called, and is compiled once for each.

    ValueError for an unknown name.
    """
    parse(name)
    found = chosen.backend
    chosen.backend = name
    try:
        yield
    finally:
        chosen.backend = found


def spelled(requested: str | None) -> str:
    """A layer's own backend, else the context's, else "auto"."""
    return requested or chosen.backend


@dataclass(frozen=True)
class Choice:
    """backend: triton, aten, loop or reference. schedule: of triton, one that was asked for; "" if none was; "auto" if
    triton was not asked for, and something else may run where it fails. marked: see `marked`, of aten."""

    backend: str
    schedule: str
    why: str
    marked: bool = False


@cache
def installed() -> bool:
    """Whether there is triton. It is imported here, and so only where a kernel is wanted."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError):  # not installed, or a library that it needs is missing
        return False
    return True


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted, and so take CPU tensors. Triton decides that when it is imported."""
    if not installed():
        return False
    from triton import JITFunction, language

    return not isinstance(language.zeros, JITFunction)


def _no_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Why the triton backend cannot run there; "" if it can."""
    if not installed():
        return NO_TRITON
    if dtype not in TRITON_DTYPES:
        return f"the triton backend has no kernels for {dtype}: expected one of {TRITON_DTYPES}"
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return ""
    advice = "set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU (slow, for testing)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        advice = "TRITON_INTERPRET=1 was set after triton was imported: set it before Python starts"
    return f"the triton backend needs CUDA tensors, got tensors on {device}; {advice}"


# As torch.compiler.assume_constant_result does, which imports the compiler: torch.compile asks it while it traces, and
# does not trace the import.
_no_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Request:
    """What a scan asks for beside its cell, device and dtype, as far as a backend may lack it or be slow at it."""

    resets: bool = False
    lengths: bool = False
    packed: bool = False  # the input is a PackedSequence
    cells: bool = False  # all cell states
    onednn: bool = False  # oneDNN's LSTM would run it
    marked: bool = False  # oneDNN's LSTM could, with masks as marked steps
    one_step: bool = False  # a cell's call
    looped: bool = False  # the loop is faster at it than torch's own
    refused: bool = False  # the kernels were tried and failed (see `fallback`)
    projected: bool = False  # an LSTM with a projection
    exported: bool = False  # see `exporting`
    problem: str = ""  # why no kernels, nor a loop, can be derived from the cell's step


# Measured by benchmarks/crossover.py: benchmarks/results/crossover-cpu.md. With more threads than one torch's own gain
# more than the loop does.
_STEPS = {"rnn_tanh": 20, "rnn_relu": 20}  # below which the loop's call costs more than its steps save
_OTHERS, _INFERENCE = 10, 96  # steps of the other cells; without gradients
_WORKSPACE = 1 << 20  # T*B*H above which oneDNN's, of 16 such, is memory new in every call
# B*H up to which oneDNN's LSTM with marked steps is faster than the loop, with gradients and without; a quarter of it
# with lengths, for the loop leaves padding out, and nothing where less than this share of the rows is real.
_MARKED, _REAL = {True: 4096, False: 8192}, 0.5


def loop_pays(cell: str, steps: int, batch: int, hidden: int, grad: bool, onednn: bool, lengths: bool = False) -> bool:
    """Whether on the CPU the loop is faster than torch's own cell, whose lengths are packed."""
    if lengths:
        return grad and steps >= 2 * _STEPS.get(cell, _OTHERS)
    if onednn:
        return grad and batch >= 64 and steps * batch * hidden >= _WORKSPACE and torch.get_num_threads() == 1
    if grad:
        return steps >= _STEPS.get(cell, _OTHERS)
    return steps >= _INFERENCE and hidden >= 16 and torch.get_num_threads() == 1


def request(
    cell: str,
    size: tuple[int, int, int] | None,
    grad: bool,
    *,
    resets: bool = False,
    lengths: bool = False,
    packed: bool = False,
    cells: bool = False,
    one_step: bool = False,
    onednn: bool = False,
    seen: bool = False,
    real: float = 1.0,
    lean: bool = False,
    refused: bool = False,
    projected: bool = False,
    exported: bool = False,
    problem: str = "",
) -> Request:
    """size: T, B, H; None: not to be asked. onednn: its LSTM would run the cell, were there no masks; seen: it could
    not with them. real: the share of rows that are no padding. lean: little is to be kept for backward."""
    masked = resets or lengths
    marked = masked and onednn and not (cells or seen)
    if packed and not resets and size is not None and not loop_pays(cell, *size, grad, False, True):
        marked = False  # torch's own takes a packed batch, and short ones are faster by it
    looped = False
    if size is not None and marked:
        looped = lean or real < _REAL or size[1] * size[2] > _MARKED[grad] // (4 if lengths else 1)
    elif size is not None:
        looped = loop_pays(cell, *size, grad, onednn and not masked, lengths)
    onednn = onednn and not masked
    more = (one_step, looped, refused, projected, exported, problem)
    return Request(resets, lengths, packed, cells, onednn, marked, *more)


def _no_aten(cell: str, request: Request) -> str:
    """Why aten cannot; "" if it can."""
    if cell not in ATEN_CELLS:
        return f"torch has no fused {cell}"
    if request.cells:
        return "torch's fused RNNs do not give all cell states"
    if request.projected and torch.onnx.is_in_onnx_export():
        return "ONNX's LSTM has no projection"
    return "torch's fused RNNs have no resets" if request.resets and not request.marked else ""


def refuse(name: str, cell: str, request: Request | None = None) -> None:
    """Raise RuntimeError if that backend can run the cell nowhere. request: None, a plain scan."""
    lacking = _no_aten(cell, request or Request())
    if name == "aten" and lacking:
        raise RuntimeError(f"the aten backend cannot run this: {lacking}; use backend='triton', 'loop' or 'reference'")


def transforming() -> bool:
    """Whether torch.func's transforms or forward-mode AD are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether what runs is looked at by a compiler, a tracer or a transform, to which values mean nothing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transforming()


def watched() -> bool:
    """Whether a TorchDispatchMode sees each operator, such as torch.utils.flop_counter's."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def exporting(steps: Any) -> bool:
    """Whether torch.export or torch.onnx.export makes a program of what runs, and torch's own layers can be in it.

    Of them torch.export needs to know the number of steps, as it does for torch.nn's.
    """
    known = isinstance(steps, int) and not torch.compiler.is_dynamo_compiling()
    return torch.onnx.is_in_onnx_export() or (known and torch.compiler.is_exporting())


def autocasting(device: torch.device) -> bool:
    """Whether torch.autocast is on for tensors of that device."""
    # Of most devices it need not be asked, which torch.compile of torch 2.11 cannot trace.
    available = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def prefers_kernels(device: torch.device) -> bool:
    """Whether "auto" is the kernels on that device, where they run."""
    return device.type == "cuda"


def _without_kernels(cell: str, device: torch.device, request: Request, lacking: str) -> tuple[str, str]:
    """What "auto" is where the kernels do not run, and why."""
    loop = "loop"
    if request.problem:
        return "reference", f"from the step nothing else can be derived: {request.problem}"
    if torch.onnx.is_in_onnx_export():
        loop = "reference"  # ONNX has no operators of our own
    if lacking:
        return loop, lacking
    if request.exported:
        if request.lengths and not request.packed:
            return loop, "torch's own fused RNNs take lengths only packed"
        return "aten", "an exported program then needs no operator of our own"
    if loop == "reference" or (request.one_step and not transforming()) or torch.jit.is_tracing():
        return "aten", f"torch's own fused {cell} runs there"
    if transforming():
        return loop, "torch.func and forward mode want operators that can be transformed"
    if (request.onednn or request.marked) and not request.looped:
        return "aten", "oneDNN's LSTM is the fastest there"
    if torch.compiler.is_compiling():
        return loop, "torch.compile would unroll torch's own for every length"
    if request.lengths and not request.packed:
        return loop, "torch's own fused RNNs take lengths only packed"
    if request.looped and device.type == "cpu":
        return loop, f"it is faster than torch's own fused {cell}"
    return "aten", f"torch's own fused {cell} runs there"


def choose(cell: str, device: torch.device, dtype: torch.dtype, request: Request, requested: str | None) -> Choice:
    """The backend for a scan. requested: a layer's own backend=, else the context's, else "auto".

    Raises ModuleNotFoundError (no triton), RuntimeError (wrong device, or something a backend lacks), TypeError
    (dtype), ValueError (unknown backend).
    """
    name, schedule = parse(spelled(requested))
    if name != "aten" and torch.compiler.is_compiling() and transforming():
        return Choice("reference", "", "within torch.compile, torch.func has no vmap of a Function")
    if name == "triton":
        if problem := _no_triton(device, dtype):
            if problem == NO_TRITON:
                raise ModuleNotFoundError(problem)  # no name=: torch.compile cannot trace an exception's keywords
            raise (TypeError if dtype not in TRITON_DTYPES else RuntimeError)(problem)
        return Choice("triton", schedule, "it was asked for")
    refuse(name, cell, request)
    if name != "auto":
        return Choice(name, "", "it was asked for", name == "aten" and request.marked)
    where = f"the tensors are on the {device.type.upper()}"
    if prefers_kernels(device):
        problem = _no_triton(device, dtype)
        if torch.onnx.is_in_onnx_export():
            problem = "ONNX has no operators for the kernels"
        if not problem and not request.refused and not request.problem:
            return Choice("triton", "auto", "the tensors are on CUDA")
        if not request.problem:
            where = problem or "the kernels failed there (a RuntimeWarning said how)"
    found, why = _without_kernels(cell, device, request, _no_aten(cell, request))
    return Choice(found, "", f"{where}, and {why}", found == "aten" and request.marked)

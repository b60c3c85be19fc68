"""Which implementation runs a scan, and why.

    triton     the fused kernels: CUDA, or CPU tensors under TRITON_INTERPRET=1
    aten       torch's own fused RNN (cuDNN on CUDA, oneDNN on the CPU), for what it supports
    loop       a loop over time in torch operations with a hand-written backward: any device
    reference  the pure-PyTorch loop that autograd differentiates: supports everything, but is slow

"auto" is what was measured on this machine (see `tuning`); else triton on CUDA (for kernels that fail, see `fallback`),
and on the CPU aten or loop, whichever was measured elsewhere to be faster at similar sizes. aten supports resets only
for the LSTM in float32 on the CPU, without a projection (see `engines.reset_steps`; if a value is not finite, loop runs
instead). Programs that torch.jit.trace makes of triton and loop can be run and saved, but have no gradients; those of
aten have gradients.
"triton:resident", "triton:grid" and "triton:stepwise" also name a schedule.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.autograd import forward_ad

from . import chosen
from .kernels.plan import SCHEDULES as SCHEDULES

NAMES = ("auto", "triton", "aten", "loop", "reference")
ATEN_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NO_TRITON = "the triton backend needs triton: pip install triton (Linux)"

# Warnings of the shape checks under torch.jit.trace. torch filters those of its own modules, too.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="seqcells")


def parse(backend: str) -> tuple[str, str]:
    """Split a backend's name into (name, schedule or ""). ValueError if there is no such backend."""
    name, _, schedule = backend.partition(":") if isinstance(backend, str) else (None, "", "")
    if name not in NAMES or (schedule and (name != "triton" or schedule not in SCHEDULES)):
        allowed = [*NAMES, *(f"triton:{s}" for s in SCHEDULES)]
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(allowed)}")
    return name, schedule


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager that sets the backend of layers, cells and functions that do not set their own.

    name: "auto", "triton", "aten", "loop" or "reference"; or "triton:resident", "triton:grid" or "triton:stepwise".

        >>> layer = seqcells.GRU(10, 20)
        >>> with seqcells.backend("reference"):
        ...     y, h_n = layer(torch.randn(5, 3, 10))

    Like torch.no_grad and torch.autocast, it is local to the thread, and also to the asyncio task. A new thread starts
    with "auto". A new task and asyncio.to_thread inherit their creator's backend, and so does a forked process, such as
    a DataLoader's worker; a spawned process starts with "auto". If a generator yields inside the context, its caller
    sees the backend, as with torch.no_grad. Each exit restores what its entry found, in any order.

    Backward uses the backend of its forward. What torch.utils.checkpoint recomputes uses the backend set where backward
    is called: call backward in the same context, or pass backend= to the layers. A compiled function uses the backend
    set where it is called, and is compiled once for each backend.

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


@cache
def installed() -> bool:
    """Whether triton is installed. This imports it, so call it only if a kernel is wanted."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError):  # not installed, or a library that it needs is missing
        return False
    return True


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted and thus accept CPU tensors. Triton decides this when it is imported."""
    if not installed():
        return False
    from triton import JITFunction, language

    return not isinstance(language.zeros, JITFunction)


def transforming() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether a compiler, a tracer or a transform is active, so that tensors may have no values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transforming()


def autocasting(device: torch.device) -> bool:
    """Whether torch.autocast is on for tensors of that device."""
    # Not asked for most devices, because torch.compile of torch 2.11 cannot trace the question.
    available = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def no_aten(lacking: str) -> RuntimeError:
    """The error if backend="aten" cannot run something."""
    return RuntimeError(f"the aten backend cannot run this: {lacking}; use backend='triton', 'loop' or 'reference'")

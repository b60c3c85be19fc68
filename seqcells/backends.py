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


def transforming() -> bool:
    """Whether torch.func's transforms or forward-mode AD are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether a compiler, a tracer or a transform is active, to which values mean nothing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transforming()


def autocasting(device: torch.device) -> bool:
    """Whether torch.autocast is on for tensors of that device."""
    # Of most devices it need not be asked, which torch.compile of torch 2.11 cannot trace.
    available = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def no_aten(lacking: str) -> RuntimeError:
    """The error where backend="aten" cannot run something."""
    return RuntimeError(f"the aten backend cannot run this: {lacking}; use backend='triton', 'loop' or 'reference'")

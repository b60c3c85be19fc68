"""Which implementation runs a scan, and why.

    triton     the fused kernels: CUDA, or CPU tensors under TRITON_INTERPRET=1
    aten       torch's own fused RNN (cuDNN on CUDA, oneDNN on the CPU), for what it supports
    reference  the pure-PyTorch loop: everything, slowly

"auto" is triton on CUDA, aten on the CPU where it can, else reference. "triton:resident" and "triton:stepwise" name a
schedule as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

try:
    from triton import knobs

    TRITON = True
    # Triton decides at import whether it interprets kernels, which then take CPU tensors.
    INTERPRETED = bool(knobs.runtime.interpret)
except ModuleNotFoundError:
    TRITON = INTERPRETED = False

NAMES = ("auto", "triton", "aten", "reference")
SCHEDULES = ("resident", "grid", "stepwise")
ATEN_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A plain list, not a ContextVar: torch.compile guards on its contents and so recompiles when they change.
_chosen: list[str] = []


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

    The choice belongs to the process, not to the thread. ValueError for an unknown name.
    """
    parse(name)
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@dataclass(frozen=True)
class Choice:
    """backend: triton, aten or reference. schedule: "" unless it was asked for."""

    backend: str
    schedule: str
    why: str


def _no_triton(device: torch.device, dtype: torch.dtype) -> Exception | None:
    """Why the triton backend cannot run there, as the exception to raise; None if it can."""
    if not TRITON:
        return ModuleNotFoundError("the triton backend needs triton: pip install triton (Linux)", name="triton")
    if dtype not in TRITON_DTYPES:
        return TypeError(f"the triton backend has no kernels for {dtype}: expected one of {TRITON_DTYPES}")
    if device.type == "cuda":
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    advice = "set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU (slow, for testing)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        advice = "TRITON_INTERPRET=1 was set after triton was imported: set it before Python starts"
    return RuntimeError(f"the triton backend needs CUDA tensors, got tensors on {device}; {advice}")


def _no_aten(cell: str, resets: bool) -> str:
    """Why aten cannot; "" if it can."""
    if cell not in ATEN_CELLS:
        return f"torch has no fused {cell}"
    return "torch's fused RNNs have no resets" if resets else ""


def choose(cell: str, device: torch.device, dtype: torch.dtype, *, resets: bool, requested: str | None) -> Choice:
    """The backend for a scan. requested: a layer's own backend=, else the context's, else "auto".

    Raises ModuleNotFoundError (no triton), RuntimeError (wrong device, or something aten lacks), TypeError (dtype),
    ValueError (unknown backend).
    """
    spelled = requested or (_chosen[-1] if _chosen else "auto")
    name, schedule = parse(spelled)
    if name == "triton":
        if problem := _no_triton(device, dtype):
            raise problem
        return Choice("triton", schedule, "it was asked for")
    lacking = _no_aten(cell, resets)
    if name == "aten" and lacking:
        raise RuntimeError(f"the aten backend cannot run this: {lacking}; use backend='triton' or 'reference'")
    if name != "auto":
        return Choice(name, "", "it was asked for")
    problem = _no_triton(device, dtype)
    if device.type == "cuda" and problem is None:
        return Choice("triton", "", "the tensors are on CUDA")
    where = str(problem) if device.type == "cuda" else f"the tensors are on the {device.type.upper()}"
    if not lacking:
        return Choice("aten", "", f"{where}, and torch's own fused {cell} runs there")
    return Choice("reference", "", f"{where}, and {lacking}")

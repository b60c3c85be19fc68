"""lstm(), gru(), rnn(), scan(): check the arguments, choose a backend, run. One layer, one direction.

Shapes: x [T, B, I]; states [B, H]; w_ih [G*H, I]; w_hh [G*H, H]; b_ih, b_hh [G*H] or None; resets bool [T, B].
G = 4 for LSTM (i f g o), 3 for GRU (r z n), 1 for RNN, in torch's order. y [T, B, H].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, reference

try:
    from . import ops
except ModuleNotFoundError as missing:  # without triton all but the triton backend works, and backends.py says so
    if (missing.name or "").partition(".")[0] != "triton":
        raise
    ops = None  # type: ignore[assignment]

SAVES = ("gates", "states")


def rnn_precision() -> str:
    """ "tf32" or "ieee": what float32 recurrent products use on CUDA, by PyTorch's own switches for RNNs.

    torch.backends.cudnn.rnn.fp32_precision (which torch.backends.cudnn.allow_tf32 sets too); "none" asks its parents.
    """
    cudnn = torch.backends.cudnn
    for setting in (cudnn.rnn.fp32_precision, cudnn.fp32_precision, torch.backends.fp32_precision):  # type: ignore[attr-defined]
        if setting != "none":
            return "tf32" if setting == "tf32" else "ieee"
    return "ieee"


def _check(
    x: Tensor, states: tuple[Tensor | None, ...], weights: tuple[Tensor | None, ...], resets: Tensor | None, gates: int
) -> None:
    """Raise what torch.nn raises, in its words where it has some, before anything runs."""
    w_ih, w_hh, *biases = weights
    assert w_ih is not None and w_hh is not None
    if x.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {x.dim()}")
    H = w_hh.shape[-1]
    if w_hh.dim() != 2 or w_hh.shape[0] != gates * H or H == 0:
        raise RuntimeError(f"w_hh must have shape ({gates}*H, H), got {tuple(w_hh.shape)}")
    if w_ih.dim() != 2 or w_ih.shape[0] != gates * H:
        raise RuntimeError(f"w_ih must have shape ({gates * H}, input_size), got {tuple(w_ih.shape)}")
    for name, b in zip(("b_ih", "b_hh"), biases, strict=True):
        if b is not None and b.shape != (gates * H,):
            raise RuntimeError(f"{name} must have shape ({gates * H},), got {tuple(b.shape)}")
    if x.dtype != w_ih.dtype:
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    if not x.is_floating_point():
        raise TypeError(f"input must be of a floating point dtype, got {x.dtype}")
    if x.shape[2] != w_ih.shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {x.shape[2]}")
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for kind, tensors in (("hidden", states), ("parameter", weights)):
        for t in tensors:
            if t is not None and t.device != x.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} "
                    f"and {kind} tensor at {t.device}"
                )
            if t is not None and t.dtype != x.dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with {x.dtype} "
                    f"and {kind} tensor with {t.dtype}"
                )
    for i, s in enumerate(states):
        if s is not None and s.shape != (x.shape[1], H):
            raise RuntimeError(f"Expected hidden[{i}] size {(x.shape[1], H)}, got {list(s.shape)}")
    if resets is not None:
        if resets.dtype != torch.bool:
            raise TypeError(f"resets must be a bool tensor, got {resets.dtype}")
        if resets.shape != x.shape[:2]:
            raise RuntimeError(f"Expected resets size {tuple(x.shape[:2])}, got {list(resets.shape)}")
        if resets.device != x.device:
            raise RuntimeError(f"resets must be on the input's device {x.device}, got {resets.device}")


def _aten(
    cell: str, x: Tensor, states: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's own fused layer; it wants both biases or neither."""
    w_ih, w_hh, b_ih, b_hh = weights
    if (b_ih is None) != (b_hh is None):
        given = b_hh if b_ih is None else b_ih
        assert given is not None
        b_ih, b_hh = (torch.zeros_like(given) if b is None else b for b in (b_ih, b_hh))
    flat = [t for t in (w_ih, w_hh, b_ih, b_hh) if t is not None]
    options = (len(flat) == 4, 1, 0.0, False, False, False)
    hx = [s[None] for s in states]
    if cell == "lstm":
        y, *final = torch.lstm(x, hx, flat, *options)
    else:
        run = {"gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}[cell]
        y, *final = run(x, hx[0], flat, *options)
    return y, tuple(f[0] for f in final)


def scan(
    cell: str,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    save: str = "gates",
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A registered cell over all steps of x: (y, final states). Shapes: see the module.

    states: (h0,) or (h0, c0); None, whole or in part, is zero. resets: where set, the states before that step are zero.
    save: what the triton backend keeps for backward: "gates", or "states" (about a third of the memory, one more GEMM).
    backend: see seqcells.backends; None is the context's, else "auto".

    Raises RuntimeError, ValueError or TypeError as torch.nn does for shapes, dtypes and devices that do not fit.
    """
    spec = reference.get(cell)
    if save not in SAVES:
        raise ValueError(f"unknown save {save!r}: expected one of {', '.join(SAVES)}")
    given = (None,) * spec.states if states is None else tuple(states)
    if len(given) != spec.states:
        raise RuntimeError(f"{cell} has {spec.states} state{'s' * (spec.states > 1)}, got {len(given)}")
    weights = (w_ih, w_hh, b_ih, b_hh)
    _check(x, given, weights, resets, spec.gates)
    chosen = backends.choose(cell, x.device, x.dtype, resets=resets is not None, requested=backend)
    if chosen.backend == "triton" and x.shape[1] > 0:
        precision = rnn_precision() if x.dtype == torch.float32 else "ieee"
        options = {"cell": cell, "save": save, "schedule": chosen.schedule, "precision": precision}
        return ops.apply(x, given, w_ih, w_hh, b_ih, b_hh, resets, **options)
    zero = x.new_zeros(x.shape[1], w_hh.shape[1])
    full = tuple(zero if s is None else s for s in given)
    if chosen.backend == "aten":
        return _aten(cell, x, full, weights)
    return reference.scan(spec.step, x, full, w_ih, w_hh, b_ih, b_hh, resets=resets)


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM: y and (h_n, c_n). hx: (h0, c0) or None. options: those of `scan`."""
    y, final = scan("lstm", x, hx, w_ih, w_hh, b_ih, b_hh, **options)
    return y, (final[0], final[1])


def gru(
    x: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """GRU: y and h_n. reset_after: torch's and cuDNN's form; False: Cho et al. 2014 v1. options: those of `scan`."""
    cell = "gru" if reset_after else "gru_before"
    y, final = scan(cell, x, (hx,), w_ih, w_hh, b_ih, b_hh, **options)
    return y, final[0]


def rnn(
    x: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Elman RNN: y and h_n. nonlinearity: "tanh" or "relu". options: those of `scan`."""
    y, final = scan(rnn_cell_name(nonlinearity), x, (hx,), w_ih, w_hh, b_ih, b_hh, **options)
    return y, final[0]


def rnn_cell_name(nonlinearity: str) -> str:
    """The kernels' name of the cell. ValueError in torch's words for anything but tanh and relu."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"


@dataclass(frozen=True)
class Explanation:
    """Which backend a scan would use and, for triton, the Plan; why, in words."""

    backend: str
    plan: Any
    why: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}"


def explain(
    cell: str,
    *,
    batch: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    resets: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What a scan of this shape would run on, without running it.

    device: a torch device, or a target that need not be present: "sm_80", "sm_90", "sm_100". Raises as `scan` does.
    """
    reference.get(cell)
    for name, size in (("batch", batch), ("hidden_size", hidden_size)):
        if size < 1:
            raise ValueError(f"{name} must be greater than zero, got {size}")
    elsewhere = isinstance(device, str) and device.startswith("sm_")
    place = torch.device("cuda" if elsewhere else device)
    chosen = backends.choose(cell, place, dtype, resets=resets, requested=backend)
    if chosen.backend != "triton":
        return Explanation(chosen.backend, None, chosen.why)
    from .kernels import cells, plan, scan

    if elsewhere and device not in plan.KNOWN:
        raise ValueError(f"unknown device {device!r}: expected a torch device or one of {', '.join(plan.KNOWN)}")
    facts = plan.KNOWN[str(device)] if elsewhere else scan.device_facts(place)
    gates = cells.get(cell).gates
    planned = plan.plan(gates, batch, hidden_size, dtype.itemsize, facts, chosen.schedule or None)
    return Explanation("triton", planned, f"{chosen.why}; {planned.schedule} schedule: {planned.why}")

"""lstm(), gru(), rnn(), scan(): check the arguments, choose a backend, run. One layer, one direction.

Shapes: x [T, B, I]; states [B, H]; w_ih [G*H, I]; w_hh [G*H, H]; b_ih, b_hh [G*H] or None; resets bool [T, B].
G = 4 for LSTM (i f g o), 3 for GRU (r z n), 1 for RNN, in torch's order. y [T, B, H].
"""

from __future__ import annotations

from collections.abc import Sequence
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
PRECISIONS = ("ieee", "tf32", "tf32x3")


def rnn_precision() -> str:
    """ "tf32" or "ieee": what float32 recurrent products use on CUDA, by PyTorch's own switches for RNNs.

    torch.backends.cudnn.rnn.fp32_precision (which torch.backends.cudnn.allow_tf32 sets too); "none" asks its parents.
    """
    cudnn = torch.backends.cudnn
    for setting in (cudnn.rnn.fp32_precision, cudnn.fp32_precision, torch.backends.fp32_precision):  # type: ignore[attr-defined]
        if setting != "none":
            return "tf32" if setting == "tf32" else "ieee"
    return "ieee"


def check_precision(asked: str | None) -> None:
    """ValueError for anything but None and the names of PRECISIONS."""
    if asked not in (None, *PRECISIONS):
        raise ValueError(f"unknown precision {asked!r}: expected one of {', '.join(PRECISIONS)}")


def _product_precision(asked: str | None, dtype: torch.dtype) -> str:
    """What recurrent products of that dtype are done in. Only float32 has a choice: `asked`, or PyTorch's switches."""
    return (asked or rnn_precision()) if dtype == torch.float32 else "ieee"


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


@torch.compiler.disable
def _aten_lstm(*arguments: Any) -> tuple[Tensor, ...]:
    """torch.lstm, outside torch.compile: what it does on the CPU cannot be traced with gradients (torch.nn.LSTM breaks
    the graph for it too)."""
    return torch.lstm(*arguments)


def _aten(
    cell: str, x: Tensor, states: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's own fused layer; it wants both biases or neither. The final states are [1, B, H]."""
    w_ih, w_hh, b_ih, b_hh = weights
    if (b_ih is None) != (b_hh is None):
        given = b_hh if b_ih is None else b_ih
        assert given is not None
        b_ih, b_hh = (torch.zeros_like(given) if b is None else b for b in (b_ih, b_hh))
    flat = [t for t in (w_ih, w_hh, b_ih, b_hh) if t is not None]
    # cuDNN keeps what its backward needs only in training mode.
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *flat))
    options = (len(flat) == 4, 1, 0.0, train, False, False)
    hx = [s[None] for s in states]
    if cell == "lstm":
        run = _aten_lstm if x.device.type == "cpu" else torch.lstm
        y, *final = run(x, hx, flat, *options)
    else:
        run = {"gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}[cell]
        y, *final = run(x, hx[0], flat, *options)
    return y, tuple(final)


def _aten_step(
    cell: str, x: Tensor, states: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """torch's own fused cell, x [B, I]."""
    if cell == "lstm":
        return torch.lstm_cell(x, states, *weights)  # type: ignore[arg-type]
    run = {"gru": torch.gru_cell, "rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell}[cell]
    return (run(x, states[0], *weights),)  # type: ignore[arg-type]


def autocasting(device: torch.device) -> bool:
    """Whether torch.autocast is on for tensors of that device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None] | None:
    """The tensors in autocast's dtype, as torch casts the arguments of its own RNNs; None where autocast is off."""
    device = next(t for t in tensors if t is not None).device
    if not autocasting(device):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    low = (torch.float16, torch.bfloat16, torch.float32)
    return [t.to(dtype) if t is not None and t.dtype in low else t for t in tensors]


def run(
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
    precision: str | None = None,
    one_step: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `scan` and the modules share: `scan`, with final states [1, B, H] as torch.nn has them.

    one_step: a cell's call, x [1, B, I], for which aten has kernels of its own.
    """
    spec = reference.get(cell)
    if save not in SAVES:
        raise ValueError(f"unknown save {save!r}: expected one of {', '.join(SAVES)}")
    check_precision(precision)
    given = (None,) * spec.states if states is None else tuple(states)
    if len(given) != spec.states:
        raise RuntimeError(f"{cell} has {spec.states} state{'s' * (spec.states > 1)}, got {len(given)}")
    if cast := _autocast(x, w_ih, w_hh, b_ih, b_hh, *given):
        inputs: list[Any] = [cast[0], cast[5:], *cast[1:5]]
        with torch.autocast(x.device.type, enabled=False):
            how: dict[str, Any] = {"save": save, "backend": backend, "precision": precision, "one_step": one_step}
            return run(cell, *inputs, resets=resets, **how)
    weights = (w_ih, w_hh, b_ih, b_hh)
    _check(x, given, weights, resets, spec.gates)
    chosen = backends.choose(cell, x.device, x.dtype, resets=resets is not None, requested=backend)
    if chosen.backend == "triton" and x.shape[1] > 0:
        precision = _product_precision(precision, x.dtype)
        if chosen.schedule:  # it may not fit: say so before anything runs
            for backward in (False, True):
                ops.plan_for(ops.cells.get(cell), x.shape[1], w_hh[None], chosen.schedule, precision, backward)
        how = {"cell": cell, "save": save, "reversed": 0, "schedule": chosen.schedule, "precision": precision}
        return ops.apply(x, given, w_ih, w_hh, b_ih, b_hh, resets, **how)
    zero = x.new_zeros(x.shape[1], w_hh.shape[1])
    full = tuple(zero if s is None else s for s in given)
    if chosen.backend == "aten" and one_step:
        final = _aten_step(cell, x[0], full, weights)
        return final[0][None], final
    if chosen.backend == "aten":
        return _aten(cell, x, full, weights)
    y, final = reference.scan(spec.step, x, full, w_ih, w_hh, b_ih, b_hh, resets=resets)
    return y, final if one_step else tuple(torch.stack([s]) for s in final)


def scan(
    cell: str,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A registered cell over all steps of x: (y, final states [B, H]). Shapes: see the module.

    states: (h0,) or (h0, c0); None, whole or in part, is zero. Options:
    resets: where set, the states before that step are zero.
    save: what the triton backend keeps for backward: "gates", or "states" (about a third of the memory, one more GEMM).
    backend: see seqcells.backends; None is the context's, else "auto".
    precision: of float32 recurrent products on the triton backend: "ieee" (float32 itself), "tf32" (operands rounded to
    11 bits), or "tf32x3" (three TF32 products for one of nearly float32's precision; NVIDIA only); None is what
    PyTorch's switches for RNNs say, "tf32" or "ieee". Other dtypes and backends ignore it, as do the large products
    outside the recurrence, which follow PyTorch's switches for matrix products.

    Under autocast all tensors are cast to its dtype, as torch does for its own RNNs. y must not be changed in place
    while backward still needs it; that raises.

    Raises RuntimeError, ValueError or TypeError as torch.nn does for shapes, dtypes and devices that do not fit.
    """
    y, final = run(cell, x, states, w_ih, w_hh, b_ih, b_hh, **options)
    return y, tuple(s[0] for s in final)


def _of_group(
    k: int, x: Tensor, states: tuple[Tensor | None, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, Any, Any]:
    """Group k's input, states and weights."""
    of_k, weights_k = (tuple(None if t is None else t[k] for t in tensors) for tensors in (states, weights))
    return x if x.dim() == 3 else x[:, :, k], of_k, weights_k


def scan_groups(
    cell: str,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: Sequence[bool] = (),
    resets: Tensor | None = None,
    save: str = "gates",
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """K independent scans of one cell, on the triton backend in one launch: y [T, B, K*H], final states [K, B, H].

    The two directions of a layer: x [T, B, I], reverse (False, True); y is then torch.nn's, forward beside backward.
    Heads (a block-diagonal recurrence): x [T, B, K, I]. w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H],
    states [K, B, H]. reverse: for each group, whether it walks from the last step to the first; () is none.
    Other options, and what is raised: as in `scan`.
    """
    if w_hh.dim() != 3 or w_ih.dim() != 3:
        raise RuntimeError(f"w_ih and w_hh must have 3 dimensions, got {w_ih.dim()} and {w_hh.dim()}")
    K, spec = w_hh.shape[0], reference.get(cell)
    given = (None,) * spec.states if states is None else tuple(states)
    if len(given) != spec.states:
        raise RuntimeError(f"{cell} has {spec.states} state{'s' * (spec.states > 1)}, got {len(given)}")
    flags = tuple(reverse) or (False,) * K
    if len(flags) != K:
        raise ValueError(f"reverse must have one value for each of {K} groups, got {len(flags)}")
    weights = (w_ih, w_hh, b_ih, b_hh)
    for name, t in zip(("w_ih", "w_hh", "b_ih", "b_hh", *("states",) * len(given)), (*weights, *given), strict=True):
        if t is not None and t.shape[0] != K:
            raise RuntimeError(f"{name} must have {K} groups, got {t.shape[0]}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != K):
        raise RuntimeError(f"input must have shape (T, B, I) or (T, B, {K}, I), got {tuple(x.shape)}")
    options: dict[str, Any] = {"resets": resets, "save": save, "precision": precision}
    check_precision(precision)
    if cast := _autocast(x, *weights, *given):
        inputs: list[Any] = [cast[0], cast[5:], *cast[1:5]]
        with torch.autocast(x.device.type, enabled=False):
            return scan_groups(cell, *inputs, reverse=flags, backend=backend, **options)
    if save not in SAVES:
        raise ValueError(f"unknown save {save!r}: expected one of {', '.join(SAVES)}")
    for k in range(K):
        mine, of_k, weights_k = _of_group(k, x, given, weights)
        _check(mine, of_k, weights_k, resets, spec.gates)
    chosen = backends.choose(cell, x.device, x.dtype, resets=resets is not None, requested=backend)
    if chosen.backend == "triton" and x.shape[1] > 0:
        precision = _product_precision(precision, x.dtype)
        bits = sum(1 << k for k in range(K) if flags[k])
        how: dict[str, Any] = {
            "cell": cell,
            "save": save,
            "reversed": bits,
            "schedule": chosen.schedule,
            "precision": precision,
        }
        return ops.apply(x, given, *weights, resets, **how)
    outputs, finals = [], []
    for k in range(K):
        mine, of_k, weights_k = _of_group(k, x, given, weights)
        mask = resets
        if flags[k]:
            mine, mask = mine.flip(0), None if mask is None else mask.flip(0)
        y, final = scan(cell, mine, of_k, *weights_k, backend=backend, **options | {"resets": mask})
        outputs.append(y.flip(0) if flags[k] else y)
        finals.append(final)
    return torch.cat(outputs, 2), tuple(torch.stack(s) for s in zip(*finals, strict=True))


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
    """Which backend a scan would use and, for triton, the Plan forward and the one backward; why, in words."""

    backend: str
    plan: Any
    why: str
    backward: Any = None

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}"


def _known_devices() -> tuple[str, ...]:
    """The devices that `explain` knows without having one."""
    return () if ops is None else tuple(ops.KNOWN)


def explain(
    cell: str,
    *,
    batch: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    groups: int = 1,
    resets: bool = False,
    backend: str | None = None,
    precision: str | None = None,
) -> Explanation:
    """What a scan of this shape would run on, without running it.

    device: a torch device, or one that need not be present: a name of kernels.plan.KNOWN, as "sm_90" or "L4".
    groups: of `scan_groups`. precision: as in `scan`. Raises as `scan` does.
    """
    reference.get(cell)
    check_precision(precision)
    for name, size in (("batch", batch), ("hidden_size", hidden_size), ("groups", groups)):
        if size < 1:
            raise ValueError(f"{name} must be greater than zero, got {size}")
    elsewhere = isinstance(device, str) and (device in _known_devices() or device.startswith("sm_"))
    place = torch.device("cuda" if elsewhere else device)
    if place.type == "cuda" and place.index is None and torch.cuda.is_available():
        place = torch.device("cuda", torch.cuda.current_device())
    chosen = backends.choose(cell, place, dtype, resets=resets, requested=backend)
    if chosen.backend != "triton":
        return Explanation(chosen.backend, None, chosen.why)
    from .kernels import cells, plan, scan

    if elsewhere and device not in plan.KNOWN:
        raise ValueError(f"unknown device {device!r}: expected a torch device or one of {', '.join(plan.KNOWN)}")
    facts = plan.KNOWN[str(device)] if elsewhere else scan.device_facts(place)
    options: Any = {"B": batch, "H": hidden_size, "groups": groups, "itemsize": dtype.itemsize, "device": facts}
    options |= {"schedule": chosen.schedule or None, "precision": _product_precision(precision, dtype)}
    there, back = (plan.plan(cells.get(cell), backward=b, **options) for b in (False, True))
    why = f"{chosen.why}; forward, {there.schedule} schedule: {there.why}; backward, {back.schedule}: {back.why}"
    return Explanation("triton", there, why, back)

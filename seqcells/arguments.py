"""Checks of the arguments of functions, layers and cells: first types, then what does not fit together.

All checks are done before anything runs. The values of a tensor are checked only if it is on the CPU, and never while
something traces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import backends, checks
from .cell import Cell
from .precisions import PRECISIONS

SAVES = ("gates", "states")
NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")
FEW = 128  # up to this many values, checking a list is faster than checking a tensor
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def options(backend: str | None, precision: str | None, save: str = "gates", cell: str | None = None) -> None:
    """Check the options of scans and modules. cell: a module's cell, which its backend must support.

    Whether the backend can run on this machine is checked at the call, since a module may be made on another machine.
    """
    checks.one_of("save", save, SAVES)
    if backend is not None:
        name, _ = backends.parse(backend)
        if name == "aten" and cell is not None and cell not in backends.ATEN_CELLS:
            raise backends.no_aten(f"torch has no fused {cell}")
    checks.one_of("precision", precision, PRECISIONS, optional=True)


def readable(*tensors: Tensor) -> bool:
    """Whether the tensors' values can be read without waiting for a device."""
    return all(t.device.type == "cpu" and type(t) is Tensor for t in tensors) and not backends.traced()


def lengths(given: object, shape: Sequence[int], device: torch.device, anywhere: bool = False) -> Tensor | None:
    """lengths as a tensor of integers [B] on that device. anywhere: move a tensor from another device there.

    shape: T, B. ValueError for values outside 0..T, if they can be read (see `readable`).
    """
    if given is None:
        return None
    steps, batch = shape
    found = given if isinstance(given, Tensor) else None
    values = _whole_numbers(given) if found is None else []
    if found is not None:
        checks.tensor("lengths", found)
        if found.dtype not in _INTEGERS:
            raise TypeError(f"lengths must be a tensor of integers [B], got one of {found.dtype}")
    got = [len(values)] if found is None else list(found.shape)
    if got != [batch]:
        raise RuntimeError(f"Expected lengths size {(batch,)}, got {got}")
    if found is not None and found.device != device and (found.is_meta or not anywhere):
        raise RuntimeError(f"lengths must be on the input's device {device}, got {found.device}")
    if found is not None and readable(found):
        values = [int(v) for v in found.aminmax()] if found.numel() else []
    if values and not backends.traced() and (min(values) < 0 or max(values) > steps):
        raise ValueError(f"lengths must be between 0 and {steps}, got {min(values)} to {max(values)}")
    if found is None:
        return torch.tensor(values, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
    return found.to(device, non_blocking=True) if anywhere else found


def _whole_numbers(given: object) -> list[int]:
    """The ints in a sequence that is not a tensor."""
    if isinstance(given, np.ndarray):
        given = given.tolist()
    expected = "a tensor of integers [B] or a list of ints"
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise checks.wrong("lengths", expected, given)
    found = []
    for i, value in enumerate(given):
        try:
            found.append(value if isinstance(value, int) else operator.index(value))
        except TypeError:
            raise checks.wrong(f"lengths[{i}]", "an int", value) from None
        if isinstance(value, bool):
            raise checks.wrong(f"lengths[{i}]", "an int", value)
    return found


def resets(given: object, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """resets as a bool tensor of that shape on that device; None is allowed.

    Accepts bool tensors, tensors of other real dtypes that hold 0 and 1, and nested lists or arrays of such numbers,
    which are moved to the device. ValueError for other values, if they can be read (see `readable`).
    """
    if given is None:
        return None
    if isinstance(given, PackedSequence):
        raise TypeError("resets must be a tensor where the input is one, got a PackedSequence")
    found = given if isinstance(given, Tensor) else _listed(given)
    checks.tensor("resets", found)
    if found.is_complex():
        raise TypeError(f"resets must be {_FLAGS}, got a tensor of {found.dtype}")
    if list(found.shape) != list(shape):
        raise RuntimeError(f"Expected resets size {tuple(shape)}, got {list(found.shape)}")
    if isinstance(given, Tensor) and found.device != device:
        raise RuntimeError(f"resets must be on the input's device {device}, got {found.device}")
    if found.dtype != torch.bool:
        flags = found.bool()
        if readable(found) and (other := found[flags != found].tolist()):
            raise ValueError(f"resets must be {_FLAGS}, got a value of {other[0]}")
        found = flags
    return found if isinstance(given, Tensor) else found.to(device, non_blocking=True)


_FLAGS = "a tensor or nested list of bools, or of the numbers 0 and 1"


def _listed(given: object) -> Tensor:
    """resets that are no tensor."""
    if not isinstance(given, (list, tuple, np.ndarray)):
        raise checks.wrong("resets", _FLAGS, given)
    try:
        array = np.asarray(given)
    except ValueError:  # rows of several lengths
        raise ValueError(f"resets must be {_FLAGS}, with rows of one length") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"resets must be {_FLAGS}, got {checks.kind(given)} that makes an array of {array.dtype}")
    return torch.from_numpy(array.astype(np.float64) if array.dtype.kind != "b" else array.copy())


# Functions


def types(
    x: Tensor, states: object, weights: Mapping[str, object], rank: int | None = 3, missing: Sequence[str] = ()
) -> None:
    """Check the types of x, states and weights (by name) of a scan, and the rank of x if one is given.

    missing: the weights that the cell lacks."""
    checks.tensor("x", x)
    if rank is not None and x.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {x.dim()}")
    if states is not None:
        checks.tensors("states", states, "a tuple of tensors or None", optional=True)
    for name, weight in weights.items():
        checks.tensor(name, weight, optional=name.startswith("b_") or name in missing)


def fit(
    x: Tensor,
    states: Sequence[Tensor | None],
    groups: Sequence[Sequence[Tensor | None]],
    rows: Sequence[int],
) -> None:
    """Check shapes, dtypes and devices. Raises torch.nn's errors, with its messages where it has them.

    x [T, B, I] or [T, B, K, I]; states [K, B, .] or [B, .]; groups: each group's w_ih, w_hh, b_ih, b_hh (and w_hr).
    rows: the number of rows of these four, in units of H.
    """
    for k, weights in enumerate(groups):
        own = [s[k] if s is not None and s.dim() == 3 else s for s in states]
        _fit_group(x if x.dim() == 3 else x[:, :, k], own, weights, rows)


def _fit_group(
    x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor | None], rows: Sequence[int]
) -> None:
    inner, outer = _fit_weights(weights, rows)
    w_ih = weights[0]
    assert w_ih is not None
    if x.dtype != w_ih.dtype:
        raise ValueError(dtypes_differ(x.dtype, w_ih.dtype))
    if not x.is_floating_point():
        raise TypeError(f"input must be of a floating point dtype, got {x.dtype}")
    if x.shape[2] != w_ih.shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {x.shape[2]}")
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    together(x, states, weights)
    for i, s in enumerate(states):
        expected = (x.shape[1], inner if i else outer)
        if s is not None and s.shape != expected and (inner or s.dim() != 2 or s.shape[0] != expected[0]):
            raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(s.shape)}")


def hidden_size(
    cell: Cell,
    weights: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    params: Sequence[Mapping[str, Tensor] | None] | None,
    inputs: Mapping[str, object] | None,
) -> int:
    """H, from w_ih, or, for a cell that reads no x, from the first tensor that has a size of H."""
    if cell.rows[0]:
        assert weights[0] is not None
        return weights[0].shape[0] // cell.rows[0]
    vectors = [t for n, t in ((params or ({},))[0] or {}).items() if n not in cell.scalars]
    wide = [t for t in (inputs or {}).values() if isinstance(t, Tensor) and t.dim() == 3]
    known = next((t for t in (weights[1], *states, *vectors, *wide) if t is not None), None)
    if known is None:
        raise ValueError(f"states must be given: nothing else says what the hidden size of {cell.name} is")
    return known.shape[-1]


def _fit_weights(weights: Sequence[Tensor | None], rows: Sequence[int]) -> tuple[int, int]:
    """H and the size of h, from the weights. RuntimeError if the weights' shapes contradict one another."""
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    of_x, of_u, *of_biases = rows
    if w_ih is None or (w_hh is None and of_u):
        raise checks.wrong("w_ih and w_hh", "tensors", None)
    if w_hh is None:
        outer = inner = w_ih.shape[0] // of_x if w_ih.dim() and of_x else 0
    else:
        if not of_u:
            raise RuntimeError(f"w_hh must be None: the cell has no recurrent product, got {list(w_hh.shape)}")
        outer = inner = w_hh.shape[-1] if w_hh.dim() else 0
        if projection and projection[0] is not None:
            outer, inner = projection[0].shape
        if w_hh.dim() != 2 or w_hh.shape != (of_u * inner, outer) or inner == 0:
            raise RuntimeError(
                f"w_hh must have shape ({of_u}*H, {'P' if projection else 'H'}), got {tuple(w_hh.shape)}"
            )
    if w_ih.dim() != 2 or w_ih.shape[0] != of_x * inner or (inner == 0 and of_x):
        known = of_x * inner if of_u else f"{of_x}*H"
        raise RuntimeError(f"w_ih must have shape ({known}, input_size), got {tuple(w_ih.shape)}")
    for name, b, n in zip(("b_ih", "b_hh"), (b_ih, b_hh), of_biases, strict=True):
        if b is not None and b.shape != (n * inner,):
            raise RuntimeError(f"{name} must have shape ({n * inner},), got {tuple(b.shape)}")
    return inner, outer


def together(x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor | None], dtypes: bool = True) -> None:
    """RuntimeError unless all tensors are on one device and, if dtypes, of one dtype."""
    for kind, tensors in (("hidden", states), ("parameter", weights)):
        for t in tensors:
            if t is not None and t.device != x.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {x.device} "
                    f"and {kind} tensor at {t.device}"
                )
            if dtypes and t is not None and t.dtype != x.dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with {x.dtype} "
                    f"and {kind} tensor with {t.dtype}"
                )


def dtypes_differ(x: torch.dtype, weight: torch.dtype) -> str:
    return (
        f"RNN input dtype ({x}) does not match weight dtype ({weight}). "
        f"Convert input: input.to({weight}), or convert model: model.to({x})"
    )


# The functions of `reference`

States = tuple[Tensor, ...]
_Weights = Sequence["Tensor | None"]
Step = Callable[..., States]  # (x, states, w_ih, w_hh, b_ih, b_hh), and params and inputs, if there are any


def explained(cell: Cell, step: Step, doc: str) -> Step:
    """A cell's step that, if it fails, raises an error saying which argument is wrong.

    Arguments are checked only after a failure, because a check before each step would take as long as a small step.
    """

    def call(
        x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> States:
        try:
            return step(x, states, w_ih, w_hh, b_ih, b_hh)
        except checks.FAILURES as error:
            raise checks.clearer(error, _reference_step, cell, x, states, w_ih, w_hh, b_ih, b_hh) from None

    call.__name__ = call.__qualname__ = f"{cell.key}_cell"
    call.__module__, call.__doc__ = step.__module__, doc
    vars(call).update(vars(step))
    return call


def _reference_step(cell: Cell, x: Tensor, states: Sequence[Tensor], *weights: Tensor | None) -> None:
    count = len(cell.states)
    checks.tensors("states", states, f"a tuple of {count} tensor{'s' * (count > 1)}", count)
    types(x, None, dict(zip(NAMES, weights, strict=True)), rank=None)
    if x.dim() not in (1, 2):
        raise RuntimeError(f"x must have 1 or 2 dimensions, got {x.dim()}")
    if x.dim() == 1:
        x, states = x[None], [s[None] for s in states]
    fit(x[None], states, [weights], cell.rows)


def _reference_types(step: object, x: Tensor, states: object, weights: _Weights, rank: int | None) -> None:
    if not callable(step) or isinstance(step, (type, BuiltinFunctionType)):
        raise checks.wrong("step", "a function", step)
    missing = [name for name, n in zip(NAMES, _rows(step, weights), strict=True) if not n]
    types(x, None, dict(zip(NAMES, weights, strict=True)), rank, missing)
    checks.tensors("states", states, "a tuple of tensors")


def _rows(step: object, weights: _Weights) -> tuple[int, ...]:
    """The number of blocks of H rows of each weight: the step's `rows`, or, if it has no such attribute, as in w_hh."""
    if (rows := getattr(step, "rows", None)) is not None:
        return rows
    w_hh = weights[1]
    blocks = w_hh.shape[0] // H if isinstance(w_hh, Tensor) and w_hh.dim() and (H := w_hh.shape[-1]) else 1
    return (blocks,) * 4


def reference_scan(
    step: object,
    x: Tensor,
    states: Sequence[Tensor],
    weights: _Weights,
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    reverse: bool,
) -> None:
    """Check the arguments of reference.scan_states except resets and lengths."""
    _reference_types(step, x, states, weights, rank=3)
    checks.boolean("reverse", reverse)
    fit(x, states, [weights], _rows(step, weights))
    shape, H = x.shape[:2], states[0].shape[-1]
    for name, given, expected in (("params", params, (H,)), ("inputs", inputs, (*shape, H))):
        checks.tensors(name, given, "a tuple of tensors")
        for i, t in enumerate(given):
            if t.shape != expected and (name != "params" or t.shape != (1,)):
                raise RuntimeError(f"{name}[{i}] must have shape {tuple(expected)}, got {tuple(t.shape)}")


def reference_groups(step: object, x: Tensor, states: Sequence[Tensor], weights: _Weights, reversed: int) -> None:
    """Check the arguments of reference.scan_groups that each group's scan does not check."""
    _reference_types(step, x, states, weights, rank=None)
    checks.integer("reversed", reversed, least=0)
    name, of = ("w_ih", weights[0]) if weights[1] is None else ("w_hh", weights[1])
    assert of is not None
    if of.dim() not in (2, 3):
        raise RuntimeError(f"{name} must have 2 or 3 dimensions, got {of.dim()}")
    K, H = of.shape[0] if of.dim() == 3 else 1, states[0].shape[-1] if states else 0
    for other, t in zip(NAMES, weights, strict=True):
        rank = of.dim() - other.startswith("b_")
        if t is not None and (t.dim() != rank or (of.dim() == 3 and t.shape[0] != K)):
            raise RuntimeError(f"{other} must have {rank} dimensions, as {name} has {of.dim()}, got {list(t.shape)}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != K):
        raise RuntimeError(f"x must have shape (T, B, I) or (T, B, {K}, I), got {tuple(x.shape)}")
    expected = (K, x.shape[1], H)
    for i, s in enumerate(states):
        if s.shape != expected and (K > 1 or s.shape != expected[1:]):
            raise RuntimeError(f"states[{i}] must have shape {expected}, got {tuple(s.shape)}")

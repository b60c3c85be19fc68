"""What a call of a function, a layer or a cell must be given: types first, then what does not fit together.

All of it is said before anything runs. The values of a tensor are looked at only where the host has them, and never
while something traces.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import backends, checks, precisions

SAVES = ("gates", "states")
FEW = 128  # values that are looked at faster in a list than in a tensor
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def options(backend: Any, precision: Any, save: Any = "gates", cell: str | None = None) -> None:
    """The options that scans and modules have. cell: a module's, which its backend must have.

    Whether the backend runs on this machine is asked at the call: a module may be made where it is not to run.
    """
    checks.one_of("save", save, SAVES)
    if backend is not None:
        name, _ = backends.parse(backend)
        if cell is not None:
            backends.refuse(name, cell)
    checks.one_of("precision", precision, precisions.PRECISIONS, optional=True)


def readable(*tensors: Tensor) -> bool:
    """Whether the host has their values: to look at a device's would be to wait for it."""
    return all(t.device.type == "cpu" and type(t) is Tensor for t in tensors) and not backends.traced()


def lengths(given: Any, shape: Sequence[int], device: torch.device, anywhere: bool = False) -> Tensor | None:
    """lengths as a tensor of integers [B] on that device. anywhere: one on another device is brought there.

    shape: T, B. ValueError for values beyond 0..T, if the host has them.
    """
    if given is None:
        return None
    steps, batch = shape
    listed = not isinstance(given, Tensor)
    values = _whole_numbers(given) if listed else []
    if not listed:
        checks.tensor("lengths", given)
        if given.dtype not in _INTEGERS:
            raise TypeError(f"lengths must be a tensor of integers [B], got one of {given.dtype}")
    got = [len(values)] if listed else list(given.shape)
    if got != [batch]:
        raise RuntimeError(f"Expected lengths size {(batch,)}, got {got}")
    if not listed and given.device != device and (given.is_meta or not anywhere):
        raise RuntimeError(f"lengths must be on the input's device {device}, got {given.device}")
    if not listed and readable(given):
        values = [int(v) for v in given.aminmax()] if given.numel() else []
    if values and not backends.traced() and (min(values) < 0 or max(values) > steps):
        raise ValueError(f"lengths must be between 0 and {steps}, got {min(values)} to {max(values)}")
    found = torch.tensor(values, dtype=torch.int64, device="cpu") if listed else given
    return found.to(device, non_blocking=True) if listed or anywhere else found


def _whole_numbers(given: Any) -> list[int]:
    """The ints in a sequence that is no tensor."""
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


def resets(given: Any, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """resets as a bool tensor of that shape on that device. None is fine.

    Taken are bool tensors, those of another real dtype that hold 0 and 1, and nested lists or arrays of such numbers,
    which are brought to the device. ValueError for other values, if the host has them.
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


def _listed(given: Any) -> Tensor:
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


def types(x: Any, states: Any, weights: dict[str, Any], rank: int | None = 3, products: bool = True) -> None:
    """x, states and weights (by name) of a scan: tensors where they must be, x of that rank if one is given.

    products: whether the cell has recurrent products, and so w_hh."""
    checks.tensor("x", x)
    if rank is not None and x.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {x.dim()}")
    if states is not None:
        checks.tensors("states", states, "a tuple of tensors or None", optional=True)
    for name, weight in weights.items():
        checks.tensor(name, weight, optional=name.startswith("b_") or (name == "w_hh" and not products))


def fit(
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    rows: Sequence[int],
) -> tuple[int, int]:
    """Raise what torch.nn raises, in its words where it has some, where shapes, dtypes and devices do not fit.

    x [T, B, I]; states [B, .]; weights: w_ih, w_hh, b_ih, b_hh (and w_hr). rows: of the four in units of H.
    Gives H and the size of h.
    """
    inner, outer = _fit_weights(weights, rows)
    w_ih = weights[0]
    assert w_ih is not None
    if x.dtype != w_ih.dtype:
        raise ValueError(_dtypes(x.dtype, w_ih.dtype))
    if not x.is_floating_point():
        raise TypeError(f"input must be of a floating point dtype, got {x.dtype}")
    if x.shape[2] != w_ih.shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {x.shape[2]}")
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    together(x, states, weights)
    for i, s in enumerate(states):
        expected = (x.shape[1], inner if i else outer)
        if s is not None and s.shape != expected:
            raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(s.shape)}")
    return inner, outer


def _fit_weights(weights: Sequence[Tensor | None], rows: Sequence[int]) -> tuple[int, int]:
    """H and the size of h, by the weights; RuntimeError where those do not fit one another."""
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    of_x, of_u, *of_biases = rows
    if w_ih is None or (w_hh is None and of_u):
        raise checks.wrong("w_ih and w_hh", "tensors", None)
    if w_hh is None:
        outer = inner = w_ih.shape[0] // of_x if w_ih.dim() else 0
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
    if w_ih.dim() != 2 or w_ih.shape[0] != of_x * inner or inner == 0:
        known = of_x * inner if of_u else f"{of_x}*H"
        raise RuntimeError(f"w_ih must have shape ({known}, input_size), got {tuple(w_ih.shape)}")
    for name, b, n in zip(("b_ih", "b_hh"), (b_ih, b_hh), of_biases, strict=True):
        if b is not None and b.shape != (n * inner,):
            raise RuntimeError(f"{name} must have shape ({n * inner},), got {tuple(b.shape)}")
    return inner, outer


def together(x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor | None], dtypes: bool = True) -> None:
    """RuntimeError where they are not on one device, or, if dtypes, not of one dtype."""
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


def _dtypes(x: torch.dtype, weight: torch.dtype) -> str:
    return (
        f"RNN input dtype ({x}) does not match weight dtype ({weight}). "
        f"Convert input: input.to({weight}), or convert model: model.to({x})"
    )


# Layers


def layer(
    module: Any, layers: Sequence[Sequence[Any]], input: Any, hx: Any, resets_: Any, lengths_: Any, cells: Any
) -> tuple[Tensor | PackedSequence | None, Tensor | None]:
    """A layers._Layer's call. layers: the weights of each of its layers' directions. Its resets and lengths as tensors,
    resets packed if they came packed."""
    checks.boolean("return_cell_states", cells)
    found: Any = None
    if isinstance(input, PackedSequence):
        states, masked = _packed(module, layers, input, hx, resets_, lengths_)
        input = input.data
    else:
        states, masked, found = _padded(module, layers, input, hx, resets_, lengths_)
    if isinstance(hx, Tensor) and module.cell == "lstm":
        raise checks.wrong("hx", _PAIR, hx)
    if module.cell == "lstm" and hx is not None and len(hx) > 2:
        raise RuntimeError("lstm expects two hidden states")
    if not input.is_floating_point():
        raise TypeError(f"input must be of a floating point dtype, got {input.dtype}")
    if not torch._C._is_any_autocast_enabled():
        together(input, states, [t for directions in layers for weights in directions for t in weights])
    return masked, found


_PAIR = "a tuple of two tensors (h_0, c_0) or None"


def _padded(
    module: Any, layers: Sequence[Any], input: Any, hx: Any, resets_: Any, lengths_: Any
) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
    """Of an input that is not packed. The states in hx, resets and lengths."""
    checks.tensor("input", input, expected="a tensor or a PackedSequence")
    kind, rank = type(module).__name__, input.dim()
    if rank not in (2, 3):
        tensor = " tensor" if kind == "RNN" else ""
        raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {rank}D{tensor} instead")
    states = _hidden(module.cell == "lstm", hx, rank)
    masked = resets(resets_, input.shape[:-1], input.device)
    if rank == 2:
        steps, batch = input.shape[0], 1
        states = [s[:, None] for s in states]
        if lengths_ is not None:
            raise ValueError("lengths cannot be given for unbatched 2-D input")
    else:
        steps, batch = input.shape[1::-1] if module.batch_first else input.shape[:2]
    found = lengths(lengths_, (steps, batch), input.device, anywhere=True)
    _fit_module(module, layers[0][0], input, states, batch)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return states, masked, found


def _hidden(two: bool, hx: Any, rank: int | None) -> Sequence[Tensor]:
    """The states in hx: one tensor, or two; of that rank, if one is given."""
    if hx is None:
        return ()
    shape = "batched 3-D" if rank == 3 else "unbatched 2-D"
    if not two:
        checks.tensor("hx", hx, expected="a tensor or None")
        if rank is not None and hx.dim() != rank:
            raise RuntimeError(f"For {shape} input, hx should also be {rank}-D but got {hx.dim()}-D tensor")
        return (hx,)
    # torch.nn takes a tensor's rows until it looks at the type; so says what it says of their ranks and sizes.
    parts = hx if isinstance(hx, (tuple, list)) or (isinstance(hx, Tensor) and hx.dim()) else ()
    if len(parts) < 2:
        raise checks.wrong("hx", _PAIR, hx)
    checks.tensor("hx[0]", parts[0])
    checks.tensor("hx[1]", parts[1])
    if rank is not None and (parts[0].dim() != rank or parts[1].dim() != rank):
        got = f"({parts[0].dim()}-D, {parts[1].dim()}-D) tensors"
        raise RuntimeError(f"For {shape} input, hx and cx should also be {rank}-D but got {got}")
    return parts[0], parts[1]


def _fit_module(
    module: Any,
    weights: Sequence[Any],
    x: Tensor,
    states: Sequence[Tensor],
    batch: int,
    rank: int | None = None,
    more: bool = False,
) -> None:
    """What torch.nn checks before it runs. x [..., I], of that rank if one is given.

    states [layers * directions, B, .], or of more sequences, if `more`.
    """
    dtype = weights[0].dtype
    if x.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(_dtypes(x.dtype, dtype))
    if rank is not None and x.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {x.dim()}")
    if x.shape[-1] != module.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {module.input_size}, got {x.shape[-1]}"
        )
    rows = module.num_layers * (2 if module.bidirectional else 1)
    for i, s in enumerate(states):
        expected = (rows, batch, module.hidden_size if i else module.proj_size or module.hidden_size)
        shape = list(s.shape)
        if more and s.dim() > 1:
            shape[1] = min(shape[1], batch)
        if tuple(shape) != expected:
            name = f"hidden[{i}]" if module.cell == "lstm" else "hidden"
            raise RuntimeError(f"Expected {name} size {expected}, got {shape}")


# Packed sequences


def _packed(
    module: Any, layers: Sequence[Any], input: PackedSequence, hx: Any, resets_: Any, lengths_: Any
) -> tuple[Sequence[Tensor], Tensor | PackedSequence | None]:
    """Of a packed input. The states in hx, and resets."""
    if lengths_ is not None:
        raise ValueError("lengths cannot be given with a PackedSequence, which has its own")
    packed("input", input)
    data, batch_sizes, order, _ = input
    states = _hidden(module.cell == "lstm", hx, None)
    batch = packed_batch(input, states)
    # Of states that are put in order, as in torch.nn, there may be more.
    _fit_module(module, layers[0][0], data, states, batch, rank=2, more=order is not None)
    _rows("input", input)
    if isinstance(resets_, PackedSequence):
        packed("resets", resets_)
        _rows("resets", resets_)
        _same_order(input, resets_)
        flags: Any = resets(resets_.data, data.shape[:1], data.device)
        return states, resets_._replace(data=flags)
    steps = batch_sizes.shape[0]
    return states, resets(resets_, (batch, steps) if module.batch_first else (steps, batch), data.device)


def packed_batch(input: PackedSequence, states: Sequence[Tensor]) -> int:
    """The sequences in a PackedSequence."""
    if input.sorted_indices is not None:
        return input.sorted_indices.shape[0]
    if torch.compiler.is_compiling() and len(states) and states[0].dim() == 3:
        return states[0].shape[1]  # without a value that a compiler could not know
    return int(input.batch_sizes[0])


def well_packed(given: PackedSequence) -> bool:
    """Whether a PackedSequence on the CPU is as torch makes it. What is not, `packed` and `_rows` say, more slowly."""
    data, sizes, order, back = given
    for t in (sizes, order, back):
        if t is not None and (type(t) is not Tensor or t.dtype is not torch.int64 or t.dim() != 1 or not t.is_cpu):
            return False
    values = sizes.tolist()
    if not values or values[-1] < 1 or values != sorted(values, reverse=True) or sum(values) != data.shape[0]:
        return False
    if order is None or back is None:
        return order is back
    there, again, each = order.tolist(), back.tolist(), list(range(values[0]))
    return len(there) == len(each) and sorted(again) == each and [there[i] for i in again] == each


def packed(name: str, given: PackedSequence) -> None:
    """A PackedSequence that somebody may have made by hand."""
    data, sizes, order, back = given
    checks.tensor(f"{name}.data", data)
    checks.tensor(f"{name}.batch_sizes", sizes)
    if sizes.dtype != torch.int64 or sizes.dim() != 1 or sizes.device.type != "cpu":
        got = f"one of {sizes.dtype} with {sizes.dim()} dimensions on {sizes.device}"
        raise RuntimeError(f"{name}.batch_sizes must be a tensor of int64 [T] on the CPU, got {got}")
    if sizes.shape[0] == 0:
        raise RuntimeError(f"Expected sequence length to be larger than 0 in RNN, got {name}.batch_sizes without any")
    values = sizes.tolist() if readable(sizes) else None
    if values is not None and (values[-1] < 1 or values != sorted(values, reverse=True)):
        raise RuntimeError(f"{name}.batch_sizes must be greater than zero and never grow, got {_few(values)}")
    _packed_indices(name, order, back, None if values is None else values[0], data.device)


def _rows(name: str, given: PackedSequence) -> None:
    """RuntimeError where a PackedSequence has not the rows that its batch_sizes say."""
    count = given.data.shape[0] if given.data.dim() else 0
    if readable(given.batch_sizes) and (expected := sum(given.batch_sizes.tolist())) != count:
        raise RuntimeError(f"{name}.data must have the {expected} rows of {name}.batch_sizes, got {count}")


def _packed_indices(name: str, order: Any, back: Any, batch: int | None, device: torch.device) -> None:
    """sorted_indices and unsorted_indices: none, or a permutation and its inverse."""
    if order is None and back is None:
        return
    for field, of in (("sorted_indices", order), ("unsorted_indices", back)):
        checks.tensor(f"{name}.{field}", of, expected="a tensor, as the other one is,")
        if of.dtype not in (torch.int64, torch.int32) or of.dim() != 1 or (batch is not None and len(of) != batch):
            size = "B" if batch is None else batch
            got = f"one of {of.dtype} {list(of.shape)}"
            raise RuntimeError(f"{name}.{field} must be a tensor of int64 [{size}], got {got}")
        if of.device != device:
            raise RuntimeError(f"{name}.{field} must be on the device of {name}.data, {device}, got {of.device}")
    if not readable(order, back):
        return
    there, again = order.tolist(), back.tolist()
    each = list(range(len(there)))
    if sorted(there) != each:
        raise ValueError(f"{name}.sorted_indices must be a permutation of the sequences, got {_few(there)}")
    if sorted(again) != each or [there[i] for i in again] != each:
        raise ValueError(f"{name}.unsorted_indices must undo {name}.sorted_indices, got {_few(again)}")


def _same_order(input: PackedSequence, resets_: PackedSequence) -> None:
    """RuntimeError where packed resets are not packed as the input is."""
    if backends.traced():
        return
    if not torch.equal(resets_.batch_sizes, input.batch_sizes):
        raise RuntimeError("resets must have the input's batch_sizes")
    ours, theirs = resets_.sorted_indices, input.sorted_indices
    if ours is theirs:
        return
    same = (torch.arange(len(a), device=a.device) for a in (ours, theirs) if a is not None)
    ours, theirs = (next(same) if a is None else a for a in (ours, theirs))
    if ours.device != theirs.device or not torch.equal(ours, theirs):
        raise RuntimeError("resets must be in the input's order: their sorted_indices differ")


def _few(values: list[int]) -> str:
    """A list in a message, cut short."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


# Cells


def step(module: Any, weights: dict[str, tuple[int, ...]], input: Any, states: Sequence[Any] | None) -> None:
    """A cells._Cell's call: what it does not ask at each step, since only a failure makes it worth asking.

    weights: the shapes of the parameters, by name. Other shapes are the cell's own to check.
    """
    checks.tensor("input", input)
    for i, s in enumerate(states or ()):
        checks.tensor(f"hx[{i}]" if module.cell == "lstm" else "hx", s)
    parameters = [checks.parameter(module, name, shape) for name, shape in weights.items()]
    together(input, states or (), parameters, dtypes=False)
    for name, t in zip(weights, parameters, strict=True):
        if t.dtype != parameters[0].dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"{name} must be of the dtype of weight_ih, {parameters[0].dtype}, got {t.dtype}")

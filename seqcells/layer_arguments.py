"""Checks of the arguments of layers and cells, with torch.nn's messages where it has them; see `arguments`."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import backends, checks
from .arguments import FEW, dtypes_differ, lengths, readable, resets, together
from .engines import operators

if TYPE_CHECKING:
    from .cell_modules import RecurrentCell
    from .recurrent import Recurrent

State = Tensor | tuple[Tensor, ...] | None  # in the form of forward's argument
Flags = Tensor | PackedSequence | None
Input = Tensor | PackedSequence
Inputs = Mapping[str, Input]
Plain = tuple[list[Tensor], bool, tuple[int, int]]
Call = tuple[Input, State, object, object, bool, Inputs]  # see `layer`


def plain(module: Recurrent, x: Input, states: object, resets_: object) -> Plain | None:
    """A quick check of a Recurrent's call: its parameters, whether a tensor of the call requires gradients, and T, B.

    Returns None unless the call is quickly seen to be valid and all tensors are exactly torch.Tensor; then `layer` must
    check it. states: a tuple, or None. Resets pass the quick check only for one step.
    """
    data = x.data if type(x) is PackedSequence else x
    if type(data) is not Tensor or data.layout is not torch.strided or data.is_nested or torch.compiler.is_compiling():
        return None
    dtype, device, H, on_cpu, shape = data.dtype, data.device, module.hidden_size, data.is_cpu, data.shape
    if type(x) is PackedSequence:
        if len(shape) != 2 or not on_cpu or resets_ is not None or not (B := _well_packed(x)):
            return None
        T = len(x.batch_sizes)
    else:
        if len(shape) != 3 or 0 in shape or data.is_meta:
            return None
        T, B = shape[1::-1] if module.batch_first else shape[:2]
        if resets_ is not None and (T != 1 or not _plain_flags(resets_, shape[:2], device)):
            return None
    if shape[-1] != module.input_size or not dtype.is_floating_point:
        return None
    found: list[Tensor] = []
    own, grad = module._parameters, data.requires_grad
    for names in module._all_weights:
        for name in names:
            if (w := own.get(name)) is None:
                return None
            found.append(w)
            grad = grad or w.requires_grad
    if found[0].dtype is not dtype:
        return None
    if states is None:
        return found, grad, (T, B)
    if type(states) is not tuple or len(states) != len(module.cell.states):
        return None
    expected = (len(module._all_weights), B, module.proj_size or H)
    for s in states:
        if type(s) is not Tensor or s.shape != expected or s.dtype is not dtype or s.device != device:
            return None
        expected, grad = (*expected[:2], H), grad or s.requires_grad
    return found, grad, (T, B)


def plain_weights(module: Recurrent, weights: Sequence[Tensor], x: Tensor, parts: int | None = None) -> bool:
    """Whether the parameters are as they should be: torch.Tensor itself, of their shapes, of x's dtype and device.

    parts: of each direction only so many are looked at.
    """
    dtype, device, on_cpu, n = x.dtype, x.device, x.is_cpu, 0
    for shapes in module._all_shapes:
        for expected in shapes[:parts]:
            w = weights[n]
            n += 1
            if w.shape != expected or w.dtype is not dtype or type(w) not in _TENSORS:
                return False
            if not (w.is_cpu if on_cpu else w.device == device) or w.layout is not torch.strided:
                return False
        n += 0 if parts is None else len(shapes) - parts
    return True


_TENSORS = (Tensor, torch.nn.Parameter)


def _plain_flags(resets_: object, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether resets are quickly seen to be valid: bools, or a few numbers on the CPU whose values are yet to check."""
    if type(resets_) is not Tensor or resets_.shape != shape or resets_.device != device:
        return False
    few = resets_.is_cpu and resets_.numel() <= FEW and resets_.layout is torch.strided and not resets_.is_complex()
    return resets_.dtype is torch.bool or few


def layer(module: Recurrent, weights: Sequence[Tensor], call: Call) -> tuple[Flags, Tensor | None]:
    """Check a Recurrent's call: x, state, resets, lengths, return_states, inputs by name. weights: its parameters.

    Returns resets and lengths as tensors, resets packed if they were given packed.
    """
    x, state, resets_, lengths_, states, inputs = call
    checks.boolean("return_cell_states" if _as_torch(module) else "return_states", states)
    found: Tensor | None = None
    masked: Flags
    if isinstance(x, PackedSequence):
        given, masked = _packed(module, weights[0], x, state, resets_, lengths_)
        steps, batch = len(x.batch_sizes), packed_batch(x, given)
        more = _inputs(module, inputs, x, (batch, steps) if module.batch_first else (steps, batch))
        x = x.data
    else:
        given, masked, found = _padded(module, weights[0], x, state, resets_, lengths_)
        more = _inputs(module, inputs, x)
    if len(module.cell.states) > 1 and _as_torch(module):
        if isinstance(state, Tensor):
            raise checks.wrong("hx", _PAIR, state)
        if state is not None and len(state) > 2:
            raise RuntimeError("lstm expects two hidden states")
    if not x.is_floating_point():
        raise TypeError(f"input must be of a floating point dtype, got {x.dtype}")
    if not torch._C._is_any_autocast_enabled():
        together(x, given, weights)
    for name, t in more.items():
        if t.device != x.device or (t.dtype != x.dtype and not torch._C._is_any_autocast_enabled()):
            raise RuntimeError(f"{name} must be {x.dtype} on {x.device}, as x is, got {t.dtype} on {t.device}")
    return masked, found


def _as_torch(module: Recurrent | RecurrentCell) -> bool:
    """Whether the module has torch.nn's argument names, and so its error messages."""
    return bool(module._hx == "hx")


_PAIR = "a tuple of two tensors (h_0, c_0) or None"


def _padded(
    module: Recurrent, first: Tensor, x: Tensor, state: State, resets_: object, lengths_: object
) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
    """Check a call whose input is not packed. Returns the states, resets and lengths."""
    checks.tensor("input" if _as_torch(module) else "x", x, expected="a tensor or a PackedSequence")
    kind, rank = type(module).__name__, x.dim()
    if rank not in (2, 3):
        tensor = " tensor" if kind == "RNN" else ""
        raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {rank}D{tensor} instead")
    states = _hidden(module, state, rank)
    masked = resets(resets_, x.shape[:-1], x.device)
    if rank == 2:
        steps, batch = x.shape[0], 1
        states = [s[:, None] for s in states]
        if lengths_ is not None:
            raise ValueError("lengths cannot be given for unbatched 2-D input")
    else:
        steps, batch = x.shape[1::-1] if module.batch_first else x.shape[:2]
    found = lengths(lengths_, (steps, batch), x.device, anywhere=True)
    _fit_module(module, first, x, states, batch)
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return states, masked, found


def _hidden(module: Recurrent, given: State, rank: int | None) -> Sequence[Tensor]:
    """The states in the argument hx or state: one tensor, or several. rank: the expected rank; None: any."""
    if given is None:
        return ()
    name, names = module._hx, module.cell.states
    shape = "batched 3-D" if rank == 3 else "unbatched 2-D"
    if len(names) == 1:
        checks.tensor(name, given, expected="a tensor or None")
        assert isinstance(given, Tensor)
        if rank is not None and given.dim() != rank:
            raise RuntimeError(f"For {shape} input, {name} should also be {rank}-D but got {given.dim()}-D tensor")
        return (given,)
    if _as_torch(module):
        # torch.nn unpacks a tensor into its rows before it checks the type, so its errors are about ranks and sizes.
        parts = given if isinstance(given, (tuple, list)) or (isinstance(given, Tensor) and given.dim()) else ()
        expected, called = _PAIR, "hx and cx"
        fits = len(parts) >= 2
    else:
        parts, fits = given, isinstance(given, (tuple, list)) and len(given) == len(names)
        expected, called = f"a tuple of {len(names)} tensors ({', '.join(names)}) or None", "each state"
    if not fits:
        raise checks.wrong(name, expected, given)
    found = tuple(parts[i] for i in range(len(names)))
    for i, s in enumerate(found):
        checks.tensor(f"{name}[{i}]", s)
    if rank is not None and any(s.dim() != rank for s in found):
        got = f"({', '.join(f'{s.dim()}-D' for s in found)}) tensors"
        raise RuntimeError(f"For {shape} input, {called} should also be {rank}-D but got {got}")
    return found


def _fit_module(
    module: Recurrent,
    weight: Tensor,
    x: Tensor,
    states: Sequence[Tensor],
    batch: int,
    rank: int | None = None,
    more: bool = False,
) -> None:
    """The checks of torch.nn before it runs. x [..., I], of that rank if one is given.

    states [layers * directions, B, .]; if `more`, the states may be of more sequences.
    """
    dtype = weight.dtype
    if x.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(dtypes_differ(x.dtype, dtype))
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
            name = "hidden" if _as_torch(module) else "state"
            name += f"[{i}]" if len(module.cell.states) > 1 else ""
            raise RuntimeError(f"Expected {name} size {expected}, got {shape}")


def named(what: str, given: Mapping[str, object], names: Sequence[str], cell: str) -> None:
    """TypeError unless the per-step inputs of a call are those of the cell."""
    missing, unknown = [n for n in names if n not in given], [n for n in given if n not in names]
    if missing or unknown:
        takes = f"the per-step inputs {', '.join(names)}" if names else "no per-step inputs"
        wrong_ = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise TypeError(f"this {what} of cell {cell} takes {takes}, by name: {', '.join(wrong_)}")


def _inputs(
    module: Recurrent | RecurrentCell, given: Inputs, x: Tensor | PackedSequence, layout: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Check the shapes of a call's per-step inputs; returns their tensors. layout: T and B of a packed x, as padded."""
    named(type(module).__name__, given, module.cell.inputs, module.cell.name)
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        H, of_x = module.hidden_size, x if isinstance(x, Tensor) else None
        if of_x is not None:
            checks.tensor(name, value)
            assert isinstance(value, Tensor)
            shape, found[name] = tuple(of_x.shape[:-1]), value
        elif isinstance(value, PackedSequence):
            packed(name, value)
            _rows(name, value)
            assert isinstance(x, PackedSequence)
            _same_order(x, value, name)
            shape, found[name] = (x.data.shape[0],), value.data
        else:
            checks.tensor(name, value, expected="a tensor or a PackedSequence")
            shape, found[name] = layout, value
        if tuple(found[name].shape) not in (shape, (*shape, H)):
            raise RuntimeError(f"Expected {name} size {shape} or {(*shape, H)}, got {list(found[name].shape)}")
    return found


# Packed sequences


def _packed(
    module: Recurrent, first: Tensor, x: PackedSequence, state: State, resets_: object, lengths_: object
) -> tuple[Sequence[Tensor], Tensor | PackedSequence | None]:
    """Check a call whose input is packed. Returns the states and resets."""
    if lengths_ is not None:
        raise ValueError("lengths cannot be given with a PackedSequence, which has its own")
    packed("input" if _as_torch(module) else "x", x)
    data, batch_sizes, order, _ = x
    states = _hidden(module, state, None)
    batch = packed_batch(x, states)
    # As in torch.nn, states that are to be sorted may be of more sequences.
    _fit_module(module, first, data, states, batch, rank=2, more=order is not None)
    _rows("input" if _as_torch(module) else "x", x)
    if isinstance(resets_, PackedSequence):
        packed("resets", resets_)
        _rows("resets", resets_)
        _same_order(x, resets_)
        flags = resets(resets_.data, data.shape[:1], data.device)
        assert flags is not None
        return states, resets_._replace(data=flags)
    steps = batch_sizes.shape[0]
    return states, resets(resets_, (batch, steps) if module.batch_first else (steps, batch), data.device)


def packed_batch(input: PackedSequence, states: Sequence[Tensor | None]) -> int:
    """The number of sequences in a PackedSequence."""
    if input.sorted_indices is not None:
        return input.sorted_indices.shape[0]
    given = states[0] if len(states) else None
    if torch.compiler.is_compiling() and given is not None and given.dim() == 3:
        return given.shape[1]  # does not depend on a value that a compiler cannot know
    return int(input.batch_sizes[0])


def _well_packed(given: PackedSequence) -> int:
    """B if a PackedSequence on the CPU is valid, else 0: the slower `packed` and `_rows` say why."""
    data, sizes, order, back = given
    if sizes is None:
        return 0
    for t in (sizes, order, back):
        if t is not None and (type(t) is not Tensor or t.dtype is not torch.int64 or t.dim() != 1 or not t.is_cpu):
            return 0
    values = sizes.tolist()
    if not values or values[-1] < 1 or values != sorted(values, reverse=True) or sum(values) != data.shape[0]:
        return 0
    B: int = values[0]
    if order is None or back is None:
        return B if order is back else 0
    there, again, each = order.tolist(), back.tolist(), list(range(B))
    return B if len(there) == B and sorted(again) == each and [there[i] for i in again] == each else 0


def packed(name: str, given: PackedSequence) -> None:
    """Check a PackedSequence, which may have been made by hand."""
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
    """RuntimeError unless a PackedSequence has the number of rows that its batch_sizes say."""
    count = given.data.shape[0] if given.data.dim() else 0
    if readable(given.batch_sizes) and (expected := sum(given.batch_sizes.tolist())) != count:
        raise RuntimeError(f"{name}.data must have the {expected} rows of {name}.batch_sizes, got {count}")


def _packed_indices(
    name: str, order: Tensor | None, back: Tensor | None, batch: int | None, device: torch.device
) -> None:
    """Check sorted_indices and unsorted_indices: None, or a permutation and its inverse."""
    if order is None and back is None:
        return
    for field, of in (("sorted_indices", order), ("unsorted_indices", back)):
        checks.tensor(f"{name}.{field}", of, expected="a tensor, as the other one is,")
        assert of is not None
        if of.dtype not in (torch.int64, torch.int32) or of.dim() != 1 or (batch is not None and len(of) != batch):
            size = "B" if batch is None else batch
            got = f"one of {of.dtype} {list(of.shape)}"
            raise RuntimeError(f"{name}.{field} must be a tensor of int64 [{size}], got {got}")
        if of.device != device:
            raise RuntimeError(f"{name}.{field} must be on the device of {name}.data, {device}, got {of.device}")
    assert order is not None and back is not None
    if not readable(order, back):
        return
    there, again = order.tolist(), back.tolist()
    each = list(range(len(there)))
    if sorted(there) != each:
        raise ValueError(f"{name}.sorted_indices must be a permutation of the sequences, got {_few(there)}")
    if sorted(again) != each or [there[i] for i in again] != each:
        raise ValueError(f"{name}.unsorted_indices must undo {name}.sorted_indices, got {_few(again)}")


def _same_order(input: PackedSequence, given: PackedSequence, name: str = "resets") -> None:
    """RuntimeError unless packed resets or per-step inputs are packed like the input."""
    if backends.traced():
        return
    if not torch.equal(given.batch_sizes, input.batch_sizes):
        raise RuntimeError(f"{name} must have the input's batch_sizes")
    ours, theirs = given.sorted_indices, input.sorted_indices
    if ours is theirs:
        return
    same = (torch.arange(len(a), device=a.device) for a in (ours, theirs) if a is not None)
    ours, theirs = (next(same) if a is None else a for a in (ours, theirs))
    if ours.device != theirs.device or not torch.equal(ours, theirs):
        raise RuntimeError(f"{name} must be in the input's order: their sorted_indices differ")


def _few(values: list[int]) -> str:
    """A list for a message, shortened."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


# Cells


def step(
    module: RecurrentCell,
    x: Tensor,
    states: Sequence[Tensor] | None,
    inputs: Mapping[str, Tensor],
    weights: dict[str, tuple[int, ...]],
) -> None:
    """Check a RecurrentCell's call, after a failure: checks before each step would cost time.

    weights: the shapes of the parameters, by name. The module checks other shapes itself.
    """
    checks.tensor("input" if _as_torch(module) else "x", x)
    for i, s in enumerate(states or ()):
        checks.tensor(f"{module._hx}[{i}]" if len(module.cell.states) > 1 else module._hx, s)
    more = _inputs(module, inputs, x)
    parameters = [checks.parameter(module, name, shape) for name, shape in weights.items()]
    together(x, (*(states or ()), *more.values()), parameters, dtypes=False)
    first = next(iter(weights))
    for name, t in zip((*weights, *more), (*parameters, *more.values()), strict=True):
        if t.dtype != parameters[0].dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"{name} must be of the dtype of {first}, {parameters[0].dtype}, got {t.dtype}")


# Constructors


def rate(dropout: float) -> float:
    """dropout as a float. Raises as float does, with a message that names dropout."""
    try:
        return float(dropout)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = ValueError if isinstance(error, OverflowError) else type(error)
        raise kind(f"{_DROPOUT}, got {checks.kind(dropout)}") from None


_DROPOUT = "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"


def probability(name: str, given: float) -> float:
    """Check a probability of dropout, and return it as a float."""
    checks.number(name, given)
    if not 0 <= given <= 1:
        raise ValueError(f"{name} must be a probability, from 0 to 1, got {given}")
    return float(given)


def heads(given: int, hidden_size: int, bidirectional: bool) -> int:
    """Check the number of heads, and return it."""
    checks.integer("heads", given, least=1)
    if given > 1 and isinstance(hidden_size, int) and hidden_size % given:
        raise ValueError(f"hidden_size must be divisible by heads, got {hidden_size} and {given}")
    if bidirectional and 2 * given > operators.MOST:
        raise ValueError(f"at most {operators.MOST // 2} heads if bidirectional, got {given}")
    return given


def sizes(given: tuple[int, int, int, bool, bool, float, bool, int], stacklevel: int) -> None:
    """torch.nn's checks, with its messages and in its order. Also checks bidirectional's type, which torch.nn's does
    not until the call.

    given: input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size.
    """
    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size = given
    if not isinstance(dropout, numbers.Number) or not 0 <= dropout <= 1 or isinstance(dropout, bool):
        raise ValueError(_DROPOUT)
    if dropout and isinstance(num_layers, int) and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last "
            "recurrent layer, so non-zero dropout expects "
            f"num_layers greater than 1, but got dropout={dropout} and "
            f"num_layers={num_layers}",
            stacklevel=stacklevel,
        )
    checks.boolean("bias", bias)
    checks.boolean("batch_first", batch_first)
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        checks.integer(name, size, bools=True)
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero")
    checks.integer("num_layers", num_layers)
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if not isinstance(proj_size, float):  # of which torch.nn looks at the value first
        checks.integer("proj_size", proj_size)
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")
    checks.integer("proj_size", proj_size)
    checks.boolean("bidirectional", bidirectional)

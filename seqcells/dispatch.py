"""From a checked call to an engine: what `functional` and the modules share.

Shapes as there: x [T, B, I]; states [B, H]; weights and biases of G*H rows; resets bool [T, B]; lengths int [B].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import (
    arguments,
    aten,
    autograd,
    backends,
    extras,
    fallback,
    flops,
    marked,
    masks,
    ops,
    precisions,
    projection,
    reference,
)
from . import loop as loop  # its engine
from .cell import Cell, get, named


@dataclass(frozen=True)
class How:
    """How a scan is to be done: the options of `scan`, as the modules hand them on.

    reverse: for each group, whether it walks from the last step to the first. cells: the states after each step, too.
    padded: beyond lengths x is zero already, as packing and a layer below leave it.
    one_step: a cell's call, x [1, B, I], for which aten and triton have kernels of their own; from them the final
    states are [B, H].
    fits: whether it is known that shapes, dtypes and devices do.
    """

    resets: Tensor | None = None
    lengths: Tensor | None = None
    reverse: tuple[bool, ...] = (False,)
    save: str = "gates"
    backend: str | None = None
    precision: str | None = None
    cells: bool = False
    padded: bool = False
    one_step: bool = False
    fits: bool = False


def _cast(
    cell: str,
    x: Tensor,
    given: tuple[Tensor | None, ...],
    groups: Sequence[aten.Weights],
    more: tuple[Any, Any] = (None, None),
    one_step: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, ...], Sequence[aten.Weights], tuple[Any, Any]]:
    """x, states, weights, and params and inputs (see `run`), in the dtype that torch's own cell answers in."""
    dtype, low = torch.get_autocast_dtype(x.device.type), (torch.float16, torch.bfloat16, torch.float32)
    if x.device.type == "cpu" and (cell in ("gru", "gru_before") or (cell == "lstm" and one_step)):
        # There torch has no fused kernel to cast for. It rounds the products' operands, and the state keeps its dtype.
        dtype = torch.promote_types(dtype, next((s.dtype for s in given if s is not None), x.dtype))

    def cast(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
        return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in low else t for t in tensors)

    def named(given: Any) -> Any:
        return dict(zip(given, cast(given.values()), strict=True)) if isinstance(given, Mapping) else given

    params, inputs = more
    params = params if params is None else [named(p) for p in params]
    return cast([x])[0], cast(given), [cast(weights) for weights in groups], (params, named(inputs))


def _begins(x: Tensor) -> bool:
    """Whether resets are of one step: to zero the states before it is all there is to do."""
    return not backends.traced() and x.dim() > 2 and x.shape[0] == 1


def choose(
    cell: str | Cell,
    x: Tensor,
    tensors: Iterable[Tensor | None],
    how: How,
    hidden: int,
    packed: tuple[int, int] | None = None,
    projected: bool = False,
) -> backends.Choice:
    """The backend for a scan of x. tensors: states and weights; hidden: H; packed: T and B of a PackedSequence whose
    data is x; projected: whether an LSTM has a projection. Raises as backends.choose does."""
    spec = cell if type(cell) is Cell else get(cell)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    key = spec.key
    onednn = x.numel() > 0 and aten.onednn(key, x.device, x.dtype) and (x.dim() == 3 or packed is not None)
    T, B = packed or x.shape[:2]
    compiling, rows = torch.compiler.is_compiling(), x.shape[0]
    seen = projected or type(x) is not Tensor or backends.traced()
    if packed is None and how.lengths is not None and onednn and not seen:
        rows = int(how.lengths.sum())
    request = backends.request(
        key,
        None if compiling else (T, B, hidden),
        grad,
        refused=fallback.refused(x.device, key, x.dtype, hidden, grad),
        resets=how.resets is not None and not _begins(x),
        lengths=how.lengths is not None,
        packed=packed is not None and type(x) is Tensor,
        cells=how.cells,
        one_step=how.one_step,
        onednn=onednn,
        seen=seen,
        real=1.0 if how.lengths is None or compiling else rows / max(T * B, 1),
        lean=how.save == "states",
        projected=projected,
        exported=backends.exporting(T),
        problem="" if key in backends.ATEN_CELLS else spec.problem,  # those have kernels
    )
    return backends.choose(key, x.device, x.dtype, request, how.backend)


def run(
    cell: str | Cell,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    groups: Sequence[aten.Weights],
    how: How,
    stacked: aten.Weights | None = None,
    params: Sequence[Mapping[str, Tensor] | None] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """What `scan`, `scan_groups` and the modules share: y [T, B, K*H], final states [K, B, H], and, if how.cells, the
    states after each step [T, B, K*H].

    groups: each group's w_ih, w_hh, b_ih, b_hh (and w_hr, of an LSTM with a projection); stacked: the same with an axis
    K, if there is such a tensor already.
    x [T, B, I] or [T, B, K, I]; states [K, B, H] (of one group also [B, H]). params: of each group; inputs: see `scan`.
    """
    spec = cell if type(cell) is Cell else named(cell)
    arguments.options(how.backend, how.precision, how.save)
    given = (None,) * len(spec.states) if states is None else tuple(states)
    if len(given) != len(spec.states):
        count = len(spec.states)
        raise RuntimeError(f"states: {spec.name} has {count} state{'s' * (count > 1)}, got {len(given)}")
    if not spec.rows[0]:
        groups = [(x.new_empty(0, x.shape[-1]), *weights[1:]) for weights in groups]
        stacked = None
    if backends.autocasting(x.device):
        x, given, groups, more = _cast(spec.key, x, given, groups, (params, inputs), how.one_step)
        with torch.autocast(x.device.type, enabled=False):
            return _run(spec, x, given, groups, how, None, *more)
    return _run(spec, x, given, groups, how, stacked, params, inputs)


def _run(
    spec: Cell,
    x: Tensor,
    given: tuple[Tensor | None, ...],
    groups: Sequence[aten.Weights],
    how: How,
    stacked: aten.Weights | None,
    params: Any,
    inputs: Any,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """`run`, autocast done with. Five weights a group: an LSTM with a projection."""
    cell, K = spec.key, len(groups)
    if backends.watched():
        flops.register()
    if not how.fits:
        _fit(x, given, groups, spec.rows)
    B, of_x = x.shape[1], spec.rows[0]
    if of_x:
        H = groups[0][0].shape[0] // of_x  # type: ignore[union-attr]
    else:
        H = _hidden_size(spec, groups[0], given, params, inputs)
        given = _starts(x, given, groups, H)  # which say what H is
    tensors, vectors, beside = [*given, *(t for weights in groups for t in weights)], None, None
    if spec.params or params or spec.inputs or inputs:
        vectors, beside = extras.params(spec, params, x, H), extras.inputs(spec, inputs, x, H, how.lengths)
        tensors += [vectors, beside]
    chosen = choose(spec, x, tensors, how, H, projected=len(groups[0]) == 5)
    bits = sum(1 << k for k in range(K) if how.reverse[k])
    if how.resets is not None and chosen.backend != "triton" and _begins(x):
        given, how = masks.cleared(given, how.resets[0, :, None], how.reverse), replace(how, resets=None)
    if len(groups[0]) == 5 and chosen.backend != "aten":
        return _projected(spec, x, given, groups, how)
    if chosen.backend in ("triton", "loop") and (B > 0 or chosen.backend == "loop"):
        weights, vectors = _stacked(groups, stacked, vectors)
        precision = precisions.of_products(how.precision, x.dtype, x.device)
        # It may not fit: say so before anything runs. (A compiler cannot trace the plan; the operator says it then.)
        if chosen.schedule in backends.SCHEDULES and not torch.compiler.is_compiling():
            for backward in (False, True):
                ops.plan_for(cell, B, (K, H), x, chosen.schedule, precision, backward)
        told = autograd.Options(
            chosen.backend,
            cell,
            how.save,
            bits,
            chosen.schedule,
            precision,
            how.cells and len(spec.states) + len(spec.outputs) > 1,
            "",
            autograd.unseen(chosen.backend, x, tensors),
        )
        named = chosen.schedule in backends.SCHEDULES
        if how.one_step and chosen.backend == "triton" and beside is None and not named and not backends.traced():
            through = precisions.of_inputs(x.dtype, x.device)
            if ops.one_launch(cell, x[0], H, precision, through):
                told = replace(told, save="gates", single=through)
        x, mask = _masked(x, how, bits)
        y, final, every = autograd.apply(told, x, given, weights, vectors, beside, mask)
        return y, final, (y,) if how.cells and every is None else every
    if chosen.marked:
        if (found := _marked(x, given, groups, how, bits)) is None:
            return _run(spec, x, given, groups, replace(how, backend="loop"), stacked, params, inputs)
        return *found, None
    full = _starts(x, given, groups, H)
    if chosen.backend == "aten" and how.one_step:
        final = aten.step(cell, x[0], tuple(s[0] for s in full), groups[0])
        return final[0][None], final, None
    if chosen.backend == "aten":
        return *_aten(cell, x, full, groups, how), None
    weights, vectors = _stacked(groups, stacked, vectors)
    options: Any = {"resets": how.resets, "lengths": how.lengths, "reversed": bits}
    if vectors is not None:
        options["params"] = vectors.split(H, -1)
    if beside is not None:
        options["inputs"] = beside.split(H, -1)
    states, final = reference.scan_groups(reference.step_of(spec), x, full, *weights, **options)  # type: ignore[arg-type]
    return states[0], final, states[len(spec.outputs) :] if how.cells else None


def _hidden_size(spec: Cell, weights: aten.Weights, given: Sequence[Tensor | None], params: Any, inputs: Any) -> int:
    """H, of a cell that reads no x."""
    w_hh = weights[1]
    vectors = [t for n, t in ((params or ({},))[0] or {}).items() if n not in spec.scalars]
    wide = [t for t in (inputs or {}).values() if isinstance(t, Tensor) and t.dim() == 3]
    known = next((t for t in (w_hh, *given, *vectors, *wide) if t is not None), None)
    if known is None:
        raise ValueError(f"states must be given: nothing else says what the hidden size of {spec.name} is")
    return known.shape[-1]


def _stacked(
    groups: Sequence[aten.Weights], stacked: aten.Weights | None, vectors: Tensor | None
) -> tuple[aten.Weights, Tensor | None]:
    """The groups' weights and trained vectors with an axis K; of one group as they are."""
    if stacked is None:
        return groups[0] if len(groups) == 1 else [_stack(ts) for ts in zip(*groups, strict=True)], vectors
    return stacked, vectors[None] if vectors is not None and vectors.dim() == 1 else vectors


def _fit(
    x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], rows: tuple[int, int, int, int]
) -> None:
    """Raise where a group's arguments do not fit."""
    for k, weights in enumerate(groups):
        states = tuple(s[k] if s is not None and s.dim() == 3 else s for s in given)
        arguments.fit(x if x.dim() == 3 else x[:, :, k], states, weights, rows)


def _masked(x: Tensor, how: How, bits: int) -> tuple[Tensor, Tensor | None]:
    """x, zero where padding, which takes no part, whatever it is: NaN, too; and the mask of resets and lengths."""
    if how.lengths is not None and not how.padded:
        past = masks.ended(how.lengths, x.shape[0])
        x = x.masked_fill(past.reshape(*past.shape, *(1,) * (x.dim() - 2)), 0)
    return x, masks.encode(how.resets, how.lengths, x.shape[0], bits)


def _marked(
    x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], how: How, bits: int
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """By `marked`, group after group; None where it cannot."""
    x, mask = _masked(x, how, bits)
    assert mask is not None
    found = []
    for k, weights in enumerate(groups):
        h0, c0 = (None if s is None else s.reshape(len(groups), *s.shape[-2:])[k : k + 1] for s in given)
        of = marked.layer(x if x.dim() == 3 else x[:, :, k], h0, c0, weights, mask, how.reverse[k])
        if of is None:
            return None
        found.append(of)
    ys, hs, cs = zip(*found, strict=True)
    return (ys[0], (hs[0], cs[0])) if len(groups) == 1 else (torch.cat(ys, 2), (torch.cat(hs), torch.cat(cs)))


def _starts(
    x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], H: int, batch: int | None = None
) -> tuple[Tensor, ...]:
    """The given states [K, B, .], zeros where there is none."""
    K, B = len(groups), x.shape[1] if batch is None else batch
    w_hh = groups[0][1]
    sizes = (H if w_hh is None else w_hh.shape[1], *(H,) * (len(given) - 1))
    return tuple(x.new_zeros(K, B, n) if s is None else s.reshape(K, B, n) for s, n in zip(given, sizes, strict=True))


def _projected(
    spec: Cell, x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], how: How
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """An LSTM with a projection, by one without: see `projection`."""
    h0, c0 = given
    plain = projection.unprojected(groups)
    if h0 is not None:
        h0 = h0.reshape(len(groups), x.shape[1], h0.shape[-1])
        x, plain = projection.with_start(x, h0, groups, plain, how.reverse, how.resets, how.lengths)
    y, (m, c), every = _run(spec, x, (None, c0), plain, how, None, None, None)
    hn = projection.project_final(m, groups, h0, how.lengths)
    y = projection.project(y, groups)
    return y, (hn, c), None if every is None else (y, *every[1:])


def aten_packed(
    cell: str,
    data: Tensor,
    batch_sizes: Tensor,
    batch: int,
    states: tuple[Tensor, ...] | None,
    groups: Sequence[aten.Weights],
    how: tuple[int, float, bool, bool],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers by torch's own over a PackedSequence's data; states [layers * directions, B, .] in its order. Shapes
    are not checked. groups: the weights of each layer's directions; how: num_layers, dropout, training, bidirectional.
    """
    spec = named(cell)
    given: tuple[Tensor | None, ...] = (None,) * len(spec.states) if states is None else states
    if backends.autocasting(data.device):
        data, given, groups, _ = _cast(cell, data, given, groups)
    H = groups[0][1].shape[0] // spec.rows[1]  # type: ignore[union-attr]
    with torch.autocast(data.device.type, enabled=False):
        return aten.packed(cell, data, batch_sizes, _starts(data, given, groups, H, batch), groups, how)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.stack(present) if present else None


def _aten(
    cell: str, x: Tensor, states: tuple[Tensor, ...], groups: Sequence[aten.Weights], how: How
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By torch's own layers: in one call where the groups are a layer's directions, else group after group."""
    K = len(groups)
    if x.dim() == 3 and how.reverse in ((False,), (False, True)):
        if how.lengths is None:
            return aten.layer(cell, x, states, groups)
        packed = pack_padded_sequence(x, how.lengths.cpu(), enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None and back is not None
        starts, how_many = [s[:, order] for s in states], (1, 0.0, False, K == 2)
        y, final = aten.packed(cell, packed.data, packed.batch_sizes, starts, groups, how_many)
        padded, _ = pad_packed_sequence(PackedSequence(y, packed.batch_sizes, order, back), total_length=x.shape[0])
        return padded, tuple(s[:, back] for s in final)
    outputs, finals = [], []
    for k in range(K):
        mine = x if x.dim() == 3 else x[:, :, k]
        # A reversed group alone: the second direction of a layer whose first is thrown away would be waste.
        flipped = how.reverse[k]
        if flipped and how.lengths is not None:
            raise RuntimeError("the aten backend takes lengths only with both directions: use backend='loop'")
        part = replace(how, reverse=(False,))
        y, final = _aten(
            cell, mine.flip(0) if flipped else mine, tuple(s[k : k + 1] for s in states), groups[k : k + 1], part
        )
        outputs.append(y.flip(0) if flipped else y)
        finals.append(tuple(s[0] for s in final))
    return torch.cat(outputs, 2), tuple(torch.stack(s) for s in zip(*finals, strict=True))

"""lstm(), gru(), rnn(), scan(), scan_groups(): check the arguments, choose a backend, run. One layer.

Shapes: x [T, B, I]; states [B, H]; w_ih [G*H, I]; w_hh [G*H, H]; b_ih, b_hh [G*H] or None; resets bool [T, B];
lengths int [B].
G = 4 for LSTM (i f g o), 3 for GRU (r z n), 1 for RNN, in torch's order. y [T, B, H].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    batching,
    checks,
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


@dataclass(frozen=True)
class How:
    """How a scan is to be done: the options of `scan`, as the modules hand them on.

    reverse: for each group, whether it walks from the last step to the first. cells: all cell states, too.
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
    cell: str, x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], one_step: bool = False
) -> tuple[Tensor, tuple[Tensor | None, ...], Sequence[aten.Weights]]:
    """x, states and weights in the dtype that torch's own cell answers in under autocast."""
    dtype, low = torch.get_autocast_dtype(x.device.type), (torch.float16, torch.bfloat16, torch.float32)
    if x.device.type == "cpu" and (cell in ("gru", "gru_before") or (cell == "lstm" and one_step)):
        # There torch has no fused kernel to cast for. It rounds the products' operands, and the state keeps its dtype.
        dtype = torch.promote_types(dtype, next((s.dtype for s in given if s is not None), x.dtype))

    def cast(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
        return tuple(t.to(dtype) if t is not None and t.dtype in low else t for t in tensors)

    return cast([x])[0], cast(given), [cast(weights) for weights in groups]


def _begins(x: Tensor) -> bool:
    """Whether resets are of one step: to zero the states before it is all there is to do."""
    return not backends.traced() and x.dim() > 2 and x.shape[0] == 1


def choose(
    cell: str,
    x: Tensor,
    tensors: Iterable[Tensor | None],
    how: How,
    hidden: int,
    packed: tuple[int, int] | None = None,
    projected: bool = False,
) -> backends.Choice:
    """The backend for a scan of x. tensors: states and weights; hidden: H; packed: T and B of a PackedSequence whose
    data is x; projected: whether an LSTM has a projection. Raises as backends.choose does."""
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    onednn = x.numel() > 0 and aten.onednn(cell, x.device, x.dtype) and (x.dim() == 3 or packed is not None)
    T, B = packed or x.shape[:2]
    compiling, rows = torch.compiler.is_compiling(), x.shape[0]
    seen = projected or type(x) is not Tensor or backends.traced()
    if packed is None and how.lengths is not None and onednn and not seen:
        rows = int(how.lengths.sum())
    request = backends.request(
        cell,
        None if compiling else (T, B, hidden),
        grad,
        refused=fallback.refused(x.device, cell, x.dtype, hidden, grad),
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
    )
    return backends.choose(cell, x.device, x.dtype, request, how.backend)


def run(
    cell: str,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    groups: Sequence[aten.Weights],
    how: How,
    stacked: aten.Weights | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """What `scan`, `scan_groups` and the modules share: y [T, B, K*H], final states [K, B, H], all cell states or None.

    groups: each group's w_ih, w_hh, b_ih, b_hh (and w_hr, of an LSTM with a projection); stacked: the same with an axis
    K, if there is such a tensor already.
    x [T, B, I] or [T, B, K, I]; states [K, B, H] (of one group also [B, H]).
    """
    spec = reference.get(cell)
    arguments.options(how.backend, how.precision, how.save)
    given = (None,) * spec.states if states is None else tuple(states)
    if len(given) != spec.states:
        raise RuntimeError(f"states: {cell} has {spec.states} state{'s' * (spec.states > 1)}, got {len(given)}")
    if how.cells and spec.states == 1:
        raise ValueError(f"{cell} has no cell state: all cell states were asked for")
    if backends.autocasting(x.device):
        x, given, groups = _cast(cell, x, given, groups, how.one_step)
        with torch.autocast(x.device.type, enabled=False):
            return _run(cell, x, given, groups, how, None)
    return _run(cell, x, given, groups, how, stacked)


def _run(
    cell: str,
    x: Tensor,
    given: tuple[Tensor | None, ...],
    groups: Sequence[aten.Weights],
    how: How,
    stacked: aten.Weights | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """`run`, autocast done with. Five weights a group: an LSTM with a projection."""
    spec, K = reference.get(cell), len(groups)
    if backends.watched():
        flops.register()
    if not how.fits:
        _fit(x, given, groups, spec.gates)
    B, H = x.shape[1], groups[0][1].shape[0] // spec.gates  # type: ignore[union-attr]
    tensors = (*given, *(t for weights in groups for t in weights))
    chosen = choose(cell, x, tensors, how, H, projected=len(groups[0]) == 5)
    bits = sum(1 << k for k in range(K) if how.reverse[k])
    if how.resets is not None and chosen.backend != "triton" and _begins(x):
        given, how = masks.cleared(given, how.resets[0, :, None], how.reverse), replace(how, resets=None)
    if len(groups[0]) == 5 and chosen.backend != "aten":
        return _projected(cell, x, given, groups, how)
    if chosen.backend in ("triton", "loop") and (B > 0 or chosen.backend == "loop"):
        if stacked is None:
            stacked = groups[0] if K == 1 else [_stack(ts) for ts in zip(*groups, strict=True)]
        w_ih, w_hh, b_ih, b_hh = stacked
        precision = precisions.of_products(how.precision, x.dtype, x.device)
        # It may not fit: say so before anything runs. (A compiler cannot trace the plan; the operator says it then.)
        if chosen.schedule in backends.SCHEDULES and not torch.compiler.is_compiling():
            assert w_hh is not None
            for backward in (False, True):
                u = w_hh if w_hh.dim() == 3 else w_hh[None]
                ops.plan_for(cell, B, u, chosen.schedule, precision, backward)
        options = autograd.Options(
            chosen.backend,
            cell,
            how.save,
            bits,
            chosen.schedule,
            precision,
            how.cells,
            "",
            autograd.unseen(chosen.backend, x, tensors),
        )
        named = chosen.schedule in backends.SCHEDULES
        if how.one_step and chosen.backend == "triton" and not named and not backends.traced():
            inputs = precisions.of_inputs(x.dtype, x.device)
            if ops.one_launch(cell, x[0], w_hh, precision, inputs):  # type: ignore[arg-type]
                options = replace(options, save="gates", single=inputs)
        x, mask = _masked(x, how, bits)
        return autograd.apply(options, x, given, w_ih, w_hh, b_ih, b_hh, mask)  # type: ignore[arg-type]
    if chosen.marked:
        if (found := _marked(x, given, groups, how, bits)) is None:
            return _run(cell, x, given, groups, replace(how, backend="loop"), stacked)
        return *found, None
    full = _starts(x, given, groups, H)
    if chosen.backend == "aten" and how.one_step:
        final = aten.step(cell, x[0], tuple(s[0] for s in full), groups[0])
        return final[0][None], final, None
    if chosen.backend == "aten":
        return *_aten(cell, x, full, groups, how), None
    stacked = [_stack(ts) for ts in zip(*groups, strict=True)] if stacked is None else stacked
    masked: Any = {"resets": how.resets, "lengths": how.lengths, "reversed": bits}
    states, final = reference.scan_groups(spec.step, x, full, *stacked, **masked)  # type: ignore[arg-type]
    return states[0], final, states[1] if how.cells else None


def _fit(x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], gates: int) -> None:
    """Raise where a group's arguments do not fit."""
    for k, weights in enumerate(groups):
        states = tuple(s[k] if s is not None and s.dim() == 3 else s for s in given)
        arguments.fit(x if x.dim() == 3 else x[:, :, k], states, weights, gates)


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
    P = groups[0][1].shape[1]  # type: ignore[union-attr]
    sizes = (P, H)[: len(given)]
    return tuple(x.new_zeros(K, B, n) if s is None else s.reshape(K, B, n) for s, n in zip(given, sizes, strict=True))


def _projected(
    cell: str, x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], how: How
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """An LSTM with a projection, by one without: see `projection`."""
    h0, c0 = given
    plain = projection.unprojected(groups)
    if h0 is not None:
        h0 = h0.reshape(len(groups), x.shape[1], h0.shape[-1])
        x, plain = projection.with_start(x, h0, groups, plain, how.reverse, how.resets, how.lengths)
    y, (m, c), every = _run(cell, x, (None, c0), plain, how, None)
    hn = projection.project_final(m, groups, h0, how.lengths)
    return projection.project(y, groups), (hn, c), every


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
    spec = reference.get(cell)
    given: tuple[Tensor | None, ...] = (None,) * spec.states if states is None else states
    if backends.autocasting(data.device):
        data, given, groups = _cast(cell, data, given, groups)
    H = groups[0][1].shape[0] // spec.gates  # type: ignore[union-attr]
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


def scan(
    cell: str,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    resets: Tensor | Sequence[Any] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates",
    backend: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A registered cell over all steps of x: (y, final states [B, H]). Shapes: see the module.

    cell: "lstm", "gru", "gru_before", "rnn_tanh", "rnn_relu", or one's own (see `cell`). w_ih, w_hh, b_ih, b_hh: its
    weights and biases. states: (h0,) or (h0, c0); None, whole or in part, is zero. Options:
    resets: [T, B], bool or the numbers 0 and 1, or nested lists of them. Where set, an episode begins at that step: no
    state crosses from the step before it. (On a device other numbers than 0 count as 1; on the CPU they raise.)
    lengths: int [B], or a list: the steps of each row. Outputs beyond are zero, the final states those after its last
    step, and padding may hold anything.
    save: what the triton backend keeps for backward: "gates", or "states" (about a third of the memory, one more GEMM).
    backend: see seqcells.backends; None is the context's, else "auto".
    precision: of float32 recurrent products on the triton backend: "ieee" (float32 itself), "tf32" (operands rounded to
    nearest, to 11 bits), or "tf32x3" (three TF32 products for one of nearly float32's precision; NVIDIA only); None is
    what PyTorch's switches for RNNs say on CUDA, "tf32" or "ieee". Other dtypes and backends ignore it, as do the large
    products outside the recurrence, which follow PyTorch's switches for matrix products.

    Under autocast tensors are cast to the dtype in which torch.nn answers: autocast's, or, of a GRU and of one step of
    an LSTM on the CPU, that of the state. y must not be changed in place while backward still needs it; that raises.

    Raises RuntimeError, ValueError or TypeError as torch.nn does for shapes, dtypes and devices that do not fit.
    """
    arguments.types(x, states, {"w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh})
    masked = arguments.resets(resets, x.shape[:2], x.device), arguments.lengths(lengths, x.shape[:2], x.device)
    how = How(*masked, save=save, backend=backend, precision=precision)
    y, final, _ = run(cell, x, states, [(w_ih, w_hh, b_ih, b_hh)], how)
    return y, tuple(s[0] for s in final)


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
    resets: Tensor | Sequence[Any] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates",
    backend: str | None = None,
    precision: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """K independent scans of one cell, on the triton backend in one launch: y [T, B, K*H], final states [K, B, H].

    cell, resets, lengths, save, backend, precision, and what is raised: as in `scan`.

    The two directions of a layer: x [T, B, I], reverse (False, True); y is then torch.nn's, forward beside backward.
    Heads (a block-diagonal recurrence): x [T, B, K, I]. w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H],
    states [K, B, H]. reverse: for each group, whether it walks from the last step to the first; () is none.
    """
    weights = (w_ih, w_hh, b_ih, b_hh)
    arguments.types(x, states, dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=True)), rank=None)
    if w_hh.dim() != 3 or w_ih.dim() != 3:
        raise RuntimeError(f"w_ih and w_hh must have 3 dimensions, got {w_ih.dim()} and {w_hh.dim()}")
    K = w_hh.shape[0]
    if not isinstance(reverse, (tuple, list)):
        raise checks.wrong("reverse", "a tuple of bools", reverse)
    for k, flag in enumerate(reverse):
        checks.boolean(f"reverse[{k}]", flag)
    flags = tuple(reverse) or (False,) * K
    if len(flags) != K:
        raise ValueError(f"reverse must have one value for each of {K} groups, got {len(flags)}")
    given = () if states is None else tuple(states)
    for name, t in zip(("w_ih", "w_hh", "b_ih", "b_hh", *("states",) * len(given)), (*weights, *given), strict=True):
        rank = 2 if name.startswith("b_") else 3
        if t is not None and t.dim() != rank:
            raise RuntimeError(f"{name} must have {rank} dimensions, got {t.dim()}")
        if t is not None and t.shape[0] != K:
            raise RuntimeError(f"{name} must have {K} groups, got {t.shape[0]}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != K):
        raise RuntimeError(f"input must have shape (T, B, I) or (T, B, {K}, I), got {tuple(x.shape)}")
    groups = [tuple(None if t is None else t[k] for t in weights) for k in range(K)]
    if any(flags) and K > batching.MOST:
        raise ValueError(f"at most {batching.MOST} groups where some are reversed, got {K}")
    masked = arguments.resets(resets, x.shape[:2], x.device), arguments.lengths(lengths, x.shape[:2], x.device)
    how = How(*masked, flags, save, backend, precision)
    y, final, _ = run(cell, x, states, groups, how, stacked=weights)
    return y, final


def lstm(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, *, resets: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates", backend: str | None = None, precision: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Apply one layer of an LSTM to x [T, B, I]: y [T, B, H] and (h_n, c_n), each [B, H].

    hx: (h0, c0), each [B, H], or None, zeros. w_ih [4*H, I], w_hh [4*H, H]; b_ih, b_hh [4*H] or None, zeros. resets,
    lengths, save, backend, precision, and what is raised: see `scan`.

        >>> lstm = torch.nn.LSTM(10, 20)
        >>> y, (h_n, c_n) = seqcells.lstm(torch.randn(5, 3, 10), None, *lstm.parameters())
        >>> y.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """
    if hx is not None:
        checks.tensors("hx", hx, "a tuple of two tensors (h0, c0) or None", 2, optional=True)
    how: Any = {"resets": resets, "lengths": lengths, "save": save, "backend": backend, "precision": precision}
    y, final = scan("lstm", x, hx, w_ih, w_hh, b_ih, b_hh, **how)
    return y, (final[0], final[1])


def gru(
    x: Tensor, hx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    *, reset_after: bool = True, resets: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates", backend: str | None = None, precision: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply one layer of a GRU to x [T, B, I]: y [T, B, H] and h_n [B, H].

    hx: h0 [B, H], or None, zeros. w_ih [3*H, I], w_hh [3*H, H]; b_ih, b_hh [3*H] or None, zeros. reset_after: torch's
    and cuDNN's form; False: Cho et al. 2014 v3. resets, lengths, save, backend, precision, and what is raised: see
    `scan`.

        >>> gru = torch.nn.GRU(10, 20)
        >>> y, h_n = seqcells.gru(torch.randn(5, 3, 10), None, *gru.parameters(), lengths=[5, 4, 2])
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """
    checks.boolean("reset_after", reset_after)
    checks.tensor("hx", hx, optional=True)
    cell = "gru" if reset_after else "gru_before"
    how: Any = {"resets": resets, "lengths": lengths, "save": save, "backend": backend, "precision": precision}
    y, final = scan(cell, x, (hx,), w_ih, w_hh, b_ih, b_hh, **how)
    return y, final[0]


def rnn(
    x: Tensor, hx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    *, nonlinearity: str = "tanh", resets: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates", backend: str | None = None, precision: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply one layer of an Elman network to x [T, B, I]: y [T, B, H] and h_n [B, H].

    hx: h0 [B, H], or None, zeros. w_ih [H, I], w_hh [H, H]; b_ih, b_hh [H] or None, zeros. nonlinearity: "tanh" or
    "relu". resets, lengths, save, backend, precision, and what is raised: see `scan`.

        >>> rnn = torch.nn.RNN(10, 20, nonlinearity="relu")
        >>> y, h_n = seqcells.rnn(torch.randn(5, 3, 10), None, *rnn.parameters(), nonlinearity="relu")
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """
    checks.tensor("hx", hx, optional=True)
    how: Any = {"resets": resets, "lengths": lengths, "save": save, "backend": backend, "precision": precision}
    y, final = scan(rnn_cell_name(nonlinearity), x, (hx,), w_ih, w_hh, b_ih, b_hh, **how)
    return y, final[0]


def rnn_cell_name(nonlinearity: str) -> str:
    """The kernels' name of the cell. ValueError in torch's words for anything but tanh and relu."""
    if not isinstance(nonlinearity, str) or nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"

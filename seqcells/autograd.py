"""The autograd.Function of a scan: what every engine's forward and backward over time have around them.

An engine walks the steps (the Triton kernels in `ops`, torch operations in `loop`). Here is the rest, in ordinary
tensor operations that a compiler and torch.func see through: the input projection of all steps and the weight
gradients, one large product each; second derivatives and forward mode, through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

from . import backends, masks, reference
from .kernels.buffers import outputs, previous_outputs
from .reference import Cell


class Engine(NamedTuple):
    """What walks the steps. Shapes: kernels.buffers.

    forward(gx [T, B, K, G*H], u [K, G*H, H], bias [K, inner*H], h0, c0 [K, B, H], mask, cell, save, reversed,
    schedule, precision) -> y, c, saved, hn, cn
    backward(dy, dhn, dcn, dcs, u, y, c, saved, mask, cell, reversed, schedule, precision) -> dgx, dhu, m, dh0, dc0
    recompute(gx, u, bias, y, c, mask, cell, reversed, schedule) -> saved
    single(x [B, I], w_ih, w_hh, b_ih, b_hh, h0, c0 [B, H], cell, save, schedule, precision, input_precision) -> as
    forward, but hn, cn [B, H]: one step and its input's product together; None where there is none
    whole(options, save, the 7 inputs, mask) -> what `_visible` gives, the three tensors `kept`, and `more`
    whole_backward(options, the 7 inputs, mask, kept, the outputs' gradients, need, more or None) -> the 7 gradients
    Both, or None: a layer from its input to all gradients, where nothing looks on
    exact: whether it takes gx and bias in float32 where the rest is of half precision
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    recompute: Callable[..., Any]
    single: Callable[..., Any] | None = None
    whole: Callable[..., Any] | None = None
    whole_backward: Callable[..., Any] | None = None
    exact: bool = False


ENGINES: dict[str, Engine] = {}


@dataclass(frozen=True)
class Options:
    """What a scan is told beside its tensors. reversed: bits, see kernels.buffers. cells: also give all cell states.

    single: the precision of the input's product in one step by the engine's `single`; "" is a scan. whole: by its
    `whole`.
    need: of a scan's gradients, which of the 7 are wanted. Not a tuple: torch.func takes those apart.
    """

    engine: str
    cell: str
    save: str = "gates"
    reversed: int = 0
    schedule: str = ""
    precision: str = "ieee"
    cells: bool = False
    single: str = ""
    whole: bool = False
    need: tuple[bool, ...] = ()


def input_biases(cell: Cell, b_ih: Tensor | None, b_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of biases [K, G*H] or [G*H]: the sum of what only adds to the input's product; and b_hh of the inner gates."""
    if b_hh is None:
        return b_ih, None
    adds, inner = b_hh, None
    if cell.inner:
        plain = b_hh.shape[-1] - cell.inner * (b_hh.shape[-1] // cell.gates)
        inner = b_hh[..., plain:]
        adds = torch.cat([b_hh[..., :plain], torch.zeros_like(inner)], -1)
    return adds if b_ih is None else b_ih + adds, inner


def input_projection(
    cell: Cell, x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """gx [T, B, K, G*H] with every bias that only adds, by one GEMM; and b_hh of the inner gates [K, inner*H], which
    does not. x [T, B, I] for all groups, or [T, B, K, I]; w_ih [K, G*H, I]."""
    K, GH = w_ih.shape[:2]
    bias, inner = input_biases(cell, b_ih, b_hh)
    if x.dim() == 3:
        gx = linear(x, w_ih.reshape(K * GH, -1), None if bias is None else bias.reshape(-1))
        return gx.unflatten(2, (K, GH)), inner
    gx = torch.einsum("tbki,kgi->tbkg", x, w_ih)
    return (gx if bias is None else gx + bias).contiguous(), inner


def _projection(engine: Engine, cell: Cell, x: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`input_projection` of w_ih, b_ih, b_hh, as the engine wants it."""
    if engine.exact and x.dtype.itemsize < 4:
        x, weights = x.float(), tuple(None if t is None else t.float() for t in weights)
    return input_projection(cell, x, *weights)  # type: ignore[arg-type]


def _grouped(*tensors: Tensor | None) -> list[Tensor | None]:
    """Weights [G*H, .] with a leading axis of one group; those [K, G*H, .] as they are. w_ih, w_hh, b_ih, b_hh."""
    w_hh = tensors[1]
    assert w_hh is not None
    return list(tensors) if w_hh.dim() == 3 else [None if t is None else t[None] for t in tensors]


def _range(options: Options, direction: str) -> Any:
    """A range of the profiler that says what runs, if one is on."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(f"seqcells {options.cell} {direction} ({options.engine})")


def _run(options: Options, save: str, inputs: tuple[Tensor | None, ...], mask: Tensor | None) -> tuple[Tensor, ...]:
    """What the engine's forward gives for `apply`'s arguments."""
    x, h0, c0, *weights = inputs
    cell, engine = reference.get(options.cell), ENGINES[options.engine]
    assert x is not None
    if options.single and engine.single is not None:
        h0, c0 = (None if s is None else s.reshape(s.shape[-2:]) for s in (h0, c0))
        given = (options.cell, save, options.schedule, options.precision, options.single)
        return engine.single(x[0], *weights, h0, c0, *given)
    w_ih, w_hh, b_ih, b_hh = _grouped(*weights)
    assert w_ih is not None
    gx, bias = _projection(engine, cell, x, w_ih, b_ih, b_hh)
    K, B = gx.shape[2], gx.shape[1]
    h0, c0 = (None if s is None else s.reshape(K, B, s.shape[-1]) for s in (h0, c0))
    how = (options.cell, save, options.reversed, options.schedule, options.precision)
    return engine.forward(gx, w_hh, bias, h0, c0, mask, *how)


def _visible(
    options: Options, out: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], mask: Tensor | None
) -> tuple[Tensor, ...]:
    """y [T, B, K*H], the final states [K, B, H] and, if asked for, all cell states [T, B, K*H]."""
    y, c, _, hn, cn = out
    if options.single:
        return hn[None], *(hn, cn)[: reference.get(options.cell).states]
    every = [y, c] if options.cells else [y]
    shown = [outputs(s, options.reversed) for s in every]
    ended = None if mask is None else masks.held(mask)
    if ended is not None and options.reversed and any(s is not None for s in inputs[1:3]):
        # A reversed group waits in its given start, which its buffer holds, until its row begins.
        shown = [s.masked_fill(ended[..., None, None], 0) for s in shown]
    finals = (hn, cn)[: reference.get(options.cell).states]
    return shown[0].flatten(2), *finals, *(s.flatten(2) for s in shown[1:])


def _gradients(
    options: Options,
    inputs: tuple[Tensor | None, ...],
    mask: Tensor | None,
    kept: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, h0, c0, w_ih, w_hh, b_ih, b_hh, in their shapes, through the engine."""
    name, reversed, need = options.cell, options.reversed, options.need
    if options.whole:
        return ENGINES[options.engine].whole_backward(options, inputs, mask, kept, grads, need, None)  # type: ignore[misc]
    x, _, _, *weights = inputs
    y, c, saved = kept
    w_ih, w_hh, b_ih, b_hh = _grouped(*weights)
    assert x is not None and y is not None and w_ih is not None and w_hh is not None
    cell, walker = reference.get(name), ENGINES[options.engine]
    K, H = y.shape[2:]
    if saved is None:
        gx, bias = _projection(walker, cell, x, w_ih, b_ih, b_hh)
        saved = walker.recompute(gx, w_hh, bias, y, c, mask, name, reversed, options.schedule)
    dy, dhn, *others = grads
    dcn, dcs = (*others, None, None)[:2] if cell.states == 2 else (None, None)
    dy, dcs = (None if d is None else d.reshape(*d.shape[:2], K, H) for d in (dy, dcs))
    if options.single:  # whose states have no axis of groups
        dhn, dcn = (None if d is None else d[None] for d in (dhn, dcn))
    how = (name, reversed, options.schedule, options.precision)
    out = walker.backward(dy, dhn, dcn, dcs, w_hh, y, c, saved, mask, *how)
    dgx, dhu, m, dh0, dc0 = out
    dx = dw_ih = dw_hh = db_ih = db_hh = None
    if x.dim() == 3:
        wide = dgx.reshape(*dgx.shape[:2], K * dgx.shape[3])
        flat = wide.reshape(-1, wide.shape[2])
        dx = wide @ w_ih.flatten(0, 1) if need[0] else None
        dw_ih = flat.t() @ x.flatten(0, 1) if need[3] else None
    else:
        dx = torch.einsum("tbkg,kgi->tbki", dgx, w_ih) if need[0] else None
        dw_ih = torch.einsum("tbkg,tbki->kgi", dgx, x) if need[3] else None
    if need[4]:
        each = [_recurrent_weight_gradient(cell, dgx, dhu, m, y, mask, reversed, k) for k in range(K)]
        dw_hh = each[0] if K == 1 else torch.stack(each)
    if need[5] or need[6]:
        db_ih = dgx.sum((0, 1))
    if need[6] and db_ih is not None:
        plain = db_ih.narrow(1, 0, (cell.gates - cell.inner) * H)
        db_hh = torch.cat([plain, dhu.sum((0, 1))], 1) if cell.inner else db_ih.clone()
    found = [dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh]
    # In the shapes the inputs had; the optional ones answer with None where they were None.
    return tuple(
        g.reshape(t.shape) if n and g is not None and t is not None else None
        for g, t, n in zip(found, inputs, need, strict=True)
    )


def _recurrent_weight_gradient(
    cell: Cell, dgx: Tensor, dhu: Tensor, m: Tensor, y: Tensor, mask: Tensor | None, reversed: int, k: int
) -> Tensor:
    """[G*H, H] of group k, by one GEMM a kind of gate: with h U^T added, with it used inside, of the second product."""
    H = y.shape[3]
    h = previous_outputs(y, mask, reversed, k).flatten(0, 1)
    d = dgx[:, :, k].reshape(-1, dgx.shape[3])
    parts = [d.narrow(1, 0, (cell.split - cell.inner) * H).t() @ h]
    if cell.inner:
        parts.append(dhu[:, :, k].reshape(-1, dhu.shape[3]).t() @ h)
    if cell.split < cell.gates:
        parts.append(d.narrow(1, cell.split * H, (cell.gates - cell.split) * H).t() @ m[:, :, k].reshape(-1, H))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def reference_of(
    options: Options, present: list[bool], resets: Tensor | None, lengths: Tensor | None
) -> Callable[..., tuple[Tensor, ...]]:
    """The scan as a function of its present tensors among x, h0, c0, w_ih, w_hh, b_ih, b_hh, differentiable any number
    of times: what `_visible` gives."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        x, h0, c0, w_ih, w_hh, b_ih, b_hh = (next(rest) if p else None for p in present)
        assert x is not None and w_ih is not None and w_hh is not None
        spec = reference.get(options.cell)
        zero = x.new_zeros(*w_hh.shape[:-2], x.shape[1], w_hh.shape[-1])
        states = (zero if h0 is None else h0, zero if c0 is None else c0)[: spec.states]
        how: Any = {"resets": resets, "lengths": lengths, "reversed": options.reversed}
        every, final = reference.scan_groups(spec.step, x, states, w_ih, w_hh, b_ih, b_hh, **how)
        if options.single:
            final = tuple(s[0] for s in final)
        return every[0], *final, *(every[1:] if options.cells else ())

    return run


def vjp(run: Callable[..., Any], *primals: Any) -> tuple[Any, Any]:
    """run's outputs, and their gradients' way back."""
    out, back = torch.func.vjp(run, *primals)  # type: ignore[misc]
    return out, back


def _gradients_of(run: Callable[..., Any], wanted: list[bool], given: list[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """The wanted gradients of run's inputs, as a function of its inputs and of the given gradients of its outputs."""

    def first(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, back = vjp(run, *tensors[: len(wanted)])
        grads = iter(tensors[len(wanted) :])
        found = back(tuple(next(grads) if g else torch.zeros_like(o) for o, g in zip(out, given, strict=True)))
        return tuple(f for f, w in zip(found, wanted, strict=True) if w)

    return first


def _forward_mode(run: Callable[..., Any], primals: list[Tensor], tangents: list[Tensor | None]) -> tuple[Tensor, ...]:
    """The derivative of run along tangents (None: zero), by backward mode twice: a gradient is linear in the gradients
    it is given, and its own gradient in those is the derivative forward."""
    out, back = vjp(run, *primals)
    _, forth = vjp(back, tuple(torch.zeros_like(o) for o in out))
    return forth(tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)))[0]


def _gradients_by_reference(
    options: Options, inputs: tuple[Tensor | None, ...], mask: Tensor | None, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """`_gradients`, in operations that can be transformed."""
    present = [t is not None for t in inputs]
    wanted = [n and p for n, p in zip(options.need, present, strict=True)]
    run = reference_of(options, present, *masks.decode(mask))
    first = _gradients_of(run, [w for w, p in zip(wanted, present, strict=True) if p], [g is not None for g in grads])
    found = iter(first(*(t for t in (*inputs, *grads) if t is not None)))
    return tuple(next(found) if w else None for w in wanted)


# The names of these classes are what a profile shows.


class SeqcellsGradients(torch.autograd.Function):
    """The gradients, through the engine; their own gradients, through the reference.

    options, mask, y, c, saved; the 7 inputs; the gradients of the outputs (None: zero). Gives 7.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(options: Options, mask: Any, y: Any, c: Any, saved: Any, *rest: Any) -> Any:
        return _gradients(options, rest[:7], mask, (y, c, saved), rest[7:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, mask, _, _, _, *rest = inputs
        ctx.save_for_backward(mask, *rest)
        ctx.save_for_forward(mask, *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _function(ctx: Any) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[bool]]:
        """The gradients as a function, its arguments, and which of the 7 it gives."""
        mask, *rest = ctx.saved_tensors
        present = [t is not None for t in rest[:7]]
        wanted = [n for n, p in zip(ctx.options.need, present, strict=True) if p]
        run = reference_of(ctx.options, present, *masks.decode(mask))
        primals = [t for t in rest if t is not None]
        given = [n and p for n, p in zip(ctx.options.need, present, strict=True)]
        return _gradients_of(run, wanted, [g is not None for g in rest[7:]]), primals, given

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        first, primals, given = SeqcellsGradients._function(ctx)
        values, back = vjp(first, *primals)
        weights = [o for o, g in zip(outer, given, strict=True) if g]
        found = iter(back(tuple(torch.zeros_like(v) if w is None else w for v, w in zip(values, weights, strict=True))))
        return *(None,) * 5, *(next(found) if t is not None else None for t in ctx.saved_tensors[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        first, primals, given = SeqcellsGradients._function(ctx)
        along = [d for t, d in zip(ctx.saved_tensors[1:], tangents[5:], strict=True) if t is not None]
        found = iter(_forward_mode(first, primals, along))
        return tuple(next(found) if g else None for g in given)


class SeqcellsScanCompiled(torch.autograd.Function):
    """options, mask; x, h0, c0, w_ih, w_hh, b_ih, b_hh, to what `_visible` gives, then y, c and saved for backward."""

    @staticmethod
    def forward(options: Options, mask: Any, *inputs: Any) -> Any:
        out = _run(options, options.save, inputs, mask)
        shown = _visible(options, out, inputs, mask)
        # Views of other outputs have no tangents in forward mode, and may not be changed in place, as torch's own
        # outputs on the CPU may. The kernels' stay views, for speed: cuDNN's may not be changed either.
        if forward_ad._current_level >= 0 or options.engine == "loop":
            shown = tuple(s.clone() for s in shown)
        return *shown, *out[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        options, mask, *tensors = inputs
        *_, y, c, saved = output
        ctx.mark_non_differentiable(y, c, saved)
        ctx.set_materialize_grads(False)
        ctx.options = options
        kept = (mask, *tensors, y, c, saved)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)  # the same: torch.func's vmap has one list of their dimensions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mask, *inputs, y, c, saved = ctx.saved_tensors
        options = replace(ctx.options, need=ctx.needs_input_grad[2:])
        again = options.save == "states" and reference.get(options.cell).saves
        kept = (y, c, None if again else saved)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return None, None, *SeqcellsGradients.apply(options, mask, *kept, *inputs, *grads[:-3])
        with _range(options, "backward"):
            return None, None, *_gradients(options, tuple(inputs), mask, kept, grads[:-3])


class SeqcellsScan(SeqcellsScanCompiled):
    """SeqcellsScanCompiled with what torch.func and forward mode ask for, which torch.compile refuses to trace."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, _options: Any, _mask: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        mask, *inputs = ctx.saved_tensors[:8]
        present = [t is not None for t in inputs]
        run = reference_of(ctx.options, present, *masks.decode(mask))
        pairs = [(t, d) for t, d in zip(inputs, tangents, strict=True) if t is not None]
        found = _forward_mode(run, [t for t, _ in pairs], [d for _, d in pairs])
        return *found, None, None, None


class SeqcellsLayer(torch.autograd.Function):
    """A scan by an engine's `whole`, where no compiler, mode or transform sees it: options, mask; the 7 inputs.

    Gives what `_visible` gives.
    """

    @staticmethod
    def forward(ctx: Any, options: Options, mask: Tensor | None, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        shown, kept, ctx.more = ENGINES[options.engine].whole(options, options.save, inputs, mask)  # type: ignore[misc]
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(mask, *inputs, *kept)
        return shown

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mask, *inputs, y, c, saved = ctx.saved_tensors
        options, need = ctx.options, ctx.needs_input_grad[2:]
        kept = (y, c, saved if saved.dim() > 1 else None)
        # is_grads_batched=True: torch's older vmap, which runs backward as it is.
        if backends.transforming() or any(g is not None and is_legacy_batchedtensor(g) for g in grads):
            found = _gradients_by_reference(replace(options, need=need), tuple(inputs), mask, grads)
        elif torch.is_grad_enabled():  # create_graph=True
            found = SeqcellsGradients.apply(replace(options, need=need), mask, *kept, *inputs, *grads)
        else:
            back: Any = ENGINES[options.engine].whole_backward
            more, ctx.more = ctx.more, None  # a second backward can do without
            with _range(options, "backward"):
                found = back(options, tuple(inputs), mask, kept, grads, need, more)
        return None, None, *found


def unseen(engine: str, x: Tensor, others: Iterable[Tensor | None]) -> bool:
    """Whether the engine can do all by itself: nothing looks on, and all are tensors with values, no wrappers."""
    if backends.watched():
        return False
    plain = all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in (x, *others)) and x.device.type != "meta"
    return plain and ENGINES[engine].whole is not None and not backends.traced()


def apply(
    options: Options,
    x: Tensor,
    states: tuple[Tensor | None, ...],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """y [T, B, K*H], the final states [K, B, H] and, if options.cells, all cell states [T, B, K*H].

    w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H], states [K, B, H], x [T, B, I] or [T, B, K, I]; of one group
    also without their K. mask: see `masks`. Arguments are taken as checked.
    """
    h0, c0 = states if len(states) == 2 else (states[0], None)
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if torch.jit.is_tracing():  # a trace can hold operators, but no Function: it has no gradients
        wanted = False
    elif backends.transforming():  # within vmap requires_grad does not show, nor does a tangent ever
        wanted = torch.is_grad_enabled() or forward_ad._current_level >= 0
    with _range(options, "forward"):
        if options.whole:
            given = (options, "states" if options.cells else "none", inputs, mask)
            whole: Any = ENGINES[options.engine].whole
            shown = SeqcellsLayer.apply(options, mask, *inputs) if wanted else whole(*given)[0]
        elif wanted:
            function = SeqcellsScanCompiled if torch.compiler.is_compiling() else SeqcellsScan
            shown = function.apply(options, mask, *inputs)[:-3]
        else:
            save = "states" if options.cells else "none"
            shown = _visible(options, _run(options, save, inputs, mask), inputs, mask)
    if not options.cells:
        return shown[0], shown[1:], None
    return shown[0], shown[1:-1], shown[-1]

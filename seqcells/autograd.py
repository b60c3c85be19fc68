"""The autograd.Function of a scan: what every engine's forward and backward over time have around them.

An engine walks the steps (the Triton kernels in `ops`, torch operations in `loop`). Here is the rest, in ordinary
tensor operations that a compiler and torch.func see through: the input projection of all steps and the weight
gradients, one large product each; second derivatives and forward mode, through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from . import backends, masks, products, reference
from .kernels.buffers import outputs
from .products import Places, places


class Engine(NamedTuple):
    """What walks the steps. Shapes: kernels.buffers; P trained vectors, products in the kernels' order.

    forward(gx [T, B, K, G*H], u [K, products*H, H], bias [K, apart*H], h0 [K, B, H], c0 [K, B, (S-1)*H], mask, cell,
    save, reversed, schedule, precision, params [K, P*H]) -> y, c, saved, hn, cn
    backward(dy, dhn, dcn, dcs, u, y, c, saved, mask, cell, reversed, schedule, precision, params) -> dgx, dhu, m, dh0,
    dc0, dparams
    recompute(gx, u, bias, y, c, mask, cell, reversed, schedule, params) -> saved
    single(x [B, I], w_ih, w_hh, b_ih, b_hh, h0, c0 [B, .], cell, save, schedule, precision, input_precision, params
    [P*H]) -> as forward, but hn, cn [B, .]: one step and its input's product together, of weights in the cell's order;
    None where there is none
    whole(options, save, the 9 inputs, mask) -> what `_visible` gives, the three tensors `kept`, and `more`
    whole_backward(options, the 9 inputs, mask, kept, the outputs' gradients, need, more or None) -> the 9 gradients
    Both, or None: a layer from its input to all gradients, where nothing looks on
    exact: whether it takes gx, bias and params in float32 where the rest is of half precision
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    recompute: Callable[..., Any] = tuple
    single: Callable[..., Any] | None = None
    whole: Callable[..., Any] | None = None
    whole_backward: Callable[..., Any] | None = None
    exact: bool = False


ENGINES: dict[str, Engine] = {}


@dataclass(frozen=True)
class Options:
    """What a scan is told beside its tensors. cell: its key. reversed: bits, see kernels.buffers. states: also give
    the states but the first after each step.

    single: the precision of the input's product in one step by the engine's `single`; "" is a scan. whole: by its
    `whole`.
    need: of a scan's gradients, which of the 9 are wanted. Not a tuple: torch.func takes those apart.
    """

    engine: str
    cell: str
    save: str = "gates"
    reversed: int = 0
    schedule: str = ""
    precision: str = "ieee"
    states: bool = False
    single: str = ""
    whole: bool = False
    need: tuple[bool, ...] = ()
    traced: bool = False
    notes: Any = field(default=None, compare=False)


def _projection(
    engine: Engine, at: Places, x: Tensor, weights: Sequence[Tensor | None], H: int, inputs: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`products.input_projection` of w_ih, b_ih, b_hh, as the engine wants it."""
    if engine.exact and x.dtype.itemsize < 4:
        x, inputs = x.float(), None if inputs is None else inputs.float()
        weights = [None if t is None else t.float() for t in weights]
    w_ih, b_ih, b_hh = weights
    assert w_ih is not None
    return products.input_projection(at, x, w_ih, b_ih, b_hh, H, inputs)


def _grouped(*tensors: Tensor | None) -> list[Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh, params of groups as they are; of one group without an axis for it, with one."""
    w_ih = tensors[0]
    assert w_ih is not None
    return list(tensors) if w_ih.dim() == 3 else [None if t is None else t[None] for t in tensors]


def _params(engine: Engine, params: Tensor | None) -> tuple[Tensor, ...]:
    """The engine's last argument, where there is one."""
    if params is None:
        return ()
    return (params.float() if engine.exact and params.dtype.itemsize < 4 else params,)


def _range(options: Options, direction: str) -> Any:
    """A range of the profiler that says what runs, if one is on."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(f"seqcells {options.cell} {direction} ({options.engine})")


def _run(options: Options, save: str, inputs: tuple[Tensor | None, ...], mask: Tensor | None) -> tuple[Tensor, ...]:
    """What the engine's forward gives for `apply`'s arguments."""
    if options.engine == "loop":
        shown, kept = ENGINES["loop"].forward(options, save, inputs, mask)
        return *shown, *kept
    x, h0, c0, *weights, extra = inputs
    at, engine = places(options.cell), ENGINES[options.engine]
    assert x is not None
    if options.single and engine.single is not None:
        h0, c0 = (None if s is None else s.reshape(s.shape[-2:]) for s in (h0, c0))
        *own, params = weights
        given = (options.cell, save, options.schedule, options.precision, options.single, *_params(engine, params))
        return engine.single(x[0], *own, h0, c0, *given)
    w_ih, w_hh, b_ih, b_hh, params = _grouped(*weights)
    assert w_ih is not None
    H = products.hidden_size(at, w_ih, w_hh, h0, c0)
    gx, bias = _projection(engine, at, x, (w_ih, b_ih, b_hh), H, extra)
    K, B = gx.shape[2], gx.shape[1]
    h0, c0 = (None if s is None else s.reshape(K, B, s.shape[-1]) for s in (h0, c0))
    how = (options.cell, save, options.reversed, options.schedule, options.precision, *_params(engine, params))
    return engine.forward(gx, products.recurrent(at, w_hh, w_ih, H), bias, h0, c0, mask, *how)


def _visible(
    options: Options, out: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], mask: Tensor | None
) -> tuple[Tensor, ...]:
    """y [T, B, K*H]; the final first state [K, B, H] (not of a cell whose first state is an output of its own); the
    final others [K, B, (S-1)*H], if there are; and, if asked for, those after each step [T, B, K*(S-1)*H]."""
    if options.engine == "loop":
        return out[:-3]
    y, c, _, hn, cn = out
    finals = _finals(places(options.cell), hn, cn)
    if options.single:
        return hn[None], *finals
    every = [y, c] if options.states else [y]
    shown = [outputs(s, options.reversed) for s in every]
    ended = None if mask is None else masks.held(mask)
    if ended is not None and options.reversed and any(s is not None for s in inputs[1:3]):
        # A reversed group waits in its given start, which its buffer holds, until its row begins.
        shown = [s.masked_fill(ended[..., None, None], 0) for s in shown]
    return shown[0].flatten(2), *finals, *(s.flatten(2) for s in shown[1:])


def _finals(at: Places, first: Any, others: Any) -> tuple[Any, ...]:
    """Those of the two that users see."""
    return (others,) if at.output else (first, others)[: at.states]


def _gradients(
    options: Options,
    inputs: tuple[Tensor | None, ...],
    mask: Tensor | None,
    kept: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs, in their shapes, through the engine."""
    name, reversed, need = options.cell, options.reversed, options.need
    if options.engine == "loop":
        return ENGINES["loop"].backward(options, inputs, mask, kept, grads, need)
    x, _, _, *weights, extra = inputs
    y, c, saved = kept
    w_ih, w_hh, b_ih, b_hh, params = _grouped(*weights)
    assert x is not None and y is not None and c is not None and w_ih is not None
    at, walker = places(name), ENGINES[options.engine]
    K, H = y.shape[2:]
    u, more = products.recurrent(at, w_hh, w_ih, H), _params(walker, params)
    if saved is None:
        gx, bias = _projection(walker, at, x, (w_ih, b_ih, b_hh), H, extra)
        saved = walker.recompute(gx, u, bias, y, c, mask, name, reversed, options.schedule, *more)
    dy, dhn, dcn, dcs = _of_outputs(at, grads)
    dy, dcs = (None if d is None else d.reshape(*d.shape[:2], K, -1) for d in (dy, dcs))
    if options.single:  # whose states have no axis of groups
        dhn, dcn = (None if d is None else d[None] for d in (dhn, dcn))
    how = (name, reversed, options.schedule, options.precision, *more)
    dgx, dhu, m, dh0, dc0, *rest = walker.backward(dy, dhn, dcn, dcs, u, y, c, saved, mask, *how)
    dparams = rest[0].to(x.dtype) if rest and rest[0].numel() else None
    dx, dw_ih, dinputs = products.input_gradients(at, dgx, x, w_ih, (need[0], need[3], need[8]))
    dw_hh = db_ih = db_hh = None
    if need[4]:
        each = [products.recurrent_gradient(at, dgx, dhu, m, y, c, mask, reversed, k) for k in range(K)]
        dw_hh = each[0] if K == 1 else torch.stack(each)
    if need[5] or need[6]:
        db_ih, db_hh = products.bias_gradients(at, dgx, dhu, H)
    found = [dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dparams, dinputs]
    # In the shapes the inputs had; the optional ones answer with None where they were None.
    return tuple(
        g.reshape(t.shape) if n and g is not None and t is not None else None
        for g, t, n in zip(found, inputs, need, strict=True)
    )


def _of_outputs(at: Places, grads: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """dy, dhn, dcn, dcs of the gradients of what `_visible` gives."""
    dy, *rest = grads
    dhn = None if at.output else rest.pop(0)
    return dy, dhn, *(*rest, None, None)[:2]


def reference_of(
    options: Options, present: list[bool], resets: Tensor | None, lengths: Tensor | None
) -> Callable[..., tuple[Tensor, ...]]:
    """The scan as a function of its present tensors among the 9, differentiable any number of times: what `_visible`
    gives."""
    at, step = places(options.cell), reference.step_of(options.cell)
    S = at.states

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs = (next(rest) if p else None for p in present)
        assert x is not None and w_ih is not None
        H = products.hidden_size(at, w_ih, w_hh, h0, c0)
        K = w_ih.shape[0] if w_ih.dim() == 3 else 1
        zero = x.new_zeros(K, x.shape[1], H)
        starts = [zero if h0 is None else h0]
        if S > 1:
            starts += [zero] * (S - 1) if c0 is None else c0.split(H, -1)
        how: Any = {"resets": resets, "lengths": lengths, "reversed": options.reversed}
        if params is not None:
            how["params"] = params.split(H, -1)
        if inputs is not None:
            how["inputs"] = inputs.split(H, -1)
        weights = (w_ih, w_hh, b_ih, b_hh)
        every, final = reference.scan_groups(step, x, tuple(starts[at.output :]), *weights, **how)
        if options.single:
            final = tuple(s[0] for s in final)
        if S > 1:
            final = (*final[: 1 - at.output], side_by_side(final[1 - at.output :], -1))
        if not options.states:
            return every[0], *final
        others = [s.reshape(*s.shape[:2], K, H) for s in every[1:]]
        return every[0], *final, side_by_side(others, -1).flatten(2)

    return run


def side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Joined along an axis; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


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

    options, mask, y, c, saved; the 9 inputs; the gradients of the outputs (None: zero). Gives 9.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(options: Options, mask: Any, y: Any, c: Any, saved: Any, *rest: Any) -> Any:
        return _gradients(options, rest[:9], mask, (y, c, saved), rest[9:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, mask, _, _, _, *rest = inputs
        ctx.save_for_backward(mask, *rest)
        ctx.save_for_forward(mask, *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _function(ctx: Any) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[bool]]:
        """The gradients as a function, its arguments, and which of the 9 it gives."""
        mask, *rest = ctx.saved_tensors
        present = [t is not None for t in rest[:9]]
        wanted = [n for n, p in zip(ctx.options.need, present, strict=True) if p]
        run = reference_of(ctx.options, present, *masks.decode(mask))
        primals = [t for t in rest if t is not None]
        given = [n and p for n, p in zip(ctx.options.need, present, strict=True)]
        return _gradients_of(run, wanted, [g is not None for g in rest[9:]]), primals, given

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
    """options, mask; the 9 inputs (see `_gradients`), to what `_visible` gives, then y, c and saved for backward."""

    @staticmethod
    def forward(options: Options, mask: Any, *inputs: Any) -> Any:
        out = _run(options, options.save, inputs, mask)
        shown = _visible(options, out, inputs, mask)
        # Views of other outputs have no tangents in forward mode, and may not be changed in place, as torch's own
        # outputs on the CPU may. The kernels' stay views, for speed: cuDNN's may not be changed either.
        if options.engine == "loop":
            return *shown, *out[-3:]
        if forward_ad._current_level >= 0:
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
        again = options.save == "states" and places(options.cell).saved
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
        mask, *inputs = ctx.saved_tensors[:10]
        present = [t is not None for t in inputs]
        run = reference_of(ctx.options, present, *masks.decode(mask))
        pairs = [(t, d) for t, d in zip(inputs, tangents, strict=True) if t is not None]
        found = _forward_mode(run, [t for t, _ in pairs], [d for _, d in pairs])
        return *found, None, None, None


class SeqcellsLayer(torch.autograd.Function):
    """A scan by an engine's `whole`, where no compiler, mode or transform sees it: options, mask; the 9 inputs.

    Gives what `_visible` gives.
    """

    @staticmethod
    def forward(ctx: Any, options: Options, mask: Tensor | None, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        options = replace(options, notes={})
        shown, kept = ENGINES["loop"].forward(options, options.save, inputs, mask)
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
            with _range(options, "backward"):
                found = ENGINES["loop"].backward(options, tuple(inputs), mask, kept, grads, need)
        return None, None, *found


def unseen(engine: str, x: Tensor, others: Iterable[Tensor | None]) -> bool:
    """Whether the engine can do all by itself: nothing looks on, and all are tensors with values, no wrappers."""
    if backends.watched():
        return False
    plain = all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in (x, *others)) and x.device.type != "meta"
    return plain and engine == "loop" and not backends.traced()


def apply(
    options: Options,
    x: Tensor,
    states: tuple[Tensor | None, ...],
    weights: Sequence[Tensor | None],
    params: Tensor | None,
    inputs: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """y [T, B, K*H], the final states [K, B, H] and, if options.states, the states after each step [T, B, K*H].

    x [T, B, I] or [T, B, K, I]; states [K, B, H]; weights: w_ih [K, Gx*H, I], w_hh [K, Gu*H, H], b_ih, b_hh [K, .];
    params [K, P*H]; of one group also without their K. inputs [T, B, N*H]. mask: see `masks`. Arguments are taken as
    checked.
    """
    at = places(options.cell)
    S = at.states
    if S == 1 or (S == 2 and not at.output):
        h0, c0 = states if S == 2 else (*states, None)
    else:
        h0, c0 = None if at.output else states[0], _joined(states[1 - at.output :])
    given = (x, h0, c0, *weights, params, inputs)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if torch.jit.is_tracing():  # a trace can hold operators, but no Function: it has no gradients
        wanted = False
    elif backends.transforming():  # within vmap requires_grad does not show, nor does a tangent ever
        wanted = torch.is_grad_enabled() or forward_ad._current_level >= 0
    options = replace(options, traced=not options.whole)
    with _range(options, "forward"):
        if options.whole:
            save = "states" if options.states else "none"
            forward: Any = ENGINES["loop"].forward
            shown = SeqcellsLayer.apply(options, mask, *given) if wanted else forward(options, save, given, mask)[0]
        elif wanted:
            function = SeqcellsScanCompiled if torch.compiler.is_compiling() else SeqcellsScan
            shown = function.apply(options, mask, *given)[:-3]
        else:
            save = "states" if options.states else "none"
            shown = _visible(options, _run(options, save, given, mask), given, mask)
    y, *finals = shown
    every = (finals.pop(),) if options.states else None
    if S <= 2:
        return y, tuple(finals), None if every is None else (y, *every)[at.output :]
    H = finals[-1].shape[-1] // (S - 1)
    others = finals.pop().split(H, -1)
    if every is not None:
        each = every[0].reshape(*y.shape[:2], y.shape[2] // H, S - 1, H).unbind(3)
        every = (*(() if at.output else (y,)), *(s.flatten(2) for s in each))
    return y, (*finals, *others), every


def _joined(states: Sequence[Tensor | None]) -> Tensor | None:
    """States [K, B, H] (or [B, H]) beside one another; None if all are."""
    some = next((s for s in states if s is not None), None)
    if some is None:
        return None
    return side_by_side([some.new_zeros(some.shape) if s is None else s.reshape(some.shape) for s in states], -1)

"""The autograd.Function of a scan, around the engines that run the steps.

First derivatives are the engine's. Second derivatives and forward mode differentiate the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from . import backends, drawn, masks, products, reference
from .cell import get
from .products import places

if TYPE_CHECKING:
    from .dispatch import Call, Case

T = TypeVar("T")
Tensors = tuple["Tensor | None", ...]


class Engine(NamedTuple):
    """An engine, which runs the steps. P trained vectors, N per-step inputs, S states; other sizes as in
    `functional.scan`. If options.traced, forward calls an operator, and backward is not called (see
    `engines.operators`).

    forward(options, save, inputs, mask) -> outputs, buffers
        save: "gates", "states" (backward recomputes the gates) or "none" (there is no backward). inputs, 10 tensors: x
        [T, B, I] or [T, B, K, I], h0 [K, B, H], c0 [K, B, (S-1)*H], w_ih [K, Gx*H, I], w_hh [K, Gu*H, H], b_ih and b_hh
        [K, .], params [K, P*H], inputs [T, B, N*H], dropout (see `drawn`). With one group, K may be left out. None for
        a tensor that the cell lacks, and for states that are zero. outputs: y [T, B, K*H]; the final first state [K, B,
        H] (not if the cell's first state is an output that no step reads); the other final states [K, B, (S-1)*H], if
        there are any; and, if options.states, the other states after each step [T, B, K*(S-1)*H]. buffers: three
        tensors that backward needs; None for one that it recomputes.
    backward(options, inputs, mask, buffers, grads, need) -> the gradients of the first 9 inputs, in any shapes
        grads: those of y [T, B, K, H], of the final first state, of the other final states, and of the other states
        after each step [T, B, K, (S-1)*H]; None means zero. need: which gradients are wanted; the others may be None.
    scan, scan_backward, allocate: what the operators call. All tensors have the axis K, and the buffers' shapes do not
    depend on values.
    scan(options, save, inputs, mask) -> y [., B, K, H] and c [., B, K, (S-1)*H], the states in the order of time; what
        is saved; the final states [K, B, H] and [K, B, (S-1)*H]
    scan_backward(options, inputs, mask, buffers, grads, need, samples) -> as backward; with more than one sample, an
        equal part of the B rows each, the gradients of weights are [samples, K, .]
    allocate(options, save, inputs) -> the results of scan, uninitialised
    """

    forward: Callable[..., tuple[tuple[Tensor, ...], Tensors]]
    backward: Callable[..., Tensors]
    scan: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    scan_backward: Callable[..., Tensors]
    allocate: Callable[..., tuple[Tensor, ...]]


ENGINES: dict[str, Engine] = {}


@dataclass(frozen=True)
class Options:
    """What describes a scan besides its tensors. cell: its key. reversed: bits, see kernels.buffers. states: also
    return the states except the first after each step.

    single: "" for a scan; for one step in one launch, the precision of the input's product. traced: a compiler, a
    tracer, a transform or a mode is active, so the engine must use its operators. notes: where an engine's forward
    stores non-tensors for its backward, which must be able to do without them. layers: of a stack (see `stacked`).
    """

    engine: str
    cell: str
    save: str = "gates"
    reversed: int = 0
    schedule: str = ""
    precision: str = "ieee"
    states: bool = False
    single: str = ""
    traced: bool = False
    notes: Any = field(default=None, compare=False)  # as that engine likes
    layers: int = 1


_NO_RANGE = nullcontext()


def _range(options: Options, direction: str) -> AbstractContextManager[object]:
    """A profiler range that names the scan, if a profiler is active."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _NO_RANGE
    return torch.profiler.record_function(f"seqcells {options.cell} {direction} ({options.engine})")


def reference_of(
    options: Options, present: list[bool], resets: Tensor | None, lengths: Tensor | None
) -> Callable[..., tuple[Tensor, ...]]:
    """The scan by the reference: a function from those of the 10 tensors that are not None to the outputs.

    It is differentiable any number of times.
    """
    cell = get(options.cell)
    at, step = places(options.cell), reference.step_of(drawn.explicit(cell) if cell.drawn else cell)
    S = at.states

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs, dropout = (next(rest) if p else None for p in present)
        assert x is not None and w_ih is not None
        H = products.hidden_size(at, w_ih, w_hh, h0, c0)
        K = w_ih.shape[0] if w_ih.dim() == 3 else 1
        if dropout is not None:
            inputs = drawn.given(cell, inputs, dropout, (*x.shape[:2], K, H), x.dtype)
        zero = x.new_zeros(K, x.shape[1], H)
        starts = [zero if h0 is None else h0]
        if S > 1:
            starts += [zero] * (S - 1) if c0 is None else c0.split(H, -1)
        every, final = reference.scan_groups(
            step,
            x,
            tuple(starts[at.output :]),
            *(w_ih, w_hh, b_ih, b_hh),
            params=() if params is None else params.split(H, -1),
            inputs=() if inputs is None else inputs.split(H, -1),
            resets=resets,
            lengths=lengths,
            reversed=options.reversed,
        )
        if options.single:
            final = tuple(s[0] for s in final)
        if S > 1:
            final = (*final[: 1 - at.output], side_by_side(final[1 - at.output :], -1))
        if not options.states:
            return every[0], *final
        others = [s.reshape(*s.shape[:2], K, H) for s in every[1:]]
        return every[0], *final, side_by_side(others, -1).flatten(2)

    return run


def grouped(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The 10 inputs with an axis of groups, which is added if it was left out: states [K, B, .] and weights [K, .]."""
    x, h0, c0, *weights, extra, dropout = inputs
    assert x is not None and weights[0] is not None
    if weights[0].dim() == 2:
        weights = [None if t is None else t[None] for t in weights]
    assert weights[0] is not None
    K, B = weights[0].shape[0], x.shape[1]
    h0, c0 = (s if s is None or s.dim() == 3 else s.reshape(K, B, s.shape[-1]) for s in (h0, c0))
    return [x, h0, c0, *weights, extra, dropout]


def of_outputs(options: Options, K: int, grads: Tensors) -> Tensors:
    """The gradients that an engine's backward takes, from those of its forward's outputs."""
    # Without pop: torch 2.11's compiler takes the list of a star for a tuple.
    dy, dhn, dcn, dcs = (*grads, None, None, None)[:4]
    if places(options.cell).output:
        dhn, dcn, dcs = None, dhn, dcn
    dy, dcs = (None if d is None else d.reshape(*d.shape[:2], K, d.shape[2] // K) for d in (dy, dcs))
    if options.single:  # its final states have no axis of groups
        dhn, dcn = (None if d is None else d[None] for d in (dhn, dcn))
    return dy, dhn, dcn, dcs


def side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate tensors along an axis; a single one is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


def vjp(run: Callable[..., T], *primals: object) -> tuple[T, Callable[..., Any]]:
    """run's outputs, and the function from their gradients to those of primals, nested as primals are."""
    found = torch.func.vjp(run, *primals)
    return found[0], found[1]


def _gradients_of(
    run: Callable[..., tuple[Tensor, ...]], wanted: list[bool], given: list[bool]
) -> Callable[..., tuple[Tensor, ...]]:
    """The wanted gradients of run's inputs, as a function of its inputs and of its outputs' gradients.

    given: which of these are arguments; the others are zero.
    """

    def first(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, back = vjp(run, *tensors[: len(wanted)])
        grads = iter(tensors[len(wanted) :])
        found = back(tuple(next(grads) if g else torch.zeros_like(o) for o, g in zip(out, given, strict=True)))
        return tuple(f for f, w in zip(found, wanted, strict=True) if w)

    return first


def _forward_mode(
    run: Callable[..., tuple[Tensor, ...]], primals: list[Tensor], tangents: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """The derivative of run along tangents (None: zero), by applying backward mode twice. Backward is linear in the
    outputs' gradients, and its gradient with respect to them is the forward derivative."""
    out, back = vjp(run, *primals)
    _, forth = vjp(back, tuple(torch.zeros_like(o) for o in out))
    return forth(tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)))[0]


@dataclass(frozen=True)
class Scan:
    """What the Function computes: the engine's outputs and buffers, from mask and the inputs, which are 10."""

    options: Options

    def forward(self, save: str, inputs: Tensors, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensors]:
        return ENGINES[self.options.engine].forward(self.options, save, inputs, mask)

    def reference(self, present: list[bool], mask: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
        return reference_of(self.options, present, *masks.decode(mask))

    def gradients(self, need: tuple[bool, ...]) -> Gradients:
        return Gradients(self, need)

    def run(self, mask: Tensor | None, *inputs: Tensor | None) -> Tensors:
        outputs, buffers = self.forward(self.options.save, inputs, mask)
        if forward_ad._current_level >= 0:  # an output that is a view of another one has no tangent
            outputs = tuple(o.clone() for o in outputs)
        return *outputs, *buffers

    def saved(self, tensors: Tensors, output: Tensors) -> tuple[Tensors, Tensors]:
        """What is saved for backward, and which outputs are not differentiable."""
        return (*tensors, *output[-3:]), output[-3:]

    def backward(self, saved: Tensors, need: tuple[bool, ...], grads: Tensors) -> Tensors:
        mask, *inputs, y, c, gates = saved
        options, need, grads = self.options, need[1:], grads[:-3]
        again = options.save == "states" and places(options.cell).saved
        first = self.gradients(need)
        rest = (mask, y, c, None if again else gates, *inputs, *grads)
        if not torch.compiler.is_compiling():
            batched = any(g is not None and is_legacy_batchedtensor(g) for g in grads)  # is_grads_batched=True
            if batched or (not options.traced and backends.transforming()):
                return None, *first.by_reference(rest)
            if torch.is_grad_enabled():  # create_graph=True
                return None, *SeqcellsScan.apply(first, *rest)
        with _range(options, "backward"):
            return None, *first.run(*rest)

    def jvp(self, saved: Tensors, tangents: Tensors) -> Tensors:
        mask, *inputs = saved[:-3]
        run = self.reference([t is not None for t in inputs], mask)
        pairs = [(t, d) for t, d in zip(inputs, tangents[1:], strict=True) if t is not None]
        return *_forward_mode(run, [t for t, _ in pairs], [d for _, d in pairs]), None, None, None


@dataclass(frozen=True)
class Gradients:
    """The gradients of a Scan, from mask, buffers, its inputs and the outputs' gradients. need: of which inputs.

    Their own derivatives are those of the reference.
    """

    scan: Scan
    need: tuple[bool, ...]

    def backward_of(self, inputs: Tensors, mask: Tensor | None, buffers: Tensors, grads: Tensors) -> Tensors:
        options, w_ih = self.scan.options, inputs[3]
        assert w_ih is not None
        grads = of_outputs(options, 1 if w_ih.dim() == 2 else w_ih.shape[0], grads)
        if options.traced:
            facts = (options.engine, options.cell, options.reversed, options.schedule, options.precision)
            back = torch.ops.seqcells.scan_backward
            return *back(*grads, *grouped(inputs), mask, *buffers, *facts, list(self.need[:9]), 1), None
        return *ENGINES[options.engine].backward(options, inputs, mask, buffers, grads, self.need), None

    def run(self, mask: Tensor | None, *tensors: Tensor | None) -> Tensors:
        end = 3 + len(self.need)
        inputs = tensors[3:end]
        gradients = self.backward_of(inputs, mask, tensors[:3], tensors[end:])
        return tuple(
            d.reshape(t.shape) if n and d is not None and t is not None else None
            for d, t, n in zip(gradients, inputs, self.need, strict=True)
        )

    def saved(self, tensors: Tensors, output: Tensors) -> tuple[Tensors, Tensors]:
        return (tensors[0], *tensors[4:]), ()

    def function(
        self, mask: Tensor | None, tensors: Tensors
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[bool]]:
        """The gradients as a function of the tensors (inputs and gradients) that are not None; these tensors; and which
        of the gradients the function returns."""
        count = len(self.need)
        present = [t is not None for t in tensors[:count]]
        run = self.scan.reference(present, mask)
        wanted = [n for n, p in zip(self.need, present, strict=True) if p]
        found = [n and p for n, p in zip(self.need, present, strict=True)]
        gradients = _gradients_of(run, wanted, [g is not None for g in tensors[count:]])
        return gradients, [t for t in tensors if t is not None], found

    def by_reference(self, tensors: Tensors) -> Tensors:
        """What `run` returns, in operations that can be transformed."""
        gradients, primals, given = self.function(tensors[0], tensors[4:])
        found = iter(gradients(*primals))
        return tuple(next(found) if g else None for g in given)

    def backward(self, saved: Tensors, need: tuple[bool, ...], grads: Tensors) -> Tensors:
        gradients, primals, given = self.function(saved[0], saved[1:])
        values, back = vjp(gradients, *primals)
        weights = [g for g, there in zip(grads, given, strict=True) if there]
        found = iter(back(tuple(torch.zeros_like(v) if w is None else w for v, w in zip(values, weights, strict=True))))
        return *(None,) * 4, *(next(found) if t is not None else None for t in saved[1:])

    def jvp(self, saved: Tensors, tangents: Tensors) -> Tensors:
        gradients, primals, given = self.function(saved[0], saved[1:])
        along = [d for t, d in zip(saved[1:], tangents[4:], strict=True) if t is not None]
        found = iter(_forward_mode(gradients, primals, along))
        return tuple(next(found) if g else None for g in given)


# A profile shows the names of these classes.


class SeqcellsScanCompiled(torch.autograd.Function):
    """Applies a Scan or its Gradients, the first argument, to the tensors of its `run`."""

    @staticmethod
    def forward(operation: Scan | Gradients, *tensors: Tensor | None) -> Tensors:
        return operation.run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:  # ctx has attributes of ours
        operation, *tensors = inputs
        saved, constant = operation.saved(tuple(tensors), output)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        ctx.operation = operation
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)  # the same list, since torch.func's vmap has one list of batch dims for both

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:  # ctx: as above
        return None, *ctx.operation.backward(ctx.saved_tensors, ctx.needs_input_grad[1:], grads)


class SeqcellsScan(SeqcellsScanCompiled):
    """SeqcellsScanCompiled with the methods for torch.func and forward mode, which torch.compile refuses to trace."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, _: object, *tangents: Tensor | None) -> Tensors:  # ctx: as above
        return ctx.operation.jvp(ctx.saved_tensors, tangents)


def apply(
    options: Options,
    case: Case,
    call: Call,
    weights: Sequence[Tensor | None],
    params: Tensor | None,
    dropout: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """y [T, B, K*H], the final states [K, B, H] and, if options.states, the states after each step [T, B, K*H].

    weights: w_ih [K, Gx*H, I], w_hh [K, Gu*H, H], b_ih, b_hh [K, .]; params [K, P*H]. With one group, K may be left
    out. Arguments are not checked here.
    """
    at = places(options.cell)
    inputs = (call.x, *starts(at, call.states), *weights, params, call.inputs, dropout)
    return results(options, outputs_of(Scan(options), case, inputs, call.mask))


def outputs_of(scan: Scan, case: Case, inputs: Tensors, mask: Tensor | None) -> tuple[Tensor, ...]:
    """A scan's outputs, by the Function if gradients are wanted."""
    options = scan.options
    if case.jit:  # a trace can contain operators but no autograd.Function, so it has no gradients
        wanted = False
    elif case.transforming:  # under vmap requires_grad is not visible, and a tangent never is
        wanted = torch.is_grad_enabled() or forward_ad._current_level >= 0
    else:
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    with _range(options, "forward"):
        if wanted:
            function = SeqcellsScanCompiled if case.compiling else SeqcellsScan
            run = function.apply
            if not (case.compiling or case.transforming):
                # Function.apply without its search for default arguments, which takes longer than a step.
                run = super(torch.autograd.Function, function).apply
            return run(scan, mask, *inputs)[:-3]
        return scan.forward("states" if options.states else "none", inputs, mask)[0]


def results(
    options: Options, outputs: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """The results of `apply`, from a scan's outputs."""
    at = places(options.cell)
    S = at.states
    y, end = outputs[0], len(outputs) - bool(options.states)
    finals, every = outputs[1:end], outputs[end:] if options.states else None
    if S <= 2:
        return y, tuple(finals), None if every is None else (y, *every)[at.output :]
    H = finals[-1].shape[-1] // (S - 1)
    finals, others = finals[:-1], finals[-1].split(H, -1)
    if every is not None:
        each = every[0].reshape(*y.shape[:2], y.shape[2] // H, S - 1, H).unbind(3)
        every = (*(() if at.output else (y,)), *(s.flatten(2) for s in each))
    return y, (*finals, *others), every


def starts(at: products.Places, states: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """h0, and c0: the other states side by side."""
    if at.states == 1 or (at.states == 2 and not at.output):
        return (states[0], states[1]) if at.states == 2 else (states[0], None)
    return None if at.output else states[0], _joined(states[1 - at.output :])


def _joined(states: Sequence[Tensor | None]) -> Tensor | None:
    """States [K, B, H] (or [B, H]) concatenated along H; None if all are None."""
    some = next((s for s in states if s is not None), None)
    if some is None:
        return None
    return side_by_side([some.new_zeros(some.shape) if s is None else s.reshape(some.shape) for s in states], -1)

"""Which engine runs a call: `Case` holds the facts about it, gathered once; `choose` is the one table of rules.

`execute` then does what was chosen. Shapes: x [T, B, I]; states [B, H]; weights and biases of G*H rows;
resets bool [T, B]; lengths int [B].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, backends, chosen, drawn, fallback, flops, masks, measured, precisions, projection, reference
from .cell import Cell, constant_to_compilers
from .engines import aten, reset_steps, triton

if TYPE_CHECKING:
    from .recurrent import Recurrent

KERNEL_DEVICES = ("cuda",)  # where "auto" uses the kernels
_TENSORS = (Tensor, torch.nn.Parameter)


class ScanOptions(NamedTuple):
    """The options of `functional.scan`, as modules pass them on.

    reverse: for each group, whether it runs from the last step to the first. all_states: also return the states after
    each step. padded: x is already zero at padding, as after packing and in the layers above the first. one_step: a
    cell's call, x [1, B, I], for which aten and triton have kernels of their own. dropout: see `drawn`.
    """

    resets: Tensor | None = None
    lengths: Tensor | None = None
    reverse: tuple[bool, ...] = (False,)
    save: str = "gates"
    backend: str | None = None
    precision: str | None = None
    all_states: bool = False
    padded: bool = False
    one_step: bool = False
    dropout: Tensor | None = None


class Case(NamedTuple):
    """The facts about one call.

    steps, batch: None if a compiler does not know them. grad: gradients are wanted. real: the share of rows that are
    not padding. onednn: oneDNN's LSTM supports such an input. plain: all tensors are exactly torch.Tensor, with values.
    exporting: to a program that can contain torch's own layers. observed: a TorchDispatchMode is active. traced: an
    engine must use its operators, because tensors have no values or because the operators are recorded. problem: why
    neither kernels nor a loop can be derived from the cell's step. refused: its kernels failed before (see `fallback`).
    projected: the size of a projection, 0 without one. heads: a layer has several; hidden_size is that of each. groups:
    its directions, times its heads. width: the number of the input's features. dropping: dropout between layers is on.
    """

    cell: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    steps: int | None = None
    batch: int | None = None
    grad: bool = True
    save: str = "gates"
    resets: bool = False
    lengths: bool = False
    packed: bool = False
    real: float = 1.0
    all_states: bool = False
    projected: int = 0
    one_step: bool = False
    empty: bool = False
    onednn: bool = False
    plain: bool = True
    compiling: bool = False
    exporting: bool = False
    onnx: bool = False
    jit: bool = False
    transforming: bool = False
    observed: bool = False
    traced: bool = False
    problem: str = ""
    refused: bool = False
    heads: bool = False
    groups: int = 1
    layers: int = 1
    precision: str | None = None
    width: int = 0
    dropping: bool = False


class Choice(NamedTuple):
    """What runs a call, and why. engine: triton, aten, loop or reference.

    schedule: for triton: "" is the plan's choice; "auto" is, too, but if it fails, another schedule or engine may run;
    "auto:grid": the same, but grid first; else the requested one. reset_steps: aten adds steps for resets and padding
    (see `engines.reset_steps`). stack: aten runs all layers of a module in one call.
    """

    engine: str
    schedule: str
    why: str
    reset_steps: bool = False
    stack: bool = False


class Call(NamedTuple):
    """The tensors of one scan, checked.

    x [T, B, I] or [T, B, K, I]; states [K, B, H], for one group also [B, H], None means zeros; groups: each group's
    w_ih, w_hh, b_ih, b_hh (and w_hr, for an LSTM with a projection); stacked: the same with an axis K, if such tensors
    exist already; params [K, P*H], for one group [P*H]; inputs [T, B, N*H] or [T, B, K, N*H]; mask: see `masks`.
    """

    x: Tensor
    states: tuple[Tensor | None, ...]
    groups: Sequence[aten.Weights]
    stacked: aten.Weights | None = None
    params: Tensor | None = None
    inputs: Tensor | None = None
    mask: Tensor | None = None


Result = tuple[Tensor, tuple[Tensor, ...], "tuple[Tensor, ...] | None"]


def survey(x: Tensor, tensors: Iterable[Tensor | None]) -> tuple[bool, bool]:
    """Whether any tensor of a call requires gradients, and whether all are exactly torch.Tensor, with values."""
    grad, plain = x.requires_grad, type(x) in _TENSORS and x.device.type != "meta"
    for t in tensors:
        if t is not None:
            grad, plain = grad or t.requires_grad, plain and type(t) in _TENSORS
    return grad, plain


def case_of(
    cell: Cell,
    x: Tensor,
    found: tuple[bool, bool],
    options: ScanOptions,
    hidden_size: int,
    *,
    packed: tuple[int, int] | None = None,
    kind: tuple[int, int, int, bool] = (0, 1, 1, False),
) -> Case:
    """The facts about a scan of x. found: see `survey`; packed: T and B of a PackedSequence whose data is x; kind: the
    size of the projection, the numbers of heads and of layers, and whether there is dropout between layers."""
    projected, heads, layers, dropping = kind
    key, device, dtype, (grad, plain), backend = cell.key, x.device, x.dtype, found, options.backend
    compiling = torch.compiler.is_compiling()
    transforming = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    jit, observed = torch.jit.is_tracing(), not compiling and torch._C._len_torch_dispatch_stack() > 0
    traced = compiling or jit or transforming or observed or not plain
    if backend is None:
        backend = chosen.backend if compiling else chosen.of_context() or chosen.backend
    shape = x.shape
    T, B = packed or shape[:2]
    exporting = onnx = False
    if compiling or jit or torch.compiler.is_exporting():
        onnx = torch.onnx.is_in_onnx_export()
        # torch.export needs to know the number of steps, as it does for torch.nn's.
        exporting = torch.compiler.is_exporting() and isinstance(T, int) and not torch.compiler.is_dynamo_compiling()
    # For one step, resets just zero the states before it: see `prepared`.
    resets = options.resets is not None and (compiling or jit or transforming or packed is not None or T != 1)
    onednn = (key, device.type, dtype) in aten.ONEDNN and x.dim() == (3 if packed is None else 2) and x.numel() > 0
    onednn = onednn and bool(torch.backends.mkldnn.enabled)
    real = 1.0
    if options.lengths is not None and not compiling and B > 0:
        if packed is not None:
            real = shape[0] / (T * B)
        elif onednn and plain and not (projected or transforming or jit):
            real = int(options.lengths.sum()) / (T * B)
    packs = packed is not None and type(x) is Tensor
    asked = (options.save, resets, options.lengths is not None, packs, real, options.all_states, projected)
    context = (compiling, onnx or exporting, onnx, jit, transforming, observed, traced)
    size = (hidden_size, *((None, None) if compiling else (T, B)), grad and torch.is_grad_enabled())
    problem = "" if key in backends.ATEN_CELLS else cell.problem  # those have kernels
    refused = bool(fallback.refused_kernels) and fallback.refused(device, key, dtype, hidden_size, grad)
    more = (heads > 1, heads * len(options.reverse), layers, options.precision, 0 if compiling else shape[-1], dropping)
    facts = (*size, *asked, options.one_step, B == 0, onednn, plain, *context, problem, refused, *more)
    return Case(key, backend, device, dtype, *facts)


# Measured by benchmarks/crossover.py, see benchmarks/results/crossover-cpu.md. With more than one thread, torch's own
# layers gain more than the loop.
_STEPS = {"rnn_tanh": 20, "rnn_relu": 20}  # with fewer steps, calling the loop costs more than its steps save
_OTHERS, _INFERENCE = 10, 96  # the same for the other cells; without gradients
_WORKSPACE = 1 << 20  # T*B*H above which oneDNN's workspace, 16 times as large, is allocated anew in every call
# B*H up to which oneDNN's LSTM with reset steps is faster than the loop, with gradients and without. With lengths, a
# quarter of it, because the loop skips padding; and never if less than this share of the rows is real.
_RESET_STEPS, _REAL = {True: 4096, False: 8192}, 0.5


def loop_pays(cell: str, size: tuple[int, int, int], grad: bool, onednn: bool, lengths: bool = False) -> bool:
    """Whether on the CPU the loop is faster than torch's own cell. size: T, B, H; lengths: torch's own would be packed.

    onednn: torch's own is oneDNN's LSTM.
    """
    steps, batch, hidden = size
    least = _STEPS.get(cell, _OTHERS)
    if lengths:
        return grad and steps >= 2 * least
    if onednn:
        large = batch >= 64 and steps * batch * hidden >= _WORKSPACE
        return grad and large and torch.get_num_threads() == 1
    if grad:
        return steps >= least
    return steps >= _INFERENCE and hidden >= 16 and torch.get_num_threads() == 1


def own_layers(module: Recurrent, x: Tensor, size: tuple[int, int], grad: bool) -> bool:
    """Whether torch's own runs all layers of a module: the first rule, asked before a Case is gathered.

    x, or a PackedSequence's data, has passed layer_arguments.plain; size: T, B. On the CPU, where nothing traces.
    """
    key, backend = module.cell.key, module.backend
    if not x.is_cpu or key not in backends.ATEN_CELLS or "cpu" in KERNEL_DEVICES or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return False
    drops = module.weight_dropout or module.recurrent_dropout or module.candidate_dropout
    if module.heads > 1 or module.zoneout or (drops and module.training):
        return False
    backend = backend or chosen.of_context() or chosen.backend
    if backend not in ("auto", "aten") or torch._C._len_torch_dispatch_stack() > 0:
        return False
    packed, H, grad = x.dim() == 2, module.hidden_size, grad and torch.is_grad_enabled()
    if measured.ON_CPU and backend == "auto":
        if measured.recorded():
            return False  # so that `choose` is asked
        of, both = (key, backend, x.device, x.dtype, H, *size, grad, module.save), module.bidirectional
        case = Case(*of, lengths=packed, projected=module.proj_size, groups=1 + both, layers=module.num_layers)
        if (found := measured.best(case, False)) is not None:
            return found[0] == "aten"
    if backend == "aten" or size[0] == 1 or module.proj_size:
        return True
    onednn = not packed and (key, "cpu", x.dtype) in aten.ONEDNN and bool(torch.backends.mkldnn.enabled)
    if onednn and size[0] * size[1] * H < _WORKSPACE:  # as loop_pays would say
        return True
    return not loop_pays(key, (*size, H), grad, onednn, packed)


def _looped(case: Case, lengths: bool) -> bool:
    """`loop_pays`; False where a compiler does not know the size."""
    if case.steps is None or case.batch is None or (case.projected and not lengths):
        return False
    size = (case.steps, case.batch, case.hidden_size)
    return loop_pays(case.cell, size, case.grad, case.onednn and not (case.resets or lengths), lengths)


def _reset_steps_fit(case: Case) -> bool:
    """Whether oneDNN's LSTM can run a case with resets or lengths, by reset steps."""
    if not case.onednn or case.all_states or case.projected or case.heads or not case.plain:
        return False
    if case.compiling or case.jit or case.transforming:
        return False
    # torch's own runs a packed batch, which is faster if it is short.
    return not case.packed or case.resets or case.steps is None or _looped(case, True)


def _reset_steps_pay(case: Case) -> bool:
    """Whether oneDNN's LSTM with reset steps is faster than the loop."""
    if case.steps is None or case.batch is None:
        return True
    most = _RESET_STEPS[case.grad] // (4 if case.lengths else 1)
    return case.save != "states" and case.real >= _REAL and case.batch * case.hidden_size <= most


def aten_lacks(case: Case, reset_steps: bool = False) -> str:
    """Why aten cannot run a case; "" if it can."""
    if case.cell not in backends.ATEN_CELLS:
        return f"torch has no fused {case.cell}"
    if case.heads:
        return "torch's fused RNNs have no heads"
    if case.all_states:
        return "torch's fused RNNs do not give all cell states"
    if case.projected and case.onnx:
        return "ONNX's LSTM has no projection"
    return "torch's fused RNNs have no resets" if case.resets and not reset_steps else ""


@constant_to_compilers
def _triton_lacks(device: torch.device, dtype: torch.dtype) -> str:
    """Why triton cannot run on that device and dtype; "" if it can."""
    if not backends.installed():
        return backends.NO_TRITON
    if dtype not in backends.TRITON_DTYPES:
        return f"the triton backend has no kernels for {dtype}: expected one of {backends.TRITON_DTYPES}"
    if device.type == "cuda" or (device.type == "cpu" and backends.interpreted()):
        return ""
    advice = "set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU (slow, for testing)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        advice = "TRITON_INTERPRET=1 was set after triton was imported: set it before Python starts"
    return f"the triton backend needs CUDA tensors, got tensors on {device}; {advice}"


def own_step(cell: str, backend: str | None, on_cpu: bool) -> bool:
    """Whether torch's own cell runs one step: the first rule, which a cell applies before it gathers a Case."""
    if not on_cpu or cell not in backends.ATEN_CELLS or (backend or chosen.backend) not in ("auto", "aten"):
        return False
    if measured.ON_CPU and not torch.compiler.is_compiling() and measured.recorded():
        return False  # so that `choose` is asked
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def choose(case: Case) -> Choice:
    """The engine for a case: the first rule that holds.

    Raises ModuleNotFoundError (no triton), RuntimeError (wrong device, or something a backend lacks), TypeError
    (dtype), ValueError (unknown backend).
    """
    name, schedule = case.backend, ""
    if name not in backends.NAMES:
        name, schedule = backends.parse(name)
    # 1. One step on the CPU, and where nothing but torch's own operators works.
    if case.one_step and own_step(case.cell, case.backend, case.device.type == "cpu"):
        asked = (
            "it was asked for" if name == "aten" else f"the tensors are on the CPU, and torch has a fused {case.cell}"
        )
        return Choice("aten", "", asked)
    if name != "aten" and case.compiling and case.transforming:
        return Choice("reference", "", "within torch.compile, torch.func has no vmap of a Function")
    # 2. The backend that was requested by name, or an error.
    if name == "triton":
        if lacking := _triton_lacks(case.device, case.dtype):
            if lacking == backends.NO_TRITON:
                raise ModuleNotFoundError(lacking)  # no name=: torch.compile cannot trace an exception's keywords
            raise (TypeError if case.dtype not in backends.TRITON_DTYPES else RuntimeError)(lacking)
        if case.empty:
            return Choice("reference", "", "it was asked for, but there are no rows")
        return Choice("triton", schedule, "it was asked for")
    reset_steps = (case.resets or case.lengths) and _reset_steps_fit(case)
    # torch.compile cannot trace torch's own layers, but torch.export can.
    stack = case.packed or not (case.lengths or (case.compiling and not case.exporting))
    stack = stack and not (reset_steps or case.resets or case.one_step)
    simple = case.cell in backends.ATEN_CELLS and not (case.resets or case.all_states or case.projected or case.heads)
    lacking = "" if simple else aten_lacks(case, reset_steps)
    if name == "aten":
        if lacking:
            raise backends.no_aten(lacking)
        return Choice("aten", "", "it was asked for", reset_steps, stack)
    if name != "auto":
        return Choice(name, "", "it was asked for")
    # 3. "auto": what was measured here; else on CUDA the kernels, where they run. No sizes are known at which cuDNN is
    # faster, but for one shape in float16 (benchmarks/results/gpu-h200.md).
    where = "the tensors are on the CPU"
    if case.device.type in KERNEL_DEVICES:
        problem = _triton_lacks(case.device, case.dtype)
        if case.onnx:
            problem = "ONNX has no operators for the kernels"
        if not problem and not case.refused and not case.problem and not case.empty:
            found = None if case.compiling else measured.best(case, True)
            engine, schedule, why = found or ("triton", "auto", "the tensors are on CUDA")
            return Choice(engine, schedule, why, stack=stack and engine == "aten")
        where = problem or "the kernels failed there (a RuntimeWarning said how)"
        if case.empty:
            where = "there are no rows"
        if case.problem:
            where = f"the tensors are on the {case.device.type.upper()}"
    elif case.device.type != "cpu":
        where = f"the tensors are on the {case.device.type.upper()}"
    elif not case.compiling and measured.ON_CPU and (found := measured.best(case, False)):
        return Choice(*found, stack=stack and found[0] == "aten")
    # 4. "auto" elsewhere: torch's own layer or the loop.
    engine, why = _without_kernels(case, reset_steps, lacking)
    own = engine == "aten"
    return Choice(engine, "", f"{where}, and {why}", reset_steps and own, stack and own)


def _without_kernels(case: Case, reset_steps: bool, lacking: str) -> tuple[str, str]:
    """What "auto" uses where the kernels do not run, and why. lacking: why it cannot use aten."""
    if case.problem:
        return "reference", f"from the step nothing else can be derived: {case.problem}"
    packed_only = "torch's own fused RNNs take lengths only packed" if case.lengths and not case.packed else ""
    if lacking or (packed_only and case.exporting):
        return "reference" if case.onnx else "loop", lacking or packed_only  # ONNX has no operators of our own
    own = f"torch's own fused {case.cell} runs there"
    if case.exporting:
        return "aten", "an exported program then needs no operator of our own"
    if case.jit or (case.one_step and not case.transforming):  # on another device than the CPU
        return "aten", own
    if case.transforming:
        return "loop", "torch.func and forward mode want operators that can be transformed"
    masked = case.resets or case.lengths
    onednn = case.onednn and not masked
    looped = not _reset_steps_pay(case) if reset_steps else _looped(case, case.lengths)
    if (reset_steps or onednn) and not looped:
        return "aten", "oneDNN's LSTM is the fastest there"
    if case.compiling:
        return "loop", "torch.compile would unroll torch's own for every length"
    if packed_only:
        return "loop", packed_only
    if looped and case.device.type == "cpu":
        return "loop", f"it is faster than torch's own fused {case.cell}"
    return "aten", own


def prepared(
    case: Case, choice: Choice, x: Tensor, states: tuple[Tensor | None, ...], options: ScanOptions
) -> tuple[Tensor, tuple[Tensor | None, ...], ScanOptions, Tensor | None]:
    """x, states and options for the engine, and its mask: the part that all layers of a module share.

    Padding of x is set to zero, so that its values, even NaN, have no effect.
    """
    if case.observed:
        flops.register()
    if options.resets is not None and not case.resets and choice.engine != "triton":
        states = masks.cleared(states, options.resets[0, :, None], options.reverse)
        options = options._replace(resets=None)
    masked = options.resets is not None or options.lengths is not None
    if not masked or not (choice.engine in ("triton", "loop") or choice.reset_steps):
        return x, states, options, None
    if options.lengths is not None and not options.padded:
        past = masks.ended(options.lengths, x.shape[0])
        x = x.masked_fill(past.reshape(*past.shape, *(1,) * (x.dim() - 2)), 0)
    mask = masks.encode(options.resets, options.lengths, x.shape[0], masks.bits(options.reverse))
    return x, states, options, mask


def execute(cell: Cell, call: Call, options: ScanOptions, case: Case, choice: Choice) -> Result:
    """Do what was chosen: y [T, B, K*H], final states [K, B, H], and, if options.all_states, the states after each step
    [T, B, K*H]."""
    if len(call.groups[0]) == 5 and choice.engine != "aten":
        return projection.scan(lambda call: execute(cell, call, options, case, choice), call, options)
    if options.dropout is not None and choice.engine != "triton":  # which draws the masks itself
        cell, call = drawn.as_inputs(cell, call, options.dropout, case.hidden_size)
    if choice.engine in ("triton", "loop"):
        return _differentiable(cell, call, options, case, choice)
    if choice.reset_steps:
        assert call.mask is not None
        found = reset_steps.scan(call.x, call.states, call.groups, call.mask, options.reverse)
        # None if a value is not finite, which reset steps cannot separate.
        return (*found, None) if found else _differentiable(cell, call, options, case, Choice("loop", "", choice.why))
    full = aten.starts(call.x, call.states, call.groups, case.hidden_size)
    if choice.engine == "aten" and options.one_step:
        final = aten.step(cell.key, call.x[0], tuple(s[0] for s in full), call.groups[0])
        return final[0][None], final, None
    if choice.engine == "aten":
        return *aten.scan(cell.key, call.x, full, call.groups, (options.lengths, options.reverse)), None
    weights, params = (call.groups[0], call.params) if len(call.groups) == 1 and not call.stacked else _stacked(call)
    (w_ih, *others), H = weights, case.hidden_size
    assert w_ih is not None
    states, final = reference.scan_groups(
        reference.step_of(cell),
        call.x,
        full,
        w_ih,
        *others,
        params=() if params is None else params.split(H, -1),
        inputs=() if call.inputs is None else call.inputs.split(H, -1),
        resets=options.resets,
        lengths=options.lengths,
        reversed=masks.bits(options.reverse),
    )
    return states[0], final, states[len(cell.outputs) :] if options.all_states else None


def _differentiable(cell: Cell, call: Call, options: ScanOptions, case: Case, choice: Choice) -> Result:
    """Run the autograd.Function with an engine that runs the steps."""
    weights, params = (call.groups[0], call.params) if len(call.groups) == 1 and not call.stacked else _stacked(call)
    schedule, single, precision = choice.schedule, "", "ieee"
    if case.dtype == torch.float32 and choice.engine == "triton" and (options.precision or case.device.type == "cuda"):
        precision = precisions.of_products(options.precision, case.dtype, case.device)
    if schedule in backends.SCHEDULES and not case.compiling:  # under a compiler, the operator raises
        # If the scan does not fit, raise before anything runs.
        size, like = (len(call.groups), case.hidden_size), (call.x.dtype, call.x.device)
        for backward in (False, True):
            triton.plan_for(cell.key, call.x.shape[1], size, like, schedule, precision, backward)
    elif options.one_step and choice.engine == "triton" and call.inputs is None and not case.traced:
        through = precisions.of_inputs(case.dtype, case.device)
        if triton.one_launch(cell.key, call.x[0], case.hidden_size, precision, through):
            single = through
    scan_options = autograd.Options(
        choice.engine,
        cell.key,
        "gates" if single else options.save,
        masks.bits(options.reverse) if True in options.reverse else 0,
        schedule,
        precision,
        options.all_states and len(cell.states) + len(cell.outputs) > 1,
        single,
        case.traced,
        None if case.traced else {},
    )
    dropout = options.dropout if choice.engine == "triton" else None
    y, final, every = autograd.apply(scan_options, case, call, weights, params, dropout)
    return y, final, (y,) if options.all_states and every is None else every


def _stacked(call: Call) -> tuple[aten.Weights, Tensor | None]:
    """The groups' weights and trained vectors, stacked along an axis K."""
    params = call.params
    if call.stacked is not None:
        return call.stacked, params[None] if params is not None and params.dim() == 1 else params
    return [None if ts[0] is None else torch.stack(ts) for ts in zip(*call.groups, strict=True)], params

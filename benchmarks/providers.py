"""Implementations of a case: seqcells by each backend, torch.nn, loops over cells, and peers if they are installed.

A provider takes a `cases.Problem` and returns a `cases.Work`, or raises Unavailable with the reason. Set-up (weights in
a provider's own layout, compilation, capture of a graph) is done before, and is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from cases import GATES, KINDS, NAMES, STEP, TRAINING, Problem, Unavailable, Work
from torch import Tensor, nn

import seqcells
from seqcells import backends, functional, kernels, precisions, products
from seqcells.cell import named
from seqcells.engines import triton
from seqcells.kernels import buffers

UNROLLED = 64  # steps: a loop longer than that takes minutes to compile


def _layer(problem: Problem, module: nn.Module, weights: list[Tensor]) -> nn.Module:
    """The module on the problem's device with its weights; they stay the leaves."""
    for (name, _), weight in zip(list(module.named_parameters()), weights, strict=True):
        setattr(module, name, nn.Parameter(weight.detach(), requires_grad=weight.requires_grad))
    return module


def ours(
    backend: str, save: str = "gates", dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Callable[[Problem], Work]:
    """seqcells by a backend. dtype, device: other than the problem's, for the judge."""

    def provide(problem: Problem) -> Work:
        case, where = problem.case, device or problem.device
        if backend.startswith("triton") and where.type == "cpu" and not backends.interpreted():
            raise Unavailable("the kernels need CUDA, or TRITON_INTERPRET=1")
        x, weights = problem.fresh(dtype, device)
        resets, lengths = (None if m is None else m.to(where) for m in (problem.resets, problem.lengths))
        if backend == "aten" and ((case.resets and case.T > 1) or case.cell == "gru-before"):
            raise Unavailable("torch lacks it")
        if not case.projected and dtype is not None:  # the judge: the input's product with an identity
            gates = GATES[case.cell] * case.H
            eye = torch.eye(gates, dtype=x.dtype, device=x.device).expand(case.heads, gates, gates)

            def unprojected() -> Tensor:
                given = x.unflatten(2, (case.heads, gates))
                return functional.scan_groups(NAMES[case.cell], given, None, eye, weights[0], backend=backend)[0]

            return Work(unprojected, [x, *weights])
        if not case.projected:
            return _scan_alone(problem, backend, save, x, weights[0])
        if case.heads > 1:
            options = {"save": save, "backend": backend}
            return Work(lambda: functional.scan_groups(NAMES[case.cell], x, None, *weights, **options)[0], weights)
        more = {"reset_after": case.cell == "gru"} if case.cell.startswith("gru") else {}
        if case.mode == STEP:
            cell = _layer(problem, getattr(seqcells, f"{KINDS[case.cell]}Cell")(case.I, case.H, **more), weights)
            cell.backend = backend
            return Work(lambda: _first(cell(x[0]))[None], list(cell.parameters()))
        sizes = {"num_layers": case.layers, "bidirectional": case.bidirectional}
        module = getattr(seqcells, KINDS[case.cell])(case.I, case.H, backend=backend, save=save, **sizes, **more)
        layer = _layer(problem, module, weights)
        if case.packed:
            given = problem.pack(x)
            return Work(lambda: layer(given)[0].data, list(layer.parameters()))
        states = None
        if problem.states is not None:
            states, resets = problem.hx([s.to(x) for s in problem.states]), problem.ends.to(x)
        return Work(lambda: layer(x, states, resets=resets, lengths=lengths)[0], list(layer.parameters()))

    return provide


def _first(state: Tensor | tuple[Tensor, ...]) -> Tensor:
    return state if isinstance(state, Tensor) else state[0]


class _Alone(torch.autograd.Function):
    """Only the recurrent part, by the kernels: gx [T, B, K*G*H], u [K, G*H, H] to y [T, B, K*H]."""

    @staticmethod
    def forward(ctx, gx, u, cell):
        (K, _, H), how = u.shape, {"precision": precisions.of_products(None, gx.dtype, gx.device)}
        plan = triton.plan_for(cell, gx.shape[1], (K, H), (u.dtype, u.device), "", backward=False, **how)
        save = "gates" if any(ctx.needs_input_grad) else "none"
        gx = gx.unflatten(2, (K, -1))
        out = kernels.scan.forward(kernels.cells.get(cell), gx, u, None, None, None, None, save=save, plan=plan, **how)
        ctx.save_for_backward(u, out.y, out.c, out.saved)
        ctx.cell, ctx.how = cell, how
        return buffers.outputs(out.y, 0).flatten(2)

    @staticmethod
    def backward(ctx, dy):
        u, y, c, saved = ctx.saved_tensors
        K, _, H = u.shape
        plan = triton.plan_for(ctx.cell, y.shape[1], (K, H), (u.dtype, u.device), "", backward=True, **ctx.how)
        arguments = (dy.unflatten(2, (K, -1)), None, None, u, y, c, saved, None)
        out = kernels.scan.backward(kernels.cells.get(ctx.cell), *arguments, plan=plan, **ctx.how)
        du = [products.recurrent_gradient(ctx.cell, out[:3], (y, c), None, 0, k) for k in range(K)]
        return out.dgx.flatten(2), torch.stack(du), None


def _scan_alone(problem: Problem, backend: str, save: str, x: Tensor, u: Tensor) -> Work:
    if backend != "triton" or save != "gates":
        raise Unavailable("the input's product is part of every call")
    cell = NAMES[problem.case.cell]
    return Work(lambda: _Alone.apply(x, u, cell), [x, u])


def _torch_layer(problem: Problem, weights: list[Tensor]) -> nn.Module:
    """torch.nn's own layer, its weights copied into the one buffer that cuDNN wants them in."""
    case = problem.case
    layer = getattr(nn, KINDS[case.cell])(case.I, case.H, num_layers=case.layers, bidirectional=case.bidirectional)
    layer = layer.to(problem.device, problem.dtype)
    with torch.no_grad():
        for parameter, weight in zip(layer.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return layer.requires_grad_(case.mode != "inference")


def torch_nn(problem: Problem) -> Work:
    """torch.nn's layer or cell; packed if rows differ in length, masked by hand if one step has resets."""
    case = problem.case
    if case.cell == "gru-before" or case.heads > 1 or not case.projected or (case.resets and case.T > 1):
        raise Unavailable("torch.nn lacks it")
    x, weights = problem.fresh()
    if case.mode == STEP:
        cell = _layer(problem, getattr(nn, f"{KINDS[case.cell]}Cell")(case.I, case.H), weights)
        return Work(lambda: _first(cell(x[0]))[None], list(cell.parameters()))
    layer = _torch_layer(problem, weights)
    if case.packed:
        given = problem.pack(x)
        return Work(lambda: layer(given)[0].data, list(layer.parameters()))
    if problem.states is not None:
        states, ends = problem.states, problem.ends

        def masked() -> Tensor:
            carried = (1 - ends).view(1, -1, 1)
            return layer(x, problem.hx([s * carried for s in states]))[0]

        return Work(masked, list(layer.parameters()))
    if problem.lengths is None:
        return Work(lambda: layer(x)[0], list(layer.parameters()))
    lengths = problem.lengths

    def packed() -> Tensor:
        given = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(layer(given)[0], total_length=case.T)[0]

    return Work(packed, list(layer.parameters()))


def split(problem: Problem) -> Work:
    """Resets by calls of torch.nn's layer between steps with a reset, and a product of the state and the mask."""
    case = problem.case
    if not case.resets or case.T == 1 or case.layers > 1 or case.bidirectional or case.cell == "gru-before":
        raise Unavailable("for resets, in one layer that torch.nn has")
    x, weights = problem.fresh()
    layer = _torch_layer(problem, weights)
    resets = problem.resets
    assert resets is not None

    def stretches() -> Tensor:
        carried = (~resets).to(x.dtype)[..., None]
        starts = [0, *(t for t in resets.any(1).nonzero().flatten().tolist() if t), case.T]
        state, outputs = None, []
        for start, end in pairwise(starts):
            if state is not None:
                state = tuple(s * carried[start] for s in state) if isinstance(state, tuple) else state * carried[start]
            y, state = layer(x[start:end], state)
            outputs.append(y)
        return torch.cat(outputs)

    return Work(stretches, list(layer.parameters()))


Step = Callable[..., tuple[Tensor, ...]]  # (x, states, w_ih, w_hh, b_ih, b_hh) -> the states after it


def _looped(problem: Problem, step: Step) -> tuple[Callable[..., Tensor], Tensor, list[Tensor]]:
    """A function of x and the weights, the step in a loop over time, for each layer and direction; and those."""
    case = problem.case
    if case.heads > 1 or not case.projected:
        raise Unavailable("a loop over cells of one head, which take the input itself")
    masked = problem.resets is not None or problem.lengths is not None
    if masked and case.bidirectional:
        raise Unavailable("a loop with masks goes one way")
    directions, count = 1 + case.bidirectional, len(named(NAMES[case.cell]).states)
    carried = None if problem.resets is None else (~problem.resets).to(problem.dtype)[..., None]
    active = None
    if problem.lengths is not None and not case.packed:
        active = (torch.arange(case.T)[:, None] < problem.lengths).to(problem.device, problem.dtype)[..., None]
    starts = None
    if problem.states is not None:
        starts = [s * (1 - problem.ends).view(1, -1, 1) for s in problem.states]

    def scan(x: Tensor, state: tuple[Tensor, ...], weights: tuple[Tensor, ...], reverse: bool) -> Tensor:
        outputs = []
        for t in range(case.T - 1, -1, -1) if reverse else range(case.T):
            if carried is not None and starts is None:
                state = tuple(s * carried[t] for s in state)
            state = step(x[t], state, *weights)
            outputs.append(state[0] if active is None else state[0] * active[t])
        return torch.stack(outputs[::-1] if reverse else outputs)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        zero = x.new_zeros(case.B, case.H)
        for first in range(0, case.layers * directions, directions):
            found = []
            for k in range(first, first + directions):
                state = (zero,) * count if starts is None else tuple(s[k] for s in starts)
                found.append(scan(x, state, weights[4 * k : 4 * k + 4], k > first))
            x = found[0] if directions == 1 else torch.cat(found, 2)
        return x

    return run, *problem.fresh()


def lstm_step(x: Tensor, states: tuple[Tensor, ...], *weights: Tensor) -> tuple[Tensor, ...]:
    (h, c), (w_ih, w_hh, b_ih, b_hh) = states, weights
    i, f, g, o = (nn.functional.linear(x, w_ih, b_ih) + nn.functional.linear(h, w_hh, b_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(x: Tensor, states: tuple[Tensor, ...], *weights: Tensor) -> tuple[Tensor, ...]:
    (h,), (w_ih, w_hh, b_ih, b_hh) = states, weights
    x_r, x_z, x_n = nn.functional.linear(x, w_ih, b_ih).chunk(3, 1)
    h_r, h_z, h_n = nn.functional.linear(h, w_hh, b_hh).chunk(3, 1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + torch.sigmoid(x_z + h_z) * (h - n),)


def gru_before_step(x: Tensor, states: tuple[Tensor, ...], *weights: Tensor) -> tuple[Tensor, ...]:
    """The reset gate before the product."""
    (h,), (w_ih, w_hh, b_ih, b_hh) = states, weights
    H = 2 * h.shape[1]
    x_r, x_z, x_n = nn.functional.linear(x, w_ih, b_ih).chunk(3, 1)
    h_r, h_z = nn.functional.linear(h, w_hh[:H], b_hh[:H]).chunk(2, 1)
    n = torch.tanh(x_n + nn.functional.linear(torch.sigmoid(x_r + h_r) * h, w_hh[H:], b_hh[H:]))
    return (n + torch.sigmoid(x_z + h_z) * (h - n),)


def rnn_step(x: Tensor, states: tuple[Tensor, ...], *weights: Tensor) -> tuple[Tensor, ...]:
    w_ih, w_hh, b_ih, b_hh = weights
    return (torch.tanh(nn.functional.linear(x, w_ih, b_ih) + nn.functional.linear(states[0], w_hh, b_hh)),)


STEPS = {"lstm": lstm_step, "gru": gru_step, "gru-before": gru_before_step, "rnn": rnn_step}
TORCH_STEPS: dict[str, Step] = {
    "lstm": torch.lstm_cell,
    "gru": lambda x, states, *weights: (torch.gru_cell(x, states[0], *weights),),
    "gru-before": gru_before_step,
    "rnn": lambda x, states, *weights: (torch.rnn_tanh_cell(x, states[0], *weights),),
}


def by_hand(problem: Problem) -> Work:
    """The built-in cells in torch's operations, in a loop over time, as people write them."""
    run, x, weights = _looped(problem, STEPS[problem.case.cell])
    if not problem.case.packed:
        return Work(lambda: run(x, *weights), weights)
    given = problem.pack(x)

    def packed() -> Tensor:
        padded, _ = nn.utils.rnn.pad_packed_sequence(given)
        return problem.pack(run(padded, *weights)).data

    return Work(packed, weights)


def _torch_loop(problem: Problem) -> tuple[Callable[..., Tensor], Tensor, list[Tensor]]:
    """_looped with torch's own cell functions."""
    case = problem.case
    if case.layers > 1 or case.bidirectional or case.mode == STEP or case.packed or problem.states is not None:
        raise Unavailable("a loop of one layer and direction, from zeros")
    return _looped(problem, TORCH_STEPS[case.cell])


def loop(problem: Problem) -> Work:
    """A loop over torch's own cell function (torch.lstm_cell, ...); the reset-before GRU written out."""
    run, x, weights = _torch_loop(problem)
    return Work(lambda: run(x, *weights), weights)


def compiled_loop(problem: Problem) -> Work:
    """The same loop under torch.compile."""
    if problem.case.T > UNROLLED:
        raise Unavailable(f"a loop of more than {UNROLLED} steps is unrolled, and compiles for minutes")
    run, x, weights = _torch_loop(problem)
    torch._dynamo.reset()  # otherwise the eighth case would exceed Dynamo's limit of recompilations
    whole = torch.compile(run, fullgraph=True, dynamic=False)
    return Work(lambda: whole(x, *weights), weights)


def graphed_loop(problem: Problem) -> Work:
    """The same loop, captured as CUDA graphs, forward and backward."""
    if problem.device.type != "cuda":
        raise Unavailable("CUDA graphs need CUDA")
    run, x, weights = _torch_loop(problem)
    if problem.case.mode != TRAINING:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                run(x, *weights)
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = run(x, *weights)

        def replay() -> Tensor:
            graph.replay()
            return y

        return Work(replay, weights)
    graphed = torch.cuda.make_graphed_callables(run, (x, *weights))
    return Work(lambda: graphed(x, *weights), weights)


def flashrnn(problem: Problem) -> Work:
    """FlashRNN (pip install flashrnn): its fused CUDA kernels; on the CPU its plain PyTorch form.

    It takes the input's product, so with `projected` we compute that for it. Its layouts are made before, if possible.
    """
    case = problem.case
    if case.cell not in ("lstm", "gru") or case.resets or case.lengths or case.layers > 1 or case.bidirectional:
        raise Unavailable("flashrnn has one layer of LSTM or GRU, without masks")
    if case.mode == STEP:
        raise Unavailable("flashrnn has no cells")
    try:
        from flashrnn import flashrnn as call
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    backend = "cuda_fused" if problem.device.type == "cuda" else "vanilla"
    x, weights = problem.fresh()
    T, B, N, G, D = case.T, case.B, case.heads, GATES[case.cell], case.H
    order = [2, 0, 1] if case.cell == "gru" else [0, 1, 2, 3]  # of its recurrent gates: n first, then r and z

    def bias(b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
        if b_ih is None or b_hh is None:
            return x.new_zeros(4, N, D)
        i, h = (b.reshape(N, G, D).transpose(0, 1) for b in (b_ih, b_hh))
        if case.cell == "lstm":
            return i + h
        return torch.stack([h[2], i[0] + h[0], i[1] + h[1], i[2]])

    def run() -> Tensor:
        w_ih, w_hh, b_ih, b_hh = weights if case.projected else (None, weights[0], None, None)
        gx = x if w_ih is None else nn.functional.linear(x, w_ih.reshape(-1, case.I))
        gates = gx.reshape(T, B, N, G, D).permute(1, 0, 3, 2, 4)
        recurrent = w_hh.reshape(N, G, D, D).transpose(0, 1)[order]
        states, _ = call(gates, recurrent, bias(b_ih, b_hh), function=case.cell, backend=backend, dtype=case.dtype)
        return states[0].transpose(0, 1).reshape(T, B, N * D)

    return Work(run, weights if case.projected else [x, *weights])


def torchrl(problem: Problem) -> Work:
    """TorchRL's Triton kernels (pip install torchrl): one layer of LSTM or GRU, with resets."""
    case = problem.case
    if case.cell not in ("lstm", "gru") or case.lengths or case.layers > 1 or case.bidirectional or case.heads > 1:
        raise Unavailable("torchrl has one layer of LSTM or GRU, without lengths")
    if case.mode == STEP or not case.projected or problem.states is not None:
        raise Unavailable("torchrl's cells are torch's, and its layers take the input itself")
    if problem.device.type != "cuda":
        raise Unavailable("torchrl's kernels need CUDA")
    try:
        from torchrl.modules.tensordict_module import _rnn_triton as kernels
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    x, weights = problem.fresh()
    batch_first = x.transpose(0, 1).contiguous()
    resets = torch.zeros(case.T, case.B, dtype=torch.bool) if problem.resets is None else problem.resets
    resets = resets.to(x.device).transpose(0, 1).contiguous()
    zeros = x.new_zeros(case.B, case.T, case.H)
    compute = {"compute_dtype": problem.dtype if case.dtype == "bfloat16" else torch.float32}

    def run() -> Tensor:
        states = (zeros, zeros) if case.cell == "lstm" else (zeros,)
        call = kernels.lstm_triton if case.cell == "lstm" else kernels.gru_triton
        return call(batch_first, *states, *weights, resets, **compute)[0].transpose(0, 1)

    return Work(run, weights)


PROVIDERS: dict[str, Callable[[Problem], Work]] = {
    "torch.nn": torch_nn,
    "auto": ours("auto"),
    "triton": ours("triton"),
    "triton, states": ours("triton", "states"),
    "aten": ours("aten"),
    "loop": ours("loop"),
    "reference": by_hand,  # so called in the results: it was seqcells' reference, which is slower today
    "split": split,
    "cell loop": loop,
    "compiled loop": compiled_loop,
    "graphed loop": graphed_loop,
    "flashrnn": flashrnn,
    "torchrl": torchrl,
}


def judge(problem: Problem) -> Work:
    """The reference in float64, on the problem's device."""
    return ours("reference", dtype=torch.float64, device=problem.device)(problem)

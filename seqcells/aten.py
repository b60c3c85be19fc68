"""PyTorch's own fused RNNs, a layer at a time: cuDNN's on CUDA, oneDNN's LSTM and ATen's loops on the CPU.

oneDNN's LSTM is called through its operators, in a Function of its own: through torch.lstm it has no second
derivative and cannot be traced by torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Options, reference_of, vjp

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_LAYERS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}
_ONEDNN = torch.backends.mkldnn.is_available()  # asked here: torch.compile cannot trace the question
Weights = Sequence["Tensor | None"]  # w_ih, w_hh, b_ih, b_hh and, of an LSTM with a projection, w_hr


def _flat(weights: Weights) -> list[Tensor]:
    """The weights as torch's RNNs want them: both biases or neither."""
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    if (b_ih is None) != (b_hh is None):
        given = b_hh if b_ih is None else b_ih
        assert given is not None
        b_ih, b_hh = (torch.zeros_like(given) if b is None else b for b in (b_ih, b_hh))
    return [t for t in (w_ih, w_hh, b_ih, b_hh, *projection) if t is not None]


def layer(
    cell: str, x: Tensor, states: Sequence[Tensor], groups: Sequence[Weights], batch_sizes: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y and the final states [D, B, H] of one layer with D = len(groups) directions: forward, or forward and backward.

    x [T, B, I], or a PackedSequence's data with its batch_sizes; states [D, B, H].
    """
    flat = [t for weights in groups for t in _flat(weights)]
    biases = groups[0][2] is not None or groups[0][3] is not None
    # cuDNN keeps what its backward needs only in training mode.
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *flat))
    tracing = torch.jit.is_tracing()  # a trace may be trained, and cannot hold a Function
    own = batch_sizes is None and x.numel() > 0 and len(groups[0]) == 4 and onednn(cell, x.device, x.dtype)
    if own and not tracing and (train or torch.compiler.is_compiling()):
        return _directions(x, states, groups)
    hx: Any = list(states) if cell == "lstm" else states[0]
    sizes = () if batch_sizes is None else (batch_sizes,)
    rest = (len(groups) == 2,) if batch_sizes is not None else (len(groups) == 2, False)
    y, *final = _LAYERS[cell](x, *sizes, hx, flat, biases, 1, 0.0, train or tracing, *rest)  # type: ignore[operator]
    return y, tuple(final)


def step(cell: str, x: Tensor, states: tuple[Tensor, ...], weights: Weights) -> tuple[Tensor, ...]:
    """torch's own fused cell, x [B, I]."""
    if cell == "lstm":
        return torch.lstm_cell(x, states, *weights)  # type: ignore[arg-type]
    run = {"gru": torch.gru_cell, "rnn_tanh": torch.rnn_tanh_cell, "rnn_relu": torch.rnn_relu_cell}[cell]
    return (run(x, states[0], *weights),)  # type: ignore[arg-type]


def onednn(cell: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has it, by operators of its own: the LSTM in float32, on the CPU."""
    here = _ONEDNN and bool(torch.backends.mkldnn.enabled)
    return here and cell == "lstm" and device.type == "cpu" and dtype == torch.float32


def _directions(x: Tensor, states: Sequence[Tensor], groups: Sequence[Weights]) -> tuple[Tensor, tuple[Tensor, ...]]:
    outputs, finals = [], []
    for k, (w_ih, w_hh, *biases) in enumerate(groups):
        assert w_ih is not None and w_hh is not None
        b_ih, b_hh = (w_ih.new_zeros(w_ih.shape[0]) if b is None else b for b in biases[:2])
        y, h, c = _OneDNN.apply(k == 1, x, *(s[k : k + 1] for s in states), w_ih, w_hh, b_ih, b_hh)
        outputs.append(y)
        finals.append((h, c))
    if len(groups) == 1:
        # Backward keeps its own: a caller may change these in place.
        return outputs[0], tuple(s.clone() for s in finals[0])
    return torch.cat(outputs, 2), tuple(torch.cat(s) for s in zip(*finals, strict=True))


_MODE = 2  # an LSTM, to mkldnn_rnn_layer


def _call(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    reverse: bool,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h_n and c_n, shaped as h0 and c0, and oneDNN's workspace."""
    options: Any = (reverse, [], _MODE, w_hh.shape[1], 1, True, False, False, train)
    # oneDNN keeps a workspace for backward only where gradients are enabled; nothing of this is recorded.
    with torch.set_grad_enabled(train):
        given = [t.detach().contiguous() for t in (x, w_ih, w_hh, b_ih, b_hh, h0, c0)]
        return torch.ops.aten.mkldnn_rnn_layer(*given, *options)


def _call_backward(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor], out: Sequence[Tensor], reverse: bool, workspace: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of x, h0, c0, w_ih, w_hh, b_ih, b_hh."""
    x, h0, c0, *weights = (t.contiguous() for t in inputs)
    y, h, c = out
    options: Any = (reverse, _MODE, h0.shape[-1], 1, True, True, False, [], False)
    given = (torch.zeros_like(o) if g is None else g.contiguous() for o, g in zip(out, grads, strict=True))
    dx, dw_ih, dw_hh, db_ih, db_hh, dh, dc = torch.ops.aten.mkldnn_rnn_layer_backward(
        x, *weights, h0, c0, y, h, c, *given, *options, workspace
    )
    return dx, dh.reshape(h0.shape), dc.reshape(c0.shape), dw_ih, dw_hh, db_ih, db_hh.clone()


@torch.library.custom_op("seqcells::onednn_forward", mutates_args=())
def _forward_op(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _call(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, False)[:3]


@torch.library.custom_op("seqcells::onednn_backward", mutates_args=())
def _backward_op(
    dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    *out, workspace = _call(*inputs, reverse, True)
    return _call_backward((dy, dh, dc), inputs, out, reverse, workspace)  # type: ignore[return-value]


@_forward_op.register_fake
def _(x: Tensor, h0: Tensor, c0: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return x.new_empty(*x.shape[:2], h0.shape[-1]), torch.empty_like(h0), torch.empty_like(c0)


@_backward_op.register_fake
def _(dy: Any, dh: Any, dc: Any, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:7])


class _OneDNN(torch.autograd.Function):
    """reverse, x [T, B, I], h0, c0 [1, B, H], w_ih, w_hh, b_ih, b_hh: y, h_n, c_n."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reverse = reverse
        if torch.compiler.is_compiling():
            # The workspace's size is known to oneDNN alone, so a compiler cannot hand it on: backward makes it anew.
            ctx.save_for_backward(*inputs)
            return _forward_op(*inputs, reverse)
        y, h, c, workspace = _call(*inputs, reverse, any(ctx.needs_input_grad))  # type: ignore[call-arg, arg-type]
        ctx.save_for_backward(*inputs, y, h, c, workspace)
        return y, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives it no second time
        inputs, rest = saved[:7], saved[7:]
        if not rest:
            return None, *_backward_op(*grads, *inputs, ctx.reverse)
        if torch.is_grad_enabled():  # create_graph=True
            # Aliases, so that an input computed from another does not hand it its own share a second time.
            run = reference_of(Options("", "lstm", reversed=int(ctx.reverse)), [True] * 7, None, None)
            out, back = vjp(run, *(t.view_as(t) for t in inputs))
            given = (torch.zeros_like(o) if g is None else g.view_as(o) for o, g in zip(out, grads, strict=True))
            return None, *back(tuple(given))
        *out, workspace = rest
        return None, *_call_backward(grads, inputs, out, ctx.reverse, workspace)

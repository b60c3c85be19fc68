"""The engine aten, PyTorch's own fused RNNs: cuDNN's on CUDA, oneDNN's LSTM and ATen's loops on the CPU.

torch.compile cannot trace torch.lstm: for it, oneDNN's LSTM is called through operators of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

if TYPE_CHECKING:
    from ..recurrent import Recurrent

_STEPS: dict[str, Callable[..., Any]] = {  # an LSTM's gives two tensors
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
}
LAYERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}
# What oneDNN runs by its own operators. Found at import, because torch.compile cannot trace the question.
ONEDNN = {("lstm", "cpu", torch.float32)} if torch.backends.mkldnn.is_available() else set()
Weights = Sequence["Tensor | None"]  # w_ih, w_hh, b_ih, b_hh and, of an LSTM with a projection, w_hr


def _flat(weights: Weights) -> list[Tensor]:
    """The weights for torch's RNNs: both biases or neither."""
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    if (b_ih is None) != (b_hh is None):
        given = b_hh if b_ih is None else b_ih
        assert given is not None
        b_ih, b_hh = (torch.zeros_like(given) if b is None else b for b in (b_ih, b_hh))
    return [t for t in (w_ih, w_hh, b_ih, b_hh, *projection) if t is not None]


def stack(
    module: Recurrent,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch: int,
    grad: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y and the final states of all layers of a module in one call, over x [T, B, I] or a PackedSequence's data.

    states [layers * directions, B, .], None means zeros; weights: those of each layer and direction, in torch's order.
    """
    H, own, rows = module.hidden_size, LAYERS[module.cell.key], len(module._all_weights)
    hx: object = states if len(states) > 1 else states[0]
    if states[0] is None:
        zero = x.new_zeros(rows, batch, module.proj_size or H)
        hx = (zero, x.new_zeros(rows, batch, H) if module.proj_size else zero) if len(states) > 1 else zero
    rate = module.dropout if module.training else 0.0
    # cuDNN saves what its backward needs only in training mode, and a traced program may be trained.
    train = rate > 0 or grad or torch.jit.is_tracing()
    options = (module.bias, module.num_layers, rate, train, module.bidirectional)
    if batch_sizes is None:
        y, *final = own(x, hx, weights, *options, False)
    else:
        y, *final = own(x, batch_sizes, hx, weights, *options)
    return y, tuple(final)


def scan(
    cell: str,
    x: Tensor,
    states: tuple[Tensor, ...],
    groups: Sequence[Weights],
    options: tuple[Tensor | None, tuple[bool, ...]],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer's groups: in one call if they are a layer's two directions, else one after another.

    x [T, B, I] or [T, B, K, I]; states [K, B, .]; options: lengths, and whether each group is reversed.
    """
    K, (lengths, reverse) = len(groups), options
    if x.dim() == 3 and reverse in ((False,), (False, True)):
        if lengths is None:
            return layer(cell, x, states, groups)
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        order, back = packed.sorted_indices, packed.unsorted_indices
        assert order is not None and back is not None
        starts, flat = [s[:, order] for s in states], [t for weights in groups for t in _flat(weights)]
        own = (groups[0][2] is not None or groups[0][3] is not None, 1, 0.0, _trains(x, *starts, *flat), K == 2)
        hx: object = starts if cell == "lstm" else starts[0]
        y, *last = LAYERS[cell](packed.data, packed.batch_sizes, hx, flat, *own)
        padded, _ = pad_packed_sequence(PackedSequence(y, packed.batch_sizes, order, back), total_length=x.shape[0])
        return padded, tuple(s[:, back] for s in last)
    outputs, finals = [], []
    for k in range(K):
        mine = x if x.dim() == 3 else x[:, :, k]
        # A reversed group alone: running both directions only to drop the first would be a waste.
        if reverse[k] and lengths is not None:
            raise RuntimeError("the aten backend takes lengths only with both directions: use backend='loop'")
        mine = mine.flip(0) if reverse[k] else mine
        y, final = scan(cell, mine, tuple(s[k : k + 1] for s in states), groups[k : k + 1], (lengths, (False,)))
        outputs.append(y.flip(0) if reverse[k] else y)
        finals.append(tuple(s[0] for s in final))
    return torch.cat(outputs, 2), tuple(torch.stack(s) for s in zip(*finals, strict=True))


def _trains(*tensors: Tensor) -> bool:
    """Whether torch's own run in training mode, without which cuDNN does not save what its backward needs."""
    if torch.jit.is_tracing():  # a trace may be trained
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def starts(x: Tensor, given: tuple[Tensor | None, ...], groups: Sequence[Weights], H: int) -> tuple[Tensor, ...]:
    """The given states [K, B, .]; zeros for one that is None."""
    K, B, w_hh = len(groups), x.shape[1], groups[0][1]
    sizes = (H if w_hh is None else w_hh.shape[1], *(H,) * (len(given) - 1))
    return tuple(x.new_zeros(K, B, n) if s is None else s.reshape(K, B, n) for s, n in zip(given, sizes, strict=True))


def layer(
    cell: str, x: Tensor, states: Sequence[Tensor], groups: Sequence[Weights]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y and the final states [D, B, H] of one layer with D = len(groups) directions: forward, or forward and backward.

    x [T, B, I]; states [D, B, H].
    """
    flat = [t for weights in groups for t in _flat(weights)]
    biases = groups[0][2] is not None or groups[0][3] is not None
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    compiled = torch.compiler.is_compiling() and not exporting
    if compiled and len(groups[0]) == 4 and x.numel() > 0 and onednn(cell, x.device, x.dtype):
        return _directions(x, states, groups)
    hx: object = list(states) if cell == "lstm" else states[0]
    options = (1, 0.0, _trains(x, *states, *flat), len(groups) == 2, False)
    y, *final = LAYERS[cell](x, hx, flat, biases, *options)
    return y, tuple(final)


def step(cell: str, x: Tensor, states: tuple[Tensor, ...] | None, weights: Weights) -> tuple[Tensor, ...]:
    """torch's own fused cell. x [B, I]; states [B, H], None means zeros."""
    if states is None:
        assert weights[1] is not None
        zero = x.new_zeros(x.shape[0], weights[1].shape[1])
        states = (zero, zero)
    if cell == "lstm":
        return _STEPS[cell](x, states, *weights)
    return (_STEPS[cell](x, states[0], *weights),)


def onednn(cell: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN runs the cell, by its own operators."""
    return (cell, device.type, dtype) in ONEDNN and bool(torch.backends.mkldnn.enabled)


def _directions(x: Tensor, states: Sequence[Tensor], groups: Sequence[Weights]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`layer`, by oneDNN, for a compiler."""
    each = []
    for k, (w_ih, w_hh, *biases) in enumerate(groups):
        assert w_ih is not None and w_hh is not None
        b_ih, b_hh = (w_ih.new_zeros(w_ih.shape[0]) if b is None else b for b in biases[:2])
        each.append(_forward_op(x, *(s[k : k + 1] for s in states), w_ih, w_hh, b_ih, b_hh, k == 1))
    if len(each) == 1:
        y, *final = each[0]
    else:
        y, *final = (torch.cat(of, dim) for of, dim in zip(zip(*each, strict=True), (2, 0, 0), strict=True))
    return y, tuple(final)


_MODE = 2  # mkldnn_rnn_layer's number for an LSTM
_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = torch.ops.aten.mkldnn_rnn_layer.default
_backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.mkldnn_rnn_layer_backward.default


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
    # oneDNN returns a workspace for backward only if gradients are enabled. Autograd records none of this.
    tensors = [t.detach().contiguous() for t in (x, w_ih, w_hh, b_ih, b_hh, h0, c0)]
    with torch.set_grad_enabled(train):
        return _forward(*tensors, reverse, [], _MODE, w_hh.shape[1], 1, True, False, False, train)


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
    *out, workspace = _call(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, True)
    x, *weights, h0, c0 = (t.contiguous() for t in (x, w_ih, w_hh, b_ih, b_hh, h0, c0))
    grads = [torch.zeros_like(o) if g is None else g.contiguous() for o, g in zip(out, (dy, dh, dc), strict=True)]
    how: tuple[object, ...] = (reverse, _MODE, h0.shape[-1], 1, True, True, False, [], False)
    dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0 = _backward(x, *weights, h0, c0, *out, *grads, *how, workspace)
    return dx, dh0.view(h0.shape), dc0.view(c0.shape), dw_ih, dw_hh, db_ih, db_hh.clone()


@_forward_op.register_fake
def _(x: Tensor, h0: Tensor, c0: Tensor, *others: object) -> tuple[Tensor, ...]:
    return x.new_empty(*x.shape[:2], h0.shape[-1]), torch.empty_like(h0), torch.empty_like(c0)


@_backward_op.register_fake
def _(dy: object, dh: object, dc: object, *inputs: Any) -> tuple[Tensor, ...]:  # tensors, and reverse
    return tuple(t.new_empty(t.shape) for t in inputs[:7])


def _save(ctx: Any, inputs: Sequence[object], output: object) -> None:  # ctx has attributes of ours
    # Only oneDNN knows the workspace's size, so a compiler cannot pass it on: backward computes it again.
    *tensors, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # ctx: as above
    return *_backward_op(*grads, *ctx.saved_tensors, ctx.reverse), None


_forward_op.register_autograd(_gradients, setup_context=_save)

"""The engine's forward and backward as operators, for compilers and torch.func, with fakes and vmap rules.

Weights have an axis of groups. Buffers are in the order of time, [T, B, K, .], so that their shapes do not depend on
the mask. x [T, B, I] and inputs [T, B, N*H] are shared by all groups, or have an axis of groups before the last. A
missing tensor is None as an argument and an empty tensor [0] as a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...autograd import Options
from ...batching import MASK, STATES, STEPS, WEIGHTS, rule
from ...products import hidden_size, places
from .derived import get
from .gradients import layer_gradients
from .layer import forward as layer_forward
from .steps import most_rows
from .stretches import RowOrder, row_order


def _by_group(orders: dict[bool, RowOrder], K: int, reversed: int) -> list[RowOrder]:
    return [orders[bool(reversed >> k & 1)] for k in range(K)]


@torch.library.custom_op("seqcells::loop_forward", mutates_args=())
def loop_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Tensor | None,
    inputs: Tensor | None,
    mask: Tensor | None,
    cell: str,
    save: str,
    reversed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, B, K, H]; the other states [T, B, K, (S-1)*H] unless save is "none"; what is saved if save is
    "gates"; the final states [K, B, H] (not if the cell's first state is an output) and [K, B, (S-1)*H]."""
    (T, B), K, at = x.shape[:2], w_ih.shape[0], places(cell)
    several = at.states > 1 and save != "none"
    options = Options("loop", cell, reversed=reversed, states=several, notes={})
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs)
    (y, *rest), (_, _, saved) = layer_forward(options, save, tensors, mask)
    none = x.new_empty(0)
    if saved.dim() > 1:
        each = zip(_by_group(options.notes["orders"], K, reversed), saved, strict=True)
        saved = torch.stack([order.placed(of) for order, of in each], 1).unflatten(0, (T, B))
    hn = none if at.output else rest.pop(0)
    cn = rest.pop(0) if at.states > 1 else none.clone()
    y, c = (s.view(T, B, K, s.shape[2] // K) for s in (y, rest.pop(0) if several else x.new_empty(T, B, 0)))
    return y, c if several else none.clone(), saved, hn, cn


@loop_forward.register_fake
def _(x: Tensor, h0: Any, c0: Any, w_ih: Tensor, w_hh: Any, *others: Any) -> tuple[Tensor, ...]:
    cell, save = others[5:7]
    (T, B), K, at, saved = x.shape[:2], w_ih.shape[0], places(cell), get(cell).saved
    H = hidden_size(at, w_ih, w_hh, h0, c0)
    C = (at.states - 1) * H
    return (
        x.new_empty(T, B, K, H),
        x.new_empty(T, B, K, C) if C and save != "none" else x.new_empty(0),
        x.new_empty(T, B, K, saved * H) if saved and save == "gates" else x.new_empty(0),
        x.new_empty(0) if at.output else x.new_empty(K, B, H),
        x.new_empty(K, B, C) if C else x.new_empty(0),
    )


@torch.library.custom_op("seqcells::loop_backward", mutates_args=())
def loop_backward(
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    dcs: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Tensor | None,
    inputs: Tensor | None,
    mask: Tensor | None,
    y: Tensor,
    c: Tensor,
    saved: Tensor | None,
    cell: str,
    reversed: int,
    need: Sequence[bool],
    samples: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the needed gradients of the 9 inputs; those of weights and params are [samples, K, .], where each sample
    is an equal part of the rows B."""
    (T, B), K, H, at = x.shape[:2], *y.shape[2:], places(cell)
    orders = {
        back: row_order(mask, back, T, B, x.device, most_rows(H, x.device))
        for back in {bool(reversed >> k & 1) for k in range(K)}
    }
    of_group = _by_group(orders, K, reversed)
    rows, head = of_group[0].rows, of_group[0].head
    buffers: list[Tensor | None] = []
    for states, start in ((y, h0), (c, c0)):
        if states.dim() == 1:
            buffers.append(None)
            continue
        buffers.append(buffer := x.new_empty(K, head + rows, states.shape[3]))
        for k, order in enumerate(of_group):
            order.fill(buffer[k], states[:, :, k].flatten(0, 1), None if start is None else start[k])
    gates = None
    if saved is not None and saved.dim() > 1:
        gates = torch.stack([o.of(saved[:, :, k].flatten(0, 1), 0, rows) for k, o in enumerate(of_group)])
    options = Options("loop", cell, reversed=reversed, notes={"orders": orders})
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs)
    dy, dcs = (None if d is None else d.flatten(2) for d in (dy, dcs))
    grads = (dy, dcn, dcs) if at.output else (dy, dhn, dcn, dcs)
    found = layer_gradients(options, tensors, mask, (*buffers, gates), grads, need, samples)
    # No two of them may share memory.
    return tuple(
        x.new_empty(0) if d is None or t is None or not n else d.reshape(s).clone() if i in (5, 6, 7) else d.reshape(s)
        for i, (d, t, n, s) in enumerate(zip(found, tensors, need, _shapes(tensors, samples), strict=True))
    )  # type: ignore[return-value]  # nine


def _shapes(tensors: Sequence[Tensor | None], samples: int) -> list[Any]:
    """The shapes of the gradients of the 9 inputs."""
    every = [() if t is None else tuple(t.shape) for t in tensors]
    return [(samples, *shape) if 3 <= n < 8 else shape for n, shape in enumerate(every)]


@loop_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (need, samples) = arguments[4:13], arguments[19:21]
    each = zip(tensors, need, _shapes(tensors, samples), strict=True)
    return tuple(tensors[0].new_empty(s if n and t is not None else 0) for t, n, s in each)


# --- vmap: see batching -----------------------------------------------------------------------------------------------

SHARED = (1, None)  # an input shared by all groups: unchanged if vmap adds groups
SAMPLES = (0, 1)  # the gradients of weights: vmap adds samples or groups
INPUTS = (STEPS, STATES, STATES, *(WEIGHTS,) * 5, STEPS)
GRADIENTS = (STEPS, STATES, STATES, *(SAMPLES,) * 5, STEPS)
FORWARD = (*INPUTS, MASK, None, None, None)
BACKWARD = (STEPS, STATES, STATES, STEPS, *INPUTS, MASK, *(STEPS,) * 3, *(None,) * 4)


def _with_groups(t: Tensor, dim: int | None, K: int) -> tuple[Tensor, int | None]:
    """Expand an input [T, B, .] of all groups to [T, B, K, .]; also returns its batch dim, which is then the first."""
    if dim is not None:
        t, dim = t.movedim(dim, 0), 0
    return t.unsqueeze(-2).expand(*t.shape[:-1], K, t.shape[-1]), dim


def _grouped(
    kinds: list[Any], arguments: list[Any], dims: list[int | None], first: int, need: Sequence[bool]
) -> list[int]:
    """For vmap that adds groups: expand x and inputs, if shared, to one for each group. This is done if they are
    batched or if their gradients are needed, which otherwise would be summed over all groups.

    Returns which gradients must be summed over their K groups.
    """
    expanded = []
    w_ih, of_w_ih = arguments[first + 3], dims[first + 3]
    K = w_ih.shape[0] if of_w_ih is None else w_ih.select(of_w_ih, 0).shape[0]
    for n in (0, 8):
        t, dim = arguments[first + n], dims[first + n]
        if t is None or t.dim() - (dim is not None) == 4:
            continue
        if dim is None and not need[n]:
            kinds[first + n] = SHARED
        else:
            arguments[first + n], dims[first + n] = _with_groups(t, dim, K)
            expanded.append(n)
    return expanded


def _adds_groups(dims: Sequence[int | None], first: int) -> bool:
    return any(d is not None for d in dims[first + 3 : first + 8])


@loop_forward.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *given: Any) -> Any:
    kinds, arguments, dims = list(FORWARD), list(given), list(in_dims)
    if _adds_groups(dims, 0):
        _grouped(kinds, arguments, dims, 0, (False,) * 9)
    results = (STEPS, STEPS, STEPS, STATES, STATES)
    return rule(loop_forward, tuple(kinds), results, 12)(info, tuple(dims), *arguments)


@loop_backward.register_vmap
def _(info: Any, in_dims: Sequence[int | None], *given: Any) -> Any:
    kinds, arguments, dims = list(BACKWARD), list(given), list(in_dims)
    expanded = []
    if _adds_groups(dims, 4):
        expanded = _grouped(kinds, arguments, dims, 4, arguments[19])
    else:
        arguments[20] *= info.batch_size
    found, found_dims = rule(loop_backward, tuple(kinds), GRADIENTS, 18)(info, tuple(dims), *arguments)
    found = list(found)
    for n in expanded:
        if found_dims[n] is not None:
            found[n] = found[n].sum(found_dims[n] + 1)
    return tuple(found), found_dims

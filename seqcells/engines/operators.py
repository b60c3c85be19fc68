"""A scan as operators, for compilers, tracers and torch.func, with fakes and vmap rules. What they do is the engine's.

Weights have an axis of groups. Buffers are in the order of time, [., B, K, .], so that their shapes do not depend on
the mask. x [T, B, I] and inputs [T, B, N*H] are shared by all groups, or have an axis of groups before the last. A
missing tensor is None as an argument and an empty tensor [0] as a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..autograd import ENGINES, Options, grouped

if TYPE_CHECKING:
    from torch._functorch.autograd_function import VmapInfo


@torch.library.custom_op("seqcells::scan_forward", mutates_args=())
def scan_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Tensor | None,
    inputs: Tensor | None,
    dropout: Tensor | None,
    mask: Tensor | None,
    engine: str,
    cell: str,
    save: str,
    reversed: int,
    schedule: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See autograd.Engine, `scan`."""
    options = Options(engine, cell, save, reversed, schedule, precision)
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs, dropout)
    return ENGINES[engine].scan(options, save, tensors, mask)


@scan_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:  # those of the operator
    engine, cell, save, reversed = arguments[11:15]
    return tuple(ENGINES[engine].allocate(Options(engine, cell, save, reversed), save, arguments[:10]))


def call_forward(
    options: Options, save: str, inputs: Sequence[Tensor | None], mask: Tensor | None
) -> tuple[Tensor, ...]:
    """An engine's `scan` by the operator."""
    how = (options.engine, options.cell, save, options.reversed, options.schedule, options.precision)
    return scan_forward(*grouped(inputs), mask, *how)


@torch.library.custom_op("seqcells::scan_backward", mutates_args=())
def scan_backward(
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
    dropout: Tensor | None,
    mask: Tensor | None,
    y: Tensor,
    c: Tensor,
    saved: Tensor | None,
    engine: str,
    cell: str,
    reversed: int,
    schedule: str,
    precision: str,
    need: Sequence[bool],
    samples: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the needed gradients of the first 9 inputs; those of weights and params are [samples, K, .], where each
    sample is an equal part of the rows B."""
    options = Options(engine, cell, "gates", reversed, schedule, precision)
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, params, inputs, dropout)
    back = ENGINES[engine].scan_backward
    found = back(options, tensors, mask, (y, c, saved), (dy, dhn, dcn, dcs), need, samples)
    # No two of them may share memory.
    return tuple(
        x.new_empty(0) if d is None or t is None or not n else d.reshape(s).clone() if i in (5, 6, 7) else d.reshape(s)
        for i, (d, t, n, s) in enumerate(zip(found, tensors[:9], need, _shapes(tensors, samples), strict=True))
    )  # type: ignore[return-value]  # nine


def _shapes(tensors: Sequence[Tensor | None], samples: int) -> list[tuple[int, ...]]:
    """The shapes of the gradients of the first 9 inputs."""
    every: list[tuple[int, ...]] = [() if t is None else tuple(t.shape) for t in tensors[:9]]
    return [(samples, *shape) if 3 <= n < 8 else shape for n, shape in enumerate(every)]


@scan_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:  # those of the operator
    tensors, (need, samples) = arguments[4:14], arguments[23:25]
    each = zip(tensors[:9], need, _shapes(tensors, samples), strict=True)
    return tuple(tensors[0].new_empty(s if n and t is not None else 0) for t, n, s in each)


# --- vmap: what it adds becomes more rows, or more groups, of one call ----------------------------------------------
# If weights are shared (per-sample gradients, a batch of batches), rows; if each has its own weights (an ensemble),
# groups: at most MOST in one launch if some are reversed.

MOST = 62  # groups if some are reversed, because their bits are stored in one integer
Axes = tuple[int | None, int | None]
Batched = tuple[tuple[Tensor, ...], tuple[int | None, ...]]  # results, and the axis of each that vmap added
# The axes (rows, groups) of each argument and result: steps, states, weights, mask, dropout; None: not a tensor.
STEPS, STATES, WEIGHTS, MASK, DROPOUT = (1, 2), (1, 0), (None, 0), (1, None), (None, None)
SHARED = (1, None)  # an input shared by all groups: unchanged if vmap adds groups
SAMPLES = (0, 1)  # the gradients of weights: vmap adds samples or groups
INPUTS = (STEPS, STATES, STATES, *(WEIGHTS,) * 5, STEPS)
GRADIENTS = (STEPS, STATES, STATES, *(SAMPLES,) * 5, STEPS)
FORWARD: tuple[Axes | None, ...] = (*INPUTS, DROPOUT, MASK, *(None,) * 6)
BACKWARD: tuple[Axes | None, ...] = (STEPS, STATES, STATES, STEPS, *INPUTS, DROPOUT, MASK, *(STEPS,) * 3, *(None,) * 7)


def _fold(t: Tensor | None, dim: int | None, axis: int | None, size: int) -> Tensor | None:
    """Merge the batch dim of t into its axis, as the slower part; without a batch dim, t is repeated. An empty tensor
    is returned as it is.

    If axis is None, there is no batch dim, or one of size 1.
    """
    if t is None:
        return None
    if axis is None:
        return t if dim is None else t.select(dim, 0)
    if t.dim() == 1 and t.numel() == 0:
        return t
    if dim is None:
        t, dim = t.unsqueeze(0).expand(size, *t.shape), 0
    elif t.dim() == 2 and t.numel() == 0:
        return t.select(dim, 0)
    return t.movedim(dim, axis).flatten(axis, axis + 1)


def _batched(
    op: Callable[..., tuple[Tensor, ...]],
    kinds: Sequence[Axes | None],
    results: Sequence[Axes],
    at_reversed: int,
    groups: bool,
    size: int,
    dims: Sequence[int | None],
    arguments: Sequence[Any],  # tensors, numbers and strings
) -> Batched:
    """An operator's results for a batch of that size, and the axis of each that vmap added.

    kinds, results: of the arguments and results. at_reversed: the number of the argument `reversed`. groups: vmap adds
    groups, not rows.
    """
    every, which, most = list(zip(arguments, dims, kinds, strict=True)), int(groups), size
    w_ih, dim = next((t, d) for t, d, k in every if k is WEIGHTS and t is not None)
    K = w_ih.shape[0] if dim is None else w_ih.select(dim, 0).shape[0]
    drawn = any(k is DROPOUT and t is not None for t, _, k in every)  # by the number of the row and the group
    if drawn or (groups and any(k is MASK and d is not None for _, d, k in every)):
        most = 1  # a mask has rows but no groups: one call after another
    elif groups and arguments[at_reversed]:
        most = max(1, MOST // K)
    if most < size:
        parts = []
        for v in range(0, size, most):
            n = min(most, size - v)
            some = [t if k is None or t is None or d is None else t.narrow(d, v, n) for t, d, k in every]
            parts.append(_batched(op, kinds, results, at_reversed, groups, n, dims, some))
        added = parts[0][1]
        each = zip(zip(*(found for found, _ in parts), strict=True), added, strict=True)
        return tuple(of[0] if d is None else torch.cat(of, d) for of, d in each), added
    folded = [t if k is None else _fold(t, d, k[which], size) for t, d, k in every]
    if groups:
        folded[at_reversed] = sum(arguments[at_reversed] << (K * v) for v in range(size))
    out = op(*folded)
    added = tuple(axes[which] if o.dim() > 1 else None for o, axes in zip(out, results, strict=True))
    return tuple(o if d is None else o.unflatten(d, (size, -1)) for o, d in zip(out, added, strict=True)), added


def _expand_shared(
    kinds: list[Axes | None], arguments: list[Any], dims: list[int | None], first: int, need: Sequence[bool]
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
            if dim is not None:
                t, dims[first + n] = t.movedim(dim, 0), 0
            arguments[first + n] = t.unsqueeze(-2).expand(*t.shape[:-1], K, t.shape[-1])
            expanded.append(n)
    return expanded


@scan_forward.register_vmap
def _(info: VmapInfo, in_dims: Sequence[int | None], *tensors: Any) -> Batched:  # and numbers
    kinds, arguments, dims = list(FORWARD), list(tensors), list(in_dims)
    # Those of the weights. Dropout masks are drawn for one call after another, see `_batched`.
    groups = any(d is not None for d in dims[3:8]) or tensors[9] is not None
    if groups:
        _expand_shared(kinds, arguments, dims, 0, (False,) * 9)
    results = (STEPS, STEPS, STEPS, STATES, STATES)
    return _batched(scan_forward, kinds, results, 14, groups, info.batch_size, dims, arguments)


@scan_backward.register_vmap
def _(info: VmapInfo, in_dims: Sequence[int | None], *tensors: Any) -> Batched:  # and numbers
    kinds, arguments, dims = list(BACKWARD), list(tensors), list(in_dims)
    # The kernels sum the gradients of trained vectors over rows, but not over groups.
    groups = any(d is not None for d in dims[7:12]) or arguments[13] is not None
    groups = groups or (arguments[11] is not None and arguments[18] == "triton")
    expanded = []
    if groups:
        expanded = _expand_shared(kinds, arguments, dims, 4, arguments[23])
    else:
        arguments[24] *= info.batch_size
    found, added = _batched(scan_backward, kinds, GRADIENTS, 20, groups, info.batch_size, dims, arguments)
    each = enumerate(zip(found, added, strict=True))
    return tuple(t if n not in expanded or d is None else t.sum(d + 1) for n, (t, d) in each), added

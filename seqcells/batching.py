"""torch.func.vmap of the operators of a scan: what vmap adds becomes more rows, or more groups, of one launch.

If weights are shared (per-sample gradients, a batch of batches), rows; if each has its own weights (an ensemble),
groups: at most MOST in one launch if some are reversed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST = 62  # groups if some are reversed, because their bits are stored in one integer
# The axes (rows, groups) of each argument and result: of steps, of states, of weights, of the mask; None: not a tensor.
STEPS, STATES, WEIGHTS, MASK = (1, 2), (1, 0), (None, 0), (1, None)


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


def rule(
    op: Any, kinds: tuple[Any, ...], results: tuple[Any, ...], at_reversed: int, needs_groups: bool = False
) -> Any:
    """The vmap rule of an operator. at_reversed: the number of its argument `reversed`. needs_groups: vmap must add
    groups, even if the weights are shared."""

    def together(size: int, dims: Any, arguments: list[Any], groups: bool) -> tuple[list[Tensor], list[int | None]]:
        """The results of one call, and for each the axis that vmap added."""
        which = int(groups)
        folded = [
            t if k is None else _fold(t, d, k[which], size) for t, d, k in zip(arguments, dims, kinds, strict=False)
        ]
        if groups:
            K = next(t for t, k in zip(folded, kinds, strict=False) if k is WEIGHTS and t is not None).shape[0] // size
            folded[at_reversed] = sum(arguments[at_reversed] << (K * v) for v in range(size))
        out = op(*folded)
        found: list[Tensor] = []
        found_dims: list[int | None] = []
        for o, axes in zip(out, results, strict=True):
            axis = axes[which] if o.dim() > 1 else None
            found.append(o if axis is None else o.unflatten(axis, (size, -1)))
            found_dims.append(axis)
        return found, found_dims

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        size = most = info.batch_size
        tensors = [
            (t, d, k) for t, d, k in zip(arguments, in_dims, kinds, strict=False) if k is not None and t is not None
        ]
        own = [t.shape[0] if d is None else t.select(d, 0).shape[0] for t, d, k in tensors if k is WEIGHTS]
        groups = needs_groups or any(k is WEIGHTS and d is not None for _, d, k in tensors)
        if groups and any(k is MASK and d is not None for _, d, k in tensors):
            most = 1  # a mask has rows but no groups: one call after another
        elif groups and arguments[at_reversed]:
            most = max(1, MOST // own[0])
        found: list[Any] = []
        found_dims: list[int | None] = []
        for v in range(0, size, most):
            n = min(most, size - v)
            some = [
                t if k is None or t is None or d is None else t.narrow(d, v, n)
                for t, d, k in zip(arguments, in_dims, kinds, strict=False)
            ]
            out, found_dims = together(n, in_dims, some, groups)
            found.append(out)
        joined = tuple(
            of[0] if d is None or len(of) == 1 else torch.cat(of, d)
            for of, d in zip(zip(*found, strict=True), found_dims, strict=True)
        )
        return joined, tuple(found_dims)

    return batched

"""torch.func.vmap of an engine's operators: what vmap adds becomes more rows, or more groups, of one launch.

Weights shared by all (per-sample gradients, a batch of batches): rows. Weights of each its own (an ensemble): groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The axes (rows, groups) of each argument and result: of steps, of states, of weights, of the mask.
STEPS, STATES, WEIGHTS, MASK = (1, 2), (1, 0), (None, 0), (1, None)
FORWARD = (STEPS, WEIGHTS, WEIGHTS, STATES, STATES, MASK)
BACKWARD = (STEPS, STATES, STATES, STEPS, WEIGHTS, STEPS, STEPS, STEPS, MASK)
RECOMPUTE = (STEPS, WEIGHTS, WEIGHTS, STEPS, STEPS, MASK)
RESULTS = (STEPS, STEPS, STEPS, STATES, STATES)


def _fold(t: Tensor | None, dim: int | None, axis: int | None, size: int) -> Tensor | None:
    """The batch dim of t (none: repeated) as the slower part of its axis; an empty tensor as it is."""
    if t is None or axis is None:
        return t
    if t.dim() == 1 and t.numel() == 0:
        return t
    if dim is None:
        t, dim = t.unsqueeze(0).expand(size, *t.shape), 0
    elif t.dim() == 2 and t.numel() == 0:
        return t.select(dim, 0)
    return t.movedim(dim, axis).flatten(axis, axis + 1)


def _rule(op: Any, kinds: tuple[Any, ...], results: tuple[Any, ...], at_reversed: int) -> Any:
    count = len(kinds)

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        size = info.batch_size
        tensors, dims, rest = arguments[:count], in_dims[:count], list(arguments[count:])
        into_groups = any(d is not None and k is WEIGHTS for d, k in zip(dims, kinds, strict=True))
        masked = any(d is not None and k is MASK for d, k in zip(dims, kinds, strict=True))
        if into_groups and masked:  # a mask has rows, but no groups: one after another
            each = []
            for v in range(size):
                mine = (t if t is None or d is None else t.select(d, v) for t, d in zip(tensors, dims, strict=True))
                out = op(*mine, *rest)
                each.append(out if isinstance(out, tuple) else (out,))
            stacked = tuple(torch.stack(o) for o in zip(*each, strict=True))
            return (stacked, (0,) * len(stacked)) if len(results) > 1 else (stacked[0], 0)
        which = 1 if into_groups else 0
        folded = [_fold(t, d, k[which], size) for t, d, k in zip(tensors, dims, kinds, strict=True)]
        if into_groups:
            K = next(t for t, k in zip(folded, kinds, strict=True) if k is WEIGHTS and t is not None).shape[0] // size
            rest[at_reversed] = sum(rest[at_reversed] << (K * v) for v in range(size))
        out = op(*folded, *rest)
        out = out if isinstance(out, tuple) else (out,)
        found, found_dims = [], []
        for o, axes in zip(out, results, strict=True):
            whole = o.dim() > 1
            found.append(o.unflatten(axes[which], (size, -1)) if whole else o)
            found_dims.append(axes[which] if whole else None)
        return (tuple(found), tuple(found_dims)) if len(results) > 1 else (found[0], found_dims[0])

    return rule


def register(forward: Any, backward: Any, recompute: Any) -> None:
    """Give an engine's operators (see autograd.Engine) their vmap."""
    forward.register_vmap(_rule(forward, FORWARD, RESULTS, 2))
    backward.register_vmap(_rule(backward, BACKWARD, RESULTS, 1))
    recompute.register_vmap(_rule(recompute, RECOMPUTE, RESULTS[:1], 1))

"""torch.func.vmap of an engine's operators: what vmap adds becomes more rows, or more groups, of one launch.

Weights shared by all (per-sample gradients, a batch of batches): rows. Weights of each its own (an ensemble): groups,
of MOST a launch where some are reversed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST = 62  # groups of which some are reversed: their bits are one integer
# The axes (rows, groups) of each argument and result: of steps, of states, of weights, of the mask.
STEPS, STATES, WEIGHTS, MASK = (1, 2), (1, 0), (None, 0), (1, None)
FORWARD = (STEPS, WEIGHTS, WEIGHTS, STATES, STATES, MASK)
BACKWARD = (STEPS, STATES, STATES, STEPS, WEIGHTS, STEPS, STEPS, STEPS, MASK)
RECOMPUTE = (STEPS, WEIGHTS, WEIGHTS, STEPS, STEPS, MASK)
RESULTS = (STEPS, STEPS, STEPS, STATES, STATES)


def _fold(t: Tensor | None, dim: int | None, axis: int | None, size: int) -> Tensor | None:
    """The batch dim of t (none: repeated) as the slower part of its axis; an empty tensor as it is.

    With no axis to take it, it is none, or one alone.
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


def _rule(op: Any, kinds: tuple[Any, ...], results: tuple[Any, ...], at_reversed: int) -> Any:
    count = len(kinds)

    def together(size: int, dims: Any, tensors: Any, rest: tuple[Any, ...]) -> tuple[list[Tensor], list[int | None]]:
        """The results of one call, and the axis of each that vmap added."""
        which = 1 if any(d is not None and k is WEIGHTS for d, k in zip(dims, kinds, strict=True)) else 0
        folded = [_fold(t, d, k[which], size) for t, d, k in zip(tensors, dims, kinds, strict=True)]
        if which == 1:
            K = next(t for t, k in zip(folded, kinds, strict=True) if k is WEIGHTS and t is not None).shape[0] // size
            bits = sum(rest[at_reversed] << (K * v) for v in range(size))
            rest = (*rest[:at_reversed], bits, *rest[at_reversed + 1 :])
        out = op(*folded, *rest)
        found: list[Tensor] = []
        found_dims: list[int | None] = []
        for o, axes in zip(out if isinstance(out, tuple) else (out,), results, strict=True):
            whole = o.dim() > 1
            found.append(o.unflatten(axes[which], (size, -1)) if whole else o)
            found_dims.append(axes[which] if whole else None)
        return found, found_dims

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        size, rest, most = info.batch_size, arguments[count:], info.batch_size
        batched = [
            (t, d, k) for t, d, k in zip(arguments, in_dims, kinds, strict=False) if t is not None and d is not None
        ]
        own = [t.select(d, 0).shape[0] for t, d, k in batched if k is WEIGHTS]  # the groups of each
        if own and any(k is MASK for _, _, k in batched):
            most = 1  # a mask has rows, but no groups: one after another
        elif own and rest[at_reversed]:
            most = max(1, MOST // own[0])
        found: list[Any] = []
        found_dims: list[int | None] = []
        for v in range(0, size, most):
            n = min(most, size - v)
            some = (
                t if t is None or d is None else t.narrow(d, v, n)
                for t, d in zip(arguments[:count], in_dims, strict=False)
            )
            out, found_dims = together(n, in_dims[:count], tuple(some), rest)
            found.append(out)
        joined = tuple(
            of[0] if d is None or len(of) == 1 else torch.cat(of, d)
            for of, d in zip(zip(*found, strict=True), found_dims, strict=True)
        )
        return (joined, tuple(found_dims)) if len(results) > 1 else (joined[0], found_dims[0])

    return rule


def register(forward: Any, backward: Any, recompute: Any) -> None:
    """Give an engine's operators (see autograd.Engine) their vmap."""
    forward.register_vmap(_rule(forward, FORWARD, RESULTS, 2))
    backward.register_vmap(_rule(backward, BACKWARD, RESULTS, 1))
    recompute.register_vmap(_rule(recompute, RECOMPUTE, RESULTS[:1], 1))

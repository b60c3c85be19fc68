"""Heads: hidden units in groups whose recurrent products stay within the group (a block-diagonal recurrence).

For an engine, each head of each direction is one group of a scan. A layer's tensors have all heads side by side within
each gate: the rows of its weights are [G, heads, H/heads].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import Call


def split_heads(call: Call, heads: int, hidden_size: int) -> Call:
    """The call of a layer, whose groups are its directions, with a group for each head of each direction."""
    D, H = len(call.groups), hidden_size

    def first(t: Tensor, dim: int) -> Tensor:
        """[., n*H, .] to [., heads, ., n*H/heads, .], with the heads before that axis moved to the front."""
        parts = t.unflatten(dim, (t.shape[dim] // H, heads, H // heads))
        return parts.movedim(dim + 1, 0).flatten(dim + 1, dim + 2)

    def together(tensors: Sequence[Tensor | None]) -> Tensor | None:
        given = [first(t, 0) for t in tensors if t is not None]
        return torch.cat(given) if given else None

    stacked = [together(of) for of in zip(*call.groups, strict=True)]
    states = tuple(None if s is None else first(s, 2).transpose(0, 1).flatten(0, 1) for s in call.states)
    params, inputs = call.params, call.inputs
    if params is not None:
        params = first(params.reshape(D, -1), 1).transpose(0, 1).flatten(0, 1)
    if inputs is not None:
        inputs = first(inputs, 2).movedim(0, 2).repeat(1, 1, D, 1)
    groups = [tuple(None if t is None else t[k] for t in stacked) for k in range(D * heads)]
    return call._replace(states=states, groups=groups, stacked=stacked, params=params, inputs=inputs)


def join_heads(state: Tensor, heads: int) -> Tensor:
    """A final state of each head of each direction [D*heads, B, H/heads] as that of each direction [D, B, H]."""
    return state.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)

"""One layer's call, selected from the tensors of all layers; and heads: hidden units in groups whose recurrent products
stay within the group (a block-diagonal recurrence).

For an engine, each head of each direction is one group of a scan. A layer's tensors have all heads side by side within
each gate: the rows of its weights are [G, heads, H/heads].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import extras
from .dispatch import Call
from .modules import PARTS

if TYPE_CHECKING:
    from .engines.aten import Weights
    from .recurrent import Recurrent


def layer_call(
    module: Recurrent, layer: int, x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> Call:
    """One layer's tensors, selected from those of all layers."""
    count = 2 if module.bidirectional else 1
    n, first = len(weights) // (count * module.num_layers), layer * count
    given = [weights[k * n : (k + 1) * n] for k in range(first, first + count)]
    own = tuple(None if s is None else s[first : first + count] for s in states)
    if module._parts == PARTS:
        return Call(x, own, given)
    named = [dict(zip(module._parts, of, strict=True)) for of in given]
    nothing = x.new_empty(0, x.shape[-1])  # weight_ih of a cell that reads no x
    groups: list[Weights] = [
        (
            of.get("weight_ih", nothing),
            *(of.get(part) for part in PARTS[1:]),
            *[of[part] for part in of if part == "weight_hr"],
        )
        for of in named
    ]
    if module._parts[0] != "weight_ih":
        # No weight has the hidden size, so states must.
        own = tuple(x.new_zeros(count, x.shape[1], module.hidden_size) if s is None else s for s in own)
    cell = module.cell
    vectors = [{name: of[name] for name in cell.params} for of in named]
    params = extras.params(cell, vectors, x, module.hidden_size) if cell.params else None
    return Call(x, own, groups, params=params)


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

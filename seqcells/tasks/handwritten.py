"""The LSTM and GRU cells of the count-ones notebook, as they are often written by hand.

`seqcells.interop.from_handwritten_lstm` and `from_handwritten_gru` read their state_dicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import arguments, checks


class HandwrittenLSTMCell(nn.Module):
    """An LSTM cell as often written by hand: one Linear for the input, one for the state, both with bias.

    x [B, I], (h, c) each [B, H]; all weights U(-sqrt(3/H), sqrt(3/H)). Gate order i f g o.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        _sizes(input_size, hidden_size)
        self.x_fc = nn.Linear(input_size, 4 * hidden_size)
        self.h_fc = nn.Linear(hidden_size, 4 * hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -math.sqrt(3 / hidden_size), math.sqrt(3 / hidden_size))

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        _check(x, states, "states", self.x_fc, self.h_fc)
        h, c = states
        i, f, g, o = (self.x_fc(x) + self.h_fc(h)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def cell_state_dict(self) -> dict[str, Tensor]:
        """The weights as seqcells.LSTMCell (and torch.nn.LSTMCell) names them."""
        x, h = self.x_fc, self.h_fc
        return _detached({"weight_ih": x.weight, "weight_hh": h.weight, "bias_ih": x.bias, "bias_hh": h.bias})

    def load_cell_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the weights of an LSTMCell. TypeError or RuntimeError where they do not fit."""
        _check_state(state, self.cell_state_dict())
        self.x_fc.load_state_dict({"weight": state["weight_ih"], "bias": state["bias_ih"]})
        self.h_fc.load_state_dict({"weight": state["weight_hh"], "bias": state["bias_hh"]})


class HandwrittenGRUCell(nn.Module):
    """A GRU cell as often written by hand: six Linears with bias, the reset gate before the product.

    x [B, I], h [B, H]; weights as torch.nn.Linear initialises them.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        _sizes(input_size, hidden_size)
        self.x_fc_r = nn.Linear(input_size, hidden_size)
        self.x_fc_z = nn.Linear(input_size, hidden_size)
        self.x_fc_n = nn.Linear(input_size, hidden_size)
        self.h_fc_r = nn.Linear(hidden_size, hidden_size)
        self.h_fc_z = nn.Linear(hidden_size, hidden_size)
        self.h_fc_n = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        _check(x, (h,), "h", self.x_fc_r, self.h_fc_r)
        r = torch.sigmoid(self.x_fc_r(x) + self.h_fc_r(h))
        z = torch.sigmoid(self.x_fc_z(x) + self.h_fc_z(h))
        n = torch.tanh(self.x_fc_n(x) + self.h_fc_n(r * h))
        return z * h + (1 - z) * n

    def _parts(self, kind: str) -> list[nn.Linear]:
        return [getattr(self, f"{kind}_fc_{gate}") for gate in "rzn"]

    def cell_state_dict(self) -> dict[str, Tensor]:
        """The weights as seqcells.GRUCell(..., reset_after=False) names them."""
        state = {}
        for kind, name in (("x", "ih"), ("h", "hh")):
            state[f"weight_{name}"] = torch.cat([part.weight for part in self._parts(kind)])
            state[f"bias_{name}"] = torch.cat([part.bias for part in self._parts(kind)])
        return _detached(state)

    def load_cell_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a reset-before GRUCell. TypeError or RuntimeError where they do not fit."""
        _check_state(state, self.cell_state_dict())
        for kind, name in (("x", "ih"), ("h", "hh")):
            weights, biases = state[f"weight_{name}"].chunk(3), state[f"bias_{name}"].chunk(3)
            for part, weight, bias in zip(self._parts(kind), weights, biases, strict=True):
                part.load_state_dict({"weight": weight, "bias": bias})


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.items()}


def _sizes(input_size: int, hidden_size: int) -> None:
    checks.integer("input_size", input_size, least=1)
    checks.integer("hidden_size", hidden_size, least=1)


def _check(x: Tensor, states: Sequence[Tensor], name: str, x_fc: nn.Linear, h_fc: nn.Linear) -> None:
    """Raise unless x is [B, I] and the states are [B, H]. name: what the argument of the states is called."""
    checks.tensor("x", x)
    if name == "states":
        checks.tensors(name, states, "a tuple of two tensors (h, c)", 2)
    weights = [checks.parameter(x_fc, "weight"), checks.parameter(h_fc, "weight")]
    if x.dim() != 2 or x.shape[1] != x_fc.in_features:
        raise RuntimeError(f"x must have shape (B, {x_fc.in_features}), got {tuple(x.shape)}")
    expected = (x.shape[0], h_fc.in_features)
    for s in states:
        checks.tensor(name, s)
        if s.shape != expected:
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(s.shape)}")
    if not torch._C._is_any_autocast_enabled():
        arguments.together(x, states, weights)


def _check_state(given: Mapping[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise unless given is a state_dict that fits own, the cell's."""
    if not isinstance(given, Mapping):
        raise checks.wrong("state", "a state_dict", given)
    for name, mine in own.items():
        if name not in given:
            raise RuntimeError(f"state has no {name}")
        checks.tensor(name, given[name])
        if given[name].is_meta and not mine.is_meta:
            raise RuntimeError(f"{name} is on the meta device: it has no values to copy")
        if given[name].shape != mine.shape:
            raise RuntimeError(f"{name} must have shape {tuple(mine.shape)}, got {tuple(given[name].shape)}")

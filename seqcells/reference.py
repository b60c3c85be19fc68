"""Pure-PyTorch recurrent cells and the loop over time: the specification.

Slow and obvious; any floating dtype, any device, differentiable any number of times. Everything else in seqcells is
judged by it. Parameter names, gate order and shapes are torch.nn's:

    w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] or None; G = 4 (LSTM: i f g o), 3 (GRU: r z n), 1 (RNN)
    x [T, B, I] (a cell: [B, I]); states [B, H]; resets bool [T, B]; lengths int [B]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

States = tuple[Tensor, ...]
Step = Callable[[Tensor, States, Tensor, Tensor, "Tensor | None", "Tensor | None"], States]


def lstm_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One LSTM step, as torch.nn.LSTMCell documents it. states: (h, c), returns (h', c')."""
    h, c = states
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One GRU step, the reset gate applied after the product, as torch.nn.GRUCell documents it. states: (h,)."""
    (h,) = states
    gx_r, gx_z, gx_n = linear(x, w_ih, b_ih).chunk(3, -1)
    hu_r, hu_z, hu_n = linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = (gx_r + hu_r).sigmoid(), (gx_z + hu_z).sigmoid()
    n = (gx_n + r * hu_n).tanh()
    return ((1 - z) * n + z * h,)


def gru_before_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One GRU step, the reset gate applied to h before the product (Cho et al. 2014, arXiv:1406.1078 v1)."""
    (h,) = states
    H = h.shape[-1]
    gx_r, gx_z, gx_n = linear(x, w_ih, b_ih).chunk(3, -1)
    hu_r, hu_z = linear(h, w_hh[: 2 * H], None if b_hh is None else b_hh[: 2 * H]).chunk(2, -1)
    r, z = (gx_r + hu_r).sigmoid(), (gx_z + hu_z).sigmoid()
    n = (gx_n + linear(r * h, w_hh[2 * H :], None if b_hh is None else b_hh[2 * H :])).tanh()
    return ((1 - z) * n + z * h,)


def rnn_tanh_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One Elman step with tanh, as torch.nn.RNNCell documents it. states: (h,)."""
    return ((linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh)).tanh(),)


def rnn_relu_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One Elman step with relu, as torch.nn.RNNCell documents it. states: (h,)."""
    return ((linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh)).relu(),)


@dataclass(frozen=True)
class Cell:
    """A cell's specification. gates: G, the rows of its weights in units of H; states: 1 (h) or 2 (h and c)."""

    step: Step
    gates: int
    states: int


# By the names the kernels know the cells by.
CELLS: dict[str, Cell] = {
    "lstm": Cell(lstm_cell, 4, 2),
    "gru": Cell(gru_cell, 3, 1),
    "gru_before": Cell(gru_before_cell, 3, 1),
    "rnn_tanh": Cell(rnn_tanh_cell, 1, 1),
    "rnn_relu": Cell(rnn_relu_cell, 1, 1),
}


def get(name: str) -> Cell:
    """The specification of the cell of that name. ValueError if there is none."""
    if name not in CELLS:
        raise ValueError(f"unknown cell {name!r}: expected one of {', '.join(CELLS)}")
    return CELLS[name]


def scan(
    step: Step,
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, States]:
    """step over all of x [T, B, I]: outputs [T, B, H] and the final states.

    resets: where set, the states before that step are zero. lengths: from step lengths[b] on, row b keeps its states
    and outputs zero.
    """
    outputs = []
    for t in range(x.shape[0]):
        if resets is not None:
            states = tuple(s.masked_fill(resets[t, :, None], 0) for s in states)
        new = step(x[t], states, w_ih, w_hh, b_ih, b_hh)
        output = new[0]
        if lengths is not None:
            alive = (t < lengths)[:, None]
            new = tuple(torch.where(alive, n, s) for n, s in zip(new, states, strict=True))
            output = output.masked_fill(~alive, 0)
        states = new
        outputs.append(output)
    return torch.stack(outputs), states


def scan_groups(
    step: Step,
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    reversed: int = 0,
) -> tuple[Tensor, States]:
    """K scans side by side: outputs [T, B, K*H] and the final states [K, B, H].

    w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H], states [K, B, H] (of one group also without K); x [T, B, I]
    for all groups or [T, B, K, I] for each. Group k walks from the last step to the first if bit k of reversed is set.
    """
    if w_hh.dim() == 2:
        w_ih, w_hh = w_ih[None], w_hh[None]
        b_ih, b_hh = (None if b is None else b[None] for b in (b_ih, b_hh))
    K, H = w_hh.shape[0], w_hh.shape[2]
    states = tuple(s.reshape(K, -1, H) for s in states)
    outputs, finals = [], []
    for k in range(K):
        back = reversed >> k & 1
        inputs, mask = (x if x.dim() == 3 else x[:, :, k]), resets
        if back:
            inputs, mask = inputs.flip(0), None if resets is None else resets.flip(0)
        weights = (None if w is None else w[k] for w in (w_ih, w_hh, b_ih, b_hh))
        y, final = scan(step, inputs, tuple(s[k] for s in states), *weights, resets=mask)  # type: ignore[arg-type]
        outputs.append(y.flip(0) if back else y)
        finals.append(final)
    return torch.cat(outputs, 2), tuple(torch.stack(s) for s in zip(*finals, strict=True))


class HandwrittenLSTMCell(nn.Module):
    """The LSTM cell as people write it by hand: one Linear for the input, one for the state, both with bias.

    x [B, I], (h, c) each [B, H]; all weights U(-sqrt(3/H), sqrt(3/H)). Gate order i f g o.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.x_fc = nn.Linear(input_size, 4 * hidden_size)
        self.h_fc = nn.Linear(hidden_size, 4 * hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -math.sqrt(3 / hidden_size), math.sqrt(3 / hidden_size))

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = states
        i, f, g, o = (self.x_fc(x) + self.h_fc(h)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def cell_state_dict(self) -> dict[str, Tensor]:
        """The weights as seqcells.LSTMCell (and torch.nn.LSTMCell) names them."""
        x, h = self.x_fc, self.h_fc
        return _detached({"weight_ih": x.weight, "weight_hh": h.weight, "bias_ih": x.bias, "bias_hh": h.bias})

    def load_cell_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the weights of an LSTMCell. KeyError or RuntimeError where they do not fit."""
        self.x_fc.load_state_dict({"weight": state["weight_ih"], "bias": state["bias_ih"]})
        self.h_fc.load_state_dict({"weight": state["weight_hh"], "bias": state["bias_hh"]})


class HandwrittenGRUCell(nn.Module):
    """The GRU cell as people write it by hand: six Linears with bias, the reset gate before the product.

    x [B, I], h [B, H]; weights as torch.nn.Linear initialises them.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.x_fc_r = nn.Linear(input_size, hidden_size)
        self.x_fc_z = nn.Linear(input_size, hidden_size)
        self.x_fc_n = nn.Linear(input_size, hidden_size)
        self.h_fc_r = nn.Linear(hidden_size, hidden_size)
        self.h_fc_z = nn.Linear(hidden_size, hidden_size)
        self.h_fc_n = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
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
        """Take the weights of a reset-before GRUCell. KeyError or RuntimeError where they do not fit."""
        for kind, name in (("x", "ih"), ("h", "hh")):
            weights, biases = state[f"weight_{name}"].chunk(3), state[f"bias_{name}"].chunk(3)
            for part, weight, bias in zip(self._parts(kind), weights, biases, strict=True):
                part.load_state_dict({"weight": weight, "bias": bias})


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.items()}

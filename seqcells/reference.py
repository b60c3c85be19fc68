"""Pure-PyTorch recurrent cells and the loop over time: the specification.

Slow and obvious; any floating dtype, any device, differentiable any number of times. Everything else in seqcells is
judged by it. Parameter names, gate order and shapes are torch.nn's:

    w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] or None; G = 4 (LSTM: i f g o), 3 (GRU: r z n), 1 (RNN)
    x [T, B, I] (a cell: [B, I]); states [B, H]; resets bool [T, B]; lengths int [B]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
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

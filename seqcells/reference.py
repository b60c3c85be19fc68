"""Pure-PyTorch recurrent cells and the loop over time: the specification.

Slow and obvious; any floating dtype, any device, differentiable any number of times. Everything else in seqcells is
judged by it. Parameter names, gate order and shapes are torch.nn's:

    w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] or None; G = 4 (LSTM: i f g o), 3 (GRU: r z n), 1 (RNN)
    x [T, B, I] (a cell: [B, I]); states [B, H]; resets bool [T, B]; lengths int [B]
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import cells, reference_arguments
from .cell import Cell, named

States = tuple[Tensor, ...]
Step = Callable[..., States]  # (x, states, w_ih, w_hh, b_ih, b_hh), and params and inputs, if there are any


def step_of(of: str | Cell) -> Step:
    """The step of a cell on weights, as `scan` takes it.

    step(x [B, I], states, w_ih, w_hh, b_ih, b_hh, params, inputs) -> the states after it, and before them an output
    that is no state. Weights and biases have rows for the gates that have one, in the cell's order; params are its
    trained vectors [H], inputs those of the step [B, H].
    """
    found = named(of)

    def step(*arguments: Any) -> States:
        return _step(found, *arguments)

    step.rows = found.rows  # type: ignore[attr-defined]
    return step


def _step(
    of: Cell,
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: States = (),
    inputs: States = (),
) -> States:
    H = states[0].shape[-1]
    if b_ih is None or of.rows[2] == of.rows[0]:
        gates = linear(x, w_ih, b_ih).split(H, -1)
    else:
        products = zip(linear(x, w_ih).split(H, -1), _biases(of, of.x_gates, b_ih, H), strict=True)
        gates = tuple(p if b is None else p + b for p, b in products)
    recurrent = () if w_hh is None else _products(of, states, w_hh, b_hh)
    found = of(_by_gate(of.x_gates)(*gates), _by_gate(of.u_gates)(*recurrent), *states, *params, *inputs)
    results = found if isinstance(found, (tuple, list)) else (found,)
    shape = states[0].shape
    results = tuple(r if r.shape == shape else r.expand(shape) for r in results)  # made of trained vectors alone
    return (*results[len(states) :], *results[: len(states)]) if of.outputs else results


def _products(of: Cell, states: States, w_hh: Tensor, b_hh: Tensor | None) -> list[Callable[[Tensor], Tensor]]:
    """U.k of each gate k that has one: those of neighbouring gates with the same state by one product."""
    H, count = w_hh.shape[1], len(of.u_gates)
    if b_hh is not None and of.rows[3] < count:
        biases = _biases(of, of.u_gates, b_hh, H)
        return [partial(linear, weight=w, bias=b) for w, b in zip(w_hh.split(H), biases, strict=True)]
    found: list[Callable[[Tensor], Tensor]] = []
    for state, first, n in of.runs:
        w, b = w_hh, b_hh
        if n < count:
            w, b = w[first * H : (first + n) * H], None if b is None else b[first * H : (first + n) * H]
        if state >= 0:
            together = linear(states[state], w, b).split(H, -1)
            found += [_product(states[state], p, k, w, b) for k, p in enumerate(together)]
        else:
            each = (None,) * n if b is None else b.split(H)
            found += [partial(linear, weight=one, bias=bias) for one, bias in zip(w.split(H), each, strict=True)]
    return found


def _product(state: Tensor, known: Tensor, k: int, w: Tensor, b: Tensor | None) -> Callable[[Tensor], Tensor]:
    """U.k, the k-th block of w and b; known: of that state."""

    def times(v: Tensor) -> Tensor:
        if v is state:
            return known
        H = known.shape[-1]
        return linear(v, w[k * H : (k + 1) * H], None if b is None else b[k * H : (k + 1) * H])

    return times


def _biases(of: Cell, gates: tuple[str, ...], b: Tensor, H: int) -> list[Tensor | None]:
    """Of each gate its bias; None: it has none."""
    given = iter(b.split(H))
    return [next(given) if g in of.biased else None for g in gates]


def _by_gate(gates: tuple[str, ...]) -> Any:
    """A type that has something by each gate's name, and that torch.compile follows."""
    if gates not in _TYPES:
        _TYPES[gates] = namedtuple("by_gate", gates)
    return _TYPES[gates]


_TYPES: dict[tuple[str, ...], Any] = {}


@reference_arguments.explained(gates=4, count=2)
def lstm_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One LSTM step, as torch.nn.LSTMCell documents it. states: (h, c), returns (h', c')."""
    return _step(cells.lstm, x, states, w_ih, w_hh, b_ih, b_hh)


@reference_arguments.explained(gates=3, count=1)
def gru_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One GRU step, the reset gate applied after the product, as torch.nn.GRUCell documents it. states: (h,)."""
    return _step(cells.gru, x, states, w_ih, w_hh, b_ih, b_hh)


@reference_arguments.explained(gates=3, count=1)
def gru_before_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One GRU step, the reset gate applied to h before the product (Cho et al. 2014, arXiv:1406.1078 v3)."""
    return _step(cells.gru_before, x, states, w_ih, w_hh, b_ih, b_hh)


@reference_arguments.explained(gates=1, count=1)
def rnn_tanh_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One Elman step with tanh, as torch.nn.RNNCell documents it. states: (h,)."""
    return _step(cells.rnn_tanh, x, states, w_ih, w_hh, b_ih, b_hh)


@reference_arguments.explained(gates=1, count=1)
def rnn_relu_cell(
    x: Tensor, states: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> States:
    """One Elman step with relu, as torch.nn.RNNCell documents it. states: (h,)."""
    return _step(cells.rnn_relu, x, states, w_ih, w_hh, b_ih, b_hh)


def scan_states(
    step: Step,
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    params: States = (),
    inputs: States = (),
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[States, States]:
    """step over all of x [T, B, I]: every state after each step, [T, B, H] each, and the final states [B, H].

    A step may return one tensor more than there are states: its output, as the first.
    params, inputs: further arguments of the step, if there are any: trained vectors [H] or [1], and of inputs [T, B, H]
    each its step.
    resets: where set, an episode begins at that step: no state crosses from the step before it, in either direction.
    lengths: from step lengths[b] on, row b keeps its states and outputs zero. reverse: walk from the last step to the
    first.
    """
    weights = (w_ih, w_hh, b_ih, b_hh)
    resets, lengths = reference_arguments.scan(step, x, states, weights, params, inputs, resets, lengths, reverse)
    more = params or inputs
    T = x.shape[0]
    outputs: list[States] = []
    for t in range(T - 1, -1, -1) if reverse else range(T):
        if resets is not None and not (reverse and t == T - 1):
            begins = t + 1 if reverse else t
            crossing = resets[begins] if lengths is None else resets[begins] & (begins < lengths)
            states = tuple(s.masked_fill(crossing[:, None], 0) for s in states)
        # Padding is masked before the step: were it NaN, masking the result would still leave NaN in the gradients.
        alive = None if lengths is None else (t < lengths)[:, None]
        now, *beside = (s[t] if alive is None else s[t].masked_fill(~alive, 0) for s in (x, *inputs))
        output = step(now, states, *weights, *((params, tuple(beside)) if more else ()))
        new = output[len(output) - len(states) :]
        if alive is not None:
            output = tuple(n.masked_fill(~alive, 0) for n in output)
            new = tuple(torch.where(alive, n, s) for n, s in zip(new, states, strict=True))
        states = new
        outputs.append(output)
    if reverse:
        outputs.reverse()
    return tuple(torch.stack(s) for s in zip(*outputs, strict=True)), states


def scan(step: Step, x: Tensor, states: States, *weights: Tensor | None, **options: Any) -> tuple[Tensor, States]:
    """Outputs [T, B, H] and the final states: `scan_states`, of which the first is the output."""
    every, final = scan_states(step, x, states, *weights, **options)  # type: ignore[arg-type]
    return every[0], final


def scan_groups(
    step: Step,
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor | None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    params: States = (),
    inputs: States = (),
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    reversed: int = 0,
) -> tuple[States, States]:
    """K scans side by side: every state after each step [T, B, K*H], and the final states [K, B, H].

    w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H], params [K, H], states [K, B, H] (of one group also without
    K); x [T, B, I] for all groups or [T, B, K, I] for each; inputs [T, B, H] for all. Group k walks from the last step
    to the first if bit k of reversed is set. Half precision is computed in float32, and rounded in the end.
    """
    reference_arguments.groups(step, x, states, (w_ih, w_hh, b_ih, b_hh), reversed)
    dtype, alone = x.dtype, w_ih.dim() == 2
    exact = torch.float32 if dtype.itemsize < 4 else dtype
    x, inputs = x.to(exact), tuple(t.to(exact) for t in inputs)
    weights = [None if t is None else t.to(exact)[None] if alone else t.to(exact) for t in (w_ih, w_hh, b_ih, b_hh)]
    vectors = [t.to(exact)[None] if alone else t.to(exact) for t in params]
    K, H = 1 if alone else w_ih.shape[0], states[0].shape[-1]
    states = tuple(s.to(exact).reshape(K, -1, H) for s in states)
    outputs, finals = [], []
    for k in range(K):
        every, final = scan_states(
            step,
            x if x.dim() == 3 else x[:, :, k],
            tuple(s[k] for s in states),
            *(None if w is None else w[k] for w in weights),  # type: ignore[arg-type]
            params=tuple(v[k] for v in vectors),
            inputs=inputs,
            resets=resets,
            lengths=lengths,
            reverse=bool(reversed >> k & 1),
        )
        outputs.append(every)
        finals.append(final)
    return (
        tuple(torch.cat(s, 2).to(dtype) for s in zip(*outputs, strict=True)),
        tuple(torch.stack(s).to(dtype) for s in zip(*finals, strict=True)),
    )


class HandwrittenLSTMCell(nn.Module):
    """The LSTM cell as people write it by hand: one Linear for the input, one for the state, both with bias.

    x [B, I], (h, c) each [B, H]; all weights U(-sqrt(3/H), sqrt(3/H)). Gate order i f g o.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        reference_arguments.sizes(input_size, hidden_size)
        self.x_fc = nn.Linear(input_size, 4 * hidden_size)
        self.h_fc = nn.Linear(hidden_size, 4 * hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -math.sqrt(3 / hidden_size), math.sqrt(3 / hidden_size))

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        reference_arguments.handwritten(x, states, "states", self.x_fc, self.h_fc)
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
        reference_arguments.state(state, self.cell_state_dict())
        self.x_fc.load_state_dict({"weight": state["weight_ih"], "bias": state["bias_ih"]})
        self.h_fc.load_state_dict({"weight": state["weight_hh"], "bias": state["bias_hh"]})


class HandwrittenGRUCell(nn.Module):
    """The GRU cell as people write it by hand: six Linears with bias, the reset gate before the product.

    x [B, I], h [B, H]; weights as torch.nn.Linear initialises them.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        reference_arguments.sizes(input_size, hidden_size)
        self.x_fc_r = nn.Linear(input_size, hidden_size)
        self.x_fc_z = nn.Linear(input_size, hidden_size)
        self.x_fc_n = nn.Linear(input_size, hidden_size)
        self.h_fc_r = nn.Linear(hidden_size, hidden_size)
        self.h_fc_z = nn.Linear(hidden_size, hidden_size)
        self.h_fc_n = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        reference_arguments.handwritten(x, (h,), "h", self.x_fc_r, self.h_fc_r)
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
        reference_arguments.state(state, self.cell_state_dict())
        for kind, name in (("x", "ih"), ("h", "hh")):
            weights, biases = state[f"weight_{name}"].chunk(3), state[f"bias_{name}"].chunk(3)
            for part, weight, bias in zip(self._parts(kind), weights, biases, strict=True):
                part.load_state_dict({"weight": weight, "bias": bias})


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in state.items()}

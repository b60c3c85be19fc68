"""Recurrent cells in pure PyTorch, and the loop over time: the specification.

Slow and simple. It runs in any floating dtype, on any device, and is differentiable any number of times. Everything
else in seqcells is tested against it. Parameter names, gate order and shapes are torch.nn's:

    w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H] or None; G = 4 (LSTM: i f g o), 3 (GRU: r z n), 1 (RNN)
    x [T, B, I] (a cell: [B, I]); states [B, H]; resets bool [T, B]; lengths int [B]
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import arguments, cells
from .arguments import States, Step
from .cell import Cell, named


def step_of(of: str | Cell) -> Step:
    """The step of a cell as a function of the weights, for `scan`.

    step(x [B, I], states, w_ih, w_hh, b_ih, b_hh, params, inputs) returns the states after the step, preceded by the
    output if that is not a state. Weights and biases have rows only for the gates that have one, in the cell's order.
    params: the cell's trained vectors [H]. inputs: its inputs of this step [B, H].
    """
    cell = named(of)

    def step(
        x: Tensor,
        states: States,
        w_ih: Tensor,
        w_hh: Tensor | None,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
        params: States = (),
        inputs: States = (),
    ) -> States:
        H = states[0].shape[-1]
        if b_ih is None or cell.rows[2] == cell.rows[0]:
            gates = linear(x, w_ih, b_ih).split(H, -1)
        else:
            products = zip(linear(x, w_ih).split(H, -1), _biases(cell, cell.x_gates, b_ih, H), strict=True)
            gates = tuple(p if b is None else p + b for p, b in products)
        recurrent = () if w_hh is None else _products(cell, states, w_hh, b_hh)
        x_type, u_type = cell.by_gate
        found = cell(x_type(*gates), u_type(*recurrent), *states, *params, *inputs)
        results = found if isinstance(found, (tuple, list)) else (found,)
        shape = states[0].shape
        results = tuple(r if r.shape == shape else r.expand(shape) for r in results)  # of trained vectors alone
        return (*results[len(states) :], *results[: len(states)]) if cell.outputs else results

    step.rows = cell.rows  # type: ignore[attr-defined]  # an attribute of this function alone
    return step


def _products(cell: Cell, states: States, w_hh: Tensor, b_hh: Tensor | None) -> list[Callable[[Tensor], Tensor]]:
    """U.k for each gate k that has one. Neighbouring gates that multiply the same state share one product."""
    H, count = w_hh.shape[1], len(cell.u_gates)
    if b_hh is not None and cell.rows[3] < count:
        biases = _biases(cell, cell.u_gates, b_hh, H)
        return [partial(linear, weight=w, bias=b) for w, b in zip(w_hh.split(H), biases, strict=True)]
    found: list[Callable[[Tensor], Tensor]] = []
    for state, first, n in cell.runs:
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
    """U.k as a function, from the k-th block of w and b. known: its value for that state."""

    def times(v: Tensor) -> Tensor:
        if v is state:
            return known
        H = known.shape[-1]
        return linear(v, w[k * H : (k + 1) * H], None if b is None else b[k * H : (k + 1) * H])

    return times


def _biases(cell: Cell, gates: tuple[str, ...], b: Tensor, H: int) -> list[Tensor | None]:
    """The bias of each gate; None for a gate without one."""
    given = iter(b.split(H))
    return [next(given) if g in cell.biased else None for g in gates]


lstm_cell = arguments.explained(
    cells.lstm, step_of(cells.lstm), "One LSTM step, as torch.nn.LSTMCell. states: (h, c), returns (h', c')."
)
gru_cell = arguments.explained(
    cells.gru,
    step_of(cells.gru),
    "One GRU step, the reset gate applied after the product, as torch.nn.GRUCell. states: (h,), returns (h',).",
)
gru_before_cell = arguments.explained(
    cells.gru_before,
    step_of(cells.gru_before),
    "One GRU step, the reset gate applied to h before the product (Cho et al. 2014, arXiv:1406.1078 v3). "
    "states: (h,), returns (h',).",
)
rnn_tanh_cell = arguments.explained(
    cells.rnn_tanh, step_of(cells.rnn_tanh), "One Elman step with tanh, as torch.nn.RNNCell. states: (h,)."
)
rnn_relu_cell = arguments.explained(
    cells.rnn_relu, step_of(cells.rnn_relu), "One Elman step with relu, as torch.nn.RNNCell. states: (h,)."
)


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
    """Apply step to each step of x [T, B, I]. Returns all states after each step, [T, B, H] each, and the final states
    [B, H].

    step may return one more tensor than there are states: its output, as the first.
    params, inputs: further arguments of step, if it has any: trained vectors [H] or [1], and per-step inputs [T, B, H].
    resets: where True, the states before that step are zero: no state crosses, in either direction. lengths: from step
    lengths[b] on, row b is padding: its states stay as they are, and outputs are zero. reverse: run from the last step
    to the first.
    """
    weights = (w_ih, w_hh, b_ih, b_hh)
    arguments.reference_scan(step, x, states, weights, params, inputs, reverse)
    resets = arguments.resets(resets, x.shape[:2], x.device)
    lengths = arguments.lengths(lengths, x.shape[:2], x.device)
    more = params or inputs
    T = x.shape[0]
    outputs: list[States] = []
    for t in range(T - 1, -1, -1) if reverse else range(T):
        if resets is not None and not (reverse and t == T - 1):
            first = t + 1 if reverse else t  # step of an episode
            reset = resets[first] if lengths is None else resets[first] & (first < lengths)
            states = tuple(s.masked_fill(reset[:, None], 0) for s in states)
        # Padding is masked before the step: were it NaN, masking the result would still leave NaN in the gradients.
        active = None if lengths is None else (t < lengths)[:, None]
        now, *beside = (s[t] if active is None else s[t].masked_fill(~active, 0) for s in (x, *inputs))
        output = step(now, states, *weights, *((params, tuple(beside)) if more else ()))
        new = output[len(output) - len(states) :]
        if active is not None:
            output = tuple(n.masked_fill(~active, 0) for n in output)
            new = tuple(torch.where(active, n, s) for n, s in zip(new, states, strict=True))
        states = new
        outputs.append(output)
    if reverse:
        outputs.reverse()
    return tuple(torch.stack(s) for s in zip(*outputs, strict=True)), states


def scan(step: Step, x: Tensor, states: States, *weights: Any, **options: Any) -> tuple[Tensor, States]:
    """`scan_states`, with its arguments, but of all states only the output [T, B, H] (the first, or what step returns
    before it)."""
    every, final = scan_states(step, x, states, *weights, **options)
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
    """Run K scans side by side. Returns all states after each step [T, B, K*H], and the final states [K, B, H].

    w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H], params [K, H], states [K, B, H] (with one group, K may be
    left out); x [T, B, I] for all groups, or [T, B, K, I]; inputs likewise [T, B, H]. Group k runs from the last
    step to the first if bit k of reversed is set. Half precision is computed in float32 and rounded at the end.
    """
    arguments.reference_groups(step, x, states, (w_ih, w_hh, b_ih, b_hh), reversed)
    dtype, alone = x.dtype, w_ih.dim() == 2
    exact = torch.float32 if dtype.itemsize < 4 else dtype
    x, inputs = x.to(exact), tuple(t.to(exact) for t in inputs)
    K, H = 1 if alone else w_ih.shape[0], states[0].shape[-1]

    def group(t: Tensor, k: int) -> Tensor:
        return t.to(exact) if alone else t[k].to(exact)

    states = tuple(s.to(exact).reshape(K, -1, H) for s in states)
    outputs, finals = [], []
    for k in range(K):
        every, final = scan_states(
            step,
            x if x.dim() == 3 else x[:, :, k],
            tuple(s[k] for s in states),
            group(w_ih, k),
            *(None if w is None else group(w, k) for w in (w_hh, b_ih, b_hh)),
            params=tuple(group(p, k) for p in params),
            inputs=tuple(t if t.dim() == 3 else t[:, :, k] for t in inputs),
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


def __getattr__(name: str) -> type[torch.nn.Module]:
    if name not in ("HandwrittenLSTMCell", "HandwrittenGRUCell"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    moved = "seqcells.tasks.handwritten"
    warnings.warn(f"{__name__}.{name} is deprecated: use {moved}.{name}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(moved), name)

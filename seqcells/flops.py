"""Formulas by which torch.utils.flop_counter.FlopCounterMode counts our operators, and oneDNN's LSTM, which it lacks.

As in torch, only matrix products are counted, with two operations for each multiply-add. Padding is counted like other
steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def _layer(x: Shape, w_ih: Shape, w_hh: Shape | None) -> int:
    return 2 * x[0] * x[1] * (prod(w_ih) + prod(w_hh or (0,)))


def _forward(x: Shape, h0: object, c0: object, w_ih: Shape, w_hh: Shape | None, *_: object, **out: object) -> int:
    return _layer(x, w_ih, w_hh)


def _onednn_backward(*arguments: Any, **out: object) -> int:  # shapes, and what is no tensor
    x, w_ih, w_hh = arguments[3], *arguments[6:8]
    return 3 * _layer(x, w_ih, w_hh)  # it runs forward again


def _scan_backward(*arguments: Any, **out: object) -> int:  # as above
    x, w_ih, w_hh, need = arguments[4], *arguments[7:9], arguments[-2]
    of_x, of_h = (2 * x[0] * x[1] * prod(w or (0,)) for w in (w_ih, w_hh))
    return of_x * (need[0] + need[3]) + of_h * (1 + need[4])


def _formulas() -> dict[object, Callable[..., int]]:
    ours, aten = torch.ops.seqcells, torch.ops.aten
    return {
        aten.mkldnn_rnn_layer: lambda x, w_ih, w_hh, *others, **out: _layer(x, w_ih, w_hh),
        aten.mkldnn_rnn_layer_backward: lambda x, w_ih, w_hh, *others, **out: 2 * _layer(x, w_ih, w_hh),
        ours.onednn_forward: _forward,
        ours.onednn_backward: _onednn_backward,
        ours.scan_forward: _forward,
        ours.scan_backward: _scan_backward,
    }


def register() -> None:
    """Register the formulas with torch's present and future counters. (Does not import torch's module, which imports
    triton.)"""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    known = counter.flop_registry
    for operator, formula in _formulas().items():
        if operator not in known:
            counter.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry = known | mode.counter.flop_registry

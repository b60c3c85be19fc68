"""Torch's own layers and cells called straight away, where that is what a call comes to and nothing looks on.

What functional.run would find out with more questions, which on the CPU cost as much as a short sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import arguments, aten, backends, chosen, layer_arguments, masks


def step(
    cell: str, x: Tensor, states: tuple[Tensor, ...] | None, weights: aten.Weights, backend: str | None
) -> tuple[Tensor, ...] | None:
    """A cell's states after one step, by torch's own; None where it is not so simple. x [B, I], states [B, H]."""
    if cell not in aten.CELLS or (backend or chosen.backend) not in ("auto", "aten"):
        return None
    # Of weights on the meta device torch's own step makes something up.
    if not (x.is_cpu and weights[0].is_cpu and weights[1].is_cpu):  # type: ignore[union-attr]
        return None
    if torch.is_autocast_enabled("cpu") or backends.transforming():
        return None
    if states is None:
        zero = x.new_zeros(x.shape[0], weights[1].shape[1])  # type: ignore[union-attr]
        states = (zero, zero) if cell == "lstm" else (zero,)
    return aten.step(cell, x, states, weights)


def layers(module: Any, x: Any, hx: Any, resets: Any = None) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Of a Recurrent's call: y and the final states, by torch's own; None where it is not so simple.

    What is wrong with the arguments is left for others to say: then, too, it is None. resets are simple where there is
    one step: the states are zeroed before it.
    """
    cell, name = module.cell.key, module.backend or chosen.backend
    if cell not in aten.CELLS or name not in ("auto", "aten") or type(x) is not Tensor or x.dim() != 3:
        return None
    if "parametrizations" in module._modules:  # which are evaluated when read: only once a call
        return None
    if backends.traced() or backends.watched():
        return None
    T, B, size = x.shape
    if resets is not None and x.shape[module.batch_first] != 1:
        return None
    if not x.is_cpu or size != module.input_size or T * B == 0 or torch.is_autocast_enabled("cpu"):
        return None
    if module.batch_first:
        x, T, B = x.transpose(0, 1), B, T
    weights = _weights(module)
    H, rows, dtype = module.hidden_size, len(module._all_weights), x.dtype
    if weights[0].dtype != dtype:
        return None
    outer = module.proj_size or H
    if cell == "lstm":  # oneDNN's does not ask, and reads on past the end of a weight that is too small
        count, rows_of = len(module._all_weights[0]), 4 * H
        if weights[0].shape != (rows_of, size) or weights[1].shape != (rows_of, outer):
            return None
        if rows > 1 and not _fit(module, weights, count, rows_of, outer):
            return None
    states: Any = _states(module, hx, B, x)
    if states is None:
        return None
    if resets is not None:
        begins = _begins(resets, (B, T) if module.batch_first else (T, B), x.device)
        if hx is not None and begins is not None:
            back = (False, True) * module.num_layers if module.bidirectional else ()
            states = masks.cleared(states, begins.view(B, 1), back)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *weights))
    # At one step torch's own is the fastest, and the question would take a while.
    asked = T > 1 and name == "auto" and outer == H
    if asked and backends.loop_pays(cell, T, B, H, grad, aten.onednn(cell, x.device, dtype)):
        return None
    how = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional, False)
    given = states if len(states) > 1 else states[0]
    y, *final = aten.LAYERS[cell](x, given, weights, *how)  # type: ignore[operator]
    return y.transpose(0, 1) if module.batch_first else y, tuple(final)


def _weights(module: Any) -> list[Tensor]:
    """All parameters. nn.Module's __getattr__ is slow, and has to be asked for those that are computed only."""
    held = module._parameters
    return [held[name] if name in held else getattr(module, name) for of in module._all_weights for name in of]


def _states(module: Any, hx: Any, batch: int, x: Tensor) -> tuple[Tensor, ...] | None:
    """The states in hx, zeros like x where there is none; None where they are not what they should be."""
    rows, H = len(module._all_weights), module.hidden_size
    outer = module.proj_size or H
    count = len(module.cell.states)
    if hx is None:
        zero = x.new_zeros(rows, batch, outer)
        if count == 1:
            return (zero,)
        return zero, zero if outer == H else x.new_zeros(rows, batch, H)
    given = (hx,) if count == 1 else hx
    if not isinstance(given, (tuple, list)) or len(given) != count:
        return None
    for s, n in zip(given, (outer, H), strict=False):
        if not isinstance(s, Tensor) or s.shape != (rows, batch, n) or s.dtype != x.dtype or not s.is_cpu:
            return None
    return tuple(given)


def _begins(resets: Any, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """resets of one step as bools of that shape, None where none is set. Raises what is wrong with them."""
    known = type(resets) is Tensor and resets.is_cpu and resets.layout is torch.strided and not resets.is_complex()
    if known and resets.shape == shape and resets.numel() <= arguments.FEW:
        rows = resets.tolist()
        values = rows[0] if len(rows) == 1 else [value for row in rows for value in row]
        if not any(values):
            return None
        if {*values} <= {0, 1}:
            return resets.bool()
    return arguments.resets(resets, shape, device)


def packed(module: Any, x: PackedSequence, hx: Any) -> tuple[PackedSequence, tuple[Tensor, ...]] | None:
    """`layers` of a PackedSequence."""
    cell, name, data = module.cell.key, module.backend or chosen.backend, x.data
    if cell not in aten.CELLS or name not in ("auto", "aten") or type(data) is not Tensor or data.dim() != 2:
        return None
    if "parametrizations" in module._modules or backends.traced() or backends.watched():
        return None
    if not data.is_cpu or torch.is_autocast_enabled("cpu") or data.shape[1] != module.input_size:
        return None
    _, sizes, order, back = x
    if not layer_arguments.well_packed(x):
        return None
    weights = _weights(module)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *weights))
    B, H = int(sizes[0]), module.hidden_size
    if weights[0].dtype != data.dtype or not weights[0].is_cpu:
        return None
    if name == "auto" and backends.loop_pays(cell, len(sizes), B, H, grad, False, lengths=True):
        return None
    states = _states(module, hx, B, data)
    if states is None:
        return None
    if hx is not None and order is not None:
        states = tuple(s.index_select(1, order) for s in states)
    how = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
    given = states if len(states) > 1 else states[0]
    y, *final = aten.LAYERS[cell](data, sizes, given, weights, *how)  # type: ignore[operator]
    ends = final if back is None else [s.index_select(1, back) for s in final]
    return PackedSequence(y, sizes, order, back), tuple(ends)


def _fit(module: Any, weights: list[Tensor], count: int, rows: int, outer: int) -> bool:
    """Whether w_ih and w_hh of all further directions and layers, of `count` weights each, have their shapes."""
    directions = 2 if module.bidirectional else 1
    for k in range(1, len(weights) // count):
        width = module.input_size if k < directions else outer * directions
        if weights[k * count].shape != (rows, width) or weights[k * count + 1].shape != (rows, outer):
            return False
    return True

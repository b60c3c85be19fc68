"""Torch's own layers and cells called straight away, where that is what a call comes to and nothing looks on.

What functional.run would find out with more questions, which on the CPU cost as much as a short sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from . import aten, backends, reference


def step(
    cell: str, x: Tensor, states: tuple[Tensor, ...] | None, weights: aten.Weights, backend: str | None
) -> tuple[Tensor, ...] | None:
    """A cell's states after one step by torch's own, where that is what it comes to and nothing looks on; else None.

    What functional.run would do after more questions, which cost more than a step on the CPU. x [B, I], states [B, H].
    """
    asked = x.device.type == "cpu" and cell in aten.CELLS and backends.spelled(backend) in ("auto", "aten")
    if not asked or backends.autocasting(x.device) or backends.transforming():
        return None
    if states is None:
        zero = x.new_zeros(x.shape[0], weights[1].shape[1])  # type: ignore[union-attr]
        states = (zero,) * reference.get(cell).states
    return aten.step(cell, x, states, weights)


def layers(module: Any, x: Tensor, hx: Any) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Of a layers._Layer's call without masks: y and the final states, by torch's own; None where it is not that simple.

    What is wrong with the arguments is left for others to say: then, too, it is None.
    """
    cell, name = module.cell, backends.spelled(module.backend)
    if cell not in aten.CELLS or name not in ("auto", "aten") or type(x) is not Tensor or not x.is_cpu:
        return None
    if x.dim() != 3 or x.numel() == 0 or x.shape[2] != module.input_size:
        return None
    if backends.autocasting(x.device) or backends.traced():
        return None
    if module.batch_first:
        x = x.transpose(0, 1)
    names, H, (T, B, _) = module._all_weights, module.hidden_size, x.shape
    weights = [getattr(module, name) for of in names for name in of]
    if weights[0].dtype != x.dtype:
        return None
    sizes = (module.proj_size or H, H)[: 2 if cell == "lstm" else 1]
    if hx is None:
        zero = x.new_zeros(len(names), B, sizes[0])
        states = (zero,) if cell != "lstm" else (zero, zero if sizes[0] == H else x.new_zeros(len(names), B, H))
    else:
        states = tuple(hx) if cell == "lstm" else (hx,)
        for s, n in zip(states, sizes, strict=False):
            if not isinstance(s, Tensor) or s.shape != (len(names), B, n) or s.dtype != x.dtype or not s.is_cpu:
                return None
        if len(states) != len(sizes):
            return None
    grad = torch.is_grad_enabled() and (weights[0].requires_grad or any(t.requires_grad for t in (x, *weights, *states)))
    own = grad and not module.proj_size and aten.onednn(cell, x.device, x.dtype)
    if grad and not own and name == "auto" and not backends.short(B, H, T):
        return None
    if not own:
        how = (module.bias, module.num_layers, module.dropout, module.training, module.bidirectional)
        y, *final = aten.LAYERS[cell](x, states if cell == "lstm" else hx if hx is not None else zero, weights, *how, False)
    elif len(names) == 1:
        y, *final = aten.onednn_group(False, x, *states, *weights, *(() if module.bias else (None, None)))
    else:
        y, final = _onednn_layers(module, x, states)
    return y.transpose(0, 1) if module.batch_first else y, tuple(final)


def _onednn_layers(module: Any, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    finals, count = [], 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        mine = [s[layer * count : (layer + 1) * count] for s in states]
        x, final = aten.onednn_layer(x, mine, module._directions(layer))
        finals.append(final)
        if module.dropout and module.training and layer < module.num_layers - 1:
            x = dropout(x, module.dropout)
    return x, [torch.cat(s) for s in zip(*finals, strict=True)]

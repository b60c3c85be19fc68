"""What init and interop share: a recurrent module's parameters, by layer and direction; seqcells' and torch.nn's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import cell_modules, checks, modules, recurrent
from .cell import Cell, get

# Of torch.nn's modules. seqcells' know their cell.
_THEIRS: dict[type[nn.Module], str] = {
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn_tanh",
    nn.LSTMCell: "lstm",
    nn.GRUCell: "gru",
    nn.RNNCell: "rnn_tanh",
}


def cell_of(module: nn.Module, caller: str, wanted: str) -> Cell:
    """The cell of a recurrent module, seqcells' or torch.nn's. TypeError for any other; wanted: a module it takes."""
    if isinstance(module, (recurrent.Recurrent, cell_modules.RecurrentCell)):
        return module.cell
    for theirs, name in _THEIRS.items():
        if isinstance(module, theirs):
            return get("rnn_relu" if getattr(module, "nonlinearity", "") == "relu" else name)
    raise checks.wrong(f"{caller}: module", wanted, module)


def is_cell(module: nn.Module) -> bool:
    return isinstance(module, (cell_modules.RecurrentCell, nn.RNNCellBase))


def suffix(module: nn.Module, layer: int, reverse: bool) -> str:
    """What follows weight_ih in the names of that layer's and direction's parameters. ValueError if it is not there."""
    checks.integer("layer", layer)
    checks.boolean("reverse", reverse)
    if is_cell(module):
        if layer or reverse:
            raise ValueError(f"a {type(module).__name__} has neither layers nor directions")
        return ""
    if not 0 <= layer < module.num_layers:  # type: ignore[operator]
        raise ValueError(f"layer {layer} is not there: num_layers is {module.num_layers}")
    if reverse and not module.bidirectional:
        raise ValueError(f"there is no reverse direction: this {type(module).__name__} is not bidirectional")
    return f"_l{layer}{'_reverse' if reverse else ''}"


def shapes(module: Any, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """Of the parameters of that layer, by their names without suffix."""
    if isinstance(module, (recurrent.Recurrent, cell_modules.RecurrentCell)):
        return module._shapes(layer)
    H, cell = module.hidden_size, cell_of(module, "", "")
    outer = getattr(module, "proj_size", 0) or H
    width = module.input_size if not layer else outer * (2 if module.bidirectional else 1)
    return modules.shapes(cell, H, width, outer, bool(module.bias))


def suffixes(module: nn.Module) -> Iterator[str]:
    """suffix of every layer and direction."""
    for layer in range(1 if is_cell(module) else module.num_layers):  # type: ignore[arg-type]
        yield suffix(module, layer, False)
        if not is_cell(module) and module.bidirectional:
            yield suffix(module, layer, True)


def assign(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the named parameters these values, in place; through the right_inverse of those that are parametrized.

    ValueError, before any is changed, where a hook computes one from others (the old weight_norm, pruning): the value
    would not stay.
    """
    for name, value in values.items():
        if parametrize.is_parametrized(module, name):
            continue
        if module._parameters.get(name) is None:
            raise ValueError(f"{name} is no parameter of this {type(module).__name__}: does a hook compute it?")
        checks.parameter(module, name, tuple(value.shape))
    with torch.no_grad():
        for name, value in values.items():
            if parametrize.is_parametrized(module, name):
                setattr(module, name, value)
            else:
                module._parameters[name].copy_(value)  # type: ignore[union-attr]

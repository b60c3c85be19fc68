"""The cell and the parameters of seqcells' and torch.nn's recurrent modules, by layer and direction; for init and
interop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import cell_modules, checks, functional, modules, recurrent
from .cell import Cell, get


def cell_of(module: nn.Module, caller: str, wanted: str) -> Cell:
    """The cell of a recurrent module of seqcells or torch.nn. TypeError, which says what is wanted, for any other."""
    if isinstance(module, (recurrent.Recurrent, cell_modules.RecurrentCell)):
        return module.cell
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        return get(module.mode.lower())
    if isinstance(module, nn.RNNCell):
        return get(functional.rnn_cell_name(module.nonlinearity))
    if isinstance(module, (nn.LSTMCell, nn.GRUCell)):
        return get("lstm" if isinstance(module, nn.LSTMCell) else "gru")
    raise checks.wrong(f"{caller}: module", wanted, module)


def _layers(module: nn.Module) -> tuple[int, bool] | None:
    """num_layers and bidirectional of a layer; None for a cell."""
    if isinstance(module, (cell_modules.RecurrentCell, nn.RNNCellBase)):
        return None
    assert isinstance(module, (recurrent.Recurrent, nn.RNNBase))
    return module.num_layers, module.bidirectional


def suffix(module: nn.Module, layer: int, reverse: bool) -> str:
    """The suffix of the parameters' names for a layer and direction. ValueError if there is no such layer."""
    checks.integer("layer", layer)
    checks.boolean("reverse", reverse)
    if (found := _layers(module)) is None:
        if layer or reverse:
            raise ValueError(f"a {type(module).__name__} has neither layers nor directions")
        return ""
    count, bidirectional = found
    if not 0 <= layer < count:
        raise ValueError(f"layer {layer} is not there: num_layers is {count}")
    if reverse and not bidirectional:
        raise ValueError(f"there is no reverse direction: this {type(module).__name__} is not bidirectional")
    return f"_l{layer}{'_reverse' if reverse else ''}"


def shapes(module: nn.Module, layer: int = 0) -> dict[str, tuple[int, ...]]:
    """The shapes of that layer's parameters, by their names without suffix."""
    if isinstance(module, (recurrent.Recurrent, cell_modules.RecurrentCell)):
        return module._shapes(layer)
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    H = outer = module.hidden_size
    width = module.input_size
    if isinstance(module, nn.RNNBase):
        outer = module.proj_size or H
        width = outer * (2 if module.bidirectional else 1) if layer else width
    return modules.shapes(cell_of(module, "", ""), H, width, outer, bool(module.bias))


def suffixes(module: nn.Module) -> Iterator[str]:
    """The suffixes of all layers and directions."""
    count, bidirectional = _layers(module) or (1, False)
    for layer in range(count):
        yield suffix(module, layer, False)
        if bidirectional:
            yield suffix(module, layer, True)


def assign(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the named parameters to these values, in place; parametrized ones through their right_inverse.

    ValueError, before any is changed, if a hook computes one of them from others (the old weight_norm, pruning) and
    would overwrite the value.
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
                module.get_parameter(name).copy_(value)

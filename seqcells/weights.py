"""What init and interop share: a recurrent module's parameters, by layer and direction; seqcells' and torch.nn's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import checks, layers

PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "lstm": (layers.LSTM, nn.LSTM),
    "gru": (layers.GRU, nn.GRU),
    "rnn": (layers.RNN, nn.RNN),
}
# seqcells' are subclasses of them.
_CELLS: dict[str, tuple[type[nn.Module], ...]] = {
    "lstm": (nn.LSTMCell,),
    "gru": (nn.GRUCell,),
    "rnn": (nn.RNNCell,),
}
# Gates in the order of the rows of torch.nn's weights.
GATES = {"lstm": "ifgo", "gru": "rzn", "rnn": "n"}


def kind(module: nn.Module, allowed: tuple[str, ...], caller: str) -> str:
    """ "lstm", "gru" or "rnn", for layers and cells. TypeError for any other module, and for a kind not allowed."""
    for name in allowed:
        if isinstance(module, _LAYERS[name] + _CELLS[name]):
            return name
    names = " or ".join(f"{n}{cell}" for n in (a.upper() for a in allowed) for cell in ("", "Cell"))
    raise checks.wrong(f"{caller}: module", f"an {names} of seqcells or torch.nn", module)


def is_cell(module: nn.Module) -> bool:
    return any(isinstance(module, classes) for classes in _CELLS.values())


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


def shape(module: Any, part: str, layer: int = 0) -> tuple[int, ...]:
    """Of weight_ih, weight_hh, bias_ih or bias_hh of that layer."""
    cell = next(name for name in _LAYERS if isinstance(module, _LAYERS[name] + _CELLS[name]))
    H, rows = module.hidden_size, len(GATES[cell]) * module.hidden_size
    if part.startswith("bias"):
        return (rows,)
    below = module.input_size if not layer else (module.proj_size or H) * (2 if module.bidirectional else 1)
    return (rows, below) if part == "weight_ih" else (rows, getattr(module, "proj_size", 0) or H)


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

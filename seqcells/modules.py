"""The module base class of layers and cells: names, and support for torch tools that recognize torch.nn's classes."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from . import checks
from .cell import Cell, named

PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def cell_of(given: Cell | str, constants: Mapping[str, float]) -> Cell:
    """The cell for a module. given: a cell or its name; constants: new values for its constants."""
    cell = named(given)
    for name, value in constants.items():
        if name not in cell.constants:
            there = f"the constants {', '.join(cell.constants)}" if cell.constants else "no constants"
            raise TypeError(f"got an unexpected keyword argument {name!r}: cell {cell.name} has {there}")
        checks.number(name, value)
    return cell.with_constants(**constants) if constants else cell


def shapes(cell: Cell, hidden: int, width: int, outer: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of one step's parameters: weight_ih, weight_hh, bias_ih and bias_hh, if present, and the cell's own.

    hidden: H. width: the number of features of x. outer: the size of h, which differs from H with a projection.
    """
    w_ih, w_hh, b_ih, b_hh = (rows * hidden for rows in cell.rows)
    weights: dict[str, tuple[int, ...]] = {"weight_ih": (w_ih, width), "weight_hh": (w_hh, outer)}
    weights |= {"bias_ih": (b_ih,), "bias_hh": (b_hh,)} if bias else {}
    found = {part: shape for part, shape in weights.items() if shape[0]}
    return found | {name: (1,) if name in cell.scalars else (hidden,) for name in cell.params}


def with_cell(cell: Cell, text: str) -> str:
    """The repr of a module whose class does not name the cell: text, preceded by the cell."""
    constants = "".join(f", {name}={value!r}" for name, value in dict(cell.constants).items())
    return f"{cell.name}, {text}{constants}"


def spelled(cls: type) -> str:
    """A class's name as users write it: torch.nn.LSTM, seqcells.LSTM, package.module.LSTM."""
    package, _, module = cls.__module__.partition(".")
    if package == "seqcells" and issubclass(cls, Module):
        return f"seqcells.{'subclasses.' * (module == 'subclasses')}{cls.__name__}"
    return (
        f"torch.nn.{cls.__name__}" if cls.__module__ == nn.LSTM.__module__ else f"{cls.__module__}.{cls.__qualname__}"
    )


def outside(module: nn.Module) -> int:
    """The stacklevel with which a warning in a constructor's helper points at the line that makes the module."""
    level, frame = 2, sys._getframe(1)
    while frame.f_locals.get("self") is module and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


class Module(nn.Module):
    """A layer or a cell."""

    hidden_size: int
    cell: Cell

    def reset_parameters(self) -> None:
        """Initialize all parameters from U(-1/sqrt(H), 1/sqrt(H)), in torch.nn's order and with its random numbers;
        then those for which the cell has a number, such as a norm's gain, to that."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        starts = self.cell.starts
        for name, weight in self.named_parameters():
            nn.init.uniform_(weight, -bound, bound)
            own = name if name in starts else name.rpartition("_l")[0]  # a layer's names end in _l0 or _l0_reverse
            if own in starts:
                nn.init.constant_(weight, starts[own])

    def _get_name(self) -> str:
        """The name in repr: seqcells.LSTM, to tell it from torch.nn's; for a user's subclass, the subclass's name."""
        cls, name = parametrize.type_before_parametrizations(self), type(self).__name__
        return spelled(cls).removesuffix(cls.__name__) + name if cls.__module__.startswith("seqcells.") else name

    @property
    def qconfig(self) -> object:
        """Set by torch.ao.quantization on each module that it visits; absent before that."""
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        # It replaces modules whose type is exactly torch.nn's, and silently skips all others, as it does torch.nn.RNN,
        # which it does not support.
        # It only supports LSTM, GRU and the cells.
        named = hasattr(self, "mode") or isinstance(self, nn.RNNCellBase)
        if "qconfig" not in self.__dict__ and named and not getattr(self, "mode", "").startswith("RNN"):
            cls = parametrize.type_before_parametrizations(self)
            warnings.warn(
                f"torch.ao.quantization leaves {spelled(cls)}({self.extra_repr()}) as it is: it replaces modules of "
                "torch.nn's own classes only. To quantize it, call seqcells.revert(model) first.",
                stacklevel=2,
            )
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        if self.__dict__.pop("qconfig", self) is self:
            raise AttributeError("qconfig")

    def _traced(self, input: Any, hx: Any, **options: Any) -> Any:  # a node stands for the result
        """The torch.fx node for this call, as for torch.nn's modules; None if no argument is a Proxy.

        Without it, fx would trace into forward: it treats only modules from torch.nn as one node.
        """
        for given in (input, hx, *options.values()):
            for value in given if type(given) in (tuple, list) else (given,):
                if not isinstance(value, fx.Proxy) or not isinstance(tracer := value.tracer, fx.Tracer):
                    continue
                if tracer.root is self:
                    name = type(self).__name__
                    raise fx.proxy.TraceError(f"torch.fx cannot look into this {name}: trace a module that calls it")
                hooks = (*self._forward_pre_hooks.values(), *self._forward_hooks.values())
                # torch's own hooks compute a weight, which does no harm if done twice.
                if any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
                    raise RuntimeError(
                        f"torch.fx would call this {type(self).__name__}'s forward hooks while it traces and again in "
                        "each run: remove them before, or use a Tracer whose is_leaf_module names it"
                    )
                options = {name: value for name, value in options.items() if value is not None and value is not False}
                arguments = (input,) if hx is None else (input, hx)
                return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, options)
        return None


class Layer(Module):
    """What code that handles torch.nn's RNNs reads of them."""

    _all_weights: list[list[str]]  # the parameters' names, for each layer and direction

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read each parameter where it is. For code that calls torch.nn's method."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters, as a list for each layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        # Not part of the API, but libraries that handle torch.nn's RNNs read it.
        return [getattr(self, name) for name in self._flat_weights_names]

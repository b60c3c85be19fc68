"""What layers and cells have in common as modules: their name, and what torch's tools, which know torch.nn's classes by
name or type, make of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from . import checks
from .cell import Cell, named

PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def cell_of(given: Any, constants: Mapping[str, Any]) -> Cell:
    """The cell that a module is made of: itself or its name, and the constants that are not to be its definition's."""
    cell = named(given)
    for name, value in constants.items():
        if name not in cell.constants:
            there = f"the constants {', '.join(cell.constants)}" if cell.constants else "no constants"
            raise TypeError(f"got an unexpected keyword argument {name!r}: cell {cell.name} has {there}")
        checks.number(name, value)
    return cell.with_constants(**constants) if constants else cell


def shapes(cell: Cell, hidden: int, width: int, outer: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Of the parameters of one step: weight_ih, weight_hh, bias_ih, bias_hh, those that there are, and the cell's own.

    hidden: H; width: of x; outer: of h, where that is not H.
    """
    w_ih, w_hh, b_ih, b_hh = (rows * hidden for rows in cell.rows)
    weights: dict[str, tuple[int, ...]] = {"weight_ih": (w_ih, width), "weight_hh": (w_hh, outer)}
    weights |= {"bias_ih": (b_ih,), "bias_hh": (b_hh,)} if bias else {}
    found = {part: shape for part, shape in weights.items() if shape[0]}
    return found | {name: (1,) if name in cell.scalars else (hidden,) for name in cell.params}


def with_cell(cell: Cell, text: str) -> str:
    """What repr shows of a module whose class does not name the cell."""
    constants = "".join(f", {name}={value!r}" for name, value in dict(cell.constants).items())
    return f"{cell.name}, {text}{constants}"


def spelled(cls: type) -> str:
    """A class as people write it: torch.nn.LSTM, seqcells.LSTM, somebody.elses.LSTM."""
    package, _, module = cls.__module__.partition(".")
    if package == "seqcells" and issubclass(cls, Module):
        return f"seqcells.{'subclasses.' * (module == 'subclasses')}{cls.__name__}"
    return (
        f"torch.nn.{cls.__name__}" if cls.__module__ == nn.LSTM.__module__ else f"{cls.__module__}.{cls.__qualname__}"
    )


class Module(nn.Module):
    """A layer or a cell."""

    def _get_name(self) -> str:
        """What repr shows: seqcells.LSTM, not to be taken for torch.nn's; of a subclass of the user's its own name."""
        cls, name = parametrize.type_before_parametrizations(self), type(self).__name__
        return spelled(cls).removesuffix(cls.__name__) + name if cls.__module__.startswith("seqcells.") else name

    @property
    def qconfig(self) -> Any:
        """What torch.ao.quantization notes at each module that it comes to. There is none before."""
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        # It replaces modules whose type is exactly torch.nn's and passes over all others without a word. It does so
        # with torch.nn.RNN, too, for which it has nothing.
        # With others than LSTM, GRU and the cells it has nothing to do.
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

    def _traced(self, input: Any, hx: Any, **options: Any) -> Any:
        """torch.fx's record of this call, one node as for torch.nn's modules: a Proxy for the result. None where
        nothing given is one.

        fx asks for the module's name in torch.nn, so that it would look into forward.
        """
        for given in (input, hx, *options.values()):
            for value in given if type(given) in (tuple, list) else (given,):
                if not isinstance(value, fx.Proxy) or not isinstance(tracer := value.tracer, fx.Tracer):
                    continue
                if tracer.root is self:
                    name = type(self).__name__
                    raise fx.proxy.TraceError(f"torch.fx cannot look into this {name}: trace a module that calls it")
                hooks = (*self._forward_pre_hooks.values(), *self._forward_hooks.values())
                # torch's own compute a weight, and may do so again.
                if any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):
                    raise RuntimeError(
                        f"torch.fx would call this {type(self).__name__}'s forward hooks while it traces and again in "
                        "each run: remove them before, or use a Tracer whose is_leaf_module names it"
                    )
                options = {name: value for name, value in options.items() if value is not None and value is not False}
                arguments = (input,) if hx is None else (input, hx)
                return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, options)
        return None

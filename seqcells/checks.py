"""What is wrong with one argument, in words. torch.nn's, where it has some.

TypeError for a value of another type, ValueError for one that is not allowed, RuntimeError for a tensor that does not
fit, as in torch.nn.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def kind(value: Any) -> str:
    """What a value is: "None", "a list of 2", "an int", "the class LSTM"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = "tensor" if isinstance(value, Tensor) else type(value).__name__
    count = f" of {len(value)}" if type(value) in (list, tuple, dict, set) else ""
    spoken = "AEFHILMNORSX" if name[:2].isupper() else "AEIOUaeiou"  # "an LSTM", letter by letter
    return f"{'an' if name[0] in spoken else 'a'} {name}{count}"


def wrong(name: str, expected: str, value: Any) -> TypeError:
    """The error for a value of another type than expected."""
    return TypeError(f"{name} must be {expected}, got {kind(value)}")


def tensor(name: str, value: Any, optional: bool = False, expected: str = "a tensor") -> None:
    """A dense tensor; None too if it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise wrong(name, expected + " or None" * optional, value)
    if value.layout is not torch.strided or value.is_nested:
        what = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise RuntimeError(f"{name} must be a dense tensor, got {what}")


def tensors(name: str, value: Any, expected: str, count: int | None = None, optional: bool = False) -> None:
    """A tuple or list of tensors, of that many if count is given; optional: of None too."""
    if not isinstance(value, (tuple, list)) or (count is not None and len(value) != count):
        raise wrong(name, expected, value)
    for i, t in enumerate(value):
        tensor(f"{name}[{i}]", t, optional)


# What somebody runs into who is given a wrong argument.
FAILURES = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def clearer(error: Exception, check: Callable[..., Any], *arguments: Any) -> Exception:
    """What the check raises of these arguments; error itself, where they are not what is wrong."""
    try:
        check(*arguments)
    except (TypeError, ValueError, RuntimeError) as found:
        return found
    return error


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def integer(name: str, value: Any, least: int | None = None, bools: bool = False) -> None:
    """An int; True and False are none, unless torch.nn takes them and so bools is given. least: the smallest."""
    if not isinstance(value, int) or (isinstance(value, bool) and not bools):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if least is not None and value < least:
        limit = {0: "must not be negative", 1: "must be greater than zero"}[least]
        raise ValueError(f"{name} {limit}, got {value}")


def number(name: str, value: Any, optional: bool = False) -> None:
    if not (value is None and optional) and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
        raise wrong(name, "a number" + " or None" * optional, value)


def one_of(name: str, value: Any, allowed: Iterable[str], optional: bool = False) -> None:
    """One of some names."""
    if value is None and optional:
        return
    if not isinstance(value, str):
        raise wrong(name, f"one of {', '.join(allowed)}" + " or None" * optional, value)
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(allowed)}")


def dtype(value: Any, optional: bool = False) -> None:
    if not (value is None and optional) and not isinstance(value, torch.dtype):
        raise wrong("dtype", "a torch.dtype" + " or None" * optional, value)


def device(value: Any, optional: bool = False) -> None:
    """A torch.device, or what is one in words. What the words say is torch's to check."""
    taken = isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool))
    if not taken and not (value is None and optional):
        raise wrong("device", "a torch.device, its name or an index" + " or None" * optional, value)


def parameter(module: nn.Module, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The module's parameter of that name, which somebody may have deleted or replaced."""
    try:
        found = getattr(module, name)
    except AttributeError:
        if hasattr(type(module), name):  # a parametrization, which ran into something itself
            raise
        raise RuntimeError(f"this {type(module).__name__} has no {name}: was the parameter deleted?") from None
    tensor(name, found)
    if shape is not None and found.shape != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(found.shape)}")
    return found

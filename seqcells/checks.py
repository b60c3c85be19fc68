"""Checks of one argument, with torch.nn's error messages where it has them.

As in torch.nn: TypeError for a value of the wrong type, ValueError for a value that is not allowed, RuntimeError for a
tensor of the wrong shape, dtype or device.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def kind(value: object) -> str:
    """A description of a value: "None", "a list of 2", "an int", "the class LSTM"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = "tensor" if isinstance(value, Tensor) else type(value).__name__
    count = ""
    if isinstance(value, (list, tuple, dict, set)) and type(value) in (list, tuple, dict, set):
        count = f" of {len(value)}"
    spoken = "AEFHILMNORSX" if name[:2].isupper() else "AEIOUaeiou"  # "an LSTM", letter by letter
    return f"{'an' if name[0] in spoken else 'a'} {name}{count}"


def wrong(name: str, expected: str, value: object) -> TypeError:
    """The error for a value of the wrong type."""
    return TypeError(f"{name} must be {expected}, got {kind(value)}")


def tensor(name: str, value: object, optional: bool = False, expected: str = "a tensor") -> None:
    """Check that value is a dense tensor (or None, if optional)."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise wrong(name, expected + " or None" * optional, value)
    if value.layout is not torch.strided or value.is_nested:
        what = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise RuntimeError(f"{name} must be a dense tensor, got {what}")


def tensors(name: str, value: object, expected: str, count: int | None = None, optional: bool = False) -> None:
    """Check that value is a tuple or list of tensors. count: how many; None: any number. optional: None is allowed
    instead of a tensor."""
    if not isinstance(value, (tuple, list)) or (count is not None and len(value) != count):
        raise wrong(name, expected, value)
    for i, t in enumerate(value):
        tensor(f"{name}[{i}]", t, optional)


# The exceptions that a wrong argument may cause where it is used.
FAILURES = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def clearer(error: Exception, check: Callable[..., object], *arguments: object) -> Exception:
    """The exception that check raises for these arguments; error itself if it raises none."""
    try:
        check(*arguments)
    except (TypeError, ValueError, RuntimeError) as found:
        return found
    return error


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def integer(name: str, value: object, least: int | None = None, bools: bool = False) -> None:
    """Check that value is an int. least: the smallest allowed. bools: whether True and False count as ints, which is
    for arguments where torch.nn accepts them."""
    if not isinstance(value, int) or (isinstance(value, bool) and not bools):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if least is not None and value < least:
        limit = {0: "must not be negative", 1: "must be greater than zero"}[least]
        raise ValueError(f"{name} {limit}, got {value}")


def number(name: str, value: object, optional: bool = False) -> None:
    if not (value is None and optional) and (not isinstance(value, numbers.Real) or isinstance(value, bool)):
        raise wrong(name, "a number" + " or None" * optional, value)


def one_of(name: str, value: object, allowed: Iterable[str], optional: bool = False) -> None:
    """Check that value is one of the allowed strings (or None, if optional)."""
    if value is None and optional:
        return
    if not isinstance(value, str):
        raise wrong(name, f"one of {', '.join(allowed)}" + " or None" * optional, value)
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(allowed)}")


def dtype(value: object, optional: bool = False) -> None:
    if not (value is None and optional) and not isinstance(value, torch.dtype):
        raise wrong("dtype", "a torch.dtype" + " or None" * optional, value)


def device(value: object, optional: bool = False) -> None:
    """Check that value is a torch.device, a string or an int. Their values are for torch to check."""
    taken = isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool))
    if not taken and not (value is None and optional):
        raise wrong("device", "a torch.device, its name or an index" + " or None" * optional, value)


def parameter(module: nn.Module, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """The module's parameter of that name. RuntimeError if it was deleted, or replaced by something that does not
    fit."""
    try:
        found = getattr(module, name)
    except AttributeError:
        if hasattr(type(module), name):  # a parametrization that failed
            raise
        raise RuntimeError(f"this {type(module).__name__} has no {name}: was the parameter deleted?") from None
    tensor(name, found)
    if shape is not None and found.shape != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(found.shape)}")
    return found

"""What the functions and modules of `reference` must be given. Apart from them, for they are to be read."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, checks

NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")
States = tuple[Tensor, ...]
Step = Callable[..., States]


def explained(gates: int, count: int) -> Callable[[Step], Step]:
    """For a step that failed: say which argument is wrong. To ask before each would take as long as a small step."""

    def wrap(step: Step) -> Step:
        @functools.wraps(step)
        def call(
            x: Tensor,
            states: States,
            w_ih: Tensor,
            w_hh: Tensor,
            b_ih: Tensor | None = None,
            b_hh: Tensor | None = None,
        ) -> States:
            try:
                return step(x, states, w_ih, w_hh, b_ih, b_hh)
            except checks.FAILURES as error:
                given = (x, states, w_ih, w_hh, b_ih, b_hh)
                raise checks.clearer(error, _step, gates, count, *given) from None

        call.rows = (gates,) * 4  # type: ignore[attr-defined]
        return call

    return wrap


def _step(gates: int, count: int, x: Any, states: Any, *weights: Any) -> None:
    checks.tensors("states", states, f"a tuple of {count} tensor{'s' * (count > 1)}", count)
    arguments.types(x, None, dict(zip(NAMES, weights, strict=True)), rank=None)
    if x.dim() not in (1, 2):
        raise RuntimeError(f"x must have 1 or 2 dimensions, got {x.dim()}")
    if x.dim() == 1:
        x, states = x[None], [s[None] for s in states]
    arguments.fit(x[None], states, weights, (gates,) * 4)


def _types(step: Any, x: Any, states: Any, weights: Sequence[Any], rank: int | None) -> None:
    if not callable(step) or isinstance(step, (type, types.BuiltinFunctionType)):
        raise checks.wrong("step", "a function", step)
    missing = [name for name, n in zip(NAMES, _rows(step, weights), strict=True) if not n]
    arguments.types(x, None, dict(zip(NAMES, weights, strict=True)), rank, missing)
    checks.tensors("states", states, "a tuple of tensors")


def _rows(step: Any, weights: Sequence[Any]) -> tuple[int, ...]:
    """The blocks of H rows that the step takes of each weight; of a step that does not say so, those that w_hh has."""
    if (known := getattr(step, "rows", None)) is not None:
        return known
    w_hh = weights[1]
    H = w_hh.shape[-1] if isinstance(w_hh, Tensor) and w_hh.dim() else 0
    return (w_hh.shape[0] // H if H else 1,) * 4


def scan(
    step: Any,
    x: Any,
    states: Any,
    weights: Sequence[Any],
    params: Any,
    inputs: Any,
    resets: Any,
    lengths: Any,
    reverse: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Of reference.scan_states. resets and lengths as tensors."""
    _types(step, x, states, weights, rank=3)
    checks.boolean("reverse", reverse)
    arguments.fit(x, states, weights, _rows(step, weights))
    shape, H = x.shape[:2], states[0].shape[-1]
    for name, given, expected in (("params", params, (H,)), ("inputs", inputs, (*shape, H))):
        checks.tensors(name, given, "a tuple of tensors")
        for i, t in enumerate(given):
            if t.shape != expected and (name != "params" or t.shape != (1,)):
                raise RuntimeError(f"{name}[{i}] must have shape {tuple(expected)}, got {tuple(t.shape)}")
    return arguments.resets(resets, shape, x.device), arguments.lengths(lengths, shape, x.device)


def groups(step: Any, x: Any, states: Any, weights: Sequence[Any], reversed: Any) -> None:
    """Of reference.scan_groups, what each group's scan does not see."""
    _types(step, x, states, weights, rank=None)
    checks.integer("reversed", reversed, least=0)
    name, of = ("w_ih", weights[0]) if weights[1] is None else ("w_hh", weights[1])
    if of.dim() not in (2, 3):
        raise RuntimeError(f"{name} must have 2 or 3 dimensions, got {of.dim()}")
    K, H = of.shape[0] if of.dim() == 3 else 1, states[0].shape[-1] if states else 0
    for other, t in zip(NAMES, weights, strict=True):
        rank = of.dim() - other.startswith("b_")
        if t is not None and (t.dim() != rank or (of.dim() == 3 and t.shape[0] != K)):
            raise RuntimeError(f"{other} must have {rank} dimensions, as {name} has {of.dim()}, got {list(t.shape)}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != K):
        raise RuntimeError(f"x must have shape (T, B, I) or (T, B, {K}, I), got {tuple(x.shape)}")
    expected = (K, x.shape[1], H)
    for i, s in enumerate(states):
        if s.shape != expected and (K > 1 or s.shape != expected[1:]):
            raise RuntimeError(f"states[{i}] must have shape {expected}, got {tuple(s.shape)}")


def sizes(input_size: Any, hidden_size: Any) -> None:
    checks.integer("input_size", input_size, least=1)
    checks.integer("hidden_size", hidden_size, least=1)


def handwritten(x: Any, states: Sequence[Any], name: str, x_fc: nn.Linear, h_fc: nn.Linear) -> None:
    """x [B, I] and states [B, H] of a handwritten cell."""
    checks.tensor("x", x)
    if name == "states":
        checks.tensors(name, states, "a tuple of two tensors (h, c)", 2)
    weights = [checks.parameter(x_fc, "weight"), checks.parameter(h_fc, "weight")]
    if x.dim() != 2 or x.shape[1] != x_fc.in_features:
        raise RuntimeError(f"x must have shape (B, {x_fc.in_features}), got {tuple(x.shape)}")
    expected = (x.shape[0], h_fc.in_features)
    for s in states:
        checks.tensor(name, s)
        if s.shape != expected:
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(s.shape)}")
    if not torch._C._is_any_autocast_enabled():
        arguments.together(x, states, weights)


def state(given: Any, own: dict[str, Tensor]) -> None:
    """A state_dict that is to be loaded, by one's own."""
    if not isinstance(given, Mapping):
        raise checks.wrong("state", "a state_dict", given)
    for name, held in own.items():
        if name not in given:
            raise RuntimeError(f"state has no {name}")
        checks.tensor(name, given[name])
        if given[name].is_meta and not held.is_meta:
            raise RuntimeError(f"{name} is on the meta device: it has no values to copy")
        if given[name].shape != held.shape:
            raise RuntimeError(f"{name} must have shape {tuple(held.shape)}, got {tuple(given[name].shape)}")

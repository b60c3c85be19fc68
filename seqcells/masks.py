"""resets and lengths as the one mask [T, B] that every engine takes (for its codes see kernels.buffers)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.buffers import PADDING, RESET, RESET_REVERSED, padding_rows, reset_rows


def ended(lengths: Tensor, steps: int) -> Tensor:
    """Where there is padding, for rows of these lengths: [T, B] bool."""
    return torch.arange(steps, device=lengths.device)[:, None] >= lengths


def encode(resets: Tensor | None, lengths: Tensor | None, steps: int, reversed: int) -> Tensor | None:
    """resets [T, B] bool and lengths [B] as a mask; None if there is nothing to mask.

    A reset at step t separates t-1 from t in both directions: a reversed group is reset between t and t-1. There are no
    resets in padding.
    """
    if lengths is None and (resets is None or not reversed):
        return resets
    codes = []
    past = None if lengths is None else ended(lengths, steps)
    if past is not None:
        codes.append(past.to(torch.uint8) * PADDING)
    if resets is not None:
        begins = resets if past is None else resets & ~past
        codes.append(begins.to(torch.uint8) * RESET)
        if reversed:
            # Not begins[1:]: a tensor of T-1 steps makes torch.export ask whether T is 2.
            inner = torch.arange(1, steps + 1, device=begins.device)[:, None] < steps
            codes.append((begins.roll(-1, 0) & inner).to(torch.uint8) * RESET_REVERSED)
    return codes[0] if len(codes) == 1 else torch.stack(codes).sum(0, dtype=torch.uint8)


def bits(reverse: Sequence[bool]) -> int:
    """An integer whose bit k is set if group k is reversed."""
    return sum(1 << k for k, back in enumerate(reverse) if back)


def cleared(states: Sequence[Tensor | None], begins: Tensor, reverse: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The states before one step, zero where there is a reset. begins: the resets [B, 1].

    states: [L*K, B, .], of L layers of K groups, or [B, .]. Those of a reversed group are not reset, because they come
    from the step after.
    """
    if any(reverse):
        begins = torch.stack([begins & (not back) for back in reverse])
        rows = next((s.shape[0] for s in states if s is not None), len(reverse))
        begins = begins.repeat(rows // len(reverse), 1, 1)
    return tuple(None if s is None else s.masked_fill(begins, 0) for s in states)


def decode(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The resets and lengths of a mask, for the reference."""
    if mask is None:
        return None, None
    past = padding_rows(mask)
    return reset_rows(mask, False), None if past is None else (~past).sum(0)

"""What a scan leaves behind, and how to read it. No Triton here: every engine that runs scans shares these shapes.

Legend: B batch, T steps, K groups, H hidden units, G tiles of gx, S states, P trained vectors (see `form`); time-major
and contiguous. reversed: an integer; group k goes from the last step to the first if its bit k is set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Codes of a mask of dtype uint8 [T, B]. A mask of dtype bool has resets only, for groups that go forward.
RESET = 1  # the states before the step are reset to zero, for groups that go forward
PADDING = 2  # the row is past its end: its states pass through
RESET_REVERSED = 4  # as RESET, for reversed groups


class Scanned(NamedTuple):
    """y [T+1, B, K, H]: the first state, row t+1 after step t, row 0 before the first; with reversed groups
    [T+2, B, K, H]: theirs start in row T+1. c: the other states side by side, [T+1, B, K, (S-1)*H] or with one row more
    as y, or the first row only, or [0] without any; saved: what the engine's backward needs; hn [K, B, H],
    cn [K, B, (S-1)*H] or [0]."""

    y: Tensor
    c: Tensor
    saved: Tensor
    hn: Tensor
    cn: Tensor


class Gradients(NamedTuple):
    """dgx [T, B, K, G*H]; dhu [T, B, K, .*H], of the products apart; m [T, B, K, .*H], the operands stored; dh0
    [K, B, H], dc0 [K, B, (S-1)*H]; dparams [K, P*H] in the accumulation type. [0] where there is none."""

    dgx: Tensor
    dhu: Tensor
    m: Tensor
    dh0: Tensor
    dc0: Tensor
    dparams: Tensor


def steps(y: Tensor, reversed: int) -> int:
    """T of a buffer."""
    return y.shape[0] - (2 if reversed else 1)


def is_reversed(group: int, reversed: int) -> bool:
    return bool(reversed >> group & 1)


def outputs(y: Tensor, reversed: int) -> Tensor:
    """The states after each step [T, B, K, H]: the rows that no group starts from."""
    return y[1:-1] if reversed else y[1:]


def reset_rows(mask: Tensor, back: bool) -> Tensor:
    """Where a mask resets the states before a step: bool, for groups of that direction."""
    return mask if mask.dtype == torch.bool else (mask & (RESET_REVERSED if back else RESET)) != 0


def padding_rows(mask: Tensor) -> Tensor | None:
    """Where a mask says that a row is past its end: bool; None for a mask without codes."""
    return None if mask.dtype == torch.bool else (mask & PADDING) != 0


def previous_outputs(y: Tensor, mask: Tensor | None, reversed: int, group: int) -> Tensor:
    """A group's state as it entered each step [T, B, H]: zero where reset. y: of one state, or several side by side."""
    back = is_reversed(group, reversed)
    T, first = steps(y, reversed), 2 if back else 0
    h = y[first : first + T, :, group]
    return h if mask is None else h.masked_fill(reset_rows(mask, back)[..., None], 0)


def scratch(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised buffer in the accumulation type."""
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)

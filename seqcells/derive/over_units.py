"""What a step may take from other units without a product: means, and the norms that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Mean = Callable[[Tensor], Tensor]  # over the units, [B, H] to [B, 1]


def _mean(mean: Mean, input: Tensor, dim: object = None, keepdim: bool = False, dtype: object = None) -> Tensor | None:
    axes = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    return mean(input) if axes in ([-1], [1]) and keepdim and dtype is None else None


def _layer_norm(
    mean: Mean,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor | None:
    if tuple(normalized_shape) != tuple(input.shape[-1:]):
        return None
    found = input - mean(input)
    found = found * torch.rsqrt(mean(found.square()) + eps)
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def _rms_norm(
    mean: Mean, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor | None:
    if tuple(normalized_shape) != tuple(input.shape[-1:]) or eps is None:  # torch's default depends on the dtype
        return None
    found = input * torch.rsqrt(mean(input.square()) + eps)
    return found if weight is None else found * weight


# By the names of torch's functions: they take a function that computes the mean, and the arguments of torch's. None for
# arguments that mix units in other ways.
FUNCTIONS: dict[str, Callable[..., Tensor | None]] = {"mean": _mean, "layer_norm": _layer_norm, "rms_norm": _rms_norm}

"""The precision of float32 matrix products, as requested or by PyTorch's settings; and casting under autocast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kernels.plan import PRECISIONS as PRECISIONS

Groups = Sequence[Sequence["Tensor | None"]]
Named = Mapping[str, Tensor | PackedSequence] | None
Extra = tuple[Sequence[Named] | None, Named]


def rnn_precision() -> str:
    """The precision of float32 recurrent products on CUDA by PyTorch's settings for RNNs: "tf32" or "ieee".

    The setting is torch.backends.cudnn.rnn.fp32_precision (which torch.backends.cudnn.allow_tf32 also sets). "none"
    defers to its parents.
    """
    backends: Any = torch.backends  # whose stubs lack these
    cudnn = backends.cudnn
    for setting in (cudnn.rnn.fp32_precision, cudnn.fp32_precision, backends.fp32_precision):
        if setting != "none":
            return "tf32" if setting == "tf32" else "ieee"
    return "ieee"


def of_products(asked: str | None, dtype: torch.dtype, device: torch.device) -> str:
    """The precision of recurrent products. For float32 it is `asked`, or, on CUDA, given by PyTorch's settings."""
    if dtype != torch.float32:
        return "ieee"
    return asked or (rnn_precision() if device.type == "cuda" else "ieee")


def of_inputs(dtype: torch.dtype, device: torch.device) -> str:
    """The precision of the input's product. For float32 on CUDA, it follows PyTorch's setting for matrix products."""
    switched = dtype == torch.float32 and device.type == "cuda"
    tf32 = switched and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def autocast(
    cell: str,
    x: Tensor,
    states: tuple[Tensor | None, ...],
    groups: Groups,
    extra: Extra = (None, None),
    one_step: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, ...], Groups, tuple[Any, Any]]:  # of the types given
    """x, states, weights, and params and inputs (see `run`), cast to the dtype of the results of torch's own cell."""
    dtype, low = torch.get_autocast_dtype(x.device.type), (torch.float16, torch.bfloat16, torch.float32)
    if x.device.type == "cpu" and (cell in ("gru", "gru_before") or (cell == "lstm" and one_step)):
        # Here torch has no fused kernel to cast for: it rounds the products' operands, and states keep their dtype.
        dtype = torch.promote_types(dtype, next((s.dtype for s in states if s is not None), x.dtype))

    def cast(tensors: Iterable[Any]) -> tuple[Any, ...]:  # each as it was: a tensor, packed or None
        wide = (t.data if isinstance(t, PackedSequence) else t for t in tensors)
        found = (t.to(dtype) if isinstance(t, Tensor) and t.dtype in low else t for t in wide)
        return tuple(
            t._replace(data=f) if isinstance(t, PackedSequence) else f for t, f in zip(tensors, found, strict=True)
        )

    def by_name(given: Named) -> Named:
        return dict(zip(given, cast(given.values()), strict=True)) if isinstance(given, Mapping) else given

    params, inputs = extra
    params = params if params is None else [by_name(p) for p in params]
    return cast([x])[0], cast(states), [cast(weights) for weights in groups], (params, by_name(inputs))

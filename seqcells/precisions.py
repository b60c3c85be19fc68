"""In what precision float32 is multiplied: asked for by name, or by PyTorch's own switches."""

from __future__ import annotations

import torch

PRECISIONS = ("ieee", "tf32", "tf32x3")


def rnn_precision() -> str:
    """ "tf32" or "ieee": what float32 recurrent products use on CUDA, by PyTorch's own switches for RNNs.

    torch.backends.cudnn.rnn.fp32_precision (which torch.backends.cudnn.allow_tf32 sets too); "none" asks its parents.
    """
    cudnn = torch.backends.cudnn
    for setting in (cudnn.rnn.fp32_precision, cudnn.fp32_precision, torch.backends.fp32_precision):  # type: ignore[attr-defined]
        if setting != "none":
            return "tf32" if setting == "tf32" else "ieee"
    return "ieee"


def of_products(asked: str | None, dtype: torch.dtype, device: torch.device) -> str:
    """The precision of recurrent products. Only float32 has a choice: `asked`, or on CUDA PyTorch's switches."""
    if dtype != torch.float32:
        return "ieee"
    return asked or (rnn_precision() if device.type == "cuda" else "ieee")


def of_inputs(dtype: torch.dtype, device: torch.device) -> str:
    """The precision of the input's product: for float32 on CUDA, PyTorch's switch for matrix products decides."""
    switched = dtype == torch.float32 and device.type == "cuda"
    tf32 = switched and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"

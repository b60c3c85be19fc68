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


def check(asked: str | None) -> None:
    """ValueError for anything but None and the names of PRECISIONS."""
    if asked not in (None, *PRECISIONS):
        raise ValueError(f"unknown precision {asked!r}: expected one of {', '.join(PRECISIONS)}")


def of_products(asked: str | None, dtype: torch.dtype) -> str:
    """What recurrent products of that dtype are done in. Only float32 has a choice: `asked`, or PyTorch's switches."""
    return (asked or rnn_precision()) if dtype == torch.float32 else "ieee"


def of_inputs(dtype: torch.dtype) -> str:
    """What the input's product of that dtype is done in: PyTorch's switch for matrix products decides of float32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"

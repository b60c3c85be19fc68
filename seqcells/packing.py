"""Convert a PackedSequence's rows to a padded batch and back by gathers on the device; the host reads no values.

A PackedSequence stores the rows of step t together, those of the batch_sizes[t] longest sequences; see
torch.nn.utils.rnn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Layout:
    """The positions of the rows. Not a tuple, which torch.func would unpack.

    lengths [B], longest first. source [T, B]: for each padded row its packed row (0 for padding). padding [T, B] bool.
    target [N]: for each packed row its padded row.
    """

    lengths: Tensor
    source: Tensor
    padding: Tensor
    target: Tensor


def layout(batch_sizes: Tensor, batch: int, rows: int, device: torch.device) -> Layout:
    """The Layout of a PackedSequence, from its batch_sizes (on the CPU), largest batch size and number of rows."""
    sizes = batch_sizes.to(device, non_blocking=True)
    column = torch.arange(batch, device=device)
    padding = column >= sizes[:, None]
    ends = sizes.cumsum(0)
    source = ((ends - sizes)[:, None] + column).masked_fill(padding, 0)
    row = torch.arange(rows, device=device)
    step = torch.searchsorted(ends, row, right=True)
    return Layout((~padding).sum(0), source, padding, step * batch + row - (ends - sizes)[step])


class SeqcellsPadding(torch.autograd.Function):
    """Packed rows [N, ...] to padded ones [T, B, ...] (zero at padding), or back; each is the other's gradient."""

    @staticmethod
    def forward(x: Tensor, where: Layout, pad: bool) -> Tensor:
        source, padding = where.source, where.padding
        if not pad:
            return x.reshape(-1, *x.shape[2:]).index_select(0, where.target)
        rows = x.index_select(0, source.flatten()).reshape(*source.shape, *x.shape[1:])
        return rows.masked_fill(padding.reshape(*padding.shape, *(1,) * (x.dim() - 1)), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Layout, bool], output: Tensor) -> None:  # ctx has our attributes
        _, ctx.where, ctx.pad = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # ctx: as above
        return _move(grad, ctx.where, not ctx.pad), None, None


class SeqcellsPaddingTransformed(SeqcellsPadding):
    """SeqcellsPadding with the methods for torch.func and forward mode, which torch.compile refuses to trace."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: object) -> Tensor:  # ctx: as above
        return _move(tangent, ctx.where, ctx.pad)


def _move(x: Tensor, where: Layout, pad: bool) -> Tensor:
    if torch.jit.is_tracing():  # a trace can contain operators but no autograd.Function
        return SeqcellsPadding.forward(x, where, pad)
    return (SeqcellsPadding if torch.compiler.is_compiling() else SeqcellsPaddingTransformed).apply(x, where, pad)


def pad(data: Tensor, where: Layout) -> Tensor:
    """Convert [N, ...] to [T, B, ...], zero at padding."""
    return _move(data, where, True)


def pack(padded: Tensor, where: Layout) -> Tensor:
    """Convert [T, B, ...] to [N, ...]."""
    return _move(padded, where, False)


def padded(given: Tensor | PackedSequence, x: PackedSequence, where: Layout, batch_first: bool) -> Tensor:
    """resets or a per-step input for a packed x, as [T, B, ...] in the packed order, zero at padding.

    given: packed like x, or padded in the original order, with batch_first [B, T, ...].
    """
    if isinstance(given, PackedSequence):
        return pad(given.data, where)
    given = given.transpose(0, 1) if batch_first else given
    given = given if x.sorted_indices is None else given.index_select(1, x.sorted_indices)
    return given.masked_fill(where.padding.reshape(*where.padding.shape, *(1,) * (given.dim() - 2)), 0)


def dropped(x: Tensor, rate: float, where: Layout | None) -> Tensor:
    """A layer's output with dropout. where: the rows of a packed input."""
    if where is None:
        return dropout(x, rate)
    # Of a packed input, only its rows, so that as many random numbers are drawn as in torch.nn.
    return pad(dropout(pack(x, where), rate), where)

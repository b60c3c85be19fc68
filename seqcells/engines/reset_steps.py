"""Resets and lengths for oneDNN's LSTM, which lacks them, by extra steps that are marked by two extra inputs.

A clearing step is inserted before each step with a reset: with the gates i, f and o closed, c and h are zero after it.
Padding becomes steps with i and o closed and f open, so that c stays. An input of 1e30 closes and opens gates exactly,
since sigmoid is 0 or 1 there and its derivative 0: values and gradients are those without such steps, as long as they
are finite. (The results are not views, because users detach states in place.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import packing
from ..kernels.buffers import padding_rows, reset_rows
from . import aten

FAR = 1e30


def _steps(mask: Tensor, back: bool, given: bool) -> tuple[packing.Layout, Tensor, Tensor]:
    """The positions of the steps, their two marks [T', B, 2], and each sequence's last row among T'*B rows.

    The positions are a Layout of T*B rows in T' steps; padding is marked. given: initial states are given, which a
    reset at the first step must clear.
    """
    T, B = mask.shape
    ended, step = padding_rows(mask), torch.arange(T, device=mask.device)[:, None]
    lengths = step.new_full((B,), T) if ended is None else (~ended).sum(0)
    active, taken = step < lengths, lengths - 1 - step if back else step.expand(T, B)
    cuts = reset_rows(mask, back) & active
    if not given:
        cuts &= taken > 0
    before = cuts.flip(0).cumsum(0).flip(0) if back else cuts.cumsum(0)
    column = torch.arange(B, device=mask.device)
    places = torch.where(active, (taken + before) * B + column, 0)
    sizes = lengths + cuts.sum(0)  # of each sequence, clearing steps included
    steps = max(1, int(sizes.max()))
    rows = active.flatten().nonzero().flatten()
    source = torch.full((steps * B,), -1, device=mask.device)
    source[places.flatten()[rows]] = rows
    source = source.view(steps, B)
    marked, past = source < 0, torch.arange(steps, device=mask.device)[:, None] >= sizes
    marks = torch.stack([marked & ~past, past], 2)
    where = packing.Layout(lengths, source.clamp_(min=0), marked, places.flatten())
    return where, marks, (sizes - 1).clamp(min=0) * B + column


def scan(
    x: Tensor, states: tuple[Tensor | None, ...], groups: Sequence[aten.Weights], mask: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """One layer's groups, one after another: y [T, B, K*H] and h_n, c_n [K, B, H]; None if `_layer` returns None.

    x [T, B, I] or [T, B, K, I]; states [K, B, H], for one group also [B, H]; mask: see `masks`.
    """
    found = []
    for k, weights in enumerate(groups):
        h0, c0 = (None if s is None else s.reshape(len(groups), *s.shape[-2:])[k : k + 1] for s in states)
        of = _layer(x if x.dim() == 3 else x[:, :, k], h0, c0, weights, mask, reverse[k])
        if of is None:
            return None
        found.append(of)
    ys, hs, cs = zip(*found, strict=True)
    return (ys[0], (hs[0], cs[0])) if len(groups) == 1 else (torch.cat(ys, 2), (torch.cat(hs), torch.cat(cs)))


def _layer(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: aten.Weights, mask: Tensor, back: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y [T, B, H], h_n and c_n [1, B, H] of one direction; x must be finite at padding. h0, c0 [1, B, H].

    None if a value is not finite: clearing multiplies by zero, which would turn it into NaN.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None and w_hh is not None
    (T, B, _), H = x.shape, w_hh.shape[1]
    where, marks, last = _steps(mask, back, h0 is not None or c0 is not None)
    zero = x.new_zeros(1, B, H)
    h0, c0 = (zero if s is None else s for s in (h0, c0))
    far = w_ih.new_tensor([[-FAR, -FAR], [-FAR, FAR], [0, 0], [-FAR, -FAR]]).repeat_interleave(H, 0)  # i f g o
    steps = torch.cat([packing.pad(x.flatten(0, 1), where), marks.to(x.dtype)], 2)
    every, (_, cn) = aten.layer("lstm", steps, (h0, c0), [(torch.cat([w_ih, far], 1), w_hh, b_ih, b_hh)])
    if not bool(every.detach().sum().isfinite()):
        return None
    y = packing.pack(every, where).unflatten(0, (T, B))
    hn = every.flatten(0, 1).index_select(0, last)
    if (ended := padding_rows(mask)) is not None:
        y = y.masked_fill(ended[..., None], 0)
        hn = torch.where((where.lengths > 0)[:, None], hn, h0[0])
    return y if ended is not None else y.clone(), hn[None].clone(), cn

"""oneDNN's LSTM with resets and lengths, which it has not got: by steps of another kind, which two more inputs mark.

Before a step at which an episode begins a step is put that clears: with i, f and o shut, c and h are zero after it.
After a sequence's end come steps that hold: with i and o shut and f open, c stays. An input of 1e30 shuts and opens
exactly, since sigmoid is 0 or 1 there and its derivative 0: values and gradients are those without such steps, as long
as they are finite. (What is given back are no views: people detach states in place.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import aten, packing
from .kernels.buffers import held, resets_of

FAR = 1e30


def _steps(mask: Tensor, back: bool, given: bool) -> tuple[packing.Layout, Tensor, Tensor]:
    """Where the steps go, the two marks of each [T', B, 2], and each sequence's last row, of T'*B rows.

    A Layout of T*B rows to T' steps: those that are padding are marked. given: there are states to clear at the start.
    """
    T, B = mask.shape
    ended, step = held(mask), torch.arange(T, device=mask.device)[:, None]
    lengths = step.new_full((B,), T) if ended is None else (~ended).sum(0)
    alive, taken = step < lengths, lengths - 1 - step if back else step.expand(T, B)
    cuts = resets_of(mask, back) & alive
    if not given:
        cuts &= taken > 0
    before = cuts.flip(0).cumsum(0).flip(0) if back else cuts.cumsum(0)
    column = torch.arange(B, device=mask.device)
    places = torch.where(alive, (taken + before) * B + column, 0)
    sizes = lengths + cuts.sum(0)  # of each sequence, clearing steps included
    steps = max(1, int(sizes.max()))
    rows = alive.flatten().nonzero().flatten()
    source = torch.full((steps * B,), -1, device=mask.device)
    source[places.flatten()[rows]] = rows
    source = source.view(steps, B)
    marked, past = source < 0, torch.arange(steps, device=mask.device)[:, None] >= sizes
    marks = torch.stack([marked & ~past, past], 2)
    where = packing.Layout(lengths, source.clamp_(min=0), marked, places.flatten())
    return where, marks, (sizes - 1).clamp(min=0) * B + column


def layer(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: aten.Weights, mask: Tensor, back: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y [T, B, H], h_n and c_n [1, B, H] of one direction; x is finite where there is padding. h0, c0 [1, B, H].

    None where something is not finite: zero times that would cross what clears.
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
    if (ended := held(mask)) is not None:
        y = y.masked_fill(ended[..., None], 0)
        hn = torch.where((where.lengths > 0)[:, None], hn, h0[0])
    return y if ended is not None else y.clone(), hn[None].clone(), cn

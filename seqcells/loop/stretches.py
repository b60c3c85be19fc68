"""The rows of a scan with resets or lengths, put so that no step has to mask anything.

What a mask cuts a sequence into, stretches, depend on nothing of each other. Sorted by length they form one batch whose
step k has a leading part of its rows, as in a PackedSequence: fewer steps, none of them wasted on padding, and no state
to clear. The lengths are read by the host.

A `Walk` has a step's rows together, one step after another: N rows of [T, B] in all. States are kept in a buffer of
`head` + N rows: each row's given start [B], then, where there is a mask, a row of zeros, then the walk's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.buffers import held, resets_of


@dataclass(frozen=True)
class Walk:
    """sizes: of each step, never growing. head: rows of a buffer before the walk's.

    source [N]: the row t*B+b of each of the walk's; None: the same. target [T*B]: where in a buffer each row is; padding
    is the row of zeros; None: head further on. start [S]: of each stretch the buffer's row that it begins with; previous
    [N]: the buffer's row with the state before; None, of both: head rows back. last [B]: the buffer's row with each
    sequence's final state. first, end [B]: the stretch that begins with a sequence's given start, and the one that ends with
    its final state, S where there is none; None: its own.
    """

    sizes: tuple[int, ...]
    head: int
    last: Tensor
    source: Tensor | None = None
    target: Tensor | None = None
    start: Tensor | None = None
    previous: Tensor | None = None
    first: Tensor | None = None
    end: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.last.shape[0] * len(self.sizes) if self.source is None else self.source.shape[0]

    @property
    def widest(self) -> int:
        """S, the rows of the first step."""
        return self.sizes[0] if self.sizes else 0

    def of(self, t: Tensor, a: int, b: int) -> Tensor:
        """Rows a to b of the walk, of t [T*B, .]."""
        return t[a:b] if self.source is None else t.index_select(0, self.source[a:b])

    def copying(self, t: Tensor) -> Callable[[Tensor, int, int], object]:
        """What copies rows a to b of t [T*B, .] into a tensor."""
        return lambda into, a, b: into.copy_(self.of(t, a, b))

    def before(self, buffer: Tensor, a: int, b: int) -> Tensor:
        """The states before rows a to b."""
        return buffer[a:b] if self.previous is None else buffer.index_select(0, self.previous[a:b])

    def by_stretch(self, t: Tensor | None, like: Tensor) -> Tensor:
        """Gradients of final states [B, H] (None: zero) with the stretches that end in them [S, H]. A copy."""
        found = like.new_zeros(self.widest + 1, like.shape[1])
        if t is not None:
            found[slice(0, self.widest) if self.end is None else self.end] = t
        return found[: self.widest]

    def by_sequence(self, t: Tensor, final: Tensor | None) -> Tensor:
        """Gradients of the stretches' starts [S, H] as those of the given starts [B, H]; final: of the final states."""
        if self.first is None:
            return t
        found = torch.cat([t, t.new_zeros(1, t.shape[1])]).index_select(0, self.first)
        # Of a sequence of no steps the one is the other.
        return found if final is None else found.addcmul_(final, (self.last < self.last.shape[0])[:, None].to(t.dtype))

    def chunks(self, most: int) -> list[tuple[int, int, int, int]]:
        """(first step, step after the last, first row, row after the last) of pieces of about `most` rows."""
        found, begin, row = [], 0, 0
        ends = list(accumulate(self.sizes))
        for k, end in enumerate(ends):
            if end - row >= most or k == len(ends) - 1:
                found.append((begin, k + 1, row, end))
                begin, row = k + 1, end
        return found


def walk(mask: Tensor | None, back: bool, T: int, B: int, device: torch.device) -> Walk:
    """Of a mask [T, B] (codes: kernels.buffers) for a group that walks forward, or back."""
    if mask is None:
        column = torch.arange(B, device=device)
        last = column + T * B
        if not back:
            return Walk((B,) * T, B, last)
        source = (torch.arange(T - 1, -1, -1, device=device)[:, None] * B + column).flatten()
        return Walk((B,) * T, B, last, source, source + B)
    ended = held(mask)
    lengths = torch.full((B,), T, device=device) if ended is None else (~ended).sum(0)
    step = torch.arange(T, device=device)[:, None]
    s = lengths - 1 - step if back else step.expand(T, B)  # how many of its row's steps were taken before
    alive = step < lengths
    resets = resets_of(mask, back)
    # In the order of a row's steps, row after row, where nothing is padding:
    flat = torch.arange(T * B, device=device).view(T, B).t()
    if back:
        flat = flat.flip(1)
    flat = flat[(alive.flip(0) if back else alive).t()]
    s = s.flatten()[flat]
    cut = resets.flatten()[flat]  # the given start does not reach the first step
    begins = (s == 0) | cut
    stretch = begins.cumsum(0) - 1
    at = begins.nonzero().flatten()
    count, N = at.shape[0], flat.shape[0]
    long = torch.diff(at, append=at.new_tensor([N]))
    order = torch.argsort(long, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count, device=device)
    k = torch.arange(N, device=device) - at[stretch]
    ended_by = torch.bincount(long, minlength=1).cumsum(0)[:-1] if count else long
    counts = count - ended_by  # stretches longer than 0, 1, ...
    offset = counts.cumsum(0) - counts
    head = B + 1
    place = head + offset[k] + rank[stretch]
    source = torch.empty_like(flat)
    source[place - head] = flat
    target = torch.full((T * B,), B, device=device)
    target[flat] = place
    row = flat[at] % B
    given = (s[at] == 0) & ~cut[at]
    start = torch.where(given, row, B)[order]
    first = torch.full((B,), count, device=device)
    first[row[given]] = rank[given.nonzero().flatten()]
    before = torch.cat([counts.new_tensor([head]), counts[:-1]]) if count else counts
    previous = torch.arange(head, head + N, device=device) - torch.repeat_interleave(before, counts)
    previous[: start.shape[0]] = start
    final = (lengths - 1).clamp(min=0) * (0 if back else 1)
    column = torch.arange(B, device=device)
    last = torch.where(lengths > 0, target[final * B + column], column)
    end = torch.full((B,), count, device=device)
    if N:
        end = torch.where(lengths > 0, rank[stretch[(lengths.cumsum(0) - 1).clamp(min=0)]], end)
    return Walk(tuple(counts.tolist()), head, last, source, target, start, previous, first, end)

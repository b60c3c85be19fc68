"""The rows of a scan with resets or lengths, put so that no step has to mask anything.

What a mask cuts the sequences into, stretches, know nothing of each other. Sorted by length they make batches whose
step k has a leading part of their rows, as in a PackedSequence: no step is wasted on padding, and no state has to be
cleared. The lengths are read by the host.

A `Walk` has a step's rows together, one step after another: N rows of [T, B] in all. States are kept in a buffer of
`head` + N rows: each sequence's given start [B], then, where there is a mask, a row of zeros, then the walk's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels.buffers import held, resets_of


def by_step(t: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The rows of each step."""
    if sizes and sizes[0] == sizes[-1]:
        return t.view(len(sizes), sizes[0], *t.shape[1:]).unbind(0)
    return t.split_with_sizes(sizes)


@dataclass(frozen=True)
class Walk:
    """sizes: rows of each step. batches: (first step, step after the last, first stretch, stretch after the last); in
    one, sizes never grow, and start at its stretches. head: rows of a buffer before the walk's.

    source [N]: the row t*B+b of each of the walk's; None: the same. target [T*B]: where in a buffer each row is;
    padding is the row of zeros; None: head further on. The others are None without a mask. start [S]: of each stretch
    the buffer's row that it begins with; previous [N]: the buffer's row with the state before. last [B]: the buffer's
    row with each sequence's final state. first, end [B]: the stretch that begins with a sequence's given start, and the
    one that ends with its final state; S where there is none.
    """

    batch: int
    sizes: tuple[int, ...]
    head: int
    batches: tuple[tuple[int, int, int, int], ...]
    last: Tensor | None = None
    source: Tensor | None = None
    target: Tensor | None = None
    start: Tensor | None = None
    previous: Tensor | None = None
    first: Tensor | None = None
    end: Tensor | None = None
    rows: int = field(init=False)
    stretches: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", sum(self.sizes))
        object.__setattr__(self, "stretches", self.batches[-1][3] if self.batches else 0)

    def of(self, t: Tensor, a: int, b: int) -> Tensor:
        """Rows a to b of the walk, of t [T*B, .]."""
        return t[a:b] if self.source is None else t.index_select(0, self.source[a:b])

    def copying(self, t: Tensor) -> Callable[[Tensor, int, int], object]:
        """What copies rows a to b of t [T*B, .] into a tensor."""
        return lambda into, a, b: into.copy_(self.of(t, a, b))

    def starts(self, buffer: Tensor, i: int, j: int) -> Tensor:
        """The states that stretches i to j begin with."""
        return buffer[i:j] if self.start is None else buffer.index_select(0, self.start[i:j])

    def before(self, buffer: Tensor, a: int, b: int) -> Tensor:
        """The states before rows a to b."""
        return buffer[a:b] if self.previous is None else buffer.index_select(0, self.previous[a:b])

    def final(self, buffer: Tensor) -> Tensor:
        """The final states [B, H]. Of a buffer's own memory or not."""
        return buffer[buffer.shape[0] - self.batch :] if self.last is None else buffer.index_select(0, self.last)

    def by_stretch(self, t: Tensor | None, like: Tensor) -> Tensor:
        """Gradients of final states [B, H] (None: zero) with the stretches that end in them [S, H]. A copy."""
        found = like.new_zeros(self.stretches + 1, like.shape[1])
        if t is not None:
            found[slice(0, self.stretches) if self.end is None else self.end] = t.to(found.dtype)
        return found[: self.stretches]

    def by_sequence(self, t: Tensor, final: Tensor | None) -> Tensor:
        """Gradients of the stretches' starts [S, H] as those of the given starts [B, H]; final: of the final states."""
        if self.first is None or self.last is None:
            return t
        found = torch.cat([t, t.new_zeros(1, t.shape[1])]).index_select(0, self.first)
        # Of a sequence of no steps the one is the other.
        return found if final is None else torch.where((self.last < self.batch)[:, None], final, found)

    def pieces(self, most: int) -> list[list[tuple[int, int, int, int]]]:
        """Of each batch: (first step, step after the last, first row, row after the last) of about `most` rows."""
        found, row = [], 0
        for begin, end, _, _ in self.batches:
            of_batch, k, first = [], begin, row
            for step in range(begin, end):
                row += self.sizes[step]
                if row - first >= most or step == end - 1:
                    of_batch.append((k, step + 1, first, row))
                    k, first = step + 1, row
            found.append(of_batch)
        return found


def walk(mask: Tensor | None, back: bool, T: int, B: int, device: torch.device, most: int) -> Walk:
    """Of a mask [T, B] (codes: kernels.buffers) for a group that walks forward, or back. most: stretches of a batch."""
    if mask is None:
        whole = ((0, T, 0, B),)
        if not back:
            return Walk(B, (B,) * T, B, whole)
        source = torch.arange(T * B, device=device).view(T, B).flip(0).flatten()
        return Walk(B, (B,) * T, B, whole, None, source, source + B)
    ended, cuts = held(mask), resets_of(mask, back)
    lengths = torch.full((B,), T, device=device) if ended is None else (~ended).sum(0)
    step = torch.arange(T, device=device)[:, None]
    alive, taken = step < lengths, (lengths - 1 - step if back else step).expand(T, B)
    # Rows in the order of their steps, sequence after sequence, without padding:
    flat = torch.arange(T * B, device=device).view(T, B).t()
    flat = flat.flip(1)[alive.flip(0).t()] if back else flat[alive.t()]
    begins, cut = taken.flatten()[flat] == 0, cuts.flatten()[flat]
    begins_stretch = begins | cut
    stretch, at = begins_stretch.cumsum(0) - 1, begins_stretch.nonzero().flatten()
    S, N, head = at.shape[0], flat.shape[0], B + 1
    long = torch.diff(at, append=at.new_tensor([N]))
    order = torch.argsort(long, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(S, device=device)
    # The steps of all batches, one batch after another:
    longest = long[order[::most]]
    base = longest.cumsum(0) - longest
    k = base[rank[stretch] // most] + torch.arange(N, device=device) - at[stretch]
    sizes = torch.bincount(k)
    offset = sizes.cumsum(0) - sizes
    place = head + offset[k] + rank[stretch] % most
    source, target = torch.empty_like(flat), torch.full((T * B,), B, device=device)
    source[place - head] = flat
    target[flat] = place
    of_row = flat[at] % B
    given = begins[at] & ~cut[at]  # a cut at the first step: the given start does not reach it
    start = torch.where(given, of_row, B)[order]
    previous = torch.empty_like(flat)
    previous[place - head] = torch.cat([place.new_full((1,), B), place[:-1]])
    previous[place[at] - head] = start[rank]
    column = torch.arange(B, device=device)
    final = torch.zeros_like(lengths) if back else (lengths - 1).clamp(min=0)
    last = torch.where(lengths > 0, target[final * B + column], column)
    first, end = (torch.full((B,), S, device=device) for _ in range(2))
    first[of_row[given]] = rank[given]
    if N:
        end = torch.where(lengths > 0, rank[stretch[(lengths.cumsum(0) - 1).clamp(min=0)]], end)
    firsts = [*base.tolist(), sizes.shape[0]]
    batches = tuple((a, b, i * most, min((i + 1) * most, S)) for i, (a, b) in enumerate(pairwise(firsts)))
    return Walk(B, tuple(sizes.tolist()), head, batches, last, source, target, start, previous, first, end)

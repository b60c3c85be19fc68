"""The order of rows in a scan with resets or lengths, so that no step needs a mask.

A stretch is a run of steps of one sequence that is not interrupted by a reset or padding. Stretches do not depend on
one another. Sorted by length, they form batches in which step k has a leading part of the batch's rows, as in a
PackedSequence: padding is never computed, and no state has to be cleared. The host reads the lengths of stretches.

In a `RowOrder` the rows of a step are together, one step after another: N rows of [T, B] in all. States are in a buffer
of `head` + N rows: each sequence's initial state [B]; if there is a mask, a row of zeros; then the N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...kernels.buffers import padding_rows, reset_rows


def by_step(t: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split t into the rows of each step."""
    if sizes and sizes[0] == sizes[-1]:
        return t.view(len(sizes), sizes[0], *t.shape[1:]).unbind(0)
    return t.split_with_sizes(sizes)


@dataclass(frozen=True)
class RowOrder:
    """sizes: the number of rows of each step. rows: N, their sum. stretches: S. batches: (first step, step after the
    last, first stretch, stretch after the last); within a batch, sizes never grow, and the first is the number of
    stretches. head: the number of rows of a buffer before the N.

    source [N]: the row t*B+b of each of the N rows; None: the same row. target [T*B]: the position of each row in a
    buffer, for padding that of the row of zeros; None: its number plus head. The others are None without a mask. start
    [S]: the buffer's row that each stretch starts from. previous [N]: the buffer's row with the state before. last [B]:
    the buffer's row with each sequence's final state. first, end [B]: the stretch that begins with a sequence's initial
    state, and the one that ends in its final state; S if there is none.
    """

    batch: int
    sizes: tuple[int, ...]
    rows: int
    stretches: int
    head: int
    batches: tuple[tuple[int, int, int, int], ...]
    last: Tensor | None = None
    source: Tensor | None = None
    target: Tensor | None = None
    start: Tensor | None = None
    previous: Tensor | None = None
    first: Tensor | None = None
    end: Tensor | None = None

    def of(self, t: Tensor, a: int, b: int) -> Tensor:
        """Rows a to b, in this order, of t [T*B, .]."""
        return t[a:b] if self.source is None else t.index_select(0, self.source[a:b])

    def placed(self, t: Tensor) -> Tensor:
        """t [N, .] in the order of time [T*B, .]; zero at padding."""
        if self.source is None:
            return t
        if self.start is None or self.target is None:  # without a mask every row is written
            found = torch.empty_like(t)
        else:
            found = t.new_zeros(len(self.target), t.shape[1])
        return found.index_copy_(0, self.source, t)

    def placed_states(self, buffer: Tensor) -> Tensor:
        """The states in a buffer after each step, in the order of time [T*B, .]; zero at padding. May share the
        buffer's memory."""
        return buffer[self.head :] if self.target is None else buffer.index_select(0, self.target)

    def fill(self, buffer: Tensor, states: Tensor, start: Tensor | None) -> None:
        """Fill a buffer with states in the order of time [T*B, .] and the initial state [B, .] (None means zero)."""
        buffer[: self.head] = 0
        if start is not None:
            buffer[: self.batch] = start
        buffer[self.head :] = self.of(states, 0, self.rows)

    def starts(self, buffer: Tensor, i: int, j: int) -> Tensor:
        """The states that stretches i to j start from."""
        return buffer[i:j] if self.start is None else buffer.index_select(0, self.start[i:j])

    def before(self, buffer: Tensor, a: int, b: int) -> Tensor:
        """The states before rows a to b."""
        return buffer[a:b] if self.previous is None else buffer.index_select(0, self.previous[a:b])

    def final(self, buffer: Tensor) -> Tensor:
        """The final states [B, H]. May share the buffer's memory."""
        return buffer[buffer.shape[0] - self.batch :] if self.last is None else buffer.index_select(0, self.last)

    def by_stretch(self, t: Tensor | None, like: Tensor) -> Tensor:
        """Gradients of final states [B, H] (None means zero) by the stretch that ends in each [S, H]. A copy."""
        found = like.new_zeros(self.stretches + 1, like.shape[1])
        if t is not None:
            found[slice(0, self.stretches) if self.end is None else self.end] = t.to(found.dtype)
        return found[: self.stretches]

    def by_sequence(self, t: Tensor, final: Tensor | None) -> Tensor:
        """Gradients of the initial states [B, H], from those of the stretches' starts [S, H]. final: the gradients of
        the final states."""
        if self.first is None or self.last is None:
            return t
        found = torch.cat([t, t.new_zeros(1, t.shape[1])]).index_select(0, self.first)
        # For a sequence without steps, the final state is the initial one.
        return found if final is None else torch.where((self.last < self.batch)[:, None], final, found)

    def by_sample(self, a: int, b: int, samples: int, device: torch.device) -> Tensor:
        """Rows a to b, counted from a, by sample (an equal part of the B sequences): [samples, .], padded with b-a."""
        rows = torch.arange(a, b, device=device) if self.source is None else self.source[a:b]
        sample, order = torch.sort(rows % self.batch // (self.batch // samples), stable=True)
        counts = torch.bincount(sample, minlength=samples)
        place = torch.arange(b - a, device=device) - (counts.cumsum(0) - counts)[sample]
        most = (b - a) // samples if self.start is None else int(counts.max())  # without a mask the host reads nothing
        found = torch.full((samples, most), b - a, device=device)
        found[sample, place] = order
        return found

    def pieces(self, most: int) -> list[list[tuple[int, int, int, int]]]:
        """For each batch: pieces of about `most` rows (first step, step after the last, first row, row after the
        last)."""
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


def row_order(mask: Tensor | None, reversed: bool, T: int, B: int, device: torch.device, most: int) -> RowOrder:
    """The RowOrder of a group, reversed or not, for a mask [T, B] (for its codes see kernels.buffers).

    most: the maximum number of stretches in a batch.
    """
    if mask is not None:
        return _masked(mask, reversed, most)
    whole = ((0, T, 0, B),)
    if not reversed:
        return RowOrder(B, (B,) * T, T * B, B, B, whole)
    source = torch.arange(T * B, device=device).view(T, B).flip(0).flatten()
    return RowOrder(B, (B,) * T, T * B, B, B, whole, None, source, source + B)


def _masked(mask: Tensor, reversed: bool, most: int) -> RowOrder:
    (T, B), device = mask.shape, mask.device
    padding, cuts = padding_rows(mask), reset_rows(mask, reversed)
    lengths = torch.full((B,), T, device=device) if padding is None else (~padding).sum(0)
    step = torch.arange(T, device=device)[:, None]
    active, taken = step < lengths, (lengths - 1 - step if reversed else step).expand(T, B)
    # Rows in the order of their steps, sequence after sequence, without padding:
    flat = torch.arange(T * B, device=device).view(T, B).t()
    flat = flat.flip(1)[active.flip(0).t()] if reversed else flat[active.t()]
    begins, cut = taken.flatten()[flat] == 0, cuts.flatten()[flat]
    begins_stretch = begins | cut
    stretch, at = begins_stretch.cumsum(0) - 1, begins_stretch.nonzero().flatten()
    S, N, head = at.shape[0], flat.shape[0], B + 1
    long = torch.diff(at, append=at.new_tensor([N]))
    by_length = torch.argsort(long, descending=True, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(S, device=device)
    # The steps of all batches, one batch after another:
    longest = long[by_length[::most]]
    base = longest.cumsum(0) - longest
    k = base[rank[stretch] // most] + torch.arange(N, device=device) - at[stretch]
    sizes = torch.bincount(k)
    offset = sizes.cumsum(0) - sizes
    place = head + offset[k] + rank[stretch] % most
    source, target = torch.empty_like(flat), torch.full((T * B,), B, device=device)
    source[place - head] = flat
    target[flat] = place
    of_row = flat[at] % B
    given = begins[at] & ~cut[at]  # with a reset at the first step, the initial state is not used
    start = torch.where(given, of_row, B)[by_length]
    previous = torch.empty_like(flat)
    previous[place - head] = torch.cat([place.new_full((1,), B), place[:-1]])
    previous[place[at] - head] = start[rank]
    column = torch.arange(B, device=device)
    final = torch.zeros_like(lengths) if reversed else (lengths - 1).clamp(min=0)
    last = torch.where(lengths > 0, target[final * B + column], column)
    first, end = (torch.full((B,), S, device=device) for _ in range(2))
    first[of_row[given]] = rank[given]
    if N:
        end = torch.where(lengths > 0, rank[stretch[(lengths.cumsum(0) - 1).clamp(min=0)]], end)
    firsts = [*base.tolist(), sizes.shape[0]]
    batches = tuple((a, b, i * most, min((i + 1) * most, S)) for i, (a, b) in enumerate(pairwise(firsts)))
    return RowOrder(B, tuple(sizes.tolist()), N, S, head, batches, last, source, target, start, previous, first, end)

"""A derived cell for the loop: its step as torch operations, from the same graph as its kernels.

A step forward works on columns of one buffer x: one column of H for each tile of gx, to which products that are only
summed with it are added in place, and one for each product that is apart. Functions of one such column also work in
place, and adjacent columns share one operation. A step backward is linear in its incoming gradients. So their factors,
the coefficients, are computed for many steps at once, in the columns of p that then become the gates' gradients, or in
separate tensors (`others`): the loop backward only multiplies and adds.

`Generated` is a part of the engine, see `cells`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...cell import get as defined
from ...derive.emit import compiled
from ...derive.parts import Parts
from ...products import blocks
from . import printed_backward, printed_forward
from .cells import CELLS, After, Operands, Tuned
from .layout import Layout
from .printing import SPACE


class Generated(Layout):
    """found: the derived cell. source: the source of its functions."""

    activate: Callable[..., None]
    forward: Callable[..., After]
    coefficients: Callable[..., Operands]
    backward: Callable[..., None]

    def __init__(self, found: Parts) -> None:
        super().__init__(found)
        forward, activate, self.scratch_forward = printed_forward.source(self)
        backward, coefficients, self.scratch_backward = printed_backward.source(self)
        self.source = "\n\n".join((forward, activate, coefficients, backward))
        made = compiled(self.source, f"loop of {found.form.name}", SPACE)
        for name in ("forward", "activate", "coefficients", "backward"):
            setattr(self, name, made[name])

    def forward_weights(self, u: Tensor) -> list[Tensor]:
        """From u [products*H, H]: for each run of products in x its weights, transposed."""
        H = u.shape[1]
        return [blocks(u, numbers, H, 0).t().contiguous() for runs in self.products_in for _, numbers in runs]

    def backward_weights(self, u: Tensor) -> list[Tensor]:
        """From u [products*H, H]: for each run of products in p its weights."""
        return [blocks(u, numbers, u.shape[1], 0) for runs in self.products_back for _, numbers in runs]

    def save(self, into: Tensor, x: Tensor, H: int) -> None:
        """Copy what is saved from x [rows, width*H] to into [rows, saved*H]."""
        for first, end, i, j in self.saved_runs:
            into[:, i * H : j * H] = x[:, first * H : end * H]

    def _operand(self, number: int, others: Sequence[Tensor], h: Tensor, c: Tensor | None) -> Tensor:
        state, H = self.form.operands[number].state, h.shape[1]
        if state is None:
            return others[self.form.stored.index(number) - len(self.form.stored)]  # coefficients returns them last
        return h if state == 0 or c is None else c[:, (state - 1) * H : state * H]

    def products(self, p: Tensor, others: Sequence[Tensor], h: Tensor, c: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Pairs (gates' gradients, operand) whose products are the gradient of U, in the order of `rows`."""
        H = h.shape[1]
        return [
            (p[:, column * H : (column + len(numbers)) * H], self._operand(o, others, h, c))
            for o, runs in enumerate(self.products_back)
            for column, numbers in runs
        ]


Part = type[Tuned] | Generated
_FOUND: dict[str, Generated] = {}


def get(key: str) -> Part:
    """The part for the cell of that key: hand-tuned, or derived from the cell's step at the first use."""
    if key in CELLS:
        return CELLS[key]
    parts = defined(key)._derived.parts
    found = _FOUND.get(key)
    if found is None or found.found is not parts:
        found = _FOUND[key] = Generated(parts)
    return found

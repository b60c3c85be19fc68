"""Cells: what one time step computes for one hidden unit, forward and backward.

Functions as described here are derived from a step in PyTorch (`seqcells.cell`), or written by hand, as those in this
folder. A cell is a pair of pointwise ``@triton.jit`` functions on tuples of tiles, and one frozen declaration. Every
schedule (`resident`, `grid`, `stepwise`), dtype, mask and save mode then works for it. Gate order is torch's.

``forward(gx, hu, states, FAST) -> (new_states, saved)``
    gx: G tiles, the input projection with the biases that only add. hu: G tiles, the recurrent product; the last
    ``inner`` of them include their b_hh. states: (h,) or (h, c) before the step. saved: ``saved`` tiles for backward.
``backward(dstates, dm, saved, states_prev, states, FAST) -> (dgx, dhu, dstates_prev)``
    dstates: gradients of the states after the step. dgx, dhu: G tiles each, gradients of gx and hu (they may differ
    only in the last ``inner``). dstates_prev: what reaches the states before the step without passing through U.

A cell whose later gates multiply U with something other than h (the reset-before GRU: r*h) has a second product:
``first`` gates use h, the others use the result of

``middle(gx, hu, states, FAST) -> m`` (hu: the first product only), and
``backward_middle(dstates, saved, states_prev, states, FAST) -> (d, m)``
    d: gradients of the second product's gates; m again, for the weight gradient. The schedule multiplies d by U^T and
    hands it to ``backward`` as ``dm`` (None for a cell with one product).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..registry import get, names, register


@dataclass(frozen=True)
class Cell:
    """The declaration of a cell. forward, backward, middle, backward_middle: @triton.jit functions (see the module)."""

    name: str
    gates: int  # G: weight_ih and weight_hh have G*H rows
    states: int  # 1: h; 2: h and c
    saved: int  # tiles kept for backward
    forward: Any
    backward: Any
    inner: int = 0  # trailing gates whose recurrent product does more than add to gx
    first: int | None = None  # gates of the first product; None: all
    middle: Any = None
    backward_middle: Any = None

    def __post_init__(self) -> None:
        if self.states not in (1, 2):
            raise ValueError(f"cell {self.name!r}: states must be 1 (h) or 2 (h and c), got {self.states}")
        if (self.first is None) != (self.middle is None) or (self.middle is None) != (self.backward_middle is None):
            raise ValueError(f"cell {self.name!r}: first, middle and backward_middle go together")
        if self.inner and self.first is not None:
            raise ValueError(f"cell {self.name!r}: inner gates and a second product exclude each other")

    @property
    def split(self) -> int:
        """Gates of the first product."""
        return self.gates if self.first is None else self.first


__all__ = ["Cell", "get", "names", "register"]

from . import gru, gru_before, lstm, rnn  # noqa: E402, F401  (each registers its cells)

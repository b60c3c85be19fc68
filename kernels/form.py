"""The form of a cell: what its step takes and returns, in numbers. No Triton here: every engine reads it.

A step takes tiles of `gx` (a gate's input product, or a per-step input), the states before it and the trained vectors,
and forms recurrent products with *operands*: a state, or anything computed in the step. Operands of level 1 need no
product; those of level 2 need products of level 1. `products` are the gates that have one, in the kernels' order: by
operand, those of level 1 first. Row block n of the kernels' U is product n's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FUNCTIONS = ("operands_1", "operands_2", "forward", "backward_2", "backward", "finish")  # of a cell, see `cells`


@dataclass(frozen=True)
class Operand:
    """level: 1 or 2. products: how many gates are multiplied with it. state: the state (before the step) that it is;
    None if it is computed."""

    level: int
    products: int
    state: int | None = None


@dataclass(frozen=True)
class Segment:
    """Products that follow each other both in U and in the buffer of their gradients.

    operand: of all of them. first: the first product. count: how many. apart: whether the buffer is dhu (else dgx).
    column: of the first in it, in units of H.
    """

    operand: int
    first: int
    count: int
    apart: bool
    column: int


@dataclass(frozen=True)
class Form:
    """gates: tiles of gx, the gates whose x is read and then the per-step inputs. states, saved, params: how many
    states, tiles saved for backward, trained vectors.

    adds: for each product the tile of gx to which it only adds, so that both have one gradient; -1: it is apart, has a
    gradient of its own (in dhu), and its bias is added in the kernel. late: tiles of gx whose gradient an operand's
    gradient reaches (`finish`). means: for each of FUNCTIONS, how many means over units it takes in each exchange, as
    they do not depend on each other (see `exchange`); empty if none takes any. drawn: dropout masks, drawn in the
    kernel: for each whether it is drawn once for a sequence, not at each step; those that are come first.
    """

    name: str
    gates: int
    states: int
    saved: int
    operands: tuple[Operand, ...]
    adds: tuple[int, ...]
    params: int = 0
    late: tuple[int, ...] = ()
    means: tuple[tuple[int, ...], ...] = ()
    drawn: tuple[bool, ...] = ()
    # What follows from these, as plain attributes: every scan asks for it.
    products: int = field(init=False, repr=False, compare=False)  # row blocks of U
    first_products: int = field(init=False, repr=False, compare=False)  # products of level 1
    level: int = field(init=False, repr=False, compare=False)  # how many operands are of level 1
    # The products whose gradients are in dhu, in its order.
    apart: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # The operands that backward stores in m, in its order: those that are computed, not a state.
    stored: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # Whether units that lie in different programs must hand each other the operands of level 1: always, but for one
    # that is the first state, which is in y.
    published: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first = [o for o in self.operands if o.level == 1]
        vars(self).update(  # a frozen instance has no assignment
            products=len(self.adds),
            first_products=sum(o.products for o in first),
            level=len(first),
            apart=tuple(n for n, tile in enumerate(self.adds) if tile < 0),
            stored=tuple(n for n, o in enumerate(self.operands) if o.state is None),
            published=bool(first) and [o.state for o in first] != [0],
        )

    @property
    def exchanges(self) -> tuple[int, int]:
        """How many exchanges of means a step has, forward and backward."""
        counts = [len(sizes) for sizes in self.means]
        return sum(counts[:3]), sum(counts[3:])

    @property
    def finishes(self) -> bool:
        """Whether some operand of level 1 is computed, so that its gradient has further to go."""
        return any(o.level == 1 and o.state is None for o in self.operands)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The products as runs that one matrix product can take."""
        found: list[Segment] = []
        product = 0
        for number, operand in enumerate(self.operands):
            for n in range(product, product + operand.products):
                apart = self.adds[n] < 0
                column = self.apart.index(n) if apart else self.adds[n]
                last = found[-1] if found else None
                if last and (last.operand, last.apart, last.column + last.count) == (number, apart, column):
                    found[-1] = Segment(number, last.first, last.count + 1, apart, last.column)
                else:
                    found.append(Segment(number, n, 1, apart, column))
            product += operand.products
        return tuple(found)

    def problems(self) -> list[str]:
        """What is wrong with the numbers, in words; an empty list if they fit together."""
        levels = [o.level for o in self.operands]
        computed = [o.state is None for o in self.operands]
        first = [n for n, o in enumerate(self.operands) if o.state == 0]
        late = set(self.late)
        checks = (
            (self.states >= 1, f"a cell has a state, not {self.states}"),
            (self.gates >= 1, f"a step reads a tile of gx, not {self.gates}"),
            (min(self.saved, self.params) >= 0, "saved and params are counts"),
            (levels == sorted(levels) and set(levels) <= {1, 2}, "operands are of level 1, then of level 2"),
            (not levels or levels[0] == 1, "an operand of level 2 needs a product of level 1"),
            (all(o.products >= 1 for o in self.operands), "an operand has a product"),
            (
                all(o.state is None or (o.level == 1 and 0 <= o.state < self.states) for o in self.operands),
                "an operand that is a state is of level 1, and one of the states",
            ),
            (first in ([], [0]), "the operand that is the first state comes first, and once"),
            (sum(o.products for o in self.operands) == self.products, "adds has an entry for each product"),
            (all(-1 <= tile < self.gates for tile in self.adds), "adds names tiles of gx, or -1"),
            (late <= set(range(self.gates)), "late names tiles of gx"),
            (not late or any(c and level == 1 for c, level in zip(computed, levels, strict=True)), "nothing is late"),
            (list(self.drawn) == sorted(self.drawn, reverse=True), "masks drawn once come first"),
            (not late & set(self.adds), "a tile of gx that is late has no product's gradient: that product is apart"),
        )
        return [problem for fine, problem in checks if not fine]

"""What forward saves for backward: as few tiles as possible.

Backward has the states before and after the step, and the trained vectors. Everything else that it needs from forward
must be computed from these, or from tiles that forward saves. These tiles are a minimum cut, found by maximum flow, of
the graph from the products and inputs (which backward lacks) to the values that backward uses. Cutting a value means
saving it, and costs one tile. Of several minimum cuts, the one nearest to backward is taken, which recomputes least.
Tiles are saved in the data's type, so a value that is sensitive to rounding is not recomputed: it, or a value computed
from it, is saved.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable

from .values import BOOLEAN, FORWARD, Value, ancestors, constant

Point = tuple[Value, str] | str
_NEVER = 1 << 20  # a cost larger than the number of values of any step


def smallest(needed: Iterable[Value], free: Iterable[Value], fragile: Collection[Value] = ()) -> list[Value]:
    """The values to save so that the needed ones (none a gradient) can be computed from them and from the free ones.

    fragile: values that are not to be computed again.
    """
    given = set(free)
    needed = [v for v in needed if v not in given and constant(v) is None]
    room: dict[Point, dict[Point, int]] = defaultdict(dict)

    def connect(a: Point, b: Point, most: int) -> None:
        room[a][b] = most
        room[b].setdefault(a, 0)

    values = [v for v in ancestors(needed, given) if v not in given]
    for value in values:
        # A boolean would take as much memory as a number, and a comparison recomputes it; one number for each row as
        # much as a tile, and a mean of tiles recomputes it.
        cheap = value.op in BOOLEAN or (value.row and value not in fragile)
        connect((value, "in"), (value, "out"), _NEVER if cheap else 1)
        if value.op in FORWARD or value in fragile:
            connect("products", (value, "in"), _NEVER)
        for source in value.inputs:
            if source not in given:
                connect((source, "out"), (value, "in"), _NEVER)
    for value in needed:
        connect((value, "out"), "backward", _NEVER)

    while path := _path(room):
        for a, b in path:
            room[a][b] -= 1
            room[b][a] += 1

    # Values from which backward can still be reached are on its side of the cut.
    side: set[Point] = {"backward"}
    waiting: list[Point] = ["backward"]
    while waiting:
        b = waiting.pop()
        for a in room[b]:
            if a not in side and room[a][b] > 0:
                side.add(a)
                waiting.append(a)
    return [v for v in values if (v, "out") in side and (v, "in") not in side]


def _path(room: dict[Point, dict[Point, int]]) -> list[tuple[Point, Point]]:
    """A shortest path for one more unit of flow; empty if there is none."""
    came: dict[Point, Point] = {"products": "products"}
    waiting: deque[Point] = deque(["products"])
    while waiting:
        a = waiting.popleft()
        for b, most in room[a].items():
            if most > 0 and b not in came:
                came[b] = a
                waiting.append(b)
    if "backward" not in came:
        return []
    found: list[tuple[Point, Point]] = []
    at: Point = "backward"
    while at != "products":
        found.append((came[at], at))
        at = came[at]
    return found

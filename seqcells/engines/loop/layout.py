"""The columns of x and of p (see `cells`) of a derived cell: its tiles, products, saved values and gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ...derive.parts import Parts
from ...derive.values import BOOLEAN, LEAVES, Value, ancestors

Run = tuple[int, int, int, int]  # columns from, to of one tensor, and from, to of another, in units of H
Item = tuple[str, int]  # ("gx", tile), ("hu", product), ("param", n) or ("saved", n)


def runs_of(columns: Iterable[int]) -> tuple[Run, ...]:
    """The runs of adjacent tiles that are also adjacent columns: the columns, and the tiles."""
    found: list[list[int]] = []
    for n, column in enumerate(columns):
        if found and found[-1][1] == column:
            found[-1][1] += 1
            found[-1][3] += 1
        else:
            found.append([column, column + 1, n, n + 1])
    return tuple((a, b, i, j) for a, b, i, j in found)


class Columns:
    """Adjacent items, each H wide."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.at = {item: n for n, item in enumerate(items)}

    def runs(self, wanted: Iterable[tuple[Item, int]]) -> list[tuple[int, list[int]]]:
        """From pairs (item, number): (first column, the numbers of the adjacent items from there on)."""
        found: list[tuple[int, list[int]]] = []
        for column, number in sorted((self.at[item], number) for item, number in wanted):
            if found and found[-1][0] + len(found[-1][1]) == column:
                found[-1][1].append(number)
            else:
                found.append((column, [number]))
        return found


class Layout:
    """found: the derived cell."""

    def __init__(self, found: Parts) -> None:
        self.found, self.form = found, found.form
        form = self.form
        self.states, self.saved, self.params = form.states, form.saved, form.params
        self.of_product = found.of_product
        self._sum_up()
        self._lay_out()
        self._lay_out_gradients()

    # --- columns ------------------------------------------------------------------------------------------------------

    def _sum_up(self) -> None:
        """Find which products are added to their tile of gx in place (summed), and the tiles' values then (tiles)."""
        found, form = self.found, self.form
        results = [*found.new, *found.operands, *found.saved]
        order = ancestors(results)
        self.uses = Counter(results)
        users: dict[Value, list[Value]] = {}
        for value in order:
            for v in value.inputs:
                self.uses[v] += 1
                users.setdefault(v, []).append(value)
        self.summed: dict[int, int] = {}
        self.tiles: dict[Item, Value] = {}
        for t in range(form.gates):
            at = found.gx[t]
            waiting = {found.hu[n]: n for n, tile in enumerate(form.adds) if tile == t}
            waiting = {v: n for v, n in waiting.items() if self.uses[v] == 1}
            while self.uses[at] == 1 and at in users and (user := users[at][0]).op == "add":
                other = next((v for v in user.inputs if v is not at), at)
                if other not in waiting:
                    break
                self.summed[waiting.pop(other)] = t
                at = user
            self.tiles["gx", t] = at
        for n in range(form.products):
            if n not in self.summed:
                self.tiles["hu", n] = found.hu[n]

    def place(self, n: int) -> Item:
        """The item of x to which product n is added."""
        return ("gx", self.summed[n]) if n in self.summed else ("hu", n)

    def _lay_out(self) -> None:
        found, form = self.found, self.form
        self.activated: dict[Item, Value] = {}  # functions of one column alone, stored in its place
        free = set(found.new)
        for value in ancestors([*found.new, *found.operands, *found.saved]):
            if value.op in LEAVES or value.op in (*BOOLEAN, "mean") or len(value.inputs) != 1 or value in free:
                continue
            for item, tile in self.tiles.items():
                if value.inputs[0] is tile and self.uses[tile] == 1:
                    self.activated[item] = value

        def key(item: Item) -> tuple[bool, int, str, Item]:
            products = [n for n in range(form.products) if self.place(n) == item]
            operand = self.of_product[products[0]] if products else -1
            own = item[0] == "hu"
            activation = self.activated[item].op if item in self.activated else ""
            return own, operand if own or operand < 0 else -operand + len(form.operands), activation, item

        self.x = Columns(sorted(self.tiles, key=key))
        items = {value: item for item, value in self.tiles.items() if item not in self.activated}
        items |= {value: item for item, value in self.activated.items()}
        beside = [v for v in found.saved if v not in items]
        items |= {v: ("saved", n) for n, v in enumerate(beside)}
        self.x = Columns([*self.x.items, *(("saved", n) for n in range(len(beside)))])
        self.width = len(self.x.items)
        self.places = {v: self.x.at[item] for v, item in items.items()}
        self.saved_values = sorted(found.saved, key=self.places.__getitem__)  # in the order of x's columns
        self.saves_all = len(self.saved_values) == self.width
        self.columns = tuple(self.x.at["gx", t] for t in range(form.gates))
        self.apart = tuple(self.x.at["hu", n] for n in form.apart)
        self.zeroed = tuple(  # products that only add, but not to a tile in place: their column begins with zero
            self.x.at["hu", n] for n in range(form.products) if n not in self.summed and form.adds[n] >= 0
        )
        self.products_in = [  # for each operand: runs of its products in x
            self.x.runs((self.place(n), n) for n in range(form.products) if self.of_product[n] == o)
            for o in range(len(form.operands))
        ]
        self.saved_runs = runs_of(self.places[value] for value in self.saved_values)

    def _lay_out_gradients(self) -> None:
        form = self.form
        adds = {t: self.of_product[n] for n, t in enumerate(form.adds) if t >= 0}
        items: list[Item] = [("gx", t) for t in range(form.gates)] + [("hu", n) for n in form.apart]

        def key(item: Item) -> tuple[bool, int, Item]:
            operand = self.of_product[item[1]] if item[0] == "hu" else adds.get(item[1], -1)
            own = item[0] == "hu"
            return own, operand if own or operand < 0 else len(form.operands) - operand, item

        self.p = Columns([*sorted(items, key=key), *(("param", n) for n in range(form.params))])
        self.gradient_width = len(self.p.items)
        self.grads = tuple(self.p.at["gx", t] for t in range(form.gates))
        self.apart_grads = tuple(self.p.at["hu", n] for n in form.apart)
        self.param_grads = self.p.at["param", 0] if form.params else self.gradient_width
        self.products_back = [
            self.p.runs((self.gradient(n), n) for n in range(form.products) if self.of_product[n] == o)
            for o in range(len(form.operands))
        ]
        self.rows = tuple(n for runs in self.products_back for _, numbers in runs for n in numbers)

    def gradient(self, n: int) -> Item:
        """The item of p with the gradient of product n."""
        return ("hu", n) if self.form.adds[n] < 0 else ("gx", self.form.adds[n])

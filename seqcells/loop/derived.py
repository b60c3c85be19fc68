"""A derived cell for the loop: its step as torch operations, from the graph that its kernels are printed from.

A step forward works on columns of one buffer, x: a column of H for each tile of gx, to which the products that only add
are added in place, and one for each product that is apart. Functions of one such column work in place, too, and those
of neighbours are one operation. A step back is linear in the gradients that it is given. So what multiplies them, the
coefficients, is formed for many steps at once, in the columns of p that then become the gates' gradients, or beside
them (`others`): the loop back only multiplies and adds.

`cells` says what a part of the engine is; `Generated` is one.
"""

from __future__ import annotations

import itertools
import linecache
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..derive.parts import Parts
from ..derive.values import BOOLEAN, LEAVES, Value, ancestors, constant
from .cells import CELLS
from .printing import PRODUCTS, SLOPES, Code
from .stretches import by_step

Item = tuple[str, int]  # ("gx", tile), ("hu", product), ("param", n) or ("kept", n)
_numbers = itertools.count(1)


class Columns:
    """Items side by side, each H wide."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.at = {item: n for n, item in enumerate(items)}

    def runs(self, wanted: Iterable[tuple[Item, int]]) -> list[tuple[int, list[int]]]:
        """Of (item, number): (first column, the numbers of the items side by side from there on)."""
        found: list[tuple[int, list[int]]] = []
        for column, number in sorted((self.at[item], number) for item, number in wanted):
            if found and found[-1][0] + len(found[-1][1]) == column:
                found[-1][1].append(number)
            else:
                found.append((column, [number]))
        return found


def rows_of(t: Tensor, blocks: Sequence[int], H: int) -> Tensor:
    """Those blocks of H rows of t, one after another; t itself where that is all of it."""
    if list(blocks) == list(range(t.shape[0] // max(H, 1))):
        return t
    return torch.cat([t[n * H : (n + 1) * H] for n in blocks]) if blocks else t[:0]


class Generated:
    """found: what was derived."""

    def __init__(self, found: Parts) -> None:
        self.found, self.form = found, found.form
        form = self.form
        self.gates, self.states, self.saved, self.params = form.gates, form.states, form.saved, form.params
        self.operands = len(form.stored)
        self.of_product = [n for n, o in enumerate(form.operands) for _ in range(o.products)]
        self._sum_up()
        self._lay_out()
        self._lay_out_gradients()
        back, factors, self.spares_back = _Back(self).functions()
        walk, activate, self.spares = self._forward()
        self.source = "\n\n".join((walk, activate, factors, back))
        made = _compiled(self.source, form.name)
        self.walk, self.activate, self.factors, self.back = (made[n] for n in ("walk", "activate", "factors", "back"))

    # --- columns ------------------------------------------------------------------------------------------------------

    def _sum_up(self) -> None:
        """Which products are added to their tile of gx in place (summed), and what a tile holds then (tiles)."""
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
                (other,) = [v for v in user.inputs if v is not at] or [None]
                if other not in waiting:
                    break
                self.summed[waiting.pop(other)] = t
                at = user
            self.tiles["gx", t] = at
        for n in range(form.products):
            if n not in self.summed:
                self.tiles["hu", n] = found.hu[n]

    def place(self, n: int) -> Item:
        """Where in x product n is added."""
        return ("gx", self.summed[n]) if n in self.summed else ("hu", n)

    def _lay_out(self) -> None:
        found, form = self.found, self.form
        self.bent: dict[Item, Value] = {}  # functions of a column alone, in its place
        free = set(found.new)
        for value in ancestors([*found.new, *found.operands, *found.saved]):
            if value.op in LEAVES or value.op in BOOLEAN or len(value.args) != 1 or not value.inputs or value in free:
                continue
            for item, tile in self.tiles.items():
                if value.inputs[0] is tile and self.uses[tile] == 1:
                    self.bent[item] = value

        def key(item: Item) -> Any:
            products = [n for n in range(form.products) if self.place(n) == item]
            operand = self.of_product[products[0]] if products else -1
            own = item[0] == "hu"
            bend = self.bent[item].op if item in self.bent else ""
            return own, operand if own or operand < 0 else -operand + len(form.operands), bend, item

        self.x = Columns(sorted(self.tiles, key=key))
        held = {value: item for item, value in self.tiles.items() if item not in self.bent}
        held |= {value: item for item, value in self.bent.items()}
        more = [v for v in found.saved if v not in held]
        held |= {v: ("kept", n) for n, v in enumerate(more)}
        self.x = Columns([*self.x.items, *(("kept", n) for n in range(len(more)))])
        self.width = len(self.x.items)
        self.places = {v: self.x.at[item] for v, item in held.items()}
        self.kept = sorted(found.saved, key=self.places.__getitem__)  # in the order of x's columns
        self.order = tuple(self.kept.index(v) for v in found.saved)
        self.direct = len(self.kept) == self.width
        self.columns = tuple(self.x.at["gx", t] for t in range(form.gates))
        self.apart = tuple(self.x.at["hu", n] for n in form.apart)
        self.empty = tuple(  # products that are summed nowhere though they only add: their column begins with nothing
            self.x.at["hu", n] for n in range(form.products) if n not in self.summed and form.adds[n] >= 0
        )
        self.products_in = [  # of each operand: runs of its products in x
            self.x.runs((self.place(n), n) for n in range(form.products) if self.of_product[n] == o)
            for o in range(len(form.operands))
        ]
        self.keeping = []
        for n, value in enumerate(self.kept):
            column = self.places[value]
            if self.keeping and self.keeping[-1][1] + n - self.keeping[-1][0] == column:
                self.keeping[-1][2] += 1
            else:
                self.keeping.append([n, column, 1])

    def _lay_out_gradients(self) -> None:
        form = self.form
        adds = {t: self.of_product[n] for n, t in enumerate(form.adds) if t >= 0}
        items: list[Item] = [("gx", t) for t in range(form.gates)] + [("hu", n) for n in form.apart]

        def key(item: Item) -> Any:
            operand = self.of_product[item[1]] if item[0] == "hu" else adds.get(item[1], -1)
            own = item[0] == "hu"
            return own, operand if own or operand < 0 else len(form.operands) - operand, item

        self.p = Columns([*sorted(items, key=key), *(("param", n) for n in range(form.params))])
        self.wide = len(self.p.items)
        self.grads = tuple(self.p.at["gx", t] for t in range(form.gates))
        self.apart_grads = tuple(self.p.at["hu", n] for n in form.apart)
        self.param_grads = self.p.at["param", 0] if form.params else self.wide
        self.products_back = [
            self.p.runs((self.gradient(n), n) for n in range(form.products) if self.of_product[n] == o)
            for o in range(len(form.operands))
        ]
        self.rows = tuple(n for runs in self.products_back for _, numbers in runs for n in numbers)

    def gradient(self, n: int) -> Item:
        """Where in p the gradient of product n is."""
        return ("hu", n) if self.form.adds[n] < 0 else ("gx", self.form.adds[n])

    # --- weights ------------------------------------------------------------------------------------------------------

    def forth(self, u: Tensor) -> list[Tensor]:
        """u [products*H, H]: of each run of products in x what it is multiplied with."""
        H = u.shape[1]
        return [rows_of(u, numbers, H).t().contiguous() for runs in self.products_in for _, numbers in runs]

    def back_again(self, u: Tensor) -> list[Tensor]:
        return [rows_of(u, numbers, u.shape[1]) for runs in self.products_back for _, numbers in runs]

    def keep(self, into: Tensor, x: Tensor, H: int) -> None:
        """Copies what is saved of x [rows, width*H] into [rows, saved*H]."""
        for n, column, count in self.keeping:
            into[:, n * H : (n + count) * H] = x[:, column * H : (column + count) * H]

    def stored(self, others: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of what `factors` gave, the operands that are no state."""
        return others[len(others) - len(self.form.stored) :]

    def _operand(self, number: int, others: Sequence[Tensor], h: Tensor, c: Tensor | None) -> Tensor:
        state, H = self.form.operands[number].state, h.shape[1]
        if state is None:
            return self.stored(others)[self.form.stored.index(number)]
        return h if state == 0 or c is None else c[:, (state - 1) * H : state * H]

    def products(self, p: Tensor, others: Sequence[Tensor], h: Tensor, c: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Pairs whose products are the gradient of U, in the order of `rows`."""
        H = h.shape[1]
        return [
            (p[:, column * H : (column + len(numbers)) * H], self._operand(o, others, h, c))
            for o, runs in enumerate(self.products_back)
            for column, numbers in runs
        ]

    # --- forward ------------------------------------------------------------------------------------------------------

    def _forward(self) -> tuple[str, str, int]:
        found, S = self.found, self.states
        step = _Step(self)
        taken: dict[Value, str] = {}
        for s, value in enumerate(found.new):
            if constant(value) is None and value not in step.leaves and value not in step.held and value not in taken:
                taken[value] = f"y{s}"
        code = step.code([*found.new, *found.saved], taken)
        for value in found.saved:
            code.take(value)
        for s, value in enumerate(found.new):
            if (x := constant(value)) is not None:
                code.lines.append(f"y{s}.fill_({x!r})")
            elif (name := code.take(value)) != f"y{s}":
                code.lines.append(f"y{s}.copy_({name})")
        states = [f"h{s}" for s in range(S)]
        scratch = [f"s{n}" for n in range(code.count)]
        views = [*step.views, "y"]
        names = [*step.view_names, "y0", *(f"y{s}" for s in range(1, S))]
        rest = f", *cs.split(H, 1)" if S > 1 else ""
        walk = [
            "def walk(sizes, x, h, c, y, cs, u, spare):",
            *_unpack(step.given, "u"),
            "H, rows = y.shape[1], -1",
            "h0 = h",
            *([f"{_tuple(states[1:])} = c.split(H, 1)"] if S > 1 else []),
            *code.constants(),
            *code.before,
            f"each = ({', '.join(views)},{rest[1:] + ',' if rest else ''})",
            f"for n, {', '.join(names)} in zip(sizes, *(by_step(t, sizes) for t in each), strict=True):",
            "    if n != rows:",
            "        rows = n",
            *(f"        {s} = {s}[:n]" for s in states),
            *(f"        {s} = spare[{k}, :n]" for k, s in enumerate(scratch)),
            *(f"    {line}" for line in code.lines),
            f"    {', '.join(states)} = {', '.join(f'y{s}' for s in range(S))}",
            f"return y[y.shape[0] - rows :], {'cs[y.shape[0] - rows :]' if S > 1 else 'None'}",
        ]
        step = _Step(self)
        again = step.code(found.saved, {})
        for value in found.saved:
            again.take(value)
        spares = [f"s{n}" for n in range(again.count)]
        activate = [
            "def activate(x, h, c, u):",
            *_unpack(step.given, "u"),
            "H, y = h.shape[1], x",
            "h0 = h",
            *([f"{_tuple(states[1:])} = c.split(H, 1)"] if S > 1 else []),
            *(f"{name} = {view}" for name, view in zip(step.view_names, step.views, strict=True)),
            *(f"{s} = torch.empty_like(h)" for s in spares),
            *again.constants(),
            *again.before,
            *again.lines,
        ]
        return _function(walk), _function(activate), code.count


class _Step:
    """What the code of a step forward is made with: names of views of x, of weights and of states."""

    def __init__(self, part: Generated) -> None:
        self.part, form = part, part.form
        self.views: list[str] = []
        self.view_names: list[str] = []
        self.weights: list[list[tuple[str, str]]] = []  # of each operand: (view of x, weight)
        self.given: list[str] = []
        for runs in part.products_in:
            pairs = []
            for column, numbers in runs:
                self.given.append(f"u{len(self.given)}")
                pairs.append((self.view(column, len(numbers)), self.given[-1]))
            self.weights.append(pairs)
        self.given += [f"q{n}" for n in range(form.params)]
        self.leaves = {v: f"h{s}" for s, v in enumerate(part.found.before)}
        self.vectors = part.found.params
        self.leaves |= {v: f"q{n}" for n, v in enumerate(self.vectors)}
        self.leaves |= {tile: self.view(part.x.at[item], 1) for item, tile in part.tiles.items()}
        self.held = {v: self.view(column, 1) for v, column in part.places.items()}

    def view(self, column: int, count: int) -> str:
        name = f"x{column}" if count == 1 else f"x{column}_{column + count - 1}"
        if name not in self.view_names:
            self.view_names.append(name)
            self.views.append(f"x[:, {column} * H : {column + count} * H]")
        return name

    def code(self, wanted: list[Value], taken: dict[Value, str]) -> Code:
        part, form = self.part, self.part.form
        operands = part.found.operands
        needed = {o for n, o in enumerate(part.of_product)}
        hooks: dict[Value, Callable[[], None]] = {}
        done: set[int] = set()

        def multiply(o: int) -> None:
            if o not in done:
                done.add(o)
                name = code.take(operands[o])
                if operands[o] in code.vectors:
                    name = f"{name}.expand_as(h0)"
                code.lines.extend(f"{view}.addmm_({name}, {weight})" for view, weight in self.weights[o])

        for item, tile in part.tiles.items():
            mine = sorted({part.of_product[n] for n in range(form.products) if part.place(n) == item})
            if mine:
                hooks[tile] = lambda mine=mine: [multiply(o) for o in mine]  # type: ignore[misc]
        together: dict[Value, tuple[list[Value], list[str], str]] = {}
        runs: list[list[Item]] = []
        for item in part.x.items:
            if item not in part.bent:
                continue
            alike = runs and all(f(item) == f(runs[-1][-1]) for f in (self._operands, lambda i: part.bent[i].op))
            if alike and part.x.at[item] == part.x.at[runs[-1][-1]] + 1:
                runs[-1].append(item)
            else:
                runs.append([item])
        for run in runs:
            values, first = [part.bent[i] for i in run], part.x.at[run[0]]
            names = [self.view(first + k, 1) for k in range(len(run))]
            together |= dict.fromkeys(values, (values, names, self.view(first, len(run))))
        # An operand is wanted once more, by its product; of products that nothing wants there are none.
        every = [*wanted, *(operands[o] for o in sorted(needed))]
        places = {v: n for v, n in self.held.items() if v not in self.leaves} | taken
        code = Code(self.leaves, every, places, self.vectors, hooks=hooks, together=together)
        return code

    def _operands(self, item: Item) -> set[int]:
        return {self.part.of_product[n] for n in range(self.part.form.products) if self.part.place(n) == item}


class _Back:
    """The functions of the way back: `factors` and `back`."""

    def __init__(self, part: Generated) -> None:
        self.part, self.found, self.form = part, part.found, part.form
        self.graph = part.found.graph
        self.lists: dict[Value, tuple[Value, list[Value], float]] = {}
        found, form = self.found, self.form
        totals = found.totals
        self.values: dict[Item, Value] = {("gx", t): v for t, v in enumerate(totals.dgx)}
        self.values |= {("hu", n): found.dhu[n] for n in form.apart}
        self.values |= {("param", n): v for n, v in enumerate(totals.dparams)}
        self.results = [*self.values.values(), *totals.dbefore]

    def dstate(self, s: int) -> Value:
        """The gradient of a state after the step."""
        return self.graph.make("dstate", s)

    # --- gradients as one gradient times coefficients -----------------------------------------------------------------

    def split(self, value: Value) -> tuple[Value, list[Value], float]:
        """value as a gradient, factors that are none, and a number."""
        if value in self.lists:
            return self.lists[value]
        gradient, factors, number = value, [], 1.0
        if value.op == "neg":
            gradient, factors, number = self.split(value.inputs[0])
            number = -number
        elif value.op == "div":
            over = value.inputs[1]
            gradient, factors, number = self.split(value.inputs[0])
            if (x := constant(over)) is not None:
                number /= x
            else:
                factors = [*factors, self.graph.make("div", self.graph.number(1), over)]
        elif value.op in PRODUCTS:
            (first,) = [v for v in value.inputs if v.gradient]
            gradient, factors, number = self.split(first)
            factors = list(factors)
            for v in value.inputs:
                if (x := constant(v)) is not None:
                    number *= x
                elif v is not first:
                    factors.append(v)
        self.lists[value] = gradient, factors, number
        return self.lists[value]

    def _reached(self) -> list[Value]:
        """Every gradient that is a term or a result, operations before what they are made of."""
        found: dict[Value, None] = {}
        waiting = [v for v in self.results if v.gradient]
        while waiting:
            value = waiting.pop()
            if value in found:
                continue
            found[value] = None
            gradient = self.split(value)[0]
            if gradient is value:
                waiting.extend(v for v in value.inputs if v.gradient)
            else:
                waiting.append(gradient)
        return list(found)

    def _slopes(self, factors: list[Value]) -> list[Value]:
        """s (1 - s), and 1 - t t, as one factor."""
        left, found = list(factors), []
        for v in factors:
            if v.op != "sub" or constant(v.inputs[0]) != 1 or v not in left or v in self.found.saved:
                continue
            y = v.inputs[1]
            if y in left:
                left.remove(y)
                left.remove(v)
                found.append(self.graph.make(SLOPES["sigmoid"], y))
            elif y.op in PRODUCTS and y.inputs[0] is y.inputs[1]:
                left.remove(v)
                found.append(self.graph.make(SLOPES["tanh"], y.inputs[0]))
        return left + found

    def _coefficients(self, reached: list[Value]) -> dict[Value, Value]:
        """Of each value that is a gradient times something, that: products of two, those that occur often made once."""
        lists, signs = {}, {}
        for value in reached:
            gradient, factors, number = self.split(value)
            if gradient is not value:
                lists[value] = self._slopes(factors)
                signs[value] = number
        while True:
            counts = Counter(pair for parts in lists.values() for pair in _pairs(parts))
            if not counts:
                break
            (a, b), most = max(counts.items(), key=lambda c: (c[1], -c[0][0].index, -c[0][1].index))
            if most < 2:
                break
            node = self._product([a, b])
            for parts in lists.values():
                if (a, b) in _pairs(parts):
                    parts.remove(a)
                    parts.remove(b)
                    parts.append(node)
        found = {}
        for value, parts in lists.items():
            c = self._product(parts) if parts else None
            number = signs[value]
            if c is None:
                found[value] = self.graph.number(number)
            else:
                found[value] = c if number == 1 else self._negative(c) if number == -1 else self._scaled(c, number)
        return found

    def _product(self, parts: list[Value]) -> Value:
        # A slope comes last: torch has its product with something as one operation.
        first, *others = sorted(parts, key=lambda v: (v.op in SLOPES.values(), v.index))
        for other in others:
            first = self.graph.make("product", first, other)
        return first

    def _negative(self, value: Value) -> Value:
        return self.graph.make("neg", value)

    def _scaled(self, value: Value, number: float) -> Value:
        return self.graph.make("product", value, self.graph.number(number))

    # --- printing -----------------------------------------------------------------------------------------------------

    def functions(self) -> tuple[str, str, int]:
        part, form, graph = self.part, self.form, self.graph
        coefficients = self._coefficients(self._reached())
        vectors = set(self.found.params)
        self.in_p: dict[Item, Value] = {}  # coefficients that wait in a column of p
        self.others: list[Value] = []  # those beside it
        rebuilt: dict[Value, Value] = {}
        self.placed: dict[Value, str] = {}

        def coefficient(c: Value) -> Value:
            if constant(c) is not None:
                return c
            if c not in self.others:
                self.others.append(c)
            return graph.make("coefficient", self.others.index(c))

        def again(value: Value, item: Item | None = None) -> Value:
            if value in rebuilt:
                return rebuilt[value]
            if value in coefficients:
                gradient, c = again(self.split(value)[0]), coefficients[value]
                if item is not None and constant(c) is None:
                    self.in_p[item] = c
                    made = graph.make("product", gradient, graph.make("coefficient", *item))
                else:
                    made = graph.make("product", gradient, coefficient(c))
            elif not value.gradient:
                made = value if constant(value) is not None else coefficient(value)
            elif value.inputs:
                made = graph.make(value.op, *(again(v) if v.gradient else again_plain(v) for v in value.inputs))
            else:
                made = value
            rebuilt[value] = made
            return made

        def again_plain(value: Value) -> Value:
            return value if constant(value) is not None else coefficient(value)

        # Gates first, so that what they are is known before a state asks for it.
        targets = {item: again(v, item) for item, v in self.values.items()}
        before = [again(v) for v in self.found.totals.dbefore]
        for item, value in targets.items():
            if value.gradient and value.inputs and value not in self.placed:
                self.placed[value] = f"p{part.p.at[item]}"
        back, spares = self._back(targets, before, vectors)
        return back, self._factors(vectors), spares

    def _vector(self, value: Value, vectors: set[Value]) -> bool:
        """Whether it is computed from trained vectors alone."""
        given = {*self.found.before, *self.found.new, *self.found.saved}
        ends = [v for v in ancestors([value], given) if (v in given or not v.inputs) and constant(v) is None]
        return all(v in vectors for v in ends)

    def _back(self, targets: dict[Item, Value], before: list[Value], vectors: set[Value]) -> tuple[str, int]:
        part, form, S = self.part, self.form, self.form.states
        graph = self.graph
        given: list[str] = []
        views: dict[str, str] = {}

        def view(column: int, count: int) -> str:
            name = f"p{column}" if count == 1 else f"p{column}_{column + count - 1}"
            views[name] = f"p[:, {column} * H : {column + count} * H]"
            return name

        weights: list[list[tuple[str, str, list[int]]]] = []
        for runs in part.products_back:
            weights.append([])
            for column, numbers in runs:
                given.append(f"u{len(given)}")
                weights[-1].append((view(column, len(numbers)), given[-1], numbers))
        columns = {item: view(part.p.at[item], 1) for item in targets}
        leaves = {self.dstate(s): f"d{s}" for s in range(S)}
        flat = {graph.make("coefficient", n) for n, c in enumerate(self.others) if self._vector(c, vectors)}
        leaves |= {graph.make("coefficient", n): f"o{n}" for n in range(len(self.others))}
        leaves |= {graph.make("coefficient", *item): columns[item] for item in self.in_p}
        done: set[Item] = set()
        hooks: dict[Value, Callable[[], None]] = {}

        def finish(item: Item) -> None:
            """The lines that fill a column of p."""
            if item in done:
                return
            done.add(item)
            value, name = targets[item], columns[item]
            if (x := constant(value)) is not None:
                code.lines.append(f"{name}.fill_({x!r})")
            elif (found := code.take(value)) != name:
                code.lines.append(f"{name}.copy_({found})")

        def multiply(o: int) -> list[tuple[str, str]]:
            for _, _, numbers in weights[o]:
                for n in numbers:
                    finish(part.gradient(n))
            return [(v, w) for v, w, _ in weights[o]]

        def reach(leaf: Value, o: int) -> None:
            first, *more = multiply(o)
            place = code.fresh()
            code.names[leaf] = code.scratch[leaf] = place
            code.lines.append(f"torch.mm({first[0]}, {first[1]}, out={place})")
            code.lines.extend(f"{place}.addmm_({v}, {w})" for v, w in more)

        given_back = {1: iter(self.found.dv), 2: iter(self.found.dm)}
        for o, operand in enumerate(form.operands):
            if operand.level == 2 or operand.state is None:
                leaf = next(given_back[operand.level])
                hooks[leaf] = lambda leaf=leaf, o=o: reach(leaf, o)  # type: ignore[misc]
                leaves[leaf] = ""
        wanted = [v for v in (*targets.values(), *before) if constant(v) is None]
        code = Code(leaves, wanted, self.placed, flat, like="p", hooks=hooks)
        for item in targets:
            finish(item)
        ends: list[str] = []
        for s in range(1, S):
            ends += self._carry(code, before[s], s)
        self._add(code, before[0], 1)
        code.lines.extend(ends)
        for o, operand in enumerate(form.operands):
            if operand.state is not None and operand.level == 1:
                into = "under" if operand.state == 0 else f"d{operand.state}"
                code.lines.extend(f"{into}.addmm_({v}, {w})" for v, w in multiply(o))
        given += [f"q{n}" for n in range(form.params)]
        cells = [f"d{s}" for s in range(1, S)]
        by_rows = [n for n, c in enumerate(self.others) if graph.make("coefficient", n) not in flat]
        every = [*views.values(), *(f"o{n}" for n in by_rows)]
        names = [*views, *(f"o{n}" for n in by_rows)]
        lines = [
            "def back(sizes, p, kept, others, d0, d, dcs, below, u, spare):",
            *_unpack(given, "u"),
            "H, rows = spare.shape[2], -1",
            *_unpack([f"o{n}" for n in range(len(self.others))], f"others[: {len(self.others)}]"),
            *code.constants(),
            *code.before,
            f"each = {_tuple(every)}",
            *([f"{_tuple([f'e{s}' for s in range(1, S)])} = d.split(H, 1)"] if S > 1 else []),
            "steps = list(zip(sizes, *(by_step(t, sizes) for t in each), d0, below, dcs or sizes, strict=True))",
            f"for n, {', '.join([*names, 'd0', 'under', 'add'])} in reversed(steps):",
            "    if n != rows:",
            "        rows, carried = n, d[:n]",
            *(f"        {c} = e{c[1:]}[:n]" for c in cells),
            *(f"        s{k} = spare[{k}, :n]" for k in range(code.count)),
            *(["    if dcs is not None:", "        carried.add_(add)"] if S > 1 else []),
            *(f"    {line}" for line in code.lines),
        ]
        return _function(lines), code.count

    def _carry(self, code: Code, value: Value, s: int) -> list[str]:
        """Lines so that d{s} becomes the gradient of the state before; and those that must wait for the others."""
        own = self.dstate(s)
        if value is own:
            code.drop(value)
            return []
        if (x := constant(value)) is not None:
            return [f"d{s}.fill_({x!r})"]
        if not value.inputs and value.op == "dstate":
            name = code.fresh()
            code.lines.append(f"{name}.copy_({code.take(value)})")
            return [f"d{s}.copy_({name})"]
        computed = value not in code.names
        name = code.name(value)
        if computed and value in code.scratch and code.uses[own] == 0 and code.uses[value] == 1:
            code.lines[-1] = code.lines[-1].replace(f"={name})", f"=d{s})")
            code.drop(value)
            code.names[value] = f"d{s}"
            return []
        # It stays in its scratch tensor until then.
        return [f"d{s}.copy_({name})"]

    def _add(self, code: Code, value: Value, sign: int) -> None:
        """Lines that add a gradient to that of the first state before."""
        if constant(value) is not None:
            return
        if code.single(value, ("add", "sub")):
            code.drop(value)
            a, b = value.inputs
            self._add(code, a, sign)
            self._add(code, b, -sign if value.op == "sub" else sign)
        elif code.single(value, PRODUCTS):
            gradient, c = value.inputs
            code.drop(value)
            name, number = code.name(gradient), constant(c)
            if number is not None:
                code.lines.append(f"under.add_({name}, alpha={number * sign!r})")
            else:
                code.lines.append(f"under.addcmul_({name}, {code.name(c)}{'' if sign == 1 else ', value=-1'})")
                code.drop(c)
            code.drop(gradient)
        else:
            code.lines.append(f"under.{'add_' if sign == 1 else 'sub_'}({code.take(value)})")

    def _factors(self, vectors: set[Value]) -> str:
        part, form, found, S = self.part, self.form, self.found, self.form.states
        leaves: dict[Value, str] = {}
        views = []
        for n, value in enumerate(part.kept):
            leaves[value] = f"x{n}"
            views.append(f"x{n} = kept[:, {n} * H : {n + 1} * H]")
        leaves |= {v: f"a{s}" for s, v in enumerate(found.new) if constant(v) is None}
        leaves |= {v: f"h{s}" for s, v in enumerate(found.before)}
        leaves |= {v: f"q{n}" for n, v in enumerate(found.params)}
        operands = [found.operands[n] for n in form.stored]
        wanted = [*self.in_p.values(), *self.others, *operands]
        places: dict[Value, str] = {}
        beside = list(dict.fromkeys((*self.others, *operands)))
        for item, c in self.in_p.items():
            if c not in beside and c not in leaves:
                places.setdefault(c, f"p{part.p.at[item]}")
        own: list[Value] = []
        for c in beside:
            if c not in leaves and c.op not in BOOLEAN and not self._vector(c, vectors):
                places[c] = f"r{len(own)}"
                own.append(c)
        code = Code(leaves, wanted, places, vectors, like="y")
        results = [code.take(c) for c in self.others]
        for c in operands:
            results.append(f"{code.take(c)}.expand_as(y)" if self._vector(c, vectors) else code.take(c))
        for item, c in self.in_p.items():
            place = f"p{part.p.at[item]}"
            if (name := code.take(c)) != place:
                code.lines.append(f"{place}.copy_({name})")
        lines = [
            "def factors(p, kept, h, c, y, after, u):",
            *_unpack([f"q{n}" for n in range(form.params)], "u"),
            "H = y.shape[1]",
            "h0, a0 = h, y",
            *([f"{_tuple([f'h{s}' for s in range(1, S)])} = c.split(H, 1)"] if S > 1 else []),
            *([f"{_tuple([f'a{s}' for s in range(1, S)])} = after.split(H, 1)"] if S > 1 else []),
            *views,
            *(f"p{part.p.at[item]} = p[:, {part.p.at[item]} * H : {part.p.at[item] + 1} * H]" for item in self.in_p),
            *(f"r{n} = torch.empty_like(y)" for n in range(len(own))),
            *(f"s{n} = torch.empty_like(y)" for n in range(code.count)),
            *code.constants(),
            *code.before,
            *code.lines,
            f"return {_tuple(results)}",
        ]
        return _function(lines)


def _pairs(parts: list[Value]) -> set[tuple[Value, Value]]:
    return set(combinations(sorted(parts, key=lambda v: v.index), 2))


def _tuple(parts: Sequence[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _unpack(names: Sequence[str], source: str) -> list[str]:
    return [f"{_tuple(names)} = {source}"] if names else []


def _function(lines: Sequence[str]) -> str:
    return "\n    ".join(lines) + "\n"


def _compiled(source: str, name: str) -> dict[str, Any]:
    """The functions of a source, which tracebacks and debuggers find."""
    file = f"<seqcells loop of {name} {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {
        "__name__": __name__,
        "torch": torch,
        "by_step": by_step,
        "_sigmoid_backward": torch.ops.aten.sigmoid_backward.grad_input,
        "_tanh_backward": torch.ops.aten.tanh_backward.grad_input,
    }
    exec(compile(source, file, "exec"), space)
    return space


_FOUND: dict[str, Generated] = {}


def get(key: str) -> Any:
    """The part of the cell of that key: a tuned one, or one made from its step when it is first wanted."""
    if key in CELLS:
        return CELLS[key]
    if key not in _FOUND:
        from ..cell import get as defined

        _FOUND[key] = Generated(defined(key)._derived.parts)
    return _FOUND[key]

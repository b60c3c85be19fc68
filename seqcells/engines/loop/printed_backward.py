"""Source code of a derived cell's steps backward: `coefficients` and `backward` (see `cells`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import combinations

from ...derive.emit import tuple_of
from ...derive.values import BOOLEAN, Value, ancestors, constant
from .layout import Item, Layout
from .printing import PRODUCTS, SLOPES, Code, function, unpack


class _Back:
    """A step's gradients as products of the incoming ones and coefficients, and the code for both."""

    def __init__(self, part: Layout) -> None:
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
        """Split value into a product of a gradient, factors that are not gradients, and a number."""
        if value in self.lists:
            return self.lists[value]
        gradient, number = value, 1.0
        factors: list[Value] = []
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
        """All gradients that are terms or results, each before its inputs."""
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
        """factors with s (1 - s) and 1 - t t replaced by one factor each."""
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
        """The coefficient of each value that is a gradient times a coefficient. Frequent products are computed once."""
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
        # A slope comes last: torch has one operation for its product with a factor.
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
        part, graph = self.part, self.graph
        coefficients = self._coefficients(self._reached())
        vectors = set(self.found.params)
        self.in_p: dict[Item, Value] = {}  # coefficients that are stored in a column of p
        self.others: list[Value] = []  # coefficients in tensors of their own
        rebuilt: dict[Value, Value] = {}
        self.placed: dict[Value, str] = {}

        def coefficient(c: Value) -> Value:
            if constant(c) is not None:
                return c
            if c not in self.others:
                self.others.append(c)
            return graph.make("row_coefficient" if c.row else "coefficient", self.others.index(c))

        def again(value: Value, item: Item | None = None) -> Value:
            if value in rebuilt:
                return rebuilt[value]
            if value in coefficients:
                gradient, c = again(self.split(value)[0]), coefficients[value]
                if item is not None and not c.row:
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

        # Gates first, because states use them.
        targets = {item: again(v, item) for item, v in self.values.items()}
        before = [again(v) for v in self.found.totals.dbefore]
        for item, value in targets.items():
            if value.gradient and value.inputs and value not in self.placed:
                self.placed[value] = f"p{part.p.at[item]}"
        backward, scratch = self._print_backward(targets, before, vectors)
        return backward, self._print_coefficients(vectors), scratch

    def _vector(self, value: Value, vectors: set[Value]) -> bool:
        """Whether value is computed from trained vectors alone."""
        given = {*self.found.before, *self.found.new, *self.found.saved}
        ends = [v for v in ancestors([value], given) if (v in given or not v.inputs) and constant(v) is None]
        return all(v in vectors for v in ends)

    def _print_backward(self, targets: dict[Item, Value], before: list[Value], vectors: set[Value]) -> tuple[str, int]:
        return _BackwardCode(self, targets, before, vectors).function()

    def _print_coefficients(self, vectors: set[Value]) -> str:
        part, form, found, S = self.part, self.form, self.found, self.form.states
        leaves: dict[Value, str] = {}
        views = []
        for n, value in enumerate(part.saved_values):
            leaves[value] = f"x{n}"
            views.append(f"x{n} = saved[:, {n} * H : {n + 1} * H]")
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
            if c not in leaves and c.op not in BOOLEAN and not c.row and not self._vector(c, vectors):
                places[c] = f"r{len(own)}"
                own.append(c)
        code = Code(leaves, wanted, places, vectors, like="y")
        results = [code.take(c) for c in self.others]
        for c in operands:
            results.append(f"{code.take(c)}.expand_as(y)" if c.row or self._vector(c, vectors) else code.take(c))
        for item, c in self.in_p.items():
            place = f"p{part.p.at[item]}"
            if (name := code.take(c)) != place:
                code.lines.append(f"{place}.copy_({name})")
        lines = [
            "def coefficients(p, saved, h, c, y, after, u):",
            *unpack([f"q{n}" for n in range(form.params)], "u"),
            "H = y.shape[1]",
            "h0, a0 = h, y",
            *([f"{tuple_of([f'h{s}' for s in range(1, S)])} = c.split(H, 1)"] if S > 1 else []),
            *([f"{tuple_of([f'a{s}' for s in range(1, S)])} = after.split(H, 1)"] if S > 1 else []),
            *views,
            *(f"p{part.p.at[item]} = p[:, {part.p.at[item]} * H : {part.p.at[item] + 1} * H]" for item in self.in_p),
            *(f"r{n} = torch.empty_like(y)" for n in range(len(own))),
            *(f"s{n} = torch.empty_like(y)" for n in range(code.count)),
            *code.constants(),
            *code.before,
            *code.lines,
            f"return {tuple_of(results)}",
        ]
        return function(lines)


class _BackwardCode:
    """The code of `backward`: it fills the columns of p (targets) and computes the gradients of the states before."""

    def __init__(self, of: _Back, targets: dict[Item, Value], before: list[Value], vectors: set[Value]) -> None:
        self.of, self.part, self.form, self.graph = of, of.part, of.form, of.graph
        self.targets, self.before = targets, before
        part, form, graph = self.part, self.form, self.graph
        self.given: list[str] = []
        self.views: dict[str, str] = {}
        self.weights: list[list[tuple[str, str, list[int]]]] = []  # for each operand: (view of p, weight, its products)
        for runs in part.products_back:
            self.weights.append([])
            for column, numbers in runs:
                self.given.append(f"u{len(self.given)}")
                self.weights[-1].append((self._view(column, len(numbers)), self.given[-1], numbers))
        self.columns = {item: self._view(part.p.at[item], 1) for item in targets}
        # Coefficients made of trained vectors alone: the same at every step.
        self.flat = {n for n, c in enumerate(of.others) if of._vector(c, vectors)}
        leaves = {of.dstate(s): f"d{s}" for s in range(form.states)}
        of_others = [graph.make("row_coefficient" if c.row else "coefficient", n) for n, c in enumerate(of.others)]
        leaves |= {value: f"o{n}" for n, value in enumerate(of_others)}
        leaves |= {graph.make("coefficient", *item): self.columns[item] for item in of.in_p}
        self.done: set[Item] = set()
        hooks: dict[Value, Callable[[], None]] = {}
        of_operands = {1: iter(of.found.dv), 2: iter(of.found.dm)}
        for o, operand in enumerate(form.operands):
            if operand.level == 2 or operand.state is None:
                leaf = next(of_operands[operand.level])
                hooks[leaf] = partial(self._reach, leaf, o)
                leaves[leaf] = ""
        wanted = [v for v in (*targets.values(), *before) if constant(v) is None]
        flat = {of_others[n] for n in self.flat}
        self.code = Code(leaves, wanted, of.placed, flat, like="p", hooks=hooks)

    def _view(self, column: int, count: int) -> str:
        name = f"p{column}" if count == 1 else f"p{column}_{column + count - 1}"
        self.views[name] = f"p[:, {column} * H : {column + count} * H]"
        return name

    def _finish(self, item: Item) -> None:
        """The lines that fill a column of p."""
        if item in self.done:
            return
        self.done.add(item)
        value, name, code = self.targets[item], self.columns[item], self.code
        if (x := constant(value)) is not None:
            code.lines.append(f"{name}.fill_({x!r})")
        elif (found := code.take(value)) != name:
            code.lines.append(f"{name}.copy_({found})")

    def _multiply(self, o: int) -> list[tuple[str, str]]:
        """For an operand: pairs of gates' gradients and weights. The gradients' columns are filled first."""
        for _, _, numbers in self.weights[o]:
            for n in numbers:
                self._finish(self.part.gradient(n))
        return [(v, w) for v, w, _ in self.weights[o]]

    def _reach(self, leaf: Value, o: int) -> None:
        """Print the lines for an operand's gradient."""
        code, (first, *others) = self.code, self._multiply(o)
        place = code.fresh()
        code.names[leaf] = code.scratch[leaf] = place
        code.lines.append(f"torch.mm({first[0]}, {first[1]}, out={place})")
        code.lines.extend(f"{place}.addmm_({v}, {w})" for v, w in others)

    def function(self) -> tuple[str, int]:
        """The source, and the number of scratch tensors it needs."""
        code, form, S = self.code, self.form, self.form.states
        for item in self.targets:
            self._finish(item)
        ends: list[str] = []
        for s in range(1, S):
            ends += self._carry(code, self.before[s], s)
        self._add(code, self.before[0], 1)
        code.lines.extend(ends)
        for o, operand in enumerate(form.operands):
            if operand.state is not None and operand.level == 1:
                into = "under" if operand.state == 0 else f"d{operand.state}"
                code.lines.extend(f"{into}.addmm_({v}, {w})" for v, w in self._multiply(o))
        given = [*self.given, *(f"q{n}" for n in range(form.params))]
        others = [f"o{n}" for n in range(len(self.of.others))]
        by_rows = [name for n, name in enumerate(others) if n not in self.flat]
        cells = [f"d{s}" for s in range(1, S)]
        lines = [
            "def backward(sizes, p, saved, others, grads, u, scratch):",
            *unpack(given, "u"),
            "d0, d, dcs, below = grads",
            "H, rows = scratch.shape[2], -1",
            *unpack(others, f"others[: {len(others)}]"),
            *code.constants(),
            *code.before,
            f"each = {tuple_of([*self.views.values(), *by_rows])}",
            *([f"{tuple_of([f'e{s}' for s in range(1, S)])} = d.split(H, 1)"] if S > 1 else []),
            "steps = list(zip(sizes, *(by_step(t, sizes) for t in each), d0, below, dcs or sizes, strict=True))",
            f"for n, {', '.join([*self.views, *by_rows, 'd0', 'under', 'add'])} in reversed(steps):",
            "    if n != rows:",
            "        rows, carried = n, d[:n]",
            *(f"        {c} = e{c[1:]}[:n]" for c in cells),
            *(f"        s{k} = scratch[{k}, :n]" for k in range(code.count)),
            *(["    if dcs is not None:", "        carried.add_(add)"] if S > 1 else []),
            *(f"    {line}" for line in code.lines),
        ]
        return function(lines), code.count

    def _carry(self, code: Code, value: Value, s: int) -> list[str]:
        """Lines after which d{s} is the gradient of the state before. Returns those that must come after the others."""
        own = self.of.dstate(s)
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
        """Print lines that add a gradient to that of the first state before the step."""
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


def _pairs(parts: list[Value]) -> set[tuple[Value, Value]]:
    return set(combinations(sorted(parts, key=lambda v: v.index), 2))


def source(part: Layout) -> tuple[str, str, int]:
    """The source of both functions, and the number of scratch tensors that backward needs."""
    return _Back(part).functions()

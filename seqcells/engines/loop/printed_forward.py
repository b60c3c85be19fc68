"""Source code of a derived cell's steps forward: `forward` and `activate` (see `cells`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...derive.emit import tuple_of
from ...derive.values import Value, constant
from .layout import Item, Layout
from .printing import Code, function, unpack


class _Step:
    """The names of views of x, weights and states in the code of a step forward."""

    def __init__(self, part: Layout) -> None:
        self.part, form = part, part.form
        self.views: list[str] = []
        self.view_names: list[str] = []
        self.weights: list[list[tuple[str, str]]] = []  # for each operand: (view of x, weight)
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
        self.columns = {v: self.view(column, 1) for v, column in part.places.items()}

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

        def multiply(numbers: list[int]) -> None:
            for o in (o for o in numbers if o not in done):
                done.add(o)
                name = code.take(operands[o])
                if operands[o] in code.vectors or operands[o].row:
                    name = f"{name}.expand_as(h0)"
                code.lines.extend(f"{view}.addmm_({name}, {weight})" for view, weight in self.weights[o])

        for item, tile in part.tiles.items():
            mine = sorted({part.of_product[n] for n in range(form.products) if part.place(n) == item})
            if mine:
                hooks[tile] = partial(multiply, mine)
        together: dict[Value, tuple[list[Value], list[str], str]] = {}
        runs: list[list[Item]] = []
        for item in part.x.items:
            if item not in part.activated:
                continue
            alike = runs and all(f(item) == f(runs[-1][-1]) for f in (self._operands, lambda i: part.activated[i].op))
            if alike and part.x.at[item] == part.x.at[runs[-1][-1]] + 1:
                runs[-1].append(item)
            else:
                runs.append([item])
        for run in runs:
            values, first = [part.activated[i] for i in run], part.x.at[run[0]]
            names = [self.view(first + k, 1) for k in range(len(run))]
            together |= dict.fromkeys(values, (values, names, self.view(first, len(run))))
        # An operand is used once more, by its product. Unused products have been removed.
        every = [*wanted, *(operands[o] for o in sorted(needed))]
        places = {v: n for v, n in self.columns.items() if v not in self.leaves} | taken
        code = Code(self.leaves, every, places, self.vectors, hooks=hooks, together=together)
        return code

    def save(self, code: Code) -> None:
        """Print the lines that fill the columns of what is saved."""
        for value in self.part.found.saved:
            name = code.take(value)
            if value.row:
                code.lines.append(f"{self.columns[value]}.copy_({name})")

    def _operands(self, item: Item) -> set[int]:
        return {self.part.of_product[n] for n in range(self.part.form.products) if self.part.place(n) == item}


def source(part: Layout) -> tuple[str, str, int]:
    """The source of both functions, and the number of scratch tensors that forward needs."""
    found, S = part.found, part.states
    step = _Step(part)
    taken: dict[Value, str] = {}
    for s, value in enumerate(found.new):
        if constant(value) is None and value not in step.leaves and value not in step.columns and value not in taken:
            taken[value] = f"y{s}"
    code = step.code([*found.new, *found.saved], taken)
    step.save(code)
    for s, value in enumerate(found.new):
        if (x := constant(value)) is not None:
            code.lines.append(f"y{s}.fill_({x!r})")
        elif (name := code.take(value)) != f"y{s}":
            code.lines.append(f"y{s}.copy_({name})")
    states = [f"h{s}" for s in range(S)]
    scratch = [f"s{n}" for n in range(code.count)]
    views = [*step.views, "y"]
    names = [*step.view_names, "y0", *(f"y{s}" for s in range(1, S))]
    others = ["*cs.split(H, 1)"] if S > 1 else []
    forward = [
        "def forward(sizes, x, h, c, y, cs, u, scratch):",
        *unpack(step.given, "u"),
        "H, rows = y.shape[1], -1",
        "h0 = h",
        *([f"{tuple_of(states[1:])} = c.split(H, 1)"] if S > 1 else []),
        *code.constants(),
        *code.before,
        f"each = {tuple_of([*views, *others])}",
        f"for n, {', '.join(names)} in zip(sizes, *(by_step(t, sizes) for t in each), strict=True):",
        "    if n != rows:",
        "        rows = n",
        *(f"        {s} = {s}[:n]" for s in states),
        *(f"        {s} = scratch[{k}, :n]" for k, s in enumerate(scratch)),
        *(f"    {line}" for line in code.lines),
        f"    {', '.join(states)} = {', '.join(f'y{s}' for s in range(S))}",
        f"return y[y.shape[0] - rows :], {'cs[y.shape[0] - rows :]' if S > 1 else 'None'}",
    ]
    step = _Step(part)
    again = step.code(found.saved, {})
    step.save(again)
    own_scratch = [f"s{n}" for n in range(again.count)]
    activate = [
        "def activate(x, h, c, u):",
        *unpack(step.given, "u"),
        "H, y = h.shape[1], x",
        "h0 = h",
        *([f"{tuple_of(states[1:])} = c.split(H, 1)"] if S > 1 else []),
        *(f"{name} = {view}" for name, view in zip(step.view_names, step.views, strict=True)),
        *(f"{s} = torch.empty_like(h)" for s in own_scratch),
        *again.constants(),
        *again.before,
        *again.lines,
    ]
    return function(forward), function(activate), code.count

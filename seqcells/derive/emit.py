"""Prints the values as Triton source: the functions that `kernels.cells` describes."""

from __future__ import annotations

import itertools
import linecache
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .parts import Parts, Totals
from .values import COMPARISONS, FROM_MATH, FROM_TRITON, Value, ancestors, constant, share

_numbers = itertools.count(1)  # numbers of sources: a cell that is defined again gets a new file name
_RESERVED = {
    *("gx", "hu", "states", "saved", "before", "after", "params", "dstates", "dm", "dv", "dgx", "dbefore", "dparams"),
    *("FAST", "tl", "means", *FROM_MATH),
}
_SIGNS = {**COMPARISONS, "add": "+", "sub": "-", "product": "*", "times": "*", "div": "/", "and": "&", "or": "|"}
_BINDS = {"add": 3, "sub": 3, "product": 4, "times": 4, "div": 4}  # precedence; comparisons, & and | get parentheses
_LOOSE, _UNARY, _ATOM = 1, 5, 6
_LONG = 70  # characters of an expression that gets a line of its own


class Function:
    """One generated function.

    leaves: the names of its arguments' values. names: the names of values that it computes, as far as they have one.
    like: a tile of full size. exchanges: how many means each call of `means` takes.
    """

    def __init__(self, head: str, leaves: Mapping[Value, str], names: Mapping[Value, str], like: str = "") -> None:
        self.lines, self.leaves, self.names = [head], dict(leaves), names
        self.exchanges: list[int] = []
        self.like = like
        self.taken = {s for s in leaves.values() if s.isidentifier()} | _RESERVED

    def unpack(self, values: list[Value], source: str) -> None:
        """Print the line that unpacks a tuple into values, which become leaves."""
        fresh = [self._fresh(v) for v in values]
        self.leaves.update(zip(values, fresh, strict=True))
        self.lines.append(f"    {', '.join(fresh)}{',' if len(fresh) == 1 else ''} = {source}")

    def give(self, *tuples: list[Value]) -> None:
        """Print the lines for the results, and the return of tuples of values; a single value is returned as it is."""
        results = [v for t in tuples for v in t]
        order = [v for v in ancestors(results, self.leaves) if v not in self.leaves and constant(v) is None]
        uses = Counter(v for value in order for v in value.inputs) + Counter(results)
        after = self._after(order)
        # Means that do not depend on each other are taken together, as soon as all of their values are there.
        for value in sorted(order, key=lambda v: (after[v], v.op != "mean")):
            if value.op == "mean":
                if value not in self.leaves:
                    self._means([v for v in order if v.op == "mean" and after[v] == after[value]])
                continue
            text = self.text(value)
            if uses[value] > 1 or value in self.names or len(text) > _LONG:
                name = self._fresh(value)
                self.lines.append(f"    {name} = {text}")
                self.leaves[value] = name
        shown = [tuple_of([self._full(v) for v in t]) for t in tuples]
        self.lines.append(f"    return {', '.join(shown)}")

    def source(self) -> str:
        return "\n".join(self.lines) + "\n"

    def _after(self, order: list[Value]) -> dict[Value, int]:
        """For each value how many means, one of the other, come before it, itself included."""
        after: dict[Value, int] = {}
        for value in order:
            after[value] = (value.op == "mean") + max((after.get(v, 0) for v in value.inputs), default=0)
        return after

    def _means(self, values: list[Value]) -> None:
        """Print the line that takes means, which become leaves."""
        of = tuple_of([self._full(v.inputs[0]) for v in values])
        self.unpack(values, f"means({of}, params[-1], {sum(self.exchanges)}, {len(self.exchanges)})")
        self.exchanges.append(len(values))

    def _fresh(self, value: Value) -> str:
        name = self.names.get(value, "")
        if not name or name in self.taken or not name.isascii():
            base = name + "_" if name else "v"
            name = next(n for n in (f"{base}{i}" for i in itertools.count()) if n not in self.taken)
        self.taken.add(name)
        return name

    def _full(self, value: Value) -> str:
        """value as a tile of full size, also where it is one number for each unit or for each row."""
        if constant(value) is not None or value.full:
            return self._tile(value)
        return f"{self.text(value, _BINDS['add'])} + tl.zeros_like({self.like})"

    def _tile(self, value: Value) -> str:
        """value as a tile, also where it is a number."""
        if (x := constant(value)) is None:
            return self.text(value)
        return f"tl.zeros_like({self.like})" + (f" + {number(x)}" if x else "")

    def text(self, value: Value, binds: int = 0) -> str:
        """value as an expression, in parentheses if its precedence is lower than binds."""
        if value in self.leaves:
            return self.leaves[value]
        if (x := constant(value)) is not None:
            text, mine = number(x), _ATOM if x >= 0 else _UNARY
        elif value.op in FROM_MATH:
            fast = ", FAST" if value.op in FROM_MATH[:2] else ""
            text, mine = f"{value.op}({self.text(value.inputs[0])}{fast})", _ATOM
        elif value.op == "mean":  # in a function it is a leaf by now
            text, mine = f"mean({self.text(value.inputs[0])})", _ATOM
        elif value.op in FROM_TRITON:
            text, mine = f"tl.{value.op}({self.text(value.inputs[0])})", _ATOM
        elif value.op == "where":
            condition, a, b = value.inputs
            # Triton would compute two numbers in float32, whatever the tiles' dtype.
            first = self.text(a) if constant(b) is None else self._tile(a)
            text, mine = f"tl.where({self.text(condition)}, {first}, {self.text(b)})", _ATOM
        elif value.op in ("neg", "not"):
            text, mine = ("-" if value.op == "neg" else "~") + self.text(value.inputs[0], _UNARY), _UNARY
        else:
            mine = _BINDS.get(value.op, _LOOSE)
            a, b = value.inputs
            # The right side of a sign of the same rank is in parentheses: the order of operations is the graph's.
            text = f"{self.text(a, mine + (mine == _LOOSE))} {_SIGNS[value.op]} {self.text(b, mine + 1)}"
        return f"({text})" if mine < binds else text


def number(x: float) -> str:
    """A number as an expression."""
    return repr(x) if x - x == 0 else f'float("{x}")'


def tuple_of(parts: Sequence[str]) -> str:
    """A tuple of expressions."""
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def compiled(source: str, name: str, space: Mapping[str, object]) -> dict[str, object]:
    """Compile a source in a namespace, and return it with the source's functions."""
    file, found = f"<seqcells {name} {next(_numbers)}>", dict(space)
    # For code without a file, Python looks up its lines here: for tracebacks and debuggers, and for Triton.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), found)
    return found


def triton_source(parts: Parts) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The functions of `kernels.cells`, and by their names how many means each exchange takes (see `Form.means`)."""
    form, first = parts.form, parts.form.level
    totals, dhu, finished = _shared(parts)
    texts: list[str] = []
    exchanges: dict[str, tuple[int, ...]] = {}

    def function(head: str, leaves: Mapping[Value, str], like: str, *results: list[Value]) -> None:
        backward = "saved" in head
        names = _gradient_names(parts, totals, dhu) if backward else parts.called
        made = Function(f"def {head}, FAST: tl.constexpr):", leaves, names, like)
        if backward and parts.saved:
            made.unpack(parts.saved, "saved")
        made.give(*results)
        texts.append(made.source())
        exchanges[head[: head.index("(")]] = tuple(made.exchanges)

    stored = [v for v, o in zip(parts.operands, form.operands, strict=True) if o.state is None]
    second = len(parts.operands) - first
    computed = stored[: len(stored) - second]
    ahead, back = forward_leaves(parts), backward_leaves(parts)
    if form.published:
        function("operands_1(gx, states, params", ahead, "states[0]", parts.operands[:first])
    if second:
        function("operands_2(gx, hu, states, params", ahead, "states[0]", parts.operands[first:])
    function("forward(gx, hu, states, params", ahead, "states[0]", parts.new, parts.saved)
    if second:
        head, late = "backward_2(dstates, saved, before, after, params", dhu[form.first_products :]
        function(head, back, "dstates[0]", late, parts.operands[first:])
    head = "backward(dstates, dm, saved, before, after, params"
    function(head, back, "dstates[0]", totals.dgx, dhu, totals.dbefore, totals.dparams, computed)
    if form.finishes:
        head = "finish(dgx, dbefore, dparams, dv, saved, before, after, params"
        function(head, back, "dbefore[0]", finished.dgx, finished.dbefore, finished.dparams)
    return "\n\n".join(texts), exchanges


def _shared(parts: Parts) -> tuple[Totals, list[Value], Totals]:
    """The gradients, with products of factors that occur more than once shared, in backward and in finish."""
    found = _split(share(parts.graph, [*parts.early.every, *parts.dhu]), parts)
    return (*found, _split(share(parts.graph, parts.finished.every), parts)[0])


def _split(values: Iterable[Value], parts: Parts) -> tuple[Totals, list[Value]]:
    found = iter(values)
    counts = (len(parts.gx), len(parts.before), len(parts.params))
    return Totals(*(list(itertools.islice(found, n)) for n in counts)), list(found)


def _gradient_names(parts: Parts, totals: Totals, dhu: list[Value]) -> dict[Value, str]:
    names = dict(parts.called)
    for tile, value in zip(parts.tiles, totals.dgx, strict=True):
        names.setdefault(value, f"d_{tile}")
    for gate, value in zip(parts.products, dhu, strict=True):
        names.setdefault(value, f"d_{gate}_product")
    return names


def forward_leaves(parts: Parts) -> dict[Value, str]:
    """The names of the arguments' values in functions of forward."""
    params = [*parts.params, *parts.drawn]
    given = (("gx", parts.gx), ("hu", parts.hu), ("states", parts.before), ("params", params))
    return {v: f"{name}[{n}]" for name, values in given for n, v in enumerate(values)}


def backward_leaves(parts: Parts) -> dict[Value, str]:
    """The names of the arguments' values in functions of backward, except what forward saves."""
    dstates = [parts.graph.make("dstate", n) for n in range(len(parts.new))]
    given = [("dstates", dstates), ("dm", parts.dm), ("dv", parts.dv), ("dgx", parts.given.dgx)]
    given += [("dbefore", parts.given.dbefore), ("dparams", parts.given.dparams)]
    given += [("after", parts.new), ("before", parts.before), ("params", [*parts.params, *parts.drawn])]
    return {v: f"{name}[{n}]" for name, values in given for n, v in enumerate(values) if constant(v) is None}


def triton_functions(source: str, name: str) -> dict[str, Any]:  # Triton's, without a type
    """The functions of a source as Triton functions, by name. This imports triton."""
    import triton.language as tl

    from ..kernels import exchange, math

    jit: type = type(math.sigmoid)  # not triton.jit, which decides anew whether kernels are interpreted
    space: dict[str, object] = {"__name__": __name__, "tl": tl, **{n: getattr(math, n) for n in FROM_MATH}}
    space["means"] = exchange.means
    return {n: jit(f) for n, f in compiled(source, f"cell {name}", space).items() if n not in space and callable(f)}

"""A traced step in the order of the kernels: the cell's form, and the inputs and results of each of its functions.

Finds which gates have an input product, which have a recurrent one and with which operand, which products are only
added to an input, and what forward saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels.form import Form, Operand
from .cut import smallest
from .trace import Gradients, Names, Traced
from .values import Graph, Value, ancestors, constant


@dataclass(frozen=True)
class Totals:
    """Gradients of the tiles of gx, the states before the step and the trained vectors."""

    dgx: list[Value]
    dbefore: list[Value]
    dparams: list[Value]

    @property
    def every(self) -> list[Value]:
        return [*self.dgx, *self.dbefore, *self.dparams]


@dataclass(frozen=True)
class Parts:
    """x_gates, u_gates: the gates that have an input product, and a recurrent one, in the order of gates=. order:
    product n is u_gates[order[n]]. gx, hu, before, params,
    drawn: leaves. new, operands, saved, dhu and the rest: values.

    totals: gradients. early: those without the part through computed operands of level 1. given: leaves, the arguments
    of `finish`; finished: its results.
    """

    graph: Graph
    form: Form
    names: Names
    x_gates: tuple[str, ...]
    u_gates: tuple[str, ...]
    order: tuple[int, ...]
    gx: list[Value]
    hu: list[Value]
    before: list[Value]
    params: list[Value]
    drawn: list[Value]
    new: list[Value]
    operands: list[Value]
    saved: list[Value]
    totals: Totals
    early: Totals
    dhu: list[Value]
    given: Totals
    finished: Totals
    dm: list[Value]
    dv: list[Value]
    called: dict[Value, str]

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the kernels' states; an output that is not a state is the first."""
        return (*self.names.output.split(), *self.names.states)

    @property
    def tiles(self) -> tuple[str, ...]:
        """The names of gx's tiles: those of their gates and inputs."""
        return (*self.x_gates, *self.names.inputs)

    @property
    def products(self) -> tuple[str, ...]:
        """The gates of the products."""
        return tuple(self.u_gates[n] for n in self.order)

    @property
    def free(self) -> list[Value]:
        """The values that backward has without saving them."""
        return [*self.before, *self.params, *self.drawn, *self.new]

    @property
    def operations(self) -> frozenset[str]:
        """The names of all operations, forward and backward."""
        values = [*self.new, *self.operands, *self.dhu, *self.early.every, *self.finished.every]
        return frozenset(v.op for v in ancestors(values))

    @property
    def of_product(self) -> list[int]:
        """The number of each product's operand."""
        return [n for n, o in enumerate(self.form.operands) for _ in range(o.products)]


def arrange(name: str, names: Names, found: Traced) -> Parts:
    """A traced step in the order of the kernels."""
    graph, read, states = found.graph, sorted(found.read), len(found.new)

    def leaves(op: str, numbers: Iterable[int]) -> list[Value]:
        return [graph.make(op, n) for n in numbers]

    gx = [*leaves("gx", read), *leaves("input", range(len(names.inputs)))]
    of = (("before", states), ("param", len(names.params)), ("drawn", len(names.drawn)))
    before, params, drawn = (leaves(op, range(n)) for op, n in of)
    gates = sorted(found.products)  # that have a recurrent product, in the order of gates=
    adds = {gate: _tile(found, gate, read) for gate in gates}
    # Operands of level 1 come first; among these, the first state.
    ordered = sorted(range(len(found.operands)), key=lambda n: (found.levels[n], found.operands[n] is not before[0], n))
    kernel = sorted(gates, key=lambda g: (ordered.index(found.products[g]), adds[g] < 0, adds[g], gates.index(g)))
    operands = [found.operands[n] for n in ordered]
    described = tuple(_operand(found, n, before) for n in ordered)
    dhu = [found.gradients.products[g] for g in kernel]
    early, through = _totals(found, names, read)
    of = (("dgx", len(gx)), ("dbefore", states), ("dparam", len(params)))
    given = Totals(*(leaves(op, range(n)) for op, n in of))
    computed = [n for n, o in zip(ordered, described, strict=True) if o.level == 1 and o.state is None]
    second = [n for n in ordered if found.levels[n] == 2]
    stored = [v for v, o in zip(operands, described, strict=True) if o.state is None]
    saved = _saved(graph, [*early.every, *dhu, *through.every], stored, [*before, *params, *drawn, *found.new])
    form = Form(
        name,
        gates=len(gx),
        states=states,
        saved=len(saved),
        operands=described,
        adds=tuple(adds[g] for g in kernel),
        params=len(params),
        late=tuple(n for n, v in enumerate(through.dgx) if v is not graph.number(0)),
        drawn=tuple(names.drawn.values()),
    )
    return Parts(
        graph,
        form,
        names,
        tuple(names.gates[n] for n in read),
        tuple(names.gates[n] for n in gates),
        tuple(gates.index(g) for g in kernel),
        gx,
        leaves("hu", kernel),
        before,
        params,
        drawn,
        found.new,
        operands,
        saved,
        _sums(graph, early, through),
        early,
        dhu,
        given,
        _sums(graph, given, through),
        leaves("dm", second),
        leaves("dv", computed),
        {v: n for v, n in found.names.items() if v.inputs},
    )


def _operand(found: Traced, number: int, before: list[Value]) -> Operand:
    value, products = found.operands[number], sum(n == number for n in found.products.values())
    return Operand(found.levels[number], products, before.index(value) if value in before else None)


def _sums(graph: Graph, a: Totals, b: Totals) -> Totals:
    pairs = ((a.dgx, b.dgx), (a.dbefore, b.dbefore), (a.dparams, b.dparams))
    return Totals(*([graph.sum(*p) for p in zip(mine, theirs, strict=True)] for mine, theirs in pairs))


def _totals(found: Traced, names: Names, read: list[int]) -> tuple[Totals, Totals]:
    """The gradients before `finish`, and what `finish` adds to them."""

    def totals(of: Gradients) -> Totals:
        before = [found.graph.number(0), *of.before] if names.output else list(of.before)  # the output is not a state
        return Totals([*(of.x[n] for n in read), *of.inputs], before, list(of.params))

    return totals(found.gradients), totals(found.finish)


def _tile(found: Traced, gate: int, read: list[int]) -> int:
    """The tile of gx that a gate's product only adds to, its own gate's first; -1: there is none."""
    results, product = [*found.new, *found.operands], found.graph.make("hu", gate)
    for tile in sorted(read, key=lambda n: n != gate):
        same = found.gradients.x[tile] is found.gradients.products[gate]
        if same and _only_sum(results, found.graph.make("gx", tile), product):
            return read.index(tile)
    return -1


def _only_sum(results: list[Value], a: Value, b: Value) -> bool:
    """Whether results depend on a and b only through a + b."""
    shares = {a: (1.0, 0.0), b: (0.0, 1.0)}  # of a and b in a value that is linear in them

    def share(value: Value) -> tuple[float, float]:
        return shares.get(value, (0.0, 0.0))

    for value in ancestors(results):
        if value in shares:
            continue
        mine = [share(v) for v in value.inputs]
        numbers = [n for v in value.inputs if (n := constant(v)) is not None]
        if value.op in ("add", "sub"):
            sign = 1 if value.op == "add" else -1
            shares[value] = (mine[0][0] + sign * mine[1][0], mine[0][1] + sign * mine[1][1])
        elif value.op == "neg":
            shares[value] = (-mine[0][0], -mine[0][1])
        elif value.op == "product" and numbers:
            shares[value] = (sum(m[0] for m in mine) * numbers[0], sum(m[1] for m in mine) * numbers[0])
        elif any(x != y for x, y in mine):
            return False
    return all(x == y for x, y in map(share, results))


def _saved(graph: Graph, gradients: list[Value], stored: list[Value], free: list[Value]) -> list[Value]:
    """What forward saves, so that the operands and everything that multiplies a gradient can be recomputed."""
    used = {v for value in ancestors(gradients, free) if value.gradient for v in value.inputs if not v.gradient}
    needed: Iterable[Value] = [*sorted(used, key=lambda v: v.index), *stored]
    found = smallest(needed, free, graph.fragile)
    return sorted(found, key=lambda v: (not v.inputs, v.index))

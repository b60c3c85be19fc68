"""What was traced, in the order of the kernels: the cell's form, and for each of its functions what it takes and gives.

Which gates have an input product, which a recurrent one, with which operand; which products only add to an input; what
forward saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels.form import Form, Operand
from .cut import smallest
from .trace import Gradients, Names, Traced
from .values import Graph, Value, ancestors


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
    """x_gates, u_gates: gates that have an input product, and a recurrent one, in the order of gates=. order: product n
    is u_gates[order[n]]. gx, hu, before, params: leaves. new, operands, saved, dhu and the rest: values.

    totals: gradients. early: without what comes through computed operands of level 1. given: leaves, those that
    `finish` gets; finished: what it makes of them.
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
        """The kernels' states by name: an output that is none is the first."""
        return (*self.names.output.split(), *self.names.states)

    @property
    def tiles(self) -> tuple[str, ...]:
        """The tiles of gx by the names of their gates and inputs."""
        return (*self.x_gates, *self.names.inputs)

    @property
    def products(self) -> tuple[str, ...]:
        """The gates of the products."""
        return tuple(self.u_gates[n] for n in self.order)

    @property
    def free(self) -> list[Value]:
        """What backward has without saving it."""
        return [*self.before, *self.params, *self.new]

    @property
    def operations(self) -> frozenset[str]:
        """By name, forward and backward."""
        values = [*self.new, *self.operands, *self.dhu, *self.early.every, *self.finished.every]
        return frozenset(v.op for v in ancestors(values))

    def operand(self, product: int) -> int:
        """The number of a product's operand."""
        number = 0
        while product >= self.form.operands[number].products:
            product -= self.form.operands[number].products
            number += 1
        return number


def arrange(name: str, names: Names, found: Traced) -> Parts:
    make, graph = found.graph.make, found.graph
    read = sorted(found.read)
    gx = [*(make("gx", n) for n in read), *(make("input", n) for n in range(len(names.inputs)))]
    states = len(found.new)
    before = [make("before", n) for n in range(states)]
    params = [make("param", n) for n in range(len(names.params))]

    gates = sorted(found.products)  # that have a recurrent product, in the order of gates=
    adds = {gate: _tile(found, gate, read) for gate in gates}
    # By operand, those of level 1 first, of these the first state; in each those that add first.
    ordered = sorted(range(len(found.operands)), key=lambda n: (found.levels[n], found.operands[n] is not before[0], n))
    kernel = [
        gate
        for number in ordered
        for gate in sorted(
            (g for g in gates if found.products[g] == number), key=lambda g: (adds[g] < 0, adds[g], gates.index(g))
        )
    ]
    operands = [found.operands[n] for n in ordered]
    described = tuple(
        Operand(
            found.levels[n],
            sum(g == n for g in found.products.values()),
            before.index(v) if (v := found.operands[n]) in before else None,
        )
        for n in ordered
    )
    late, dhu = found.finish, [found.gradients.products[g] for g in kernel]
    early, through = (_totals(g, read) for g in (found.gradients, late))
    given = Totals(
        [make("dgx", n) for n in range(len(gx))],
        [make("dbefore", n) for n in range(states)],
        [make("dparam", n) for n in range(len(params))],
    )
    computed = [n for n, o in zip(ordered, described, strict=True) if o.level == 1 and o.state is None]
    second = [n for n in ordered if found.levels[n] == 2]

    zero = graph.number(0)
    if names.output:  # the states before do not have it
        early.dbefore.insert(0, zero)
        through.dbefore.insert(0, zero)

    def sums(a: Totals, b: Totals) -> Totals:
        pairs = ((a.dgx, b.dgx), (a.dbefore, b.dbefore), (a.dparams, b.dparams))
        return Totals(*([graph.sum(*p) for p in zip(mine, theirs, strict=True)] for mine, theirs in pairs))

    stored = [v for v, o in zip(operands, described, strict=True) if o.state is None]
    free = [*before, *params, *found.new]
    saved = _saved(graph, [*early.every, *dhu, *through.every], stored, free)
    form = Form(
        name,
        gates=len(gx),
        states=states,
        saved=len(saved),
        operands=described,
        adds=tuple(adds[g] for g in kernel),
        params=len(params),
        late=tuple(n for n, v in enumerate(through.dgx) if v is not zero),
    )
    return Parts(
        graph,
        form,
        names,
        tuple(names.gates[n] for n in read),
        tuple(names.gates[n] for n in gates),
        tuple(gates.index(g) for g in kernel),
        gx,
        [make("hu", g) for g in kernel],
        before,
        params,
        found.new,
        operands,
        saved,
        sums(early, through),
        early,
        dhu,
        given,
        sums(given, through),
        [make("dm", n) for n in second],
        [make("dv", n) for n in computed],
        {v: n for v, n in found.names.items() if v.inputs},
    )


def _totals(gradients: Gradients, read: list[int]) -> Totals:
    return Totals([*(gradients.x[n] for n in read), *gradients.inputs], list(gradients.before), list(gradients.params))


def _tile(found: Traced, gate: int, read: list[int]) -> int:
    """The tile of gx that a gate's product only adds to, its own gate's first; -1: there is none."""
    results, product = [*found.new, *found.operands], found.graph.make("hu", gate)
    for tile in sorted(read, key=lambda n: n != gate):
        same = found.gradients.x[tile] is found.gradients.products[gate]
        if same and _only_sum(results, found.graph.make("gx", tile), product):
            return read.index(tile)
    return -1


def _only_sum(results: list[Value], a: Value, b: Value) -> bool:
    """Whether results depend on a + b and on neither alone."""
    shares = {a: (1.0, 0.0), b: (0.0, 1.0)}  # of a and b in a value that is linear in them

    def share(value: Value) -> tuple[float, float]:
        return shares.get(value, (0.0, 0.0))

    for value in ancestors(results):
        if value in shares:
            continue
        mine = [share(v) for v in value.inputs]
        numbers = [v.args[0] for v in value.inputs if v.op == "constant"]
        if value.op in ("add", "sub"):
            sign = 1 if value.op == "add" else -1
            shares[value] = (mine[0][0] + sign * mine[1][0], mine[0][1] + sign * mine[1][1])
        elif value.op == "neg":
            shares[value] = (-mine[0][0], -mine[0][1])
        elif value.op == "product" and numbers:
            shares[value] = tuple(sum(m[n] for m in mine) * numbers[0] for n in (0, 1))  # type: ignore[assignment, operator]
        elif any(x != y for x, y in mine):
            return False
    return all(x == y for x, y in map(share, results))


def _saved(graph: Graph, gradients: list[Value], stored: list[Value], free: list[Value]) -> list[Value]:
    """What forward saves: so that all that multiplies a gradient, and the operands, can be computed again."""
    used = {v for value in ancestors(gradients, free) if value.gradient for v in value.inputs if not v.gradient}
    needed: Iterable[Value] = [*sorted(used, key=lambda v: v.index), *stored]
    found = smallest(needed, free, graph.fragile)
    return sorted(found, key=lambda v: (not v.inputs, v.index))

"""The derived step as a graph of values: equal values are made once, and simplified as they are made.

A value is an operation on other values, for one row and unit; a mean over the units is one number for each row. A
gradient is a value that depends on a gradient from outside; every operation on a gradient is linear in it. So a
gradient is stored as a product, one flat list of factors, or as a sum of such products with common factors taken out:
a b - a c is a (b - c), and a - a b is a (1 - b). `share` then computes once the factors that occur together in several
products.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable
from itertools import combinations

import torch

# A leaf's only argument is its number. Backward lacks the first three and has the next three. The others are gradients:
# of the states after a step, of operands, and (for `finish`) those that are not complete yet.
FORWARD = ("gx", "input", "hu")
OUTER = ("dstate", "dm", "dv", "dgx", "dinput", "dbefore", "dparam")
LEAVES = (*FORWARD, "before", "param", "drawn", *OUTER)
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
# Functions of one number: those of triton.language and of kernels.math, where the first two take FAST.
FROM_TRITON = ("exp", "exp2", "log", "log2", "sqrt", "abs", "sin", "cos", "erf")
FROM_MATH = ("sigmoid", "tanh", "log1p", "expm1")
FUNCTIONS = (*FROM_MATH, *FROM_TRITON)
BOOLEAN = (*COMPARISONS, "and", "or", "not")
ROWS = ("constant", "mean", "row_coefficient")  # of any value; the last is a leaf of the loop engine's


class Value:
    """An operation on values. Equal values are one object: only `Graph.make` makes them.

    op "constant": args is one number. A leaf: args is its number. Else args are values. index: the order in which
    values can be computed. row: whether it is the same in all units of a row. full: whether it may differ both between
    units and between rows (a trained vector does not).
    """

    __slots__ = ("args", "full", "gradient", "index", "op", "row")

    def __init__(self, op: str, args: tuple[Argument, ...], index: int) -> None:
        self.op, self.args, self.index = op, args, index
        inputs = self.inputs
        self.gradient: bool = op in OUTER or any(v.gradient for v in inputs)
        self.row: bool = op in ROWS or (bool(inputs) and all(v.row for v in inputs))
        self.full: bool = op not in (*ROWS, "param") and (not inputs or any(v.full for v in inputs))

    @property
    def number(self) -> int:
        """The number of a leaf."""
        (number,) = self.args
        assert isinstance(number, int)
        return number

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(a for a in self.args if isinstance(a, Value))

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(repr, self.args))})"


Argument = Value | float | str


def constant(value: Value) -> float | None:
    """The number of a constant; None for other values."""
    number = value.args[0] if value.op == "constant" else None
    assert number is None or isinstance(number, float)
    return number


def ancestors(values: Iterable[Value], stop: Iterable[Value] = ()) -> list[Value]:
    """The values and everything they are computed from, up to `stop`, in the order of computation."""
    found: set[Value] = set()
    ends, waiting = set(stop), list(values)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting.extend(() if value in ends else value.inputs)
    return sorted(found, key=lambda v: v.index)


class Graph:
    """Makes values.

    fragile: values that must not be computed from rounded numbers, such as saved tiles and states: a sum whose
    exponential is taken (if two large numbers cancel, nothing may be left), and which of two values is larger. orders:
    the latter, with the two values.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Value] = {}
        self.fragile: set[Value] = set()
        self.orders: dict[Value, tuple[Value, Value]] = {}

    def make(self, op: str, *args: Argument) -> Value:
        key = (op, *args)
        if key not in self._known:
            self._known[key] = Value(op, args, len(self._known))
        return self._known[key]

    def number(self, x: float) -> Value:
        return self.make("constant", float(x))

    def function(self, name: str, a: Value) -> Value:
        """One of FUNCTIONS."""
        a = self.as_number(a)
        if (x := constant(a)) is not None:
            return self.number(float(getattr(torch, name)(torch.tensor(x, dtype=torch.float64))))
        return self.make(name, a)

    def exponential(self, name: str, a: Value) -> Value:
        """exp, exp2 or expm1, as written in the step."""
        waiting = [self.as_number(a)]
        while waiting:
            value = waiting.pop()
            if value.op in ("add", "sub"):
                self._rounding_ruins(value)
            elif value.op in ("neg", "product", "div", "where"):
                waiting += [v for v in value.inputs if v.op not in BOOLEAN]
        return self.function(name, a)

    def _rounding_ruins(self, value: Value) -> None:
        if any(v.op in ("hu", "before") for v in ancestors([value])):  # the other leaves are in the data's type already
            self.fragile.add(value)

    def as_number(self, a: Value) -> Value:
        """a; of a boolean, 1 or 0."""
        return self.make("where", a, self.number(1), self.number(0)) if a.op in BOOLEAN else a

    def as_boolean(self, a: Value) -> Value:
        """Whether a is not zero."""
        return a if a.op in BOOLEAN else self.compared("ne", a, self.number(0))

    def compared(self, op: str, a: Value, b: Value) -> Value:
        """A boolean; for two constants, the number 1 or 0."""
        a, b = self.as_number(a), self.as_number(b)
        x, y = constant(a), constant(b)
        if x is not None and y is not None:
            return self.number(getattr(operator, op)(x, y))
        return self.make(op, a, b)

    def order(self, a: Value, b: Value) -> Value:
        """1 where a is larger, -1 where b is larger, else 0."""
        below = self.choice(self.compared("lt", a, b), self.number(-1), self.number(0))
        found = self.choice(self.compared("gt", a, b), self.number(1), below)
        self._rounding_ruins(found)
        self.orders[found] = a, b
        return found

    def logical(self, op: str, *parts: Value) -> Value:
        found = [self.as_boolean(p) for p in parts]
        numbers = [v for v in found if constant(v) is not None]
        if not numbers:
            return self.make(op, *found)
        if op == "not":
            return self.number(not constant(numbers[0]))
        decides = op == "or"
        if any(bool(constant(v)) == decides for v in numbers):
            return self.number(decides)
        return next((v for v in found if constant(v) is None), found[0])

    def negative(self, a: Value) -> Value:
        if (x := constant(a)) is not None:
            return self.number(-x)
        if a.op == "neg":
            return a.inputs[0]
        if a.op == "sub":
            return self.difference(*reversed(a.inputs))
        return self.make("neg", a)

    def sum(self, a: Value, b: Value) -> Value:
        if a.op in BOOLEAN and b.op in BOOLEAN:  # as torch has it
            return self.logical("or", a, b)
        a, b = self.as_number(a), self.as_number(b)
        x, y = constant(a), constant(b)
        if x is not None and y is not None:
            return self.number(x + y)
        if x == 0 or y == 0:
            return b if x == 0 else a
        if b.op == "neg":
            return self.difference(a, b.inputs[0])
        if a.op == "neg":
            return self.difference(b, a.inputs[0])
        return self._factored("add", a, b) or self.make("add", *sorted((a, b), key=lambda v: v.index))

    def difference(self, a: Value, b: Value) -> Value:
        a, b = self.as_number(a), self.as_number(b)
        x, y = constant(a), constant(b)
        if x is not None and y is not None:
            return self.number(x - y)
        if y == 0 or x == 0:
            return a if y == 0 else self.negative(b)
        if b.op == "neg":
            return self.sum(a, b.inputs[0])
        return self._factored("sub", a, b) or self.make("sub", a, b)

    def _factored(self, op: str, a: Value, b: Value) -> Value | None:
        """A sum or difference of two gradients with their common factors taken out, if these contain all that is a
        gradient in them; else None."""
        if not (a.gradient and b.gradient):
            return None
        ours, theirs = Counter(factors(a)), Counter(factors(b))
        shared = ours & theirs
        mine, others = [list((c - shared).elements()) for c in (ours, theirs)]
        means = [v.op for v in (*mine, *others)] == ["mean"] * 2 and len(mine) == 1  # their sum is one mean
        if not means and any(v.gradient for v in (*mine, *others)):
            return None
        rest = [v.inputs[0] for v in (*mine, *others)] if means else [self._all(part) for part in (mine, others)]
        total = self.sum(*rest) if op == "add" else self.difference(*rest)
        return self.product(*shared.elements(), self.mean(total) if means else total)

    def _all(self, parts: list[Value]) -> Value:
        return self.product(*parts) if parts else self.number(1)

    def product(self, *parts: Value) -> Value:
        """The product of any number of values. If it is a gradient, it is flat, in the order of the factors'
        indices."""
        if all(p.op in BOOLEAN for p in parts):
            return self.logical("and", *parts)
        coefficient, all_factors = 1.0, []
        gradient = any(p.gradient for p in parts)
        waiting = [self.as_number(p) for p in reversed(parts)]
        while waiting:
            value = waiting.pop()
            if (x := constant(value)) is not None:
                coefficient *= x
            elif value.op == "neg":
                coefficient = -coefficient
                waiting.append(value.inputs[0])
            elif value.op == "product" and value.gradient:
                waiting.extend(reversed(value.inputs))
            else:
                all_factors.append(value)
        if coefficient == 0 or not all_factors:
            return self.number(coefficient)
        if coefficient not in (1.0, -1.0):
            all_factors.append(self.number(abs(coefficient)))
        if gradient:
            all_factors.sort(key=lambda v: v.index)
            found = all_factors[0] if len(all_factors) == 1 else self.make("product", *all_factors)
        else:  # as in the step: two at a time
            found = all_factors[0]
            for value in all_factors[1:]:
                found = self.make("product", found, value)
        return self.negative(found) if coefficient < 0 else found

    def quotient(self, a: Value, b: Value) -> Value:
        a, b = self.as_number(a), self.as_number(b)
        if constant(b) is not None:
            return a if constant(b) == 1 else self.make("div", a, b)
        if a.gradient and constant(a) is None:
            return self.product(a, self.make("div", self.number(1), b))
        return self.number(0) if constant(a) == 0 else self.make("div", a, b)

    def mean(self, a: Value) -> Value:
        """The mean over the units. Of a gradient, factors that are the same in all units come before it."""
        a = self.as_number(a)
        if a.row:
            return a
        outside = [v for v in factors(a) if v.row]
        if not outside:
            return self.make("mean", a)
        return self.product(self.mean(self.product(*(v for v in factors(a) if not v.row))), *outside)

    def choice(self, condition: Value, a: Value, b: Value) -> Value:
        a, b = self.as_number(a), self.as_number(b)
        condition = self.as_boolean(condition)
        if (x := constant(condition)) is not None:
            return a if x else b
        return a if a is b else self.make("where", condition, a, b)

    def power(self, a: Value, n: float) -> Value:
        """a to the n."""
        if n == 0:
            return self.number(1)
        if n < 0:
            return self.quotient(self.number(1), self.power(a, -n))
        if n == 0.5:
            return self.function("sqrt", a)
        if n != int(n):  # as torch: NaN of a negative a
            return self.function("exp", self.product(self.function("log", a), self.number(n)))
        half = self.power(a, n // 2)
        found = self.product(half, half) if n > 1 else half
        return self.product(found, a) if n % 2 else found

    def power_of(self, x: float, a: Value) -> Value | None:
        """x to the a, for a positive x."""
        return self.exponential("exp", self.product(a, self.number(math.log(x)))) if x > 0 else None


def factors(value: Value) -> tuple[Value, ...]:
    return value.inputs if value.op == "product" and value.gradient else (value,)


def share(graph: Graph, outputs: list[Value]) -> list[Value]:
    """The outputs, with every product of gradients as products of two: first of the pairs that most products have."""
    lists = {v: list(v.inputs) for v in ancestors(outputs) if v.op == "product" and v.gradient}
    while True:
        counts = Counter(pair for parts in lists.values() for pair in _pairs(parts))
        if not counts:
            break
        (a, b), most = max(counts.items(), key=lambda c: (c[1], c[0][0].gradient, -c[0][0].index, -c[0][1].index))
        if most < 2:
            break
        node = graph.make("pair", a, b)
        for parts in lists.values():
            if (a, b) in _pairs(parts):
                parts.remove(a)
                parts.remove(b)
                parts.append(node)
        lists[node] = [a, b]
    return _in_twos(graph, outputs, lists)


def _pairs(parts: list[Value]) -> set[tuple[Value, Value]]:
    # A list of two is itself a pair that other products may contain, so it counts.
    return set(combinations(sorted(parts, key=lambda v: v.index), 2))


def _in_twos(graph: Graph, outputs: list[Value], lists: dict[Value, list[Value]]) -> list[Value]:
    """The outputs rebuilt, with each product as products of two, gradients first."""
    done: dict[Value, Value] = {}

    def rebuilt(value: Value) -> Value:
        if value not in done:
            if value in lists:
                first, *others = sorted(map(rebuilt, lists[value]), key=lambda v: (not v.gradient, v.index))
                for other in others:
                    first = graph.make("times", first, other)
                done[value] = first
            elif value.gradient and value.inputs:
                done[value] = graph.make(value.op, *map(rebuilt, value.inputs))
            else:
                done[value] = value
        return done[value]

    return [rebuilt(v) for v in outputs]

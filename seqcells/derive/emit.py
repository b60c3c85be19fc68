"""The values as Triton source: the functions that `kernels.cells` describes."""

from __future__ import annotations

import itertools
import linecache
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .values import COMPARISONS, Value, ancestors, constant

_numbers = itertools.count(1)  # of sources: a cell defined again has another file's name
_RESERVED = {"gx", "hu", "states", "saved", "states_prev", "dstates", "dm", "FAST", "tl", "sigmoid", "tanh"}
_FUNCTIONS = {n: f"tl.{n}" for n in ("exp", "log", "sqrt", "abs", "sin", "cos")}
_SIGNS = {**COMPARISONS, "add": "+", "sub": "-", "product": "*", "times": "*", "div": "/", "and": "&", "or": "|"}
_BINDS = {"add": 3, "sub": 3, "product": 4, "times": 4, "div": 4}  # how tightly; comparisons, & and | in parentheses
_LOOSE, _UNARY, _ATOM = 1, 5, 6


class Function:
    """One generated function.

    leaves: how to spell the values that it is given. names: what to call those it computes, where there is a name.
    """

    def __init__(self, head: str, leaves: Mapping[Value, str], names: Mapping[Value, str]) -> None:
        self.lines, self.leaves, self.names = [head], dict(leaves), names
        self.taken = {s for s in leaves.values() if s.isidentifier()} | _RESERVED

    def unpack(self, values: list[Value], source: str) -> None:
        """A line that takes values, as leaves, from a tuple."""
        fresh = [self._fresh(v) for v in values]
        self.leaves.update(zip(values, fresh, strict=True))
        self.lines.append(f"    {', '.join(fresh)}{',' if len(fresh) == 1 else ''} = {source}")

    def give(self, *tuples: list[Value] | Value) -> None:
        """Lines for what the results need, and the return. A result: a tuple of values, or one value."""
        results = [v for t in tuples for v in (t if isinstance(t, list) else [t])]
        order = [v for v in ancestors(results, self.leaves) if v not in self.leaves and constant(v) is None]
        uses = Counter(v for value in order for v in value.inputs) + Counter(results)
        for value in order:
            if uses[value] > 1 or value in self.names:
                text = self.text(value)
                name = self._fresh(value)
                self.lines.append(f"    {name} = {text}")
                self.leaves[value] = name
        shown = [self._tuple([self._tile(v) for v in t]) if isinstance(t, list) else self._tile(t) for t in tuples]
        self.lines.append(f"    return {', '.join(shown)}")

    def source(self) -> str:
        return "\n".join(self.lines) + "\n"

    def _fresh(self, value: Value) -> str:
        name = self.names.get(value, "")
        if not name or name in self.taken or not name.isascii():
            base = name + "_" if name else "v"
            name = next(n for n in (f"{base}{i}" for i in itertools.count()) if n not in self.taken)
        self.taken.add(name)
        return name

    def _tuple(self, parts: list[str]) -> str:
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def _tile(self, value: Value) -> str:
        """value as a tile, also where it is a number."""
        if (x := constant(value)) is None:
            return self.text(value)
        like = next(iter(self.leaves.values()))
        return f"tl.zeros_like({like})" + (f" + {_number(x)}" if x else "")

    def text(self, value: Value, binds: int = 0) -> str:
        """value as an expression, in parentheses if it binds less tightly than what it stands in."""
        if value in self.leaves:
            return self.leaves[value]
        if (x := constant(value)) is not None:
            text, mine = _number(x), _ATOM if x >= 0 else _UNARY
        elif value.op in ("sigmoid", "tanh"):
            text, mine = f"{value.op}({self.text(value.inputs[0])}, FAST)", _ATOM
        elif value.op in _FUNCTIONS:
            text, mine = f"{_FUNCTIONS[value.op]}({self.text(value.inputs[0])})", _ATOM
        elif value.op == "where":
            condition, a, b = value.inputs
            # Of two numbers Triton would make float32, whatever the tiles are.
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


def _number(x: float) -> str:
    return repr(x) if x - x == 0 else f'float("{x}")'


def functions(source: str, name: str) -> dict[str, Any]:
    """The functions of a source as Triton's own, by name. triton is imported here."""
    import triton.language as tl

    from ..kernels.math import sigmoid, tanh

    file = f"<seqcells cell {name} {next(_numbers)}>"
    # Triton reads a function's source from its file; Python, of one that has none, from here.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {"__name__": __name__, "tl": tl, "sigmoid": sigmoid, "tanh": tanh}
    plain = dict(space)
    exec(compile(source, file, "exec"), space)
    jit: Any = type(sigmoid)  # and not triton.jit, which asks again whether kernels are compiled or interpreted
    return {n: jit(f) for n, f in space.items() if n not in plain and callable(f)}

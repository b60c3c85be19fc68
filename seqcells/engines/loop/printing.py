"""Prints the values of a derived step as torch operations that write their result in place: the lines of a function.

The code has no branches. A value that has no place of its own is written to a scratch tensor, which is reused after the
value's last use; booleans, and what is one number for each row, are new tensors. If torch has one operation for three
or four, that one is printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ...derive.emit import number, tuple_of
from ...derive.values import BOOLEAN, Argument, Value, ancestors, constant
from .stretches import by_step

_NAMES = {"product": "mul", "times": "mul", "pair": "mul", "and": "logical_and", "or": "logical_or"}
_NAMES |= {"not": "logical_not"}
_SIGMOID, _TANH = "_sigmoid_backward", "_tanh_backward"  # their names in a printed function's namespace
PRODUCTS = ("product", "times", "pair")
SLOPES = {"sigmoid": "sigmoid_slope", "tanh": "tanh_slope"}  # names of the derivatives s (1 - s) and 1 - t t


class Code:
    """Lines of code, and the names of their values.

    leaves: the names of given values. wanted: the values that will be taken (`take`), each as often as it will be.
    places: the tensors that values are written to. vectors: the leaves that are one vector for all rows; what depends
    on them alone is computed in `before`, the lines that come first. like: a tensor of the dtype, for numbers that must
    be tensors. hooks: functions that print the lines that some leaves need; each is called once. together: for
    functions of adjacent leaves in the leaves' places: (the values, their names, one name for all of their columns), so
    that one operation computes all.
    """

    def __init__(
        self,
        leaves: Mapping[Value, str],
        wanted: Iterable[Value],
        places: Mapping[Value, str] | None = None,
        vectors: Iterable[Value] = (),
        like: str = "y",
        hooks: Mapping[Value, Callable[[], None]] | None = None,
        together: Mapping[Value, tuple[list[Value], list[str], str]] | None = None,
    ) -> None:
        self.names, self.places, self.like = dict(leaves), dict(places or {}), like
        self.hooks, self.together = dict(hooks or {}), dict(together or {})
        self.lines: list[str] = []
        self.before: list[str] = []
        wanted = list(wanted)
        order = ancestors(wanted, self.names)
        self.uses = Counter(wanted)
        self.uses.update(v for value in order if value not in self.names for v in value.inputs)
        self.vectors = set(vectors)
        self.free: list[str] = []
        self.scratch: dict[Value, str] = {}
        self.count = 0
        self.numbers: dict[float, str] = {}
        for value in order:
            if value not in self.names and value.inputs and all(self._vector(v) for v in value.inputs):
                self._hoist(value)

    def _vector(self, value: Value) -> bool:
        return value in self.vectors or constant(value) is not None

    def _hoist(self, value: Value) -> None:
        lines, self.lines = self.lines, self.before
        name = f"w{len(self.before)}"
        self.lines.append(f"{name} = {self._call(*self._parts(value, fused=False))}")
        self.lines, self.names[value] = lines, name
        self.vectors.add(value)

    # --- names of values ----------------------------------------------------------------------------------------------

    def take(self, value: Value) -> str:
        """The name of the value, for one use of it."""
        name = self.name(value)
        self.drop(value)
        return name

    def name(self, value: Value) -> str:
        """The name of the value. Its lines are printed first, if they were not yet."""
        if (x := constant(value)) is not None:
            return self.number(x)
        if value in self.hooks:
            self.hooks.pop(value)()
        if value not in self.names:
            self.compute(value)
        return self.names[value]

    def drop(self, value: Value) -> None:
        """Record that a use is done. After the last one, the value's scratch tensor is free."""
        self.uses[value] -= 1
        if self.uses[value] == 0 and value in self.scratch:
            self.free.append(self.scratch.pop(value))

    def fresh(self) -> str:
        """The name of a free scratch tensor."""
        if not self.free:
            self.free.append(f"s{self.count}")
            self.count += 1
        return self.free.pop()

    def number(self, x: float) -> str:
        """The name of a tensor with that number."""
        return self.numbers.setdefault(x, f"k{len(self.numbers)}")

    def constants(self) -> list[str]:
        """The lines that make tensors of numbers."""
        return [f"{name} = {self.like}.new_full((), {number(x)})" for x, name in self.numbers.items()]

    def compute(self, value: Value) -> None:
        """Print the lines of a value, with the result in its place or in a scratch tensor."""
        if value in self.together:
            values, names, run = self.together[value]
            for v in values:
                self.name(v.inputs[0])
                self.drop(v.inputs[0])
            self.names.update(zip(values, names, strict=True))
            self.lines.append(f"{self._function(value.op)}({run}, out={run})")
            return
        call, parts, extra = self._parts(value)
        for part in parts:
            if isinstance(part, Value):
                self.name(part)
        given = [self.names[p] if isinstance(p, Value) else p for p in parts]
        for part in parts:
            if isinstance(part, Value):
                self.drop(part)
        text = self._call(call, given, extra)
        if value.op in BOOLEAN or value.row:
            self.names[value] = f"{'b' if value.op in BOOLEAN else 'm'}{value.index}"
            self.lines.append(f"{self.names[value]} = {text}")
            return
        self.names[value] = place = self.places.get(value) or self.fresh()
        if value not in self.places:
            self.scratch[value] = place
        self.lines.append(f"{text[:-1]}, {'grad_input' if call in (_SIGMOID, _TANH) else 'out'}={place})")

    # --- an operation -------------------------------------------------------------------------------------------------

    def _call(self, call: str, parts: Sequence[Argument], extra: str) -> str:
        shown = [self.name(p) if isinstance(p, Value) else p if isinstance(p, str) else number(p) for p in parts]
        return f"{call}({', '.join(shown)}{extra})"

    def single(self, value: Value, ops: tuple[str, ...]) -> bool:
        """Whether value is one of ops and used only once, so that it can be part of another operation."""
        return value.op in ops and self.uses[value] == 1 and value not in self.names and value not in self.places

    def _parts(self, value: Value, fused: bool = True) -> tuple[str, list[Argument], str]:
        """The function for a value, its arguments (values, numbers, names), and further arguments as text."""
        if fused and (found := self._fused(value)):
            return found
        op, args = value.op, value.args
        numbers = [constant(a) if isinstance(a, Value) else a for a in args]
        parts: list[Argument] = [a if x is None else x for a, x in zip(args, numbers, strict=True)]
        if op in ("sigmoid_slope", "tanh_slope"):
            y = value.inputs[0]
            first: Argument = y if op == "sigmoid_slope" else self.number(1.0)
            self.uses[y] += 1 + (first is y)  # more uses than counted from the value itself
            return "torch.addcmul", [first, y, y], ", value=-1"
        if op == "div" and numbers[0] == 1 and value.inputs[1].op == "sqrt" and self.single(value.inputs[1], ("sqrt",)):
            root = value.inputs[1]
            self.drop(root)
            return "torch.rsqrt", [root.inputs[0]], ""
        if op == "mean":
            return "torch.mean", [value.inputs[0]], ", -1, True"
        if op == "where":
            return "torch.where", [parts[0], *(self._tensor(p) for p in parts[1:])], ""
        if len(parts) == 2 and not isinstance(parts[0], Value):
            if op in ("add", *PRODUCTS):
                parts.reverse()
            else:
                parts[0] = self._tensor(parts[0])
        return self._function(op), parts, ""

    @staticmethod
    def _function(op: str) -> str:
        name = _NAMES.get(op, op)
        return f"torch.{name}" if hasattr(torch, name) else f"torch._C._nn.{name}"

    def _tensor(self, part: Argument) -> Argument:
        return self.number(part) if isinstance(part, (int, float)) else part

    def _fused(self, value: Value) -> tuple[str, list[Argument], str] | None:
        if value.op == "where":
            condition, a, b = value.inputs
            if condition.op == "lt" and constant(a) == 0 and condition.args == (b, a) and self.uses[condition] == 1:
                for v in (condition, b):
                    self.drop(v)
                return "torch.clamp_min", [b, 0.0], ""
        if value.op in PRODUCTS:
            for a, b in (value.inputs, value.inputs[::-1]):
                if self.single(b, ("sigmoid_slope", "tanh_slope")) and constant(a) is None:
                    if a in self.vectors or a.row:
                        continue
                    self.drop(b)
                    return (_SIGMOID if b.op == "sigmoid_slope" else _TANH), [a, b.inputs[0]], ""
        if value.op not in ("add", "sub"):
            return None
        a, b = value.inputs
        if value.op == "add" and (found := self._lerp(a, b)):
            return found
        for first, second, sign in ((a, b, 1 if value.op == "add" else -1), (b, a, 1)):
            if (value.op == "sub" and first is b) or not self.single(second, PRODUCTS) or constant(first) is not None:
                continue
            x, y = second.inputs
            if (n := constant(y)) is not None or (n := constant(x)) is not None:
                self.drop(second)
                other = x if constant(x) is None else y
                return "torch.add", [first, other], f", alpha={number(sign * n)}"
            if first in self.vectors and x in self.vectors and y in self.vectors:
                continue
            self.drop(second)
            return "torch.addcmul", [first, x, y], "" if sign == 1 else ", value=-1"
        return None

    def _lerp(self, a: Value, b: Value) -> tuple[str, list[Argument], str] | None:
        """f a + (1 - f) b, and b + f (a - b), if it is one of them."""
        for first, second in ((a, b), (b, a)):
            if not self.single(second, PRODUCTS) or constant(first) is not None:
                continue
            for weight, rest in (second.inputs, second.inputs[::-1]):
                if constant(weight) is not None or constant(rest) is not None:
                    continue
                if not self.single(rest, ("sub",)) or rest.inputs[1] is not first:
                    continue
                if constant(end := rest.inputs[0]) is None and self._full(first, end, weight):
                    for v in (second, rest, first):
                        self.drop(v)
                    return "torch.lerp", [first, end, weight], ""
            if not self.single(first, PRODUCTS):
                continue
            for other, end in (second.inputs, second.inputs[::-1]):
                if other.op != "sub" or constant(other.inputs[0]) != 1 or constant(end) is not None:
                    continue
                weight = other.inputs[1]
                starts = [v for v in first.inputs if v is not weight]
                if len(starts) != 1 or constant(starts[0]) is not None or not self._full(end, starts[0], weight):
                    continue
                for v in (first, second, other):
                    self.drop(v)
                if self.uses[other] == 0 and other not in self.names:
                    self.drop(weight)  # nothing else uses it now
                return "torch.lerp", [end, starts[0], weight], ""
        return None

    def _full(self, *values: Value) -> bool:
        return not any(v in self.vectors for v in values)


def function(lines: Sequence[str]) -> str:
    """The source of a function: the first line, and the others indented as its body."""
    return "\n    ".join(lines) + "\n"


def unpack(names: Sequence[str], source: str) -> list[str]:
    """The line that unpacks a tuple into names; no line if there are no names."""
    return [f"{tuple_of(names)} = {source}"] if names else []


SPACE = {  # what printed functions use
    "__name__": __name__,
    "torch": torch,
    "by_step": by_step,
    _SIGMOID: torch.ops.aten.sigmoid_backward.grad_input,
    _TANH: torch.ops.aten.tanh_backward.grad_input,
}

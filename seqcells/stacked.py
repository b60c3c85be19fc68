"""Layers of a module that take their steps at the same time, in one launch (see kernels.stack), as one Function.

Layer by layer, what passes between two layers is an output of one Function and an input of the next. Here only the
first layer's input and the last layer's output are seen. Second derivatives and forward mode are those of the
references of the layers, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import autograd, masks, precisions
from .autograd import Options, Tensors
from .engines import stack
from .products import places

if TYPE_CHECKING:
    from .dispatch import Call, Case, Choice, Result, ScanOptions

EACH = 7  # inputs of a layer, beside x: h0, c0, w_ih, w_hh, b_ih, b_hh and params


def unfit(case: Case, choice: Choice, asked: str | None) -> str:
    """What, of the facts about a case, makes its layers be launched one by one; "" if nothing. asked:
    options.precision."""
    if choice.engine != "triton" or case.layers < 2:
        return "there is one layer" if case.layers < 2 else f"{choice.engine} runs them"
    if choice.schedule not in ("", "auto"):
        return f"the {choice.schedule} schedule was asked for, or measured to be the fastest"
    if case.traced or case.steps is None or case.batch is None:
        return "a compiler, a tracer or a transform is active"
    if case.groups > 1:
        return "a layer has several directions or heads"
    if case.projected or case.dropping:
        return f"there is {'a projection' if case.projected else 'dropout'} between them"
    if case.all_states:
        return "all states were asked for"
    if case.grad and case.save == "states" and places(case.cell).saved:
        return "save='states' asks for little memory, and what passes between layers is there for all of them at once"
    precision = _precision(case, asked)
    if case.dtype == torch.float32 and precision != precisions.of_inputs(case.dtype, case.device):
        return "PyTorch's settings want another precision of the products with the input than of the recurrent ones"
    return ""


def why_apart(case: Case, choice: Choice, asked: str | None) -> str:
    """Why the layers of a case are launched one by one; "" if they are not."""
    if (reason := unfit(case, choice, asked)) or case.steps is None or case.batch is None:
        return reason
    size = (case.layers, case.batch, case.hidden_size)
    return stack.no_stack(case.cell, case.steps, size, (case.dtype, case.device), _precision(case, asked))


def _precision(case: Case, asked: str | None) -> str:
    if case.dtype == torch.float32 and (asked or case.device.type == "cuda"):
        return precisions.of_products(asked, case.dtype, case.device)
    return "ieee"


def run_together(
    calls: Sequence[Call], mask: Tensor | None, case: Case, choice: Choice, options: ScanOptions
) -> Result:
    """y [T, B, H] of the last layer, and the final states [L, B, H]. calls: of each layer; x is the first layer's."""
    at, precision = places(case.cell), _precision(case, options.precision)
    of = Options("triton", case.cell, options.save, 0, choice.schedule, precision, layers=len(calls))
    inputs: list[Tensor | None] = [calls[0].x]
    for call in calls:
        inputs += [*autograd.starts(at, call.states), *call.groups[0], call.params]
    return autograd.results(of, autograd.outputs_of(_Stack(of), case, tuple(inputs), mask))


def _layers(inputs: Sequence[Tensor | None]) -> list[tuple[Tensor | None, ...]]:
    """The 10 inputs of each layer (see autograd.Engine), of which x is the first layer's."""
    return [(inputs[0], *inputs[n : n + EACH], None, None) for n in range(1, len(inputs), EACH)]


@dataclass(frozen=True)
class _Stack(autograd.Scan):
    """A Scan of several layers. Its inputs: x, and those of each layer. Its buffers have a first axis of L."""

    def forward(self, save: str, inputs: Tensors, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensors]:
        return stack.forward(self.options, save, _layers(inputs), mask)

    def reference(self, present: list[bool], mask: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
        alone = replace(self.options, layers=1)
        given = [present[n : n + EACH] for n in range(1, len(present), EACH)]
        of = [autograd.reference_of(alone, [True, *own, False, False], *masks.decode(mask)) for own in given]

        def through(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest, y, finals = iter(tensors[1:]), tensors[0], []
            for run, own in zip(of, given, strict=True):
                y, *ends = run(y, *_next(rest, sum(own)))
                finals.append(ends)
            return (y, *(torch.cat(each) for each in zip(*finals, strict=True)))

        return through

    def gradients(self, need: tuple[bool, ...]) -> autograd.Gradients:
        return _StackGradients(self, need)


def _next(tensors: Iterator[Tensor], count: int) -> list[Tensor]:
    return [next(tensors) for _ in range(count)]


@dataclass(frozen=True)
class _StackGradients(autograd.Gradients):
    def backward_of(self, inputs: Tensors, mask: Tensor | None, buffers: Tensors, grads: Tensors) -> Tensors:
        options, need = self.scan.options, self.need
        needs = [[need[0] and n == 1, *need[n : n + EACH], False, False] for n in range(1, len(need), EACH)]
        own = autograd.of_outputs(options, 1, grads)
        found = stack.backward(options, _layers(inputs), mask, buffers, own, needs)
        return (found[0][0], *(d for layer in found for d in layer[1 : 1 + EACH]))

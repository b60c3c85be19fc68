"""The shapes and options of the parity tests."""

from itertools import product

import pytest
import torch
from conftest import DEVICE

from seqcells import arguments, backends, explanation
from seqcells.kernels.registry import BUILT_IN
from seqcells.testing import Shape

CELLS, SCHEDULES, SAVES = list(BUILT_IN), list(backends.SCHEDULES), list(arguments.SAVES)
HALVES = [torch.float16, torch.bfloat16]

# Every T of 1, 2, 7 and B of 1, 3, 17 with: one unit; two (the smallest net of the task suite); a whole tile; its
# hidden size; one past two tiles; one warpgroup's rows; and one that no power of two is near.
SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(2, 3, 2, 2),
    Shape(7, 17, 3, 16),
    Shape(2, 17, 1, 20),
    Shape(7, 3, 5, 33),
    Shape(1, 3, 2, 64),
    Shape(2, 1, 2, 150),
]


def spread(*axes, most):
    """The product of the axes, the last of which takes turns: of its values each combination of the others is tried
    with `most` by default, and with the rest by `make test-slow`. Neighbours take different ones."""
    *others, last = axes
    cases = []
    for n, chosen in enumerate(product(*others)):
        for k, value in enumerate(last):
            marks = () if (k - n - n // len(others[-1])) % len(last) < most else pytest.mark.slow
            cases.append(pytest.param(*chosen, value, marks=marks))
    return cases


def fits(cell: str, schedule: str, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether the schedule exists there: U must fit in shared memory, of one processor or of all."""
    size = {"batch": shape.B, "hidden_size": shape.H, "dtype": dtype}
    try:
        explanation.explain(cell, device=DEVICE, backend=f"triton:{schedule}", **size)
    except ValueError:
        return False
    return True

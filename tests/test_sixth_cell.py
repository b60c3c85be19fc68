"""A cell defined outside gets both schedules, every dtype, both save modes, resets and gradcheck for free."""

from pathlib import Path

import coupled_lstm
import pytest
import torch
from conftest import DEVICE
from shapes import HALVES, SAVES, SCHEDULES, spread

from seqcells import functional
from seqcells.kernels import cells
from seqcells.testing import Shape, errors, inputs, tolerance


@pytest.fixture(autouse=True)
def known():
    assert cells.get("coupled_lstm").saved == len(coupled_lstm.coupled_lstm.saved) == 3


def test_it_is_ten_lines():
    text = Path(coupled_lstm.__file__).read_text().splitlines()
    assert len(text[text.index('@seqcells.cell(gates="f g o", states="h c")') :]) <= 10


@pytest.mark.parametrize(
    ("dtype", "schedule", "save", "resets"),
    spread([torch.float64, torch.float32, *HALVES], SCHEDULES, SAVES, [False, True], most=1),
    ids=str,
)
def test_parity(dtype, schedule, save, resets, poison):
    shape = Shape(4, 9, 2, 20)
    found = errors("coupled_lstm", shape, dtype, DEVICE, backend=f"triton:{schedule}", save=save, resets=resets)
    assert max(found.values()) <= tolerance("coupled_lstm", dtype, shape), found


@pytest.mark.parametrize("schedule", ["resident", *(pytest.param(s, marks=pytest.mark.slow) for s in SCHEDULES[1:])])
def test_gradcheck(schedule):
    tensors = [t.requires_grad_() for t in inputs("coupled_lstm", Shape(2, 2, 1, 2), torch.float64, DEVICE)]

    def function(x, w_ih, w_hh, b_ih, b_hh, h, c):
        options = {"backend": f"triton:{schedule}"}
        y, final = functional.scan("coupled_lstm", x, (h, c), w_ih, w_hh, b_ih, b_hh, **options)
        return y, *final

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    if schedule == "resident":  # it goes through the reference, whatever the schedule
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)

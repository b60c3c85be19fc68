"""The form of a cell: the errors for a wrong one, and what trained vectors' gradients must not depend on."""

import pytest
import torch
from conftest import DEVICE
from kinds import arguments, run
from shapes import SCHEDULES

from seqcells.kernels.cells import Cell
from seqcells.kernels.form import Form, Operand

WRONG = {
    "a cell has a state": {"states": 0},
    "a step reads a tile of gx": {"gates": 0},
    "operands are of level 1, then of level 2": {"operands": (Operand(2, 1), Operand(1, 1, 0)), "adds": (0, 1)},
    "an operand of level 2 needs a product of level 1": {"operands": (Operand(2, 2),)},
    "an operand has a product": {"operands": (Operand(1, 2, 0), Operand(1, 0))},
    "of level 1, and one of the states": {"operands": (Operand(1, 2, 2),)},
    "comes first, and once": {"operands": (Operand(1, 1), Operand(1, 1, 0))},
    "an entry for each product": {"adds": (0,)},
    "adds names tiles of gx": {"adds": (0, 3)},
    "late names tiles of gx": {"operands": (Operand(1, 2),), "late": (5,)},
    "nothing is late": {"late": (2,)},
    "that product is apart": {"operands": (Operand(1, 2),), "late": (1,)},
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_wrong_form_is_said(problem):
    right = {"gates": 3, "states": 1, "saved": 0, "operands": (Operand(1, 2, 0),), "adds": (0, 1)}
    assert not Form("a", **right).problems()
    found = Form("a", **right | WRONG[problem]).problems()
    assert any(problem in said for said in found), found


def test_functions_and_form_go_together():
    form = {"gates": 1, "states": 1, "saved": 0, "operands": (Operand(1, 1),), "adds": (0,)}
    with pytest.raises(ValueError, match="operands_1 is missing; finish is missing"):
        Cell("a", **form, forward=len, backward=len)
    with pytest.raises(ValueError, match="operands_2 is not asked for"):
        Cell("a", **form | {"operands": (Operand(1, 1, 0),)}, forward=len, backward=len, operands_2=len)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["two operands", "all at once"])
def test_trained_vectors_have_the_same_gradients_in_two_runs(kind, schedule):
    """Each program adds for its own rows, and the programs' shares are added in one order."""
    T, B, H = 3, 20, 5
    given = arguments(kind, T, B, H, 1, torch.float32, DEVICE)
    outer = [torch.ones(T, B, 1, H, device=DEVICE), None, None, None]
    first, second = (run(kind, schedule, given, None, 0, "gates", outer)[1][-1] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0

"""The benchmarks' own parts: what is refused, what is counted, and what a failing provider leaves behind."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cases
import compare
import measure
import providers

COUNT = next(c for c in cases.TASKS if c.why == "count-ones")


def test_a_wrong_answer_is_refused():
    problem = cases.Problem(COUNT, DEVICE)
    judged = cases.answer(problem, providers.judge(problem))
    allowed = cases.tolerance(COUNT, problem.device)
    assert cases.parity(cases.answer(problem, providers.torch_nn(problem)), judged, allowed) <= allowed
    for wrong in ([judged[0] * 1.01, *judged[1:]], [*judged[:-1], judged[-1] * torch.nan]):
        with pytest.raises(ValueError, match="disagrees with the judge"):
            cases.parity(wrong, judged, allowed)


def test_a_provider_that_fails_is_recorded_and_the_others_go_on(monkeypatch):
    def broken(problem):
        raise RuntimeError("no such kernel image")

    monkeypatch.setitem(compare.PROVIDERS, "flashrnn", broken)
    names = ["torch.nn", "flashrnn", "split", "auto"]
    rows = {row["provider"]: row for row in compare.compared(COUNT, DEVICE, 0.0, names)}
    assert rows["flashrnn"]["failed"] == "RuntimeError: no such kernel image"
    assert "for resets" in rows["split"]["unavailable"]
    for name in ("torch.nn", "auto"):
        assert rows[name]["seconds"] > 0 and rows[name]["error"] < 1e-3
    written = compare.document(list(rows.values()), compare.machine(DEVICE), "a test")
    assert "no such kernel image" in written and f"| {COUNT.name} |" in written


def test_no_time_leaves_a_note():
    rows = compare.sweep([COUNT], DEVICE, minutes=0.0)
    assert [row["not_reached"] for row in rows] == [True] and "1 cases were not reached" in compare.failures(rows)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru-before", "rnn"])
def test_what_the_kernels_keep_for_backward(cell):
    """Of G gates: "gates" (G + 2) T B H elements at most beyond input, weights and output, "states" 2 T B H."""
    case = cases.Case(cell, 5, 4, 3, 16)
    problem, unit = cases.Problem(case, DEVICE), 5 * 4 * 16 * 4
    for save, most in (("gates", cases.GATES[cell] + 2), ("states", 2)):
        work = providers.ours("triton", save)(problem)
        assert 0 < measure.saved_bytes(problem, work) <= most * unit, save


def test_the_cases_name_the_shapes_of_the_tasks_and_of_the_field():
    named = cases.grid()
    assert {c.H for c in cases.TASKS} == {2, 8, 16, 20, 32, 64, 128, 150, 300}
    assert {c.B for c in named if c.T == 1024 and c.H == 768} == {2, 8, 16, 32, 64, 128, 256}
    assert {(c.H, c.heads) for c in named if c.why == "FlashRNN's"} == {(64, 12), (128, 6), (256, 3), (768, 1)}
    assert {c.mode for c in named} == {cases.INFERENCE, cases.TRAINING, cases.STEP}
    assert len({c.name for c in named}) == len(named)

"""count-ones: its data."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from seqcells.tasks import count_ones


@given(count=st.integers(1, 50), length=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_strings_and_their_counts(count, length, seed):
    inputs, counts = count_ones.strings(count, length, torch.Generator().manual_seed(seed))
    assert inputs.shape == (count, length, 1) and counts.shape == (count,)
    assert set(inputs.unique().tolist()) <= {0.0, 1.0}
    assert counts.tolist() == [sum(x) for x in inputs[..., 0].tolist()]
    again, _ = count_ones.strings(count, length, torch.Generator().manual_seed(seed))
    assert torch.equal(again, inputs)


def test_shares_of_ones_are_spread_evenly():
    _, counts = count_ones.strings(20_000, 20, torch.Generator().manual_seed(0))
    assert abs(counts.mean().item() - 10.5) < 0.1  # P(one) is uniform on 1/20 ... 1
    assert (counts == 20).double().mean().item() > 1 / 20


def test_training_and_test_strings_come_from_different_streams():
    ((name, case),) = count_ones.CASES.items()
    run = count_ones.start(name, "lstm", case.quick, 0)
    assert len(run.training[0]) == 10_000 and not torch.equal(run.training[0][:1000], run.test[0])

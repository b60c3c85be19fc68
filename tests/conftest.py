"""The kernels run on the GPU if there is one, else in Triton's interpreter, chosen before triton is imported."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

torch.set_num_threads(1)
# The first example of a property may compile or interpret much: time says nothing about it.
hypothesis.settings.register_profile("seqcells", deadline=None)
hypothesis.settings.load_profile("seqcells")


@pytest.fixture
def poison():
    """Every uninitialised buffer is full of NaN: what a kernel does not write, or reads too early, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.ones(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

"""How many functions a call goes through before its kernels; docs/architecture.md shows them."""

import importlib.util
from pathlib import Path

import pytest
import torch

import seqcells
from seqcells import arguments

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location("overhead", ROOT / "benchmarks" / "overhead.py")
overhead = importlib.util.module_from_spec(specification)
specification.loader.exec_module(overhead)


@pytest.mark.parametrize("name", overhead.LIMITS)
def test_calls_before_the_first_launch(name):
    found = overhead.calls(name)
    files = {line.partition(":")[0] for line in found}
    print(f"{name}: {len(found)} calls in {len(files)} files", *found, sep="\n    ")
    most, in_files = overhead.LIMITS[name]
    assert found and len(found) <= most and len(files) <= in_files


def test_the_architecture_page_shows_them():
    """TRITON_INTERPRET=1 python benchmarks/overhead.py --calls prints them."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    found = overhead.calls("triton LSTM")
    shown = page.partition("<!-- calls -->")[2].partition("```text\n")[2].partition("```")[0]
    assert shown.split("\n") == [*found, ""]


@pytest.mark.parametrize("ends", [[1, 0, 1], [1, 1], [0], [1, 0] * 70, [1] * 140], ids=len)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first, bidirectional", [(False, False), (True, False), (False, True)])
def test_one_step_with_resets_is_checked_quickly(ends, dtype, grad, batch_first, bidirectional, monkeypatch):
    """As acting calls it, with zeros and ones of the environment's type: a state set to zero and a step of torch's."""
    if len(ends) <= arguments.FEW or dtype is torch.bool:
        monkeypatch.setattr(seqcells.GRU, "_check", lambda *_: pytest.fail("the long check"))
    layer = seqcells.GRU(4, 5, batch_first=batch_first, bidirectional=bidirectional)
    B, ends = len(ends), torch.tensor([ends])
    x, h = torch.randn((B, 1, 4) if batch_first else (1, B, 4)), torch.randn(1 + bidirectional, B, 5)
    before = h.clone()
    before[0] *= 1 - ends.T
    with torch.set_grad_enabled(grad):
        y, state = layer(x, h, resets=(ends.T if batch_first else ends).to(dtype))
        expected = layer(x, before)
    assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])

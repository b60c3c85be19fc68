"""How many functions a call goes through before its kernels; docs/architecture.md shows them."""

import importlib.util
from pathlib import Path

import pytest
import torch

import seqcells

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


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_one_step_with_resets_is_checked_quickly(dtype, monkeypatch):
    """As acting calls it, with zeros and ones of the environment's type: a state set to zero and a step of torch's."""
    monkeypatch.setattr(seqcells.GRU, "_check", lambda *_: pytest.fail("the long check"))
    layer, x, h = seqcells.GRU(4, 5), torch.randn(1, 3, 4), torch.randn(1, 3, 5)
    ends = torch.tensor([[1, 0, 1]])
    assert torch.equal(layer(x, h, resets=ends.to(dtype))[0], layer(x, h * (1 - ends)[..., None])[0])

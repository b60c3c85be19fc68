"""How many functions a call goes through before its kernels; docs/architecture.md shows them."""

import importlib.util
from pathlib import Path

import pytest

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

"""The book: the Python in its pages runs, the navigation names every page, and every cell has its section."""

import re
import textwrap
from pathlib import Path

import pytest
import yaml

import seqcells

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
# The recipes of docs/frameworks.md need those frameworks: tests/integrations/test_recipes.py runs them.
RUN = ["README.md", *(page for page in PAGES if page != "docs/frameworks.md")]


@pytest.mark.parametrize("page", RUN)
def test_the_python_in_a_page_runs(page, monkeypatch, capsys):
    """The blocks fenced as `python`, in order and in one namespace. (Those fenced as `py` are only shown.)"""
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8")
    namespace = {"__name__": page}
    for block in re.finditer(r"^( *)```python\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        line = text[: block.start()].count("\n") + 1
        code = "\n" * line + textwrap.dedent(block[2])
        exec(compile(code, page, "exec"), namespace)  # an error names the page's own line


def test_the_navigation_names_every_page():
    """Those that docs/book.py adds, which are no files in docs/, are found by `make docs`."""
    named = re.findall(r"^ +- (?:.*: )?([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {f"docs/{name}" for name in named} >= set(PAGES)
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert [next(iter(entry)) for entry in nav][:4] == ["Start here", "Drop-in", "Your own cell", "Gallery"]


def test_every_cell_has_a_section_in_the_gallery():
    text = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    files = {getattr(seqcells.cells, name).__module__.rpartition(".")[2] for name in seqcells.cells.__all__}
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == files
    assert text.count("**When to use it.**") == text.count("```text\n") == len(files)

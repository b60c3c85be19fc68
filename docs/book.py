"""What mkdocs builds that is no file in docs/: a page of each cell, the stories (examples/*.py, executed), and pages
that stand elsewhere in the repository.

mkdocs.yml names this file as a hook, so mkdocs calls the functions on_...; and as an extension of mkdocstrings.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import posixpath
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import griffe
import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # seqcells of this checkout

STORIES = {f"stories/{f.stem}.md": f"examples/{f.name}" for f in sorted((ROOT / "examples").glob("*.py"))}
# The page of the book: the file in the repository.
ELSEWHERE = {
    "contributing.md": "CONTRIBUTING.md",
    "tests.md": "tests/README.md",
    "changelog.md": "CHANGELOG.md",
    "results/notes.md": "benchmarks/NOTES.md",
    **{f"results/{f.name}": f"benchmarks/results/{f.name}" for f in sorted((ROOT / "benchmarks/results").glob("*.md"))},
}


def sections() -> dict[str, str]:
    """The sections of docs/gallery.md by their headings; "" is what stands before the first."""
    parts = re.split(r"^## (\w+)\n", (ROOT / "docs/gallery.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def families() -> dict[str, list[Any]]:
    """The cells of each file in seqcells/cells, by the file's name."""
    from seqcells import cells

    found: dict[str, list[Any]] = {}
    for name in cells.__all__:
        found.setdefault(getattr(cells, name).__module__.rpartition(".")[2], []).append(getattr(cells, name))
    return found


def mismatches() -> str:
    """What is wrong between the gallery's sections and the cells; "" if nothing is."""
    written, cells = set(sections()) - {""}, set(families())
    if without := sorted(cells - written):
        cell = without[0]
        return f"seqcells/cells/{cell}.py has no section '## {cell}' in docs/gallery.md: write its equation and its use"
    if gone := sorted(written - cells):
        return f"docs/gallery.md has a section '## {gone[0]}', but there is no seqcells/cells/{gone[0]}.py"
    return ""


def facts(cell: Any) -> list[tuple[str, str]]:
    """What a cell has and costs, from the Cell itself."""
    saved = len(cell.saved)
    levels = len({operand.level for operand in cell.form.operands})
    products = f"{len(cell.u_gates)}"
    if levels > 1:
        products += f", {sum(o.products for o in cell.form.operands if o.level > 1)} of them after the others"
    found = [
        ("states", " ".join(cell.states)),
        ("gates", " ".join(cell.gates)),
        ("trained vectors", " ".join(cell.params)),
        ("per-step inputs", " ".join(cell.inputs)),
        ("constants", ", ".join(f"{name} = {value:g}" for name, value in cell.constants.items())),
        ("input products", f"{len(cell.x_gates)}"),
        ("recurrent products", products),
        ("saved for backward", f"{saved} tile{'s' * (saved != 1)} a step"),
    ]
    return [(name, value) for name, value in found if value]


def cell_page(name: str, cells: list[Any]) -> str:
    """A cell's page: the paper and its section in gallery.md; then its definition, its cost, and what was derived."""
    text = f"# {name}\n\n{inspect.getdoc(sys.modules[cells[0].__module__])}\n\n{sections()[name].strip()}\n"
    for cell in cells:
        text += f"\n## `seqcells.cells.{cell.name}`\n\n```py\n{inspect.getsource(cell.step)}```\n\n"
        (first, *rest) = (f"| {what} | {value} |\n" for what, value in facts(cell))
        text += f"{first}|---|---|\n{''.join(rest)}"
        given = "".join(f", {n}=torch.rand(5, 3)" for n in cell.inputs)
        text += f"\n```py\nimport torch, seqcells\n\nlayer = seqcells.Recurrent(seqcells.cells.{cell.name}, 10, 20)\n"
        text += f"y, state = layer(torch.randn(5, 3, 10){given})\n```\n"
        text += f'\n??? note "What is derived: `seqcells.cells.{cell.name}.explain()`"\n\n    ```text\n'
        text += "".join(f"    {line}\n" for line in cell.explain().splitlines()) + "    ```\n"
    return text


def cell_table() -> str:
    """All cells with what they cost."""
    text = "| cell | states | gates | recurrent products | saved, tiles a step |\n|---|---|---|---|---|\n"
    for name, cells in families().items():
        for cell in cells:
            of = dict(facts(cell))
            link = f"[{cell.name}](gallery/{name}.md)"
            text += f"| {link} | {of['states']} | {of['gates']} | {of['recurrent products']} | {len(cell.saved)} |\n"
    return text


def executed(script: Path) -> nbformat.NotebookNode:
    """A script as a notebook with its outputs, kept in out/stories until the script, seqcells or a version changes."""
    digest = hashlib.sha256(script.read_bytes())
    for folder in "seqcells", "kernels":
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    digest.update((ROOT / "constraints.txt").read_bytes())
    kept = ROOT / "out/stories" / f"{script.stem}-{digest.hexdigest()[:16]}.ipynb"
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    book = jupytext.read(script)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as folder:  # where the script leaves its picture
        client = NotebookClient(
            book,
            timeout=300,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],  # it warns of its port, which only this machine can reach
        )
        try:
            client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
        except CellExecutionError as error:
            raise PluginError(f"examples/{script.name}: {error}") from error
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # the times, which differ from build to build
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{script.stem}-*.ipynb"):
        old.unlink()
    nbformat.write(book, kept)
    return book


def add_story(files: Files, config: MkDocsConfig, page: str, source: str) -> None:
    """A story's page, its pictures, and the notebook for download."""
    script = ROOT / source
    book = executed(script)
    text, resources = MarkdownExporter().from_notebook_node(
        book, resources={"unique_key": script.stem, "output_files_dir": "pictures"}
    )
    title, rest = text.lstrip().split("\n", 1)
    rest = rest.replace("![png]", f"![{title.lstrip('# ')}]")
    links = f"[Download the notebook]({script.stem}.ipynb){{ download }}, or run `{source}`. All cases of the task are "
    links += f"in `seqcells/tasks/{script.name}`, and their results in [tasks-cpu](../results/tasks-cpu.md)."
    files.append(File.generated(config, page, content=f"{title}\n\n{links}\n{rest}"))
    files.append(File.generated(config, f"stories/{script.stem}.ipynb", content=nbformat.writes(book)))
    for name, picture in resources["outputs"].items():
        files.append(File.generated(config, f"stories/{name}", content=picture))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    if wrong := mismatches():
        raise PluginError(wrong)
    cells = ["gallery.md", *(f"gallery/{name}.md" for name in sorted(families()))]
    results = [{Path(page).stem: page} for page in ELSEWHERE if page.startswith("results/")]
    added = {"Gallery": cells, "Performance": ["performance.md", *results]}
    written: Any = config.nav
    config.nav = [{title: added.get(title, page) for title, page in entry.items()} for entry in written]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files in docs/, and the pictures that they show."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, cells in families().items():
        files.append(File.generated(config, f"gallery/{name}.md", content=cell_page(name, cells)))
    for page, source in STORIES.items():
        add_story(files, config, page, source)
    for picture in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages; a file without a page is named only."""
    here = page.file.src_uri
    if here == "gallery.md":
        markdown = f"{sections()['']}\n{cell_table()}"
    source = "docs/gallery.md" if here.startswith("gallery/") else ELSEWHERE.get(here, f"docs/{here}")
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files} | {s: p for p, s in (ELSEWHERE | STORIES).items()}
    pages |= {f"seqcells/cells/{name}.py": f"gallery/{name}.md" for name in families()}
    pages |= {f"benchmarks/{file.src_uri}": file.src_uri for file in files if file.src_uri.endswith(".png")}

    def page_of(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in pages:
            return f"{text}({posixpath.relpath(pages[path], posixpath.dirname(here))}{anchor or ''})"
        if not (ROOT / path).exists():
            return link[0]  # for mkdocs to look at
        return text.lstrip("![").rstrip("]")

    return re.sub(r"(!?\[[^\]\n]*\])\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", page_of, markdown)


class PlainText(griffe.Extension):
    """Docstrings as Markdown: without Sphinx's roles and double colons, with a paragraph for each line that begins with
    arguments' names and a colon, and with the asterisks of shapes, as in [G*H, I], as they are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if not obj.docstring:
            return
        text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        text = re.sub(r"(?<=\w)\*(?=\w)", r"\*", text)
        if obj.is_function:
            names = {p.name for p in obj.parameters}

            def paragraph(line: re.Match[str]) -> str:
                own = line[1].split(", ")
                return f"\n{', '.join(f'`{n}`' for n in own)}: " if names.issuperset(own) else line[0]

            text = re.sub(r"^(\w+(?:, \w+)*): ", paragraph, text, flags=re.MULTILINE)
        obj.docstring.value = text

"""What is not Python: CI, the hooks, the issue forms, and what the Markdown pages name."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import seqcells

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md", "examples/README.md", "benchmarks/NOTES.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
WORKFLOW = ".github/workflows/ci.yml"


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def lower_bound(requirement):
    """The oldest release that pyproject.toml allows."""
    (version,) = re.findall(rf'"?{requirement}\s*(?:=\s*")?>=([\d.]+)', read("pyproject.toml"))
    return version


def steps():
    """The shell commands of the workflow."""
    jobs = yaml.safe_load(read(WORKFLOW))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def pytest_commands():
    """(page, arguments) of each pytest command in the pages for developers."""
    found = []
    for page in ("CONTRIBUTING.md", "tests/README.md", "docs/architecture.md"):
        for arguments in re.findall(r"\bpytest (-q [^`\n#|]*)", read(page)):
            found.append((page, shlex.split(arguments)))
    return found


def test_yaml_files_parse():
    files = [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]
    assert len(files) >= 5
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file


def test_ci_runs_on_what_pyproject_names():
    matrix = yaml.safe_load(read(WORKFLOW))["jobs"]["test"]["strategy"]["matrix"]
    versions = matrix["python"]
    assert all(isinstance(v, str) for v in versions), "unquoted, 3.10 is 3.1"
    assert versions[0] == lower_bound("requires-python")
    assert set(re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))) <= set(versions)
    assert {"python": versions[0], "torch": "oldest"} in matrix["include"] and matrix["torch"] == ["newest"]
    (oldest,) = (command for command in steps() if "constraints.txt" in command)
    for name in ("torch", "triton"):
        assert f"/{name}=={lower_bound(name)}.*/" in oldest
        assert re.search(rf"^{name}==", read("constraints.txt"), re.M), "what the sed command replaces"


def test_ci_is_what_make_does():
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.M)
    called = [command.removeprefix("make ") for command in steps() if command.startswith("make ")]
    assert set(called) <= set(targets)
    assert set(called) == set(re.findall(r"^make (\S+)", read(".ci/run"), re.M))


def test_the_hooks_are_what_make_lint_runs():
    linted = re.search(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1].replace("$(BIN)", ".venv/bin")
    for hook in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]:
        assert hook["entry"].replace(" --force-exclude", "") in linted, hook["id"]


def test_the_changelog_has_this_version():
    version = re.search(r'^version = "(.*)"', read("pyproject.toml"), re.M)[1]
    assert version == seqcells.__version__
    assert f"## [{version}]" in read("CHANGELOG.md")


def test_each_test_file_is_in_the_table():
    here = ROOT / "tests"
    files = {str(f.relative_to(here)) for f in here.rglob("test_*.py")}
    named = set(re.findall(r"`((?:integrations/)?test_\w+\.py)`", read("tests/README.md")))
    assert named == files


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", read(page)):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "tests/README.md"])
def test_files_that_are_named_exist(page):
    folders = "seqcells|kernels|tests|benchmarks|docs|examples"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", read(page)):
        assert (ROOT / path).exists() or "NAME" in path, path
    for path, name in re.findall(rf"`((?:{folders})/[\w./-]+\.py)`[,:]? `(\w+)`", read(page)):
        assert re.search(rf"\b{name}\b", read(path)), f"{path} has no {name}"


def test_pytest_commands_select_something():
    """By name: files that exist, and after -k words that some test in them has."""
    commands = pytest_commands()
    assert len(commands) > 10
    for page, arguments in commands:
        files = [ROOT / a for a in arguments if a.startswith("tests/")]
        assert files and all(f.exists() for f in files), (page, arguments)
        if "-k" in arguments:
            text = " ".join(f"{f.stem} {f.read_text()}" for f in files if f.is_file())
            for word in re.findall(r"\w+", arguments[arguments.index("-k") + 1]):
                assert word in ("and", "or", "not") or word in text, (page, arguments, word)

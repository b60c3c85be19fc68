"""The structure: which packages may import which, what is in a wheel, and how long a file may be."""

import ast
import email
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {  # room: the rooms of the project it may import
    "kernels.form": set(),
    "kernels.math": set(),
    "kernels.devices": set(),
    "kernels.cost": set(),
    "kernels.means": {"kernels.devices", "kernels.form", "kernels.plan"},  # of the last two types alone
    "kernels.plan": {"kernels.cost", "kernels.devices", "kernels.form", "kernels.means"},
    "kernels.registry": {"kernels.cells"},  # its type alone
    "kernels.cells": {"kernels.form", "kernels.registry"},
    "kernels.tiles": {"kernels.math"},
    "kernels.random": set(),
    "kernels.layout": {"kernels.math"},
    "kernels.exchange": {"kernels.form", "kernels.math", "kernels.plan"},  # of the last a type, and pure functions
    "kernels.between": {"kernels.layout", "kernels.math", "kernels.tiles"},
    "kernels.resident": {f"kernels.{n}" for n in ("between", "exchange", "layout", "random", "tiles")},
    "kernels.resident_backward": {f"kernels.{n}" for n in ("between", "exchange", "layout", "math", "random", "tiles")},
    "kernels.slices": {"kernels.exchange", "kernels.layout", "kernels.math", "kernels.plan", "kernels.tiles"},
    "kernels.grid": {"kernels.exchange", "kernels.random", "kernels.slices", "kernels.tiles"},
    "kernels.streamed": {"kernels.math", "kernels.tiles"},
    "kernels.stepwise": {"kernels.exchange", "kernels.math", "kernels.random", "kernels.streamed", "kernels.tiles"},
    "kernels.recompute": {"kernels.exchange", "kernels.random", "kernels.tiles"},
    "kernels.buffers": set(),
    "kernels.scan": {
        f"kernels.{n}"
        for n in (
            *("buffers", "cells", "devices", "exchange", "grid", "means", "plan", "recompute", "resident"),
            *("resident_backward", "stepwise", "streamed"),
        )
    },
    "kernels.plan_single": {f"kernels.{n}" for n in ("cost", "devices", "form", "plan")},
    "kernels.single": {f"kernels.{n}" for n in ("cells", "math", "plan", "plan_single", "scan", "tiles")},
    "kernels.stack": {
        f"kernels.{n}" for n in ("buffers", "cells", "devices", "form", "plan", "resident", "resident_backward", "scan")
    },
    "kernels.report": {
        f"kernels.{n}"
        for n in ("cells", "devices", "latency", "plan", "plan_single", "registry", "scan", "single", "stack")
    },
    "kernels.latency": set(),
    "kernels": {"kernels.cells", "kernels.scan", "kernels.single", "kernels.stack"},
    "chosen": set(),
    "backends": {"chosen", "kernels.plan"},
    "checks": set(),
    "precisions": {"kernels.plan"},
    "arguments": {"backends", "cell", "checks", "precisions"},
    "reference": {"arguments", "cell", "cells"},
    "derive": {"kernels.cells", "kernels.exchange", "kernels.form", "kernels.math"},
    "cell": {"checks", "derive", "kernels.form", "kernels.registry"},
    "cells": {"cell"},
    # Of cell_modules and recurrent, types alone.
    "layer_arguments": {"arguments", "backends", "checks", "cell_modules", "engines.operators", "recurrent"},
    "masks": {"kernels.buffers"},
    "products": {"cell", "kernels.buffers", "kernels.form"},
    "drawn": {"cell", "checks", "dispatch"},  # of dispatch its types alone
    "dropouts": {"cell", "drawn", "layer_arguments", "recurrent"},  # of recurrent its type alone
    "autograd": {"backends", "cell", "dispatch", "drawn", "masks", "products", "reference"},  # likewise
    "fallback": set(),
    "flops": set(),
    "verdicts": {"backends"},
    "verification": {
        *("backends", "checks", "fallback", "verdicts", "kernels.form", "kernels.plan", "kernels.registry"),
        "kernel_check",  # when something is verified, for it imports what imports this
    },
    "measured": {
        *("backends", "precisions", "verdicts", "verification"),
        *("dispatch", "tuning"),  # of dispatch its type alone; tuning when something is measured
    },
    "tuning": {
        *("backends", "cell", "cell_modules", "checks", "dispatch", "engines.triton", "fallback", "layers", "measured"),
        *("precisions", "recurrent", "verdicts", "verification"),
    },
    "kernel_check": {
        *("cell", "drawn", "fallback", "masks", "products", "reference", "testing", "kernels", "kernels.buffers"),
        *("kernels.cells", "kernels.scan", "kernels.single", "kernels.stack"),
    },
    "engines": set(),
    "engines.operators": {"autograd"},
    "engines.loop": {"autograd", "cell", "derive", "engines.operators", "products", "kernels.buffers"},
    "engines.triton": {
        *("autograd", "cell", "drawn", "engines.loop", "engines.operators", "fallback", "kernels", "masks", "products"),
        "verification",
        *(f"kernels.{n}" for n in ("buffers", "cells", "plan", "plan_single", "registry", "scan", "single")),
    },
    "engines.stack": {
        *("autograd", "engines.triton", "fallback", "kernels", "products", "verification"),
        *(f"kernels.{n}" for n in ("buffers", "cells", "plan", "scan", "stack")),
    },
    "stacked": {
        *("autograd", "engines.stack", "masks", "precisions", "products"),
        "dispatch",  # its types alone
    },
    "engines.aten": {"recurrent"},  # its type alone
    "engines.reset_steps": {"engines.aten", "packing", "kernels.buffers"},
    "projection": {"dispatch"},  # its types alone
    "extras": {"cell", "checks", "masks"},  # of cell its type alone
    "dispatch": {
        *("autograd", "backends", "cell", "chosen", "drawn", "fallback", "flops", "masks", "measured"),
        *("engines.aten", "engines.loop", "engines.reset_steps", "engines.triton"),
        *("precisions", "projection", "reference"),
        "recurrent",  # its type alone
    },
    "functional": {
        *("arguments", "backends", "cell", "checks", "dispatch", "drawn", "engines.aten", "engines.operators"),
        *("extras", "precisions"),
    },
    "explanation": {
        *("arguments", "backends", "cell", "checks", "dispatch", "engines.aten", "fallback", "measured", "precisions"),
        *("stacked", "verification", *(f"kernels.{n}" for n in ("cells", "devices", "plan", "scan", "stack"))),
    },
    "packing": set(),
    "modules": {"cell", "checks"},
    "cell_modules": {
        *("arguments", "backends", "cell", "checks", "dispatch", "engines.aten", "functional", "layer_arguments"),
        "modules",
    },
    "recurrent": {
        *("arguments", "backends", "cell", "checks", "dispatch", "dropouts", "engines.aten", "extras", "heads"),
        *("layer_arguments", "masks", "modules", "packing", "precisions", "stacked"),
    },
    "layers": {"cell", "checks", "dropouts", "functional", "recurrent"},
    "subclasses": {"cell_modules", "layers"},
    "convert": {"arguments", "cell_modules", "checks", "dropouts", "layers", "modules", "recurrent", "subclasses"},
    "weights": {"cell", "cell_modules", "checks", "functional", "modules", "recurrent"},
    "init": {"checks", "weights"},
    "interop": {"cell", "checks", "weights", "kernels.registry"},
    "testing": {"backends", "cell", "checks", "drawn", "explanation", "functional", "reference", "kernels.registry"},
    "heads": {"dispatch"},
    "tasks": {  # which nothing imports but __main__
        *("arguments", "backends", "cell", "checks", "explanation", "init", "layers", "precisions", "recurrent"),
        *("testing", "tuning", "verdicts", "verification", "kernels.devices", "kernels.registry"),
    },
    "integrations": {"cell_modules", "convert", "recurrent"},
}
TOP = {"__init__", "__main__"}  # these may import anything


def sources():
    for folder, package in ((ROOT / "kernels", ("kernels",)), (ROOT / "seqcells", ())):
        for file in sorted(folder.rglob("*.py")):
            if "kernels" in file.relative_to(folder).parts:
                continue  # the link
            parts = package + file.relative_to(folder).with_suffix("").parts
            yield file, tuple(p for p in parts if p != "__init__") if len(parts) > 1 else parts


def room(parts):
    """kernels.plan and engines.aten are rooms of their own; tasks.count_ones is in tasks."""
    return ".".join(parts[:2] if parts[:1] in (("kernels",), ("engines",)) else parts[:1])


def imports(file, parts, is_package):
    """The project's modules a file imports, as parts below seqcells."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            names = [n[1:] for n in names if n[0] == "seqcells"]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                here = list(parts) if is_package else list(parts[:-1])
                base = here[: len(here) - (node.level - 1)] + module
            elif module[:1] == ["seqcells"]:
                base = module[1:]
            else:
                continue
            names = [[*base, a.name] for a in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kernels":
            names = [["kernels", node.attr]]  # which the package imports when it is named
        yield from names


def test_imports_run_one_way():
    known = {room(parts) for _, parts in sources()} | set(ARROWS)
    seen = set()
    for file, parts in sources():
        here = room(parts)
        if parts[0] in TOP:
            continue
        assert here in ARROWS, f"{file} is a room the plan of the house does not have"
        for name in imports(file, parts, file.name == "__init__.py"):
            there = room(tuple(name))
            if there in known and there != here:
                seen.add((here, there))
                assert there in ARROWS[here], f"{file}: {here} must not import {there}"
    assert (
        ("engines.triton", "kernels.scan") in seen
        and ("tasks", "layers") in seen
        and ("kernels.cells", "kernels.form") in seen
    )


def test_a_library_user_does_not_pay_for_the_tasks():
    code = "import sys, seqcells; print(*(n for n in sys.modules if n.startswith('seqcells.tasks')))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


@pytest.mark.parametrize("file", ["cost.py", "devices.py", "form.py", "means.py", "plan.py", "plan_single.py"])
def test_plan_is_pure(file):
    source = (ROOT / "kernels" / file).read_text()
    modules = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    assert (
        modules - {"cost", "devices", "form", "means", "plan"}
        <= {"__future__", "collections.abc", "dataclasses", "functools", "itertools", "typing"}
        and "import torch" not in source
    )


def test_no_file_is_longer_than_500_lines():
    others = {".venv", ".venv-docs", ".venv-integrations", "build"}
    files = [f for f in ROOT.rglob("*.py") if not others & set(f.parts)]
    long = {str(f): n for f in files if (n := len(f.read_text().splitlines())) > 500}
    assert files and not long


# Of more than 8 parameters, not counting self, cls and ctx: functions whose signature is the API, or the schema of an
# operator, or a cell's.
SIGNATURES = {
    *("convert.convert", "explanation.explain", "reference.scan_groups", "reference.scan_states", "testing.errors"),
    *(f"functional.{name}" for name in ("scan", "scan_groups", "lstm", "gru", "rnn")),
    *(f"{name}.__init__" for name in ("layers.LSTM", "layers.GRU", "layers.RNN", "recurrent.Recurrent")),
    *(f"cell_modules.{name}.__init__" for name in ("GRUCell", "RNNCell", "RecurrentCell")),
    *("engines.aten._backward_op", "engines.aten._call"),  # torch's own operators
    *(f"engines.operators.{name}" for name in ("scan_forward", "scan_backward")),
    *(f"cells.{name}.{name}" for name in ("dreamer_gru", "lngru", "lnlstm")),  # steps, with a vector for each gate
}


def files(*folders):
    """The Python files below folders, by their paths in the repository."""
    found = (str(f.relative_to(ROOT)) for folder in folders for f in sorted((ROOT / folder).rglob("*.py")))
    return [name for name in found if not name.startswith("seqcells/kernels/")]  # the link


def functions(file):
    """Qualified names and nodes of the functions in a file."""

    def within(node, name):
        for child in ast.iter_child_nodes(node):
            here = f"{name}.{child.name}" if hasattr(child, "name") else name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield here, child
            yield from within(child, here)

    module = ".".join(Path(file).with_suffix("").parts).removeprefix("seqcells.")
    return within(ast.parse((ROOT / file).read_text()), module)


def length(function):
    """In lines. The docstring does not count: a public function's is as long as its arguments need."""
    first, docstring = function.body[0], ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1) * docstring


def test_no_function_is_longer_than_60_lines():
    long = {}
    for file in files("seqcells", "benchmarks", "examples", "tests"):
        long |= {name: n for name, f in functions(file) if (n := length(f)) > 60}
    assert not long, long


def test_no_function_has_more_than_8_parameters():
    many = {}
    for file in files("seqcells", "benchmarks", "examples"):
        for name, f in functions(file):
            given = {a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)} - {"self", "cls", "ctx"}
            many |= {name: given} if len(given) > 8 and name not in SIGNATURES else {}
    assert not many, many


def test_ignored_types_have_a_reason():
    """As in `x = f()  # type: ignore[code]  # reason`."""
    bare = []
    for file in files("seqcells", "kernels", "benchmarks", "examples"):
        lines = enumerate((ROOT / file).read_text().splitlines(), 1)
        bare += [f"{file}:{n}" for n, line in lines if re.search(r"# type: ignore(\[[^]]*\])?\s*$", line)]
    assert not bare, bare


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # Of a copy: a build writes into its source, where another worker of pytest-xdist may be building.
    left_out = shutil.ignore_patterns(".*", "build", "out", "__pycache__", "*.egg-info", "tests", "benchmarks", "docs")
    source = shutil.copytree(ROOT, out / "source", symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_a_wheel_holds_each_file_once(wheel):
    names = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")]
    assert len(names) == len(set(names))
    expected = {"/".join(("seqcells", *f.relative_to(ROOT).parts)) for f in (ROOT / "kernels").rglob("*.py")}
    expected |= {
        str(f.relative_to(ROOT))
        for f in (ROOT / "seqcells").rglob("*.py")
        if "kernels" not in f.relative_to(ROOT).parts
    }
    assert set(names) == expected, "no top-level package kernels, and nothing twice"


def test_a_wheels_metadata(wheel):
    """What a package index shows: no picture or link into files that it has not got."""
    with zipfile.ZipFile(wheel) as content:
        (name,) = (n for n in content.namelist() if n.endswith("dist-info/METADATA"))
        found = email.message_from_bytes(content.read(name))
    assert found["Author"] and found["Keywords"] and found["License-Expression"] == "Apache-2.0"
    classifiers = found.get_all("Classifier")
    assert {"Programming Language :: Python :: 3", "Operating System :: OS Independent"} <= set(classifiers)
    assert any(c.startswith("Development Status :: ") for c in classifiers)
    assert found["Description-Content-Type"] == "text/markdown"
    description, readme = found.get_payload(decode=True).decode(), (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[.*\]\((?!https?:).*\)\n*", readme)
    assert pictures and not re.search(r"!?(?<![\w\])])\[[^\]]*\]\((?!https?:|#)", description)
    for picture in pictures:
        readme = readme.replace(picture, "")
    readme = re.sub(r"\]\((?!https?:|#)[^)]*\)", "]", readme)  # links into files: their text stays
    assert "![" not in description and len(description.strip()) > 0.95 * len(readme.strip()), "the rest is README's"


def test_a_wheel_says_that_it_is_typed(wheel):
    archive = zipfile.ZipFile(wheel)
    assert "seqcells/py.typed" in archive.namelist()
    (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    assert "Classifier: Typing :: Typed" in archive.read(name).decode()


def test_a_wheel_requires_no_triton(wheel):
    """Which takes 290 MB; torch for CUDA brings it."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", archive.read(name).decode(), re.M)
    assert sorted(r for r in required if "extra" not in r) == ["numpy", "platformdirs", "torch>=2.11"]
    assert any(r.startswith("triton") and "Linux" in r and "extra == " in r for r in required)


def test_a_wheel_works_in_a_fresh_environment_elsewhere(wheel, tmp_path):
    """torch and the rest are this environment's (a second torch would take gigabytes); seqcells is the wheel's."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    others = [p for p in sys.path if p.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    code = (
        "import seqcells, seqcells.kernels.scan, torch; print(seqcells.__file__);"
        "layer = seqcells.LSTM(2, 3, backend='triton'); layer(torch.ones(2, 1, 2))[0].sum().backward(); print('ran')"
    )
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert str(site) in run.stdout and "ran" in run.stdout

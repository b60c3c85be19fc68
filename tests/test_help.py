"""What help(), an editor and a type checker are told: signatures, docstrings, and the examples in them."""

import doctest
import inspect
import pydoc
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import seqcells
from seqcells import functional, init, interop

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
MODULES = [n for n in seqcells.__all__ if inspect.ismodule(getattr(seqcells, n))]
PUBLIC = {n: getattr(seqcells, n) for n in seqcells.__all__ if n not in MODULES}
PUBLIC |= {f"{n}.forward": getattr(seqcells, n).forward for n in (*LAYERS, *CELLS)}
PUBLIC |= {f: getattr(functional, f) for f in ("scan", "scan_groups")}
PUBLIC |= {
    f"{module.__name__}.{n}": f
    for module in (init, interop)
    for n, f in vars(module).items()
    if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_names_each_parameter(name):
    documented = inspect.getdoc(PUBLIC[name]) or ""
    parameters = [p for p in inspect.signature(PUBLIC[name]).parameters if p != "self"]
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", documented)]
    assert documented and not missing


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_in_docstrings_run(name):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for test in finder.find(PUBLIC[name], name, globs={"torch": torch, "seqcells": seqcells}):
        runner.run(test)
        assert test.examples or name.endswith(".forward"), "no example"
    assert runner.failures == 0


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_a_docstring(name):
    assert inspect.getdoc(getattr(seqcells, name))


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_a_signature_is_explicit_and_begins_as_torchs(name):
    ours = inspect.signature(getattr(seqcells, name)).parameters
    theirs = [
        p for p in inspect.signature(nn.RNNBase if name in LAYERS else getattr(nn, name)).parameters if p != "mode"
    ]
    if name in ("GRU", "RNN"):
        theirs.remove("proj_size")
    if name == "RNN":
        theirs.insert(3, "nonlinearity")
    assert list(ours)[: len(theirs)] == theirs
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])
    assert all(p.annotation is not p.empty for p in ours.values())


def test_help_reads_like_torchs():
    text = pydoc.render_doc(seqcells.LSTM, renderer=pydoc.plaintext)
    for heading in ("Args:", "Attributes:", "Raises:", "Example::", "Returns:"):
        assert heading in text
    assert "class LSTM" in text and "input_size: int, hidden_size: int, num_layers: int = 1" in text.replace("'", "")


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_proj_size_is_refused_where_torch_takes_it(name):
    """By name; by position, behind bidirectional, where 0 may stand and device and dtype follow."""
    cls, options = getattr(seqcells, name), ["tanh"] if name == "RNN" else []
    given = (3, 4, 1, *options, True, False, 0.0, False)
    for call in (lambda: cls(3, 4, proj_size=0), lambda: cls(*given, 2), lambda: cls(*given, proj_size=2)):
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not RNN or GRU"):
            call()
    for m in (cls, getattr(nn, name)):
        assert m(*given, 0, "meta", torch.float64).weight_hh_l0.is_meta
        with pytest.raises(TypeError):
            m(*given, 0, "meta", torch.float64, 5)


def test_the_typed_program_runs():
    """mypy --strict and pyright read it in make lint."""
    runpy.run_path(str(Path(__file__).with_name("typed_program.py")), run_name="__main__")

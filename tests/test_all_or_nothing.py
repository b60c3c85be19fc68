"""convert and revert change everything or nothing: wrong arguments, and something that raises half way."""

import logging
import sys
from functools import partial

import pytest
import torch
from torch import nn

import seqcells
from seqcells import convert, revert

KINDS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


def model(space):
    return nn.Sequential(*(getattr(space, kind)(3, 4) for kind in KINDS))


def state(module):
    """Classes, attributes and parameters, as the objects they are."""
    return [
        (type(m), {k: id(v) for k, v in m.__dict__.items()}, {k: id(v) for k, v in m._parameters.items()})
        for m in module.modules()
    ]


def to_subclasses(model, **options):
    return convert(model, subclass=True, **options)


SWAPS = pytest.mark.parametrize(
    ("swap", "space"),
    [(convert, nn), (to_subclasses, nn), (revert, seqcells), (revert, seqcells.subclasses)],
    ids=["convert", "to subclasses", "revert", "from subclasses"],
)


@SWAPS
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"report": ()}, "report must be a list or None, got a tuple of 0"),
        ({"report": "report"}, "report must be a list or None, got a str"),
        ({"report": list}, "report must be a list or None, got the class list"),
        ({"include": 5}, "include must be a name or names, got an int"),
        ({"include": ["0", None]}, "include must be a name or names, got None"),
        ({"exclude": [5]}, "exclude must be a name or names, got an int"),
    ],
)
def test_wrong_types(swap, space, options, words):
    module = model(space)
    before = state(module)
    with pytest.raises(TypeError, match=words):
        swap(module, **options)
    assert state(module) == before


@pytest.mark.parametrize("swap", [convert, revert])
@pytest.mark.parametrize(
    ("given", "got"),
    [(None, "None"), (nn.LSTM, "the class LSTM"), ([nn.LSTM(1, 1)], "a list of 1"), ({}, "a dict of 0")],
)
def test_no_module(swap, given, got):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {got}"):
        swap(given)


class Broken(Exception):
    pass


def failing(function, at):
    """That function, which raises when it is called for the at-th time, having done its work."""
    calls = []

    def call(*arguments, **options):
        result = function(*arguments, **options)
        calls.append(1)
        if len(calls) == at:
            raise Broken
        return result

    return call


@SWAPS
@pytest.mark.parametrize("at", range(1, len(KINDS) + 1))
def test_a_swap_that_raises(swap, space, at, monkeypatch):
    module, report = model(space), ["mine"]
    before, x = state(module), torch.randn(5, 3)
    expected = module[0](x)[0]
    conversion = sys.modules["seqcells.convert"]
    plan, run = conversion._plan, failing(lambda change: change(), at)
    monkeypatch.setattr(conversion, "_plan", lambda *arguments: partial(run, plan(*arguments)))
    with pytest.raises(Broken):
        swap(module, report=report)
    assert state(module) == before and report == ["mine"]
    torch.testing.assert_close(module[0](x)[0], expected)
    monkeypatch.undo()
    swap(module, report=report)
    assert len(report) == 1 + len(KINDS) and not any(
        type(m) is getattr(space, k) for k, m in zip(KINDS, module, strict=True)
    )


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_flatten_parameters_that_raises(at, monkeypatch):
    module = model(seqcells)
    before = state(module)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", failing(lambda self: None, at))
    with pytest.raises(Broken):
        revert(module)
    assert state(module) == before


@SWAPS
def test_a_report_and_a_log_that_raise(swap, space, monkeypatch):
    module = model(space)

    class Report(list):
        def append(self, change):
            super().append(change)
            if len(self) == 3:
                raise Broken

    before, report = state(module), Report()
    with pytest.raises(Broken):
        swap(module, report=report)
    assert state(module) == before
    monkeypatch.setattr(logging.Logger, "log", failing(lambda *a: None, 2))
    report = []
    with pytest.raises(Broken):
        swap(module, report=report)
    assert state(module) == before and report == []


def test_a_report_that_only_appends():
    class Report:
        def __init__(self):
            self.found = []

        def append(self, change):
            self.found.append(change)

    report = Report()
    convert(nn.LSTM(3, 4), report=report)
    assert [str(c) for c in report.found] == ["(the model itself): torch.nn.LSTM -> seqcells.LSTM"]

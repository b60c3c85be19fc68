"""For tests of what is measured: a clock that a test sets, and a process that knows nothing yet."""

import copy
import importlib
from contextlib import contextmanager

import torch
from conftest import DEVICE

import seqcells
from seqcells import dispatch, fallback, measured, tuning

verification = importlib.import_module("seqcells.verification")  # the class hides the module


@contextmanager
def fresh(monkeypatch, folder):
    """Nothing is known, and little is run to measure. The CPU counts as a device that "auto" gives to the kernels."""
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setenv("SEQCELLS_CACHE", str(folder))
    for name in ("_failed", "refused_kernels"):
        monkeypatch.setattr(fallback, name, set())
    for name, value in (("_STEPS", 2), ("_WARM", 1), ("_LEAST", 1), ("_MOST", 1), ("_given_up", set())):
        monkeypatch.setattr(tuning, name, value)
    forget()
    monkeypatch.setattr(verification.CURRENT, "policy", "first use")
    yield
    forget()
    torch.backends.cudnn.benchmark = False


def forget():
    """As in another process."""
    verification.forget()
    measured.forget()
    measured.load()


def clock(monkeypatch, *fastest):
    """Set the clock: those backends are the fastest, in that order. Returns the cases that are measured."""
    seen, medians = [], tuning._medians

    def count(case, names):
        seen.append(case)
        return medians(case, names)

    def milliseconds(call, name, device):
        return 1.0 + fastest.index(name) if name in fastest else 50.0

    monkeypatch.setattr(tuning, "_medians", count)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return seen


def layer(kind=seqcells.LSTM, **options):
    """A layer under "auto", the same by the reference, and an input."""
    torch.manual_seed(0)
    made = kind(3, 4, dtype=torch.float64, device=DEVICE, **options)
    exact = copy.deepcopy(made)
    exact.backend = "reference"
    return made, exact, torch.randn(3, 2, 3, dtype=torch.float64, device=DEVICE)


def explained(cell="lstm", **options):
    given = {"batch": 2, "hidden_size": 4, "dtype": torch.float64, "device": DEVICE} | options
    return seqcells.explain(cell, **given)

"""The files of verdicts: what is killed, full, read-only or foreign costs at most another measurement."""

import errno
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import platformdirs
import pytest
import torch
from conftest import DEVICE

import seqcells
from seqcells import dispatch, fallback, kernel_check, verdicts
from seqcells.verdicts import Verdict

verification = importlib.import_module("seqcells.verification")  # the class hides the module
ROOT = Path(__file__).parents[1]
GOOD = Verdict(True, 0.25, "y")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    for name in ("_failed", "refused_kernels"):
        monkeypatch.setattr(fallback, name, set())
    verification.forget()
    verdicts._warn_once.cache_clear()
    yield
    verification.forget()


def in_a_child(call):
    """Run call() in a forked process, and return its id."""
    if pid := os.fork():
        return pid
    try:
        call()
    finally:
        os._exit(0)


def expected(n):
    return Verdict(n % 3 > 0, float(n), f"tensor {n}")


def read(file):
    """The verdicts in a file, of which none may be wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verdicts.read(file)
    assert all(v == expected(int(key)) for key, v in found.items())
    return found


@pytest.mark.parametrize("times", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(times, tmp_path):
    file, chance, sizes = tmp_path / "verdicts.json", random.Random(0), set()

    def write(first):
        for n in range(first, 10_000):
            verdicts.add(file, {str(n % 40): expected(n % 40)})

    for _ in range(times):
        pid = in_a_child(partial(write, chance.randrange(40)))
        time.sleep(chance.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        sizes.add(len(read(file)))
    assert len(sizes) > 1
    verdicts._STALE, stale = -1.0, verdicts._STALE
    try:
        verdicts.add(file, {"0": expected(0)})
    finally:
        verdicts._STALE = stale
    assert os.listdir(tmp_path) == [file.name], "what killed processes left is removed"


def test_two_writers_at_once(tmp_path):
    file = tmp_path / "verdicts.json"

    def write(first):
        for n in range(first, 200, 2):
            verdicts.add(file, {str(n): expected(n)})

    children = [in_a_child(partial(write, first)) for first in (0, 1)]
    for pid in children:
        os.waitpid(pid, 0)
    found = read(file)
    assert {"198", "199"} & set(found) and len(found) >= 100, "at worst, some are measured again"
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("step", ["open", "write", "rename"])
def test_a_full_disk(step, monkeypatch, tmp_path):
    file = tmp_path / "verdicts.json"
    verdicts.add(file, {"1": expected(1)})

    def full(*arguments, **options):
        if step == "write":
            arguments[1].write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    where, name = {"open": (tempfile, "mkstemp"), "write": (json, "dump"), "rename": (os, "replace")}[step]
    monkeypatch.setattr(where, name, full)
    verdicts.add(file, {"2": expected(2)})
    monkeypatch.undo()
    assert set(read(file)) == {"1"} and os.listdir(tmp_path) == [file.name]


WRONG_FILES = {
    "empty": "",
    "cut": '{"version": 1, "verdicts": {"a": {"good": tr',
    "binary": "\udc80\udcff",
    "another program's": '[{"name": "x"}]',
    "a number": "3",
    "another version": '{"version": 2, "verdicts": {}}',
    "no verdicts": '{"version": 1}',
    "verdicts of another kind": '{"version": 1, "verdicts": {"a": true}}',
    "more in it": '{"version": 1, "verdicts": {"a": {"good": true, "worst": 1, "tensor": "y", "more": 2}}}',
    "a verdict that is a string": '{"version": 1, "verdicts": {"a": {"good": "yes", "worst": 1, "tensor": "y"}}}',
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_other_files(kind, tmp_path):
    file = tmp_path / "verdicts.json"
    file.write_bytes(WRONG_FILES[kind].encode(errors="surrogateescape"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert verdicts.read(file) == verdicts.read(file) == {}
    assert len(said) == (kind != "empty")
    for warning in said:
        assert str(file) in str(warning.message) and "ignored and will be replaced" in str(warning.message)
    verdicts.add(file, {"1": expected(1)})
    assert set(read(file)) == {"1"}


@pytest.mark.parametrize("where", ["nowhere", "no home", "below a file", "read-only", "a folder is there"])
def test_nowhere_to_write(where, monkeypatch, tmp_path):
    """The kernels are verified in each process."""
    monkeypatch.setenv("SEQCELLS_CACHE", "")
    if where == "no home":
        monkeypatch.delenv("SEQCELLS_CACHE")
        monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *names, **options: "~/.cache/seqcells")
    elif where != "nowhere":
        (tmp_path / "file").write_text("")
        place = {"below a file": tmp_path / "file" / "more", "read-only": Path("/proc/seqcells")}
        monkeypatch.setenv("SEQCELLS_CACHE", str(place.get(where, tmp_path)))
    if where == "a folder is there":
        verdicts.path(torch.device(DEVICE)).mkdir()
    layer, x = seqcells.GRU(3, 4, device=DEVICE), torch.randn(3, 2, 3, device=DEVICE)
    count = []
    measure = kernel_check.measure
    monkeypatch.setattr(kernel_check, "measure", lambda *given: count.append(given) or measure(*given))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for process in (1, 2):
            layer(x)
            layer(x)
            assert len(count) == process
            verification.forget()
    assert not Path("~").exists()


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    assert verdicts.folder() == tmp_path
    monkeypatch.delenv("SEQCELLS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "seqcells"


@pytest.mark.parametrize("fact", ["device", "driver", "torch", "triton", "seqcells", "kernels"])
def test_a_file_for_each_device_and_version(fact, monkeypatch, tmp_path):
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    device = torch.device(DEVICE)
    known = verdicts.facts(device)
    assert known["torch"] == torch.__version__ and len(known["kernels"]) == 64
    before = verdicts.path(device)
    monkeypatch.setattr(verdicts, "facts", lambda device: known | {fact: "NVIDIA H100/80 GB"})
    assert verdicts.path(device) != before and verdicts.path(device).parent == tmp_path


PROGRAM = """
import time
import torch, seqcells
from seqcells import dispatch, kernel_check
from seqcells.engines import triton
dispatch.KERNEL_DEVICES = ("cpu", "cuda")
layer, x = seqcells.GRU(3, 4), torch.randn(3, 2, 3)
measured, took = [], []
measure, verify = kernel_check.measure, triton.verify
kernel_check.measure = lambda *given: measured.append(given) or measure(*given)
def timed(*given):
    start = time.perf_counter()
    verify(*given)
    took.append(time.perf_counter() - start)
triton.verify = timed
layer(x)[0].sum().backward()
print(len(measured), *took)
"""


def test_a_second_process_only_reads(tmp_path):
    environment = os.environ | {"SEQCELLS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    for measured in (2, 0):
        command = [sys.executable, "-c", PROGRAM]
        out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        count, *took = map(float, out.split())
        print(f"{count:.0f} verified, in ms:", *(f"{1e3 * t:.2f}" for t in took))
        assert count == measured and len(took) == 2
    assert sum(took) < 0.05  # measured: 3 to 5 ms

"""The files of verdicts and of measurements: what is killed, full, read-only or foreign costs at most a measurement."""

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
from seqcells import dispatch, fallback, kernel_check, measured, tuning, verdicts
from seqcells.verdicts import MEASUREMENTS, VERDICTS, Verdict

verification = importlib.import_module("seqcells.verification")  # the class hides the module
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=[VERDICTS, MEASUREMENTS], ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNEL_DEVICES", ("cpu", "cuda"))
    for name in ("_failed", "refused_kernels"):
        monkeypatch.setattr(fallback, name, set())
    verification.forget()
    measured.forget()
    verdicts._warn_once.cache_clear()
    yield
    verification.forget()
    measured.forget()


def in_a_child(call):
    """Run call() in a forked process, and return its id."""
    if pid := os.fork():
        return pid
    try:
        call()
    finally:
        os._exit(0)


def expected(n, kind):
    return Verdict(n % 3 > 0, float(n), f"tensor {n}") if kind is VERDICTS else {"aten": 1.0 + n, "triton:grid": 0.5}


def read(file, kind):
    """What is in a file, of which nothing may be wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verdicts.read(file, kind)
    assert all(of == expected(int(key), kind) for key, of in found.items())
    return found


@pytest.mark.parametrize("times", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(times, kind, tmp_path):
    file, chance, sizes = tmp_path / "found.json", random.Random(0), set()

    def write(first):
        for n in range(first, 10_000):
            verdicts.add(file, {str(n % 40): expected(n % 40, kind)}, kind)

    for _ in range(times):
        pid = in_a_child(partial(write, chance.randrange(40)))
        time.sleep(chance.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        sizes.add(len(read(file, kind)))
    assert len(sizes) > 1
    verdicts._STALE, stale = -1.0, verdicts._STALE
    try:
        verdicts.add(file, {"0": expected(0, kind)}, kind)
    finally:
        verdicts._STALE = stale
    assert os.listdir(tmp_path) == [file.name], "what killed processes left is removed"


def test_two_writers_at_once(kind, tmp_path):
    file = tmp_path / "found.json"

    def write(first):
        for n in range(first, 200, 2):
            verdicts.add(file, {str(n): expected(n, kind)}, kind)

    children = [in_a_child(partial(write, first)) for first in (0, 1)]
    for pid in children:
        os.waitpid(pid, 0)
    found = read(file, kind)
    assert {"198", "199"} & set(found) and len(found) >= 100, "at worst, some are measured again"
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("step", ["open", "write", "rename"])
def test_a_full_disk(step, kind, monkeypatch, tmp_path):
    file = tmp_path / "found.json"
    verdicts.add(file, {"1": expected(1, kind)}, kind)

    def full(*arguments, **options):
        if step == "write":
            arguments[1].write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    where, name = {"open": (tempfile, "mkstemp"), "write": (json, "dump"), "rename": (os, "replace")}[step]
    monkeypatch.setattr(where, name, full)
    verdicts.add(file, {"2": expected(2, kind)}, kind)
    monkeypatch.undo()
    assert set(read(file, kind)) == {"1"} and os.listdir(tmp_path) == [file.name]


WRONG_FILES = {
    "empty": "",
    "cut": '{"version": 1, "verdicts": {"a": {"good": tr',
    "binary": "\udc80\udcff",
    "another program's": '[{"name": "x"}]',
    "a number": "3",
    "another version": '{"version": 2, "verdicts": {}, "measurements": {}}',
    "nothing": '{"version": 1}',
    "another kind": '{"version": 1, "verdicts": {"a": true}, "measurements": {"a": true}}',
    "more in it": '{"version": 1, "verdicts": {"a": {"good": true, "worst": 1, "tensor": "y", "more": 2}}}',
    "a verdict that is a string": '{"version": 1, "verdicts": {"a": {"good": "yes", "worst": 1, "tensor": "y"}}}',
    "an unknown backend": '{"version": 1, "measurements": {"a": {"aten": 1, "other": 2}}}',
    "one that is never measured": '{"version": 1, "measurements": {"a": {"reference": 1}}}',
    "no number": '{"version": 1, "measurements": {"a": {"aten": NaN, "loop": 1}}}',
    "no time": '{"version": 1, "measurements": {"a": {"aten": true, "loop": -1}}}',
    "a number beyond all": (
        '{"version": 1, "verdicts": {"a": {"good": true, "worst": HUGE, "tensor": "y"}}, '
        '"measurements": {"a": {"aten": HUGE}}}'
    ).replace("HUGE", "1" + "0" * 400),
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("content", WRONG_FILES)
def test_other_files(content, kind, tmp_path):
    file = tmp_path / "found.json"
    file.write_bytes(WRONG_FILES[content].encode(errors="surrogateescape"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert verdicts.read(file, kind) == verdicts.read(file, kind) == {}
    assert len(said) == (content != "empty")
    for warning in said:
        message = str(warning.message)
        assert str(file) in message and f"is not a file of {kind.name}" in message
        assert "ignored and will be replaced" in message
    verdicts.add(file, {"1": expected(1, kind)}, kind)
    assert set(read(file, kind)) == {"1"}


@pytest.mark.parametrize("where", ["nowhere", "no home", "below a file", "read-only", "a folder is there"])
def test_nowhere_to_write(where, kind, monkeypatch, tmp_path):
    """The kernels are verified, and calls measured, in each process."""
    monkeypatch.setenv("SEQCELLS_CACHE", "")
    if where == "no home":
        monkeypatch.delenv("SEQCELLS_CACHE")
        monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *names, **options: "~/.cache/seqcells")
    elif where != "nowhere":
        (tmp_path / "file").write_text("")
        place = {"below a file": tmp_path / "file" / "more", "read-only": Path("/proc/seqcells")}
        monkeypatch.setenv("SEQCELLS_CACHE", str(place.get(where, tmp_path)))
    if where == "a folder is there":
        verdicts.path(torch.device(DEVICE), kind).mkdir()
    layer, x, count = seqcells.GRU(3, 4, device=DEVICE), torch.randn(3, 2, 3, device=DEVICE), []
    module, name, call = (kernel_check, "measure", layer) if kind is VERDICTS else (tuning, "_medians", tuned)
    measure = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: count.append(given) or measure(*given))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for process in (1, 2):
            call(x)
            layer(x)
            assert len(count) == process
            verification.forget()
            measured.forget()
            measured.load()
    assert not Path("~").exists()


def tuned(x):
    """A GRU's call, measured on the CPU."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dispatch, "KERNEL_DEVICES", ("cuda",))
        return seqcells.tune(seqcells.GRU(3, 4), x.cpu())


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    assert verdicts.folder() == tmp_path
    monkeypatch.delenv("SEQCELLS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "seqcells"


@pytest.mark.parametrize("fact", ["device", "driver", "torch", "triton", "seqcells", "kernels"])
def test_a_file_for_each_device_and_version(fact, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    device = torch.device(DEVICE)
    known = verdicts.facts(device)
    assert known["torch"] == torch.__version__ and len(known["kernels"]) == 64
    before = verdicts.path(device, kind)
    monkeypatch.setattr(verdicts, "facts", lambda *given: known | {fact: "NVIDIA H100/80 GB"})
    after = verdicts.path(device, kind)
    assert after != before and after.parent == tmp_path and after.name.startswith(f"{kind.name}-")


def test_what_was_measured_on_a_cpu_depends_on_no_kernel():
    assert set(verdicts.facts(torch.device("cpu"), False)) == {"device", "torch", "seqcells"}


def test_removing_takes_the_files_of_all_versions(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    device, other = torch.device("cpu"), MEASUREMENTS if kind is VERDICTS else VERDICTS
    file = verdicts.path(device, kind)
    kept = [
        verdicts.path(device, other).name,
        file.name.replace(".json", "-more.json"),
        f"{kind.name}-other.json",
    ]
    old = file.name[: -len("0123456789abcdef.json")] + "0123456789abcdef.json"
    for name in (file.name, old, *kept):
        (tmp_path / name).write_text("")
    verdicts.remove(device, kind)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    verdicts.remove(device, kind)


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
    for first in (2, 0):
        command = [sys.executable, "-c", PROGRAM]
        out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        count, *took = map(float, out.split())
        print(f"{count:.0f} verified, in ms:", *(f"{1e3 * t:.2f}" for t in took))
        assert count == first and len(took) == 2
    assert sum(took) < 0.05  # measured: 3 to 5 ms

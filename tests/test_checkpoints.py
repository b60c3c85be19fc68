"""Checkpoints and results on disk: what is damaged or foreign is refused, and no failure loses what was there."""

import errno
import hashlib
import io
import os
import pickle
import random
import resource
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqcells.__main__ import main
from seqcells.tasks import TASKS, count_ones, echo, files, suite, training

# Of echo: a schedule, an optimizer with moments, windows and states of its own.
TINY = replace(
    echo.CASES["stateful"].quick, steps=4, inputs=5, hidden=5, symbols=7, batch=4, windows=3, test=6, exact=0.0
)
COUNTING = replace(count_ones.CASES["strings of 20"].quick, epochs=2, length=6, hidden=5, training=24, test=16, batch=8)


def echoing(steps, cell="gru"):
    """A run after so many steps, evaluated after each."""
    run = echo.start("stateful", cell, TINY, 0)
    run.steps = steps
    training.train(run)
    return run


def plain(value):
    """Tensors as lists, so that == compares all of it."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def sealed(state):
    """A file with the right header and checksum, whatever is in it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return training.HEADER + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


@pytest.fixture(scope="module")
def state():
    return echoing(3).state_dict()


@pytest.fixture(scope="module")
def whole(state):
    return sealed(state)


def refused(run, path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        run.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_no_flipped_bit_and_no_other_length_is_taken(tmp_path, state, whole):
    path, run, draw = tmp_path / "run.pt", echoing(1), random.Random(0)
    before = plain(run.state_dict())
    for bit in [*range(8), *draw.sample(range(len(whole) * 8), 600), len(whole) * 8 - 1]:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        refused(run, path, bytes(content), "is damaged|is not a checkpoint")
    for length in [*range(1, 80), *draw.sample(range(len(whole)), 50), len(whole) - 1]:
        refused(run, path, whole[:length], "is damaged")
    for more in (b"\0", b"\n", whole):
        refused(run, path, whole + more, "is damaged")
    refused(run, path, b"", "is empty")
    assert plain(run.state_dict()) == before
    path.write_bytes(whole)
    run.load(path)
    assert run.done == 3 and plain(run.state_dict()) == plain(state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", {}),
        ("model", {"head.weight": torch.zeros(7, 5), "head.bias": torch.zeros(9)}),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("schedule", None),
        ("generator", torch.zeros(3, dtype=torch.uint8)),
        ("rng", torch.zeros(3, dtype=torch.uint8)),
        ("rows", [{"step": 1}]),
        ("extra", {"windows": None}),
        *((key, "left out") for key in ("model", "optimizer", "schedule", "generator", "rng", "cuda", "done", "extra")),
    ],
)
def test_a_load_that_fails_on_the_way_changes_nothing(key, value, state, tmp_path):
    wrong = state | {key: value}
    if value == "left out":
        del wrong[key]
    run = echoing(2)
    torch.manual_seed(5)  # not the checkpoint's
    before = plain(run.state_dict())
    refused(run, tmp_path / "run.pt", sealed(wrong), "does not fit this run")
    assert plain(run.state_dict()) == before
    run.steps = 3
    training.train(run)  # and it goes on, to the same end
    assert plain(run.model.state_dict()) == plain(state["model"])


def test_another_runs_checkpoint_and_none_at_all(tmp_path, whole):
    run = echoing(0, "lstm")
    refused(run, tmp_path / "run.pt", whole, "was written by another run: .*'gru'.* this one is .*'lstm'")
    refused(run, tmp_path / "run.pt", sealed([1, 2]), "holds no state of a run")
    with pytest.raises(FileNotFoundError):
        run.load(tmp_path / "none.pt")


# What a write meets: where, and with what.
FAILURES = [("open", errno.EROFS), ("open", errno.EACCES), ("fsync", errno.ENOSPC), ("replace", errno.EACCES)]


def fail(monkeypatch, where, error):
    def failing(*args, **options):
        raise error

    if where == "open":
        monkeypatch.setattr(files, "open", failing, raising=False)
    else:
        monkeypatch.setattr(files.os, where, failing)


@pytest.mark.parametrize(("where", "code"), FAILURES)
def test_a_failed_write_keeps_what_was_there(where, code, tmp_path, monkeypatch):
    path, run = tmp_path / "run.pt", echoing(1)
    run.save(path)
    kept = path.read_bytes()
    with monkeypatch.context() as patched:
        fail(patched, where, OSError(code, os.strerror(code)))
        with pytest.raises(OSError, match=f"cannot write {path}: {os.strerror(code)}; "):
            run.save(path)
    with monkeypatch.context() as patched:
        fail(patched, where, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run.save(path)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]


def test_a_file_that_could_be_written_in_part_only(tmp_path):
    """By the system's own limit: the first 4096 bytes are written."""
    path, limits = tmp_path / "run.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    files.write(path, b"before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*: File too large"):
            files.write(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_links_are_not_followed(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "out" / "run.pt"
    victim.write_bytes(b"victim")
    path.parent.mkdir()
    path.symlink_to(victim)
    files.write(path, b"content")
    assert not path.is_symlink() and path.read_bytes() == b"content"
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "known")  # as if it had been guessed
    (path.parent / ".seqcells-known.tmp").symlink_to(victim)
    with pytest.raises(OSError, match=r"cannot write .*File exists"):
        files.write(path, b"more")
    assert victim.read_bytes() == b"victim" and path.read_bytes() == b"content"


def test_temporary_names_are_not_predictable_and_permissions_follow_the_umask(tmp_path, monkeypatch):
    names, rename = [], os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: names.append(a.name) or rename(a, b))
    before = os.umask(0o027)
    try:
        for _ in range(3):
            files.write(tmp_path / "new" / "run.pt", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "run.pt").stat().st_mode & 0o777 == 0o640
    assert len(set(names)) == 3 and all(len(n) > 20 for n in names)


WRITER = """
import runpy, sys
from pathlib import Path

write, content, path = runpy.run_path(sys.argv[1])["write"], Path(sys.argv[2]).read_bytes(), Path(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    write(path, content)
"""


def test_two_processes_that_save_to_one_file(tmp_path, state, whole):
    """Checkpoints of different sizes, so that a mixture would show; read all the while."""
    path, longer = tmp_path / "out" / "run.pt", sealed(state | {"done": 4, "more": torch.arange(10_000)})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = []
    for number, content in enumerate((whole, longer)):
        (tmp_path / str(number)).write_bytes(content)
        command = [sys.executable, "-c", WRITER, files.__file__, str(tmp_path / str(number)), str(path)]
        writers.append(subprocess.Popen(command, **pipes))
    for writer in writers:
        assert writer.stdout.readline() == "ready\n", writer.stderr.read()
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = []
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.append(training.read_checkpoint(path, state["identity"])["done"])
    for writer in writers:
        _, error = writer.communicate()
        assert writer.returncode == 0 and error == ""
    assert set(seen) == {3, 4} and list(path.parent.iterdir()) == [path]


# The command line.


@pytest.fixture
def counting(monkeypatch):
    """count-ones alone, small, by an LSTM and a GRU; quick and full differ in the number of epochs."""
    ((name, case),) = count_ones.CASES.items()
    tiny = replace(case, quick=COUNTING, full=replace(COUNTING, epochs=3), cells=("lstm", "gru"), seeds=(0,))
    monkeypatch.setattr(count_ones, "CASES", {name: tiny})
    monkeypatch.setattr(suite, "TASKS", {"count-ones": count_ones})


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(suite, "train", lambda *a, **k: pytest.fail("training began"))


def command(*more):
    return ["run", "count-ones", "--device", "cpu", *(str(m) for m in more)]


def fails(capsys, arguments, *parts):
    """Exit status 2 and one line on stderr, with those parts."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert all(str(part) in error for part in parts), error


def checkpoint(folder, cell="lstm", full=False):
    (job,) = suite.jobs("count-ones", cells=[cell], full=full)
    return job.checkpoint(folder, None)


def saved(value, save=torch.save):
    buffer = io.BytesIO()
    save(value, buffer)
    return buffer.getvalue()


WRONG = {
    "empty": (b"", "is empty"),
    "cut": (lambda good: good[: len(good) // 2], "is damaged"),
    "longer": (lambda good: good + b"\0", "is damaged"),
    "of torch.save": (saved({"model": torch.zeros(3)}), "is not a checkpoint of this version"),
    "without header": (lambda good: good[len(training.HEADER) + 32 :], "is not a checkpoint of this version"),
    "a pickle": (saved([1, 2], pickle.dump), "is not a checkpoint of this version"),
    "random": (random.Random(0).randbytes(5000), "is not a checkpoint of this version"),
    "sealed": (sealed({"model": torch.zeros(3)}), "holds no state of a run"),
    "of another run": (sealed({"identity": {"task": "echo"}}), "was written by another run"),
    "a directory": (os.mkdir, "it is a directory"),
    "a pipe": (os.mkfifo, "it is not a regular file"),
}


def identity(path):
    """What changes when a file is replaced or written, but not when it is read (the access time)."""
    found = path.lstat()
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@pytest.mark.parametrize("what", WRONG)
def test_resume_refuses_it_in_one_line_before_any_run_is_trained(what, tmp_path, capsys, counting, request):
    assert main(command("--save", tmp_path)) == 1
    content, message = WRONG[what]
    path = checkpoint(tmp_path, "gru")  # the second of two
    good, other = path.read_bytes(), checkpoint(tmp_path, "lstm").read_bytes()
    path.unlink()
    if content in (os.mkdir, os.mkfifo):
        content(path)
    else:
        path.write_bytes(content(good) if callable(content) else content)
    before = identity(path)
    request.getfixturevalue("untrained")
    fails(capsys, command("--save", tmp_path, "--resume"), path, message, "another folder")
    assert identity(path) == before and checkpoint(tmp_path, "lstm").read_bytes() == other
    assert len(list(tmp_path.iterdir())) == 2


def test_save_without_resume_replaces_nothing(tmp_path, capsys, counting, request):
    assert main(command("--save", tmp_path, "--cell", "gru")) == 1
    path = checkpoint(tmp_path, "gru")
    kept = path.read_bytes()
    assert main(command("--save", tmp_path, "--cell", "gru", "--full")) == 1  # has a file of its own
    assert {path, checkpoint(tmp_path, "gru", full=True)} == set(tmp_path.iterdir())
    request.getfixturevalue("untrained")  # the first of the two jobs has no checkpoint: it does not begin either
    fails(capsys, command("--save", tmp_path), path, "is there already", "--resume", "remove it", "another folder")
    assert path.read_bytes() == kept and len(list(tmp_path.iterdir())) == 2


def test_each_recipe_resumes_its_own(tmp_path, capsys, counting):
    for more in ((), ("--full",), ("--dtype", "float64")):
        assert main(command("--save", tmp_path, "--resume", "--cell", "gru", *more)) == 1
        assert "starts from the beginning: there is no" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 3
    for more, done in (((), 6), (("--full",), 9), (("--dtype", "float64"), 6)):
        assert main(command("--save", tmp_path, "--resume", "--cell", "gru", *more)) == 1
        assert f"resumed after step {done}" in capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoints_name_says_what_the_run_is(task):
    names = []
    for full in (False, True):
        for job in suite.jobs(task, full=full):
            names.append((job.checkpoint(Path(), None).name, job.recipe))
            assert " " not in names[-1][0]
    assert len({n for n, _ in names}) == len({(n[:-12], repr(r)) for n, r in names}) > len(names) // 2
    job = next(suite.jobs(task))
    for dtype in (None, torch.float64):
        run = job.task.start(job.case, job.cell, job.recipe, job.seed, dtype=dtype)
        assert run.identity == job.identity(dtype)


@pytest.mark.parametrize(("where", "code"), FAILURES)
def test_a_disk_that_fails_in_training(where, code, tmp_path, capsys, counting, monkeypatch):
    """At the second checkpoint: the first is kept, and the run goes on from it."""
    arguments, write, count = command("--save", tmp_path / "ck", "--cell", "gru"), files.write, []

    def failing(path, content):
        count.append(path)
        with monkeypatch.context() as patched:
            if len(count) == 2:
                fail(patched, where, OSError(code, os.strerror(code)))
            write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", failing)
        path = checkpoint(tmp_path / "ck", "gru")
        fails(capsys, arguments, f"cannot write {path}: {os.strerror(code)}", f"--save {tmp_path / 'ck'} --resume")
    assert list(path.parent.iterdir()) == [path]
    assert main([*arguments, "--resume"]) == 1
    assert "resumed after step 3" in capsys.readouterr().out


OUTPUTS = ("--json", "--table", "--plot")


@pytest.mark.parametrize("option", [*OUTPUTS, "--save"])
def test_what_cannot_be_written_is_found_before_training(option, tmp_path, capsys, counting, untrained, monkeypatch):
    kept, path = tmp_path / "kept.png", tmp_path / "new" / "a.png"
    kept.write_text("kept")
    fails(capsys, command(option, kept / "a.png"), "cannot write", kept, ": Not a directory; " * (option == "--save"))
    if option == "--save":
        fails(capsys, command(option, kept), "cannot write", f"{kept} is not a folder")
    else:
        fails(capsys, command(option, tmp_path), f"cannot write {tmp_path}: it is a directory")
        fails(capsys, command(option, "/dev/null"), "cannot write /dev/null: it is not a regular file")
        with monkeypatch.context() as patched:
            patched.setattr(files.os, "access", lambda path, mode: False)  # permissions mean nothing to root
            fails(capsys, command(option, kept), f"cannot write {kept}: it is read-only")
    for where, code in FAILURES[:3]:
        with monkeypatch.context() as patched:
            fail(patched, where, OSError(code, os.strerror(code)))
            fails(capsys, command(option, path), f"cannot write {path}", os.strerror(code))
    assert kept.read_text() == "kept" and Path("/dev/null").is_char_device()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [kept]


def test_a_picture_that_cannot_be_drawn_is_found_before_training(tmp_path, capsys, counting, untrained, monkeypatch):
    fails(capsys, command("--plot", tmp_path / "a.xyz"), tmp_path / "a.xyz", "'xyz' is not supported", "png")
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    fails(capsys, command("--plot", tmp_path / "a.png"), "pip install matplotlib")
    broken = types.ModuleType("matplotlib")  # there, but without what it needs

    def missing(name):
        raise ImportError(f"cannot import name {name!r}:\nbuilt for another NumPy")

    broken.__getattr__ = missing
    monkeypatch.setitem(sys.modules, "matplotlib", broken)
    fails(capsys, command("--plot", tmp_path / "a.png"), "pip install matplotlib", "built for another NumPy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--backend", "trition"), "unknown backend 'trition': expected one of auto, triton"),
        (("--backend", "aten", "--cell", "lstm", "gru-before"), "torch has no fused gru_before"),
        (("--device", "h100"), "unknown device 'h100': expected cpu, cuda"),
        (("--device", "cuda:77"), "--device cuda:77: "),
        (("--device", "hpu"), "--device hpu: "),
        (
            ("--cell", "rnn"),
            "nothing to run: count-ones, case strings of 20, is for lstm, gru, gru-before, not",
        ),
    ],
)
def test_what_cannot_run_is_found_before_training(more, words, capsys, untrained):
    fails(capsys, ["run", "count-ones", "--device", "cpu", *more], words)


def test_results_replace_the_ones_before_and_leave_nothing_else(tmp_path, capsys, counting, monkeypatch):
    paths = {option: tmp_path / name for option, name in zip(OUTPUTS, ("r.json", "t.md", "p.svg"), strict=True)}
    for path in paths.values():
        path.write_text("before")
    arguments = command("--cell", "gru", "--save", tmp_path / "ck", *(a for pair in paths.items() for a in pair))
    with monkeypatch.context() as patched:  # the disk is full once the run is trained
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patched.setattr(suite, "as_json", lambda outcomes: fail(patched, "fsync", full) or "")
        fails(capsys, arguments, f"cannot write {paths['--json']}: No space left", "--resume goes on")
    assert {p.read_text() for p in paths.values()} == {"before"}
    assert main([*arguments, "--resume"]) == 1
    assert "resumed after step 6" in capsys.readouterr().out
    assert paths["--json"].read_text().startswith("[") and paths["--table"].read_text().startswith("# The task suite")
    assert "<svg" in paths["--plot"].read_text()
    assert set(tmp_path.iterdir()) == {*paths.values(), tmp_path / "ck"}

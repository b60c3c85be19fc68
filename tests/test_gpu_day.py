"""benchmarks/gpu.py where things go wrong, without a GPU: kernels that hang, processes that die or are killed, no time
left, sanitizers; and benchmarks/calibrate.py on times whose constants are known."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from corrupted import Corrupted

import seqcells
from seqcells import kernel_check
from seqcells.cell import named
from seqcells.kernels import devices

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import calibrate
import checked
import gpu
import jobs
import launched

BENCHMARKS = Path(jobs.__file__).parent
OWN = """
def stuck(how):
    sys.path[:0] = [TESTS, str(ROOT / "benchmarks")]
    import corrupted, launched, pytest, types
    corrupted.Corrupted(pytest.MonkeyPatch(), "hang", "backward")
    if how == "die":
        corrupted.time = types.SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), 11))
    launched.Launches(Path(sys.argv[2])).watch()
    return parity("gru", "triton:resident", "float32", [2, 3, 2, 5], "cpu", verify=False)

JOBS = {
    "answer": lambda n: {"n": n}, "hang": lambda: time.sleep(600), "die": lambda: os._exit(3), "fail": lambda: 1 / 0,
    "lose": lambda: {"failed": "CUDA error: an illegal memory access"}, "stuck": stuck, **JOBS,
}
"""


@pytest.fixture
def own_jobs(tmp_path, monkeypatch):
    """benchmarks/jobs.py with jobs of its own: one that answers, one that never does, one whose process dies, and one
    whose kernel does."""
    source = (
        Path(jobs.__file__)
        .read_text()
        .replace("parent.parent\n", f"parent.parent\nROOT = Path({str(jobs.ROOT)!r})\n", 1)
    )
    own = OWN.replace("TESTS", repr(str(Path(__file__).parent)))
    source = source.replace("\ndef result(", f"{own}\n\ndef result(", 1)
    (tmp_path / "launched.py").write_text(Path(launched.__file__).read_text())
    path = tmp_path / "jobs.py"
    path.write_text(source)
    monkeypatch.setattr(jobs, "__file__", str(path))


class Impatient(jobs._Worker):
    """Takes the time for up once the kernel that hangs was launched, and not before, however slow the machine is."""

    @property
    def deadline(self):
        return 0.0 if self.job.get("how") == "hang" and "backward_kernel" in self.last() else float("inf")

    @deadline.setter
    def deadline(self, when):
        pass


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's launches are the fake")
def test_a_job_that_hangs_or_dies_is_named_and_the_next_begins(own_jobs, monkeypatch):
    """Of a kernel that hangs, and of one that takes its process with it, the variant; the next job is not told."""
    monkeypatch.setattr(jobs, "_Worker", Impatient)
    asked = [{"do": "stuck", "how": "hang"}, {"do": "stuck", "how": "die"}, {"do": "die"}, {"do": "fail"}]
    asked += [{"do": "lose"}, *({"do": "answer", "n": n} for n in range(3))]
    found = {tuple(job.values()): result for job, result in jobs.run(asked, 2, 40, time.monotonic() + 200, True)}
    assert len(found) == len(asked)
    for how, start in (("hang", "no result after 40 s: stopped"), ("die", "its process ended with -11")):
        text = found["stuck", how]["failed"]
        assert text.startswith(f"{start}; launched last: resident_backward.backward_kernel ")
        assert " | before it: resident.forward_kernel " in text and "16x8x16, " in text
        assert "H=5, B=3" in text and "float32" in text
    assert found["die",]["failed"] == "its process ended with 3"
    assert found["fail",]["failed"].startswith("ZeroDivisionError")
    assert "illegal memory access" in found["lose",]["failed"]
    assert [found["answer", n] for n in range(3)] == [{"n": n} for n in range(3)]


def test_launches_are_kept_in_order(tmp_path):
    page = launched.Launches(tmp_path / "page")
    assert launched.last(tmp_path / "page") == [] == launched.last(tmp_path / "none")
    for n in (1, 2, 3, 2):
        page.say(str(n))
    assert launched.last(tmp_path / "page") == ["2", "3", "1"]
    for n in range(20):
        page.say(str(n))
    assert launched.last(tmp_path / "page") == [str(n) for n in range(19, 11, -1)]
    page.clear()
    assert launched.last(tmp_path / "page") == []


def test_no_job_begins_after_the_deadline():
    asked = [{"do": "probe", "name": "ceilings", "device": "cpu", "dry": True}] * 3
    assert [found for _, found in jobs.run(asked, 2, 10, time.monotonic() - 1)] == [{"not_reached": True}] * 3


def options(out, **others):
    chosen = {"device": "cpu", "dry": False, "minutes": 8.0, "part": None, "case": ["count-ones"]}
    return argparse.Namespace(out=out, **(chosen | others))


def test_the_whole_ends_in_time(own_jobs, tmp_path, monkeypatch):
    """Where every job hangs, each part ends by its share of the time, and what was not reached is said."""
    monkeypatch.setattr(jobs, "GRACE", 0.2)
    hang = [{"do": "hang"}] * 4
    monkeypatch.setattr(
        checked,
        "checks",
        lambda dry: iter([h | {"cell": "lstm", "backend": "b", "kind": "k", "shape": []} for h in hang]),
    )
    monkeypatch.setattr(
        gpu,
        "kernels",
        lambda dry: iter(
            [h | {"size": [n, 2, 3], "cell": "", "direction": "", "dtype": ""} for n, h in enumerate(hang)]
        ),
    )
    report = gpu.Report(tmp_path, "a test")
    run = gpu.Run(options(tmp_path, minutes=0.05, part=["parity", "compute-sanitizer", "kernels", "ceilings"]), report)
    started = time.monotonic()
    run.perform()
    assert time.monotonic() - started < 5
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["ends in"] == "" and found["parts"]["parity"]["not reached"] == 4
    assert list(found["parts"]["kernels"].values()) == [{"not_reached": True}] * 4
    assert found["parts"]["ceilings"] == {"not_reached": True}


def test_killed_it_leaves_what_it_found_and_where_it_was(tmp_path):
    """kill -9 of gpu.py: the file is whole and says in which part it ends; the processes of its jobs end, too."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path), "--device", "cpu", "--dry"]
    command += ["--part", "device", "--part", "parity"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    children, lines = [], iter(run.stderr)
    while not next(lines).startswith("parity ..."):
        pass
    while not children:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.kill()
    run.wait()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["ends in"] == "parity" and found["parts"]["device"]["cores"]
    assert "it ends in the part parity." in (tmp_path / "gpu.md").read_text()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "its workers go on"
        time.sleep(0.1)


SANITIZER = """#!/bin/sh
[ "$1" = --tool ] && [ "$3 $4" = "--error-exitcode 9" ] && [ "$6" = benchmarks/jobs.py ] || exit 2
echo "$7" > {folder}/$2.$$.json
case $2 in
racecheck) echo "========= RACECHECK SUMMARY: 2 hazards displayed"; exit 9;;
initcheck) sleep 60 & echo $! > {folder}/initcheck.$$.pid; wait;;
*) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


def test_compute_sanitizer(tmp_path, monkeypatch):
    """Its four tools on the smallest cases of every schedule; what it finds is shown; what hangs is ended wholly."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(folder=tmp_path))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(checked, "ENVIRONMENT", dict(os.environ))
    found = checked.sanitized(checked.sanitizers("cuda"), time.monotonic() + 1.5)
    assert len(found) == 12
    for name, said in found.items():
        what = name.split(",")[0]
        if what == "racecheck":
            assert said.startswith("ended with 9: ========= RACECHECK SUMMARY: 2 hazards")
        else:
            assert said == (
                "stopped: out of time" if what == "initcheck" else "ended with 0: ========= ERROR SUMMARY: 0 errors"
            )
    asked = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {job["backend"] for each in asked for job in each} == {*checked.SCHEDULES, "triton"}
    assert {job["do"] for each in asked for job in each} == {"parity", "stack"}
    assert max(max(job["shape"]) for each in asked for job in each) < 40
    pids = [int(file.read_text()) for file in tmp_path.glob("initcheck.*.pid")]
    time.sleep(0.3)
    assert len(pids) == 3 and not any(alive(pid) for pid in pids)
    assert "left out" in checked.sanitized(checked.sanitizers("cpu"), 0.0)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_most_in_doubt_comes_first():
    """The stepwise products of 16 bits, then stacks, masks and means over units; every built-in cell, schedule and
    dtype."""
    asked = list(checked.checks(dry=False))
    assert len({str(job) for job in asked}) == len(asked)
    assert [(j["cell"], j["backend"], j["kind"]) for j in asked[:2]] == [
        (c, "triton:stepwise", "bfloat16") for c in ("lstm", "gru")
    ]
    first = asked[:100]
    assert {j["cell"] for j in first if j["do"] == "stack"} >= {"lstm", "gru", "gru_before", "rnn_tanh"}
    assert {j["cell"] for j in first if j.get("dropout")} >= {"lstm", "gru", "dreamer_gru"}
    norms = {(j["cell"], j["backend"]) for j in first if not j.get("dropout")}
    assert norms >= {(c, b) for c in checked.NORMS for b in checked.SCHEDULES}, "exchanges of means never ran on a GPU"
    for name in checked.BUILT_IN:
        mine = {(j["backend"], j["kind"]) for j in asked if j["cell"] == name and j["do"] == "parity"}
        assert {b for b, _ in mine} == set(checked.SCHEDULES) and len({k for _, k in mine}) == 6
    assert {j["cell"] for j in asked} == {*seqcells.cells.__all__} and all(named(j["cell"]) for j in asked)


SMALL = {"cell": "lstm", "backend": "triton:resident", "kind": "float32", "shape": [2, 3, 2, 5], "device": DEVICE}


def test_parity_tells_a_false_alarm_from_a_wrong_kernel(monkeypatch):
    """What verification says is held against the errors of the whole scan."""
    right = jobs.parity(**SMALL)
    assert right["good"] and not right["refused"] and len(right["verdicts"]) == 6
    assert all(worst < 1 for _, worst, _ in right["verdicts"])
    with monkeypatch.context() as patches:
        Corrupted(patches, "y_ptr", "forward")
        wrong = jobs.parity(**SMALL)
    with monkeypatch.context() as patches:
        patches.setattr(kernel_check, "measure", lambda *arguments: kernel_check.Error(1.5, "y"))
        alarm = jobs.parity(**SMALL)
    assert not wrong["good"] and "please report this" in wrong["refused"]
    assert alarm["good"] and "its y is 1.5 times as far" in alarm["refused"]
    every = checked.Checked()
    for found in (right, wrong, alarm, right | {"good": False}, {"not_reached": True}, {"failed": "no result"}):
        every.add(SMALL, found)
    found = every.content()
    assert (found["within tolerance"], found["not reached"], len(found["wrong"])) == (2, 1, 3)
    assert len(found["verification"]["false alarms"]) == 1 and len(found["verification"]["wrong and not refused"]) == 1
    worst = max([1.5, *(w for _, w, _ in wrong["verdicts"])])
    assert f"of what is allowed, worst {worst:.2f} (lstm " in found["verification"]["triton:resident float32"]


def measured(planted, noise=0.0):
    """gpu.py's rows of the kernels that it times, with the times that the model gives with other constants."""
    device, rows = devices.KNOWN["H200"], {}
    generator = torch.Generator().manual_seed(0)
    for job in gpu.kernels(dry=False):
        name, backward, B, H = gpu.kernel_name(job), job["direction"] == "backward", *job["size"][:2]
        size = {"B": B, "H": H, "itemsize": 4 if job["dtype"] == "tf32" else 2, "schedule": job.get("schedule")}
        try:
            chosen = calibrate.plans.plan(calibrate.cells.get(job["cell"]), device=device, backward=backward, **size)
        except ValueError:
            continue
        row = {"measured": 1.0, "plan": "", "tile": {key: getattr(chosen, key) for key in jobs.TILE}}
        clocks = calibrate.kernel(name, row, device).clocks(planted)
        off = 1 + noise * (2 * float(torch.rand((), generator=generator)) - 1)
        rows[name] = row | {"measured": off * clocks / device.clock / 1000}
    facts = {"gpu": "NVIDIA H200", "capability": "90", "processors": "132", "shared": str(device.shared)}
    return {"command": "", "parts": {"device": facts, "kernels": rows}}


PLANTED = {
    "CHAIN": 400.0, "LINK": 20.0, "BARRIER": 1500.0, "LAUNCH": 3.0,
    "EXCHANGE_RATE": 30.0, "MEMORY_RATE": 20.0, "SHARED_RATE": 80.0, "ACTIVATION_RATE": 11.0,
}  # fmt: skip


def test_planted_constants_are_found():
    """Exactly where times have no noise; and what noise of 3 % leaves is within the range that is printed."""
    content = measured(PLANTED)
    kernels, left = calibrate.read(content, "sm_90")
    assert not left and len(kernels) > 90 and {k.schedule for k in kernels} == {"resident", "grid", "stepwise"}
    found = calibrate.fit(kernels)
    assert found == pytest.approx(PLANTED, rel=0.03)
    only = calibrate.fit(kernels, ["BARRIER"])
    assert {n for n, v in only.items() if v != calibrate.NOW[n]} == {"BARRIER"}
    noisy, _ = calibrate.read(measured(PLANTED, 0.03), "sm_90")
    found, between = calibrate.fit(noisy), calibrate.ranges(noisy, calibrate.NAMES, 20)
    for name in ("BARRIER", "LAUNCH", "CHAIN"):
        assert found[name] == pytest.approx(PLANTED[name], rel=0.15)
        assert between[name][0] * 0.95 < PLANTED[name] < between[name][1] * 1.05, name
    others = calibrate.left_out(noisy, calibrate.NAMES)
    assert max(abs(ratio - 1) for ratio in others) < 0.15, "kernels of other shapes are predicted"


def test_the_model_of_a_timed_kernel_is_the_plans():
    """The parts add up to what the plan says, with the constants in cost.py."""
    for k in calibrate.read(measured(calibrate.NOW), "sm_90")[0]:
        device, (name, direction, dtype, batch, hidden, *_) = devices.KNOWN["H200"], k.name.split()
        size = {"B": int(batch[2:]), "H": int(hidden[2:]), "itemsize": 4 if dtype == "tf32" else 2}
        chosen = calibrate.plans.plan(
            calibrate.cells.get(name), device=device, backward=direction == "backward", schedule=k.schedule, **size
        )
        if chosen.programs <= device.processors:  # else programs share processors, or U comes from memory
            assert k.clocks(calibrate.NOW) == pytest.approx(chosen.microseconds * device.clock * 1000)


def test_calibrate_says_what_it_cannot_use():
    """Rows of any age; a kernel whose tile the plan does not have; cases that torch.nn is faster at."""
    tile = dict.fromkeys(jobs.TILE) | {"schedule": "grid", "block_h": 16, "block_b": 4, "num_warps": 4}
    rows = {
        "lstm train bfloat16 B=16 H=512": "2.462 us a step, the plan's model 1.274 (grid 16x8, 4 warps)",
        "lstm train bfloat16 B=8 H=64": {"measured": 0.4, "plan": "resident 64x8, 4 warps"},
        "lstm train bfloat16 B=8 H=32": {"measured": 0.4, "plan": "resident 32x8, 8 warps"},
        "gru train bfloat16 B=8 H=512": {"measured": 2.0, "plan": "", "tile": tile},
        "gru infer bfloat16 B=8 H=64": {"not_reached": True},
        "gru infer bfloat16 B=8 H=32": {"failed": "no result after 40 s: stopped"},
    }
    case = {"name": "lstm inference float16 T=10", "us_a_step": 3.3, "floor_us_a_step": 2.9, "seconds": 3.3}
    grid = [case | {"provider": "triton"}, case | {"provider": "torch.nn", "seconds": 2.5}]
    kernels, left = calibrate.read({"parts": {"kernels": rows}}, "sm_90")
    assert [k.name for k in kernels] == list(rows)[:2]
    old, new = kernels
    assert old.amounts["SHARED_RATE"] > 0 and new.amounts["SHARED_RATE"] == 0, "U was in shared memory, is in registers"
    assert left.keys() == {*list(rows)[2:]} and left["gru infer bfloat16 B=8 H=64"] == "not reached"
    assert "no such tile now" in left["gru train bfloat16 B=8 H=512"]
    text = calibrate.report([{"kernels": rows, "grid": grid}], "sm_90", 2, calibrate.NAMES)
    assert (
        "1.32 of torch.nn's time (3.30 us a step, 1.1 times the plan's model, 2.90 us; torch.nn 2.50 us: less" in text
    )
    assert "| LAUNCH | 5 |  | | | not fitted" in text and "- gru train bfloat16 B=8 H=512: the plan has no" in text
    assert "0 kernels" in calibrate.report({"parts": {}}, "sm_90", 2, calibrate.NAMES)


def test_calibrate_reads_what_an_h200_gave():
    content = json.loads((BENCHMARKS / "results" / "gpu-h200.json").read_text())
    kernels, left = calibrate.read(content, "sm_90")
    assert len(kernels) == 78 and not left
    groups = calibrate.errors(kernels, calibrate.NOW, [1.0] * 78)
    assert "| grid forward | 28 |" in groups and "| all | 78 |" in groups
    assert any("1.33 of torch.nn's time" in line for run in content for line in calibrate.slower(run))

"""Large and small: 70,000 steps, 2^31 elements, two devices, two streams, 14 processors, compute capability 7.5.

Without a GPU: kernels are interpreted on buffers of which only a few pages exist, devices are facts, and what a T4
would run is compiled.
"""

import importlib
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import CELLS
from test_kernels import scan_arguments
from torch._subclasses import FakeTensorMode
from triton.runtime import interpreter

import seqcells
from seqcells import fallback, functional, testing, verdicts
from seqcells.engines.triton import plan_for
from seqcells.kernels import cells, recompute, resident, resident_backward, scan
from seqcells.kernels.devices import KNOWN, present
from seqcells.kernels.plan import plan
from seqcells.testing import Shape

verification = importlib.import_module("seqcells.verification")  # the class hides the module
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="interprets kernels on buffers that do not exist")


def virtual(shape, dtype):
    """Zeros, of which a page takes memory once it is touched."""
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class LastTile:
    """A launcher of the last batch tile alone, on virtual buffers in place of meta tensors, which it keeps.

    Every address is held against the buffers before it is used: an offset that does not fit 32 bits lies outside, or it
    would where a process dies. steps: which launches, by what they say of their step.
    """

    def __init__(self, steps=lambda given: True):
        self.buffers, self.steps, self.launches, self.farthest = {}, steps, 0, {}

    def run(self, launch):
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def noted_load(this, pointers, mask, *rest):
            self.check(pointers, mask)
            return load(this, pointers, mask, *rest)

        def noted_store(this, pointers, value, mask, *rest):
            self.check(pointers, mask)
            return store(this, pointers, value, mask, *rest)

        def number(this, axis):
            return interpreter.TensorHandle(np.array([self.place[axis]], np.int32), tl.int32)

        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(builder, "create_masked_load", noted_load)
            patches.setattr(builder, "create_masked_store", noted_store)
            patches.setattr(builder, "create_get_program_id", number)
            # It would copy each buffer onto itself, all of it.
            patches.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
            scan.run(launch)

    def real(self, t):
        if not isinstance(t, torch.Tensor) or t.device.type != "meta":
            return t
        if id(t) not in self.buffers:
            self.buffers[id(t)] = t, virtual(t.shape, t.dtype)  # the meta tensor, too: it keeps its id
        return self.buffers[id(t)][1]

    def __call__(self, launch):
        if not self.steps(launch.arguments):
            return
        self.launches += 1
        given = {name: self.real(value) for name, value in launch.arguments.items()}
        every = [t for t in given.values() if isinstance(t, torch.Tensor) and t.numel()]
        self.ends = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in every)
        # Batch tiles are the first axis of `resident` and `recompute`, the second of what spreads units.
        first = launch.kernel in (resident.forward_kernel, resident_backward.backward_kernel, recompute.kernel)
        for unit in range(1 if first else launch.grid[0]):
            self.place = [launch.grid[0] - 1, 0, 0] if first else [unit, launch.grid[1] - 1, 0]
            self.run(launch._replace(grid=(1,), arguments=given))

    def check(self, pointers, mask):
        touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if not touched.size:
            return
        starts = np.array([begin for begin, _ in self.ends])
        of = np.searchsorted(starts, touched, side="right") - 1
        ends = np.array([end for _, end in self.ends])
        assert (of >= 0).all() and (touched < ends[of]).all(), "an address outside every buffer"
        for n in np.unique(of):
            last = int((touched[of == n] - starts[n]).max())
            self.farthest[int(starts[n])] = max(last, self.farthest.get(int(starts[n]), 0))

    def reached(self, t):
        """How far into a buffer, in bytes, and whether that is its last element."""
        t = self.real(t)
        farthest = self.farthest[t.data_ptr()]
        return farthest, farthest == (t.numel() - 1) * t.element_size()


def rounded_like(t, generator):
    return torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t.dtype)


def scanned(declared, plans, launch, gx, u, bias, dy):
    """Forward and backward: what they give, by name."""
    how = {"launch": launch, "precision": "ieee"}
    out = scan.forward(declared, gx, u, bias, None, None, None, save="gates", plan=plans[0], **how)
    back = scan.backward(declared, dy, None, None, u, out.y, out.c, out.saved, None, plan=plans[1], **how)
    return {"y": out.y, "saved": out.saved, "dgx": back.dgx, "dhu": back.dhu, "m": back.m}


def far_and_near(cell, schedule, T, B, H, only):
    """A scan of so many steps and rows, of which only the last batch tile and, of many steps, the last two are run by
    `only`, gives the same bits as that tile and those steps in a scan of their own. Returns only."""
    declared, dtype = cells.get(cell), torch.bfloat16
    size = {"B": B, "H": H, "itemsize": 2, "schedule": schedule, "device": scan.device_facts(torch.device("cpu"))}
    plans = [plan(declared, backward=backward, **size) for backward in (False, True)]
    rows = {B - (B - 1) // p.block_b * p.block_b for p in plans}
    assert len(rows) == 1, "both directions end in the same tile"
    (rows,), steps = rows, min(T, 2)
    meta = {"dtype": dtype, "device": "meta"}
    gx, dy = torch.empty(T, B, 1, declared.gates * H, **meta), torch.empty(T, B, 1, H, **meta)
    assert max(t.numel() for t in (gx, dy)) > 1 << 31
    generator = torch.Generator().manual_seed(0)
    u = rounded_like(torch.empty(1, declared.products * H, H, dtype=dtype), generator) * H**-0.5
    bias = rounded_like(torch.empty(1, len(declared.apart) * H, dtype=dtype), generator) if declared.apart else None
    inputs = []
    for t in (gx, dy):
        part = only.real(t)[T - steps :, B - rows :]
        part.copy_(rounded_like(part, generator))
        inputs.append(part.clone())
    near = scanned(declared, plans, scan.run, inputs[0], u, bias, inputs[1])
    found = scanned(declared, plans, only, gx, u, bias, dy)
    for t in (gx, found["dgx"]):
        farthest, last = only.reached(t)
        assert farthest > 1 << 32 and last
    far = {name: only.real(t)[-len(near[name]) :, B - rows :] for name, t in found.items() if t.numel()}
    for name, got in far.items():
        assert torch.equal(got.contiguous(), near[name]), name
    return only


ROWS = (1 << 25) + 3  # of 4 gates of 16 units: a step of gx alone has more than 2^31 elements


class Whole(LastTile):
    """`grid` in one launch, as on a GPU: with all units in one program the barrier waits for nobody."""

    def __call__(self, launch):
        if "first" not in launch.arguments:
            return super().__call__(launch)
        T = launch.arguments["T"]
        if launch.arguments["first"] == 0 and launch.arguments["PHASE"] == 1:
            counter = torch.zeros(launch.grid[1], dtype=torch.int32)
            every = {"first": 0, "last": T, "PHASE": -1, "counter_ptr": counter}
            super().__call__(launch._replace(arguments=launch.arguments | every))
            assert int(counter.sum()) == T, "one arrival a step"


@interpreted
@pytest.mark.parametrize("schedule", ["resident", "grid", "stepwise"])
def test_rows_beyond_32_bits(schedule):
    only = far_and_near("lstm", schedule, 2, ROWS, 16, Whole())
    assert only.launches == {"resident": 2, "grid": 2, "stepwise": 5}[schedule]


@interpreted
@pytest.mark.parametrize("cell", ["lstm", pytest.param("gru_before", marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["grid", "stepwise"])
def test_steps_beyond_32_bits(cell, schedule):
    """The last two of 70,000 steps, forward and then backward, each a launch here; `resident` has a loop over steps,
    whose pointers the test of rows advances."""
    T = 70_000

    def last(given):
        if "first" in given:  # grid's, whose backward counts from the end
            return given["first"] < 2 if "dgx_ptr" in given else given["first"] >= T - 2
        return given["t"] >= T - 2

    assert far_and_near(cell, schedule, T, 96, 128, LastTile(last)).launches < 20


@interpreted
def test_recomputing_beyond_32_bits():
    """The last of 2^31 saved words: addresses alone, since the products before it would take all of the memory."""
    declared, only = cells.get("lstm"), LastTile()
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    gx, u = torch.empty(64, 1 << 20, 1, 4 * 16, **meta), torch.empty(1, 4 * 16, 16, **meta)
    out = scan.allocate(declared, gx, "states")
    chosen = plan(declared, B=1 << 20, H=16, itemsize=2, device=scan.device_facts(torch.device("cpu")))
    scan.recompute(declared, gx, u, None, out.y, out.c, None, plan=chosen, launch=only)
    assert only.reached(gx) == ((1 << 33) - 2, True) and only.reached(out.y)[1] is False


@triton.jit
def _narrow(x_ptr, y_ptr, step, B, N: tl.constexpr):
    at = (step * B) * N + tl.arange(0, 16)
    tl.store(y_ptr + tl.arange(0, 16), tl.load(x_ptr + at))


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_an_offset_of_32_bits_is_noticed(monkeypatch):
    """What the two tests above would say of a kernel that multiplies in 32 bits."""
    only = LastTile()
    x, y = torch.empty(2, ROWS, 64, dtype=torch.bfloat16, device="meta"), torch.empty(16, dtype=torch.bfloat16)
    narrow = SimpleNamespace(schedule="stepwise", num_warps=4, num_stages=1, capability=0)
    for step, good in ((0, True), (1, False)):
        launch = scan.Launch(_narrow, (1, 1, 1), {"x_ptr": x, "y_ptr": y, "step": step, "B": ROWS, "N": 64}, narrow)
        monkeypatch.setattr(scan, "compile_options", lambda plan: {})
        if good:
            only(launch)
            continue
        with pytest.raises(interpreter.InterpreterError, match="an address outside every buffer"):
            only(launch)


@pytest.mark.parametrize("kind", ["RNN", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("LSTM", "GRU"))])
def test_70000_steps_for_the_loop(kind):
    """cuDNN takes 65,535 at most. In float32 on the CPU, by the loop, against torch.nn's own there."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(1, 2)
    ours = seqcells.convert(theirs)
    ours.backend = "loop"
    x = torch.randn(70_000, 1, 1)
    results = []
    for layer in (theirs, ours):
        y, _ = layer(x)
        results.append([y.detach(), *torch.autograd.grad(y[-100:].sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        assert testing.relative(b, a.double()) < testing.AGAINST_TORCH[torch.float32]


def test_the_grids_counter_is_never_too_small():
    """At most two arrivals a program and step, in 32 bits: what is longer is refused before anything is launched."""
    declared, launches = cells.get("lstm"), []
    chosen = plan(declared, B=8, H=1024, itemsize=2, device=KNOWN["H200"], schedule="grid")
    assert chosen.waits and chosen.programs == 64

    def forward(T):
        gx = torch.empty(1, dtype=torch.bfloat16, device="meta").expand(T, 8, 1, 4 * 1024)
        u = torch.empty(1, 4 * 1024, 1024, dtype=torch.bfloat16, device="meta")
        return scan.forward(declared, gx, u, None, None, None, None, save="none", plan=chosen, launch=launches.append)

    forward(70_000)
    forward((1 << 30) // 64 - 1)
    assert [launch.arguments["last"] for launch in launches] == [70_000, (1 << 30) // 64 - 1]
    with pytest.raises(ValueError, match=r"sequence length 16777216 is too long .* ask for triton:stepwise"):
        forward((1 << 30) // 64)
    assert len(launches) == 2


def test_two_streams_do_not_share_a_counter():
    """Each launch of programs that wait has a counter of its own, at zero: launches on two streams, or of two threads,
    cannot count for each other."""
    declared, launches = cells.get("gru"), []
    _, (gx, u, bias, h0, _, _) = scan_arguments("gru", Shape(3, 20, 2, 40))
    chosen = plan(declared, B=20, H=40, itemsize=4, device=KNOWN["H200"], schedule="grid", precision="tf32")
    for _ in range(2):
        scan.forward(declared, gx, u, bias, h0, None, None, save="none", plan=chosen, launch=launches.append)
    first, second = (launch.arguments["counter_ptr"] for launch in launches)
    assert first.data_ptr() != second.data_ptr() and first.numel() == -(-20 // chosen.block_b)
    assert not first.any() and not second.any()


class Kernel:
    """In place of a Triton function: notes the device that is current where it is launched."""

    def __init__(self, current):
        self.current, self.seen = current, []

    def __getitem__(self, grid):
        return lambda **given: self.seen.append(self.current[-1])


def test_two_devices(monkeypatch, tmp_path):
    """A kernel is launched where its tensors are; facts, plans, verdicts and refusals are each device's own."""
    current = [0]

    class Current:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Current)
    kernel, chosen = Kernel(current), plan(cells.get("gru"), B=8, H=16, itemsize=4, device=KNOWN["H100"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(3, device=torch.device("cuda", n)) for n in (1, 0)]
    for t in tensors:
        scan.run(scan.Launch(kernel, (1,), {"T": 3, "x_ptr": t}, chosen))
    assert kernel.seen == [1, 0] and current == [0]

    def properties(device):
        large = torch.device(device).index == 0
        facts = {"name": "NVIDIA H100" if large else "NVIDIA H100 MIG 1g.10gb", "major": 9, "minor": 0}
        return SimpleNamespace(
            **facts, multi_processor_count=132 if large else 14, shared_memory_per_block_optin=227 << 10
        )

    places = [torch.device("cuda", n) for n in (0, 1)]
    monkeypatch.setenv("SEQCELLS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties(device).name)
    caches = scan.device_facts, plan_for, verdicts.facts
    for cache in caches:
        cache.cache_clear()
    try:
        assert [scan.device_facts(place).processors for place in places] == [132, 14]
        asked = {"precision": "ieee", "backward": False}
        plans = [plan_for("lstm", 16, (1, 768), (torch.bfloat16, place), "", **asked) for place in places]
        assert [p.schedule for p in plans] == ["grid", "stepwise"]
        for kind in (verdicts.VERDICTS, verdicts.MEASUREMENTS):
            assert verdicts.path(places[0], kind) != verdicts.path(places[1], kind)
        kernels = [fallback.Kernel("lstm", "forward", torch.bfloat16, 768, place) for place in places]
        monkeypatch.setattr(fallback, "refused_kernels", {kernels[1]})
        assert [fallback.refused(place, "lstm", torch.bfloat16, 768, True) for place in places] == [False, True]
        monkeypatch.setattr(verification, "_known", {(places[1], "key"): verdicts.Verdict(False, 9.0, "y")})
        assert (places[0], "key") not in verification._known
    finally:
        for cache in caches:
            cache.cache_clear()


MIG = present("NVIDIA H100 MIG 1g.10gb", 90, 14, 227 << 10)


@settings(max_examples=500)
@given(
    cell=st.sampled_from([cells.get(name) for name in CELLS]),
    B=st.integers(1, 5000),
    H=st.one_of(st.integers(1, 300), st.integers(1, 4000)),
    groups=st.integers(1, 8),
    itemsize=st.sampled_from([2, 4, 8]),
    backward=st.booleans(),
    device=st.sampled_from([MIG, replace(MIG, processors=1), replace(KNOWN["T4"], processors=14)]),
)
def test_a_part_of_a_gpu_has_a_plan_for_everything(cell, B, H, groups, itemsize, backward, device):
    chosen = plan(cell, B=B, H=H, groups=groups, itemsize=itemsize, device=device, backward=backward)
    assert not chosen.waits or chosen.programs <= device.processors
    assert "us a step" in chosen.why


@pytest.mark.parametrize(
    "cell, H, schedule", [("lstm", 200, "grid"), ("gru", 64, "resident"), ("lstm", 300, "stepwise")]
)
def test_what_a_part_of_a_gpu_runs_is_right(cell, H, schedule):
    """The plan for 14 processors, interpreted, against torch operations."""
    shape = Shape(2, 9, 2, H)
    declared, (gx, u, bias, h0, c0, resets) = scan_arguments(cell, shape, torch.float64)
    chosen = plan(declared, B=9, H=H, itemsize=2, device=MIG)
    assert chosen.schedule == schedule
    here = replace(chosen, capability=0, waits=chosen.waits)
    out = scan.forward(declared, gx, u, bias, h0, c0, resets, save="none", plan=here)
    x, w_ih, w_hh, b_ih, b_hh, *states = testing.inputs(cell, shape, torch.float64, DEVICE)
    own = torch.zeros_like(b_ih)
    inner = torch.zeros_like(b_hh) if bias is None else torch.cat([torch.zeros_like(b_hh)[: -bias.shape[-1]], bias[0]])
    y, final = functional.scan(cell, x, states, w_ih, w_hh, own, inner, resets=resets, backend="reference")
    assert testing.relative(out.y[1:, :, 0], y) < testing.TOLERANCE[torch.float64]
    assert testing.relative(out.hn[0], final[0]) < testing.TOLERANCE[torch.float64]


TURING = """
from triton.backends.compiler import GPUTarget
from seqcells.kernels import report

for schedule, dtype, hidden in [("resident", "fp16", 32), ("grid", "fp16", 128), ("stepwise", "fp32", 300)]:
    case = report.Case("lstm", "train", dtype, 8, hidden, "sm_75", schedule=schedule)
    compiled = report.compile_launch(report.launches(case)[-1], GPUTarget("cuda", 75, 32))
    code = report.instructions(report.disassemble(compiled.asm["cubin"]))
    products = sum("MMA" in instruction for _, instruction in code)
    print(schedule, len(code) > 100, products, compiled.metadata.shared <= 64 * 1024)
"""


@pytest.mark.slow
def test_what_compiles_for_a_t4():
    """Every schedule, without tensor cores, in the shared memory that there is."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    how = {"cwd": root, "env": environment, "capture_output": True, "text": True}
    found = subprocess.run([sys.executable, "-c", TURING], **how)
    expected = [f"{schedule} True 0 True" for schedule in ("resident", "grid", "stepwise")]
    assert found.stdout.split("\n")[:3] == expected, found.stderr


def test_what_is_known_of_a_t4():
    found = present("Tesla T4", 75, 40, 64 << 10)
    assert (found.tensor, found.memory, found.cache) == (128, 320, 4 << 20)
    assert present("NVIDIA GeForce RTX 2080", 75, 46, 64 << 10).memory == 320, "the capability's"
    said = seqcells.explain("lstm", batch=8, hidden_size=64, dtype=torch.float16, device="T4")
    assert said.backend == "triton" and "of 64 KB of shared memory" in said.plan.why
    assert "beyond 32 hidden units products without tensor cores spill" in said.plan.why
    for H in (32, 64, 128, 256, 1024):  # in 16 bits, as if in float32 without TF32
        for backward in (False, True):
            chosen = plan(cells.get("lstm"), B=16, H=H, itemsize=2, device=found, backward=backward)
            assert not chosen.u_in_registers and chosen.schedule != ("grid" if backward or H > 128 else "")

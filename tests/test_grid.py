"""The grid schedule and the group axis: what they launch, and that it computes what the reference does.

The barrier itself is modelled in test_barrier.py; here programs run one after another, a launch for each part of a step
between two barriers.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kinds
import pytest
import torch
from conftest import DEVICE
from kinds import KINDS
from shapes import CELLS, SCHEDULES, spread

from seqcells import functional, testing
from seqcells.engines import triton
from seqcells.kernels import cells, grid, scan, stepwise
from seqcells.kernels.devices import INTERPRETER, KNOWN
from seqcells.kernels.plan import plan
from seqcells.testing import Shape, errors, relative, tolerance

# Three programs a batch tile at least and two tiles; H that fills its last program and that does not.
SHAPES = [
    (Shape(3, 17, 3, 48), torch.float64, "gates", True),
    (Shape(2, 9, 2, 150), torch.float64, "states", True),
    (Shape(2, 9, 2, 160), torch.float32, "gates", False),
    (Shape(2, 9, 2, 100), torch.bfloat16, "states", False),
]


def planned(cell, shape, dtype, backward=False):
    size = {"B": shape.B, "H": shape.H, "itemsize": dtype.itemsize, "device": scan.device_facts(torch.device(DEVICE))}
    return plan(cells.get(cell), **size, schedule="grid", backward=backward)


@pytest.mark.parametrize(("cell", "how"), spread(CELLS, SHAPES, most=2), ids=str)
def test_parity_over_many_programs(cell, how, poison):
    shape, dtype, save, resets = how
    for backward in (False, True):
        chosen = planned(cell, shape, dtype, backward)
        units, tiles = -(-shape.H // chosen.block_h), -(-shape.B // chosen.block_b)
        assert units >= 3 and tiles >= 2 and chosen.programs == units * tiles
    found = errors(cell, shape, dtype, DEVICE, backend="triton:grid", save=save, resets=resets)
    assert max(found.values()) <= tolerance(cell, dtype, shape), found


def test_parity_with_u_in_shared_memory():
    """Beyond 512 units an LSTM's slices of U do not fit registers; the smaller shapes above have them there."""
    shape = Shape(2, 2, 2, 520)
    for backward in (False, True):
        assert not planned("lstm", shape, torch.bfloat16, backward).u_in_registers
        assert planned("lstm", Shape(2, 9, 2, 100), torch.bfloat16, backward).u_in_registers
    found = errors("lstm", shape, torch.bfloat16, DEVICE, backend="triton:grid", resets=True)
    assert max(found.values()) <= tolerance("lstm", torch.bfloat16, shape), found


@pytest.mark.slow
@pytest.mark.parametrize("H", [48, 160])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_over_many_programs(cell, H):
    shape = Shape(2, 9, 1, H)  # T=2: one state is handed on, one gradient back
    assert planned(cell, shape, torch.float64).programs >= 6
    tensors = [t.requires_grad_() for t in testing.inputs(cell, shape, torch.float64, DEVICE, scale=0.5)]

    def function(x, w_ih, w_hh, b_ih, b_hh, *states):
        y, final = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, backend="triton:grid")
        return y, *final

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


class Recorder:
    """A launcher that runs nothing and keeps what it was given."""

    def __init__(self):
        self.launches = []

    def __call__(self, launch):
        self.launches.append(launch)


def recorded(cell, target, T, B, H, schedule, dtype=torch.bfloat16, groups=1, reversed=0):
    """The launches forward and backward of a scan on a device that is not here.

    On meta tensors: what would read a value on the host (and so could not be captured in a CUDA graph) raises.
    """
    declared = KINDS[cell].cell if cell in KINDS else cells.get(cell)
    size = {"B": B, "H": H, "groups": groups, "itemsize": dtype.itemsize, "device": KNOWN[target]}
    there, back = (plan(declared, **size, schedule=schedule, backward=b) for b in (False, True))

    def empty(*sizes):
        return torch.empty(sizes, dtype=dtype, device="meta")

    gx, u = empty(T, B, groups, declared.gates * H), empty(groups, declared.products * H, H)
    bias = empty(groups, len(declared.apart) * H) if declared.apart else None
    params = empty(groups, declared.params * H) if declared.params else None
    forward, backward = Recorder(), Recorder()
    options = {"params": params, "reversed": reversed}
    out = scan.forward(declared, gx, u, bias, None, None, None, save="gates", plan=there, launch=forward, **options)
    state = (u, out.y, out.c, out.saved, None)
    scan.backward(declared, empty(T, B, groups, H), None, None, *state, plan=back, launch=backward, **options)
    return forward.launches, backward.launches


@pytest.mark.parametrize(
    ("cell", "B", "H", "groups"),
    [
        ("lstm", 16, 1024, 1),
        ("gru", 64, 512, 1),
        ("gru_before", 16, 768, 1),
        ("lstm", 16, 512, 2),
        ("rnn_tanh", 8, 300, 3),
        ("all at once", 16, 256, 1),
    ],
)
def test_a_grid_scan_is_one_cooperative_launch(cell, B, H, groups):
    for launches in recorded(cell, "sm_90", 1000, B, H, None, groups=groups, reversed=groups - 1):
        (launch,) = launches
        units, tiles, in_groups = launch.grid
        assert launch.plan.schedule == "grid" and in_groups == groups
        assert units * tiles * in_groups == launch.plan.programs <= KNOWN["sm_90"].processors
        assert scan.compile_options(launch.plan)["launch_cooperative_grid"] is True
        assert launch.arguments["PHASE"] == -1, "all steps, barriers between them"
        assert (launch.arguments["first"], launch.arguments["last"]) == (0, 1000)
        counter = launch.arguments["counter_ptr"]
        assert counter.shape == (tiles * groups,) and counter.dtype == torch.int32


def test_a_cell_without_a_product_waits_for_nothing():
    """As many programs as it takes, more than there are processors; no counter; on any device, and interpreted, too."""
    for target in ("sm_90", "MI300X"):
        for launches in recorded("no product", target, 1000, 256, 1024, "grid"):
            (launch,) = launches
            assert launch.plan.programs > KNOWN[target].processors and not launch.plan.waits
            assert not scan.compile_options(launch.plan).get("launch_cooperative_grid")
            assert launch.arguments["counter_ptr"] is None and launch.arguments["PHASE"] == -1
    alone = KINDS["no product"].cell
    size = {"B": 16, "H": 512, "itemsize": 2, "device": KNOWN["sm_90"]}
    assert plan(alone, **size).schedule == "grid" and "no unit needs another" in plan(alone, **size).why
    assert "one program would have all 512 units" in plan(alone, **size).why


def test_counters_are_fresh_and_zero_for_each_launch():
    declared = cells.get("rnn_tanh")
    seen = []

    def launch(launch):
        counter = launch.arguments["counter_ptr"]
        assert not counter.any()
        seen.append(counter)

    gx, u = torch.zeros(2, 20, 1, 40, device=DEVICE), torch.zeros(1, 40, 40, device=DEVICE)
    chosen = planned("rnn_tanh", Shape(2, 20, 1, 40), torch.float32)
    for _ in range(2):
        scan.forward(declared, gx, u, None, None, None, None, save="none", plan=chosen, launch=launch)
    assert len({id(counter) for counter in seen}) == 2


@pytest.mark.parametrize(
    ("cell", "B", "H", "dtype", "expected"),
    [
        ("lstm", 16, 256, torch.bfloat16, 2),
        ("lstm", 3, 40, torch.float16, 2),
        ("gru", 16, 512, torch.bfloat16, 1),  # what is polled would keep the second-level cache busy
        ("rnn_tanh", 16, 256, torch.float32, 2),
        ("lstm", 16, 1024, torch.bfloat16, 0),  # more than 64 bytes a thread
        ("lstm", 256, 256, torch.bfloat16, 0),  # more than 16 rows
        ("lstm", 16, 100, torch.bfloat16, 0),  # rows of y that are not whole pieces of 16 bytes
        ("lstm", 16, 120, torch.float32, 2),
        ("lstm", 16, 112, torch.float32, 0),  # U in more than one piece
        ("lstm", 16, 64, torch.float64, 0),
        ("gru_before", 16, 256, torch.bfloat16, 0),  # not y alone
        ("all at once", 16, 256, torch.bfloat16, 0),
    ],
)
def test_where_values_are_their_own_flags(cell, B, H, dtype, expected, poison):
    """And that no value is there before it is stored, but those that the scan starts from. (Memory that nobody fills
    may be all ones, too, but for `poison`.)"""
    ((launch,), (back,)) = recorded(cell, "sm_90", 5, B, H, "grid", dtype)
    assert launch.arguments["FLAGGED"] == expected and "FLAGGED" not in back.arguments
    if cell in KINDS:
        return
    declared, seen = cells.get(cell), []
    for reverse in (0, 2):
        gx = torch.zeros(5, B, 2, declared.gates * H, dtype=dtype)
        u, h0 = torch.zeros(2, declared.products * H, H, dtype=dtype), torch.full((2, B, H), 7.0, dtype=dtype)
        size = {"B": B, "H": H, "groups": 2, "itemsize": dtype.itemsize, "device": KNOWN["sm_90"]}
        chosen = replace(plan(declared, **size, schedule="grid"), block_b=launch.plan.block_b)
        bias = torch.zeros(2, len(declared.apart) * H, dtype=dtype) if declared.apart else None
        out = scan.forward(
            declared, gx, u, bias, h0, None, None, save="none", plan=chosen, reversed=reverse, launch=seen.append
        )
        rows = out.y[1:6]
        bits = rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        assert (bits == -1).all() == (seen[-1].arguments["FLAGGED"] > 0)
        assert (out.y[0, :, 0] == 7).all() and (out.y[-1 if reverse else 0, :, 1] == 7).all()


COMPILED = """
from triton.backends.compiler import GPUTarget
from seqcells.kernels import latency, report
for cell, hidden, fences in (("lstm", 256, 0), ("gru", 512, 0), ("gru_before", 256, 2)):
    (launch,) = report.launches(report.Case(cell, "train", "bf16", 16, hidden, "sm_90"))
    compiled = report.compile_launch(launch, GPUTarget("cuda", 90, 32))
    code = latency.decode(report.disassemble(compiled.asm["cubin"]))
    begin, end = latency.bounds([(i.address, i.text) for i in code])
    steps = [i for i in code if begin <= i.address <= end]
    assert sum(i.op == "MEMBAR" for i in steps) == fences, (cell, hidden)
    assert sum(i.op == "BAR" for i in steps) <= 2 + 2 * fences, (cell, hidden)
    assert not any(i.op in ("LDL", "STL") for i in code), "spills"
    if not fences:  # the operand is loaded straight into the registers of its products, 16 bytes at a time
        first = next(i for i in steps if i.unit == "load" and "STRONG" in i.name)
        assert first.bytes == 16 and not any(i.op == "LDSM" for i in steps)
        assert any("NAN" in i.name for i in steps), "the quick look, as it is on a device"
# Turing has not all the instructions.
(launch,) = report.launches(report.Case("lstm", "infer", "fp16", 16, 64, "sm_75", schedule="grid"))
assert launch.arguments["FLAGGED"] == 0
report.compile_launch(launch, GPUTarget("cuda", 75, 32))
"""


def test_values_that_are_their_own_flags_need_no_fence():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env=environment, cwd=Path(__file__).parents[1])


def test_interpreted_a_launch_does_one_part_of_one_step():
    """What stands in for the barrier: every program finishes its part before any begins the next."""
    chosen = planned("gru_before", Shape(2, 9, 1, 40), torch.float32)
    if chosen.capability > 0:
        pytest.skip("interpreter only")
    declared, launch = cells.get("gru_before"), Recorder()
    gx, u = torch.zeros(2, 9, 1, 120), torch.zeros(1, 120, 40)
    out = scan.forward(declared, gx, u, None, None, None, None, save="gates", plan=chosen, launch=launch)
    parts = [(x.arguments["first"], x.arguments["last"], x.arguments["PHASE"]) for x in launch.launches]
    assert parts == [(0, 1, 1), (0, 1, 2), (1, 2, 1), (1, 2, 2)]
    assert {x.kernel for x in launch.launches} == {grid.forward_kernel}
    launch.launches.clear()
    state = (u, out.y, out.c, out.saved, None)
    scan.backward(declared, None, None, None, *state, plan=chosen, launch=launch)
    assert [x.arguments["PHASE"] for x in launch.launches] == [0, 1, 2, 0, 1, 2]
    launch.launches.clear()
    given = kinds.arguments("all at once", 2, 9, 40, dtype=torch.float32)
    published, size = KINDS["all at once"].cell, {"B": 9, "H": 40, "itemsize": 4, "device": INTERPRETER}
    chosen = plan(published, **size, schedule="grid", precision="ieee")
    scan.forward(published, *given[:5], None, save="none", plan=chosen, params=given[5], launch=launch)
    assert [x.arguments["PHASE"] for x in launch.launches] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("cell", [*CELLS, *KINDS])
def test_stepwise_launches_a_fixed_sequence(cell):
    """A CUDA graph can hold it: the same kernels on the same buffers whatever the data, in the order of time."""
    declared, T = KINDS[cell].cell if cell in KINDS else cells.get(cell), 4
    forward, backward = recorded(cell, "sm_90", T, 512, 1024, "stepwise")
    second = declared.level < len(declared.operands)
    phases = (0,) * declared.published + (1, 2)[: 1 + second]
    assert [(x.arguments["t"], x.arguments["PHASE"]) for x in forward] == [(t, p) for t in range(T) for p in phases]
    phases = (0, 1) if second else (1,)
    expected = [(t, p) for t in range(T - 1, -1, -1) for p in phases] + [(-1, phases[0])]
    assert [(x.arguments["t"], x.arguments["PHASE"]) for x in backward] == expected
    assert [x.arguments["FIRST"] for x in backward if x.arguments["PHASE"] == phases[0]] == [True] + [False] * T
    assert [x.arguments["LAST"] for x in backward] == [False] * (len(backward) - 1) + [True]
    for launches, kernel in ((forward, stepwise.forward_kernel), (backward, stepwise.backward_kernel)):
        assert {x.kernel for x in launches} == {kernel} and len({x.grid for x in launches}) == 1
        buffers = [{n: id(a) for n, a in x.arguments.items() if isinstance(a, torch.Tensor)} for x in launches]
        assert all(b == buffers[0] for b in buffers)


def groups_run(cell, backend, heads, K, reverse, resets, save="gates"):
    generator = torch.Generator().manual_seed(0)
    spec = cells.get(cell)
    T, B, I, H = 4, 9, 3, 20  # noqa: E741

    def random(*sizes):
        return (0.4 * torch.randn(sizes, generator=generator, dtype=torch.float64)).to(DEVICE).requires_grad_()

    x = random(T, B, K, I) if heads else random(T, B, I)
    weights = [random(K, spec.gates * H, I), random(K, spec.gates * H, H), *(random(K, spec.gates * H) for _ in "ih")]
    states = [random(K, B, H) for _ in range(spec.states)]
    mask = (torch.rand(T, B, generator=generator) < 0.3).to(DEVICE) if resets else None
    options = {"reverse": reverse, "resets": mask, "save": save, "backend": backend}
    y, final = functional.scan_groups(cell, x, tuple(states), *weights, **options)
    outputs = (y, *final)
    directions = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(DEVICE) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x, *weights, *states], directions)]


GROUPS = [
    (False, 2, (False, True), True, "gates"),
    (True, 3, (), False, "states"),
    (True, 2, (True, False), True, "states"),
]


@pytest.mark.parametrize(("cell", "schedule", "groups"), spread(CELLS, SCHEDULES, GROUPS, most=1), ids=str)
def test_groups(cell, schedule, groups, poison):
    heads, K, reverse, resets, save = groups
    exact = groups_run(cell, "reference", heads, K, reverse, resets)
    found = groups_run(cell, f"triton:{schedule}", heads, K, reverse, resets, save)
    for got, want in zip(found, exact, strict=True):
        assert got.shape == want.shape and relative(got.detach(), want.detach().cpu()) < 1e-12


@pytest.mark.parametrize("backend", ["triton", "aten", "reference"])
def test_two_groups_are_a_bidirectional_layer(backend):
    torch.manual_seed(0)
    layer = torch.nn.LSTM(3, 20, bidirectional=True).double().to(DEVICE)
    x = torch.randn(5, 4, 3, dtype=torch.float64, device=DEVICE)
    h, c = torch.randn(2, 2, 4, 20, dtype=torch.float64, device=DEVICE)
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    stacked = [torch.stack([getattr(layer, n), getattr(layer, f"{n}_reverse")]) for n in names]
    y, (hn, cn) = functional.scan_groups("lstm", x, (h, c), *stacked, reverse=(False, True), backend=backend)
    want, final = layer(x, (h, c))
    torch.testing.assert_close((y, hn, cn), (want, *final))


@pytest.mark.parametrize(
    "schedule", ["grid", *(pytest.param(other, marks=pytest.mark.slow) for other in ("resident", "stepwise"))]
)
def test_groups_compile_and_differentiate_twice(schedule):
    """The ops' fakes know reversed groups, and double backward goes through them."""
    K, T, B, I, H = 2, 2, 2, 1, 2  # noqa: E741
    sizes = [(T, B, I), (K, B, H), (K, 3 * H, I), (K, 3 * H, H), (K, 3 * H), (K, 3 * H)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_() for s in sizes]

    def function(x, h, *weights):
        options = {"reverse": (False, True), "backend": f"triton:{schedule}"}
        y, (hn,) = functional.scan_groups("gru", x, (h,), *weights, **options)
        return y, hn

    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*tensors), function(*tensors))


def test_groups_refuse_what_does_not_fit():
    x, w_ih, w_hh = torch.zeros(2, 3, 4), torch.zeros(2, 15, 4), torch.zeros(2, 15, 5)
    for arguments, options, error, message in [
        ((x, None, w_ih, w_hh[0]), {}, RuntimeError, "w_ih and w_hh must have 3 dimensions, got 3 and 2"),
        ((x, None, w_ih[:1], w_hh), {}, RuntimeError, "w_ih must have 2 groups, got 1"),
        ((x, (torch.zeros(3, 3, 5),), w_ih, w_hh), {}, RuntimeError, "states must have 2 groups, got 3"),
        ((x[:, :, None].repeat(1, 1, 3, 1), None, w_ih, w_hh), {}, RuntimeError, r"\(T, B, I\) or \(T, B, 2, I\)"),
        ((x, None, w_ih, w_hh), {"reverse": (True,)}, ValueError, "one value for each of 2 groups, got 1"),
        ((x, None, w_ih, w_hh), {"save": "all"}, ValueError, "unknown save 'all'"),
        ((x[..., :3], None, w_ih, w_hh), {}, RuntimeError, "must be equal to input_size. Expected 4, got 3"),
        ((x, (None, None), w_ih, w_hh), {}, RuntimeError, "gru has 1 state, got 2"),
    ]:
        with pytest.raises(error, match=message):
            functional.scan_groups("gru", *arguments, **options)


@pytest.mark.parametrize("cell", CELLS)
def test_only_programs_that_wait_for_each_other_are_a_cooperative_launch(cell):
    """The driver refuses such a launch of more programs than the device holds at once, as a recomputation may be."""
    declared, launches = cells.get(cell), []
    chosen = plan(declared, B=16, H=768, itemsize=2, device=KNOWN["sm_90"], schedule="grid")

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    gx, u = empty(3, 16, 1, declared.gates * 768), empty(1, declared.products * 768, 768)
    bias = empty(1, len(declared.apart) * 768) if declared.apart else None
    options = {"plan": chosen, "launch": launches.append}
    out = scan.forward(declared, gx, u, bias, None, None, None, save="states", **options)
    scan.recompute(declared, gx, u, bias, out.y, out.c, None, **options)
    scan.backward(
        declared, gx[..., :768], None, None, u, out.y, out.c, scan.allocate_saved(declared, gx), None, **options
    )
    assert len(launches) == (3 if declared.saved else 2) + (declared.level < len(declared.operands))
    for launch in launches:
        waits = launch.kernel in (grid.forward_kernel, grid.backward_kernel)
        assert scan.compile_options(launch.plan)["launch_cooperative_grid"] == waits, launch.kernel
        # Not asked of the machine that compiles: the report would compile another kernel than a GPU runs.
        assert not waits or launch.arguments["PTX"]


@pytest.mark.parametrize("races", [True, False])
def test_what_was_wrong_on_a_device_is_not_chosen(races, monkeypatch):
    """H=1100 fits neither resident nor grid; where stepwise was wrong, only who asks for it gets it."""
    monkeypatch.setattr(scan, "PIPELINES_RACE", races)
    monkeypatch.setattr(scan, "device_facts", lambda device: KNOWN["H200"])
    triton.plan_for.cache_clear()
    asked = {"precision": "ieee", "backward": False}
    try:
        for dtype in (torch.bfloat16, torch.float32):
            like = dtype, torch.device("cuda")
            assert triton.plan_for("lstm", 512, (1, 1100), like, "stepwise", **asked).schedule == "stepwise"
            if races and dtype == torch.bfloat16:
                with pytest.raises(ValueError, match="no schedule is left"):
                    triton.plan_for("lstm", 512, (1, 1100), like, "", **asked)
            else:
                assert triton.plan_for("lstm", 512, (1, 1100), like, "", **asked).schedule == "stepwise"
    finally:
        triton.plan_for.cache_clear()

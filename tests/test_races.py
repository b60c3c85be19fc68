"""No kernel depends on the order in which its warps, or its programs, happen to run.

The warps of a program run in any order between two barriers, and the programs of a launch in any order at all. So
between two barriers a program may not store where it has loaded or stored: the compiler is free to give the load and
the store different register layouts, and then one warp overwrites what another has not read yet. And no program of a
launch may touch what another one stores. The interpreter runs everything in order and so never shows it: here every
address is recorded.
"""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from kinds import KINDS, arguments, run
from shapes import CELLS, SCHEDULES, spread
from test_kernels import scan_arguments
from triton.runtime import interpreter

from seqcells import testing
from seqcells.kernels import buffers, cells, scan, single
from seqcells.kernels.plan import plan
from seqcells.kernels.plan_single import plan_single
from seqcells.testing import Shape

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="notes the addresses of interpreted kernels")
NONE = np.empty(0, np.uint64)


class Watch:
    """A launcher that notes every address and says what would be a race."""

    def __init__(self):
        self.races = set()

    def __call__(self, launch):
        self.arguments = {n: t for n, t in launch.arguments.items() if isinstance(t, torch.Tensor)}
        self.programs, self.name = {}, launch.kernel.fn.__name__
        builder = interpreter.InterpreterBuilder
        names = ("create_masked_load", "create_masked_store", "create_barrier", "set_grid_idx")
        originals = {name: getattr(builder, name) for name in names}
        load, store, barrier, begin = originals.values()

        def noted_load(this, pointers, mask, *rest):
            self.note("loads", pointers, mask)
            return load(this, pointers, mask, *rest)

        def noted_store(this, pointers, value, mask, *rest):
            self.note("stores", pointers, mask)
            return store(this, pointers, value, mask, *rest)

        def noted_barrier(this):
            self.since = {"loads": NONE, "stores": NONE}
            return barrier(this)

        def noted_begin(this, *place):
            self.since = {"loads": NONE, "stores": NONE}
            self.mine = self.programs.setdefault(place, {"loads": [NONE], "stores": [NONE]})
            return begin(this, *place)

        try:
            for name, noted in zip(names, (noted_load, noted_store, noted_barrier, noted_begin), strict=True):
                setattr(builder, name, noted)
            scan.run(launch)
        finally:
            for name, original in originals.items():
                setattr(builder, name, original)
        self.compare_programs()

    def note(self, kind, pointers, mask):
        touched = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        for before in ("stores",) if kind == "loads" else ("loads", "stores"):
            self.report(f"{kind} what it {before} with no barrier between", touched, self.since[before])
        self.since[kind] = np.union1d(self.since[kind], touched)
        self.mine[kind].append(touched)

    def compare_programs(self):
        every = [{kind: np.unique(np.concatenate(of)) for kind, of in p.items()} for p in self.programs.values()]
        for a, b in itertools.permutations(every, 2):
            for kind in ("loads", "stores"):
                self.report(f"{kind} what another program stores", a[kind], b["stores"])

    def report(self, what, a, b):
        for address in np.intersect1d(a, b):
            (where,) = (
                n for n, t in self.arguments.items() if 0 <= int(address) - t.data_ptr() < t.numel() * t.element_size()
            )
            self.races.add(f"{self.name} {what}: {where}")


def masks_of(kind, T, B, reversed):
    if kind == "":
        return None
    generator = torch.Generator().manual_seed(3)
    resets = torch.rand(T, B, generator=generator) < 0.4
    if kind == "resets":
        return resets.to(torch.uint8) * buffers.RESET if reversed else resets
    ended = torch.arange(T)[:, None] >= torch.randint(0, T + 1, (B,), generator=generator)
    return torch.where(ended, torch.tensor(buffers.PADDING, dtype=torch.uint8), resets.to(torch.uint8))


@pytest.mark.parametrize(("cell", "schedule", "mask"), spread(CELLS, SCHEDULES, ["", "resets", "lengths"], most=1))
def test_no_race(cell, schedule, mask):
    T, B, H = 2, 9, 20  # more than one program along each axis that has several
    groups, reversed = (2, 2) if mask == "lengths" else (1, 0)
    declared, (gx, u, bias, h0, c0, _) = scan_arguments(cell, Shape(T, B, 2, H), groups=groups)
    given = masks_of(mask, T, B, reversed)
    size = {"B": B, "H": H, "itemsize": 4, "device": scan.device_facts(gx.device), "groups": groups}
    there, back = (plan(declared, **size, schedule=schedule, backward=b) for b in (False, True))
    watch = Watch()
    how = {"reversed": reversed, "launch": watch}
    out = scan.forward(declared, gx, u, bias, h0, c0, given, save="gates", plan=there, **how)
    scan.recompute(declared, gx, u, bias, out.y, out.c, given, plan=there, **how)
    dy, two = torch.ones_like(buffers.outputs(out.y, reversed)), declared.states == 2
    dcn, dcs = (out.cn, dy) if two else (None, None)
    state = (u, out.y, out.c, out.saved, given)
    scan.backward(declared, dy, out.hn, dcn, *state, plan=back, dcs=dcs, **how)
    assert not watch.races


@pytest.mark.parametrize(("kind", "schedule", "mask"), spread(KINDS, SCHEDULES, ["", "resets", "lengths"], most=1))
def test_no_race_in_cells_of_other_kinds(kind, schedule, mask):
    T, B, H = 3, 9, 20
    groups, reversed = (2, 2) if mask == "lengths" else (1, 0)
    given = arguments(kind, T, B, H, groups, torch.float32)
    others = (KINDS[kind].cell.states - 1) * H
    outer = [
        torch.ones(*size) for size in ((T, B, groups, H), (T, B, groups, others), (groups, B, H), (groups, B, others))
    ]
    outer = [d if d.numel() else None for d in outer]
    watch = Watch()
    run(kind, schedule, given, masks_of(mask, T, B, reversed), reversed, "states", outer, launch=watch)
    assert not watch.races


@pytest.mark.parametrize("cell", [name for name in CELLS if name != "gru_before"])
def test_no_race_in_one_step(cell):
    declared = cells.get(cell)
    x, w_ih, w_hh, b_ih, b_hh, *states = testing.inputs(cell, Shape(1, 9, 3, 20), torch.float32, "cpu")
    chosen = plan_single(declared, B=9, I=3, H=20, itemsize=4, device=scan.device_facts(x.device), precision="ieee")
    watch = Watch()
    h0, c0 = [*states, None][:2]
    single.forward(declared, x[0], w_ih, w_hh, b_ih, b_hh, h0, c0, save="gates", plan=chosen, launch=watch)
    assert not watch.races


@triton.jit
def _exchanges(x_ptr, BARRIER: tl.constexpr, SHARED: tl.constexpr):
    i = tl.arange(0, 4) if SHARED else tl.program_id(0) * 4 + tl.arange(0, 4)
    x = tl.load(x_ptr + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + i, x + 1.0)


@pytest.mark.parametrize(
    ("barrier", "shared", "expected"),
    [
        (True, False, set()),
        (False, False, {"_exchanges stores what it loads with no barrier between: x_ptr"}),
        (
            True,
            True,
            {
                "_exchanges loads what another program stores: x_ptr",
                "_exchanges stores what another program stores: x_ptr",
            },
        ),
    ],
)
def test_the_watch_sees_a_race(barrier, shared, expected):
    watch, x = Watch(), torch.zeros(8)
    chosen = plan(cells.get("rnn_tanh"), B=1, H=1, itemsize=4, device=scan.device_facts(x.device))
    arguments = {"x_ptr": x, "y_ptr": torch.zeros(1), "BARRIER": barrier, "SHARED": shared}
    watch(scan.Launch(_exchanges, (2,), arguments, chosen))
    assert watch.races == expected

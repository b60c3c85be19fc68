"""Rows that end before the last step, inside the kernels: a mask of codes against the reference's lengths and resets.

At padding, gx, dy and dcs are NaN; no result may depend on them.
"""

import pytest
import torch
from conftest import DEVICE
from shapes import CELLS, SCHEDULES

from seqcells import masks, reference
from seqcells.kernels import buffers, cells, scan
from seqcells.kernels.plan import plan
from seqcells.testing import TOLERANCE, relative

T, H = 5, 20
LENGTHS = (3, 5, 1)  # odd on purpose; T and 1 among them
BOTH = 0b10  # two groups, the second reversed


class Problem:
    """One scan of K groups in float64, its inputs rounded to dtype, and the gradients of its outputs.

    The recurrent weights are the reference's w_hh, and gx its x, by w_ih = 1: the kernels do not see the projection.
    """

    def __init__(self, cell, dtype=torch.float64, lengths=LENGTHS, reversed=0, resets=True, cs=False, H=H):
        self.cell, self.dtype, self.lengths, self.reversed = cells.get(cell), dtype, lengths, reversed
        self.K, B, G = (2 if reversed else 1), len(lengths), self.cell.gates
        generator = torch.Generator().manual_seed(0)

        def random(*sizes, scale=0.7):
            return (scale * torch.randn(sizes, generator=generator, dtype=torch.float64)).to(dtype).double()

        self.gx = random(T, B, self.K, G * H)
        self.u = random(self.K, G * H, H, scale=H**-0.5)
        self.apart = len(self.cell.apart)
        self.bias = random(self.K, self.apart * H) if self.apart else None
        self.states = [random(self.K, B, H) for _ in range(self.cell.states)]
        self.dfinal = [random(self.K, B, H) for _ in range(self.cell.states)]
        self.dy = random(T, B, self.K, H)
        self.dcs = random(T, B, self.K, H) if cs else None
        live = torch.arange(T)[:, None] < torch.tensor(lengths)
        self.resets = (torch.rand(T, B, generator=generator) < 0.3) & resets
        self.mask, self.held = masks.encode(self.resets, torch.tensor(lengths), T, reversed), ~live

    def exact(self):
        """y, the final states, dgx, du, dbias and the initial states' gradients, by the reference."""
        leaves = [t.clone().requires_grad_() for t in (self.gx, self.u, *self.states)]
        bias = None if self.bias is None else self.bias.clone().requires_grad_()
        gx, u, *states = leaves
        G, H = self.cell.gates, u.shape[2]
        b_hh = None
        if bias is not None:
            b_hh = torch.cat([u.new_zeros(self.K, (G - self.apart) * H), bias], 1)
        weights = (torch.eye(G * H, dtype=torch.float64).expand(self.K, -1, -1), u, None, b_hh)
        how = {"resets": self.resets, "lengths": torch.tensor(self.lengths), "reversed": self.reversed}
        step = reference.step_of(self.cell.name)
        every, finals = reference.scan_groups(step, gx, tuple(states), *weights, **how)
        every = [s.unflatten(2, (self.K, H)) for s in every]
        outputs, outer = [every[0], *finals], [self.dy, *self.dfinal]
        if self.dcs is not None:
            outputs.append(every[1])
            outer.append(self.dcs)
        wanted = [*leaves, *([] if bias is None else [bias])]
        dgx, du, *others = torch.autograd.grad(outputs, wanted, outer)
        found = {"y": every[0].detach(), "dgx": dgx, "du": du}
        found |= {f"final {n}": s.detach() for n, s in enumerate(finals)}
        return found | {f"d{n}": d for n, d in enumerate(others)}

    def found(self, schedule, save, launch=scan.run):
        """The same by the kernels, and the buffers' held steps (see `held_steps_are_as_promised`)."""

        def to(x, poisoned=False):
            if x is None:
                return None
            if poisoned:
                x = x.masked_fill(self.held[:, :, None, None], torch.nan)
            return x.to(DEVICE, self.dtype)

        gx, u, bias, mask = to(self.gx, True), to(self.u), to(self.bias), self.mask.to(DEVICE)
        size = {"B": gx.shape[1], "H": u.shape[2], "groups": self.K, "itemsize": self.dtype.itemsize}
        size |= {"device": scan.device_facts(gx.device), "schedule": schedule}
        there, back = (plan(self.cell, **size, backward=b) for b in (False, True))
        h0, c0 = (*map(to, self.states), None)[:2]
        how = {"plan": there, "reversed": self.reversed, "launch": launch}
        out = scan.forward(self.cell, gx, u, bias, h0, c0, mask, save=save, **how)
        saved = out.saved if save == "gates" else scan.recompute(self.cell, gx, u, bias, out.y, out.c, mask, **how)
        dhn, dcn = (*map(to, self.dfinal), None)[:2]
        how = {"plan": back, "reversed": self.reversed, "launch": launch, "dcs": to(self.dcs, True)}
        grads = scan.backward(self.cell, to(self.dy, True), dhn, dcn, u, out.y, out.c, saved, mask, **how)
        y = buffers.outputs(out.y, self.reversed)
        self.held_steps_are_as_promised(y, out.c, grads)
        # As ops makes the weights' gradients of these.
        cell, H = self.cell, u.shape[2]
        du = torch.empty_like(u)
        split, plain = cell.first_products * H, (cell.first_products - self.apart) * H
        for k in range(self.K):
            h = buffers.previous_outputs(out.y, mask, self.reversed, k).flatten(0, 1)
            d = grads.dgx[:, :, k].flatten(0, 1)
            du[k, :plain] = d[:, :plain].t() @ h
            if self.apart:
                du[k, plain:] = grads.dhu[:, :, k].flatten(0, 1).t() @ h
            if cell.first_products < cell.gates:
                du[k, split:] = d[:, split:].t() @ grads.m[:, :, k].flatten(0, 1)
        # A reversed group's held rows hold its first states, for backward; they are not outputs.
        y = y.masked_fill(self.held.to(DEVICE)[:, :, None, None], 0)
        found = {"y": y, "dgx": grads.dgx, "du": du, "final 0": out.hn, "final 1": out.cn}
        found |= {"d0": grads.dh0, "d1": grads.dc0, f"d{cell.states}": grads.dhu.sum((0, 1)) if self.apart else None}
        return found

    def held_steps_are_as_promised(self, y, c, grads):
        held = self.held.to(DEVICE)[:, :, None, None]
        two = self.cell.states == 2
        for kept, start in ((y, 0), (buffers.outputs(c, self.reversed), 1))[: 1 + two]:
            for k in range(self.K):
                rows, want = kept[:, :, k], torch.zeros_like(kept[0, :, k])
                if buffers.is_reversed(k, self.reversed):
                    want = self.states[start][k].to(rows)
                assert torch.equal(torch.where(held[:, :, 0], rows, want), want.expand_as(rows))
        for name in ("dgx", "dhu", "m"):
            d = getattr(grads, name)
            if d.numel():
                assert not d.masked_select(held).any(), f"{name} of held steps is zero"

    def check(self, schedule, save, launch=scan.run):
        exact, found = self.exact(), self.found(schedule, save, launch)
        errors = {name: relative(found[name], want) for name, want in exact.items()}
        assert max(errors.values()) <= TOLERANCE[self.dtype], errors


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_float64(cell, schedule, poison):
    """With resets, and two groups, one reversed."""
    Problem(cell, reversed=BOTH).check(schedule, "gates")


@pytest.mark.parametrize(("reversed", "schedule"), [(0, "stepwise"), (BOTH, "resident")])
@pytest.mark.parametrize("cell", CELLS)
def test_recomputed(cell, reversed, schedule, poison):
    """And a row that never lives. (The gradient of every c is tried with save="states" by all schedules.)"""
    Problem(cell, lengths=(3, 0, 5), reversed=reversed).check(schedule, "states")


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [("resident", torch.bfloat16), ("grid", torch.float16), ("stepwise", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before"])
def test_other_dtypes(cell, schedule, dtype, poison):
    Problem(cell, dtype).check(schedule, "gates")


def test_over_many_programs(poison):
    Problem("gru_before", lengths=(5, 1, 4, 2, 3, 5, 0, 2, 1), H=33).check("grid", "gates")


@pytest.mark.parametrize("cell", CELLS)
def test_the_grid_in_one_launch(cell, poison):
    """As on a device, all steps and barriers in one launch: interpreted too, where one program has all the units."""
    seen = []

    def whole(launch):
        arguments = {**launch.arguments, "first": 0, "last": T, "PHASE": -1}
        if "counter_ptr" in arguments and all(launch.kernel is not x.kernel for x in seen):
            assert launch.grid[0] == 1
            seen.append(launch)
            scan.run(launch._replace(arguments=arguments))

    Problem(cell, reversed=BOTH, cs=cell == "lstm", H=13).check("grid", "gates", whole)
    assert len(seen) == 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("lengths", "reversed", "save"), [((5, 5), 0, "gates"), (LENGTHS, BOTH, "states")])
def test_a_gradient_of_every_c(schedule, lengths, reversed, save, poison):
    Problem("lstm", lengths=lengths, reversed=reversed, cs=True).check(schedule, save)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_saved_gives_the_same_outputs(schedule, poison):
    problem = Problem("lstm", torch.float32, lengths=(0, 4, 5), reversed=BOTH)
    gx = problem.gx.masked_fill(problem.held[:, :, None, None], torch.nan)
    gx, u, h0, c0 = (x.to(DEVICE, torch.float32) for x in (gx, problem.u, *problem.states))
    size = {"B": 3, "H": H, "groups": 2, "itemsize": 4, "device": scan.device_facts(gx.device), "schedule": schedule}
    how = {"plan": plan(problem.cell, **size), "reversed": BOTH}
    none, gates = (
        scan.forward(problem.cell, gx, u, None, h0, c0, problem.mask.to(DEVICE), save=save, **how)
        for save in ("none", "gates")
    )
    for a, b in ((none.y[1:-1], gates.y[1:-1]), (none.hn, gates.hn), (none.cn, gates.cn)):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_codes_without_a_held_row_are_resets(schedule):
    """The same bits as by a mask of bool, which is compiled without holds."""
    problem = Problem("lstm", torch.float32, lengths=(5, 5))
    first = problem.found(schedule, "gates")
    problem.mask = problem.resets
    second = problem.found(schedule, "gates")
    assert problem.resets.any()
    for name, found in first.items():
        assert found is None or torch.equal(found, second[name]), name

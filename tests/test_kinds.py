"""The schedules and cells of kinds that no built-in one is: against autograd through the step in float64."""

from itertools import product

import pytest
import torch
from conftest import DEVICE
from kinds import KINDS, arguments, mask_of, run, wanted
from shapes import SCHEDULES, spread
from test_kernels import Guards
from test_races import Watch

from seqcells.kernels import buffers
from seqcells.testing import TOLERANCE, relative

# T, B, H: three programs of units and two of rows, whole tiles and not; one of each.
SHAPES = [(3, 9, 48), (2, 9, 33), (4, 3, 5)]
MASKS = ["", "resets", "lengths"]


def compare(kind, schedule, shape, mask, K, reversed, save, dtype=torch.float64, allowed=1e-12):
    T, B, H = shape
    if schedule == "resident":  # one program has all units: a third fills as much of it
        H = -(-H // 3)
    given = arguments(kind, T, B, H, K, dtype, DEVICE)
    generator = torch.Generator().manual_seed(1)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    others = (KINDS[kind].cell.states - 1) * H
    outer = [random(T, B, K, H), random(T, B, K, others) if others else None, random(K, B, H)]
    outer.append(random(K, B, others) if others else None)
    masked = mask_of(mask, T, B, reversed)
    masked = None if masked is None else masked.to(DEVICE)
    gx = given[0]
    if mask == "lengths":  # nothing of a held row is looked at
        for t in (gx, outer[0], outer[1]):
            t[buffers.padding_rows(masked)] = torch.nan
    found = run(kind, schedule, given, masked, reversed, save, outer)
    for t in (gx, outer[0], outer[1]):
        t.nan_to_num_(0.0)
    exactly = wanted(kind, given, masked, reversed, outer)
    for names, got, want in zip(("y c hn cn", "gx u bias h0 c0 params"), found, exactly, strict=True):
        for name, a, b in zip(names.split(), got, want, strict=True):
            if a is None:
                continue
            assert a.shape == b.shape, name
            if reversed and mask == "lengths" and name in ("y", "c"):
                # A reversed group's held rows are the states that it begins from (see `tiles.after_step`).
                keep = ~buffers.padding_rows(masked)[:, :, None, None]
                a, b = a * keep, b * keep
            error = relative(a.detach(), b.detach().cpu())
            assert error <= allowed, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("kind", "schedule", "how"),
    spread(KINDS, SCHEDULES, list(product(SHAPES, MASKS, ["gates", "states"])), most=1),
    ids=str,
)
def test_parity(kind, schedule, how, poison):
    shape, mask, save = how
    groups, reversed = {"": (1, 0), "resets": (2, 2), "lengths": (2, 1)}[mask]
    compare(kind, schedule, shape, mask, groups, reversed, save)


@pytest.mark.parametrize(("kind", "schedule", "mask"), spread(KINDS, SCHEDULES, ["resets", "lengths"], most=1), ids=str)
def test_one_group_forward_with_a_mask(kind, schedule, mask, poison):
    compare(kind, schedule, (3, 9, 40), mask, 1, 0, "gates")


@pytest.mark.parametrize(
    ("kind", "schedule", "dtype"), spread(KINDS, SCHEDULES, [torch.float32, torch.bfloat16], most=1), ids=str
)
def test_parity_in_other_types(kind, schedule, dtype, poison):
    compare(kind, schedule, (3, 9, 33), "lengths", 1, 0, "gates", dtype, TOLERANCE[dtype])


@pytest.mark.skipif(DEVICE != "cpu", reason="notes the addresses of interpreted kernels")
@pytest.mark.parametrize(("kind", "schedule"), spread(KINDS, SCHEDULES, most=1))
def test_no_race(kind, schedule):
    """See test_races.py; and nothing is read or written beside the buffers."""
    T, B, H, K = 2, 9, 20, 2
    given, others = arguments(kind, T, B, H, K, torch.float32), (KINDS[kind].cell.states - 1) * H
    ones = [torch.ones(*size, n) for size in ((T, B, K), (K, B)) for n in (H, others)]
    outer = [o if o.numel() else None for o in ones]
    for launch in (Watch(), Guards()):
        run(kind, schedule, given, mask_of("lengths", T, B, 2), 2, "states", outer, launch=launch)
        assert not getattr(launch, "races", ())

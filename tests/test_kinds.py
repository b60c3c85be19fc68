"""The schedules and cells of kinds that no built-in one is: against autograd through the step in float64."""

import pytest
import torch
from conftest import DEVICE
from kinds import KINDS, arguments, exact
from shapes import SCHEDULES, spread

from seqcells.check import TOLERANCE, relative
from seqcells.kernels import buffers, scan
from seqcells.kernels.plan import plan

# T, B, H: three programs of units and two of rows, whole tiles and not; one of each.
SHAPES = [(3, 9, 48), (2, 9, 33), (4, 3, 5)]
MASKS = ["", "resets", "lengths"]


def mask_of(name, T, B, reversed):
    if not name:
        return None
    generator = torch.Generator().manual_seed(2)
    resets = torch.rand(T, B, generator=generator) < 0.4
    if name == "resets" and not reversed:
        return resets.to(DEVICE)
    back = torch.rand(T, B, generator=generator) < 0.4
    codes = resets * buffers.RESET + (back * buffers.RESET_REVERSED if reversed else 0)
    if name == "lengths":
        ends = torch.randint(1, T + 1, (B,), generator=generator)
        ends[0], ends[-1] = T, 0
        codes = torch.where(torch.arange(T)[:, None] >= ends, buffers.HELD, codes)
    return codes.to(DEVICE, torch.uint8)


def run(kind, schedule, given, mask, reversed, save, launch=scan.run, outer=None):
    """Outputs and gradients: y, c, hn, cn and of gx, u, bias, h0, c0, params (None where there is none)."""
    cell, (gx, u, bias, h0, c0, params) = KINDS[kind].cell, given
    B, K, H = *gx.shape[1:3], u.shape[2]
    size = {"B": B, "H": H, "groups": K, "itemsize": gx.element_size(), "device": scan.device_facts(gx.device)}
    there, back = (plan(cell, **size, schedule=schedule, precision="ieee", backward=b) for b in (False, True))
    how = {"params": params, "reversed": reversed, "launch": launch}
    out = scan.forward(cell, gx, u, bias, h0, c0, mask, save=save, plan=there, **how)
    saved = out.saved
    if save == "states":
        saved = scan.recompute(cell, gx, u, bias, out.y, out.c, mask, plan=there, **how)
    dy, dcs, dhn, dcn = outer
    found = scan.backward(cell, dy, dhn, dcn, u, out.y, out.c, saved, mask, plan=back, dcs=dcs, **how)
    y = buffers.outputs(out.y, reversed)
    c = buffers.outputs(out.c, reversed) if out.c.numel() else None
    du, dbias = torch.zeros_like(u), None if bias is None else found.dhu.sum((0, 1))
    product, stored = 0, list(cell.stored)
    for n, operand in enumerate(cell.operands):
        for k in range(K):
            if operand.state is None:
                at = stored.index(n) * H
                x = found.m[:, :, k, at : at + H]
            elif operand.state == 0:
                x = buffers.previous_outputs(out.y, mask, reversed, k)
            else:
                at = (operand.state - 1) * H
                x = buffers.previous_outputs(out.c, mask, reversed, k)[..., at : at + H]
            for p in range(product, product + operand.products):
                apart = cell.adds[p] < 0
                at = (cell.apart.index(p) if apart else cell.adds[p]) * H
                d = (found.dhu if apart else found.dgx)[:, :, k, at : at + H]
                du[k, p * H : (p + 1) * H] = d.flatten(0, 1).t() @ x.flatten(0, 1)
        product += operand.products
    dparams = found.dparams if cell.params else None
    return [y, c, out.hn, out.cn if out.cn.numel() else None], [
        found.dgx, du, dbias, found.dh0, found.dc0 if c0 is not None else None, dparams,
    ]  # fmt: skip


def wanted(kind, given, mask, reversed, outer):
    """The same, by autograd."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in given]
    every, final = exact(kind, *leaves, mask, reversed)
    held = None if mask is None else buffers.held(mask)
    if held is not None:
        every = [s.masked_fill(held[:, :, None, None], 0.0) for s in every]
    cat = [torch.cat(of[1:], -1) if len(of) > 1 else None for of in (every, final)]
    outputs = [every[0], cat[0], final[0], cat[1]]
    pairs = [(o, d.double()) for o, d in zip(outputs, outer, strict=True) if d is not None]
    total = sum((o * d).sum() for o, d in pairs)
    there = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(total, there, allow_unused=True, materialize_grads=True))
    return outputs, [None if t is None else next(grads) for t in leaves]


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
    gx = given[0]
    if mask == "lengths":  # nothing of a held row is looked at
        for t in (gx, outer[0], outer[1]):
            t[buffers.held(masked)] = torch.nan
    found = run(kind, schedule, given, masked, reversed, save, outer=outer)
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
                keep = ~buffers.held(masked)[:, :, None, None]
                a, b = a * keep, b * keep
            error = relative(a.detach(), b.detach().cpu())
            assert error <= allowed, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("kind", "schedule", "shape", "mask", "save"),
    spread(KINDS, SCHEDULES, SHAPES, MASKS, ["gates", "states"], most=1),
    ids=str,
)
def test_parity(kind, schedule, shape, mask, save, poison):
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

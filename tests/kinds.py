"""Cells of the kinds that no built-in one is, written by hand, and a scan of each in plain PyTorch to compare with.

Each is a step in PyTorch, together with what the kernels need (see `kernels.cells`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from seqcells.kernels import buffers, scan
from seqcells.kernels.cells import Cell
from seqcells.kernels.form import Operand
from seqcells.kernels.math import sigmoid, tanh
from seqcells.kernels.plan import plan


@dataclass(frozen=True)
class Kind:
    """step(gx, product, states, params) -> states, as tuples of [B, H]. product(n, v): the n-th product, with v; with
    its b_hh if it is apart."""

    cell: Cell
    step: Callable


@triton.jit
def _two_operands_1(gx, states, params, FAST: tl.constexpr):
    return states


@triton.jit
def _two_forward(gx, hu, states, params, FAST: tl.constexpr):
    h, c = states
    t = tanh(gx[0] + hu[0] + hu[1], FAST)
    c = c + 0.1 * (t - params[0] * h)
    return (h + 0.1 * c, c), (t,)


@triton.jit
def _two_backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    dc = dstates[1] + 0.1 * dstates[0]
    d = 0.1 * dc * (1.0 - saved[0] * saved[0])
    return (d,), (d, d), (dstates[0] - 0.1 * params[0] * dc, dc), (-0.1 * dc * before[0],), ()


def _two_step(gx, product, states, params):
    h, c = states
    c = c + 0.1 * (torch.tanh(gx[0] + product(0, h) + product(1, c)) - params[0] * h)
    return h + 0.1 * c, c


@triton.jit
def _other_state_operands_1(gx, states, params, FAST: tl.constexpr):
    return (states[1],)


@triton.jit
def _other_state_forward(gx, hu, states, params, FAST: tl.constexpr):
    n = tanh(gx[0] + hu[0], FAST)
    return (n * gx[1], n), (gx[1],)


@triton.jit
def _other_state_backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    n = after[1]
    d = (dstates[1] + dstates[0] * saved[0]) * (1.0 - n * n)
    zero = tl.zeros_like(d)
    return (d, dstates[0] * n), (d,), (zero, zero), (), ()


def _other_state_step(gx, product, states, params):
    n = torch.tanh(gx[0] + product(0, states[1]))
    return n * gx[1], n


@triton.jit
def _alone_forward(gx, hu, states, params, FAST: tl.constexpr):
    t = tanh(gx[0] + params[0] * states[0], FAST)
    return (t + states[1], 0.5 * states[1] + gx[1] * t), (t, gx[1])


@triton.jit
def _alone_backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    t, x = saved
    d = (dstates[0] + dstates[1] * x) * (1.0 - t * t)
    return (d, dstates[1] * t), (), (d * params[0], dstates[0] + 0.5 * dstates[1]), (d * before[0],), ()


def _alone_step(gx, product, states, params):
    t = torch.tanh(gx[0] + params[0] * states[0])
    return t + states[1], 0.5 * states[1] + gx[1] * t


@triton.jit
def _eight_forward(gx, hu, states, params, FAST: tl.constexpr):
    i, f = sigmoid(gx[0] + hu[0], FAST), sigmoid(gx[1] + hu[1], FAST)
    g, o = tanh(gx[2] + hu[7], FAST), sigmoid(gx[3] + hu[2], FAST)
    j, k = sigmoid(gx[4] + hu[3], FAST), sigmoid(gx[5] + hu[4], FAST)
    n, p = tanh(gx[6] + o * hu[6], FAST), sigmoid(gx[7] + hu[5], FAST)
    c, e = f * states[1] + i * g, k * states[2] + j * n
    return (o * tanh(c, FAST) + p * tanh(e, FAST), c, e), (i, f, g, o, j, k, n, p, hu[6])


@triton.jit
def _eight_backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    i, f, g, o, j, k, n, p, q = saved
    dh = dstates[0]
    tc, te = tanh(after[1], FAST), tanh(after[2], FAST)
    dc = dstates[1] + dh * o * (1.0 - tc * tc)
    de = dstates[2] + dh * p * (1.0 - te * te)
    dn = de * j * (1.0 - n * n)
    di, df = dc * g * i * (1.0 - i), dc * before[1] * f * (1.0 - f)
    dg, do = dc * i * (1.0 - g * g), (dh * tc + dn * q) * o * (1.0 - o)
    dj, dk = de * n * j * (1.0 - j), de * before[2] * k * (1.0 - k)
    dp, zero = dh * te * p * (1.0 - p), tl.zeros_like(dh)
    return (di, df, dg, do, dj, dk, dn, dp), (di, df, do, dj, dk, dp, dn * o, dg), (zero, dc * f, de * k), (), ()


def _eight_step(gx, product, states, params):
    h, c, e = states
    i, f, o = (torch.sigmoid(gx[n] + product(m, h)) for n, m in ((0, 0), (1, 1), (3, 2)))
    j, k, p = (torch.sigmoid(gx[n] + product(m, h)) for n, m in ((4, 3), (5, 4), (7, 5)))
    g, n = torch.tanh(gx[2] + product(7, h)), torch.tanh(gx[6] + o * product(6, h))
    c, e = f * c + i * g, k * e + j * n
    return o * torch.tanh(c) + p * torch.tanh(e), c, e


@triton.jit
def _all_operands_1(gx, states, params, FAST: tl.constexpr):
    return (sigmoid(gx[3] * params[0], FAST) * states[0], states[1])


@triton.jit
def _all_operands_2(gx, hu, states, params, FAST: tl.constexpr):
    return (tanh(gx[0] + hu[0], FAST) * states[1], sigmoid(gx[1] + hu[2], FAST) * states[0])


@triton.jit
def _all_forward(gx, hu, states, params, FAST: tl.constexpr):
    h, c, s = states
    a, b, r = tanh(gx[0] + hu[0], FAST), sigmoid(gx[1] + hu[2], FAST), tanh(hu[1], FAST)
    g, k = tanh(gx[2] + hu[3], FAST), sigmoid(hu[4], FAST)
    d = sigmoid(gx[3] * params[0], FAST)
    h = b * h + (1.0 - b) * g * k + params[1] * c
    return (h, a * r + 0.5 * c, 0.5 * s + h), (a, b, r, g, k, d, gx[3])


@triton.jit
def _all_backward_2(dstates, saved, before, after, params, FAST: tl.constexpr):
    a, b, _, g, k, _, _ = saved
    through = (dstates[0] + dstates[2]) * (1.0 - b)
    return (through * k * (1.0 - g * g), through * g * k * (1.0 - k)), (a * before[1], b * before[0])


@triton.jit
def _all_backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    a, b, r, g, k, d, _ = saved
    h, c, _ = before
    dh = dstates[0] + dstates[2]
    through = dh * (1.0 - b)
    da = (dstates[1] * r + dm[0] * c) * (1.0 - a * a)
    dr = dstates[1] * a * (1.0 - r * r)
    db = (dh * (h - g * k) + dm[1] * h) * b * (1.0 - b)
    dg, dk = through * k * (1.0 - g * g), through * g * k * (1.0 - k)
    zero = tl.zeros_like(dh)
    dbefore = ((dh + dm[1]) * b, dh * params[1] + 0.5 * dstates[1] + dm[0] * a, 0.5 * dstates[2])
    return (da, db, dg, zero), (da, dr, db, dg, dk), dbefore, (zero, dh * c), (d * h,)


@triton.jit
def _all_finish(dgx, dbefore, dparams, dv, saved, before, after, params, FAST: tl.constexpr):
    d, q = saved[5], saved[6]
    dd = dv[0] * before[0] * d * (1.0 - d)
    dgx = (dgx[0], dgx[1], dgx[2], dd * params[0])
    return dgx, (dbefore[0] + dv[0] * d, dbefore[1], dbefore[2]), (dparams[0] + dd * q, dparams[1])


def _all_step(gx, product, states, params):
    h, c, s = states
    v = torch.sigmoid(gx[3] * params[0]) * h
    a, r, b = torch.tanh(gx[0] + product(0, v)), torch.tanh(product(1, v)), torch.sigmoid(gx[1] + product(2, c))
    g, k = torch.tanh(gx[2] + product(3, a * c)), torch.sigmoid(product(4, b * h))
    h = b * h + (1 - b) * g * k + params[1] * c
    return h, a * r + 0.5 * c, 0.5 * s + h


@triton.jit
def _apart_forward(gx, hu, states, params, FAST: tl.constexpr):
    a, b, k = tanh(gx[0] + hu[2], FAST), sigmoid(gx[1] + hu[1], FAST), sigmoid(hu[0], FAST)
    return (a * k + params[0] * states[1], b * states[1] + gx[2]), (a, b, k)


@triton.jit
def _apart_backward(dstates, dm, saved, before, after, params, FAST: tl.constexpr):
    a, b, k = saved
    dh, dc = dstates
    da, db, dk = dh * k * (1.0 - a * a), dc * before[1] * b * (1.0 - b), dh * a * k * (1.0 - k)
    return (da, db, dc), (dk, db, da), (tl.zeros_like(dh), dh * params[0] + dc * b), (dh * before[1],), ()


def _apart_step(gx, product, states, params):
    h, c = states
    a, b = torch.tanh(gx[0] + product(2, h)), torch.sigmoid(gx[1] + product(1, h))
    return a * torch.sigmoid(product(0, h)) + params[0] * c, b * c + gx[2]


KINDS = {
    # two states as operands, whose products add to one tile of gx; a trained vector
    "two operands": Kind(
        Cell(
            "kind_two", 1, 2, 1, (Operand(1, 1, 0), Operand(1, 1, 1)), (0, 0), params=1,
            forward=_two_forward, backward=_two_backward, operands_1=_two_operands_1,
        ),
        _two_step,
    ),
    # the first state is written only, as an extra output is; a per-step input
    "another state": Kind(
        Cell(
            "kind_other_state", 2, 2, 1, (Operand(1, 1, 1),), (0,),
            forward=_other_state_forward, backward=_other_state_backward, operands_1=_other_state_operands_1,
        ),
        _other_state_step,
    ),
    "no product": Kind(
        Cell("kind_alone", 2, 2, 2, (), (), params=1, forward=_alone_forward, backward=_alone_backward), _alone_step
    ),
    # one operand, its products in another order than the tiles of gx; one without a tile, one tile without a product
    "apart first": Kind(
        Cell(
            "kind_apart", 3, 2, 3, (Operand(1, 3, 0),), (-1, 1, 0), params=1,
            forward=_apart_forward, backward=_apart_backward,
        ),
        _apart_step,
    ),
    # eight gates, three states, a product apart between others
    "eight gates": Kind(
        Cell(
            "kind_eight", 8, 3, 9, (Operand(1, 8, 0),), (0, 1, 3, 4, 5, 7, -1, 2),
            forward=_eight_forward, backward=_eight_backward,
        ),
        _eight_step,
    ),
    # two levels of two operands each, of which one is a state and one computed, with what is late and a finish; three
    # states, two trained vectors, a per-step input; products apart in both levels
    "all at once": Kind(
        Cell(
            "kind_all", 4, 3, 7, (Operand(1, 2), Operand(1, 1, 1), Operand(2, 1), Operand(2, 1)), (0, -1, 1, 2, -1),
            params=2, late=(3,), forward=_all_forward, backward=_all_backward, operands_1=_all_operands_1,
            operands_2=_all_operands_2, backward_2=_all_backward_2, finish=_all_finish,
        ),
        _all_step,
    ),
}  # fmt: skip


def arguments(kind, T, B, H, K=1, dtype=torch.float64, device="cpu", seed=0):
    """What `scan.forward` takes by position, but the mask, and params: gx, u, bias, h0, c0, params."""
    cell, generator = KINDS[kind].cell, torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    def some(count, *shape, scale=0.5):
        return random(*shape, count * H, scale=scale) if count else None

    u = random(K, cell.products * H, H, scale=H**-0.5)
    states = some(1, K, B), some(cell.states - 1, K, B)
    return random(T, B, K, cell.gates * H), u, some(len(cell.apart), K), *states, some(cell.params, K)


def exact(kind, gx, u, bias, h0, c0, params, mask=None, reversed=0):
    """The states after each step, each [T, B, K, H], held rows' as they were; and the final ones, each [K, B, H]."""
    cell, step = KINDS[kind].cell, KINDS[kind].step
    T, K, H = gx.shape[0], *u.shape[::2]
    every, final = [], []
    for k in range(K):
        back = buffers.is_reversed(k, reversed)
        states = (h0[k], *(() if c0 is None else c0[k].split(H, 1)))
        vectors = () if params is None else params[k].split(H)
        shown = [None] * T
        for t in range(T)[:: -1 if back else 1]:
            came = states
            if mask is not None:
                resets = buffers.reset_rows(mask, back)[t, :, None]
                came = tuple(torch.where(resets, 0.0, s) for s in states)

            def product(n, v, k=k):
                hu = v @ u[k, n * H : (n + 1) * H].t()
                at = cell.apart.index(n) * H if n in cell.apart else None
                return hu if at is None or bias is None else hu + bias[k, at : at + H]

            new = step(gx[t, :, k].split(H, 1), product, came, vectors)
            held = None if mask is None else buffers.padding_rows(mask)
            if held is not None:
                new = tuple(torch.where(held[t, :, None], s, n) for s, n in zip(states, new, strict=True))
            states = shown[t] = new
        every.append([torch.stack(s) for s in zip(*shown, strict=True)])
        final.append(states)
    return [torch.stack(s, 2) for s in zip(*every, strict=True)], [torch.stack(s) for s in zip(*final, strict=True)]


def mask_of(name, T, B, reversed):
    """ "": None; "resets" or "lengths" (and resets): a mask as `scan` takes it, the last row of no step at all."""
    if not name:
        return None
    generator = torch.Generator().manual_seed(2)
    resets = torch.rand(T, B, generator=generator) < 0.4
    if name == "resets" and not reversed:
        return resets
    back = torch.rand(T, B, generator=generator) < 0.4
    codes = resets * buffers.RESET + (back * buffers.RESET_REVERSED if reversed else 0)
    if name == "lengths":
        ends = torch.randint(1, T + 1, (B,), generator=generator)
        ends[0], ends[-1] = T, 0
        codes = torch.where(torch.arange(T)[:, None] >= ends, buffers.PADDING, codes)
    return codes.to(torch.uint8)


def run(kind, schedule, given, mask, reversed, save, outer, *, device=None, precision="ieee", launch=scan.run):
    """Outputs and gradients by the kernels: y, c, hn, cn; of gx, u, bias, h0, c0, params (None where there is none).

    outer: dy, dcs, dhn, dcn. device: whose plan (None: of the device that the tensors are on).
    """
    cell, (gx, u, bias, h0, c0, params) = KINDS[kind].cell, given
    B, K, H = *gx.shape[1:3], u.shape[2]
    device = device or scan.device_facts(gx.device)
    size = {"B": B, "H": H, "groups": K, "itemsize": gx.element_size(), "device": device}
    there, back = (plan(cell, **size, schedule=schedule, precision=precision, backward=b) for b in (False, True))
    how = {"params": params, "reversed": reversed, "launch": launch}
    out = scan.forward(cell, gx, u, bias, h0, c0, mask, save=save, plan=there, precision=precision, **how)
    saved = out.saved
    if save == "states":
        saved = scan.recompute(cell, gx, u, bias, out.y, out.c, mask, plan=there, **how)
    dy, dcs, dhn, dcn = outer
    state = (u, out.y, out.c, saved, mask)
    found = scan.backward(cell, dy, dhn, dcn, *state, plan=back, dcs=dcs, precision=precision, **how)
    y = buffers.outputs(out.y, reversed)
    c = buffers.outputs(out.c, reversed) if out.c.numel() else None
    du, dbias = torch.zeros_like(u, dtype=torch.float64), None if bias is None else found.dhu.double().sum((0, 1))
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
                du[k, p * H : (p + 1) * H] = d.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
        product += operand.products
    dparams = found.dparams if cell.params else None
    return [y, c, out.hn, out.cn if out.cn.numel() else None], [
        found.dgx, du, dbias, found.dh0, found.dc0 if c0 is not None else None, dparams,
    ]  # fmt: skip


def wanted(kind, given, mask, reversed, outer):
    """What `run` gives, by autograd in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in given]
    every, final = exact(kind, *leaves, mask, reversed)
    held = None if mask is None else buffers.padding_rows(mask)
    if held is not None:
        every = [s.masked_fill(held[:, :, None, None], 0.0) for s in every]
    cat = [torch.cat(of[1:], -1) if len(of) > 1 else None for of in (every, final)]
    outputs = [every[0], cat[0], final[0], cat[1]]
    pairs = [(o, d.double()) for o, d in zip(outputs, outer, strict=True) if d is not None]
    total = sum((o * d).sum() for o, d in pairs)
    there = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(total, there, allow_unused=True, materialize_grads=True))
    return outputs, [None if t is None else next(grads) for t in leaves]

"""One kernel with one plan against the cell's step in float64: what `verification` does at a kernel's first use.

It runs in a thread of its own, without the caller's modes (autocast, inference, saved-tensor hooks, transforms). The
reference runs on the CPU: not by the GPU's own products, and where backward is under way on the device, the autograd
engine could not start another one there. It starts from gx and ends at its gradient, because the products around the
kernels follow PyTorch's settings, such as TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from . import drawn, fallback, kernels, masks, products, reference, testing
from .cell import Cell, get
from .kernels.buffers import is_reversed, outputs
from .testing import Shape

T, I = 3, 3  # noqa: E741  (the project's letter)
# An element may be wrong by so many times the tolerance, in units of its own size and its tensor's root mean square.
ELEMENT = 8


class Variant(NamedTuple):
    """What kernels are compiled for, beside the plan. direction: forward, backward or step; of a stack, "stack" or
    "stack backward", and groups are its layers. save: of backward "gates", or "states" if it recomputes the gates.
    given: which optional tensors there are: forward, the bias of the products apart; stack, the biases of gx and that;
    step, b_ih and b_hh; backward, dy, dhn, dcn, dcs and b_hh. inputs, through: of a step, the size of x and the
    precision of its product."""

    direction: str
    cell: str
    dtype: torch.dtype
    device: torch.device
    groups: int
    hidden_size: int
    reversed: int
    precision: str
    save: str
    mask: torch.dtype | None
    given: tuple[bool, ...]
    inputs: int = 0
    through: str = ""


class _Poisoned(TorchDispatchMode):
    """New memory is NaN, or the largest integer; in this thread only, unlike testing.poisoned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's own types
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like):
            made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)
        return made


class _Case(NamedTuple):
    """Tensors on the CPU, as the kernels take them (see kernels.scan); of a step also x [B, I] and the weights of
    kernels.single, whose gx is the product with them. resets, lengths: those of the mask."""

    gx: Tensor
    u: Tensor
    bias: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    params: Tensor | None
    dropout: Tensor | None
    mask: Tensor | None
    resets: Tensor | None
    lengths: Tensor | None
    step: tuple[Tensor | None, ...] = ()


def _case(v: Variant, rows: int, seed: int = 0) -> _Case:
    """The tensors of a check, rounded to the variant's dtype."""
    cell, at, H, K = get(v.cell), products.places(v.cell), v.hidden_size, v.groups
    single = v.direction == "step"
    shape = Shape(1 if single else T, rows, v.inputs or I, H)
    names = testing.names(cell)
    groups = [
        dict(zip(names, testing.inputs(cell, shape, torch.float64, "cpu", seed=seed + k), strict=True))
        for k in range(K)
    ]

    def round(t: Tensor) -> Tensor:
        return t.to(v.dtype)

    def stacked(*wanted: str) -> Tensor | None:
        each = [[g[n].expand(*g[n].shape[:-1], H) if n in cell.params else g[n] for n in wanted] for g in groups]
        return round(torch.stack([torch.cat(ts, -1) for ts in each])) if wanted else None

    there = [stacked(n) if n in names else None for n in ("w_ih", "w_hh", "b_ih", "b_hh")]
    x, (w_ih, w_hh, b_ih, b_hh) = round(groups[0]["x"]), there
    if w_ih is None:
        w_ih = x.new_empty(K, 0, shape.I)
    starts = [f"{s}0" for s in cell.states]
    h0 = None if at.output else stacked(starts.pop(0))
    size = (*x.shape[:2], H)
    every = [g[..., None].expand(size) if g.dim() == 2 else g for g in (groups[0][n] for n in cell.inputs)]
    beside = round(torch.cat(every, 2)) if every else None
    b_ih, b_hh = b_ih if v.given[0] or not single else None, b_hh if v.given[-1] else None
    biases = [None if b is None else b.double() for b in (b_ih, b_hh)]
    more = None if beside is None else beside.double()
    gx, bias = products.input_projection(at, x.double(), w_ih.double(), biases[0], biases[1], H, more)
    u = products.recurrent(at, w_hh, w_ih, H)
    step: tuple[Tensor | None, ...] = ()
    if single:
        first, second = (None if b is None else b[0] for b in (b_ih, b_hh))
        step = (x[0], w_ih[0], u[0], *products.step_biases(at, first, second, H))
    else:
        gx, bias = round(gx), None if bias is None else round(bias)
    dropout = drawn.example(cell, v.dtype) if cell.drawn else None
    resets = lengths = None
    if v.mask is not None:
        resets = (torch.arange(shape.T)[:, None] + torch.arange(rows)) % 3 == 1
    if v.mask == torch.uint8:
        lengths = torch.arange(rows) % shape.T + 1
    mask = masks.encode(resets, lengths, shape.T, v.reversed)
    c0 = stacked(*starts)
    return _Case(gx, u, bias, h0, c0, stacked(*cell.params), dropout, mask, resets, lengths, step)


class _Exact:
    """The scan of a case in float64, differentiable. e [T, B, K, .*H]: zeros that are added to the products apart, so
    that their gradient is dhu; m: the operands that backward stores."""

    def __init__(self, v: Variant, case: _Case) -> None:
        cell, form, K, H = get(v.cell), get(v.cell).form, v.groups, v.hidden_size
        at, steps, rows = products.places(v.cell), *case.gx.shape[:2]
        wide = [None if t is None else t.to(torch.float64, copy=True) for t in case[:6]]
        gx, u, bias, h0, c0, params = wide
        assert gx is not None and u is not None
        zero = gx.new_zeros(K, rows, H)
        h0 = zero if h0 is None else h0
        c0 = gx.new_zeros(K, rows, (form.states - 1) * H) if c0 is None else c0
        e = gx.new_zeros(steps, rows, K, len(form.apart) * H)
        self.leaves = {"dgx": gx, "dhu": e, "dh0": h0, "dc0": c0}
        self.leaves |= {} if params is None else {"dparams": params}
        for t in self.leaves.values():
            t.requires_grad_()
        beside = [*e.split(H, 3)] if form.apart else []
        if case.dropout is not None:
            drawing = drawn.given(cell, None, case.dropout.double(), (steps, rows, K, H), torch.float64)
            beside += (drawing if K > 1 else drawing[:, :, None]).split(H, 3)
        self.mask = None if case.lengths is None else masks.ended(case.lengths, steps)[..., None, None]
        found: list[tuple[Tensor, ...]] = []
        operands: list[Tensor] = []
        for k in range(K):
            step = _Step(cell, u[k], None if bias is None else bias[k])
            every, final = reference.scan_states(
                step,
                gx[:, :, k],
                (*(() if at.output else (h0[k],)), *(c0[k].split(H, -1) if form.states > 1 else ())),
                gx.new_empty(0, gx.shape[3]),
                None,
                params=() if params is None else params[k].split(H),
                inputs=tuple(t[:, :, k] for t in beside),
                resets=case.resets,
                lengths=case.lengths,
                reverse=is_reversed(k, v.reversed),
            )
            found.append((every[0], _joined(every[1:], every[0]), final[0], _joined(final[not at.output :], final[0])))
            seen = step.seen[::-1] if is_reversed(k, v.reversed) else step.seen
            operands.append(torch.stack([_joined(ts, every[0][0]) for ts in seen]))
        y, c, hn, cn = zip(*found, strict=True)
        self.y, self.c, self.m = (torch.stack(ts, 2) for ts in (y, c, operands))
        self.hn, self.cn = torch.stack(hn), torch.stack(cn)
        self.output, self.reversed = at.output, v.reversed

    def forward(self) -> dict[str, Tensor]:
        """What kernels.scan.forward gives, by name: the buffers with the rows that groups start from."""
        found = {"y": self._rows(self.y, self.leaves["dh0"]), "c": self._rows(self.c, self.leaves["dc0"])}
        return found | ({} if self.output else {"hn": self.hn}) | {"cn": self.cn}

    def _rows(self, every: Tensor, start: Tensor) -> Tensor:
        start = start.detach().transpose(0, 1)[None]
        if not self.reversed:
            return torch.cat([start, every])
        back = torch.tensor([is_reversed(k, self.reversed) for k in range(every.shape[2])])[:, None]
        return torch.cat([start.masked_fill(back, 0), every, start.masked_fill(~back, 0)])

    def backward(self, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """What kernels.scan.backward gives, by name. grads: dy, dhn, dcn and dcs."""
        pairs = zip((self.y, self.hn, self.cn, self.c), grads, strict=True)
        given = [(o, g.double()) for o, g in pairs if g is not None and o.requires_grad]
        outs, weights = zip(*given, strict=True)
        found = torch.autograd.grad(
            outs, list(self.leaves.values()), weights, allow_unused=True, materialize_grads=True
        )
        by_name = dict(zip(self.leaves, found, strict=True))
        m = self.m if self.mask is None else self.m.masked_fill(self.mask, 0)
        by_name["m"] = m.detach()
        return {n: t for n, t in by_name.items() if not (n == "dh0" and self.output)}


def _joined(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tuple(tensors), -1) if len(tensors) else like.new_empty(*like.shape[:-1], 0)


class _Step:
    """A cell's step for reference.scan_states, from tiles of gx in place of x. seen: of each step, the operands that
    backward stores."""

    rows = (0, 0, 0, 0)  # of the weights that it takes

    def __init__(self, cell: Cell, u: Tensor, bias: Tensor | None) -> None:
        self.cell, self.u, self.bias = cell, u, bias
        self.called = drawn.explicit(cell) if cell.drawn else cell
        self.at, self.form, self.H = products.places(cell.key), cell.form, u.shape[1]
        self.seen: list[tuple[Tensor, ...]] = []
        first = [sum(o.products for o in self.form.operands[:n]) for n in range(len(self.form.operands))]
        self.stored = {first[n]: i for i, n in enumerate(self.form.stored)}  # the first product of each stored operand

    def __call__(
        self, x: Tensor, states: tuple[Tensor, ...], *weights: object, params: Any = (), inputs: Any = ()
    ) -> tuple[Tensor, ...]:
        if len(weights) > 4:
            params, inputs = weights[4:]
        tiles, apart = x.split(self.H, -1), len(self.form.apart)
        now: dict[int, Tensor] = {}
        by_product = [self._product(p, inputs[:apart], now) for p in self.at.w_hh]
        x_type, u_type = self.cell.by_gate
        arguments = (*states, *params, *tiles[self.at.x :], *inputs[apart:])
        found = self.called(x_type(*tiles[: self.at.x]), u_type(*by_product), *arguments)
        results = found if isinstance(found, (tuple, list)) else (found,)
        shape = (*x.shape[:-1], self.H)
        results = tuple(r if r.shape == shape else r.expand(shape) for r in results)
        self.seen.append(tuple(now[n].expand(shape) for n in range(len(now))))
        return (*results[len(states) :], *results[: len(states)])

    def _product(self, p: int, nudges: Sequence[Tensor], now: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        block = slice(p * self.H, (p + 1) * self.H)

        def times(v: Tensor) -> Tensor:
            if p in self.stored:
                now.setdefault(self.stored[p], v)
            found = linear(v, self.u[block])
            if p not in self.form.apart:
                return found
            n = self.form.apart.index(p)
            if self.bias is not None:
                found = found + self.bias[n * self.H : (n + 1) * self.H]
            return found + nudges[n]

        return times


class Error(NamedTuple):
    """The tensor that is furthest off, as a multiple of what is allowed."""

    worst: float
    tensor: str


class Unable(Exception):
    """The check itself failed, before any kernel ran; __cause__ is the error."""


def measure(v: Variant, plans: Sequence[Any], rows: int) -> Error:
    """Run a variant on a small case of so many rows, and compare everything that it gives.

    plans: forward's, of backward also its own; of a step its own, and if it saves gates also backward's. Raises Unable;
    fallback.Failed if a kernel does not compile or launch; and what fallback.guarded does not catch.
    """
    if v.direction.startswith("stack"):
        return _measure_stack(v, plans, rows)
    try:
        case = _case(v, rows)
        exact = _Exact(v, case)
        expected, grads = exact.forward(), _grads(v, exact)
        if len(plans) > 1:
            expected |= exact.backward(grads)
        if not all(t.isfinite().all() for t in expected.values()):
            raise ValueError("the step is not finite for random inputs")
        moved = _Case(*[_moved(t, v.device) for t in case])
        allowed = _allowed(v, rows)
    except Exception as error:
        raise Unable from error
    found: dict[str, Tensor] = {}

    def by_kernels() -> None:
        with _Poisoned():
            found.update(_kernels(v, plans, moved, grads))

    fallback.guarded(by_kernels)
    return max(_errors(v, found, expected, exact, allowed), key=lambda e: e.worst, default=Error(0.0, ""))


def _measure_stack(v: Variant, plans: Sequence[Any], rows: int) -> Error:
    """`measure` of a stack: each layer against the reference, from what the kernel made of the layer before it."""
    L, H, back = v.groups, v.hidden_size, len(plans) > 1
    one = v._replace(direction="backward" if back else "forward", groups=1)
    try:
        cases = [_case(one, rows, n) for n in range(L)]
        each = [_grads(one, _Exact(one, case)) for case in cases]
        generator, GH = torch.Generator().manual_seed(2), cases[0].gx.shape[3]
        w = (torch.randn(L - 1, GH, H, generator=generator, dtype=torch.float64) / H**0.5).to(v.dtype)
        b = torch.randn(L - 1, GH, generator=generator, dtype=torch.float64).to(v.dtype) if v.given[0] or back else None
        # u, bias, h0, c0 and params, with an axis of layers in place of the groups'
        layers = [None if ts[0] is None else torch.cat(ts) for ts in zip(*(c[1:6] for c in cases), strict=True)]
        ends = [None if d[0] is None else torch.cat(d) for d in list(zip(*each, strict=True))[1:3]]
        given = [_moved(t, v.device) for t in (cases[0].gx, w, b, *layers, cases[0].mask, each[0][0], *ends)]
        allowed = _allowed(v._replace(inputs=H), rows)
    except Exception as error:
        raise Unable from error
    found: dict[str, Tensor] = {}

    def by_kernels() -> None:
        with _Poisoned():
            gx, w, b, u, bias, h0, c0, params, mask, dy, dhn, dcn = given
            own: dict[str, Any] = {"precision": v.precision, "params": params, "launch": kernels.scan.run}
            cell, save = kernels.cells.get(v.cell), "gates" if back else v.save
            out = kernels.stack.forward(cell, gx, w, b, u, bias, h0, c0, mask, save=save, plan=plans[0], **own)
            found.update(
                {n: t.cpu() for n, t in out._asdict().items() if n != "saved" and (save != "none" or n != "c")}
            )
            if back:
                of_forward = (dy, dhn, dcn, w, u, out.y, out.c, out.saved, mask)
                made = kernels.stack.backward(cell, *of_forward, plan=plans[1], **own)
                found.update({n: t.cpu() for n, t in made._asdict().items()})

    fallback.guarded(by_kernels)

    def between(t: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return linear(t.double(), w.double(), None if b is None else b.double()).to(v.dtype)

    errors: list[Error] = []
    for n, (case, grads) in enumerate(zip(cases, each, strict=True)):
        if n:
            case = case._replace(gx=between(found["y"][n - 1, 1:], w[n - 1], None if b is None else b[n - 1]))
        exact = _Exact(one, case)
        expected = exact.forward()
        if back:
            dy = each[0][0] if n == L - 1 else between(found["dgx"][n + 1], w[n].t(), None)
            expected |= exact.backward((dy, *grads[1:]))
        own = {name: t[n] for name, t in found.items() if t[n].numel()}
        errors += _errors(one, own, expected, exact, allowed)
    return max(errors, key=lambda e: e.worst)


def _moved(t: Any, device: torch.device) -> Any:  # a tensor, None or a tuple of them
    if isinstance(t, tuple):
        return tuple(_moved(each, device) for each in t)
    return None if t is None else t.to(device)


def _grads(v: Variant, exact: _Exact) -> tuple[Tensor | None, ...]:
    """Gradients of y, hn, cn and c, of those that the variant has."""
    generator = torch.Generator().manual_seed(1)
    given = v.given[:4] if v.direction == "backward" else (True, False, exact.c.shape[-1] > 0, False)
    shapes = (exact.y.shape, exact.hn.shape, exact.cn.shape, exact.c.shape)
    every = [torch.randn(s, generator=generator, dtype=torch.float64).to(v.dtype) for s in shapes]
    return tuple(t if there else None for t, there in zip(every, given, strict=True))


def _kernels(v: Variant, plans: Sequence[Any], case: _Case, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What the kernels give, by the names of `_Exact`."""
    gx, u, bias, h0, c0, params, dropout, mask, *_ = case
    cell, forward, single = kernels.cells.get(v.cell), plans[0], v.direction == "step"
    own: dict[str, Any] = {"precision": v.precision, "launch": kernels.scan.run}
    more: dict[str, Any] = {"params": params, "dropout": dropout, "reversed": v.reversed}
    if single:
        own |= zip(("x", "w_ih", "w_hh", "b_ih", "b_hh"), case.step, strict=True)
        own |= {"h0": None if h0 is None else h0[0], "c0": None if c0 is None else c0[0]}
        own |= {"params": None if params is None else params[0], "input_precision": v.through, "save": v.save}
        out = kernels.single.forward(cell, plan=forward, **own)
        out = out._replace(hn=out.hn[None], cn=out.cn[None] if out.cn.dim() > 1 else out.cn)
    else:
        out = kernels.scan.forward(cell, gx, u, bias, h0, c0, mask, save=v.save, plan=forward, **own, **more)
    found = {n: t for n, t in out._asdict().items() if n != "saved" and (v.save != "none" or n != "c")}
    if len(plans) > 1:
        saved = out.saved
        if v.save == "states":
            how = {"plan": forward, "launch": kernels.scan.run, **more}
            saved = kernels.scan.recompute(cell, gx, u, bias, out.y, out.c, mask, **how)
        dy, dhn, dcn, dcs = (None if g is None else g.to(v.device) for g in grads)
        how = {"dcs": dcs, "plan": plans[1], "precision": v.precision, "launch": kernels.scan.run, **more}
        made = kernels.scan.backward(cell, dy, dhn, dcn, u, out.y, out.c, saved, mask, **how)
        found |= made._asdict()
    return {n: t.cpu() for n, t in found.items() if t.numel()}


def _allowed(v: Variant, rows: int) -> float:
    """The tolerance of `testing.check`."""
    kind: torch.dtype | str = v.dtype
    if v.dtype == torch.float32 and v.precision != "ieee":
        kind = v.precision
    if v.dtype == torch.float32 and v.save == "states" and v.device.type == "cuda":
        kind = "tf32"  # recomputing takes a product by PyTorch's settings
    return testing.tolerance(v.cell, kind, Shape(T, rows, v.inputs or I, v.hidden_size))


def _errors(
    v: Variant, found: dict[str, Tensor], expected: dict[str, Tensor], exact: _Exact, allowed: float
) -> Iterator[Error]:
    """The error of each tensor in units of what is allowed."""
    smooth = testing.smooth(v.cell)
    for name, got in found.items():
        if name not in expected:
            continue
        got, right = got.double(), expected[name].detach()
        if name in ("y", "c") and exact.mask is not None and v.reversed:  # there a reversed group's are its first
            outputs(got, v.reversed).masked_fill_(exact.mask, 0)
        worst = testing.relative(got, right)
        if smooth:
            unit = right.square().mean().sqrt().clamp_min(1e-300) + right.abs()
            worst = max(worst, float(((got - right).abs() / unit).nan_to_num(torch.inf).max()) / ELEMENT)
        yield Error(min(worst / allowed, 1e300), name)

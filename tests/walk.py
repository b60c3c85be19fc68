"""A derived cell's functions run over time in plain torch: a schedule that is easy to verify, for any form.

`walk` returns outputs and all gradients by the functions; `autograd` returns those of the step itself.
"""

from functools import partial
from random import Random
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.nn.functional import linear

from seqcells.derive.values import FROM_MATH, FROM_TRITON


class Language:
    """What the Triton source says to triton.language, said to torch."""

    constexpr = bool
    where, zeros_like = torch.where, torch.zeros_like


for name in FROM_TRITON:
    setattr(Language, name, staticmethod(getattr(torch, name)))


def functions(cell):
    """The Triton functions of a cell as functions on tensors; params [H]."""
    space = {
        "tl": Language,
        "means": lambda tiles, *_: tuple(x.mean(-1, keepdim=True) for x in tiles),
        **{n: (lambda f: lambda x, *_: f(x))(getattr(torch, n)) for n in FROM_MATH},
    }
    exec(cell.source, space)

    def call(name):
        return None if name not in space else lambda *a: space[name](*a, False)

    names = ("operands_1", "operands_2", "forward", "backward_2", "backward", "finish")
    return SimpleNamespace(**{n: call(n) for n in names})


def inputs(cell, T=4, B=3, I=2, H=5, scale=1.0):  # noqa: E741
    """x, states, w_ih, w_hh, b_ih, b_hh, params, per-step inputs: random, all with gradients."""
    torch.manual_seed(sum(map(ord, cell.name)))

    def random(*shape, by=scale):
        return (torch.randn(*shape, dtype=torch.float64) * by).requires_grad_()

    gx, gu = len(cell.x_gates), len(cell.u_gates)
    return {
        "x": random(T, B, I),
        **{f"state {n}": random(B, H) for n in cell.states},
        "w_ih": random(gx * H, I),
        "w_hh": random(gu * H, H, by=H**-0.5),
        "b_ih": random(gx * H),
        "b_hh": random(gu * H),
        **{f"param {n}": random(1 if n in cell.scalars else H) for n in cell.params},
        **{f"input {n}": random(T, B, H) for n in cell.inputs},
    }


def of_kind(given, kind, names):
    return [given[f"{kind} {n}"] for n in names]


def blocks(t, H):
    """Its row blocks of H."""
    return [t[n : n + H] for n in range(0, t.shape[0], H)]


def by_step(cell, given, resets=None):
    """Outputs and final states by the step."""
    states = of_kind(given, "state", cell.states)
    ys, H = [], states[0].shape[-1]
    for t, x in enumerate(given["x"]):
        if resets is not None:
            states = [s.masked_fill(resets[t, :, None], 0) for s in states]
        gx = dict(zip(cell.x_gates, blocks(linear(x, given["w_ih"], given["b_ih"]).T, H), strict=True))
        us = zip(cell.u_gates, blocks(given["w_hh"], H), blocks(given["b_hh"], H), strict=True)
        U = SimpleNamespace(**{k: partial(linear, weight=w, bias=b) for k, w, b in us})
        extras = [p.expand(states[0].shape[-1:]) for p in of_kind(given, "param", cell.params)]
        found = cell(
            SimpleNamespace(**{k: g.T for k, g in gx.items()}),
            U,
            *states,
            *extras,
            *(i[t] for i in of_kind(given, "input", cell.inputs)),
        )
        found = [s.expand(states[0].shape) for s in (found if isinstance(found, tuple) else [found])]
        states = found[: len(cell.states)]
        ys.append(found[-1] if cell.outputs else states[0])
    return torch.stack(ys), states


class Walk:
    """A cell's functions over all steps. stored: a dtype of what backward is given of forward."""

    def __init__(self, cell, functions, given, resets, stored):
        self.cell, self.form, self.functions, self.resets, self.stored = cell, cell.form, functions, resets, stored
        self.given = {n: t.detach() for n, t in given.items()}
        x, w_ih, w_hh, b_ih, b_hh = (self.given[n] for n in ("x", "w_ih", "w_hh", "b_ih", "b_hh"))
        self.shape = B, H = x.shape[1], self.of("state", cell.states)[0].shape[-1]
        self.extra, self.gates, form = len(cell.outputs), len(cell.x_gates), cell.form
        order = list(cell.order)
        self.u = torch.stack([w_hh[n * H : n * H + H] for n in order]) if order else torch.zeros(0, H, H).double()
        self.b = torch.stack([b_hh[n * H : n * H + H] for n in order]) if order else torch.zeros(0, H).double()
        self.gx = list(linear(x, w_ih, b_ih).split(H, -1))[: self.gates] if self.gates else []
        for n, tile in enumerate(form.adds):
            if tile >= 0:
                self.gx[tile] = self.gx[tile] + self.b[n]
        self.gx += self.of("input", cell.inputs)
        self.params = (*(p.expand(H) for p in self.of("param", cell.params)), None)  # the last is what `means` is given
        ends = [sum(o.products for o in form.operands[: n + 1]) for n in range(len(form.operands))]
        self.of_operand = [range(e - o.products, e) for e, o in zip(ends, form.operands, strict=True)]
        self.unknown = (torch.full((B, H), float("nan")).double(),) * self.extra  # an output is no state before

    def of(self, kind, names):
        return of_kind(self.given, kind, names)

    def first_operands(self, gxs, states):
        if self.functions.operands_1 is not None:
            return self.functions.operands_1(gxs, states, self.params)
        return states[:1] if self.form.level else ()

    def multiply(self, operands, start):
        products = [(v, n) for i, v in enumerate(operands, start) for n in self.of_operand[i]]
        return [v @ self.u[n].T + (self.b[n] if self.form.adds[n] < 0 else 0) for v, n in products]

    def masked(self, states, t):
        resets = self.resets
        return states if resets is None else tuple(s.masked_fill(resets[t, :, None], 0) for s in states)

    def forward(self):
        """Of each step the states before and after it, what is saved, and the operands."""
        f, form, past = self.functions, self.form, []
        states = (*self.unknown, *self.of("state", self.cell.states))
        for t in range(len(self.given["x"])):
            before, gxs = self.masked(states, t), tuple(g[t] for g in self.gx)
            operands = self.first_operands(gxs, before)
            hu = self.multiply(operands, 0)
            if f.operands_2 is not None:
                second = f.operands_2(gxs, tuple(hu), before, self.params)
                hu += self.multiply(second, form.level)
                operands = (*operands, *second)
            states, saved = f.forward(gxs, tuple(hu), before, self.params)
            assert len(states) == form.states and len(saved) == form.saved
            made = (*states, *saved, *operands, *hu)
            assert all(t.shape == self.shape and t.dtype == self.given["x"].dtype for t in made)
            past.append((before, states, saved, operands))
        return past

    def backward_of_gates(self, dstates, operands, have):
        """dgx, dhu, the gradients of the states before the step, those of params; all before `finish`."""
        f, form, u, level = self.functions, self.form, self.u, self.form.level
        dm, again = (), ()
        if f.backward_2 is not None:
            dhu_2, again = f.backward_2(dstates, *have)
            starts = [r.start - form.first_products for r in self.of_operand[level:]]
            dm = tuple(
                sum(dhu_2[s + i] @ u[n] for i, n in enumerate(r))
                for s, r in zip(starts, self.of_operand[level:], strict=True)
            )
        dgx, dhu, dbefore, dp, computed = f.backward(dstates, dm, *have)
        if f.backward_2 is not None:
            assert all(torch.allclose(a, c, atol=1e-13) for a, c in zip(dhu_2, dhu[form.first_products :], strict=True))
        m = [operands[n] for n in form.stored]
        near = 1e-13 if self.stored is None else 1.0
        assert all(torch.allclose(a, c, atol=near) for a, c in zip((*computed, *again), m, strict=True))
        return dgx, dhu, dbefore, dp

    def step_back(self, dstates, past):
        """dgx, dhu, the gradients of the states before the step, those of params."""
        f, form = self.functions, self.form
        before, after, saved, operands = past
        if self.stored:
            saved, before, after = (tuple(s.to(self.stored).double() for s in part) for part in (saved, before, after))
        have = (saved, before, after, self.params)
        early, dhu, dbefore, dp = self.backward_of_gates(dstates, operands, have)
        through = [sum(dhu[n] @ self.u[n] for n in r) for r in self.of_operand[: form.level]]
        dv = tuple(d for d, o in zip(through, form.operands, strict=False) if o.state is None)
        dgx = early
        if f.finish is not None:
            dgx, dbefore, dp = f.finish(dgx, dbefore, dp, dv, *have)
        assert all(n in form.late or torch.equal(a, c) for n, (a, c) in enumerate(zip(early, dgx, strict=True)))
        for tile, d in zip(form.adds, dhu, strict=True):
            assert tile < 0 or (tile not in form.late and torch.equal(d, dgx[tile]))
        dbefore = list(dbefore)
        for d, o in zip(through, form.operands, strict=False):
            if o.state is not None:
                dbefore[o.state] = dbefore[o.state] + d
        assert not self.extra or not dbefore[0].any()
        assert all(d.shape == self.shape for d in (*dgx, *dhu, *dbefore, *dp))
        return dgx, dhu, tuple(dbefore), dp

    def backward(self, past, dy, dfinal):
        """dgx, dhu [T, tiles, B, H], the gradients of the given states, those of params."""
        none = torch.zeros(*self.shape).double()
        dstates, dgxs, dhus = (*[none] * self.extra, *dfinal), [], []
        dparams = [torch.zeros(self.shape[1]).double() for _ in self.cell.params]
        for t in range(len(past) - 1, -1, -1):
            dgx, dhu, dbefore, dp = self.step_back((dstates[0] + dy[t], *dstates[1:]), past[t])
            dparams = [a + c.sum(0) for a, c in zip(dparams, dp, strict=True)]
            dstates = self.masked(dbefore, t)
            dgxs.insert(0, torch.stack(dgx) if dgx else none.expand(0, *self.shape))
            dhus.insert(0, torch.stack(dhu) if dhu else none.expand(0, *self.shape))
        return torch.stack(dgxs), torch.stack(dhus), dstates[self.extra :], dparams

    def recurrent_gradients(self, past, dhu):
        """Of w_hh and b_hh."""
        dw, db = (torch.zeros_like(self.given[n]) for n in ("w_hh", "b_hh"))
        H, order = self.shape[1], self.cell.order
        for operand, r in enumerate(self.of_operand):
            v = torch.stack([p[3][operand] for p in past])
            for n in r:
                rows = slice(order[n] * H, order[n] * H + H)
                dw[rows], db[rows] = torch.einsum("tbo,tbi->oi", dhu[:, n], v), dhu[:, n].sum((0, 1))
        return dw, db


def walk(cell, functions, given, dy, dfinal, resets=None, stored=None):
    """y, the final states, and gradients of all that is given, by the functions; stored: see `Walk`."""
    steps = Walk(cell, functions, given, resets, stored)
    past = steps.forward()
    dgx, dhu, dstates, dparams = steps.backward(past, dy, dfinal)
    dw_hh, db_hh = steps.recurrent_gradients(past, dhu)
    x, gates, scalars = steps.given["x"], steps.gates, cell.scalars
    flat = dgx[:, :gates].transpose(1, 2).flatten(2)
    final = past[-1][1][steps.extra :]
    return {
        "y": torch.stack([states[0] for _, states, _, _ in past]),
        **{f"final {n}": s for n, s in zip(cell.states, final, strict=True)},
        "d x": flat @ steps.given["w_ih"],
        **{f"d state {n}": d for n, d in zip(cell.states, dstates, strict=True)},
        "d w_ih": torch.einsum("tbo,tbi->oi", flat, x),
        "d w_hh": dw_hh,
        "d b_ih": flat.sum((0, 1)),
        "d b_hh": db_hh,
        **{f"d param {n}": d.sum()[None] if n in scalars else d for n, d in zip(cell.params, dparams, strict=True)},
        **{f"d input {n}": dgx[:, gates + i] for i, n in enumerate(cell.inputs)},
    }


def autograd(cell, given, dy, dfinal, resets=None):
    """The same by autograd of the step."""
    y, states = by_step(cell, given, resets)
    loss = (y * dy).sum() + sum((s * d).sum() for s, d in zip(states, dfinal, strict=True))
    gradients = torch.autograd.grad(loss, list(given.values()), allow_unused=True, materialize_grads=True)
    found = {"y": y, **{f"final {n}": s for n, s in zip(cell.states, states, strict=True)}}
    found |= {f"d {n}": g for n, g in zip(given, gradients, strict=True)}
    return {n: t.detach() for n, t in found.items()}


def drawn(seed):
    """A step at random, and how it is declared: one to four states, any operands of two levels, vectors and inputs."""
    random = Random(seed)
    gates = [f"g{n}" for n in range(random.randint(1, 5))]
    states = [f"s{n}" for n in range(random.randint(1, 4))]
    params = [f"p{n}" for n in range(random.choice([0, 0, 1, 2]))]
    inputs = [f"a{n}" for n in range(random.choice([0, 0, 1, 2]))]
    output = random.choice(["", "", "y"])
    lines, level = [], dict.fromkeys((*states, *params, *inputs), 0)
    unary = ("sigmoid({})", "tanh({})", "relu({})", "F.silu({})", "exp(-{} * {})", "F.softplus({})", "0.5 * {}", "-{}")
    binary = (
        "{} + {}",
        "{} - {}",
        "{} * {}",
        "torch.maximum({}, {})",
        "torch.where({} > 0.1, {}, 0.3)",
        "{} / (1 + {} ** 2)",
    )

    def add(text, of, new):
        lines.append(f"{new} = {text}")
        level[new] = max((level[o] for o in of), default=0)

    for number, gate in enumerate(gates):
        for n in range(random.randint(0, 2)):
            form, of = random.choice(unary + binary), random.choices(list(level), k=2)
            add(form.format(*of) if form.count("{}") == 2 else form.format(of[0]), of, f"v{number}_{n}")
        kind = random.choice(["x", "both", "both", "both", "apart", "U"]) if number else "both"
        operand = random.choice([o for o, at in level.items() if at < 2 and o not in params])
        product = f"U.{gate}({random.choice([states[0], operand, operand])})"
        of = [product[product.index("(") + 1 : -1]] if kind != "x" else []
        text = {"x": f"x.{gate}", "both": f"x.{gate} + {product}", "U": product, "apart": f"x.{gate} * {product}"}[kind]
        add(text, of, f"k{number}")
        level[f"k{number}"] += kind != "x"
        add(random.choice(unary[:3]).format(f"k{number}"), [f"k{number}"], f"w{number}")
    results = [f"tanh({v})" for v in random.choices(list(level), k=len(states))]
    results[0] = f"tanh({' + '.join(f'w{n}' for n in range(len(gates)))} + {states[-1]})"
    if len(states) > 1:
        results[-1] = random.choice(list(level))
    results += [random.choice([v for v in level if v not in params])] if output else []
    head = f"def step{seed}({', '.join(('x', 'U', *states, *params, *inputs))}):"
    source = "\n    ".join([head, *lines, f"return {', '.join(results)}"])
    space = {"torch": torch, "F": F, **{n: getattr(torch, n) for n in ("sigmoid", "tanh", "relu", "exp")}}
    exec(source, space)
    declared = {"gates": gates, "states": states, "params": params, "inputs": inputs}
    return space[f"step{seed}"], {**{k: " ".join(v) for k, v in declared.items()}, "outputs": output}, source


def differences(cell, functions, resets=False, stored=None, **sizes):
    """Of each result, the largest difference by the largest value; stored: see `walk`."""
    given = inputs(cell, **sizes)
    T, B = given["x"].shape[:2]
    H = of_kind(given, "state", cell.states)[0].shape[-1]
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(T, B, H, dtype=torch.float64, generator=generator)
    dfinal = tuple(torch.randn(B, H, dtype=torch.float64, generator=generator) for _ in cell.states)
    mask = torch.rand(T, B, generator=generator) < 0.3 if resets else None
    found = walk(cell, functions, given, dy, dfinal, mask, stored)
    expected = autograd(cell, given, dy, dfinal, mask)
    assert list(found) == list(expected)
    return {
        n: float((found[n] - e).abs().max() / max(1.0, float(e.abs().max()))) if e.numel() else 0.0
        for n, e in expected.items()
    }

"""Means over units inside a step, and layer norm made of them: what is derived, the engines, the gallery's cells."""

import inspect
from functools import partial

import pytest
import torch
from conftest import DEVICE
from shapes import spread
from torch.nn import functional as F
from walk import differences, functions

import seqcells
from seqcells import cells, testing
from seqcells.derive.cut import smallest
from seqcells.derive.values import Graph
from seqcells.kernels.cost import BARRIER
from seqcells.kernels.devices import KNOWN
from seqcells.kernels.plan import plan
from seqcells.kernels.plan_single import unfit
from seqcells.testing import Shape

ENGINES = ["loop", "triton:resident", "triton:grid", "triton:stepwise"]
MASKED = {"save": "states", "resets": True, "lengths": True}


@seqcells.cell(gates="a", states="h", params="gain=1 shift=0")
def by_layer_norm(x, U, h, gain, shift):
    return torch.tanh(F.layer_norm(x.a + U.a(h), h.shape[-1:]) * gain + shift)


@seqcells.cell(gates="a b", states="h")
def two_levels(x, U, h):
    """Means in both operands, of a product, and in an exponential; one is saved, as a tile."""
    r = F.rms_norm(x.a * h, h.shape[-1:], eps=1e-5)
    s = U.b(r).mean(-1, keepdim=True)
    return torch.tanh(x.b + torch.exp(s - torch.mean(h, 1, keepdim=True)) * torch.sigmoid(U.a(h * s)))


@seqcells.cell(gates="a b", states="h c", params="p")
def broadcast(x, U, h, c, p):
    """A new state, a comparison and an input's gradient that are one number for each row, and a mean of a vector."""
    s = h.mean(dim=-1, keepdim=True)
    q = (p * x.b).mean(-1, keepdim=True) + p.mean(-1, keepdim=True)
    return torch.tanh(x.a + U.a(c * s)) + torch.where(s > q, s, h), torch.sigmoid(q).expand_as(h)


@seqcells.cell(gates="a", states="h")
def undefined_at_zero(x, U, h):
    """As units beyond H are: their logarithm is infinite."""
    a = torch.log(x.a.abs())
    return torch.tanh(a - a.mean(-1, keepdim=True) + U.a(h))


@seqcells.cell(gates="a", states="h")
def alone(x, U, h):
    """Without a product."""
    return torch.tanh(x.a + h - h.mean(-1, keepdim=True))


STEPS = [by_layer_norm, two_levels, broadcast, undefined_at_zero]
NORMED = [cells.lnlstm, cells.lngru, cells.dreamer_gru]


@pytest.mark.parametrize("cell", [*STEPS, *NORMED], ids=lambda c: c.name)
def test_gradients_as_autograd_has_them(cell):
    for resets in (False, True):
        found = differences(cell, functions(cell), resets)
        assert max(found.values()) <= 1e-13, found
    assert cell.form.means and not cells.lstm.form.means


def test_a_mean_is_made_once_and_not_pulled_apart():
    g = Graph()
    d, e, a, b = g.make("dstate", 0), g.make("dstate", 1), g.make("hu", 0), g.make("param", 0)
    m = g.mean(a)
    assert m.row and not m.full and g.mean(m) is m and g.mean(g.number(2)) is g.number(2)
    assert not b.full and not g.product(b, m).row and g.product(a, b).full
    assert g.mean(g.product(d, m, a)) is g.product(g.mean(g.product(d, a)), m), "what is the same in all units"
    assert g.sum(g.mean(d), g.mean(e)) is g.mean(g.sum(d, e)), "one reduction"
    both = g.difference(g.product(g.mean(d), m), g.product(m, g.mean(e)))
    assert both is g.product(m, g.mean(g.difference(d, e)))
    assert g.sum(g.mean(d), d).op == "add" and g.sum(m, g.mean(g.function("exp", a))).op == "add"


def test_a_mean_is_not_saved_but_what_it_is_of():
    g = Graph()
    a, b = g.make("hu", 0), g.make("hu", 1)
    total = g.sum(a, b)
    scale = g.function("sqrt", g.mean(g.product(total, total)))
    assert smallest([g.quotient(total, scale), scale], []) == [total]
    assert smallest([scale], [], {scale}) == [scale], "but for what rounding would ruin"
    assert cells.dreamer_gru.form.saved == 3 and cells.lngru.form.saved == 6 and cells.lnlstm.form.saved == 8


def test_each_norm_is_two_reductions_forward_and_they_share_exchanges():
    found = [(cell.form.means[2], cell.form.means[4]) for cell in NORMED]
    assert found == [((2, 2, 1, 1), (3, 1, 1, 1, 2, 2)), ((4, 4), (4, 4, 4)), ((1, 1), (1, 1, 1))]
    assert [cell.form.exchanges for cell in NORMED] == [(4, 6), (2, 3), (2, 3)] and cells.lstm.form.exchanges == (0, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets units that do not exist
@pytest.mark.parametrize(("cell", "engine"), spread(STEPS, ENGINES, most=2))
def test_engines(cell, engine, poison):
    """H of no tile's size, and two programs of rows."""
    for how in ({}, MASKED):
        found = testing.errors(cell, Shape(3, 9, 2, 20), torch.float64, DEVICE, backend=engine, **how)
        assert max(found.values()) <= testing.TOLERANCE[torch.float64], found


@pytest.mark.parametrize("engine", ["loop", "triton:resident", "triton:stepwise"])
def test_without_a_product(engine, poison):
    found = testing.errors(alone, Shape(3, 9, 2, 20), torch.float64, DEVICE, backend=engine, **MASKED)
    assert max(found.values()) <= testing.TOLERANCE[torch.float64], found


@pytest.mark.parametrize(("cell", "how"), spread(NORMED, [(e, how) for how in ({}, MASKED) for e in ENGINES], most=2))
def test_the_gallerys_cells(cell, how, poison):
    engine, masks = how
    found = testing.errors(cell, Shape(3, 3, 2, 20), torch.float64, DEVICE, backend=engine, **masks)
    assert max(found.values()) <= testing.TOLERANCE[torch.float64], found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # likewise
@pytest.mark.parametrize(("cell", "schedule"), spread([by_layer_norm, two_levels], ["grid", "stepwise"], most=1))
def test_several_programs_of_products(cell, schedule):
    """Ten of units by two of rows; the others of stepwise have 256 units, of which 106 do not exist."""
    found = testing.errors(cell, Shape(2, 9, 2, 150), torch.float32, DEVICE, backend=f"triton:{schedule}", **MASKED)
    assert max(found.values()) <= testing.TOLERANCE[torch.float32], found


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.slow if e == "triton:stepwise" else ()) for e in ENGINES]
)
def test_two_directions_and_heads(engine):
    """A head's norm is over its own units."""
    torch.manual_seed(0)
    layers = [seqcells.Recurrent(cells.dreamer_gru, 3, 8, bidirectional=True, dtype=torch.float64, device=DEVICE)]
    layers.append(seqcells.Recurrent(cells.dreamer_gru, 3, 8, heads=2, dtype=torch.float64, device=DEVICE))
    x = torch.randn(4, 3, 3, dtype=torch.float64, device=DEVICE)
    for layer in layers:
        found = []
        for backend in ("reference", engine):
            with seqcells.backend(backend):
                y, _ = layer(x, lengths=[4, 2, 1])
            found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("cell", "engine"),
    [
        (two_levels, "loop"),
        (cells.dreamer_gru, "loop"),
        *(pytest.param(c, e, marks=pytest.mark.slow) for c in (by_layer_norm, *NORMED) for e in ENGINES),
    ],
    ids=lambda of: getattr(of, "name", of),
)
def test_first_and_second_derivatives(cell, engine):
    testing.derivatives(cell, DEVICE, [engine])


def with_layer_norm(name, p, x):
    """The cells as torch has them: p are the parameters of a layer. Returns the outputs [T, B, H]."""
    H = p["weight_hh_l0"].shape[1]
    h = c = torch.zeros(x.shape[1], H, dtype=x.dtype)

    def joined(names):
        return torch.cat([p[f"{n}_l0"] for n in names.split()])

    def norm(v, gains, eps=1e-5, shifts=None):
        return F.layer_norm(v, v.shape[-1:], joined(gains), None if shifts is None else joined(shifts), eps)

    outputs = []
    for now in x:
        a, b = now @ p["weight_ih_l0"].T, h @ p["weight_hh_l0"].T
        if name == "lnlstm":
            gates = norm(a, "xi xf xg xo", shifts="bi bf bg bo") + norm(b, "hi hf hg ho")
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(norm(c, "gain", shifts="shift"))
        elif name == "lngru":
            both = norm(a[:, : 2 * H], "xr xz", shifts="br bz") + norm(b[:, : 2 * H], "hr hz")
            r, z = torch.sigmoid(both).chunk(2, 1)
            n = torch.tanh(norm(a[:, 2 * H :], "xn", shifts="bn") + r * norm(b[:, 2 * H :], "hn", shifts="shift"))
            h = (1 - z) * h + z * n
        else:
            r, n, z = norm(a + b, "gr gn gz", eps=1e-3, shifts="br bn bz").chunk(3, 1)
            z = torch.sigmoid(z - 1)
            h = z * torch.tanh(torch.sigmoid(r) * n) + (1 - z) * h
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("cell", NORMED, ids=lambda c: c.name)
def test_layers_are_torchs_layer_norm(cell):
    torch.manual_seed(0)
    layer = seqcells.Recurrent(cell, 3, 7, dtype=torch.float64)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    own = list(layer.parameters())
    expected = with_layer_norm(cell.name, dict(layer.named_parameters()), x)
    weights = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weights).sum(), own)
    for backend in ("loop", "reference"):
        with seqcells.backend(backend):
            y, _ = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
        ours = torch.autograd.grad((y * weights).sum(), own)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cell", NORMED, ids=lambda c: c.name)
def test_norms_start_as_they_should(cell):
    torch.manual_seed(0)
    for layer in (seqcells.Recurrent(cell, 3, 4, 2, bidirectional=True), seqcells.RecurrentCell(cell, 3, 4)):
        found = {
            n.removesuffix("_reverse").rstrip("0123456789").removesuffix("_l"): p for n, p in layer.named_parameters()
        }
        assert set(found) == {"weight_ih", "weight_hh", *cell.params} and set(cell.starts) == set(cell.params)
        for name, start in cell.starts.items():
            assert (found[name] == start).all() and start == (0 if name.startswith(("b", "shift")) else 1)
    torch.manual_seed(0)
    again = seqcells.Recurrent(cell, 3, 4, 2, bidirectional=True)
    torch.manual_seed(0)
    layer = again.weight_ih_l0.clone()
    again.reset_parameters()
    assert torch.equal(layer, again.weight_ih_l0) and (again.get_parameter(f"{cell.params[0]}_l1_reverse") == 1).all()


def test_a_start_of_a_number_and_of_nothing():
    @seqcells.cell(gates="a", states="h", params="alpha:1=0.25 p q=-2")
    def started(x, U, h, alpha, p, q):
        return torch.tanh(alpha * x.a + U.a(h) + p * q)

    assert started.starts == {"alpha": 0.25, "q": -2.0} and started.scalars == ("alpha",)
    layer = seqcells.Recurrent(started, 2, 5)
    assert layer.alpha_l0.tolist() == [0.25] and layer.q_l0.tolist() == [-2] * 5 and layer.p_l0.unique().numel() == 5
    assert started.with_constants().starts == started.starts


def planned(cell, schedule=None, H=64, **more):
    return plan(cell.form, schedule=schedule, B=8, H=H, **{"itemsize": 2, "device": KNOWN["sm_90"], **more})


def test_what_the_plan_refuses():
    for backward in (False, True):
        with pytest.raises(
            ValueError, match=r"the grid schedule does not fit .*: without products its programs do not"
        ):
            planned(alone, "grid", backward=backward)
        assert planned(cells.lngru, "grid", backward=backward).waits
        assert ", then one with all units of a row" in planned(cells.lngru, H=1024, backward=backward).why
        assert ", then one with all units" not in planned(cells.lstm, "stepwise", backward=backward).why
        with pytest.raises(ValueError, match=r"stepwise schedule does not fit .*, and one program has 1024 at most"):
            planned(cells.lngru, "stepwise", H=1025)
        with pytest.raises(ValueError, match="no schedule is left for hidden size 1025, batch 8; no resident: U would"):
            planned(cells.lngru, H=1025)
        assert planned(cells.dreamer_gru, H=2048, backward=backward).schedule == "stepwise"
        with pytest.raises(ValueError, match=r"stepwise schedule does not fit .*, and one program has 2048 at most"):
            planned(cells.dreamer_gru, "stepwise", H=2049)
    for more in ({"itemsize": 8}, {"itemsize": 4, "backward": True}):
        with pytest.raises(ValueError, match=r"resident schedule does not fit hidden size 20, .* spill registers"):
            planned(cells.lnlstm, "resident", H=20, **more)
    for H, backward in ((64, False), (128, True)):
        assert planned(cells.lnlstm, H=H, backward=backward, device=KNOWN["sm_90"]).schedule == "resident"
    for H, backward in ((128, False), (20, True)):
        assert planned(cells.lnlstm, H=H, backward=backward, device=KNOWN["sm_100"]).schedule == "grid"
    for H, itemsize in ((33, 2), (34, 4), (33, 4)):
        call = partial(planned, cells.lngru, "resident", H=H, itemsize=itemsize)
        if H % 2 and itemsize == 4:
            with pytest.raises(ValueError, match="adds up an odd number of float32 units wrongly"):
                call()
            assert planned(cells.lngru, H=H, itemsize=4).schedule == "grid"
        else:
            assert call().schedule == "resident"
    assert "means over units" in unfit(cells.dreamer_gru.form, 4, 4) and unfit(cells.lstm.form, 4, 4) is None


def test_grid_pays_where_units_do_not_fit_one_program():
    """By the plan's model. A barrier for each exchange is less than the launches of `stepwise`."""
    for cell in NORMED:
        for backward in (False, True):
            chosen = planned(cell, H=512, backward=backward)
            assert chosen.schedule == "grid"
            apart = planned(cell, "stepwise", H=512, backward=backward)
            assert chosen.microseconds < apart.microseconds
            barriers = cell.form.exchanges[backward] + 1
            assert chosen.microseconds > barriers * KNOWN["sm_90"].microseconds(BARRIER)


def test_grid_is_refused_where_it_is_asked_for():
    layer = seqcells.Recurrent(alone, 2, 5, backend="triton:grid", device=DEVICE)
    with pytest.raises(ValueError, match="the grid schedule does not fit hidden size 5, batch 3: without products"):
        layer(torch.ones(2, 3, 2, device=DEVICE))


def test_check_leaves_out_what_cannot_run():
    results = testing.check(alone, device=DEVICE, backends=["triton:grid", "loop"], dtypes=["float64"])
    assert [bool(r.errors) for r in results] == [False, True] and "without products" in results[0].missing


def test_the_words_of_explain():
    assert "rms_norm" in inspect.getdoc(seqcells.cell) and "mean(x.a + U.a(h))" in by_layer_norm.explain()
    assert "params[-1]" not in by_layer_norm.explain()

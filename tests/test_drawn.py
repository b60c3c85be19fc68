"""Dropout inside the recurrence: recurrent_dropout, candidate_dropout and zoneout. Every engine draws the same masks,
in forward and in backward, and computes what the papers say. weight_dropout: see test_dropout."""

import copy
import pickle
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import seqcells
from seqcells import autograd, cells, drawn, dropouts, testing
from seqcells.cell import named
from seqcells.engines import operators
from seqcells.kernels import report

T, B, I, H = 4, 3, 2, 5  # noqa: E741
ENGINES = ("reference", "loop", "triton:resident", "triton:grid", "triton:stepwise")


def layer_of(cell, dtype=torch.float64, **options):
    torch.manual_seed(0)
    if isinstance(cell, str):
        cell = getattr(cells, cell)  # the name may be another's by now, such as of an example in a page
    return seqcells.Recurrent(cell, I, H, dtype=dtype, device=DEVICE, **options)


def results(layer, seed=7, **call):
    """The output, the final states and all gradients, with the masks of that seed."""
    torch.manual_seed(3)
    x = torch.randn(T, B, I, dtype=layer.weight_ih_l0.dtype, device=DEVICE, requires_grad=True)
    torch.manual_seed(seed)
    y, state = layer(x, **call)
    finals = state if isinstance(state, tuple) else (state,)
    sum(o.square().sum() for o in (y, *finals)).backward()
    return [y.detach(), *(s.detach() for s in finals), x.grad, *(p.grad for p in layer.parameters())]


CASES = {
    "lstm: recurrent": ("lstm", {"recurrent_dropout": 0.4}, {}),
    "lstm: candidate": ("lstm", {"candidate_dropout": 0.4}, {}),
    "lstm: zoneout, states": ("lstm", {"zoneout": (0.1, 0.5), "save": "states"}, {}),
    "lstm: all": ("lstm", {"recurrent_dropout": 0.3, "candidate_dropout": 0.2, "zoneout": 0.3}, {"resets": 1}),
    "gru: two layers": ("gru", {"recurrent_dropout": 0.4, "zoneout": 0.2, "num_layers": 2}, {}),
    "gru_before: all": ("gru_before", {"recurrent_dropout": 0.4, "candidate_dropout": 0.2, "zoneout": 0.2}, {}),
    "gru_before: states": ("gru_before", {"recurrent_dropout": 0.4, "zoneout": 0.2, "save": "states"}, {"lengths": 1}),
    "rnn: two directions": ("rnn_tanh", {"recurrent_dropout": 0.4, "zoneout": 0.2, "bidirectional": True}, {}),
    "dreamer_gru: layer norm": ("dreamer_gru", {"recurrent_dropout": 0.3, "zoneout": 0.3}, {"resets": 1}),
    "gru_d: trained vectors and inputs": ("gru_d", {"recurrent_dropout": 0.3, "candidate_dropout": 0.3}, {"gap": 1}),
}


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("case", CASES)
def test_every_engine_draws_the_same_masks(case, engine):
    cell, options, asked = CASES[case]
    call = {"resets": torch.tensor([[0, 1, 0]] * T, device=DEVICE).bool()} if "resets" in asked else {}
    call |= {"lengths": [4, 2, 3]} if "lengths" in asked else {}
    call |= {"gap": torch.rand(T, B, dtype=torch.float64, device=DEVICE)} if "gap" in asked else {}
    expected = results(layer_of(cell, backend="reference", **options), **call)
    with testing.poisoned():
        found = results(layer_of(cell, backend=engine, **options), **call)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["loop", "triton"])
def test_in_lower_precisions_too(engine, dtype):
    options = {"recurrent_dropout": 0.4, "candidate_dropout": 0.3, "zoneout": 0.2}
    expected = results(layer_of("gru", backend="reference", **options).to(dtype).double())
    found = results(layer_of("gru", dtype, backend=engine, **options).to(dtype))
    exact = results(layer_of("gru", dtype, backend="reference", **options).to(dtype))
    for ours, theirs, far in zip(found, exact, expected, strict=True):
        assert testing.relative(ours, theirs) < testing.TOLERANCE[dtype] * 4, "other masks would be far off"
        assert ours.shape == far.shape


def masks_of(layer, x, seed=7):
    """What the masks of a layer's call are: [T, B, K, H] for each kind."""
    torch.manual_seed(seed)
    cell, dropout = dropouts.of_call(layer, x)
    K = layer.heads * (2 if layer.bidirectional else 1)
    size = (*x.shape[:2], K, layer.hidden_size // layer.heads)
    found = drawn.given(cell, None, dropout[0], size, x.dtype).reshape(*size[:3], len(cell.drawn), size[3])
    return dict(zip(cell.drawn, found.unbind(3), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_an_lstm_as_in_the_papers(training):
    layer = layer_of("lstm", recurrent_dropout=0.4, candidate_dropout=0.3, zoneout=(0.2, 0.5)).train(training)
    x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
    masks = masks_of(layer, x) if training else {}
    h = c = x.new_zeros(B, H)
    outputs = []
    for t in range(T):
        m = {kind: mask[t, :, 0] for kind, mask in masks.items()}
        read = m["recurrent"] * h if training else h  # Gal & Ghahramani 2016, eq. 14
        gates = nn.functional.linear(x[t], layer.weight_ih_l0, layer.bias_ih_l0)
        gates = gates + nn.functional.linear(read, layer.weight_hh_l0, layer.bias_hh_l0)
        i, f, g, o = gates.chunk(4, 1)
        g = torch.tanh(g) * m["candidate"] if training else torch.tanh(g)  # Semeniuta et al. 2016, eq. 11
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * g
        new_h = torch.sigmoid(o) * torch.tanh(new_c)
        # Krueger et al. 2017, eq. 3 and 4; in expectation outside training.
        z_h, z_c = (m[f"zoneout {s}"] for s in "hc") if training else (0.8, 0.5)
        h, c = z_h * new_h + (1 - z_h) * h, z_c * new_c + (1 - z_c) * c
        outputs.append(h)
    torch.manual_seed(7)
    y, (h_n, c_n) = layer(x)
    assert training or (torch.initial_seed() == 7 and torch.equal(layer(x)[0], y)), "nothing is drawn"
    torch.testing.assert_close(y, torch.stack(outputs))
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c))


def test_how_often_and_how_much():
    options = {"recurrent_dropout": 0.4, "candidate_dropout": 0.1, "zoneout": 0.25}
    layer = seqcells.Recurrent("gru", 3, 64, bidirectional=True, device=DEVICE, **options)
    x = torch.zeros(50, 40, 3, device=DEVICE)
    masks = masks_of(layer, x)
    for kind, p, value in (("recurrent", 0.4, 1 / 0.6), ("candidate", 0.1, 1 / 0.9), ("zoneout h", 0.25, 1.0)):
        mask = masks[kind][:1] if kind == "recurrent" else masks[kind]
        torch.testing.assert_close(mask.unique().cpu(), torch.tensor([0.0, value]))
        assert abs((mask == 0).float().mean().item() - p) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    assert (masks["recurrent"] == masks["recurrent"][:1]).all(), "one for a sequence"
    numbers = {kind: (mask == 0).double().flatten(1) for kind, mask in masks.items()}
    each = torch.stack(
        [numbers["candidate"][0], numbers["candidate"][1], numbers["zoneout h"][0], numbers["recurrent"][0]]
    )
    directions = (masks["candidate"] == 0).double().unbind(2)
    pairs = [torch.corrcoef(each), torch.corrcoef(torch.stack([d.flatten() for d in directions]))]
    pairs.append(torch.corrcoef((masks["candidate"][:, 0] == 0).double().flatten(1)[:, :20].t()))
    pairs.append(torch.corrcoef((masks["candidate"] == 0).double().flatten(2)[:, :20].permute(1, 0, 2).flatten(1)))
    for matrix in pairs:  # of steps, kinds, directions, units and rows
        n = matrix.shape[0]
        assert (matrix - torch.eye(n, device=matrix.device)).abs().max() < 0.6 if n == 20 else 0.05


def test_torch_s_generator_decides():
    layer = layer_of("gru", recurrent_dropout=0.5, zoneout=0.3, num_layers=2)
    first, again, other = (results(copy.deepcopy(layer), seed)[0] for seed in (7, 7, 8))
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    assert (first != other).any()
    x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
    state = torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()
    before, later = layer(x)[0], layer(x)[0]
    (torch.set_rng_state if DEVICE == "cpu" else torch.cuda.set_rng_state)(state)
    torch.testing.assert_close((layer(x)[0], layer(x)[0]), (before, later), atol=0, rtol=0)
    assert (before != later).any()
    masks = [dropouts.of_call(layer, x)[1] for _ in range(2)]
    assert len(torch.stack(masks)[..., :2].reshape(-1, 2).unique(dim=0)) == 4, "each layer and call has its own"


@pytest.mark.parametrize("engine", [None, "loop", "triton", "reference"])
@pytest.mark.parametrize(
    "options", [("recurrent_dropout", "candidate_dropout", "zoneout"), ("weight_dropout",)], ids=len
)
def test_checkpointing_draws_the_same_masks(engine, options):
    layer = layer_of("lstm", backend=engine, **dict.fromkeys(options, 0.4))
    x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
    found = []
    for run in (lambda: layer(x)[0], lambda: checkpoint(lambda: layer(x)[0], use_reentrant=False)):
        torch.manual_seed(3)
        layer.zero_grad()
        run().square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*found, atol=0, rtol=0)


@pytest.mark.parametrize("engine", ["loop", "triton"])
def test_gradients_of_gradients(engine):
    layer = layer_of("gru", backend=engine, recurrent_dropout=0.4, candidate_dropout=0.3, zoneout=0.3)
    names = [n for n, _ in layer.named_parameters()]

    def function(x, *parameters):
        torch.manual_seed(11)
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]

    given = [
        torch.randn(2, 2, I, dtype=torch.float64, device=DEVICE),
        *(p.detach().clone() for p in layer.parameters()),
    ]
    given = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("engine", ["loop", "triton"])
def test_torch_func(engine):
    layer = layer_of("gru", backend=engine, recurrent_dropout=0.4, candidate_dropout=0.4, zoneout=0.3)
    x = torch.randn(3, T, B, I, dtype=torch.float64, device=DEVICE)
    values = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    def each(parameters, x):
        torch.manual_seed(5)
        return torch.func.grad(loss)(parameters, x)

    expected = [each(values, one) for one in x]
    torch.manual_seed(5)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="same")(values, x)
    for name, grads in found.items():
        torch.testing.assert_close(grads, torch.stack([e[name] for e in expected]))
    several = {n: torch.stack([v, v, v]) for n, v in values.items()}
    torch.manual_seed(5)
    found = torch.func.vmap(loss, randomness="same")(several, x)
    torch.manual_seed(5)
    torch.testing.assert_close(found[0], loss(values, x[0]))
    different = torch.func.vmap(loss, randomness="different")(several, torch.stack([x[0]] * 3))
    assert len(different.unique()) == 3
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(loss)(several, x)
    torch.manual_seed(5)
    _, tangent = torch.func.jvp(lambda x: loss(values, x), (x[0],), (torch.ones_like(x[0]),))
    torch.manual_seed(5)
    torch.testing.assert_close(tangent, torch.func.grad(loss, 1)(values, x[0]).sum())


@pytest.mark.parametrize("engine", ["loop", "reference"])
def test_compiled(engine):
    layer = layer_of("gru", torch.float32, backend=engine, recurrent_dropout=0.5, zoneout=0.25)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I, device=DEVICE)
    torch.manual_seed(2)
    found = run(x)[0]
    torch.manual_seed(2)
    torch.testing.assert_close(found, layer(x)[0])
    found.sum().backward()
    layer.eval()
    torch.testing.assert_close(run(x)[0], layer(x)[0])


def test_operators_have_fakes():
    cell = drawn.dropped(named("gru"), ("recurrent", "zoneout h"))
    options = autograd.Options("triton", cell.key, traced=True)
    x, w_ih, w_hh = torch.randn(2, 3, I), torch.randn(1, 3 * H, I), torch.randn(1, 3 * H, H)
    given = [t.to(DEVICE) for t in (x, w_ih, w_hh, torch.tensor([3.0, 4, 0.5, 2, 0.5, 1]))]
    inputs = (given[0], None, None, given[1], given[2], None, None, None, None, given[3])
    how = ("triton", cell.key, "gates", 0, "resident", "ieee")
    torch.library.opcheck(operators.scan_forward, (*inputs, None, *how), test_utils="test_faketensor")
    assert len(operators.call_forward(replace(options, schedule="resident"), "gates", inputs, None)) == 5


def test_heads_and_packed_rows():
    layer = layer_of("gru", heads=1, recurrent_dropout=0.4, zoneout=0.3)
    rows = [torch.randn(n, I, dtype=torch.float64, device=DEVICE) for n in (4, 3, 1)]
    torch.manual_seed(4)
    y, h = layer(pack_sequence(rows))
    padded, lengths = nn.utils.rnn.pad_packed_sequence(y)
    torch.manual_seed(4)
    expected, last = layer(nn.utils.rnn.pad_sequence(rows), lengths=lengths.tolist())
    torch.testing.assert_close((padded, h), (expected, last))
    torch.manual_seed(0)
    wide = seqcells.Recurrent(cells.mgu, I, 6, heads=2, recurrent_dropout=0.4, dtype=torch.float64, device=DEVICE)
    found = [results(copy.deepcopy(wide)), None]
    wide.backend = "reference"
    found[1] = results(wide)
    torch.testing.assert_close(*found)


def test_probabilities_may_change():
    layer = layer_of("gru")
    x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
    plain = layer(x)[0]
    layer.recurrent_dropout = 0.5
    assert (layer(x)[0] != plain).any()
    layer.recurrent_dropout, layer.candidate_dropout = 0.0, 1.0
    h = torch.ones(1, B, H, dtype=torch.float64, device=DEVICE)
    assert (layer(x, h)[0][-1] < 1).all() and (layer(x)[0] == 0).all(), "no candidate is left"
    layer.candidate_dropout, layer.zoneout = 0.0, 1.0
    torch.testing.assert_close(layer(x, h)[0], h.expand(T, B, H))
    torch.testing.assert_close(layer.eval()(x, h)[0], h.expand(T, B, H))
    layer.zoneout = 0.0
    torch.testing.assert_close(layer(x)[0], plain, atol=0, rtol=0)


def test_a_cell_with_a_mask_of_its_own():
    @seqcells.cell(gates="n", states="h", constants="leak=0.5", dropout="keep")
    def leaky(x, U, h, leak, keep=1):
        return (1 - leak) * h + leak * (keep * torch.tanh(x.n + U.n(h)))

    assert leaky.dropout == "keep"
    layer = layer_of(leaky, leak=0.25, candidate_dropout=1.0)
    h = torch.ones(1, B, H, dtype=torch.float64, device=DEVICE)
    y = layer(torch.randn(T, B, I, dtype=torch.float64, device=DEVICE), h)[0]
    torch.testing.assert_close(y[:, 0, 0].cpu(), 0.75 ** torch.arange(1, T + 1, dtype=torch.float64))
    made = drawn.dropped(leaky, ("recurrent", "candidate"))
    assert "masks recurrent candidate" in made.explain() and "h * recurrent" in made.explain()
    assert drawn.dropped(leaky, ("recurrent", "candidate")) is made


@pytest.mark.parametrize("argument", ["a b", "h", "keep"])
def test_wrong_masks_in_a_definition(argument):
    def step(x, U, h, keep=2):
        return keep * torch.tanh(x.n + U.n(h))

    words = {"a b": "a step has one mask", "h": "named twice", "keep": "must have the default 1: keep=1"}[argument]
    with pytest.raises((TypeError, ValueError), match=words):
        seqcells.cell(gates="n", states="h", dropout=argument)(step)


def test_as_modules():
    layer = seqcells.LSTM(I, H, recurrent_dropout=0.25, candidate_dropout=0.5, zoneout=[0.05, 0.5])
    text = "recurrent_dropout=0.25, candidate_dropout=0.5, zoneout=(0.05, 0.5)"
    assert text in repr(layer) and "zoneout" not in repr(seqcells.LSTM(I, H, zoneout=(0, 0)))
    assert pickle.loads(pickle.dumps(layer)).zoneout == (0.05, 0.5)
    for option in ("recurrent_dropout", "candidate_dropout", "zoneout"):
        with pytest.raises(ValueError, match=f"layers have no {option}"):
            seqcells.revert(nn.Sequential(seqcells.GRU(I, H, **{option: 0.5})))
    assert seqcells.convert(nn.LSTM(I, H)).zoneout == 0.0
    assert seqcells.subclasses.GRU(I, H, zoneout=0.5).zoneout == 0.5


@pytest.mark.parametrize("make", [seqcells.LSTM, seqcells.GRU, seqcells.RNN, None])
def test_wrong_options(make):
    make = make or (lambda *sizes, **options: seqcells.Recurrent(cells.ugrnn, *sizes, **options))
    for option in ("recurrent_dropout", "zoneout"):
        for value, error, words in (
            (1.5, ValueError, f"{option} must be a probability, from 0 to 1, got 1.5"),
            ("0.5", TypeError, f"{option} must be a number"),
            (True, TypeError, f"{option} must be a number"),
        ):
            with pytest.raises(error, match=words):
                make(I, H, **{option: value})
    with pytest.raises(ValueError, match=r"one for each of the \d state"):
        make(I, H, zoneout=(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"zoneout\[0\] must be a probability"):
        seqcells.Recurrent("lstm", I, H, zoneout=(2.0, 0.1))


def test_what_cannot_be_combined():
    with pytest.raises(ValueError, match="the step of rnn_tanh has no dropout mask"):
        seqcells.Recurrent("rnn_tanh", I, H, candidate_dropout=0.5)
    for options in ({"recurrent_dropout": 0.5}, {"zoneout": 0.5}):
        with pytest.raises(ValueError, match="cannot be combined with proj_size"):
            seqcells.LSTM(I, H, proj_size=2, **options)
    layer = seqcells.LSTM(I, H, proj_size=2, candidate_dropout=0.5, zoneout=(0, 0.5), dtype=torch.float64)
    assert layer(torch.randn(T, B, I, dtype=torch.float64))[0].shape == (T, B, 2)
    cell = drawn.dropped(named("gru"), ("recurrent",))
    with pytest.raises(TypeError, match="dropout must be a tensor, got None"):
        seqcells.functional.scan(cell, torch.randn(T, B, I), None, torch.randn(3 * H, I), torch.randn(3 * H, H))


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    steps=st.integers(1, 3),
    rows=st.integers(1, 4),
    units=st.integers(1, 5),
    seeds=st.tuples(*(st.integers(0, 2**24 - 1),) * 2),
)
def test_a_mask_s_numbers_depend_on_nothing_but_the_place(steps, rows, units, seeds):
    """The same by Squares written with Python's integers."""
    cell = drawn.dropped(named("lstm"), ("recurrent", "zoneout h", "zoneout c"))
    dropout = torch.tensor([*seeds, 0.5, 2.0, 0.25, 1.0, 0.75, 1.0], dtype=torch.float64)
    found = drawn.given(cell, None, dropout, (steps, rows, 1, units), torch.float64).view(steps, rows, 3, units)
    most = (1 << 64) - 1

    def bits(counter, once):
        key = (seeds[0] + (seeds[1] << 24) + (once + 1) * 0x9E3779B97F4A7C15) & most
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & most
        key = (key ^ key >> 27) * 0x94D049BB133111EB & most
        key = (key ^ key >> 31) | 1
        x = y = counter * key & most
        z = y + key & most
        for add in (y, z, y):
            x = x * x + add & most
            x = x >> 32 | x << 32 & most
        return (x * x + z & most) >> 32

    for t in range(steps):
        for b in range(rows):
            for u in range(units):
                once, each = (b * units + u), (t * rows + b) * units + u
                assert found[t, b, 0, u] == (2.0 if bits(once, True) & 0xFFFF < 1 << 15 else 0.0)
                assert found[t, b, 1, u] == (1.0 if bits(each, False) & 0xFFFF < 1 << 14 else 0.0)
                assert found[t, b, 2, u] == (1.0 if bits(each, False) >> 16 < 3 << 14 else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before", "slstm", "peephole_lstm", "gru_d", "mgu"])
def test_checked(cell):
    base = getattr(cells, cell)
    testing.check(drawn.dropped(base, drawn.every_mask(base)), device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before"])
def test_no_kernel_spills(cell, target):
    base = getattr(cells, cell)
    made = drawn.dropped(base, drawn.every_mask(base))
    for direction in ("train", "backward"):
        for dtype, batch, hidden in (("bf16", 1024, 1024), ("fp32", 8, 64), ("fp32", 1024, 1024), ("bf16", 64, 512)):
            assert all(
                row.good for row in report.measure(report.Case(made.key, direction, dtype, batch, hidden, target))
            )

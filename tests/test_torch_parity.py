"""LSTM, GRU and RNN against torch.nn's over the whole grid of their options: outputs, final states, every gradient."""

import warnings

import pytest
import torch
from conftest import DEVICE
from torch.nn.utils.rnn import pack_padded_sequence
from torch_cases import KINDS, H, I, assert_same, every_case, everything, pair, pairwise, start

import seqcells

T, B = 4, 3
BACKENDS = ["aten", "loop", "reference", "auto"]
FORMS = {  # batch_first, and the lengths if packed; batch_first says nothing of packed and unbatched input
    "steps first": (False, None),
    "batch first": (True, None),
    "unbatched": (False, None),
    "unbatched batch first": (True, None),
    "sorted": (False, [4, 2, 1]),
    "unsorted": (True, [2, 4, 1]),
}
DEPTHS = {"1": (1, 0.0), "2": (2, 0.0), "3": (3, 0.0), "2-dropout": (2, 1.0), "3-dropout": (3, 1.0)}
INNER = {"bias": [True, False], "bidirectional": [False, True], "form": list(FORMS), "hx": [False, True]}
GRID = {"kind": list(KINDS), "depth": list(DEPTHS), **INNER}


@pytest.fixture(autouse=True)
def on_the_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def check(case, dtype, backends):
    """One case of the grid on each backend. Dropout of 1 in training is the one whose result is no accident."""
    (batch_first, lengths), (layers, dropout) = FORMS[case["form"]], DEPTHS[case["depth"]]
    options = {"num_layers": layers, "dropout": dropout, "batch_first": batch_first}
    options |= {name: case[name] for name in ("bias", "bidirectional")}
    theirs, ours = pair(case["kind"], dtype, **options)
    unbatched = case["form"].startswith("unbatched")
    shape = (T,) if unbatched else (B, T) if batch_first else (T, B)
    x = torch.randn(*shape, I, dtype=dtype)
    hx = start(theirs, () if unbatched else (B,), dtype) if case["hx"] else None
    layouts = []

    def call(module):
        def function(x, hx):
            if lengths is None:
                return module(x, hx)
            packed = pack_padded_sequence(x, torch.tensor(lengths, device="cpu"), batch_first, case["form"] == "sorted")
            y, final = module(packed, hx)
            layouts.append(y[1:])
            return y, final

        return function

    expected = everything(theirs, call(theirs), x, hx)
    for backend in backends:
        ours.backend = backend
        assert_same(everything(ours, call(ours), x, hx), expected, f"{case} on {backend}")
        for mine, its in zip(layouts[-1] if layouts else (), layouts[0] if layouts else (), strict=True):
            assert (mine is None and its is None) or torch.equal(mine, its)


# Several layers without dropout are between one and several with it.
@pytest.mark.parametrize("depth", [pytest.param(d, marks=[pytest.mark.slow] * (d in ("2", "3"))) for d in DEPTHS])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_option_in_float64(kind, depth):
    for inner in every_case(INNER):
        check({"kind": kind, "depth": depth, **inner}, torch.float64, BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_options_in_float32(backend):
    for case in pairwise(GRID):
        check(case, torch.float32, [backend])


def test_second_derivatives_where_onednn_runs():
    """float32 on the CPU; the reference's own, of the same network."""
    _, ours = pair("LSTM", torch.float32, bidirectional=True)
    x, hx = torch.randn(T, B, I).requires_grad_(), start(ours, (B,), torch.float32)
    found = []
    for backend in ("aten", "reference"):
        ours.backend = backend
        y, final = ours(x, hx)
        first = torch.autograd.grad(y.sin().sum() + final[1].sum(), [x, *ours.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *ours.parameters()])
        found.append({str(i): g.detach() for i, g in enumerate((*first, *second))})
    assert_same(found[0], found[1], "second derivatives")


@pytest.mark.slow
@pytest.mark.parametrize("depth", list(DEPTHS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_option_in_float32(kind, depth):
    for inner in every_case(INNER):
        check({"kind": kind, "depth": depth, **inner}, torch.float32, BACKENDS)


# A projection has no kernels of its own: the LSTM's, and what test_every_option_in_float64 tries.
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "LSTM-proj" else k for k in KINDS])
def test_every_pair_of_options_of_the_kernels(kind):
    for case in pairwise({**INNER, "depth": ["1", "2", "2-dropout"]}):
        check({"kind": kind, **case}, torch.float64, ["triton"])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_parameters_are_torch_nns(kind, bias, layers, bidirectional):
    """One seed gives one set of parameters, in one order, and either module loads the other's."""
    name, more = KINDS[kind]
    options = {"num_layers": layers, "bias": bias, "bidirectional": bidirectional, **more}
    made = []
    for namespace in (torch.nn, seqcells):
        torch.manual_seed(5)
        made.append(getattr(namespace, name)(I, H, **options))
    theirs, ours = made
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [[w.shape for w in ws] for ws in theirs.all_weights]
    if kind != "RNN-relu":  # whose nonlinearity torch's does not show
        assert repr(ours) == f"seqcells.{theirs!r}"
    for source, target in ((theirs, ours), (ours, theirs)):
        source.reset_parameters()
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_the_warning_of_dropout_without_a_layer_to_drop_from():
    found = []
    for namespace in (torch.nn, seqcells):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            namespace.GRU(I, H, dropout=0.5)
        found.append([(w.category, str(w.message)) for w in caught])
    assert found[0] == found[1] and len(found[0]) == 1


def test_dropout_in_evaluation_is_none():
    theirs, ours = pair("GRU", num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I, dtype=torch.float64)
    results = [everything(module, module.eval(), x, None) for module in (theirs, ours)]
    assert_same(results[1], results[0], "dropout in evaluation")


def test_dropout_in_training_drops_its_share_between_layers():
    """The identity as second layer shows what it was given: each element of the first is dropped, or doubled."""
    torch.manual_seed(0)
    one, two = seqcells.RNN(I, H, 1, "relu"), seqcells.RNN(I, H, 2, "relu", dropout=0.5)
    two.load_state_dict(one.state_dict(), strict=False)
    with torch.no_grad():
        for name in ("weight_hh_l1", "bias_ih_l1", "bias_hh_l1"):
            getattr(two, name).zero_()
        two.weight_ih_l1.copy_(torch.eye(H))
        x = torch.randn(50, 20, I)
        below, above = one(x)[0], two(x)[0]
    kept = above != 0
    torch.testing.assert_close(above[kept], 2 * below[kept])
    assert 0.45 < kept[below != 0].float().mean() < 0.55

"""What programs do with torch.nn's recurrent modules, done with seqcells': the same numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import seqcells

LAYERS = ("LSTM", "GRU", "RNN")


def pair(name, *sizes, **options):
    torch.manual_seed(0)
    theirs = getattr(nn, name)(*sizes, **options)
    ours = getattr(seqcells, name)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(name, rows, batch, hidden):
    found = torch.randn(rows, batch, hidden), torch.randn(rows, batch, hidden)
    return found if name == "LSTM" else found[0]


# Dropout: the same seed gives the same loss


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("steps", [3, 12, 40])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_what_torch_draws(name, packed, steps, batch_first, bidirectional):
    options = {"num_layers": 2, "dropout": 0.4, "batch_first": batch_first, "bidirectional": bidirectional}
    theirs, ours = pair(name, 3, 8, **options)
    x = torch.randn(5, steps, 3) if batch_first else torch.randn(steps, 5, 3)
    if packed:
        lengths = [steps, 1, 2, steps, 3]
        x = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    found = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        y = module(x)[0]
        loss = (y.data if packed else y).square().sum()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        found.append((loss, *gradients, torch.rand(())))  # and as many random numbers were drawn
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


# resets


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_of_one_step_are_a_masked_state_and_a_plain_step(name, layers, bidirectional, batch_first):
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    _, ours = pair(name, 3, 4, **options)
    ours = ours.double()
    x = torch.randn(6, 1, 3).double() if batch_first else torch.randn(1, 6, 3).double()
    h = [s.double().requires_grad_() for s in torch.randn(2, layers * (1 + bidirectional), 6, 4)]
    hx = tuple(h) if name == "LSTM" else h[0]
    given = list(h) if name == "LSTM" else h[:1]
    begins = torch.tensor([True, False, True, True, False, False])
    resets = begins[:, None] if batch_first else begins[None]
    answers = []
    # The interpreted kernels have the mask itself; so does what is compiled. A tensor of a subclass takes the long way.
    for backend in ("auto", "aten", "loop", "reference", "triton"):
        ours.backend = backend
        for input in (x, x.as_subclass(nn.Parameter)):
            y, final = ours(input, hx, resets=resets)
            flat = [y, *(final if name == "LSTM" else [final])]
            answers.append([*flat, *torch.autograd.grad(sum(t.square().sum() for t in flat), given)])
    for found in answers[:-1]:
        torch.testing.assert_close(found, answers[-1])
    assert ours(x, resets=resets)[0].equal(ours(x)[0])  # nothing to forget


def test_no_number_crosses_a_reset_of_one_step():
    layer = seqcells.GRU(3, 4)
    h = torch.full((1, 2, 4), torch.nan)
    y, _ = layer(torch.randn(1, 2, 3), h, resets=torch.tensor([[True, False]]))
    assert y[0, 0].isfinite().all() and y[0, 1].isnan().all()


FORMS = {
    "float": lambda r: r.float(),
    "bfloat16": lambda r: r.bfloat16(),
    "int64": lambda r: r.long(),
    "uint8": lambda r: r.byte(),
    "a gradient": lambda r: r.float().requires_grad_(),
    "a list of bools": lambda r: r.tolist(),
    "a list of ints": lambda r: r.int().tolist(),
    "a tuple of lists": lambda r: tuple(r.float().tolist()),
    "numpy bool": lambda r: r.numpy(),
    "numpy float32": lambda r: r.float().numpy(),
}


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("form", FORMS)
def test_resets_are_whatever_holds_zeros_and_ones(form, steps):
    layer, x, h = seqcells.GRU(3, 4), torch.randn(steps, 2, 3), torch.randn(1, 2, 4)
    resets = torch.rand(steps, 2) < 0.5
    expected = layer(x, h, resets=resets)
    assert layer(x, h, resets=FORMS[form](resets))[0].equal(expected[0])
    y, _ = seqcells.gru(x, h[0], *layer.parameters(), resets=FORMS[form](resets))
    torch.testing.assert_close(y, expected[0])


def test_packed_resets_are_whatever_holds_zeros_and_ones():
    layer = seqcells.LSTM(3, 4)
    x = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    resets = x._replace(data=torch.rand(7) < 0.5)
    expected = layer(x, resets=resets)[0].data
    assert layer(x, resets=resets._replace(data=resets.data.float()))[0].data.equal(expected)


WRONG = {
    "two": (torch.tensor([[0.0, 2.0]]), ValueError, "bools, or of the numbers 0 and 1, got a value of 2"),
    "a half": (torch.tensor([[0.5, 0.0]]), ValueError, "got a value of 0.5"),
    "nan": (torch.tensor([[torch.nan, 0.0]]), ValueError, "got a value of nan"),
    "a list": ([[0, 3]], ValueError, "got a value of 3"),
    "a ragged list": ([[0], [1, 0]], ValueError, "rows of one length"),
    "a flat list": ([0, 1], RuntimeError, r"Expected resets size \(1, 2\), got \[2\]"),
    "words": ([["a", "b"]], TypeError, "nested list of bools, or of the numbers 0 and 1, got a list of 1 that makes"),
    "objects": (np.array([[None, 1]]), TypeError, "got a ndarray that makes an array of object"),
    "complex": (torch.zeros(1, 2, dtype=torch.complex64), TypeError, "got a tensor of torch.complex64"),
    "a string": ("01", TypeError, "resets must be a tensor or nested list .* got a str"),
    "many": (torch.full((1, 200), 2.0), ValueError, "got a value of 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_resets_raise(name):
    resets, error, words = WRONG[name]
    layer, batch = seqcells.GRU(3, 4), 200 if name == "many" else 2
    with pytest.raises(error, match=words):
        layer(torch.randn(1, batch, 3), torch.zeros(1, batch, 4), resets=resets)
    with pytest.raises(error, match=words):
        seqcells.gru(torch.randn(1, batch, 3), None, *layer.parameters(), resets=resets)


# Autocast on the CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_answers_in_torchs_dtypes(name, given, dtype):
    theirs, ours = pair(name, 3, 8)
    for steps in (2, 30):
        x = torch.randn(4, 3) if name.endswith("Cell") else torch.randn(steps, 4, 3)
        with torch.autocast("cpu", dtype=dtype):
            expected, found = theirs(x.to(given)), ours(x.to(given))
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # dtypes, too


@pytest.mark.parametrize("options", [{"resets": torch.ones(30, 4)}, {"lengths": [30, 1, 3, 3]}])
def test_autocast_with_masks_answers_as_without(options):
    x = torch.randn(30, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert seqcells.GRU(3, 8)(x, **options)[0].dtype == torch.float32
        assert seqcells.GRU(3, 8, reset_after=False)(x, **options)[0].dtype == torch.float32
        assert seqcells.RNN(3, 8)(x, **options)[0].dtype == torch.bfloat16
        assert seqcells.LSTM(3, 8)(x, **options)[0].dtype == torch.bfloat16


# What looks on: counters and profilers


@pytest.mark.parametrize("backend", ["auto", "loop", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_flops_are_those_of_the_products(name, backend):
    T, B, I, H, G = 20, 4, 6, 8, {"LSTM": 4, "GRU": 3, "RNN": 1}[name]  # noqa: E741
    layer, x = getattr(seqcells, name)(I, H, backend=backend), torch.randn(T, B, I, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(x)
    forward = counter.get_total_flops()
    assert forward == 2 * T * B * G * H * (I + H)
    with FlopCounterMode(display=False) as counter:
        y, _ = layer(x)
        y.sum().backward()
    # The reference's first step, from zeros, has no gradient of its state.
    assert forward * 3 - (2 * B * G * H * H * 2 if backend == "reference" else 0) <= counter.get_total_flops()
    assert counter.get_total_flops() <= forward * 3


def test_flops_of_interpreted_kernels_and_of_a_counter_that_was_there_before():
    """A counter copies the formulas when it is made."""
    program = """
import torch
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
import seqcells
x = torch.randn(20, 4, 6, requires_grad=True)
with counter:
    seqcells.GRU(6, 8, backend="triton")(x)[0].sum().backward()
assert counter.get_total_flops() == 3 * 2 * 20 * 4 * 24 * (6 + 8), counter.get_flop_counts()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("backend", ["loop", "triton"])
def test_a_profile_says_what_runs(backend):
    layer = seqcells.GRU(3, 4, backend=backend)
    x = torch.randn(5, 2, 3)
    with torch.profiler.profile() as found:
        layer(x)[0].sum().backward()
    names = {event.key for event in found.key_averages()}
    assert {f"seqcells gru forward ({backend})", f"seqcells gru backward ({backend})"} <= names
    assert not {name for name in names if name.startswith("_")}

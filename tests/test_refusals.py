"""Calls that were once accepted silently, or refused with an unhelpful message: one test each."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqcells
from seqcells import functional, init, interop, reference

BACKENDS = ["auto", "aten", "loop", "reference"]
T, B, I, H = 4, 3, 2, 5  # noqa: E741  (the letter the whole project uses)


def explain(**options):
    return seqcells.explain("lstm", **{"batch": 4, "hidden_size": 8} | options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, "dtype must be a torch.dtype, got a str"),
        ({"dtype": torch.int64}, "dtype must be a floating point dtype, got torch.int64"),
        ({"batch": 1.5}, "batch should be of type int, got: float"),
        ({"batch": True}, "batch should be of type int, got: bool"),
        ({"hidden_size": "8"}, "hidden_size should be of type int, got: str"),
        ({"groups": None}, "groups should be of type int, got: NoneType"),
        ({"steps": 2.0}, "steps should be of type int, got: float"),
        ({"resets": "no"}, "resets should be of type bool, got: str"),
        ({"lengths": 1}, "lengths should be of type bool, got: int"),
        ({"grad": None}, "grad should be of type bool, got: NoneType"),
        ({"device": None}, "device must be a torch.device or its name, got None"),
    ],
)
def test_explain_types(options, words):
    with pytest.raises(TypeError, match=words):
        explain(**options)


@pytest.mark.parametrize("name", ["batch", "hidden_size", "groups", "steps"])
def test_explain_sizes(name):
    for value in (0, -5):
        with pytest.raises(ValueError, match=f"{name} must be greater than zero, got {value}"):
            explain(**{name: value})


WEIGHTS = [torch.randn(3 * H, I), torch.randn(3 * H, H)]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: seqcells.GRU(I, H, reset_after="False"), "reset_after"),
        (lambda: seqcells.GRUCell(I, H, reset_after="False"), "reset_after"),
        (lambda: seqcells.gru(torch.randn(T, B, I), None, *WEIGHTS, reset_after="False"), "reset_after"),
        (lambda: interop.from_keras(np.ones((I, 15)), np.ones((5, 15)), cell="gru", reset_after="no"), "reset_after"),
        (lambda: seqcells.LSTM(I, H)(torch.randn(T, B, I), return_cell_states="no"), "return_cell_states"),
        (lambda: interop.to_keras(nn.LSTM(I, H), 0, "no"), "reverse"),
        (lambda: seqcells.GRUCell(I, H, bias="False"), "bias"),
    ],
)
def test_options_that_are_bools(call, name):
    with pytest.raises(TypeError, match=f"{name} should be of type bool, got: str"):
        call()


def test_falsy_cell_states():
    for value in (0, None, "", []):
        with pytest.raises(TypeError, match="return_cell_states should be of type bool"):
            seqcells.LSTM(I, H)(torch.randn(T, B, I), return_cell_states=value)


def test_reverse_of_groups():
    with pytest.raises(TypeError, match=r"reverse\[1\] should be of type bool, got: str"):
        functional.scan_groups(
            "rnn_tanh", torch.randn(T, B, I), None, torch.randn(2, H, I), torch.randn(2, H, H), reverse=(False, "no")
        )


def packed_by_hand(sizes, rows=None, **indices):
    sizes = torch.as_tensor(sizes)
    return PackedSequence(torch.randn(int(sizes.sum()) if rows is None else rows, I), sizes, **indices)


MALFORMED = {
    "growing": (packed_by_hand([1, 2, 3]), r"batch_sizes must be .* never grow, got \[1, 2, 3\]"),
    "growing again": (packed_by_hand([3, 1, 2]), "batch_sizes must be .* never grow"),
    "zero": (packed_by_hand([3, 0]), "batch_sizes must be greater than zero"),
    "negative": (packed_by_hand([3, -1], 3), "batch_sizes must be greater than zero"),
    "too few rows": (packed_by_hand([3, 2], 3), "input.data must have the 5 rows of input.batch_sizes, got 3"),
    "too many rows": (packed_by_hand([3, 2], 7), "input.data must have the 5 rows of input.batch_sizes, got 7"),
    "floats": (packed_by_hand([3.0, 2.0]), "batch_sizes must be a tensor of int64"),
    "int32": (packed_by_hand(torch.tensor([3, 2], dtype=torch.int32)), "batch_sizes must be a tensor of int64"),
    "two dimensions": (packed_by_hand([[3, 2]]), "batch_sizes must be a tensor of int64"),
    "no steps": (packed_by_hand(torch.empty(0, dtype=torch.int64)), "sequence length to be larger than 0"),
    "none": (packed_by_hand([3, 2])._replace(batch_sizes=None), "batch_sizes must be a tensor, got None"),
    "no data": (packed_by_hand([3, 2])._replace(data=None), "input.data must be a tensor, got None"),
    "no order": (packed_by_hand([3, 2])._replace(unsorted_indices=torch.arange(3)), "sorted_indices must be a tensor"),
    "no way back": (packed_by_hand([3, 2])._replace(sorted_indices=torch.arange(3)), "unsorted_indices must be"),
    "order of two": (packed_by_hand([3, 2], sorted_indices=torch.tensor([1, 0])), "sorted_indices must be a tensor"),
    "no order at all": (
        packed_by_hand([3, 2], sorted_indices=torch.tensor([0, 0, 7]), unsorted_indices=torch.arange(3)),
        "sorted_indices must be a permutation",
    ),
    "another way back": (
        packed_by_hand([3, 2], sorted_indices=torch.tensor([1, 2, 0]), unsorted_indices=torch.tensor([1, 2, 0])),
        "unsorted_indices must undo",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("name", list(MALFORMED))
def test_packed_by_hand(name, kind, backend):
    given, words = MALFORMED[name]
    layer = getattr(seqcells, kind)(I, H, backend=backend)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
        layer(given)


@pytest.mark.parametrize("backend", ["auto", "loop", "reference"])
def test_packed_resets_of_another_order(backend):
    layer = seqcells.LSTM(I, H, backend=backend)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.5

    def pack(t, lengths):
        packed = pack_padded_sequence(t.reshape(T, B, -1), lengths, enforce_sorted=False)
        return packed if t is x else packed._replace(data=packed.data[:, 0])

    expected, _ = layer(pack(x, [2, 4, 1]), resets=resets)
    found, _ = layer(pack(x, [2, 4, 1]), resets=pack(resets, [2, 4, 1]))
    torch.testing.assert_close(found.data, expected.data)
    with pytest.raises(RuntimeError, match="resets must be in the input's order: their sorted_indices differ"):
        layer(pack(x, [2, 4, 1]), resets=pack(resets, [4, 2, 1]))
    with pytest.raises(RuntimeError, match="resets must have the input's batch_sizes"):
        layer(pack(x, [2, 4, 1]), resets=pack(resets, [2, 4, 2]))
    sorted_ = pack_padded_sequence(x, [4, 2, 1])
    with pytest.raises(RuntimeError, match="resets must be in the input's order"):
        layer(sorted_, resets=pack(resets, [2, 4, 1]))
    layer(sorted_, resets=pack(resets, [4, 2, 1]))  # in order already, as one without sorted_indices is


@pytest.mark.parametrize("given", [[4, 0, 1], (4, 0, 1), np.array([4, 0, 1]), [torch.tensor(4), 0, np.int32(1)]])
def test_lengths_of_functions_as_a_list(given):
    """As of layers."""
    x, w = torch.randn(T, B, I), (torch.randn(H, I), torch.randn(H, H))
    expected = seqcells.rnn(x, None, *w, lengths=torch.tensor([4, 0, 1]))
    for found in (
        seqcells.rnn(x, None, *w, lengths=given),
        functional.scan_groups("rnn_tanh", x, None, *(t[None] for t in w), lengths=given),
        reference.scan(reference.rnn_tanh_cell, x, (torch.zeros(B, H),), *w, lengths=given),
    ):
        torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([4, 2], RuntimeError, r"Expected lengths size \(3,\), got \[2\]"),
        ([4, 2, 5], ValueError, "lengths must be between 0 and 4, got 2 to 5"),
        ([10**30, 2, 1], ValueError, "lengths must be between 0 and 4"),
        ([4, 2, 1.0], TypeError, r"lengths\[2\] must be an int, got a float"),
        ([4, True, 1], TypeError, r"lengths\[1\] must be an int, got a bool"),
        ("421", TypeError, "lengths must be a tensor of integers .* or a list of ints, got a str"),
        ({4, 2, 1}, TypeError, "got a set of 3"),
        (
            torch.tensor([4.0, 2.0, 1.0]),
            TypeError,
            r"lengths must be a tensor of integers \[B\], got one of torch.float32",
        ),
        (torch.ones(3, dtype=torch.complex64), TypeError, "lengths must be a tensor of integers"),
        (torch.tensor([4, 2, 1], device="meta"), RuntimeError, "lengths must be on the input's device"),
    ],
)
def test_lengths(given, error, words):
    x, w = torch.randn(T, B, I), (torch.randn(H, I), torch.randn(H, H))
    for call in (lambda: seqcells.rnn(x, None, *w, lengths=given), lambda: seqcells.RNN(I, H)(x, lengths=given)):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("part", ["weight_ih", "weight_hh", "bias_hh"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters(backend, kind, part):
    """Without gradients, too: oneDNN's LSTM reads past the end of a small weight, torch's cells make up one on meta."""
    name = part if kind.endswith("Cell") else f"{part}_l0"
    for how, words in (
        (lambda m: delattr(m, name), f"this {kind} has no {name}"),
        (lambda m: setattr(m, name, None), f"{name} must be a tensor, got None"),
        (lambda m: setattr(m, name, nn.Parameter(torch.ones(2))), rf"{name} must have shape .* got \(2,\)"),
        (lambda m: setattr(m, name, nn.Parameter(getattr(m, name)[1:])), f"{name} must have shape"),
        (lambda m: setattr(m, name, nn.Parameter(getattr(m, name).to("meta"))), "parameter tensor at meta"),
    ):
        module = getattr(seqcells, kind)(I, H, backend=backend)
        how(module)
        if getattr(module, name, 0) is None and (kind, part) in (("LSTMCell", "bias_hh"), ("GRUCell", "bias_hh")):
            continue  # which a cell does without, as torch.nn's
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, TypeError), match=words):
                module(torch.randn(B, I))


def test_all_on_the_meta_device():
    """Shapes are still inferred there."""
    x = torch.randn(T, B, I, device="meta")
    for layer in (seqcells.LSTM(I, H, 2, device="meta"), seqcells.GRU(I, H, device="meta")):
        assert layer(x)[0].shape == (T, B, H)
    assert seqcells.GRUCell(I, H, device="meta")(x[0]).shape == (B, H)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "2", True, [20]])
def test_numbers_of_initialisers(value):
    error = ValueError if isinstance(value, float) else TypeError
    with pytest.raises(error, match="max_length must be"):
        init.chrono_(nn.LSTM(I, H), value)

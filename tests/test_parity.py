"""The kernels against the reference in float64: outputs, final states and every gradient."""

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import CELLS, HALVES, SAVES, SCHEDULES, SHAPES, fits, spread

from seqcells import functional, precisions, reference, testing
from seqcells.testing import Shape, errors, tolerance


def assert_parity(cell, schedule, save, dtype, shape, resets=False, scale=1.0):
    backend = f"triton:{schedule}"
    if not fits(cell, schedule, shape, dtype):
        with pytest.raises(ValueError, match=f"{schedule} schedule does not fit"):
            errors(cell, shape, dtype, DEVICE, backend=backend)
        return
    found = errors(cell, shape, dtype, DEVICE, backend=backend, save=save, resets=resets, scale=scale)
    tf32 = DEVICE == "cuda" and dtype == torch.float32 and precisions.rnn_precision() == "tf32"
    allowed = tolerance(cell, "tf32" if tf32 else dtype, shape)
    wrong = {name: e for name, e in found.items() if not e <= allowed}
    assert not wrong, f"{wrong} > {allowed}; all: {found}"


@pytest.mark.parametrize(
    ("cell", "schedule", "shape", "save"), spread(CELLS[:-1], SCHEDULES, SHAPES, SAVES, most=1), ids=str
)
def test_float64(cell, schedule, save, shape, poison):
    # Without the last, rnn_relu: rnn_tanh but for one function, which the other tests try.
    assert_parity(cell, schedule, save, torch.float64, shape)


@pytest.mark.parametrize(
    ("cell", "schedule", "dtype", "shape_and_save"),
    spread(
        CELLS,
        SCHEDULES,
        [torch.float32, *HALVES],
        [(SHAPES[1], "gates"), (SHAPES[2], "states"), (SHAPES[4], "gates"), (SHAPES[6], "states")],
        most=1,
    ),
    ids=str,
)
def test_other_dtypes(cell, schedule, dtype, shape_and_save, poison):
    shape, save = shape_and_save
    assert_parity(cell, schedule, save, dtype, shape)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_resets(cell, schedule, save, poison):
    assert_parity(cell, schedule, save, torch.float64, Shape(7, 3, 2, 20), resets=True)


@settings(max_examples=30)
@given(
    cell=st.sampled_from(CELLS),
    schedule=st.sampled_from(SCHEDULES),
    save=st.sampled_from(SAVES),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    T=st.integers(1, 5),
    B=st.integers(1, 20),
    input_size=st.integers(1, 7),
    H=st.integers(1, 70),
    resets=st.booleans(),
)
def test_any_shape(cell, schedule, save, dtype, T, B, input_size, H, resets):
    # At this scale nothing saturates: the gradient of one saturated unit, 1 - h*h, is ill-conditioned in h's last bit.
    assert_parity(cell, schedule, save, dtype, Shape(T, B, input_size, H), resets, scale=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("B", [1, 3, 17])
@pytest.mark.parametrize("H", [1, 2, 16, 20, 33, 64, 150])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_shape(cell, schedule, T, B, H, poison):
    for dtype in (torch.float64, torch.float32, *HALVES):
        for save in SAVES:
            # Where nothing saturates, as above.
            assert_parity(cell, schedule, save, dtype, Shape(T, B, 3, H), resets=T > 1, scale=0.4)


def gradcheck_inputs(cell, T, B, I, H):  # noqa: E741
    tensors = [t.requires_grad_() for t in testing.inputs(cell, Shape(T, B, I, H), torch.float64, DEVICE)]
    mask = torch.zeros(T, B, dtype=torch.bool, device=DEVICE)
    mask[T // 2, 0] = True

    def call(backend, save):
        def function(x, w_ih, w_hh, b_ih, b_hh, *states):
            y, final = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, resets=mask, save=save, backend=backend)
            return y, *final

        return function

    return tensors, call


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("cell", "schedule", "save"), spread(CELLS, SCHEDULES, SAVES, most=1))
def test_gradcheck(cell, schedule, save, fast):
    """By random projections; every element by `make test-slow`."""
    tensors, call = gradcheck_inputs(cell, 2, 2, 1, 2)
    assert torch.autograd.gradcheck(call(f"triton:{schedule}", save), tensors, fast_mode=fast)


@pytest.mark.parametrize("cell", [CELLS[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CELLS[1:])])
def test_gradcheck_over_several_tiles(cell):
    """resident; grid's is in test_grid.py, and stepwise's tiles are its programs."""
    tensors, call = gradcheck_inputs(cell, 3, 9, 2, 17)
    assert torch.autograd.gradcheck(call("triton:resident", "gates"), tensors, fast_mode=True)


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cell", CELLS)
def test_double_backward(cell, fast):
    tensors, call = gradcheck_inputs(cell, 2, 2, 1, 2)
    assert torch.autograd.gradgradcheck(call("triton", "gates"), tensors, fast_mode=fast)


def test_double_backward_counts_a_tied_weight_once():
    """x made from w_hh: the gradient that reaches w_hh through x must not be added twice."""
    torch.manual_seed(0)
    w_ih, w_hh = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        x = (w_hh * 2)[None].to(DEVICE)
        y, _ = functional.rnn(x, None, w_ih.to(DEVICE), w_hh.to(DEVICE), backend=backend)
        (first,) = torch.autograd.grad(y.sin().sum(), w_hh, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), w_hh)
        found.append((first.detach(), second))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_differentiable_to_second_order(cell):
    tensors, call = gradcheck_inputs(cell, 2, 1, 1, 2)
    assert torch.autograd.gradcheck(call("reference", "gates"), tensors)


def test_lengths_in_the_reference_are_the_packed_result():
    torch.manual_seed(0)
    layer = torch.nn.LSTM(3, 4, dtype=torch.float64)
    x, lengths = torch.randn(6, 3, 3, dtype=torch.float64), torch.tensor([6, 2, 4])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, (h, c) = layer(packed)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
    zero = torch.zeros(3, 4, dtype=torch.float64)
    got, final = reference.scan(reference.lstm_cell, x, (zero, zero), *layer.parameters(), lengths=lengths)
    torch.testing.assert_close((got, *final), (padded, h[0], c[0]))

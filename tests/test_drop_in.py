"""Common usage of torch.nn's layers that must also work with ours."""

import pytest
import torch
from conftest import DEVICE
from torch.autograd.functional import jacobian
from torch.func import functional_call, stack_module_state

import seqcells
from seqcells import functional

BACKENDS = ["auto", "loop"]
NAMES = ["LSTM", "GRU", "RNN"]


def layer(name, *sizes, **options):
    torch.manual_seed(0)
    return getattr(seqcells, name)(*sizes, **options)


@pytest.mark.parametrize("backend", [*BACKENDS, "aten", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_states_are_detached_and_changed_in_place_between_windows(name, backend):
    device = DEVICE if backend == "triton" else "cpu"
    ours = layer(name, 3, 4, backend=backend, dtype=torch.float64, device=device)
    theirs = getattr(torch.nn, name)(3, 4, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    windows = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    for module in (ours, theirs):
        h = None
        for x in windows.to(module.weight_hh_l0.device):
            y, h = module(x, h)
            for s in h if isinstance(h, tuple) else (h,):
                s.detach_()
                s[:, 0] = 0
            y.sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_in_float32_on_the_cpu(name):
    """Where "auto" is oneDNN's LSTM."""
    module = layer(name, 3, 4)
    h = None
    for x in torch.randn(3, 5, 2, 3):
        y, h = module(x, h)
        for s in h if isinstance(h, tuple) else (h,):
            s.detach_()
            s[:, 0] = 0
        y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_gradients(name, backend):
    module = layer(name, 3, 4, num_layers=2, bidirectional=True, backend=backend)
    y, _ = module(torch.randn(5, 0, 3))
    y.sum().backward()
    assert all(not p.grad.any() for p in module.parameters())


def test_an_empty_batch_with_a_projection_and_lengths():
    module = layer("LSTM", 3, 4, proj_size=2)
    y, _ = module(torch.randn(5, 0, 3), (torch.zeros(1, 0, 2), torch.zeros(1, 0, 4)), lengths=[])
    assert y.shape == (5, 0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_vectorized_jacobian(name, backend):
    """By torch's older vmap, whose rules are fewer."""
    module = layer(name, 2, 3, num_layers=2, bidirectional=True, backend="loop" if name == "LSTM" else backend)
    x = torch.randn(2, 1, 2)
    found = jacobian(lambda v: module(v)[0], x, vectorize=True)
    torch.testing.assert_close(found, jacobian(lambda v: module(v)[0], x))


@pytest.mark.parametrize("resets", [False, True])
def test_an_ensemble_of_more_models_than_reversed_groups_fit_in_a_launch(resets):
    models = [seqcells.GRU(2, 3, bidirectional=True, backend="loop") for _ in range(40)]
    parameters, buffers = stack_module_state(models)
    x, masks = torch.randn(4, 2, 2), torch.rand(40, 4, 2) < 0.3

    def output(p, b, mask):
        return functional_call(models[0], (p, b), (x,), {"resets": mask if resets else None})[0]

    found = torch.vmap(output)(parameters, buffers, masks)
    for got, model, mask in zip(found, models, masks, strict=True):
        torch.testing.assert_close(got, model(x, resets=mask if resets else None)[0])


def test_more_reversed_groups_than_fit_in_a_launch_are_refused():
    weights = torch.randn(70, 9, 2), torch.randn(70, 9, 3)
    with pytest.raises(ValueError, match="at most 62 groups where some are reversed, got 70"):
        functional.scan_groups("gru", torch.randn(3, 2, 2), None, *weights, reverse=[True] * 70)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_outputs_are_changed_in_place_on_the_cpu(name):
    """As torch's own GRU and RNN allow there; its LSTM does not."""
    module = layer(name, 3, 4, backend="loop")
    x = torch.randn(5, 2, 3)
    (module(x)[0] * 2).sum().backward()
    wanted = module.weight_hh_l0.grad.clone()
    module.zero_grad()
    module(x)[0].mul_(2).sum().backward()
    torch.testing.assert_close(module.weight_hh_l0.grad, wanted)
    assert not module(x)[0].detach_().requires_grad


def test_cells_are_vmapped_without_a_warning(recwarn):
    for name in NAMES:
        cell = layer(f"{name}Cell", 3, 4)
        torch.vmap(lambda x, cell=cell: cell(x))(torch.randn(6, 2, 3))
    assert not [w for w in recwarn if "performance drop" in str(w.message)]


def test_functions_take_the_options_they_name_and_no_others():
    weights = torch.randn(9, 2), torch.randn(9, 3)
    for option in ({"one_step": True}, {"padded": True}, {"cells": True}, {"foo": 1}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            functional.scan("gru", torch.randn(3, 2, 2), None, *weights, **option)

"""opacus: per-sample gradients of our layers and cells are those of a loop over the samples."""

import copy
import warnings

import opacus
import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import seqcells
import seqcells.integrations.opacus
from seqcells.testing import TOLERANCE, relative

pytestmark = pytest.mark.integrations
B, T, I, H = 5, 7, 3, 4  # noqa: E741
LAYERS = {
    "lstm": ("LSTM", {}),
    "lstm-proj": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {}),
    "gru-before": ("GRU", {"reset_after": False}),
    "rnn": ("RNN", {"nonlinearity": "relu"}),
}


def layer(kind, dtype=torch.float64, **options):
    name, more = LAYERS[kind]
    torch.manual_seed(0)
    return getattr(seqcells, name)(I, H, dtype=dtype, **more, **options)


class Net(nn.Module):
    """Something of every output: all of y, and of the final states."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        out = (getattr(rnn, "proj_size", 0) or H) * (2 if getattr(rnn, "bidirectional", False) else 1)
        self.head = nn.Linear(out, 1, dtype=rnn.weight_ih_l0.dtype)

    def forward(self, x, *args, **given):
        y, states = self.rnn(x, *args, **given)[:2]
        score = self.head(y).mean(1 if self.rnn.batch_first else 0).squeeze(-1)
        for s in states if isinstance(states, tuple) else (states,):
            score = score + s.sin().sum((0, 2))
        return score


def assert_samples(net, x, *args, reduction="mean", batch_axis=0, given=None, samples=None):
    """p.grad_sample of opacus' module against the gradients of samples [(args, given)], each a batch of one."""
    given = given or {}
    dtype = x.dtype
    loop = copy.deepcopy(net)
    private = opacus.GradSampleModule(net, batch_first=batch_axis == 0, loss_reduction=reduction)
    loss = private(x, *args, **given).square()
    (loss.mean() if reduction == "mean" else loss.sum()).backward()
    for b, (arguments, named) in enumerate(samples):
        expected = torch.autograd.grad(loop(*arguments, **named).square().sum(), list(loop.parameters()))
        for (name, p), e in zip(net.named_parameters(), expected, strict=True):
            assert relative(p.grad_sample[b], e) <= TOLERANCE[dtype], (name, b)
    count = len(samples) if reduction == "mean" else 1
    for name, p in net.named_parameters():
        assert relative(p.grad, p.grad_sample.sum(0) / count) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_gradients_of_each_sample(kind, options, batch_first, dtype):
    net = Net(layer(kind, dtype, batch_first=batch_first, **options))
    x = torch.randn(B, T, I, dtype=dtype)
    x = x if batch_first else x.transpose(0, 1)
    axis = 0 if batch_first else 1
    assert_samples(net, x, batch_axis=axis, samples=[((x.narrow(axis, b, 1),), {}) for b in range(B)])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru-before", "rnn"])
def test_resets_lengths_and_initial_states(kind, batch_first):
    """What opacus' own hooks do not see. And a model whose layers differ in batch_first from what opacus was told."""
    axis = 0 if batch_first else 1
    x, resets = torch.randn(B, T, I, dtype=torch.float64), torch.rand(B, T) < 0.3
    x, resets = (x, resets) if batch_first else (x.transpose(0, 1), resets.t())
    states = tuple(torch.randn(1, B, H, dtype=torch.float64) for _ in range(2 if kind == "lstm" else 1))
    lengths = [7, 3, 1, 5, 6]
    pack = (lambda s: s) if kind == "lstm" else (lambda s: s[0])
    samples = []
    for b in range(B):
        own = {"resets": resets.narrow(axis, b, 1), "lengths": lengths[b : b + 1]}
        samples.append(((x.narrow(axis, b, 1), pack(tuple(s[:, b : b + 1] for s in states))), own))
    net = Net(layer(kind, batch_first=batch_first))
    net.head.requires_grad_(False)  # opacus' own sampler of it wants y's batch where the model was said to have it
    given = {"resets": resets, "lengths": lengths}
    loop = copy.deepcopy(net)
    private = opacus.GradSampleModule(net, batch_first=not batch_first)
    private(x, pack(states), **given).square().mean().backward()
    for b, (arguments, named) in enumerate(samples):
        expected = torch.autograd.grad(loop(*arguments, **named).square().sum(), list(loop.rnn.parameters()))
        for p, e in zip(net.rnn.parameters(), expected, strict=True):
            assert relative(p.grad_sample[b], e) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_of_several_steps(kind):
    """The steps of one batch are summed, as opacus does for its own cells."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell = getattr(seqcells, kind)(I, H, dtype=torch.float64)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return (state[1] if isinstance(state, tuple) else state).sum(1)

    x = torch.randn(B, T, I, dtype=torch.float64)
    assert_samples(Steps(), x, reduction="sum", samples=[((x[b : b + 1],), {}) for b in range(B)])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_same_as_opacus_own_layers(kind):
    """DPLSTM, DPGRU and DPRNN, whose parameters are a linear layer's of the input and one's of the state."""
    theirs = {"LSTM": DPLSTM, "GRU": DPGRU, "RNN": DPRNN}[kind](input_size=I, hidden_size=H, batch_first=True)
    ours = getattr(seqcells, kind)(I, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, I)
    for module in (theirs, ours):
        y, states = opacus.GradSampleModule(module)(x)
        (y.square().sum((1, 2)) + (states[1] if kind == "LSTM" else states).sum((0, 2))).mean().backward()
    (cell,) = (m for m in theirs.modules() if hasattr(m, "ih"))
    expected = {"weight_ih_l0": cell.ih.weight, "weight_hh_l0": cell.hh.weight, "bias_ih_l0": cell.ih.bias}
    for name, p in (expected | {"bias_hh_l0": cell.hh.bias}).items():
        assert relative(getattr(ours, name).grad_sample, p.grad_sample) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_make_private_without_noise_is_clipped_sgd(kind, mode):
    """One epoch against a loop by hand that clips each sample's gradient; the data in its own order."""
    net = Net(layer(kind, torch.float64, batch_first=True))
    loop = copy.deepcopy(net)
    x, target = torch.randn(12, T, I, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    data = DataLoader(TensorDataset(x, target), batch_size=4)
    criterion = nn.MSELoss()
    given = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "poisson_sampling": False, "grad_sample_mode": mode}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the noise is not secure, and such
        made = opacus.PrivacyEngine().make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), 0.1),
            data_loader=data,
            **given,
            **({"criterion": criterion} if mode == "ghost" else {}),
        )
    private, optimizer = made[:2]
    measure = made[2] if mode == "ghost" else criterion
    plain = torch.optim.SGD(loop.parameters(), 0.1)
    for x, target in data:
        optimizer.zero_grad()
        measure(private(x), target).backward()
        optimizer.step()
        total = [torch.zeros_like(p) for p in loop.parameters()]
        for b in range(4):
            own = torch.autograd.grad((loop(x[b : b + 1]) - target[b : b + 1]).square().sum(), list(loop.parameters()))
            norm = torch.stack([g.norm() for g in own]).norm()
            total = [t + g * (0.1 / (norm + 1e-6)).clamp(max=1.0) for t, g in zip(total, own, strict=True)]
        for p, g in zip(loop.parameters(), total, strict=True):
            p.grad = g / 4
        plain.step()
    for mine, its in zip(net.parameters(), loop.parameters(), strict=True):
        assert relative(mine.detach(), its.detach()) <= TOLERANCE[torch.float64]


def test_poisson_sampling_and_empty_batches():
    net = Net(layer("gru", torch.float32, batch_first=True))
    data = DataLoader(TensorDataset(torch.randn(12, T, I), torch.randn(12)), batch_size=1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        private, optimizer, data = opacus.PrivacyEngine().make_private(
            module=net, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
        )
    sizes = set()
    for x, target in data:
        optimizer.zero_grad()
        (private(x) - target).square().mean().backward()
        optimizer.step()
        sizes.add(len(x))
    assert {0, 1} <= sizes and all(p.isfinite().all() for p in net.parameters())


def test_a_frozen_parameter_evaluation_and_hooks_that_were_removed():
    net = Net(layer("lstm", batch_first=True))
    net.rnn.weight_ih_l0.requires_grad_(False)
    x = torch.randn(B, T, I, dtype=torch.float64)
    private = opacus.GradSampleModule(net)
    private(x).mean().backward()
    assert net.rnn.weight_hh_l0.grad_sample.shape == (B, 4 * H, H) and not hasattr(net.rnn.weight_ih_l0, "grad_sample")
    hooks = len(net.rnn._forward_hooks), len(net.rnn._forward_pre_hooks)
    assert hooks == (2, 1)
    private.remove_hooks()
    assert not net.rnn._forward_hooks and not net.rnn._forward_pre_hooks and not seqcells.integrations.opacus._FOUND
    net.eval()
    y, _ = net.rnn(x)
    assert y.grad_fn.name() != "_OutputsBackward"


def test_what_opacus_cannot_take_is_named():
    x = torch.randn(B, T, I, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, [T] * B, batch_first=True)
    wrap = opacus.GradSampleModule
    with pytest.raises(TypeError, match="input of a GRU under opacus must be a tensor, got a PackedSequence: give len"):
        wrap(layer("gru", batch_first=True))(packed)
    with pytest.raises(RuntimeError, match=r"input of a GRU under opacus must be a batch \[T, B, I\], got \(7, 3\)"):
        wrap(layer("gru"))(x[0])
    with pytest.raises(ValueError, match="dropout of a LSTM under opacus must be 0, got"):
        wrap(layer("lstm", num_layers=2, dropout=0.5))(x)
    with pytest.raises(ValueError, match="must not be 'functorch' with a LSTM"):
        wrap(layer("lstm"), force_functorch=True)
    with pytest.raises(ValueError, match="no parameters but its own, got weight_hh_l0_orig"):
        wrap(prune.l1_unstructured(layer("lstm"), "weight_hh_l0", 0.5), strict=False)(x)
    with pytest.raises(RuntimeError, match=r"import seqcells.integrations.opacus before opacus wraps this LSTM"):
        seqcells.integrations.opacus.grad_sampler(layer("lstm"), None, None)


def test_classes_that_inherit():
    """From ours; those with a forward of their own are registered by whoever wrote it."""

    class Mine(seqcells.GRU):
        pass

    class Twice(seqcells.GRU):
        def forward(self, x):
            return super().forward(2 * x)

    opacus.grad_sample.register_grad_sampler(Twice)(seqcells.integrations.opacus.grad_sampler)
    x = torch.randn(B, T, I, dtype=torch.float64)
    for cls in (Mine, Twice):
        net = Net(cls(I, H, batch_first=True, dtype=torch.float64))
        assert_samples(net, x, samples=[((x[b : b + 1],), {}) for b in range(B)])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_converted_to_subclasses_of_torch_nns(kind):
    """Which opacus would refuse, were they torch.nn's own."""
    net = Net(seqcells.convert(getattr(nn, kind)(I, H, batch_first=True, dtype=torch.float64), subclass=True))
    x = torch.randn(B, T, I, dtype=torch.float64)
    assert isinstance(net.rnn, getattr(nn, kind)) and ModuleValidator.is_valid(net)
    assert_samples(net, x, samples=[((x[b : b + 1],), {}) for b in range(B)])


@seqcells.cell(gates="a b", states="h c", params="p", inputs="w", outputs="y")
def attended(x, U, h, c, p, w):
    h = torch.tanh(x.a + U.a(c)) + w * h
    c = c + torch.sigmoid(x.b + p * h)
    return h, c, torch.tanh(c)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_cell_of_ones_own(batch_first):
    """Its parameters and per-step inputs, and the states after every step."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn = seqcells.Recurrent(attended, I, H, 2, batch_first=batch_first, dtype=torch.float64)

        def forward(self, x, **given):
            y, final, every = self.rnn(x, return_states=True, **given)
            axis = 1 if batch_first else 0
            return sum(s.sin().sum((axis, 2)) for s in (y, *every)) + sum(s.sum((0, 2)) for s in final)

    axis = 0 if batch_first else 1
    x, w = torch.randn(B, T, I, dtype=torch.float64), torch.rand(B, T, dtype=torch.float64)
    x, w = (x, w) if batch_first else (x.transpose(0, 1), w.t())
    samples = [((x.narrow(axis, b, 1),), {"w": w.narrow(axis, b, 1)}) for b in range(B)]
    assert_samples(Own(), x, batch_axis=axis, given={"w": w}, samples=samples)


def test_one_step_of_a_cell_of_ones_own():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell = seqcells.RecurrentCell(attended, I, H, dtype=torch.float64)

        def forward(self, x, w):
            state, score = None, 0
            for step, now in zip(x.unbind(1), w.unbind(1), strict=True):
                y, state = self.cell(step, state, w=now)
                score = score + y.sum(1)
            return score

    x, w = torch.randn(B, T, I, dtype=torch.float64), torch.rand(B, T, dtype=torch.float64)
    samples = [((x[b : b + 1], w[b : b + 1]), {}) for b in range(B)]
    assert_samples(Steps(), x, w, reduction="sum", samples=samples)

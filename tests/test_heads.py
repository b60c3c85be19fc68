"""Heads: a block-diagonal recurrence is as many separate layers, with every option; and xlstm's weights."""

import copy
import pickle

import pytest
import torch
from conftest import DEVICE
from shapes import spread
from torch.nn.utils.rnn import pack_padded_sequence

import seqcells
from seqcells import init, interop, testing
from seqcells.engines import operators

T, B, I, H, HEADS = 5, 4, 3, 12, 3  # noqa: E741
CELLS = ["lstm", "gru_before", "slstm", "augru", "cornn", "indrnn"]  # cornn's first gate alone has an input


def layer(cell, backend, heads=HEADS, **options):
    torch.manual_seed(0)
    return seqcells.Recurrent(cell, I, H, heads=heads, backend=backend, dtype=torch.float64, device=DEVICE, **options)


def apart(module, head):
    """The layer of one head of one layer and direction; for several, the same parameters' names."""
    D = H // module.heads
    one = seqcells.Recurrent(module.cell, module.input_size, D, backend="reference", dtype=torch.float64, device=DEVICE)
    for name, p in one.named_parameters():
        whole = getattr(module, name).detach()
        p.data = whole.unflatten(0, (-1, module.heads, D))[:, head].flatten(0, 1) if len(whole) > 1 else whole
    return one


@pytest.mark.parametrize(
    ("cell", "masks", "backend"), spread(CELLS, ["", "resets", "lengths"], ["loop", "triton", "reference"], most=1)
)
def test_heads_are_separate_layers(cell, masks, backend):
    module = layer(cell, backend)
    x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
    state = tuple(torch.rand(1, B, H, dtype=torch.float64, device=DEVICE) + 0.5 for _ in module.cell.states)
    inputs = {name: torch.rand(T, B, H, dtype=torch.float64, device=DEVICE) for name in module.cell.inputs}
    options = {
        "": {},
        "resets": {"resets": torch.rand(T, B, device=DEVICE) < 0.3},
        "lengths": {"lengths": [5, 2, 4, 1]},
    }[masks]
    one = len(state) == 1
    y, final, every = module(x, state[0] if one else state, return_states=True, **options, **inputs)
    for head in range(HEADS):
        mine = slice(head * H // HEADS, (head + 1) * H // HEADS)
        start = tuple(s[..., mine].contiguous() for s in state)
        given = {name: t[..., mine] for name, t in inputs.items()}
        expected = apart(module, head)(x, start[0] if one else start, return_states=True, **options, **given)
        torch.testing.assert_close(y[..., mine], expected[0])
        for found, wanted in ((final, expected[1]), (every, expected[2])):
            for f, w in zip((found,) if one else found, (wanted,) if one else wanted, strict=True):
                torch.testing.assert_close(f[..., mine], w)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cell", "backend"), spread(CELLS, ["loop", "triton"], most=1))
def test_engines_agree(cell, backend, bidirectional, poison):
    """Two layers, batch first, masks, in every gradient; and packed rows."""
    options = {"num_layers": 2, "bidirectional": bidirectional, "batch_first": True}
    module, reference = layer(cell, backend, **options), layer(cell, "reference", **options)
    reference.load_state_dict(module.state_dict())
    x = torch.randn(B, T, I, dtype=torch.float64, device=DEVICE)
    inputs = {name: torch.rand(B, T, dtype=torch.float64, device=DEVICE) for name in module.cell.inputs}
    resets, lengths = torch.rand(B, T, device=DEVICE) < 0.2, torch.tensor([5, 2, 4, 1])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    found = []
    for each in (module, reference):
        y, state = each(x, resets=resets, lengths=lengths, **inputs)
        rows, _ = each(packed, resets=resets, **inputs)
        state = state if isinstance(state, tuple) else (state,)
        parameters = dict(each.named_parameters())
        loss = y.square().sum() + sum(s.square().sum() for s in state)
        found.append((y, state, rows.data, torch.autograd.grad(loss, list(parameters.values()))))
    torch.testing.assert_close(*found)


def test_torch_nn_has_no_heads_so_another_engine_runs():
    module = seqcells.Recurrent("lstm", I, H, heads=2)
    assert module(torch.randn(T, B, I))[0].shape == (T, B, H)
    assert module(torch.randn(1, B, I))[0].shape == (1, B, H)
    module.backend = "aten"
    with pytest.raises(RuntimeError, match="torch's fused RNNs have no heads"):
        module(torch.randn(T, B, I))


def test_as_modules():
    module = seqcells.Recurrent("lstm", I, H, heads=HEADS, num_layers=2, bidirectional=True)
    assert module.weight_hh_l1_reverse.shape == (4 * H, H // HEADS) and module.weight_ih_l1.shape == (4 * H, 2 * H)
    assert "heads=3" in repr(module) and "heads" not in repr(seqcells.Recurrent("lstm", I, H))
    x = torch.randn(T, B, I)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x)[0], module(x)[0])
    init.forget_bias_(module, 2.0)
    assert (module.bias_ih_l0[H : 2 * H] == 2).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == torch.bfloat16
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_wrong_heads():
    for heads, error, words in (
        (5, ValueError, "hidden_size must be divisible by heads, got 12 and 5"),
        (0, ValueError, "heads must be greater than zero, got 0"),
        (2.0, TypeError, "heads should be of type int"),
        (True, TypeError, "heads should be of type int"),
    ):
        with pytest.raises(error, match=words):
            seqcells.Recurrent("lstm", I, H, heads=heads)
    most = operators.MOST // 2
    with pytest.raises(ValueError, match=f"at most {most} heads if bidirectional, got {most + 1}"):
        seqcells.Recurrent("lstm", I, most + 1, heads=most + 1, bidirectional=True)


def test_weights_of_xlstm():
    """The paper's step, head by head, on the package's own layout of weights, and where its input is already gates."""
    D, generator = H // HEADS, torch.Generator().manual_seed(0)
    kernel = torch.randn(HEADS, D, 4, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(HEADS, 4, D, generator=generator, dtype=torch.float64)
    weights = [torch.randn(HEADS, D, 2, generator=generator, dtype=torch.float64) for _ in range(4)]
    module = seqcells.Recurrent("slstm", 2 * HEADS, H, heads=HEADS, dtype=torch.float64)
    interop.load_(module, interop.from_xlstm(kernel, bias, weights))
    x = torch.randn(T, B, 2 * HEADS, generator=generator, dtype=torch.float64)
    h = c = n = m = torch.zeros(B, HEADS, D, dtype=torch.float64)
    gates, outputs = [torch.einsum("tbni,ndi->tbnd", x.unflatten(2, (HEADS, 2)), w) for w in weights], []
    for t in range(T):
        i, f, z, o = (g[t] + torch.einsum("bnd,nde->bne", h, kernel[:, :, k]) + bias[:, k] for k, g in enumerate(gates))
        f = torch.nn.functional.logsigmoid(f) + m
        m = torch.maximum(f, i) if t else i
        i, f = torch.exp(i - m), torch.exp(f - m)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        outputs.append(h.flatten(1))
    torch.testing.assert_close(module(x)[0], torch.stack(outputs))
    plain = seqcells.Recurrent("slstm", 4 * H, H, heads=HEADS, dtype=torch.float64)
    interop.load_(plain, interop.from_xlstm(kernel, bias))
    torch.testing.assert_close(plain(torch.cat([g.flatten(2) for g in gates], 2))[0], torch.stack(outputs))
    for arguments, error, words in (
        ((kernel[:, :2], bias), ValueError, r"recurrent_kernel: expected shape \(3, 2, 4, 2\), got"),
        ((kernel, bias[:2]), ValueError, r"bias: expected shape \(3, 4, 4\), got \(2, 4, 4\)"),
        ((kernel, bias, weights[:3]), ValueError, "input_weights must be four arrays, those of i, f, z and o, got 3"),
        ((kernel, bias, [*weights[:3], weights[0][..., :1]]), ValueError, r"input_weights\[3\]: expected shape"),
        ((kernel, bias, kernel), TypeError, "input_weights must be a list of four arrays"),
    ):
        with pytest.raises(error, match=words):
            interop.from_xlstm(*arguments)


@pytest.mark.parametrize("backend", ["loop", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(backend, dtype):
    """In half precision each backend rounds in its own way: the errors are within the table's."""
    module = seqcells.Recurrent("gru", I, H, heads=HEADS, backend=backend, dtype=dtype, device=DEVICE)
    x = torch.randn(T, B, I, dtype=dtype, device=DEVICE)
    exact = copy.deepcopy(module).double()
    exact.backend = "reference"
    assert testing.relative(module(x)[0].detach(), exact(x.double())[0].detach()) < testing.TOLERANCE[dtype]

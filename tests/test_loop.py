"""The loop engine: its stretches, its pieces, and whole layers against the reference in float64."""

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import CELLS, spread
from torch.testing._internal.two_tensor import TwoTensor

import seqcells
from seqcells import dispatch, functional, masks
from seqcells.cell import named
from seqcells.engines.loop import steps
from seqcells.engines.loop.stretches import row_order
from seqcells.kernels.buffers import padding_rows, reset_rows

T, B, I, H = 9, 5, 3, 6  # noqa: E741
LENGTHS = [9, 0, 4, 1, 7]
KINDS = ["plain", "resets", "lengths", "both"]
WAYS = [(False,), (True,), (False, True)]


def stretches_of(mask, back):
    """Each sequence's stretches, as lists of its rows t*B+b in their order; and whether the first has the start."""
    T, B = mask.shape
    cuts, ended = reset_rows(mask, back), padding_rows(mask)
    found = []
    for b in range(B):
        order = [t for t in range(T) if ended is None or not ended[t, b]]
        for n, t in enumerate(reversed(order) if back else order):
            if n == 0 or cuts[t, b]:
                found.append(([], b if n == 0 and not cuts[t, b] else B))
            found[-1][0].append(t * B + b)
    return found


@settings(max_examples=60)
@given(st.data())
def test_an_order_of_rows_has_every_row_once_and_its_stretches_in_order(data):
    T, B = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5))
    back, most, seed = data.draw(st.booleans()), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    resets = torch.rand(T, B, generator=generator) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    lengths = torch.randint(0, T + 1, (B,), generator=generator) if data.draw(st.booleans()) else None
    mask = masks.encode(resets, lengths, T, int(back))
    w = row_order(mask, back, T, B, mask.device, most)
    expected = {tuple(rows): start for rows, start in stretches_of(mask, back)}
    assert sorted(w.source.tolist()) == sorted(r for rows in expected for r in rows)
    row = 0
    ends = {}
    for begin, end, i, j in w.batches:
        sizes = w.sizes[begin:end]
        assert sizes[0] == j - i <= most and list(sizes) == sorted(sizes, reverse=True)
        own = [[] for _ in range(j - i)]
        for n in sizes:
            for place in range(n):
                before = w.start[i + place] if not own[place] else w.target[own[place][-1]]
                assert w.previous[row] == before
                own[place].append(int(w.source[row]))
                assert w.target[own[place][-1]] == w.head + row
                row += 1
        for n, rows in enumerate(own):
            assert expected.pop(tuple(rows)) == w.start[i + n]
            ends[rows[-1]] = i + n
    assert not expected and row == w.rows and sum(b - a for of in w.pieces(3) for _, _, a, b in of) == row
    for b in range(B):
        rows = [r for rows, _ in stretches_of(mask, back) for r in rows if r % B == b]
        assert w.last[b] == (w.target[rows[-1]] if rows else b)
        assert w.end[b] == (ends[rows[-1]] if rows else w.stretches)
        assert w.first[b] == (w.start.tolist().index(b) if b in w.start else w.stretches)


def case(cell, kind, ways, bias=True, hx=True):
    """x, states, weights, masks of `scan_groups`, all leaves in float64."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()

    K, spec = len(ways), named(cell)
    G = spec.rows[1]
    x, weights = drawn(T, B, I), [drawn(K, G * H, I), drawn(K, G * H, H)]
    weights += [drawn(K, G * H), drawn(K, G * H)] if bias else [None, None]
    states = tuple(drawn(K, B, H) for _ in spec.states) if hx else None
    options = {"reverse": ways}
    if kind in ("resets", "both"):
        options["resets"] = (torch.rand(T, B, generator=generator) < 0.3).to(DEVICE)
    if kind in ("lengths", "both"):
        options["lengths"] = torch.tensor(LENGTHS, device=DEVICE)
    return x, states, weights, options


def answer(cell, made, **more):
    """Outputs and every gradient, of all outputs weighted at random."""
    x, states, weights, options = made
    y, final = functional.scan_groups(cell, x, states, *weights, **options, **more)
    generator = torch.Generator().manual_seed(2)
    weighted = [(o * torch.randn(o.shape, dtype=o.dtype, generator=generator).to(o.device)).sum() for o in (y, *final)]
    leaves = [t for t in (x, *weights, *(states or ())) if t is not None]
    return [y, *final, *torch.autograd.grad(sum(weighted), leaves)]


@pytest.mark.parametrize("cell, kind, ways", spread(CELLS, KINDS, WAYS, most=2))
def test_as_the_reference_in_small_pieces(cell, kind, ways, monkeypatch, poison):
    """Pieces of two rows, so that there are many, and batches of as many stretches; and all in one."""
    for number, (save, bias, hx) in enumerate((("gates", True, True), ("states", False, True), ("gates", True, False))):
        made = case(cell, kind, ways, bias, hx)
        expected = answer(cell, made, backend="reference")
        for chunk in (2 * H, 1 << 16) if number == 0 else (2 * H,):
            monkeypatch.setattr(steps, "CHUNK", chunk)
            torch.testing.assert_close(answer(cell, made, backend="loop", save=save), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_what_it_gives_are_tensors_like_any(cell):
    """Not of inference mode, which the steps run in: they can be changed in place, saved and differentiated."""
    made = case(cell, "resets", (False,))
    found = answer(cell, made, backend="loop")
    assert not any(t.is_inference() for t in found)
    found[0].mul_(2)
    with torch.no_grad():
        y, final = functional.scan_groups(cell, made[0], made[1], *made[2], backend="loop", **made[3])
    assert not any(t.is_inference() for t in (y, *final))
    leaf = torch.ones((), dtype=y.dtype, device=y.device, requires_grad=True)
    (leaf * y).sum().backward()
    torch.testing.assert_close(leaf.grad, y.sum())


@pytest.mark.parametrize(
    "name, backend", [("LSTM", "aten"), *((n, b) for n in ("LSTM", "GRU", "RNN") for b in ("auto", "loop"))]
)
def test_nothing_crosses_a_reset_not_even_nan(name, backend):
    module = getattr(seqcells, name)(3, 4, backend=backend)
    x, resets = torch.randn(6, 2, 3), torch.zeros(6, 2, dtype=torch.bool)
    resets[3] = True
    expected, _ = module(x, resets=resets)
    x[1, 0] = torch.nan
    y, _ = module(x, resets=resets)
    assert y[1:3, 0].isnan().all()
    torch.testing.assert_close(y[3:], expected[3:])
    torch.testing.assert_close(y[:, 1], expected[:, 1])


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("hx", [False, True])
def test_onednn_with_marked_steps(kind, ways, hx):
    """Values, gradients and their gradients, in float32: the same up to rounding as the reference."""
    x, states, weights, options = case("lstm", kind, ways, hx=hx)
    leaves = [t.detach().cpu().float().requires_grad_() for t in (x, *weights, *(states or ()))]
    options = {name: option.cpu() if isinstance(option, torch.Tensor) else option for name, option in options.items()}
    found = []
    for backend in ("aten", "reference"):
        x, *rest = leaves
        given, states = rest[:4], tuple(rest[4:]) or None
        y, final = functional.scan_groups("lstm", x, states, *given, **options, backend=backend)
        first = torch.autograd.grad(y.sin().sum() + final[0].sum() + final[1].cos().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([y, *final, *first, *second])
    for a, b in zip(*found, strict=True):
        assert ((a - b).norm() / b.norm().clamp(min=1e-3)).item() < 1e-5


def test_a_packed_batch_by_marked_steps_is_as_torchs(poison):
    ours, theirs = seqcells.LSTM(3, 4, 2, bidirectional=True), torch.nn.LSTM(3, 4, 2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(6, 3, 3), torch.tensor([2, 6, 3]), enforce_sorted=False)
    found = []
    for module in (ours, theirs):
        y, (h, c) = module(x)
        found.append([y.data, h, c, *torch.autograd.grad(y.data.sum() + c.sum(), list(module.parameters()))])
    torch.testing.assert_close(*found)


# --- habits and corners, where "auto" is oneDNN's LSTM with marked steps, or the loop ---------------------------------


def masked_inputs(kind):
    """An input and what says what is masked, of sequences of at most six steps."""
    x, lengths = torch.randn(6, 3, 4), torch.tensor([6, 3, 2])
    resets = torch.zeros(6, 3, dtype=torch.bool)
    resets[2, 0] = resets[4] = True
    if kind == "packed":
        return torch.nn.utils.rnn.pack_padded_sequence(x, lengths), {}
    return x, {"resets": resets} if kind == "resets" else {"lengths": lengths}


@pytest.mark.parametrize("kind", ["resets", "lengths", "packed"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_masked_states_are_detached_in_place_and_gradients_batched(name, kind):
    module = getattr(seqcells, name)(4, 5)
    x, masks = masked_inputs(kind)
    y, state = module(x, **masks)
    y = y.data if kind == "packed" else y
    given, parameters = torch.randn(3, *y.shape), list(module.parameters())
    batched = torch.autograd.grad(y, parameters, given, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, parameters, g, retain_graph=True) for g in given]
    torch.testing.assert_close(list(batched), [torch.stack(g) for g in zip(*each, strict=True)])
    for s in (y, *(state if name == "LSTM" else (state,))):
        s.detach_()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["resets", "lengths", "packed", "packed resets"])
def test_a_projection_with_masks_in_float32(kind, grad):
    """It has no marked steps, and must not be taken for one that has."""
    module, plain = seqcells.LSTM(4, 5, 2, proj_size=2, bidirectional=True), seqcells.backend("reference")
    x, masks = masked_inputs(kind.split()[0])
    if kind == "packed resets":
        masks = masked_inputs("resets")[1]
    with torch.set_grad_enabled(grad):
        found, _ = module(x, **masks)
        with plain:
            expected, _ = module(x, **masks)
    if kind.startswith("packed"):
        found, expected = found.data, expected.data
    torch.testing.assert_close(found, expected)
    if "resets" in kind:
        with pytest.raises(RuntimeError, match="no resets"), seqcells.backend("aten"):
            module(x, **masks)


@pytest.mark.parametrize("proj_size, backend", [(0, None), (0, "aten"), (2, None)])
def test_sequences_of_no_steps_at_all(proj_size, backend):
    module = seqcells.LSTM(4, 5, proj_size=proj_size, backend=backend)
    hx = (torch.randn(1, 3, proj_size or 5), torch.randn(1, 3, 5))
    y, final = module(torch.randn(6, 3, 4), hx, lengths=[0, 0, 0])
    assert not y.any()
    torch.testing.assert_close(final, hx)
    y, (h, _) = module(torch.randn(6, 3, 4), hx, lengths=[6, 0, 2])
    assert not y[:, 1].any() and torch.equal(h[:, 1], hx[0][:, 1])


def test_padding_is_left_to_the_loop_and_so_is_what_must_keep_little():
    """A batch that is mostly padding, and save="states", are not for reset steps, which save 16 T B H."""

    def chosen(lengths, **options):
        asked = dispatch.ScanOptions(lengths=torch.tensor(lengths), **options)
        return dispatch.choose(dispatch.case_of(named("lstm"), torch.zeros(8, 4, 3), (False, True), asked, 5)).engine

    assert chosen([8, 8, 1, 1]) == "aten" and chosen([8, 3, 1, 1]) == "loop"
    assert chosen([8, 8, 8, 8], save="states") == "loop"


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_half_precision_sums_weight_gradients_of_many_pieces(cell, monkeypatch):
    """In float32: in bfloat16 the sum of many pieces loses what is small beside it."""
    monkeypatch.setattr(steps, "CHUNK", 64)
    torch.manual_seed(0)
    G = named(cell).rows[1]
    x, weights = torch.randn(1000, 32, 4), [torch.randn(G * 16, n) / 4 for n in (4, 16)] + [torch.zeros(G * 16)] * 2
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [w.bfloat16().to(dtype).requires_grad_() for w in weights]
        y, _ = functional.scan(cell, x.bfloat16().to(dtype), None, *leaves, backend="loop")
        found.append(torch.autograd.grad(y.sum(), leaves))
    for a, b in zip(*found, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 0.02


def test_an_undefined_gradient_of_a_final_state_stays_where_it_is():
    module = seqcells.GRU(3, 4, backend="loop")
    h0, resets = torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(6, 2, dtype=torch.bool)
    resets[3] = True
    _, h = module(torch.randn(6, 2, 3), h0, resets=resets)
    (found,) = torch.autograd.grad(h, h0, torch.full_like(h, torch.nan))
    assert torch.equal(found, torch.zeros_like(found))


def test_a_wrapper_of_tensors_as_a_state_or_weight_is_not_unwrapped():
    module, x = seqcells.GRU(3, 4), torch.randn(30, 2, 3)
    zero = torch.zeros(1, 2, 4)
    y, _ = module(x, TwoTensor(zero, zero))
    assert type(y) is TwoTensor
    torch.testing.assert_close(y.a, module(x)[0])
    for name, weight in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(TwoTensor(weight.detach().clone(), weight.detach().clone())))
    assert type(module(x)[0]) is TwoTensor

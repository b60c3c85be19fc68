"""One step in one launch: what it returns, what it saves, which memory it touches, and when it is chosen."""

from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS, arguments
from test_kernels import Guards

from seqcells import reference, testing
from seqcells.cell import named
from seqcells.kernels import cells, scan, single
from seqcells.kernels.devices import INTERPRETER, KNOWN
from seqcells.kernels.plan import PRECISIONS, plan
from seqcells.kernels.plan_single import plan_single, shared_bytes, slots, unfit
from seqcells.testing import TOLERANCE, Shape

NAMES = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
# One unit; rows of W and U aligned alike and not, and more than one program either way; several turns of the loop.
SHAPES = [Shape(1, 1, 1, 1), Shape(1, 3, 5, 20), Shape(1, 17, 40, 20), Shape(1, 3, 40, 70)]


def step_of(name, shape, dtype, *, biases=True, states=True):
    """The cell, x [B, I], the weights and biases, and h0, c0 (None where it has none or none are wanted)."""
    x, w_ih, w_hh, b_ih, b_hh, *given = testing.inputs(name, shape, dtype, DEVICE)
    h0, c0 = [*given, None][:2] if states else (None, None)
    return cells.get(name), [x[0], w_ih, w_hh, *((b_ih, b_hh) if biases else (None, None)), h0, c0]


def planned(cell, x, w_hh, precision="ieee"):
    size = {"B": x.shape[0], "I": x.shape[1], "H": w_hh.shape[1], "itemsize": x.element_size()}
    return plan_single(cell, **size, device=scan.device_facts(x.device), precision=precision)


def step(cell, tensors, save="gates", launch=scan.run, **options):
    chosen = planned(cell, tensors[0], tensors[2], options.get("precision", "ieee"))
    return single.forward(cell, *tensors, save=save, plan=chosen, launch=launch, **options)


def gradients(cell, tensors, out, dhn, dcn):
    """dx, dw_ih, dw_hh, db_ih, db_hh, dh0[, dc0], by the scan's backward from what the step saved."""
    x, w_ih, w_hh = tensors[:3]
    B, H, device = x.shape[0], w_hh.shape[1], scan.device_facts(x.device)
    back = plan(cell, B=B, H=H, itemsize=x.element_size(), device=device, precision="ieee", backward=True)
    state = (w_hh[None], out.y, out.c, out.saved, None)
    dhn, dcn = (None if d is None else d[None] for d in (dhn, dcn))
    found = scan.backward(cell, None, dhn, dcn, *state, plan=back)
    apart = len(cell.apart)
    d, inner = found.dgx.view(B, -1), found.dhu.view(B, apart * H)
    recurrent = torch.cat([d[:, : (cell.gates - apart) * H], inner], 1)
    weights = (d.t() @ x, recurrent.t() @ out.y[0, :, 0], d.sum(0), recurrent.sum(0))
    return [d @ w_ih, *weights, found.dh0[0], *([found.dc0[0]] if cell.states == 2 else [])]


def zeros(*size):
    return torch.zeros(size, dtype=torch.float64, requires_grad=True)


def exact(name, tensors, weights):
    """The states after the step and the gradients of their weighted sum, by the reference in float64 on the CPU."""
    spec = named(name)
    leaves = [None if t is None else t.detach().cpu().double().clone().requires_grad_() for t in tensors]
    x, w_ih, w_hh, *biases, h0, c0 = leaves
    given = [zeros(x.shape[0], w_hh.shape[1]) if s is None else s for s in (h0, c0)][: len(spec.states)]
    wanted = [x, w_ih, w_hh, *(zeros(len(w_hh)) if b is None else b for b in biases)]
    final = reference.step_of(name)(x, tuple(given), w_ih, w_hh, *wanted[3:])
    outer = [w.cpu().double() for w in weights[: len(spec.states)]]
    return [s.detach() for s in final], torch.autograd.grad(final, [*wanted, *given], outer)


def check_step(name, shape, dtype, **options):
    cell, tensors = step_of(name, shape, dtype, **options)
    out = step(cell, tensors)
    assert (out.hn.shape, out.y.shape) == ((shape.B, shape.H), (2, shape.B, 1, shape.H))
    assert torch.equal(out.y[1, :, 0], out.hn)
    before = torch.zeros_like(out.hn)
    assert torch.equal(out.y[0, :, 0], before if tensors[5] is None else tensors[5])
    if cell.states == 2:
        assert torch.equal(out.c[1, :, 0], out.cn)
        assert torch.equal(out.c[0, :, 0], before if tensors[6] is None else tensors[6])
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.hn.shape, generator=generator).to(DEVICE, dtype) for _ in range(2)]
    states, grads = exact(name, tensors, weights)
    allowed = TOLERANCE[dtype]
    for got, wanted in zip((out.hn, out.cn if cell.states == 2 else None), states, strict=False):
        assert testing.relative(got, wanted) <= allowed
    dcn = weights[1] if cell.states == 2 else None
    for got, wanted in zip(gradients(cell, tensors, out, weights[0], dcn), grads, strict=True):
        assert testing.relative(got, wanted) <= allowed
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name, dtype, shape, poison):
    check_step(name, shape, dtype)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("size", [Shape(1, 3, 20, 36), Shape(1, 3, 33, 36)], ids=["one loop", "a loop each"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_every_tile(name, size, rows):
    """Also those that the plan gives to larger shapes only; with as many turns of the loop as there can be."""
    cell, tensors = step_of(name, size, torch.float64)
    tile = {"block_h": rows // slots(cell), "block_b": 16, "block_k": 16 * max(1, 64 // rows)}
    chosen, launches = replace(planned(cell, tensors[0], tensors[2]), **tile), []
    out = single.forward(cell, *tensors, save="gates", plan=chosen, launch=lambda x: (launches.append(x), scan.run(x)))
    assert launches[0].arguments["FUSED"] == (size.I % 2 == 0) and launches[0].arguments["PARTS"] == max(1, 64 // rows)
    for a, b in zip(out, step(cell, tensors), strict=True):
        words = [t.view(torch.float64) if t.dtype == torch.int64 else t for t in (a, b)]
        torch.testing.assert_close(*words, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("biases", "states"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("name", NAMES)
def test_without_biases_and_states(name, biases, states, poison):
    check_step(name, Shape(1, 9, 5, 20), torch.float32, biases=biases, states=states)
    check_step(name, Shape(1, 2, 8, 8), torch.float16, biases=biases, states=states)


@pytest.mark.parametrize("absent", [(3, 6), (4, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_absent_is_zero(name, absent):
    """One bias, and one state of two."""
    cell, given = step_of(name, Shape(1, 3, 2, 5), torch.float64)
    there = [n for n in absent if given[n] is not None]
    full = [torch.zeros_like(t) if n in there else t for n, t in enumerate(given)]
    nones = [None if n in there else t for n, t in enumerate(given)]
    assert all(torch.equal(a, b) for a, b in zip(step(cell, nones), step(cell, full), strict=True))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_without_saving_it_is_one_launch_and_nothing_else(name, given, poison):
    cell, tensors = step_of(name, Shape(1, 3, 5, 20), torch.float32, states=given)
    launches = []
    out = step(cell, tensors, save="none", launch=lambda x: (launches.append(x), scan.run(x)))
    (launch,) = launches
    assert [out.y.numel(), out.c.numel(), out.saved.numel()] == [0, 0, 0]
    # The states are read where they lie; without them U is not read at all.
    assert launch.arguments["h0_ptr"] is tensors[5] and launch.arguments["c0_ptr"] is tensors[6]
    whole = step(cell, tensors, save="gates", launch=lambda x: (launches.append(x), scan.run(x)))
    assert len(launches) == 2 and torch.equal(out.hn, whole.hn) and torch.equal(out.cn, whole.cn)
    unread = [*tensors[:2], torch.full_like(tensors[2], torch.nan), *tensors[3:]]
    assert step(cell, unread, save="none").hn.isnan().all() == given


def test_what_is_saved_is_what_the_scan_saves():
    """In the same buffers, so that all that reads them holds for both."""
    for name in NAMES:
        cell, tensors = step_of(name, Shape(1, 3, 5, 20), torch.float32)
        x, w_ih, w_hh, b_ih, b_hh, h0, c0 = tensors
        plain = (cell.gates - len(cell.apart)) * w_hh.shape[1]
        adds = b_ih + torch.cat([b_hh[:plain], torch.zeros_like(b_hh[plain:])])
        gx = (x @ w_ih.t() + adds)[None, :, None]
        there = plan(cell, B=3, H=20, itemsize=4, device=scan.device_facts(x.device), precision="ieee")
        inner, c0 = b_hh[None, plain:] if cell.apart else None, None if c0 is None else c0[None]
        scanned = scan.forward(cell, gx, w_hh[None], inner, h0[None], c0, None, save="gates", plan=there)
        states = (s[0] if s.numel() else s for s in scanned[3:])  # these alone without the axis of groups
        for a, b in zip(step(cell, tensors), (*scanned[:3], *states), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            words = [t.view(torch.float32) if t.dtype == torch.int64 else t for t in (a, b)]
            torch.testing.assert_close(*words, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("save", single.SAVES)
@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(1, 9, 3, 17)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_buffers_is_read_or_written(name, shape, save, poison):
    cell, tensors = step_of(name, shape, torch.float32)
    guards = Guards()
    bare, guarded = step(cell, tensors, save), step(cell, tensors, save, guards)
    assert guards.launches == 1
    for a, b in zip(bare, guarded, strict=True):
        assert torch.equal(a, b) and not (a.is_floating_point() and a.isnan().any())


def test_rows_that_lie_apart():
    cell, tensors = step_of("lstm", Shape(1, 3, 5, 20), torch.float32)
    apart = [torch.stack([t, t], 1)[:, 0] if t.dim() == 2 else t for t in tensors]
    assert not any(t.is_contiguous() for t in apart if t.dim() == 2)
    assert all(torch.equal(a, b) for a, b in zip(step(cell, tensors), step(cell, apart), strict=True))


def test_a_save_that_does_not_exist_is_refused():
    cell, tensors = step_of("lstm", Shape(1, 1, 1, 1), torch.float32)
    with pytest.raises(ValueError, match="unknown save 'states': expected one of none, gates"):
        step(cell, tensors, save="states")


def test_a_second_product_is_refused():
    size = {"B": 1, "I": 8, "H": 8, "itemsize": 4, "device": KNOWN["sm_90"]}
    assert "second product" in unfit(cells.get("gru_before"), 8, 8)
    with pytest.raises(ValueError, match="does not fit: its second product needs the first gates of every unit"):
        plan_single(cells.get("gru_before"), **size)
    with pytest.raises(ValueError, match="less than 2\\^31 elements"):
        plan_single(cells.get("lstm"), **size | {"I": 1 << 27})
    for kind, reason in [
        ("two operands", "not all with one of the states"),
        ("all at once", "second product"),
        ("eight gates", "at most eight products"),
    ]:
        assert reason in unfit(KINDS[kind].cell, 8, 8)
    assert "per-step inputs" in unfit(KINDS["another state"].cell, 8, 8, inputs=1)
    lstm = cells.get("lstm")
    assert "the same gate" in unfit(replace(lstm, adds=(0, 1, 2, 2)), 8, 8)


@pytest.mark.parametrize("save", single.SAVES)
@pytest.mark.parametrize("kind", ["another state", "no product", "apart first"])
@pytest.mark.parametrize("H", [5, 20])
def test_other_kinds(kind, H, save, poison):
    """They give what a scan over one step gives, of gx with the biases that only add."""
    cell = KINDS[kind].cell
    gx, u, bias, h0, c0, params = arguments(kind, 1, 9, H, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    sizes = [(9, 3), (cell.gates * H, 3), (cell.gates * H,), (cell.products * H,)]
    x, w_ih, b_ih, b_hh = (torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in sizes)
    gx = (x @ w_ih.t() + b_ih)[None, :, None].clone()
    for n, tile in enumerate(cell.adds):
        mine = b_hh[n * H : (n + 1) * H]
        if tile < 0:
            bias[0, cell.apart.index(n) * H :][:H] = mine
        else:
            gx[..., tile * H : (tile + 1) * H] += mine
    size = {"B": 9, "H": H, "itemsize": 8, "device": scan.device_facts(x.device), "precision": "ieee"}
    for h, c in ((h0, c0), (None, c0), (h0, None), (None, None)):
        there = plan(cell, **size)
        wanted = scan.forward(cell, gx, u, bias, h, c, None, save="gates", plan=there, params=params)
        states = [None if s is None else s[0] for s in (h, c)]
        vectors = None if params is None else params[0]
        chosen = plan_single(cell, I=3, **size)
        out = single.forward(cell, x, w_ih, u[0], b_ih, b_hh, *states, save=save, plan=chosen, params=vectors)
        for a, b in zip((out.hn, out.cn), (wanted.hn[0], wanted.cn[0]), strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(out[:3], wanted[:3], strict=True):
            if save == "gates":
                assert a.shape == b.shape
                torch.testing.assert_close(a, b)
            else:
                assert not a.numel()


@given(
    cell=st.sampled_from([cells.get(name) for name in NAMES]),
    B=st.integers(1, 5000),
    I=st.one_of(st.integers(1, 40), st.integers(1, 4000)),
    H=st.one_of(st.integers(1, 300), st.integers(1, 4000)),
    itemsize=st.sampled_from([2, 4, 8]),
    precision=st.sampled_from(PRECISIONS),
    input_precision=st.sampled_from([None, *PRECISIONS]),
    device=st.sampled_from([*KNOWN.values(), INTERPRETER]),
)
def test_a_plan_fits_and_covers(cell, B, I, H, itemsize, precision, input_precision, device):  # noqa: E741
    size = {"B": B, "I": I, "H": H, "itemsize": itemsize, "precision": precision}
    chosen = plan_single(cell, **size, input_precision=input_precision, device=device)
    tile, rows = (chosen.block_h, chosen.block_b, chosen.block_k), chosen.block_h * slots(cell)
    assert all(n & (n - 1) == 0 for n in tile) and rows >= 16 and chosen.block_b >= 8
    assert chosen.block_k >= 16 * max(1, 64 // rows), "a part has the tensor cores' least inner size"
    assert shared_bytes(rows, *tile[1:], itemsize, chosen.num_stages) <= device.shared
    units, batches = -(-H // chosen.block_h), -(-B // chosen.block_b)
    assert chosen.programs == units * batches
    assert (batches - 1) * chosen.block_b < B <= batches * chosen.block_b
    assert chosen.cheaper == (chosen.microseconds < chosen.elsewhere)
    assert "us a step" in chosen.why and ("cheaper" if chosen.cheaper else "dearer") in chosen.why


def cheaper(B, H, name="lstm", itemsize=2, device="H100", I=None, **options):  # noqa: E741
    size = {"B": B, "I": I or H, "H": H, "itemsize": itemsize, "device": KNOWN[device]}
    return plan_single(cells.get(name), **size, **options).cheaper


def test_when_one_launch_is_cheaper():
    for name in NAMES:
        for device in KNOWN:
            for H in (16, 64, 256, 512, 1024):
                assert cheaper(1, H, name, device=device) and cheaper(8, H, name, device=device)
    assert all(cheaper(B, 64) for B in (16, 256, 1024)), "launches are all it costs"
    assert cheaper(64, 1024) and not cheaper(1024, 1024), "of many rows the GEMM's products are faster"
    assert not cheaper(256, 1024, itemsize=4, precision="ieee")
    assert cheaper(64, 256, itemsize=4, input_precision="ieee")


def test_batches_share_a_few_tile_sizes():
    for H in (64, 1024):
        size = {"I": H, "H": H, "itemsize": 2, "device": KNOWN["H100"]}
        plans = [plan_single(cells.get("lstm"), B=B, **size) for B in range(1, 1500)]
        assert len({(p.block_h, p.block_b, p.block_k, p.num_warps, p.num_stages) for p in plans}) <= 8

"""What a kernel must not do, and the functions it is made of."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from shapes import CELLS, SCHEDULES, spread

from seqcells import functional, reference, testing
from seqcells.kernels import buffers, cells, scan
from seqcells.kernels.layout import in_layout_of
from seqcells.kernels.math import operand, sigmoid, tanh
from seqcells.kernels.plan import plan
from seqcells.testing import Shape

GUARD = 4096  # bytes on either side of a buffer


class Guards:
    """A launcher that gives every buffer a guard band of NaN on both sides, and looks whether it is still there."""

    def __init__(self):
        self.launches = 0

    def __call__(self, launch):
        self.launches += 1
        inside, whole = {}, {}
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor):
                pad = GUARD // value.element_size()
                whole[name] = torch.full((value.numel() + 2 * pad,), self.fill(value), dtype=value.dtype, device=DEVICE)
                inside[name] = whole[name][pad : pad + value.numel()].view(value.shape)
                inside[name].copy_(value)
        scan.run(launch._replace(arguments={**launch.arguments, **inside}))
        for name, value in inside.items():
            pad = GUARD // value.element_size()
            for band in (whole[name][:pad], whole[name][pad + value.numel() :]):
                intact = band.isnan() if value.is_floating_point() else band == self.fill(value)
                assert intact.all(), f"{launch.kernel.fn.__name__} wrote outside {name}"
            launch.arguments[name].copy_(value)

    @staticmethod
    def fill(value):
        return torch.nan if value.is_floating_point() else 77


def scan_arguments(cell, shape, dtype=torch.float32, groups=1):
    """The cell, and gx, u, bias, h0, c0, resets of `scan.forward`: the same scan in every group."""
    declared = cells.get(cell)
    x, w_ih, w_hh, _, b_hh, *states = testing.inputs(cell, shape, dtype, DEVICE)
    h0, c0 = states if len(states) == 2 else (states[0], None)
    inner = b_hh[-len(declared.apart) * shape.H :] if declared.apart else None
    resets = torch.rand(shape.T, shape.B, generator=torch.Generator().manual_seed(0)) < 0.3
    gx = torch.stack([x @ w_ih.t()] * groups, 2)
    u, inner, h0, c0 = (None if t is None else torch.stack([t] * groups) for t in (w_hh, inner, h0, c0))
    return declared, (gx, u, inner, h0, c0, resets.to(DEVICE))


@pytest.mark.parametrize(
    ("cell", "schedule", "how"),
    spread(
        CELLS,
        SCHEDULES,
        [
            (save, *shape)
            for save in ("gates", "states", "none")
            for shape in ((Shape(3, 1, 2, 1), 0), (Shape(2, 17, 2, 33), 0), (Shape(3, 9, 1, 16), 2))
        ],
        most=2,
    ),
    ids=str,
)
def test_nothing_outside_the_buffers_is_read_or_written(cell, schedule, how, poison):
    save, shape, reversed = how
    declared, (gx, *rest) = scan_arguments(cell, shape, groups=2 if reversed else 1)
    size = {"B": shape.B, "H": shape.H, "itemsize": 4, "device": scan.device_facts(gx.device)}
    there, back = (plan(declared, **size, schedule=schedule, backward=b) for b in (False, True))
    results = []
    for launch in (scan.run, Guards()):
        out = scan.forward(declared, gx, *rest, save=save, plan=there, reversed=reversed, launch=launch)
        found = [buffers.outputs(out.y, reversed), out.hn, out.cn]  # beside them are rows that no group starts from
        if save != "none":
            u, bias, _, _, resets = rest
            saved = out.saved
            if save == "states":
                saved = scan.recompute(
                    declared, gx, u, bias, out.y, out.c, resets, plan=there, reversed=reversed, launch=launch
                )
            dy = torch.ones_like(buffers.outputs(out.y, reversed))
            dcn = out.cn if declared.states == 2 else None
            state = (u, out.y, out.c, saved, resets)
            found += scan.backward(declared, dy, out.hn, dcn, *state, plan=back, reversed=reversed, launch=launch)
        results.append(found)
        if isinstance(launch, Guards):
            assert launch.launches > 0
    for bare, guarded in zip(*results, strict=True):
        assert not bare.isnan().any()
        assert torch.equal(bare, guarded)


def test_the_guards_see_a_write_outside():
    @triton.jit
    def careless(y_ptr, n):
        tl.store(y_ptr + n, 1.0)

    y = torch.zeros(4, device=DEVICE)
    chosen = plan(cells.get("rnn_tanh"), B=1, H=1, itemsize=4, device=scan.device_facts(y.device))
    with pytest.raises(AssertionError, match="wrote outside y_ptr"):
        Guards()(scan.Launch(careless, (1,), {"y_ptr": y, "n": 4}, chosen))


@triton.jit
def _pointwise(x_ptr, tanh_ptr, sigmoid_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(tanh_ptr + i, tanh(x, False))
    tl.store(sigmoid_ptr + i, sigmoid(x, False))


def activations(x):
    assert x.numel() == 1024
    t, s = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    _pointwise[(1,)](x, t, s, N=1024)
    return t, s


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_are_exact(dtype):
    ends = [100.0, -100.0, 1e4, -1e4, 0.0, 1e-30, -1e-8, 0.25, -0.25, 0.2500001, 44.0, -44.0, -45.0, 89.0, -89.0]
    x = torch.cat([torch.tensor(ends), torch.linspace(-10, 10, 1024 - len(ends))]).to(DEVICE, dtype)
    t, s = activations(x)
    assert t.isfinite().all() and s.isfinite().all()
    assert t[:4].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert s[0] == 1 and s[2] == 1 and s[3] == 0 and 0 <= s[1] < 1e-43
    # On a device float32's exp is ex2.approx of a rounded product, and the division is not IEEE's.
    eps = torch.finfo(dtype).eps * (4 if DEVICE == "cuda" else 1)
    exact_t, exact_s = x.double().tanh(), x.double().sigmoid()
    assert ((t.double() - exact_t).abs() <= 4 * eps * exact_t.abs()).all(), "tanh, relative, small arguments included"
    growth = 1 + x.double().abs() if DEVICE == "cuda" else 1  # of the rounded product's error, in exp
    assert ((s.double() - exact_s).abs() <= 8 * eps * exact_s * growth + 1e-37).all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_large_inputs_give_no_nan(cell, schedule):
    shape = Shape(3, 2, 1, 3)
    x, w_ih, w_hh, b_ih, b_hh, *states = testing.inputs(cell, shape, torch.float32, DEVICE)
    w_ih = torch.ones_like(w_ih).requires_grad_()
    x = torch.full_like(x, 1e4)
    x[1] = -1e4
    y, final = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, backend=f"triton:{schedule}")
    y.sum().backward()
    assert all(t.isfinite().all() for t in (y, *final, w_ih.grad))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_split_sequence_is_the_whole(cell, schedule):
    x, w_ih, w_hh, b_ih, b_hh, *states = testing.inputs(cell, Shape(5, 3, 2, 20), torch.float64, DEVICE)
    weights, options = (w_ih, w_hh, b_ih, b_hh), {"backend": f"triton:{schedule}"}
    y, final = functional.scan(cell, x, states, *weights, **options)
    first, between = functional.scan(cell, x[:2], states, *weights, **options)
    second, end = functional.scan(cell, x[2:], between, *weights, **options)
    # The products of a longer gx may be summed in another order: the last bit is not fixed.
    torch.testing.assert_close((torch.cat([first, second]), *end), (y, *final), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("cell", "schedule", "save"), spread(CELLS, SCHEDULES, ["gates", "states"], most=1))
def test_two_backward_calls_and_two_runs_give_the_same_bits(cell, schedule, save):
    tensors = [t.requires_grad_() for t in testing.inputs(cell, Shape(4, 9, 2, 20), torch.float32, DEVICE)]
    x, w_ih, w_hh, b_ih, b_hh, *states = tensors
    found = []
    for _ in range(2):
        y, _ = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, save=save, backend=f"triton:{schedule}")
        loss = y.square().sum()
        found.append(torch.autograd.grad(loss, tensors, retain_graph=True))
        found.append(torch.autograd.grad(loss, tensors))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_an_output_changed_in_place_is_refused_in_backward():
    tensors = [t.requires_grad_() for t in testing.inputs("lstm", Shape(3, 2, 2, 4), torch.float32, DEVICE)]
    x, w_ih, w_hh, b_ih, b_hh, _, _ = tensors
    y, _ = functional.lstm(x, None, w_ih, w_hh, b_ih, b_hh, backend="triton")
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_memory_kept_for_backward(cell):
    """gates: at most (G+2) T B H elements beside the inputs; states: at most 2 T B H; no grad: nothing."""
    T, B, H = 12, 5, 16
    tensors = [t.requires_grad_() for t in testing.inputs(cell, Shape(T, B, 2, H), torch.float32, DEVICE)]
    x, w_ih, w_hh, b_ih, b_hh, *states = tensors
    inputs = {t.untyped_storage().data_ptr() for t in tensors}
    gates = cells.get(cell).gates
    for save, most in (("gates", gates + 2), ("states", 2)):
        kept = {}

        def pack(t, kept=kept):
            storage = t.untyped_storage()
            if storage.data_ptr() not in inputs:
                kept[storage.data_ptr()] = storage.nbytes() // 4
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, save=save, backend="triton")
        assert sum(kept.values()) <= most * (T + 1) * B * H
    with torch.no_grad():
        y, _ = functional.scan(cell, x, states, w_ih, w_hh, b_ih, b_hh, backend="triton")
    assert not y.requires_grad


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_step_beyond_two_to_the_31_elements(direction):
    """The buffers are large enough that a 32-bit offset to the last step would wrap; only pages used there exist."""
    declared, (gx, u, bias, h0, c0, _) = scan_arguments("rnn_relu", Shape(2, 2, 2, 16))
    size = {"B": 2, "H": 16, "itemsize": 4, "device": scan.device_facts(gx.device), "schedule": "stepwise"}
    chosen = plan(declared, **size, backward=direction == "backward")
    launches = []
    out = scan.forward(declared, gx, u, bias, h0, c0, None, save="gates", plan=chosen, launch=launches.append)
    if direction == "backward":
        launches.clear()
        state = (u, out.y, out.c, out.saved, None)
        scan.backward(declared, gx, None, None, *state, plan=chosen, launch=launches.append)
    (launch,) = (x for x in launches if x.arguments["t"] == 1)

    T = (1 << 26) + 2  # 2 rows of 16 units: 2^31 elements before the last step

    def placed(name):
        """A buffer of T steps whose last ones are the small buffer's."""
        small = launch.arguments[name]
        steps = T - 2 + small.shape[0]
        big = small.new_empty(0).set_(torch.UntypedStorage(steps * 32 * 4, device=DEVICE), 0, (steps, 2, 1, 16))
        big[-small.shape[0] :] = small
        return big

    names = ["gx_ptr", "y_ptr"] if direction == "forward" else ["dy_ptr", "y_ptr", "dgx_ptr"]
    if direction == "forward":
        launch.arguments["y_ptr"].normal_()
    large = {name: placed(name) for name in names}
    scratch = {n: launch.arguments[n].fill_(0.5) for n in ("sh_ptr", "dsh_ptr") if n in launch.arguments}
    scratch = {n: t.clone() for n, t in scratch.items()}
    scan.run(launch)
    scan.run(launch._replace(arguments={**launch.arguments, **large, **scratch, "t": T - 1, "T": T}))
    written = "y_ptr" if direction == "forward" else "dgx_ptr"
    assert torch.equal(large[written][-1], launch.arguments[written][-1])


def to_tf32(x):
    """x rounded to TF32's 11 bits, to nearest."""
    bits = x.detach().to(torch.float32).view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32).to(x.dtype)


class RoundedProduct(torch.autograd.Function):
    """h @ u^T with both operands rounded to TF32, and so the gradient of h; that of u is one GEMM elsewhere."""

    @staticmethod
    def forward(ctx, h, u):
        ctx.save_for_backward(h, u)
        return to_tf32(h) @ to_tf32(u).t()

    @staticmethod
    def backward(ctx, d):
        h, u = ctx.saved_tensors
        return to_tf32(d) @ to_tf32(u), d.t() @ h


@pytest.mark.parametrize(("cell", "schedule", "H"), spread(CELLS, SCHEDULES, [1, 2, 20, 33], most=1))
def test_tf32_operands_are_rounded_to_nearest(cell, schedule, H, monkeypatch):
    """Not cut off, as the tensor cores do by themselves, nor left alone, as the interpreter would."""
    shape = Shape(4, 3, 3 if H == 2 else 2, H)
    tensors = testing.inputs(cell, shape, torch.float32, DEVICE)
    got = testing.run(cell, tensors, None, backend=f"triton:{schedule}", precision="tf32")
    tensors = [t.cpu().double() for t in tensors]
    exact = testing.run(cell, tensors, None, backend="reference")
    plain = reference.linear

    def linear(v, weight, bias=None):
        if weight.shape[1] != H:
            return plain(v, weight, bias)
        return RoundedProduct.apply(v, weight) + (0 if bias is None else bias)

    monkeypatch.setattr(reference, "linear", linear)
    rounded = testing.run(cell, tensors, None, backend="reference")
    allowed = max(testing.relative(rounded[n], exact[n]) for n in exact)
    found = max(testing.relative(got[n], exact[n]) for n in exact)
    assert found <= 1.1 * allowed + testing.TOLERANCE[torch.float32]
    assert found <= testing.tolerance(cell, "tf32", shape)
    # A state a little off may be rounded the other way; not many are.
    assert max(testing.relative(got[n], rounded[n]) for n in exact) <= 0.3 * allowed + testing.TOLERANCE[torch.float32]


def test_numbers_do_not_depend_on_the_tile_whose_layout_they_take():
    @triton.jit
    def numbers(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, in_layout_of(tl.load(x_ptr + i), i))

    x = torch.tensor([0.0, -3.5, 1e9, torch.inf, -torch.inf, torch.nan, 1.0, 7.0], device=DEVICE)
    y = torch.empty(8, dtype=torch.int32, device=DEVICE)
    numbers[(1,)](x, y, N=8)
    assert y.tolist() == list(range(8))


def test_rounding_to_tf32_is_ptxs():
    @triton.jit
    def rounding(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, operand(tl.load(x_ptr + i), tl.float32, "tf32"))

    inf, ulp = torch.inf, 2.0**-10
    values = [0.0, 1e-45, 1 + ulp / 2, -1 - ulp / 2, 1 + 0.49 * ulp, 1.5 * ulp, 3.4028234e38, -3.4028234e38, inf, -inf]
    expected = [0.0, 0.0, 1 + ulp, -1 - ulp, 1.0, 1.5 * ulp, inf, -inf, inf, -inf]
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, -0x400000, 0x7F800001, -0x1000], dtype=torch.int32)
    x = torch.cat([torch.tensor(values), nans.view(torch.float32)]).to(DEVICE)

    def rounded(x):
        y = torch.empty_like(x)
        rounding[(1,)](x, y, N=16)
        return (y.view(torch.int32) & -0x2000).view(torch.float32)  # what the tensor cores take

    y = rounded(x)
    assert torch.equal(y[:10].cpu().view(torch.int32), torch.tensor(expected).view(torch.int32))
    assert y[10:].isnan().all()
    z = torch.randn(16, device=DEVICE)
    assert torch.equal(rounded(z), to_tf32(z))

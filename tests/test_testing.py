"""seqcells.testing.check and `python -m seqcells check --cell`: correct cells pass, wrong ones fail."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import DEVICE
from shapes import SCHEDULES, spread

import seqcells
from seqcells import cells, testing
from seqcells.kernels import cells as kernels
from seqcells.tasks import cli

GALLERY = [name for name in cells.__all__ if name not in ("lstm", "gru", "gru_before", "rnn_tanh", "rnn_relu")]
BACKENDS = [*(f"triton:{schedule}" for schedule in SCHEDULES), "loop"]
DTYPES = ["float64", "float32", "float16", "bfloat16"]


# The kernels in float64, with their second derivatives, and by grid take long here. Both are in test_any_cell, smaller.
HOW = list(product(BACKENDS, reversed(DTYPES)))
LONG = [how for how in HOW if how[0] == "triton:grid" or (how[0] != "loop" and how[1] == "float64")]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *spread(GALLERY, [how for how in HOW if how not in LONG], most=1),
        *(pytest.param(name, how, marks=pytest.mark.slow) for name, how in product(GALLERY, LONG)),
    ],
    ids=str,
)
def test_the_gallery(name, how):
    """At two shapes, of which one takes three programs a tile and two tiles in the grid schedule."""
    cell = getattr(cells, name)
    results = testing.check(cell, device=DEVICE, backends=[how[0]], dtypes=[how[1]])
    assert len(results) == 1 and results[0].errors and not results[0].missing


@pytest.mark.parametrize("name", GALLERY)
def test_a_definition_is_short_and_cited(name):
    text = Path(cells.__file__).with_name(f"{name}.py").read_text()
    assert len(text.splitlines()) <= 20
    assert any(f" {year}" in text for year in range(1990, 2030)), "the paper"


@pytest.mark.parametrize("backend", BACKENDS)
def test_slstm_is_stable_far_out(backend):
    """Gate inputs of +-30: finite, forward and backward, and as in float64."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(20, 3, 4, generator=generator, dtype=torch.float64).sign()
    exact, layer = (
        seqcells.Recurrent(cells.slstm, 4, 5, dtype=d, device=DEVICE) for d in (torch.float64, torch.float32)
    )
    with torch.no_grad():
        for a, b in zip(exact.parameters(), layer.parameters(), strict=True):
            a.copy_(torch.randn(a.shape, generator=generator, dtype=torch.float64))
            b.copy_(a)
    x = 15 * signs.to(DEVICE)
    with seqcells.backend("reference"):
        expected, _ = exact(x)
    with seqcells.backend(backend):
        y, _ = layer(x.float())
    y.sum().backward()
    assert (exact.weight_ih_l0.detach() @ x[0, 0]).abs().max() > 30
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert testing.relative(y.detach(), expected.detach()) < 1e-4


@pytest.mark.parametrize("backend", ["loop", pytest.param("triton:resident", marks=pytest.mark.slow)])
def test_slstm_over_two_thousand_steps(backend):
    """Gate inputs of up to +-60, against the paper's formula in float64, with exponentials that would overflow."""
    T, B, H = 2000, 2, 4
    generator = torch.Generator().manual_seed(0)
    layer = seqcells.Recurrent("slstm", 4 * H, H, backend=backend, device=DEVICE)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(4 * H))
    x = (120 * torch.rand(T, B, 4 * H, generator=generator) - 60).to(DEVICE)
    exact = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    h = c = n = m = torch.zeros(B, H, dtype=torch.float64, device=DEVICE)
    outputs = []
    for t in range(T):
        gates = x[t].double() @ exact["weight_ih_l0"].T + exact["bias_ih_l0"] + exact["bias_hh_l0"]
        i, f, z, o = (gates + h @ exact["weight_hh_l0"].T).chunk(4, 1)
        f = torch.nn.functional.logsigmoid(f) + m
        m = torch.maximum(f, i) if t else i
        c, n = torch.exp(f - m) * c + torch.exp(i - m) * torch.tanh(z), torch.exp(f - m) * n + torch.exp(i - m)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    expected = torch.stack(outputs)
    y, _ = layer(x)
    assert testing.relative(y.detach(), expected.detach()) < testing.TOLERANCE[torch.float32]
    weights = torch.randn(T, B, H, generator=generator).to(DEVICE)
    ours = torch.autograd.grad((y * weights).sum(), list(layer.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(exact.values()))
    allowed = testing.tolerance("slstm", torch.float32, testing.Shape(100, B, 4 * H, H))  # of a part of the steps
    for a, b in zip(ours, theirs, strict=True):
        assert testing.relative(a, b) < allowed


@pytest.mark.parametrize(
    "backend",
    ["loop", *(pytest.param(f"triton:{s}", marks=pytest.mark.slow) for s in ("resident", "grid", "stepwise"))],
)
def test_slstm_s_states_are_float32_in_bfloat16(backend):
    """With open gates y is the mean of tanh(z) so far. n counts the steps: in bfloat16 it would stop at 256."""
    T, B, H = 400, 1, 2
    layer = seqcells.Recurrent("slstm", 4 * H, H, bias=False, backend=backend, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(4 * H))
        layer.weight_hh_l0.zero_()
    x = torch.randn(T, B, 4 * H, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    x[..., :H], x[..., H : 2 * H], x[..., 3 * H :] = 0, 40, 40
    x.requires_grad_()
    y, _ = layer(x)
    z = x.detach()[..., 2 * H : 3 * H].double()
    means = torch.tanh(z).cumsum(0) / torch.arange(1, T + 1, device=DEVICE)[:, None, None]
    assert testing.relative(y.detach()[-100:], means[-100:]) < testing.TOLERANCE[torch.bfloat16]
    y[-1].sum().backward()
    slopes = (1 - torch.tanh(z) ** 2) / T
    assert testing.relative(x.grad[..., 2 * H : 3 * H], slopes) < testing.TOLERANCE[torch.bfloat16]


@seqcells.cell(gates="n", states="h")
def elman(x, U, h):
    return torch.tanh(x.n + U.n(h))


@pytest.fixture
def overridden():
    """Puts kernels of another cell in the place of elman's."""
    derived = kernels.get(elman.key)
    yield lambda other: kernels.register(replace(kernels.get(other), name=elman.key))
    kernels.register(derived)


def test_kernels_written_by_hand_are_judged_by_the_same_check(overridden):
    how = {"device": DEVICE, "backends": ["triton:resident"], "dtypes": ["float32"]}
    overridden("rnn_tanh")
    testing.check(elman, **how)
    overridden("rnn_relu")
    with pytest.raises(AssertionError, match=r"1 of 1 are not within tolerance(.|\n)*WRONG"):
        testing.check(elman, **how)


def test_a_wrong_derivative_is_found(overridden):
    """Not by its size, which a tolerance may allow, but by gradcheck."""
    overridden("rnn_relu")
    with pytest.raises(AssertionError, match=r"elman, triton:resident: (.|\n)*Jacobian"):
        testing.derivatives(elman, DEVICE, ["triton:resident"])


def test_a_schedule_that_does_not_exist_says_why():
    (found,) = testing.sweep(DEVICE, ["lstm"], ["float64"], ["triton:resident"])
    assert found.good and not found.missing
    shapes = (testing.Shape(2, 2, 2, 600),)
    missing = testing._worst("lstm", "triton:resident", torch.float64, DEVICE, shapes)
    assert not missing.errors and "does not fit" in missing.missing and missing.missing in testing.table([missing])


def test_what_cannot_be_derived_is_refused():
    @seqcells.cell(gates="n", states="h")
    def sorts(x, U, h):
        return torch.sort(x.n + U.n(h)).values

    with pytest.raises(seqcells.CellError, match="sort"):
        testing.check(sorts, device=DEVICE)


def test_memory_is_poisoned_and_what_was_set_comes_back():
    before = torch.are_deterministic_algorithms_enabled()
    with testing.poisoned():
        assert torch.empty(100).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


STEP = '@seqcells.cell(gates="n", states="h")\ndef mine(x, U, h):\n    return torch.tanh(x.n + U.n(h))\n'


def test_the_command_takes_a_cell_of_a_file(tmp_path, monkeypatch, capsys):
    """And of a module; in this process, where kernels are interpreted already."""
    (tmp_path / "some_cells.py").write_text("import torch\nimport seqcells\n\n" + STEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(testing, "SMALL", (testing.Shape(2, 3, 2, 5),))
    assert cli._found("some_cells:mine").name == "mine"
    code = cli.main(["check", "--device", DEVICE, "--dtype", "float64", "--cell", "some_cells.py:mine"])
    shown = capsys.readouterr().out
    assert code == 0 and "4 of 4 within tolerance" in shown and "gradcheck and gradgradcheck pass" in shown


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("empty.py:mine", "there is no cell 'mine' in empty.py"),
        ("nothing", "unknown cell 'nothing': expected one of agru"),
        ("empty.py", "or one of your own, as FILE.py:NAME"),
        ("no_such:mine", "no_such"),
    ],
)
def test_the_command_says_what_there_is_not(where, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "--device", DEVICE, "--cell", where]) != 0
    out, err = capsys.readouterr()
    assert said in err and not out  # not the head of a table


def test_dtypes_are_dtypes_or_their_names():
    assert testing.kinds("cpu", [torch.float32, "float64"]) == testing.kinds("cpu", ["float64", "float32"])
    for wrong in (torch.float32, "float32", [32]):
        with pytest.raises(TypeError, match="a list of dtypes or their names, as 'float32'"):
            testing.kinds("cpu", wrong)


def test_all_that_a_backend_gets_is_on_the_device(monkeypatch):
    """Lengths, too: functional.scan refuses those of another device."""
    devices = []

    def run(cell, tensors, resets=None, *, lengths=None, backend, **options):
        devices.extend(t.device.type for t in (*tensors, resets, lengths) if backend != "reference")
        return {}

    monkeypatch.setattr(testing, "run", run)
    shape = testing.Shape(3, 2, 2, 4)
    with pytest.raises(NotImplementedError):  # of the reference's inputs, which would have values
        testing.errors("lstm", shape, torch.float32, "meta", backend="loop", resets=True, lengths=True)
    assert len(devices) == 9 and set(devices) == {"meta"}

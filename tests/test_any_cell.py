"""Cells of every kind through `functional`: each engine against the reference, the reference against plain steps."""

from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from steps import NAMES, registries  # noqa: F401  (a fixture)
from walk import drawn as drawn_step

import seqcells
from seqcells import dispatch, functional
from seqcells.testing import TOLERANCE, relative

T, B, I, H = 4, 3, 2, 5  # noqa: E741
ENGINES = ["loop", "triton:resident", "triton:grid", "triton:stepwise"]


def drawn(cell, groups=(), heads=False, seed=0):
    """x, states, the four weights, params and inputs of a scan in float64."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=0.5):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE).requires_grad_()

    of_x, of_u, *biases = cell.rows
    weights = [leaf(*groups, n * H, size) if n else None for n, size in ((of_x, I), (of_u, H))]
    weights += [leaf(*groups, n * H) if n else None for n in biases]
    params = {name: leaf(*groups, 1 if name in cell.scalars else H) for name in cell.params}
    inputs = {name: leaf(T, B, *((H,) if n % 2 else ())) for n, name in enumerate(cell.inputs)}
    states = tuple(leaf(*groups, B, H) for _ in cell.states)
    return leaf(T, B, *groups[: int(heads)], I, scale=1.0), states, weights, params, inputs


def leaves(given):
    x, states, weights, params, inputs = given
    return [t for t in (x, *states, *weights, *params.values(), *inputs.values()) if t is not None]


def answer(cell, given, scan=functional.scan, **how):
    """Outputs, and the gradients of all outputs weighted at random."""
    x, states, weights, params, inputs = given
    how |= {"params": params or None, "inputs": inputs or None, "return_states": True}
    y, final, every = scan(cell, x, states, *weights, **how)
    outputs = [y, *final, *every]
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves(given), outer, materialize_grads=True)]


def masks(kind):
    lengths = torch.tensor([T, 2, 1], device=DEVICE)
    resets = torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool, device=DEVICE)
    return {"": {}, "resets": {"resets": resets}, "both": {"resets": resets, "lengths": lengths}}[kind]


def close(found, expected):
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_step(name, registered):
    """Written out without anything of ours but the cell."""
    cell = registered[name]
    given = x, states, (w_ih, w_hh, b_ih, b_hh), params, inputs = drawn(cell)
    wide = [t if t.dim() == 3 else t[..., None].expand(T, B, H) for t in inputs.values()]
    vectors = [p.expand(H) for p in params.values()]
    now, outputs, every = states, [], []

    def by_gate(gates, weight, bias):
        biases, found = iter(() if bias is None else bias.chunk(len(bias) // H)), {}
        for n, gate in enumerate(gates):
            found[gate] = (weight[n * H : (n + 1) * H], next(biases) if gate in cell.biased else 0)
        return found

    for t in range(T):
        gates = {g: x[t] @ w.t() + b for g, (w, b) in by_gate(cell.x_gates, w_ih, b_ih).items()}
        products = {g: lambda v, w=w, b=b: v @ w.t() + b for g, (w, b) in by_gate(cell.u_gates, w_hh, b_hh).items()}
        now = cell(SimpleNamespace(**gates), SimpleNamespace(**products), *now, *vectors, *(a[t] for a in wide))
        now = [s.expand(B, H) for s in (now if isinstance(now, tuple) else (now,))]
        outputs.append(now[-1] if cell.outputs else now[0])
        now = now[: len(states)]
        every.append(now)
    expected = [torch.stack(outputs), *now, *(torch.stack(s) for s in zip(*every, strict=True))]
    generator = torch.Generator().manual_seed(1)
    outer = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in expected]
    expected += torch.autograd.grad(expected, leaves(given), outer, materialize_grads=True)
    close(answer(cell, given, backend="reference"), expected)


@pytest.mark.parametrize("kind", ["", "both"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_engines(name, engine, kind, registered):
    cell = registered[name]
    given = drawn(cell)
    save = "states" if kind else "gates"
    close(
        answer(cell, given, backend=engine, save=save, **masks(kind)),
        answer(cell, given, backend="reference", **masks(kind)),
    )


@pytest.mark.parametrize("kind", ["", "both"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", ["nobody", "with_output", "indrnn", "gru_d", "lem"])
def test_groups(name, heads, kind, registered):
    """Two, of which one is reversed, by the loop and the kernels."""
    cell = registered[name]
    given = drawn(cell, (2,), heads)
    how = {"scan": functional.scan_groups, "reverse": (False, True), **masks(kind)}
    expected = answer(cell, given, backend="reference", **how)
    for backend in ("loop", "triton"):
        close(answer(cell, given, backend=backend, **how), expected)


FEW = ["nobody", "with_output", "indrnn", "mut3"]
# The largest cells take long where kernels are interpreted.
_LONG = {("nobody", "triton"), ("mut3", "triton")}
BOTH = [
    pytest.param(name, engine, marks=[pytest.mark.slow] * ((name, engine) in _LONG))
    for name in FEW
    for engine in ("loop", "triton")
]


def scanned(cell, given, backend):
    """A function of the leaves, and they."""
    _, states, weights, params, inputs = given

    def run(*tensors):
        rest = iter(tensors)
        x, now = next(rest), tuple(next(rest) for _ in states)
        own = [None if w is None else next(rest) for w in weights]
        more = {"params": {n: next(rest) for n in params}, "inputs": {n: next(rest) for n in inputs}}
        y, final = functional.scan(cell, x, now, *own, backend=backend, **more)
        return y, *final

    return run, leaves(given)


@pytest.mark.parametrize(("name", "backend"), BOTH)
def test_gradcheck(name, backend, registered):
    run, tensors = scanned(registered[name], drawn(registered[name]), backend)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    if backend == "loop" or name == "indrnn":  # it goes through the reference, whatever the engine
        assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["loop", "triton"])
@pytest.mark.parametrize("name", FEW)
def test_forward_mode(name, backend, registered):
    generator = torch.Generator().manual_seed(3)
    found = []
    for engine in (backend, "reference"):
        run, tensors = scanned(registered[name], drawn(registered[name]), engine)
        generator.manual_seed(3)
        along = tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for t in tensors)
        _, tangents = torch.func.jvp(run, tuple(tensors), along)
        found.append(tangents)
    close(*found)


@pytest.mark.parametrize("backend", ["loop", "triton"])
@pytest.mark.parametrize("name", FEW)
def test_gradients_of_each_sample(name, backend, registered):
    """By vmap: of weights and trained vectors shared by all, and of an ensemble of them."""
    cell = registered[name]
    run, tensors = scanned(cell, drawn(cell), backend)
    count = 1 + len(cell.states)
    batched, shared = tensors[:count], tensors[count:]
    others = len(cell.inputs)

    def loss(x, states, own, given):
        y, *final = run(x, *states, *own, *given)
        return y.square().sum() + sum(s.sum() for s in final)

    own, given = (shared[:-others], shared[-others:]) if others else (shared, [])
    gradients = torch.func.grad(loss, argnums=(0, 2, 3))
    xs, states = torch.stack([batched[0], 2 * batched[0]]), [torch.stack([s, -s]) for s in batched[1:]]
    for ensemble in (False, True):
        weights = [torch.stack([w, 0.5 * w]) for w in own] if ensemble else own
        ahead = torch.vmap(gradients, (0, 0, 0 if ensemble else None, None))(xs, states, weights, given)
        for v in range(2):
            mine = [w[v] for w in weights] if ensemble else weights
            expected = gradients(xs[v], [s[v] for s in states], mine, given)
            close([ahead[0][v], *(g[v] for of in ahead[1:] for g in of)], [expected[0], *expected[1], *expected[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["loop", "triton"])
@pytest.mark.parametrize("name", FEW)
def test_lower_precision(name, backend, dtype, registered):
    cell = registered[name]
    exact = drawn(cell)
    run, tensors = scanned(cell, exact, backend)
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    judge, _ = scanned(cell, exact, "reference")
    found = []
    for function, given in ((run, low), (judge, [t.detach().double().requires_grad_() for t in low])):
        out = function(*given)
        found.append([*out, *torch.autograd.grad([o.double().square().sum() for o in out], given)])
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype and relative(a.detach(), b.detach()) <= TOLERANCE[dtype]


def test_autocast_casts_params_and_inputs_too(registered):
    cell = registered["nobody"]
    run, tensors = scanned(cell, drawn(cell), "loop")
    low = [t.detach().float() for t in tensors]
    with torch.autocast(DEVICE, torch.bfloat16):
        y, *_ = run(*low)
    assert y.dtype == torch.bfloat16


def test_padding_may_hold_anything(registered):
    """In the inputs of each step, too."""
    cell = registered["nobody"]
    given = drawn(cell)
    lengths = torch.tensor([T, 2, 1], device=DEVICE)
    past = torch.arange(T, device=DEVICE)[:, None] >= lengths
    x, states, weights, params, inputs = given
    spoiled = {n: a.detach().clone().masked_fill_(past, torch.nan).requires_grad_() for n, a in inputs.items()}
    for backend in ("loop", "triton", "reference"):
        found = answer(cell, (x, states, weights, params, spoiled), backend=backend, lengths=lengths)
        close(found, answer(cell, given, backend="reference", lengths=lengths))


WRONG = {
    "params missing": (ValueError, "params of nobody must be p, q: q is missing", {"params": ["p"]}),
    "params extra": (ValueError, "params of nobody must be p, q: got 'r'", {"params": ["p", "q", "r"]}),
    "params none": (ValueError, "params of nobody must be p, q: p is missing", {"params": None}),
    "inputs missing": (ValueError, "inputs of nobody must be a: a is missing", {"inputs": []}),
    "params a list": (TypeError, "params must be a mapping from names to tensors or None, got a list", {"params": 1}),
    "shape of params": (RuntimeError, r"params\['q'\] must have shape \(5,\), got \(4,\)", {"q": 4}),
    "shape of inputs": (RuntimeError, r"inputs\['a'\] must have shape \(4, 3\) or \(4, 3, 5\), got \(4, 2\)", {"a": 2}),
    "states": (RuntimeError, "states: nobody has 4 states, got 3", {"states": 3}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_say_which_argument(case, registered):
    error, text, wrong = WRONG[case]
    cell = registered["nobody"]
    x, states, weights, params, inputs = drawn(cell)
    if "params" in wrong:
        named = wrong["params"]
        params = [1] if named == 1 else named and {n: torch.zeros(H, dtype=x.dtype, device=DEVICE) for n in named}
    inputs = {} if "inputs" in wrong else inputs
    if "q" in wrong:
        params["q"] = params["q"][: wrong["q"]]
    if "a" in wrong:
        inputs["a"] = inputs["a"][:, : wrong["a"]]
    with pytest.raises(error, match=text):
        functional.scan(cell, x, states[: wrong.get("states")], *weights, params=params, inputs=inputs)


def test_weights_that_a_cell_has_not(registered):
    cell = registered["indrnn"]
    x, states, (w_ih, _, b_ih, _), params, _ = drawn(cell)
    with pytest.raises(RuntimeError, match="w_hh must be None: the cell has no recurrent product"):
        functional.scan(cell, x, states, w_ih, w_ih.new_zeros(H, H), b_ih, params=params)
    with pytest.raises(TypeError, match="w_hh must be a tensor, got None"):
        functional.scan("lstm", x, None, x.new_zeros(4 * H, I), None)
    with pytest.raises(ValueError, match="params of lstm must be None, for it has none: got 'p'"):
        functional.scan("lstm", x, None, x.new_zeros(4 * H, I), x.new_zeros(4 * H, H), params={"p": x})


def test_a_step_that_nothing_can_be_derived_from_runs_by_the_reference():
    @seqcells.cell(gates="a", states="h")
    def normalized(x, U, h):
        a = x.a + U.a(h)
        return torch.tanh(a - a.amax(-1, keepdim=True))

    x, w_ih, w_hh = torch.randn(T, B, I, device=DEVICE), torch.randn(H, I, device=DEVICE), torch.eye(H, device=DEVICE)
    y, _ = functional.scan(normalized, x, None, w_ih, w_hh)
    h = torch.zeros(B, H, device=DEVICE)
    for t in range(T):
        a = x[t] @ w_ih.t() + h
        h = torch.tanh(a - a.amax(-1, keepdim=True))
    torch.testing.assert_close(y[-1], h)
    for device in ("cpu", "cuda"):
        facts = (normalized.key, "auto", torch.device(device), torch.float32, H)
        chosen = dispatch.choose(dispatch.Case(*facts, problem=normalized.problem))
        assert chosen.engine == "reference" and "a.amax(-1, keepdim=True)" in chosen.why, chosen.why
    with pytest.raises(seqcells.CellError, match="amax"):
        functional.scan(normalized, x, None, w_ih, w_hh, backend="loop")


@pytest.mark.parametrize("seed", [0, 1, 2, 30, 35, 36])
def test_steps_drawn_at_random(seed, registered):
    step, declaration, _ = drawn_step(seed)
    cell = seqcells.cell(**declaration)(step)
    given = drawn(cell)
    expected = answer(cell, given, backend="reference", **masks("both"))
    for engine in ENGINES:
        close(answer(cell, given, backend=engine, **masks("both")), expected)


def test_a_step_that_would_run_wrongly_runs_nowhere():
    @seqcells.cell(gates="a", states="h")
    def in_place(x, U, h):
        return h.add_(torch.tanh(x.a + U.a(h)))

    x, w_ih, w_hh = torch.randn(T, B, I, device=DEVICE), torch.randn(H, I, device=DEVICE), torch.eye(H, device=DEVICE)
    for backend in ("auto", "reference", "loop"):
        with pytest.raises(seqcells.CellError, match=r"h\.add_"):
            functional.scan(in_place, x, None, w_ih, w_hh, backend=backend)


def test_one_compiled_function_takes_cells_that_differ():
    """Where numbers of a second cell differ from the first's, Dynamo is not to take them for variables."""
    compiled = torch.compile(lambda layer, x: layer(x)[0], fullgraph=True, backend="eager")
    x = torch.randn(T, B, I)
    for cell in (seqcells.cells.mgu, seqcells.cells.indrnn, seqcells.cells.slstm, seqcells.cells.peephole_lstm):
        layer = seqcells.Recurrent(cell, I, H, backend="loop")
        torch.testing.assert_close(compiled(layer, x), layer(x)[0])


@pytest.mark.parametrize("backend", ["loop", "triton"])
def test_a_cell_whose_name_was_given_to_another(backend):
    """Its key is the name, so that what looks a key up as a name finds the other: also in second derivatives."""
    steps = {
        "first": lambda x, U, h: torch.tanh(x.n + U.n(h)),
        "second": lambda x, U, h: 0.5 * h + x.n * U.n(h),
    }
    cells = []
    for step in steps.values():
        step.__name__ = f"defined_twice_{backend}"
        cells.append(seqcells.cell(gates="n", states="h")(step))
    assert cells[0].key == f"defined_twice_{backend}" != cells[1].key
    for cell in cells:
        layer = seqcells.Recurrent(cell, 2, 2, backend=backend, dtype=torch.float64, device=DEVICE)
        x = torch.randn(2, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, layer=layer: layer(x)[0], x, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x, layer=layer: layer(x)[0], x, fast_mode=True)

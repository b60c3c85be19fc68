"""The operators of a scan as torch.library and vmap see them, against the engines' functions called straight away."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from shapes import CELLS, spread
from steps import STEPS, define

from seqcells import autograd, masks
from seqcells.autograd import Options
from seqcells.cell import get
from seqcells.engines import operators
from seqcells.kernels import buffers

T, B, I, H = 4, 3, 2, 3  # noqa: E741
DERIVED = ["nobody", "with_output", "indrnn"]
ENGINES = ["loop", "triton"]
MASKS = ["plain", "resets", "lengths", "both"]
NAMES = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "params", "inputs", "dropout")


def by_engine(names, last, kernels):
    """The product of engines, names and the last axis, of which the kernels, interpreted, take `kernels` by default."""
    return [*spread(["loop"], names, last, most=len(last)), *spread(["triton"], names, last, most=kernels)]


@pytest.fixture(scope="module")
def keys():
    """Of every cell here. What the derived cells' names mean to other tests stays."""
    names = sys.modules["seqcells.cell"]._BY_NAME  # seqcells.cell is the function
    before = dict(names)
    found = {step.__name__: define(step).key for step in STEPS if step.__name__ in DERIVED}
    names.clear()
    names.update(before)
    return found | {cell: cell for cell in CELLS}


def drawn(*shape, seed=[0]):  # noqa: B006
    seed[0] += 1
    found = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed[0])) * 0.7
    return found.to(DEVICE)


def tensors(key, K=1, batch=B, lead=()):
    """The 10 inputs of a layer, those that the cell has, without dropout; a shape before each."""
    cell = get(key)
    rows, form, size = cell.rows, cell.form, (*lead, K)
    others = (form.states - 1) * H
    return [
        drawn(*lead, T, batch, I),
        None if cell.outputs else drawn(*size, batch, H),
        drawn(*size, batch, others) if others else None,
        drawn(*size, rows[0] * H, I),
        drawn(*size, rows[1] * H, H) if rows[1] else None,
        *(drawn(*size, n * H) if n else None for n in rows[2:]),
        drawn(*size, len(cell.params) * H) if cell.params else None,
        drawn(*lead, T, batch, len(cell.inputs) * H) if cell.inputs else None,
        None,
    ]


def mask_of(kind, reversed, batch=B):
    resets = torch.rand(T, batch, generator=torch.Generator().manual_seed(3)) < 0.4
    lengths = torch.tensor([4, 0, 2, 3, 1, 4, 2, 2, 4])[:batch]
    mask = masks.encode(
        resets if kind in ("resets", "both") else None, lengths if kind in ("lengths", "both") else None, T, reversed
    )
    return None if mask is None else mask.to(DEVICE)


def operator_arguments(engine, key, save, K=1, kind="resets", need=(True,) * 9, samples=1):
    """Of both operators for a layer of K groups, the second reversed."""
    inputs, reversed = tensors(key, K), 2 if K > 1 else 0
    mask = mask_of(kind, reversed)
    given = (*inputs, mask, engine, key, save, reversed, "", "ieee")
    y, c, saved, hn, cn = operators.scan_forward(*given)
    dhn, dcn, dcs = (t if t.dim() > 1 and save != "none" else None for t in (hn, cn, c))
    if dcs is not None and engine == "triton":
        dcs = buffers.outputs(dcs, reversed)
    grads = (drawn(T, B, K, H), dhn, dcn, dcs)
    saved = None if save == "states" else saved
    how = (engine, key, reversed, "", "ieee", list(need), samples)
    return given, (*grads, *inputs, mask, y, c, saved, *how)


@pytest.mark.parametrize(("engine", "name", "K"), by_engine([*CELLS, *DERIVED], [1, 2], kernels=1))
def test_opcheck(engine, name, K, keys):
    """Schema, fakes and tracing; other ways to save, masks and needs, by which shapes differ, by the fakes alone."""
    given, back = operator_arguments(engine, keys[name], "gates", K)
    torch.library.opcheck(operators.scan_forward, given)
    torch.library.opcheck(operators.scan_backward, back)
    several = 1 if engine == "triton" and get(keys[name]).params else 3  # see the vmap rule
    none = (True, False) * 4 + (False,)
    for save, kind, need, samples in (
        ("states", "lengths", (True,) * 9, several),
        ("none", "plain", (True,) * 9, 1),
        ("gates", "both", none, 1),
    ):
        given, back = operator_arguments(engine, keys[name], save, K, kind, need, samples)
        torch.library.opcheck(operators.scan_forward, given, test_utils="test_faketensor")
        if save != "none":
            torch.library.opcheck(operators.scan_backward, back, test_utils="test_faketensor")


@pytest.mark.parametrize("engine", ENGINES)
def test_opcheck_of_inputs_that_require_gradients(engine, keys):
    """As within a Function, which alone has the operators' gradients: the operators have none."""
    every = operator_arguments(engine, keys["gru"], "gates", 2)
    for op, arguments in zip((operators.scan_forward, operators.scan_backward), every, strict=True):
        leaves = [
            t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in arguments
        ]
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, tuple(leaves), test_utils=checks)


def run(options, save, inputs, mask, grads=None):
    """Outputs and the 9 gradients, of outputs given random ones."""
    outputs, (y, c, saved) = autograd.ENGINES[options.engine].forward(options, save, inputs, mask)
    if grads is None:
        grads = [drawn(*o.shape) for o in outputs]
    saved = saved if saved.dim() > 1 else None
    return (
        outputs,
        autograd.Gradients(autograd.Scan(options), (True,) * 10).run(mask, y, c, saved, *inputs, *grads),
        grads,
    )


@pytest.mark.parametrize(("engine", "name", "kind"), by_engine(["lstm", "gru", "rnn_tanh", *DERIVED], MASKS, kernels=2))
def test_traced_as_straight_away(engine, name, kind, keys, poison):
    """Both ways, K of one and two, what was saved or recomputed; of one group also without an axis of groups."""
    for K, save in ((1, "gates"), (2, "states"), (2, "gates")):
        reversed = 2 if K > 1 else 0
        options = Options(engine, keys[name], reversed=reversed, states=get(keys[name]).form.states > 1)
        options = replace(options, notes={})
        inputs, mask = tensors(keys[name], K), mask_of(kind, reversed)
        if K == 1:
            inputs = [t if t is None or n in (0, 1, 2, 8) else t[0] for n, t in enumerate(inputs)]
        expected = run(options, save, inputs, mask)
        found = run(replace(options, traced=True), save, inputs, mask, expected[2])
        torch.testing.assert_close(found[:2], expected[:2])
        again = run(replace(options, notes=None), save, inputs, mask, expected[2])
        torch.testing.assert_close(again[:2], expected[:2], atol=0, rtol=0)


def layer(options, save):
    """run as a function of tensors alone, some None, for vmap: outputs, then gradients that there are."""

    def function(mask, grads, *inputs):
        outputs, found, _ = run(options, save, inputs, mask, list(grads))
        return *outputs, *(f for f in found if f is not None)

    return function


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["lstm", "nobody"])
def test_inputs_of_each_group(name, dtype, keys):
    """x and inputs with an axis of groups, as each group by itself; in half precision, too, and the fakes of it."""
    K = 2
    options = Options("loop", keys[name], reversed=0, states=True)
    inputs = [None if t is None else t.to(dtype) for t in tensors(keys[name], K)]
    for n in (0, 8):
        inputs[n] = None if inputs[n] is None else torch.stack([inputs[n], 2 * inputs[n]], 2)
    mask = mask_of("both", 0)
    outputs, found, grads = run(options, "gates", inputs, mask)
    traced = run(replace(options, traced=True), "gates", inputs, mask, grads)
    torch.testing.assert_close(traced[:2], (outputs, found))
    assert {t.dtype for t in (*outputs, *(f for f in found if f is not None))} == {dtype}
    for k in range(K):
        own = [None if t is None else t[:, :, k] if n in (0, 8) else t[k : k + 1] for n, t in enumerate(inputs)]
        halves = [d.chunk(K, 2)[k] if d.shape[0] == T else d[k : k + 1] for d in grads]
        expected = run(options, "gates", own, mask, halves)
        torch.testing.assert_close(outputs[0].chunk(K, 2)[k], expected[0][0])
        for n, (f, e) in enumerate(zip(found, expected[1], strict=True)):
            if f is not None:
                torch.testing.assert_close(f[:, :, k] if n in (0, 8) else f[k : k + 1], e)
    arguments = (*inputs, mask, "loop", keys[name], "gates", 0, "", "")
    torch.library.opcheck(operators.scan_forward, arguments, test_utils="test_faketensor")


BATCHED = {  # what vmap's dimension is in
    "samples": ("x", "h0", "c0", "inputs"),
    "an ensemble": ("w_ih", "w_hh", "b_ih", "b_hh", "params"),
    "everything": NAMES,
    "states and some weights": ("h0", "w_hh", "w_ih"),
    "gradients of outputs": (),
}


@pytest.mark.parametrize(
    ("engine", "name", "which"),
    [
        *by_engine(["lstm", "with_output"], BATCHED, kernels=1),
        *by_engine(["gru", "nobody", "indrnn"], BATCHED, kernels=0),
    ],
)
def test_vmap_as_one_after_another(engine, name, which, keys):
    """Of two groups, one reversed; with a mask of its own for each, too; every gradient of each."""
    V, key = 3, keys[name]
    options = Options(engine, key, reversed=2, states=get(key).form.states > 1, traced=True)
    for own_mask, save in ((False, "gates"), (True, "states")):
        every, single = tensors(key, 2, lead=(V,)), tensors(key, 2)
        inputs = [e if n in BATCHED[which] else s for n, e, s in zip(NAMES, every, single, strict=True)]
        dims = [0 if n in BATCHED[which] and t is not None else None for n, t in zip(NAMES, inputs, strict=True)]
        mask = mask_of("both", 2, V * B).view(T, V, B) if own_mask else mask_of("both", 2)
        of_mask = 1 if own_mask else None
        outputs, _ = autograd.ENGINES[engine].forward(options, save, single, None)
        grads = [drawn(V, *o.shape) for o in outputs]
        function = layer(options, save)
        found = torch.vmap(function, (of_mask, 0, *dims))(mask, tuple(grads), *inputs)
        for v in range(V):
            mine = [t if d is None else t[v] for t, d in zip(inputs, dims, strict=True)]
            expected = function(mask[:, v] if own_mask else mask, tuple(g[v] for g in grads), *mine)
            torch.testing.assert_close(tuple(f[v] for f in found), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "outer, inner", [("samples", "samples"), ("samples", "an ensemble"), ("an ensemble", "samples")]
)
def test_vmap_in_vmap(outer, inner, engine, keys):
    key, V, W = keys["gru"], 2, 3
    options = Options(engine, key, reversed=2, traced=True)
    lead = {n: ((V,) if n in BATCHED[outer] else ()) + ((W,) if n in BATCHED[inner] else ()) for n in NAMES}
    single = tensors(key, 2)
    inputs = [None if t is None else drawn(*lead[n], *t.shape) for n, t in zip(NAMES, single, strict=True)]

    def dims(which):
        return [0 if n in BATCHED[which] and t is not None else None for n, t in zip(NAMES, single, strict=True)]

    outputs, _ = autograd.ENGINES[engine].forward(options, "gates", single, None)
    grads, mask = [drawn(*o.shape) for o in outputs], mask_of("both", 2)
    function = lambda *tensors: layer(options, "gates")(mask, tuple(grads), *tensors)  # noqa: E731
    found = torch.vmap(torch.vmap(function, tuple(dims(inner))), tuple(dims(outer)))(*inputs)
    for v in range(V):
        for w in range(W):
            mine = [t if d is None else t[v] for t, d in zip(inputs, dims(outer), strict=True)]
            mine = [t if d is None else t[w] for t, d in zip(mine, dims(inner), strict=True)]
            torch.testing.assert_close(tuple(f[v, w] for f in found), function(*mine))


def test_many_reversed_groups_are_several_calls(keys):
    """Their bits are one integer, of at most operators.MOST groups a call."""
    V, key = 70, keys["rnn_tanh"]
    options = Options("loop", key, reversed=1, traced=True)
    single, weights = tensors(key), tensors(key, lead=(V,))
    inputs = [*single[:3], *weights[3:7], None, None, None]
    dims = [None] * 3 + [0] * 4 + [None] * 3
    grads = tuple(torch.ones_like(o) for o in autograd.ENGINES["loop"].forward(options, "gates", single, None)[0])
    function = lambda *tensors: layer(options, "gates")(None, grads, *tensors)  # noqa: E731
    found = torch.vmap(function, tuple(dims))(*inputs)
    for v in (0, 30, 69):
        mine = [t if d is None else t[v] for t, d in zip(inputs, dims, strict=True)]
        torch.testing.assert_close(tuple(f[v] for f in found), function(*mine))

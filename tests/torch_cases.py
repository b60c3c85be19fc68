"""What the comparisons with torch.nn share: networks, their inputs, and all of their outputs and gradients."""

from itertools import combinations, product

import torch
from torch.nn.utils.rnn import PackedSequence

import seqcells
from seqcells.testing import AGAINST_TORCH

# The name of the class, and the options beside those of every layer.
KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 2}),
    "GRU": ("GRU", {}),
    "RNN-tanh": ("RNN", {"nonlinearity": "tanh"}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
}
I, H = 3, 4  # noqa: E741  (the letter the whole project uses)


def pair(kind, dtype=torch.float64, **options):
    """torch.nn's module and ours, with the same weights."""
    name, more = KINDS[kind]
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(I, H, dtype=dtype, **more, **options)
    ours = getattr(seqcells, name)(I, H, dtype=dtype, **more, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def start(module, batch, dtype=torch.float64):
    """A random hx for a batch of that size, () if unbatched."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h0 = torch.randn(rows, *batch, module.proj_size or H, dtype=dtype)
    return (h0, torch.randn(rows, *batch, H, dtype=dtype)) if module.mode == "LSTM" else h0


def flat(result):
    """The tensors in nested tuples; of a PackedSequence its data."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, tuple):
        return [t for part in result for t in flat(part)]
    return [result]


def everything(module, function, x, hx):
    """The outputs of function(x, hx), and a weighted sum's gradients in x, hx and the module's parameters, by name.

    hx: a tensor, a pair, or None.
    """
    x = x.detach().clone().requires_grad_()
    leaves = [] if hx is None else [s.detach().clone().requires_grad_() for s in flat(hx)]
    given = None if hx is None else tuple(leaves) if isinstance(hx, tuple) else leaves[0]
    outputs = flat(function(x, given))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    inputs = {"x": x} | {f"hx[{i}]": s for i, s in enumerate(leaves)} | dict(module.named_parameters())
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


def assert_same(got, expected, what):
    """Each tensor within the table's absolute tolerance, shapes and dtypes equal; what: named if not."""
    assert list(got) == list(expected), what
    for name, value in expected.items():
        where = lambda message, name=name: f"{what}, {name}: {message}"  # noqa: E731
        torch.testing.assert_close(got[name], value, rtol=0, atol=AGAINST_TORCH[value.dtype], msg=where)


def every_case(axes):
    """The full product of named axes, as dicts."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def pairwise(axes):
    """Cases of the product such that each pair of values of two axes occurs in one; always the same ones."""
    cases = every_case(axes)
    pairs = [set(combinations(case.items(), 2)) for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.append(cases[best])
        missing -= pairs[best]
    return chosen

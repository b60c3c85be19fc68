"""Any arguments, good or bad: torch.nn's result, or an exception of its type, in its words where it has its own."""

import inspect
import linecache
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch_cases import flat

import seqcells
from seqcells.testing import AGAINST_TORCH

# Of each argument, values that are fine (most are fine with any others), and values that are not, or hardly.
NORMAL = {
    "input_size": [3, True],
    "hidden_size": [4, 1],
    "num_layers": [1, 2],
    "bias": [True, False],
    "batch_first": [False, True],
    "dropout": [0.0, 0, 1, 0.5],
    "bidirectional": [False, True],
    "dtype": [None, torch.float64],
}
ODD = {
    "input_size": [0, -1, 3.0, "3", None, torch.tensor(3)],
    "hidden_size": [0, -2, 4.0, "4", None],
    "num_layers": [0, -1, 1.5, "1", None],  # nor True, one layer to ours; torch.nn refuses it when called
    "bias": [1, 0, None, "yes", torch.tensor(True)],
    "batch_first": [1, 0, None, "no"],
    "dropout": [-0.1, 1.5, True, False, None, "0.5", math.nan, 1j],
    "bidirectional": [1, 0, None, "yes"],
    "dtype": [torch.int64, torch.bool, "float32"],  # nor complex ones, which torch's run on the CPU and ours refuse
}
SPECIAL = {
    "LSTM": {"proj_size": ([0, 0, 2], [4, 7, -1, 2.0, None, "2", True])},
    "GRU": {"proj_size": ([], [0, 2])},
    "RNN": {"nonlinearity": (["tanh", "relu"], ["gelu", None, 1, True, "Tanh"]), "proj_size": ([], [0, 2])},
}
ORDER = {
    "LSTM": ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"],
    "GRU": ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"],
    "RNN": [
        *("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first", "dropout", "bidirectional")
    ],
}


@st.composite
def constructions(draw):
    """A class and its arguments, some by position; up to two of them odd."""
    name = draw(st.sampled_from(list(ORDER)))
    normal = NORMAL | {k: v[0] for k, v in SPECIAL[name].items()}
    odd = ODD | {k: v[1] for k, v in SPECIAL[name].items()}
    strange = draw(st.sets(st.sampled_from(sorted(odd)), max_size=2)) if draw(st.integers(0, 2)) == 0 else set()
    given = {}
    for key, values in normal.items():
        if key in strange:
            given[key] = draw(st.sampled_from(odd[key]))
        elif values and (key in ("input_size", "hidden_size") or draw(st.booleans())):
            given[key] = draw(st.sampled_from(values))
    if name != "LSTM" and given.get("proj_size") == 0:
        del given["proj_size"]
    positional = []
    for key in ORDER[name][: draw(st.integers(0, 5))]:
        if key not in given:
            break
        positional.append(given.pop(key))
    if draw(st.integers(0, 30)) == 0:
        given["hidden"] = 5  # which none of them has
    return name, positional, given


@st.composite
def calls(draw):
    """How `make` is to make a module's input and hx; up to two oddities."""
    oddities = ["steps", "rank", "dtype", "width", "packed rank", "hx rank", "hx size", "hx count", "hx type", "type"]
    strange = draw(st.sets(st.sampled_from([*oddities, "hx dtype", "batch"]), max_size=2))
    strange = strange if draw(st.integers(0, 2)) else set()
    form = draw(st.sampled_from(["batched", "batched", "unbatched", "sorted", "unsorted"]))
    with_hx = draw(st.booleans()) or any(s.startswith("hx") for s in strange)
    pick, seed = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    return form, with_hx, frozenset(strange), pick, seed


def make(module, call):
    """The arguments of a call for that module. pick chooses among the ways to be odd."""
    form, with_hx, strange, pick, seed = call
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    dtype = module.weight_ih_l0.dtype
    T, B = 0 if "steps" in strange else 4, 0 if "batch" in strange else 3
    width = module.input_size + ([1, -1, 2][pick % 3] if "width" in strange else 0)
    shape = (T, width) if form == "unbatched" else (B, T, width) if module.batch_first else (T, B, width)
    if "rank" in strange:
        shape = [(), (width,), (*shape, 2), (1, *shape, 2)][pick % 4]
    x = random(*shape)
    if "dtype" in strange:
        x = x.to([torch.float64, torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64][pick])
    if form in ("sorted", "unsorted") and x.dim() == 3 and x.numel():
        lengths = [4, 2, 1] if form == "sorted" else [2, 4, 1]
        x = pack_padded_sequence(x, torch.tensor(lengths), module.batch_first, enforce_sorted=form == "sorted")
        if "packed rank" in strange:
            x = PackedSequence(x.data[:, :, None] if pick % 2 else x.data[:, 0], *x[1:])
    if "type" in strange:
        x = [x, None, [[1.0]], 5, "x", (x, x)][pick] if pick else [[0.0] * width]
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if form == "unbatched" else (B,)
    sizes = [[rows, *batch, module.proj_size or module.hidden_size], [rows, *batch, module.hidden_size]]
    if module.mode != "LSTM":
        del sizes[1]
    odd = pick % len(sizes)
    if "hx size" in strange:
        sizes[odd][[0, 1, -1][pick // 2]] += 1
    if "hx rank" in strange:
        sizes[odd] = sizes[odd][1:] if pick // 2 else [1, *sizes[odd]]
    states = [random(*size) for size in sizes]
    if "hx dtype" in strange:
        states[odd] = states[odd].to([torch.float64, torch.float32, torch.float16, torch.int64][pick % 4])
    hx = None if not with_hx else tuple(states) if module.mode == "LSTM" else states[0]
    if "hx count" in strange:
        hx = [(), (states[0],), (*states, states[0]), states, (states[0], None), (None, states[-1])][pick]
    if "hx type" in strange:
        hx = ["h", 5, [0.0], {}, (0.0, 0.0), states[0]][pick]
    return (x,) if hx is None and pick % 2 else (x, hx)


def outcome(function):
    """("result", what function gives), or ("error", the exception, whether torch's rnn.py raised it itself)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "result", function(), False
    except Exception as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        file = trace.tb_frame.f_code.co_filename
        own = file.endswith("nn/modules/rnn.py") and linecache.getline(file, trace.tb_lineno).strip().startswith(
            "raise"
        )
        return "error", error, own


def judge(theirs, ours, what, unchecked=False):
    """The same outcome: "" or what differs. Where torch.nn runs into something that says nothing of the arguments (it
    has no attribute, no such index), ours raises one of three types. unchecked: torch.nn does not look at the
    arguments, so any error will do where it runs into one."""
    (kind, it, own), (mine, got, _) = theirs, ours
    unchecked = unchecked or isinstance(it, (AttributeError, IndexError, KeyError))
    refused = isinstance(got, (TypeError, ValueError, RuntimeError))
    same = kind == mine and (kind == "result" or type(it) is type(got) or (unchecked and not own and refused))
    same = same and (not own or str(it) == str(got))
    return "" if same else f"{what}: torch.nn {it!r}, seqcells {got!r}"


def fits(module, call, arguments):
    """Whether a batch of 3 may have that hx: of other sizes, too, if it is unsorted, and so only 3 rows are taken."""
    hx = arguments[1] if len(arguments) > 1 else None
    if hx is None:
        return True
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(s, torch.Tensor) for s in hx):
        return False
    rows, dtype = module.num_layers * (2 if module.bidirectional else 1), module.weight_ih_l0.dtype
    for s, width in zip(hx, (module.proj_size or module.hidden_size, module.hidden_size), strict=True):
        if s.dtype != dtype or s.dim() != 3 or (s.shape[0], s.shape[2]) != (rows, width):
            return False
        if s.shape[1] != 3 and not (call[0] == "unsorted" and s.shape[1] > 3):
            return False
    return True


def compare(construction, call):
    name, positional, keywords = construction
    what = f"{name}(*{positional}, **{keywords})"
    theirs, ours = (outcome(lambda m=m: getattr(m, name)(*positional, **keywords)) for m in (torch.nn, seqcells))
    named = dict(zip(ORDER[name], positional, strict=False)) | keywords
    unlooked = not isinstance(named.get("bidirectional", False), bool) or type(named.get("proj_size", 0)) is not int
    if unlooked and not theirs[2]:
        # torch.nn's own checks leave it out: it notices later, if at all, and then names other arguments.
        return "" if type(ours[1]) in (TypeError, type(theirs[1])) else f"{what}: {theirs}, {ours}"
    unknown = set(keywords) - {*inspect.signature(getattr(seqcells, name)).parameters, "proj_size"}
    if unknown and isinstance(theirs[1], ValueError) and type(ours[1]) is TypeError:
        return ""  # of two mistakes torch.nn.RNN, which has no signature, sees the other first
    problem = judge(theirs, ours, what)
    if problem or theirs[0] == "error":
        return problem
    theirs, ours = theirs[1], ours[1]
    ours.load_state_dict(theirs.state_dict())
    if 0 < theirs.dropout < 1:
        theirs, ours = theirs.eval(), ours.eval()
    arguments = make(theirs, call)
    what = f"{what} of {call}"
    packed = name == "LSTM" and isinstance(arguments[0], PackedSequence)
    odd_hx = name == "LSTM" and any(s.startswith("hx") for s in call[2])
    if packed and odd_hx:
        # torch.nn.LSTM hands these on as they are, and the process may end in a segmentation fault.
        result = outcome(lambda: ours(*arguments))
        return "" if result[0] == "error" or fits(ours, call, arguments) else f"{what}: {result}"
    theirs, ours = (outcome(lambda m=m: m(*arguments)) for m in (theirs, ours))
    if odd_hx and "hx dtype" in call[2] and "not the same dtype" in str(ours[1]):
        return ""  # torch refuses an h_0 of another dtype, but a c_0 only where oneDNN runs
    if (
        len(call[2]) > 1
        and theirs[0] == ours[0] == "error"
        and isinstance(ours[1], (TypeError, ValueError, RuntimeError))
    ):
        return ""  # of two mistakes, either may be named
    # Nor is packed input itself looked at: torch fails inside a matrix product.
    problem = judge(theirs, ours, what, unchecked=packed)
    if problem or theirs[0] == "error":
        return problem
    if type(theirs[1][0]) is not type(ours[1][0]):
        return f"{what}: {type(ours[1][0])}"
    for a, b in zip(flat(theirs[1]), flat(ours[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=AGAINST_TORCH.get(a.dtype, 0), msg=lambda m: f"{what}: {m}")
    return ""


@pytest.mark.parametrize("examples", [600, pytest.param(4000, marks=pytest.mark.slow)])
def test_any_arguments(examples):
    @settings(max_examples=examples, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(constructions(), calls())
    def check(construction, call):
        problem = compare(construction, call)
        assert not problem, problem

    check()

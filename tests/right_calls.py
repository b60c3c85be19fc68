"""A correct call of everything public, each time with other options: `ENTRIES`."""

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from wrong_values import B, H, I, T, randn

import seqcells
from seqcells import functional, init, interop, reference, testing
from seqcells.cell import named
from seqcells.tasks import handwritten as handwritten_cells


class Call:
    """A function and its arguments by name. target: a module that a wrong call must leave as it is."""

    def __init__(self, entry, function, arguments, target=None):
        self.entry, self.function, self.arguments, self.target = entry, function, arguments, target


OPTIONS = {
    "save": ["gates", "states"],
    "backend": [None, None, "aten", "loop", "reference"],
    "precision": [None, "ieee", "tf32"],
}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
# By the functions of the specification: another test file may register a cell of its own.
CELLS = [name.removesuffix("_cell") for name in vars(reference) if name.endswith("_cell")]


def options(random, names=("save", "backend", "precision"), most=3):
    return {n: random.choice(OPTIONS[n]) for n in random.sample(names, random.randint(0, min(most, len(names))))}


def masks(random, steps=T, batch=B):
    """resets and lengths, some of the time."""
    found = {}
    if random.random() < 0.4:
        found["resets"] = torch.rand(steps, batch) < 0.3
    if random.random() < 0.4:
        lengths = [random.randint(0, steps) for _ in range(batch)]
        found["lengths"] = random.choice([torch.tensor(lengths), lengths])
    return found


def _weights(gates, *groups):
    n = gates * H
    return {
        "w_ih": randn(*groups, n, I),
        "w_hh": randn(*groups, n, H),
        "b_ih": randn(*groups, n),
        "b_hh": randn(*groups, n),
    }


def scan(random):
    cell = random.choice(CELLS)
    spec = named(cell)
    states = tuple(randn(B, H) for _ in spec.states)
    given = {"cell": cell, "x": randn(T, B, I), "states": random.choice([states, states, None])}
    return Call("functional.scan", functional.scan, given | _weights(spec.rows[1]) | masks(random) | options(random))


def scan_groups(random):
    cell = random.choice(CELLS)
    spec = named(cell)
    x = random.choice([randn(T, B, I), randn(T, B, 2, I)])
    given = {"cell": cell, "x": x, "states": tuple(randn(2, B, H) for _ in spec.states)}
    given |= {"reverse": (False, random.choice([False, True]))}
    given |= _weights(spec.rows[1], 2) | masks(random) | options(random)
    return Call("functional.scan_groups", functional.scan_groups, given)


def function(random, kind):
    hx = (randn(B, H), randn(B, H)) if kind == "lstm" else randn(B, H)
    given = {"x": randn(T, B, I), "hx": random.choice([hx, hx, None])} | _weights(GATES[kind])
    if kind == "gru":
        given["reset_after"] = random.choice([True, False])
    if kind == "rnn":
        given["nonlinearity"] = random.choice(["tanh", "relu"])
    return Call(kind, getattr(seqcells, kind), given | masks(random) | options(random))


def constructor(random, name, most=5):
    cell = name.endswith("Cell")
    given = {"input_size": I, "hidden_size": H}
    more = {
        "bias": random.choice([True, False]),
        "device": random.choice([None, "cpu", "meta"]),
        "dtype": torch.float32,
    }
    more |= options(random, ("backend", "precision") if cell else ("save", "backend", "precision"))
    if not cell:
        more |= {"num_layers": random.choice([1, 2]), "batch_first": random.choice([True, False])}
        more |= {"dropout": random.choice([0.0, 0.5]), "bidirectional": random.choice([True, False])}
        if name == "LSTM":
            more["proj_size"] = random.choice([0, 2])
    if name.startswith("GRU"):
        more["reset_after"] = random.choice([True, False])
    if name.startswith("RNN"):
        more["nonlinearity"] = random.choice(["tanh", "relu"])
    given |= {k: more[k] for k in random.sample(list(more), random.randint(0, min(most, len(more))))}
    return Call(name, getattr(seqcells, name), given)


def made(random, name, most=5):
    """A module with random options, that can be called."""
    given = constructor(random, name, most).arguments
    given.pop("device", None)
    return getattr(seqcells, name)(**given)


def layer(random, name):
    module = made(random, name)
    form = random.choice(["batched", "batched", "unbatched", "packed", "unsorted"])
    shape = (T, I) if form == "unbatched" else (B, T, I) if module.batch_first else (T, B, I)
    x, given = randn(*shape), {}
    if random.random() < 0.4:
        given["resets"] = torch.rand(shape[:-1]) < 0.3
    if form in ("packed", "unsorted"):
        lengths = [4, 2, 1] if form == "packed" else [2, 4, 1]
        pack = lambda x: pack_padded_sequence(x, lengths, module.batch_first, form == "packed")  # noqa: E731
        if "resets" in given and random.random() < 0.5:
            given["resets"] = pack(given["resets"][..., None])._replace()
            given["resets"] = given["resets"]._replace(data=given["resets"].data[:, 0])
        x = pack(x)
    elif form == "batched" and random.random() < 0.4:
        given["lengths"] = random.choice([torch.tensor([4, 0, 1]), [4, 2, 1], (1, 2, 3)])
    given["input"] = x
    rows, batch = module.num_layers * (2 if module.bidirectional else 1), () if form == "unbatched" else (B,)
    states = [randn(rows, *batch, module.proj_size or H), randn(rows, *batch, H)]
    if random.random() < 0.7:
        given["hx"] = tuple(states) if name == "LSTM" else states[0]
    if name == "LSTM" and random.random() < 0.3:
        given["return_cell_states"] = random.choice([True, False])
    return Call(f"{name}()", module, given)


def one_step(random, name):
    module = made(random, name, 3)
    batch = random.choice([(B,), (B,), ()])
    hx = (randn(*batch, H), randn(*batch, H)) if name == "LSTMCell" else randn(*batch, H)
    given = {"input": randn(*batch, I)} | ({"hx": hx} if random.random() < 0.8 else {})
    return Call(f"{name}()", module, given)


def any_module(random, kinds=("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")):
    name = random.choice(kinds)
    given = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": random.choice([True, False])}
    return getattr(random.choice([seqcells, nn]), name)(I, H, **given)


def initialiser(random):
    name = random.choice(["forget_bias_", "gate_bias_", "chrono_", "accumulator_"])
    kinds = ("LSTM", "LSTMCell") if name in ("forget_bias_", "gate_bias_") else ("LSTM", "LSTMCell", "GRU", "GRUCell")
    module = any_module(random, kinds)
    given = {
        "forget_bias_": {"value": 1.5},
        "gate_bias_": {"f": 1.5},
        "chrono_": {"max_length": 20, "generator": torch.Generator()},
    }
    given |= {"accumulator_": {"keep": 6.0} | ({"add": -3.0} if "LSTM" in type(module).__name__ else {})}
    return Call(f"init.{name}", getattr(init, name), {"module": module} | given[name], module)


def _place(random, module):
    if not hasattr(module, "num_layers"):
        return {}
    return {"layer": random.choice([0, 1]), "reverse": module.bidirectional and random.choice([True, False])}


def _keras(kind):
    n = GATES[kind] * H
    arrays = [np.ones((I, n), np.float32), np.ones((H, n), np.float32)]
    return [*arrays, np.ones((2, n) if kind == "gru" else n, np.float32)]


def from_other(random):
    kind = random.choice(["lstm", "gru", "rnn"])
    kernel, recurrent, bias = _keras(kind)
    given = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias, "cell": kind}
    if kind == "rnn" or random.random() < 0.5:
        return Call("interop.from_keras", interop.from_keras, given | ({"reset_after": True} if kind == "gru" else {}))
    if kind == "gru":
        given |= {"bias": bias[0], "recurrent_bias": torch.tensor(bias[1])}
    return Call("interop.from_haste", interop.from_haste, given)


def from_handwritten(random):
    name = random.choice(["lstm", "gru"])
    cell = {"lstm": handwritten_cells.HandwrittenLSTMCell, "gru": handwritten_cells.HandwrittenGRUCell}[name](I, H)
    return Call(
        f"interop.from_handwritten_{name}",
        getattr(interop, f"from_handwritten_{name}"),
        {"state": dict(cell.state_dict())},
    )


def load(random):
    module = any_module(random)
    kind = type(module).__name__.removesuffix("Cell").lower()
    given = {"module": module} | _place(random, module)
    which = random.choice(["load_", "load_keras_", "to_keras"])
    if which == "load_":
        given["state"] = dict(
            getattr(nn, f"{kind.upper()}Cell")(
                I if not given.get("layer") else 2 * H if module.bidirectional else H, H
            ).state_dict()
        )
    elif which == "load_keras_":
        given |= {"arrays": _keras(kind)} | ({"layer": 0} if "layer" in given else {})
    return Call(f"interop.{which}", getattr(interop, which), given, None if which == "to_keras" else module)


def swap(random):
    model = nn.ModuleDict({"a": any_module(random), "b": nn.Sequential(nn.LSTM(I, H), seqcells.GRU(I, H))})
    given = {
        "model": model,
        "report": [],
        "include": random.choice(["*", ["a", "b.*"]]),
        "exclude": random.choice([(), "a"]),
    }
    if random.random() < 0.3:
        given["mapping"] = {nn.LSTM: seqcells.subclasses.LSTM}
    name = random.choice(["convert", "revert"])
    given |= options(random) | {"subclass": random.choice([True, False])} if name == "convert" else {}
    return Call(name, getattr(seqcells, name), given, model)


def explain(random):
    given = {"cell": random.choice(CELLS), "batch": 4, "hidden_size": 8}
    more = {"dtype": torch.float32, "device": random.choice(["cpu", "sm_90"]), "groups": 2, "steps": 20, "resets": True}
    more |= {"lengths": False, "grad": True, "layers": 2} | options(random, ("backend", "precision"))
    if more["device"] != "cpu":
        more.pop("backend", None)
    given |= {k: more[k] for k in random.sample(list(more), min(5, len(more)))}
    return Call("explain", seqcells.explain, given)


def enter(backend):
    with seqcells.backend(backend):
        pass


def enter_verification(policy):
    with seqcells.verification(policy):
        pass


def names(random):
    return random.choice(
        [
            Call("backend", enter, {"backend": "loop"}),
            Call("verification", enter_verification, {"policy": "off"}),
            Call("backends.parse", seqcells.backends.parse, {"backend": "triton:grid"}),
            Call("cell.named", lambda cell: named(cell), {"cell": "lstm"}),
            Call("functional.rnn_cell_name", functional.rnn_cell_name, {"nonlinearity": "tanh"}),
        ]
    )


def specification(random):
    cell = random.choice(CELLS)
    spec = named(cell)
    given = {"states": tuple(randn(B, H) for _ in spec.states)} | _weights(spec.rows[1])
    if random.random() < 0.4:
        return Call(
            f"reference.{cell}_cell",
            getattr(reference, f"{cell.removesuffix('_cell')}_cell"),
            {"x": randn(B, I)} | given,
        )
    which = random.choice(["scan_states", "scan_groups"])
    given |= {"step": reference.step_of(cell), "x": randn(T, B, I)} | masks(random)
    if isinstance(given.get("lengths"), list):
        given["lengths"] = torch.tensor(given["lengths"])
    given |= {"reverse": True} if which == "scan_states" else {"reversed": 1}
    return Call(f"reference.{which}", getattr(reference, which), given)


def handwritten(random):
    cls = random.choice([handwritten_cells.HandwrittenLSTMCell, handwritten_cells.HandwrittenGRUCell])
    if random.random() < 0.3:
        return Call(cls.__name__, cls, {"input_size": I, "hidden_size": H})
    cell = cls(I, H)
    if random.random() < 0.4:
        return Call(
            f"{cls.__name__}.load_cell_state_dict", cell.load_cell_state_dict, {"state": cell.cell_state_dict()}, cell
        )
    lstm = cls is handwritten_cells.HandwrittenLSTMCell
    given = {"states": (randn(B, H), randn(B, H))} if lstm else {"h": randn(B, H)}
    return Call(f"{cls.__name__}()", cell, {"x": randn(B, I)} | given)


def checking(random):
    shape = testing.Shape(T, B, I, H)
    given = {"cell": "lstm", "shape": shape, "dtype": torch.float32, "device": "cpu"}
    which = random.choice(["inputs", "errors", "tolerance", "kinds", "relative"])
    if which == "inputs":
        given |= {"scale": 1.0, "seed": 0}
    elif which == "errors":
        given |= {"backend": "loop", "save": "gates", "resets": False, "scale": 1.0}
    elif which == "tolerance":
        del given["device"]
    elif which == "kinds":
        given = {"device": "cpu", "dtypes": ["float32"]}
    else:
        given = {"got": randn(3), "exact": randn(3)}
    return Call(f"testing.{which}", getattr(testing, which), given)


ENTRIES = [
    *(scan, scan_groups),
    *(lambda random, kind=kind: function(random, kind) for kind in GATES),
    *(lambda random, name=name: constructor(random, name) for name in ("LSTM", "GRU", "RNN")),
    *(lambda random, name=name: layer(random, name) for name in ("LSTM", "LSTM", "GRU", "RNN")),
    *(lambda random, name=name: constructor(random, name) for name in ("LSTMCell", "GRUCell", "RNNCell")),
    *(lambda random, name=name: one_step(random, name) for name in ("LSTMCell", "GRUCell", "RNNCell")),
    *(initialiser, from_other, from_handwritten, load, swap, explain, names, specification, handwritten, checking),
]

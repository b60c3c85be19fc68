"""Initializers. Like those of torch.nn.init, they work in place, without gradients, and return the module.

They accept modules of seqcells and of torch.nn, and set every layer and direction. orthogonal_ and indrnn_ set
recurrent weights. The others set the biases of certain gates: bias_ih to the value, and bias_hh to zero. All else
stays unchanged. A gate is found by its name in the cell: i f g o in an LSTM, r z n in a GRU. Modules of any cell with
such a gate are accepted. (Whether a gate preserves the state at 1 or at 0 depends on the cell: with h + f * (n - h),
a negative bias of f remembers.) All raise TypeError for other modules and for cells without such a gate, and
ValueError for a module without biases. For a model:

    for module in model.modules():
        if isinstance(module, seqcells.LSTM):
            seqcells.init.forget_bias_(module)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import checks, weights

M = TypeVar("M", bound=nn.Module)


def forget_bias_(module: M, value: float = 1.0) -> M:
    """Set the biases of module's forget gates f (as in an LSTM) to value, so that it remembers from the start.

        >>> lstm = seqcells.init.forget_bias_(seqcells.LSTM(10, 20))
        >>> lstm.bias_ih_l0[20:40].unique().item()
        1.0

    Gers, Schmidhuber and Cummins 2000, "Learning to forget"; Jozefowicz, Zaremba and Sutskever 2015, "An empirical
    exploration of recurrent network architectures", who recommend 1.
    """
    _gate(module, "forget_bias_", ("f",))
    checks.number("value", value)
    return _set(module, {"f": _filled(value)})


def gate_bias_(module: M, **values: float) -> M:
    """Set the biases of module's gates. The other gates' biases stay unchanged. values: one for each gate, by its name.

    TypeError if no value is given, or if the cell has no bias for a gate of that name.

        >>> layer = seqcells.init.gate_bias_(seqcells.Recurrent("cifg", 10, 20), f=4.0)
        >>> layer.bias_ih_l0[:20].unique().item()
        4.0
    """
    if not values:
        raise TypeError("gate_bias_ takes a value for at least one gate, by its name, such as f=1.0")
    for gate, value in values.items():
        _gate(module, "gate_bias_", (gate,))
        checks.number(gate, value)
    return _set(module, {gate: _filled(value) for gate, value in values.items()})


def chrono_(module: M, max_length: float, *, generator: torch.Generator | None = None) -> M:
    """Chrono initialization: the memory of each unit of module (LSTM, GRU) lasts between 1 and max_length steps.

    LSTM: b_f = log(u), b_i = -b_f, with u from U(1, max_length - 1) for each unit. GRU: b_z = log(u), since z preserves
    the state in torch's h' = (1 - z) n + z h; the paper's z is 1 - z. Another cell is treated as an LSTM if it has a
    gate f (b_i only if it has a gate i), else as a GRU. max_length: the longest expected dependency; ValueError unless
    it is more than 2. generator: on the module's device.

    Tallec and Ollivier 2018, "Can recurrent neural networks warp time?", arXiv:1804.11188.

        >>> lstm = seqcells.init.chrono_(seqcells.LSTM(10, 20), max_length=100)
        >>> bool((lstm.bias_ih_l0[20:40] >= 0).all())
        True
    """
    keeper, gates = _gate(module, "chrono_", ("f", "z"))
    checks.number("max_length", max_length)
    _generator(generator)
    if not 2 < max_length < math.inf:
        raise ValueError(f"max_length must be more than 2 and finite, for log(U(1, max_length - 1)), got {max_length}")
    drawn: list[Tensor] = []

    def draw(like: Tensor) -> Tensor:
        # In float32 at least: in half precision U(1, 1000) has few values.
        dtype = torch.promote_types(like.dtype, torch.float32)
        u = torch.empty_like(like, dtype=dtype).uniform_(1, max_length - 1, generator=generator)
        drawn.append(u.log())
        return drawn[-1]

    adds: dict[str, Callable[[Tensor], Tensor]] = {"i": lambda like: -drawn[-1]}
    return _set(module, {keeper: draw} | (adds if keeper == "f" and "i" in gates else {}))


def accumulator_(module: M, keep: float | None = None, add: float | None = None) -> M:
    """Make module (LSTM, GRU) start as an accumulator: it forgets nothing, and each step adds a little to the state.

    keep: the bias of the gate that preserves the state: the forget gate of an LSTM (None: 14), z of a GRU (None: 8).
    add: the bias of the input gate of an LSTM (None: -9). ValueError for a GRU, which has no input gate: it adds by
    1 - z. Another cell is treated as an LSTM if it has gates f and i, else as a GRU with its gate f or z.

    A step then adds about sigmoid(add) (a GRU: sigmoid(-keep)) times the candidate. That is so little that the state
    stays where tanh is linear, and sums stay sums; the model must scale its output up accordingly. With these values
    models learn to count the ones in strings of 64, correct up to length 127: LSTM, 8 units, 14 and -9, output times
    1500; GRU, 16 units, 8, output times 300. To remember a symbol for a hundred steps: 6 and -3 (LSTM), 4 (GRU). See
    seqcells/tasks/count_ones_regression.py and temporal_order.py; results are in benchmarks/results/tasks-cpu.md.

        >>> gru = seqcells.init.accumulator_(seqcells.GRU(10, 20), keep=4.0)
        >>> gru.bias_ih_l0[20:40].unique().item()
        4.0
    """
    keeper, gates = _gate(module, "accumulator_", ("f", "z"))
    checks.number("keep", keep, optional=True)
    checks.number("add", add, optional=True)
    if keeper == "f" and "i" in gates:
        values = {"f": 14.0 if keep is None else keep, "i": -9.0 if add is None else add}
        return _set(module, {gate: _filled(value) for gate, value in values.items()})
    if add is not None:
        kind = type(module).__name__
        raise ValueError(f"add is for an LSTM's input gate; a {kind} adds by 1 - {keeper}, which keep sets")
    return _set(module, {keeper: _filled(8.0 if keep is None else keep)})


def orthogonal_(module: M, gain: float = 1.0, *, generator: torch.Generator | None = None) -> M:
    """Set the recurrent weights of each gate of module to gain times a random orthogonal matrix; of each head, if there
    are several. generator: on the module's device. TypeError for a module without recurrent weights.

    Saxe et al. 2014, arXiv:1312.6120. The papers of Li-GRU, STAR and minimalRNN start so.

        >>> layer = seqcells.init.orthogonal_(seqcells.Recurrent("ligru", 10, 20))
        >>> w = layer.weight_hh_l0[:20].detach()
        >>> torch.allclose(w @ w.T, torch.eye(20), atol=1e-5)
        True
    """
    expected = "a recurrent module of seqcells or torch.nn with recurrent weights"
    cell = weights.cell_of(module, "orthogonal_", expected)
    if not cell.u_gates:
        raise checks.wrong("orthogonal_: module", expected, module)
    checks.number("gain", gain)
    _generator(generator)
    values: dict[str, Tensor] = {}
    for suffix in weights.suffixes(module):
        shape = weights.shapes(module)["weight_hh"]
        old = checks.parameter(module, "weight_hh" + suffix, shape)
        new = torch.empty(shape, dtype=torch.promote_types(old.dtype, torch.float32), device=old.device)
        for block in new.split(shape[1]):
            nn.init.orthogonal_(block, gain, generator=generator)
        values["weight_hh" + suffix] = new.to(old.dtype)
    weights.assign(module, values)
    return module


def indrnn_(module: M, max_length: float, *, last: bool = False, generator: torch.Generator | None = None) -> M:
    """Set the recurrent weights u of module, a layer of the cell indrnn, to values from U(0, 2 ** (1 / max_length)).

    Over max_length steps, a state then grows at most by a factor of 2. last: from U(2 ** (-1 / max_length), ...), so
    that no unit forgets: the paper's choice for the last layer. max_length: the number of steps; ValueError unless it
    is positive and finite. generator: on the module's device. TypeError for another module.

    Li et al. 2018, arXiv:1803.04831.

        >>> layer = seqcells.init.indrnn_(seqcells.Recurrent("indrnn", 10, 20), max_length=100, last=True)
        >>> bool((layer.u_l0 > 0.99).all())
        True
    """
    expected = "a Recurrent or RecurrentCell of the cell indrnn"
    if weights.cell_of(module, "indrnn_", expected).name != "indrnn":
        raise checks.wrong("indrnn_: module", expected, module)
    checks.number("max_length", max_length)
    checks.boolean("last", last)
    _generator(generator)
    if not 0 < max_length < math.inf:
        raise ValueError(f"max_length must be positive and finite, got {max_length}")
    values: dict[str, Tensor] = {}
    for suffix in weights.suffixes(module):
        old = checks.parameter(module, "u" + suffix, weights.shapes(module)["u"])
        new = torch.empty_like(old, dtype=torch.promote_types(old.dtype, torch.float32))
        least = 2 ** (-1 / max_length) if last else 0.0
        values["u" + suffix] = new.uniform_(least, 2 ** (1 / max_length), generator=generator).to(old.dtype)
    weights.assign(module, values)
    return module


def _generator(given: torch.Generator | None) -> None:
    if given is not None and not isinstance(given, torch.Generator):
        raise checks.wrong("generator", "a torch.Generator or None", given)


def _gate(module: nn.Module, caller: str, wanted: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The first of the wanted gates that the module's cell has, and all of its gates that have a bias. TypeError if the
    cell has none of them, or if module is not recurrent."""
    known, of = {"f": "LSTM or LSTMCell", "z": "GRU or GRUCell"}, " or ".join(wanted)
    kinds = " or ".join(known[gate] for gate in wanted if gate in known)
    expected = f"an {kinds} of seqcells or torch.nn, or of another cell with a gate {of}"
    if not kinds:
        expected = f"a module of seqcells or torch.nn whose cell has a gate {of}"
    cell = weights.cell_of(module, caller, expected)
    gates = tuple(gate for gate in cell.gates if gate in cell.biased)
    for gate in wanted:
        if gate in gates:
            return gate, gates
    error = checks.wrong(f"{caller}: module", expected, module)
    raise TypeError(f"{error}, whose gates are {', '.join(cell.gates)}")


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda like: torch.full_like(like, value)


def _set(module: M, gates: dict[str, Callable[[Tensor], Tensor]]) -> M:
    """Set biases. gates: for each gate, a function from its old bias [H] to the new one."""
    if not module.bias:
        raise ValueError(f"this {type(module).__name__} has no bias to set (bias=False)")
    cell = weights.cell_of(module, "", "")
    order = {  # the gates of the blocks of rows
        "bias_ih": [gate for gate in cell.x_gates if gate in cell.biased],
        "bias_hh": [gate for gate in cell.u_gates if gate in cell.biased],
    }
    values: dict[str, Tensor] = {}
    shapes = weights.shapes(module)
    for suffix in weights.suffixes(module):
        new = {
            part: checks.parameter(module, part + suffix, shapes[part]).detach().clone()
            for part, there in order.items()
            if there
        }
        for gate, make in gates.items():
            blocks = [new[part].chunk(len(of))[of.index(gate)] for part, of in order.items() if gate in of]
            blocks[0].copy_(make(blocks[0]))
            for block in blocks[1:]:
                block.zero_()
        values |= {part + suffix: value for part, value in new.items()}
    weights.assign(module, values)
    return module

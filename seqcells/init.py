"""Initialisers for gates. Like torch.nn.init's they work in place, without gradient, and return what they were given.

All take seqcells' modules and torch.nn's, every layer and direction of them, and set only the biases of the gates they
name: the sum bias_ih + bias_hh, as all of it in bias_ih and zero in bias_hh. Weights and other biases stay. A gate is
known by its name in the cell: i f g o of an LSTM, r z n of a GRU; modules of any cell with such gates are taken.
(Whether a gate keeps the state near 1 or near 0 is up to the cell: with h + f * (n - h) it is a negative bias of f that
remembers.) All raise TypeError for a module of another kind, or whose cell has no such gate, and ValueError for one
without bias. For a model:

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
    """Set the bias of the forget gates f of module (LSTM, say) to value, so that it remembers from the start.

        >>> lstm = seqcells.init.forget_bias_(seqcells.LSTM(10, 20))
        >>> lstm.bias_ih_l0[20:40].unique().item()
        1.0

    Gers, Schmidhuber and Cummins 2000, "Learning to forget"; Jozefowicz, Zaremba and Sutskever 2015, "An empirical
    exploration of recurrent network architectures", who find 1 to be what a plain LSTM lacks.
    """
    _gate(module, "forget_bias_", ("f",))
    checks.number("value", value)
    return _set(module, {"f": _filled(value)})


def chrono_(module: M, max_length: float, *, generator: torch.Generator | None = None) -> M:
    """Chrono initialisation: memories of module (LSTM, GRU) last from 1 to max_length steps, spread over the units.

    LSTM: b_f = log(u), b_i = -b_f, with u from U(1, max_length - 1) for each unit. GRU: b_z = log(u), since z, in
    torch's h' = (1 - z) n + z h, keeps the state; the paper's z is 1 - z. Another cell: as an LSTM if it has a gate f,
    with b_i only if it has a gate i; else as a GRU. max_length: the longest dependency expected, more than 2, else
    ValueError. generator: on the module's device.

    Tallec and Ollivier 2018, "Can recurrent neural networks warp time?", arXiv:1804.11188.
    """
    keeper, gates = _gate(module, "chrono_", ("f", "z"))
    checks.number("max_length", max_length)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise checks.wrong("generator", "a torch.Generator or None", generator)
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
    """Make module (LSTM, GRU) start as an accumulator: it forgets nothing and each step adds a little to the state.

    keep: the bias of the gate that keeps the state: an LSTM's forget gate (14 if None), a GRU's z (8 if None). add: the
    bias of an LSTM's input gate (-9 if None); a GRU has none, 1 - z is what it adds by, so ValueError. Of another cell:
    its gates f and i, if it has both, else f or z, which is then 1 minus what it adds by.

    A step then adds about sigmoid(add) (a GRU: sigmoid(-keep)) times the candidate: so little that the state stays
    where tanh is linear, and sums stay sums. The model has to multiply its output back up. Counting the ones in strings
    of 64, right up to length 127, is learnt with these: LSTM, 8 units, 14 and -9, output times 1500; GRU, 16 units, 8,
    times 300. For remembering a symbol over a hundred steps, 6 and -3 (LSTM) and 4 (GRU). See seqcells/tasks/
    count_ones_regression.py and temporal_order.py; what comes of it is in benchmarks/results/tasks-cpu.md.
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


def _gate(module: nn.Module, caller: str, wanted: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The first of the wanted gates that the module's cell has, and all of its gates that have a bias. TypeError if it
    has none of them, or is no recurrent module."""
    kinds = " or ".join({"f": "LSTM or LSTMCell", "z": "GRU or GRUCell"}[gate] for gate in wanted)
    expected = f"an {kinds} of seqcells or torch.nn, or of another cell with a gate {' or '.join(wanted)}"
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
    """gates: the new bias by gate, made from the old one, [H]."""
    if not module.bias:
        raise ValueError(f"this {type(module).__name__} has no bias to set (bias=False)")
    cell = weights.cell_of(module, "", "")
    order = {  # of the blocks of rows
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

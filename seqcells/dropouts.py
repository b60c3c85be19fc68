"""Dropout inside the recurrence: the options of layers.

    weight_dropout      of the recurrent weights, one mask for a call (Merity et al. 2018, arXiv:1708.02182)
    recurrent_dropout   of what every recurrent product reads, one mask for a sequence (Gal & Ghahramani 2016,
                        arXiv:1512.05287)
    candidate_dropout   of the new values that a step adds to its state, a mask for each step (Semeniuta et al. 2016,
                        arXiv:1603.05118): where a cell has `dropout=` (see `seqcells.cell`)
    zoneout             units keep their state of the step before, a mask for each step (Krueger et al. 2017,
                        arXiv:1606.01305); outside training a state is the mean of old and new

All but the first run a cell with masks in place of the layer's cell: see `drawn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cell import Cell, constant_to_compilers, get
from .drawn import CANDIDATE, RECURRENT, ZONEOUT, averaged, dropped, explicit
from .layer_arguments import probability

if TYPE_CHECKING:
    from .recurrent import Recurrent

OPTIONS = ("weight_dropout", "recurrent_dropout", "candidate_dropout", "zoneout")


@constant_to_compilers
def _key(cell: str, kinds: tuple[str, ...], kept: tuple[float, ...]) -> str:
    if kept:
        return averaged(get(cell), kept).key
    made = dropped(get(cell), kinds)
    explicit(made)  # for the engines that need it: Dynamo, which calls this, would not see one that is made later
    return made.key


def draws(module: Recurrent) -> dict[str, tuple[float, float]]:
    """The masks of a layer's call in training: for each kind the probability that an element is kept, and its value."""
    found = {}
    for kind, p in ((RECURRENT, module.recurrent_dropout), (CANDIDATE, module.candidate_dropout)):
        if p:
            found[kind] = (1 - p, 1 / (1 - p) if p < 1 else 0.0)
    for state, p in zip(module.cell.states, _zoneouts(module), strict=True):
        if p:
            found[f"{ZONEOUT} {state}"] = (1 - p, 1.0)
    return found


def _zoneouts(module: Recurrent) -> tuple[float, ...]:
    """The probability of each state."""
    given = module.zoneout
    return given if isinstance(given, tuple) else (given,) * len(module.cell.states)


def of_call(module: Recurrent, x: Tensor) -> tuple[Cell, Tensor | None]:
    """The cell that a layer's call runs, and, in training, the tensor dropout of each layer [L, 2 + 2*M].

    The seeds are drawn from torch's generator on the device of x.
    """
    if not module.training:
        return get(_key(module.cell.key, (), _zoneouts(module))), None
    masks, layers = draws(module), module.num_layers
    dtype = torch.promote_types(x.dtype, torch.float32)
    seeds = (torch.rand(layers, 2, dtype=torch.float32, device=x.device) * (1 << 24)).floor().to(dtype)
    parts = [seeds]
    for keep, value in masks.values():
        parts.append(seeds.new_full((layers, 1), keep))
        parts.append(x.new_full((layers, 1), value).to(dtype))  # rounded to the data's type, as other engines have it
    return get(_key(module.cell.key, tuple(masks), ())), torch.cat(parts, 1)


def set_up(
    module: Recurrent,
    weight_dropout: float,
    recurrent_dropout: float,
    zoneout: float | Sequence[float],
    candidate_dropout: float = 0.0,
) -> None:
    """Check a layer's options, and set them."""
    module.weight_dropout = probability("weight_dropout", weight_dropout)
    module.recurrent_dropout = probability("recurrent_dropout", recurrent_dropout)
    module.candidate_dropout = probability("candidate_dropout", candidate_dropout)
    states = module.cell.states
    if isinstance(zoneout, Sequence) and not isinstance(zoneout, str):
        if len(zoneout) != len(states):
            raise ValueError(
                f"zoneout must be one probability, or one for each of the {len(states)} states "
                f"({', '.join(states)}), got {len(zoneout)}"
            )
        each = tuple(probability(f"zoneout[{n}]", p) for n, p in enumerate(zoneout))
        module.zoneout = each if any(each) else 0.0
    else:
        module.zoneout = probability("zoneout", zoneout)
    if module.candidate_dropout and not module.cell.dropout:
        raise ValueError(
            f"candidate_dropout: the step of {module.cell.name} has no dropout mask (dropout= of seqcells.cell)"
        )
    of_h = module.zoneout[0] if isinstance(module.zoneout, tuple) else module.zoneout
    if module.proj_size and (module.recurrent_dropout or of_h):
        raise ValueError("recurrent_dropout and zoneout of h cannot be combined with proj_size")


def names(module: object) -> list[str]:
    """The options of this kind that a layer has and torch.nn's lack."""
    return [name for name in OPTIONS if getattr(module, name, 0.0)]


def of_weights(module: Recurrent, weights: Sequence[Tensor]) -> list[Tensor]:
    """A layer's parameters, the recurrent weights with dropout (Merity et al. 2018, arXiv:1708.02182)."""
    recurrent = [part == "weight_hh" for _ in module._all_weights for part in module._parts]
    return [
        nn.functional.dropout(w, module.weight_dropout) if of else w for w, of in zip(weights, recurrent, strict=True)
    ]

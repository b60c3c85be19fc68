from __future__ import annotations

from ..autograd import ENGINES, Engine
from . import layer, operators
from .derived import get as part_of

__all__ = ["part_of"]


def forward(options, save, inputs, mask):
    shown, kept, walks = layer.forward(options, save, inputs, mask)
    return shown, kept


def backward(options, inputs, mask, kept, grads, need):
    y, c, saved = kept
    kept = (y, c, saved if saved is not None and saved.dim() > 1 else None)
    return layer.backward(options, inputs, mask, kept, grads, need, None)


ENGINES["loop"] = Engine(forward, backward)

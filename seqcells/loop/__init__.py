"""The loop over time in torch operations, forward and backward by hand: an engine (see `autograd`) that runs anywhere.

The middle rung between `reference`, where autograd differentiates every step, and the kernels. A step is as few
operations as there can be (`cells`), masks are taken out before (`stretches`), and what does not depend on a
neighbouring step is done for many at once (`steps`): the derivatives of the activations, the input's product, the
weight gradients.

Two ways in: `layer`, from the input to all gradients, where nothing looks on; and the operators seqcells::loop_*, the
steps alone, for compilers and torch.func, which see the products around them.
"""

from __future__ import annotations

from .. import batching
from ..autograd import ENGINES, Engine
from . import layer, operators
from .derived import get as part_of

__all__ = ["part_of"]
ENGINES["loop"] = Engine(*operators.ALL, whole=layer.forward, whole_backward=layer.backward, exact=True)
batching.register(*operators.ALL)

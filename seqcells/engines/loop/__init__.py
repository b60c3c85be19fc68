"""The loop over time in torch operations, forward and backward by hand: an engine (see `autograd`) that runs anywhere.

It lies between `reference`, where autograd differentiates every step, and the kernels. A step is as few operations as
there can be (`cells`), resets and padding are taken out before (`stretches`), and what does not depend on a
neighbouring step is done for many at once (`steps`): the derivatives of the activations, the input's product, the
weight gradients.

`layer` and `gradients` are the engine's forward and backward, called directly, or as the `operators` that compilers
and torch.func trace. `projected` is the steps alone, in the kernels' buffers, for where a kernel fails.
"""

from __future__ import annotations

from ...autograd import ENGINES, Engine
from . import operators
from .derived import get as part_of
from .gradients import backward
from .layer import forward

__all__ = ["backward", "forward", "operators", "part_of"]
ENGINES["loop"] = Engine(forward, backward)

"""The loop over time in torch operations, with a hand-written backward: an engine (see `autograd`) for any device.

It lies between `reference`, where autograd differentiates every step, and the kernels. A step takes as few operations
as possible (`cells`). Resets and padding are removed beforehand (`stretches`). What does not depend on a neighbouring
step is done for many steps at once (`steps`): the derivatives of the activations, the input's product, the weight
gradients.

`layer` and `gradients` are the engine's forward and backward. They are called directly, or as the `operators` that
compilers and torch.func trace. `projected` runs only the steps, on the kernels' buffers, if a kernel fails.
"""

from __future__ import annotations

from ...autograd import ENGINES, Engine
from . import operators
from .derived import get as part_of
from .gradients import backward
from .layer import forward

__all__ = ["backward", "forward", "operators", "part_of"]
ENGINES["loop"] = Engine(forward, backward)

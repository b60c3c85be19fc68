"""The loop over time in torch operations, with a hand-written backward: an engine (see `autograd`) for any device.

It lies between `reference`, where autograd differentiates every step, and the kernels. A step takes as few operations
as possible (`cells`). Resets and padding are removed beforehand (`stretches`). What does not depend on a neighbouring
step is done for many steps at once (`steps`): the derivatives of the activations, the input's product, the weight
gradients.

`layer` and `gradients` are the engine's forward and backward, called directly or by the operators.
"""

from __future__ import annotations

from ...autograd import ENGINES, Engine
from .derived import get as part_of
from .gradients import backward, scan_backward
from .layer import allocate, forward, scan

__all__ = ["backward", "forward", "part_of", "scan"]
ENGINES["loop"] = Engine(forward, backward, scan, scan_backward, allocate)

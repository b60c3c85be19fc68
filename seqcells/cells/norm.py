"""Layer normalization inside a step, over one gate's units or those of several gates together."""

import torch
from torch import Tensor


def normed(*gates: Tensor, eps: float) -> list[Tensor]:
    """The gates [B, H] each, less the mean and by the standard deviation of all of them: of each row one of each."""
    mean = sum(gates[1:], gates[0]).mean(-1, keepdim=True) / len(gates)
    gates = tuple(gate - mean for gate in gates)
    squares = [gate.square() for gate in gates]
    scale = torch.rsqrt(sum(squares[1:], squares[0]).mean(-1, keepdim=True) / len(gates) + eps)
    return [gate * scale for gate in gates]

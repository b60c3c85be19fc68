"""sLSTM (Beck et al. 2024, arXiv:2405.04517): exponential gates, a normalizer n, and a stabilizer m."""

import torch

from ..cell import cell


@cell(gates="i f z o", states="h c n m", dropout="d")
def slstm(x, U, h, c, n, m, d=1):
    """sLSTM (Beck et al. 2024). After the first step of a sequence, n is at least 1, so nothing overflows."""
    i, f = x.i + U.i(h), torch.nn.functional.logsigmoid(x.f + U.f(h)) + m
    m = torch.where(n == 0, i, torch.maximum(f, i))
    i, f = torch.exp(i - m), torch.exp(torch.clamp(f - m, max=0))
    c = f * c + i * d * torch.tanh(x.z + U.z(h))
    n = f * n + i
    return torch.sigmoid(x.o + U.o(h)) * c / n, c, n, m

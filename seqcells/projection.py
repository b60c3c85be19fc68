"""An LSTM with a projection (Sak et al. 2014, arXiv:1402.1128), computed by one without, so it needs no kernels.

With m the LSTM's o * tanh(c), the projected state is h = m W_hr^T, and so the recurrent product h U^T is m (U W_hr)^T:
an LSTM over m with recurrent weights U W_hr, [G*H, H], whose outputs are projected all at once. Only the given h0 is
not the projection of an m; its product with U enters the first step as part of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .dispatch import Call, Result, ScanOptions

Weights = Sequence["Tensor | None"]


def scan(run: Callable[[Call], Result], call: Call, options: ScanOptions) -> Result:
    """The scan of an LSTM with a projection. run: the scan of an LSTM without one."""
    x, (h0, c0), groups = call.x, call.states, call.groups
    plain = unprojected(groups)
    if h0 is not None:
        h0 = h0.reshape(len(groups), x.shape[1], h0.shape[-1])
        x, plain = with_start(x, h0, groups, plain, options.reverse, options.resets, options.lengths)
    y, (m, c), every = run(call._replace(x=x, states=(None, c0), groups=plain, stacked=None))
    hn, y = project_final(m, groups, h0, options.lengths), project(y, groups)
    return y, (hn, c), None if every is None else (y, *every[1:])


def unprojected(groups: Sequence[Weights]) -> list[Weights]:
    """w_ih, w_hh, b_ih, b_hh of the LSTMs over m, from w_ih, w_hh, b_ih, b_hh, w_hr."""
    found: list[Weights] = []
    for w_ih, w_hh, b_ih, b_hh, w_hr in groups:
        assert w_hh is not None and w_hr is not None
        found.append((w_ih, w_hh @ w_hr, b_ih, b_hh))
    return found


def with_start(
    x: Tensor,
    h0: Tensor,
    groups: Sequence[Weights],
    plain: list[Weights],
    reverse: Sequence[bool],
    resets: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, list[Weights]]:
    """x [T, B, I + K*P] with extra columns for each group's h0 at its first step, and the weights for it."""
    T, B, K = *x.shape[:2], len(groups)
    last = torch.full((B,), T - 1, device=x.device) if lengths is None else (lengths - 1).clamp(min=0)
    columns = [x]
    for k in range(K):
        first = last if reverse[k] else torch.zeros_like(last)
        start = h0[k]
        if resets is not None and not reverse[k]:  # a reset at the first step: h0 is not used
            start = start.masked_fill(resets[0, :, None], 0)
        here = torch.arange(T, device=x.device)[:, None] == first
        columns.append(start.masked_fill(~here[..., None], 0))
    found: list[Weights] = []
    for k, (w_ih, *rest) in enumerate(plain):
        u = groups[k][1]
        assert w_ih is not None and u is not None
        own = [u if j == k else torch.zeros_like(u) for j in range(K)]
        found.append((torch.cat([w_ih, *own], 1), *rest))
    return torch.cat(columns, 2), found


def project(y: Tensor, groups: Sequence[Weights]) -> Tensor:
    """Project m [T, B, K*H] to h [T, B, K*P]."""
    projections = [w_hr for *_, w_hr in groups if w_hr is not None]
    return torch.cat([m @ w.t() for m, w in zip(y.chunk(len(groups), 2), projections, strict=True)], 2)


def project_final(m: Tensor, groups: Sequence[Weights], h0: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Project the final m [K, B, H] to h_n [K, B, P]. For a row without steps, h_n is h0."""
    projections = [w_hr for *_, w_hr in groups if w_hr is not None]
    h = torch.stack([m[k] @ w.t() for k, w in enumerate(projections)])
    return h if h0 is None or lengths is None else torch.where((lengths > 0)[:, None], h, h0)

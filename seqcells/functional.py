"""One layer as a function: lstm(), gru(), rnn(), scan(), scan_groups().

Shapes: x [T, B, I]; states [B, H]; w_ih [G*H, I]; w_hh [G*H, H]; b_ih, b_hh [G*H] or None; resets bool [T, B];
lengths int [B]; y [T, B, H].
G is the number of gates, in torch's order: 4 for LSTM (i f g o), 3 for GRU (r z n), 1 for RNN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments, backends, checks, dispatch, drawn, extras
from .arguments import NAMES
from .cell import Cell, named
from .dispatch import ScanOptions
from .engines import aten, operators
from .precisions import autocast


def _missing(spec: Cell) -> Sequence[str]:
    """The weights that the cell lacks."""
    return () if 0 not in spec.rows else [name for name, n in zip(NAMES, spec.rows, strict=True) if not n]


def run(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    groups: Sequence[aten.Weights],
    options: ScanOptions,
    stacked: aten.Weights | None = None,
    params: Sequence[Mapping[str, Tensor] | None] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> dispatch.Result:
    """A scan of one layer: y [T, B, K*H], final states [K, B, H], and, if options.all_states, the states after each
    step [T, B, K*H].

    x [T, B, I] or [T, B, K, I]; states [K, B, H], of one group also [B, H]; groups, stacked: see `dispatch.Call`;
    params: of each group; inputs: see `scan`.
    """
    given = (None,) * len(cell.states) if states is None else tuple(states)
    if len(given) != len(cell.states):
        count = len(cell.states)
        raise RuntimeError(f"states: {cell.name} has {count} state{'s' * (count > 1)}, got {len(given)}")
    if not cell.rows[0]:
        groups, stacked = [(x.new_empty(0, x.shape[-1]), *weights[1:]) for weights in groups], None
    if torch._C._is_any_autocast_enabled() and backends.autocasting(x.device):
        x, given, groups, (params, inputs) = autocast(cell.key, x, given, groups, (params, inputs), options.one_step)
        with torch.autocast(x.device.type, enabled=False):
            return run(cell, x, given, groups, options, None, params, inputs)
    arguments.fit(x, given, groups, cell.rows)
    H = arguments.hidden_size(cell, groups[0], given, params, inputs)
    if not cell.rows[0]:
        given = aten.starts(x, given, groups, H)  # which say what H is
    vectors = beside = None
    if cell.params or params or cell.inputs or inputs:
        vectors, beside = extras.params(cell, params, x, H), extras.inputs(cell, inputs, x, H, options.lengths)
    tensors = (*given, *(t for weights in groups for t in weights), vectors, beside)
    projection = groups[0][4] if len(groups[0]) == 5 else None
    kind = (0 if projection is None else projection.shape[0], 1, 1, False)
    case = dispatch.case_of(cell, x, dispatch.survey(x, tensors), options, H, kind=kind)
    choice = dispatch.choose(case)
    x, given, options, mask = dispatch.prepared(case, choice, x, given, options)
    return dispatch.execute(
        cell, dispatch.Call(x, given, groups, stacked, vectors, beside, mask), options, case, choice
    )


def scan(
    cell: str | Cell,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    w_ih: Tensor | None,
    w_hh: Tensor | None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    resets: Tensor | Sequence[object] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates",
    backend: str | None = None,
    precision: str | None = None,
    return_states: bool = False,
    dropout: Tensor | None = None,
) -> tuple[Any, ...]:  # as many as return_states asks for
    """Run a cell over all steps of x. Returns (y, final states [B, H]). For shapes see the module.

    cell: "lstm", "gru", "gru_before", "rnn_tanh", "rnn_relu", or a custom cell (see `cell`), itself or by its name.
    states: (h0,) or (h0, c0), as many as the cell has. None, as a whole or for one state, means zeros.
    w_ih, b_ih: for the gates whose x the cell reads. w_hh, b_hh: for the gates whose U it uses. w_ih or w_hh is None if
    the cell has no such gate. The biases have rows only for gates that have a bias.
    params: the cell's trained vectors by name, each [H], scalars [1]. inputs: its per-step inputs by name, each [T, B]
    or [T, B, H].
    Options:
    resets: [T, B], bool or the numbers 0 and 1, or nested lists of them. Where set, a new episode begins at that step:
    no state crosses from the step before it. (On a GPU, numbers other than 0 count as 1; on the CPU they raise.)
    lengths: int [B], or a list: the number of steps of each row. Outputs at padding are zero, and the final states are
    those after each row's last step. Padding may have any values.
    save: what the triton backend saves for backward: "gates", or "states" (LSTM: a third of the memory; one more GEMM).
    backend: see seqcells.backends. None: the context's backend, else "auto".
    precision: the precision of float32 recurrent products on the triton backend: "ieee" (full float32), "tf32"
    (operands rounded to nearest, to 11 bits), or "tf32x3" (three TF32 products for nearly float32's precision; NVIDIA
    only). None: "tf32" or "ieee", by PyTorch's settings for RNNs on CUDA. Other dtypes and backends ignore it. So do
    the large products outside the recurrence, which follow PyTorch's settings for matrix products.
    return_states: also return, as a third result, the states after each step, each [T, B, H].
    dropout: what a cell with dropout masks draws them from (see `seqcells.drawn`). Layers make both.

    Under autocast, tensors are cast to the dtype of torch.nn's results: autocast's dtype, or, for a GRU and for one
    step of an LSTM on the CPU, the dtype of the state. Do not change y in place before backward has used it; backward
    then raises.

    Raises RuntimeError, ValueError or TypeError, as torch.nn, for wrong shapes, dtypes and devices.

        >>> x, w_ih, w_hh = torch.randn(5, 3, 10), torch.randn(4 * 20, 10), torch.randn(4 * 20, 20)
        >>> y, (h_n, c_n) = seqcells.functional.scan("lstm", x, None, w_ih, w_hh, resets=torch.rand(5, 3) < 0.1)
        >>> y.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """
    spec = named(cell)
    weights = {"w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
    arguments.types(x, states, weights, missing=_missing(spec))
    checks.boolean("return_states", return_states)
    masked: tuple[Tensor | None, Tensor | None] = (None, None)
    if resets is not None or lengths is not None:
        masked = arguments.resets(resets, x.shape[:2], x.device), arguments.lengths(lengths, x.shape[:2], x.device)
    arguments.options(backend, precision, save)
    options = ScanOptions(*masked, save=save, backend=backend, precision=precision, all_states=return_states)
    if dropout is not None or spec.drawn:
        options = options._replace(dropout=drawn.checked(spec, dropout))
    vectors = None if params is None else [params]
    y, final, every = run(spec, x, states, [(w_ih, w_hh, b_ih, b_hh)], options, None, vectors, inputs)
    final = tuple(s[0] for s in final)
    return (y, final, every) if return_states else (y, final)


def scan_groups(
    cell: str | Cell,
    x: Tensor,
    states: tuple[Tensor | None, ...] | None,
    w_ih: Tensor | None,
    w_hh: Tensor | None,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reverse: Sequence[bool] = (),
    params: Mapping[str, Tensor] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    resets: Tensor | Sequence[object] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates",
    backend: str | None = None,
    precision: str | None = None,
    return_states: bool = False,
) -> tuple[Any, ...]:  # as many as return_states asks for
    """Run K independent scans of one cell; on the triton backend, in one launch.

    Returns (y [T, B, K*H], final states [K, B, H]), and with return_states the states after each step, each
    [T, B, K*H].

    For the two directions of a layer: x [T, B, I] and reverse (False, True); y is then that of torch.nn, with forward
    before backward. For heads (a block-diagonal recurrence): x [T, B, K, I].
    w_ih [K, G*H, I], w_hh [K, G*H, H], b_ih, b_hh [K, G*H], params [K, H], scalars [K, 1], states [K, B, H]. reverse:
    for each group, whether it runs from the last step to the first. Default: (), none.
    cell, inputs, resets, lengths, save, backend, precision and errors: as in `scan`.

        >>> x, w_ih, w_hh = torch.randn(5, 3, 10), torch.randn(2, 3 * 20, 10), torch.randn(2, 3 * 20, 20)
        >>> y, (h_n,) = seqcells.functional.scan_groups("gru", x, None, w_ih, w_hh, reverse=(False, True))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """
    spec, weights = named(cell), (w_ih, w_hh, b_ih, b_hh)
    arguments.types(x, states, dict(zip(NAMES, weights, strict=True)), rank=None, missing=_missing(spec))
    checks.boolean("return_states", return_states)
    ranks = [t.dim() for t in (w_ih, w_hh) if t is not None]
    if ranks != [3] * len(ranks):
        raise RuntimeError(f"w_ih and w_hh must have 3 dimensions, got {' and '.join(map(str, ranks))}")
    if not isinstance(reverse, (tuple, list)):
        raise checks.wrong("reverse", "a tuple of bools", reverse)
    for k, flag in enumerate(reverse):
        checks.boolean(f"reverse[{k}]", flag)
    K = next((len(t) for t in (w_hh, w_ih) if t is not None), len(reverse) or 1)
    flags = tuple(reverse) or (False,) * K
    if len(flags) != K:
        raise ValueError(f"reverse must have one value for each of {K} groups, got {len(flags)}")
    given = () if states is None else tuple(states)
    vectors = {f"params[{name!r}]": t for name, t in params.items()} if isinstance(params, Mapping) else {}
    for name, t in (*zip((*NAMES, *("states",) * len(given)), (*weights, *given), strict=True), *vectors.items()):
        rank = 2 if name.startswith(("b_", "params")) else 3
        if isinstance(t, Tensor) and t.dim() != rank:
            raise RuntimeError(f"{name} must have {rank} dimensions, got {t.dim()}")
        if isinstance(t, Tensor) and t.shape[0] != K:
            raise RuntimeError(f"{name} must have {K} groups, got {t.shape[0]}")
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[2] != K):
        raise RuntimeError(f"input must have shape (T, B, I) or (T, B, {K}, I), got {tuple(x.shape)}")
    groups = [tuple(None if t is None else t[k] for t in weights) for k in range(K)]
    if any(flags) and K > operators.MOST:
        raise ValueError(f"at most {operators.MOST} groups where some are reversed, got {K}")
    masked = arguments.resets(resets, x.shape[:2], x.device), arguments.lengths(lengths, x.shape[:2], x.device)
    arguments.options(backend, precision, save)
    options = ScanOptions(*masked, flags, save, backend, precision, return_states)
    own: list[Mapping[str, Tensor]] | None = None
    if isinstance(params, Mapping):
        own = [{n: t[k] if isinstance(t, Tensor) else t for n, t in params.items()} for k in range(K)]
    elif params is not None:
        own = [params]
    y, final, every = run(spec, x, states, groups, options, weights, own, inputs)
    return (y, final, every) if return_states else (y, final)


def lstm(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, *, resets: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates", backend: str | None = None, precision: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Apply one layer of an LSTM to x [T, B, I]. Returns y [T, B, H] and (h_n, c_n), each [B, H].

    hx: (h0, c0), each [B, H], or None (zeros). w_ih [4*H, I], w_hh [4*H, H]; b_ih, b_hh [4*H] or None (zeros). resets,
    lengths, save, backend, precision and errors: see `scan`.

        >>> lstm = torch.nn.LSTM(10, 20)
        >>> y, (h_n, c_n) = seqcells.lstm(torch.randn(5, 3, 10), None, *lstm.parameters())
        >>> y.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """
    if hx is not None:
        checks.tensors("hx", hx, "a tuple of two tensors (h0, c0) or None", 2, optional=True)
    options: Any = {"resets": resets, "lengths": lengths, "save": save, "backend": backend, "precision": precision}
    y, final = scan("lstm", x, hx, w_ih, w_hh, b_ih, b_hh, **options)
    return y, (final[0], final[1])


def gru(
    x: Tensor, hx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    *, reset_after: bool = True, resets: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates", backend: str | None = None, precision: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply one layer of a GRU to x [T, B, I]. Returns y [T, B, H] and h_n [B, H].

    hx: h0 [B, H], or None (zeros). w_ih [3*H, I], w_hh [3*H, H]; b_ih, b_hh [3*H] or None (zeros). reset_after: True
    for torch's and cuDNN's form, False for that of Cho et al. 2014 v3. resets, lengths, save, backend, precision and
    errors: see `scan`.

        >>> gru = torch.nn.GRU(10, 20)
        >>> y, h_n = seqcells.gru(torch.randn(5, 3, 10), None, *gru.parameters(), lengths=[5, 4, 2])
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """
    checks.boolean("reset_after", reset_after)
    checks.tensor("hx", hx, optional=True)
    cell = "gru" if reset_after else "gru_before"
    options: Any = {"resets": resets, "lengths": lengths, "save": save, "backend": backend, "precision": precision}
    y, final = scan(cell, x, (hx,), w_ih, w_hh, b_ih, b_hh, **options)
    return y, final[0]


def rnn(
    x: Tensor, hx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    *, nonlinearity: str = "tanh", resets: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None,
    save: str = "gates", backend: str | None = None, precision: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply one layer of an Elman RNN to x [T, B, I]. Returns y [T, B, H] and h_n [B, H].

    hx: h0 [B, H], or None (zeros). w_ih [H, I], w_hh [H, H]; b_ih, b_hh [H] or None (zeros). nonlinearity: "tanh" or
    "relu". resets, lengths, save, backend, precision and errors: see `scan`.

        >>> rnn = torch.nn.RNN(10, 20, nonlinearity="relu")
        >>> y, h_n = seqcells.rnn(torch.randn(5, 3, 10), None, *rnn.parameters(), nonlinearity="relu")
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """
    checks.tensor("hx", hx, optional=True)
    options: Any = {"resets": resets, "lengths": lengths, "save": save, "backend": backend, "precision": precision}
    y, final = scan(rnn_cell_name(nonlinearity), x, (hx,), w_ih, w_hh, b_ih, b_hh, **options)
    return y, final[0]


def rnn_cell_name(nonlinearity: str) -> str:
    """The kernels' name for the cell. ValueError, with torch's message, for anything but "tanh" and "relu"."""
    if not isinstance(nonlinearity, str) or nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"

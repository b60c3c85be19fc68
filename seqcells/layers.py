"""LSTM, GRU, RNN: torch.nn's modules of those names over whole sequences, with resets and a choice of backend.

One layer, one direction, no projection so far: num_layers, bidirectional, proj_size and PackedSequence other than
torch's defaults raise NotImplementedError. Not subclasses of torch.nn's classes, which torch.compile refuses by design.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional, reference


class _Layer(nn.Module):
    """Parameters as torch.nn names them: weight_ih_l0 [G*H, I], weight_hh_l0 [G*H, H], bias_ih_l0, bias_hh_l0 [G*H]."""

    cell: str
    bias_ih_l0: nn.Parameter | None
    bias_hh_l0: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        save: str = "gates",
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self._check_options(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        if save not in functional.SAVES:
            raise ValueError(f"unknown save {save!r}: expected one of {', '.join(functional.SAVES)}")
        functional.check_precision(precision)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.backend = backend
        self.save = save
        self.precision = precision
        rows = reference.get(self.cell).gates * hidden_size
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, input_size, **place))
        self.weight_hh_l0 = nn.Parameter(torch.empty(rows, hidden_size, **place))
        self.register_parameter("bias_ih_l0", nn.Parameter(torch.empty(rows, **place)) if bias else None)
        self.register_parameter("bias_hh_l0", nn.Parameter(torch.empty(rows, **place)) if bias else None)
        self.reset_parameters()

    def _check_options(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
    ) -> None:
        """torch.nn's checks in its words and order, then what is not there yet."""
        if not isinstance(dropout, numbers.Number) or not 0 <= dropout <= 1 or isinstance(dropout, bool):
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last "
                "recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and "
                f"num_layers={num_layers}",
                stacklevel=4,
            )
        for name, flag in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero")
        if num_layers <= 0:
            raise ValueError("num_layers must be greater than zero")
        if proj_size and self.cell != "lstm":
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        for name, value, only in (
            ("num_layers", num_layers, 1),
            ("bidirectional", bidirectional, False),
            ("proj_size", proj_size, 0),
        ):
            if value != only:
                raise NotImplementedError(f"{type(self).__name__}: only {name}={only} is supported so far, got {value}")

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing: the kernels read each parameter where it is."""

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        shown: dict[str, Any] = {"bias": True, "batch_first": False, "dropout": 0.0, "reset_after": True}
        shown |= {"nonlinearity": "tanh", "backend": None, "save": "gates", "precision": None}
        for name, default in shown.items():
            if getattr(self, name, default) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text

    def _run(
        self, input: Tensor, states: tuple[Tensor, ...] | None, resets: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if isinstance(input, PackedSequence):
            raise NotImplementedError(f"{type(self).__name__}: PackedSequence is not supported so far; pad the batch")
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        self._check_states(states, batched)
        x = input
        if not batched:
            x = input[:, None]
            resets = resets[:, None] if resets is not None and resets.dim() == 1 else resets
            states = None if states is None else tuple(s[:, None] for s in states)
        elif self.batch_first:
            x = input.transpose(0, 1)
            resets = resets.transpose(0, 1) if resets is not None and resets.dim() == 2 else resets
        if states is not None:
            expected = (1, x.shape[1], self.hidden_size)
            for i, s in enumerate(states):
                if s.shape != expected:
                    name = f"hidden[{i}]" if len(states) == 2 else "hidden"
                    raise RuntimeError(f"Expected {name} size {expected}, got {list(s.shape)}")
            states = tuple(s[0] for s in states)
        y, final = functional.run(
            self.cell,
            x,
            states,
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0,
            self.bias_hh_l0,
            resets=resets,
            save=self.save,
            backend=self.backend,
            precision=self.precision,
        )
        if not batched:
            return y[:, 0], tuple(s[:, 0] for s in final)
        return (y.transpose(0, 1) if self.batch_first else y), final

    @staticmethod
    def _check_states(states: tuple[Tensor, ...] | None, batched: bool) -> None:
        if states is None:
            return
        rank, shape = (3, "batched 3-D") if batched else (2, "unbatched 2-D")
        if any(s.dim() != rank for s in states):
            names = "hx and cx" if len(states) == 2 else "hx"
            got = f"({states[0].dim()}-D, {states[1].dim()}-D) tensors" if len(states) == 2 else None
            raise RuntimeError(
                f"For {shape} input, {names} should also be {rank}-D but got {got or f'{states[0].dim()}-D tensor'}"
            )


class LSTM(_Layer):
    """torch.nn.LSTM with resets= and backend= (see seqcells.backends), save= and precision= (see functional.scan).

    input [T, B, I] ([B, T, I] with batch_first, [T, I] unbatched); hx (h_0, c_0), each [1, B, H] ([1, H]); resets bool
    [T, B] ([B, T], [T]): where set, the states before that step are zero. Returns output, (h_n, c_n).
    """

    cell = "lstm"

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if hx is not None and len(hx) != 2:
            raise RuntimeError(f"LSTM expects hx to be two tensors (h_0, c_0), got {len(hx)}")
        y, (h, c) = self._run(input, None if hx is None else tuple(hx), resets)
        return y, (h, c)


class GRU(_Layer):
    """torch.nn.GRU with resets=, backend=, save= and precision= (see LSTM), and reset_after=.

    reset_after: True is torch's and cuDNN's form; False applies the reset to h before the product (Cho et al. 2014,
    arXiv:1406.1078 v1). hx [1, B, H] ([1, H] unbatched). Returns output, h_n.
    """

    def __init__(self, *args: Any, reset_after: bool = True, **options: Any) -> None:
        self.cell = "gru" if reset_after else "gru_before"
        if len(args) > 7 or "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(*args, **options)
        self.reset_after = reset_after

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, (h,) = self._run(input, None if hx is None else (hx,), resets)
        return y, h


class RNN(_Layer):
    """torch.nn.RNN with resets=, backend=, save= and precision= (see LSTM).

    nonlinearity: "tanh" or "relu"; the fourth argument, as in torch. hx [1, B, H] ([1, H] unbatched).
    Returns output, h_n.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **options: Any,
    ) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self.cell = functional.rnn_cell_name(nonlinearity)
        super().__init__(input_size, hidden_size, num_layers, *args, **options)
        self.nonlinearity = nonlinearity

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, (h,) = self._run(input, None if hx is None else (hx,), resets)
        return y, h

"""LSTMCell, GRUCell, RNNCell: torch.nn's modules of those names, with a choice of backend and of the GRU's form.

They are subclasses of torch.nn's cells, of which they take nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.types import Device

from . import arguments, backends, checks, functional, modules, plain, reference

# As torch's matrix product names dtypes in its errors.
_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}


class _Cell(modules.Module, nn.RNNCellBase):
    """One step. weight_ih [G*H, I], weight_hh [G*H, H], bias_ih and bias_hh [G*H], all U(-1/sqrt(H), 1/sqrt(H))."""

    cell: str
    bias_ih: nn.Parameter | None  # type: ignore[assignment]
    bias_hh: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        precision: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            checks.integer(name, size, bools=True)
            if size < 0:
                raise RuntimeError(f"{name} must not be negative, got {size}")  # as torch.empty does, for torch.nn
        if not isinstance(bias, int):  # 0 and 1 are fine, as in torch.nn's cells
            checks.boolean("bias", bias)
        checks.device(device, optional=True)
        checks.dtype(dtype, optional=True)
        arguments.options(backend, precision, cell=self.cell)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.backend = backend
        self.precision = precision
        rows = reference.get(self.cell).rows[1] * hidden_size
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **place))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, **place))
        self.register_parameter("bias_ih", nn.Parameter(torch.empty(rows, **place)) if bias else None)
        self.register_parameter("bias_hh", nn.Parameter(torch.empty(rows, **place)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        if self.bias is not True:
            text += f", bias={self.bias}"
        if getattr(self, "nonlinearity", "tanh") != "tanh":
            text += f", nonlinearity={self.nonlinearity}"
        if getattr(self, "reset_after", True) is not True:
            text += f", reset_after={self.reset_after}"
        for name in ("backend", "precision"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text

    def _check(self, input: Any, states: Any) -> None:
        """Raise what is wrong with a call beside what `_step` sees itself."""
        rows = reference.get(self.cell).rows[1] * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, self.input_size)}
        shapes |= {"weight_hh": (rows, self.hidden_size)}
        arguments.step(self, shapes | ({"bias_ih": (rows,), "bias_hh": (rows,)} if self.bias else {}), input, states)

    def _step(self, input: Tensor, states: tuple[Tensor, ...] | None, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        kind, rank = type(self).__name__, input.dim()
        if rank not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {rank}D instead")
        if states is not None and len(states) != len(names):
            raise TypeError(f"{kind}: expected hx to be {len(names)} tensors, got {len(states)}")
        for name, s in zip(names, states or (), strict=False):
            if s.dim() not in (1, 2):
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {s.dim()}D instead")
        batched = rank == 2
        x = input if batched else input[None]
        if states is not None and not batched:
            states = tuple(s[None] for s in states)
        if x.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}")
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        dtype = weights[0].dtype
        for t in (x, *(states or ())):
            if t.dtype != dtype and not backends.autocasting(x.device):
                got = f"{_NAMES.get(t.dtype, t.dtype)} and {_NAMES.get(dtype, dtype)}"
                raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {got}")
        for i, s in enumerate(states or ()):
            if s.dim() != 2 or s.shape[0] != x.shape[0]:
                raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{i} batch size {s.shape[0]}")
            if s.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{i} has inconsistent hidden_size: got {s.shape[1]}, expected {self.hidden_size}"
                )
        final = plain.step(self.cell, x, states, weights, self.backend)
        if final is None:
            how = functional.How(backend=self.backend, precision=self.precision, one_step=True)
            _, final, _ = functional.run(self.cell, x[None], states, [weights], how)
            # [1, B, H] from those without an operator for one step; copied, since no view can be detached in place.
            final = tuple(s[0].clone() if s.dim() == 3 else s for s in final)
        elif not final[0].is_cpu:  # x is: torch's own step takes weights on the meta device, too
            self._check(x, states)
        return final if batched else tuple(s[0] for s in final)


class LSTMCell(_Cell, nn.LSTMCell):
    """Apply one step of a long short-term memory (LSTM) cell.

    It is :class:`torch.nn.LSTMCell` with the same arguments, parameters and results, and with ``backend`` and
    ``precision``.

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        bias: If ``False``, there are no ``bias_ih`` and ``bias_hh``. Default: ``True``
        device: The device of the parameters. Default: ``None``, torch's
        dtype: The dtype of the parameters. Default: ``None``, torch's
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, what
            :func:`seqcells.backend` says, else "auto"
        precision: How the kernels multiply in float32: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, by PyTorch's switches for its own RNNs

    Inputs and outputs are described at :meth:`forward`.

    Attributes:
        weight_ih: The input weights, [4*H, I].
        weight_hh: The recurrent weights, [4*H, H].
        bias_ih, bias_hh: The biases, [4*H].

    Gates are in the order i, f, g, o. All are drawn from U(-1/sqrt(H), 1/sqrt(H)), and the same seed gives torch.nn's
    values.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.nn.LSTMCell does, for arguments of a wrong type or value.

    Example::

        >>> cell = seqcells.LSTMCell(10, 20)
        >>> x, h, c = torch.randn(5, 3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> for step in x:
        ...     h, c = cell(step, (h, c))
        >>> h.shape
        torch.Size([3, 20])
    """

    cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, backend, precision)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            input: [B, I], or [I] without a batch.
            hx: The states before the step (h, c), each [B, H], or [H] without a batch. Default: ``None``, zeros

        Returns:
            The states after the step, h and c, in the shape of ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn.LSTMCell does, for types, shapes, dtypes and devices that
                do not fit.
        """
        # Whether torch.fx traces. Asked in line, for every call pays for it.
        known = type(input) is Tensor and (hx is None or (type(hx) is tuple and hx and type(hx[0]) is Tensor))
        if not known and (call := self._traced(input, hx)) is not None:
            return call  # type: ignore[return-value]
        if hx is not None and not isinstance(hx, (tuple, list)):
            raise TypeError(f"LSTMCell: expected hx to be a tuple of two tensors (h, c), got {checks.kind(hx)}")
        # Whether an argument is to blame is asked after a failure: before each step it would cost.
        try:
            h, c = self._step(input, hx, ("hx[0]", "hx[1]"))
        except checks.FAILURES as error:
            raise checks.clearer(error, self._check, input, hx) from None
        return h, c

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]: ...


class _OneState(_Cell):
    """A cell whose only state is its output."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step.

        Args:
            input: [B, I], or [I] without a batch.
            hx: The state before the step, [B, H], or [H] without a batch. Default: ``None``, zeros

        Returns:
            The state after the step, in the shape of ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn does, for types, shapes, dtypes and devices that do not
                fit.
        """
        known = type(input) is Tensor and (hx is None or type(hx) is Tensor)
        if not known and (call := self._traced(input, hx)) is not None:
            return call  # type: ignore[return-value]
        states = None if hx is None else (hx,)
        try:
            return self._step(input, states, ("hidden",))[0]
        except checks.FAILURES as error:
            raise checks.clearer(error, self._check, input, states) from None

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class GRUCell(_OneState, nn.GRUCell):
    """Apply one step of a gated recurrent unit (GRU) cell.

    It is :class:`torch.nn.GRUCell` with the same arguments, parameters and results, and with ``reset_after``,
    ``backend`` and ``precision``.

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        bias: If ``False``, there are no ``bias_ih`` and ``bias_hh``. Default: ``True``
        device: The device of the parameters. Default: ``None``, torch's
        dtype: The dtype of the parameters. Default: ``None``, torch's
        reset_after: If ``True``, the reset gate multiplies the product of the state with its weights, as in torch.nn
            and cuDNN. If ``False``, it multiplies the state before that product, as in Cho et al. 2014
            (arXiv:1406.1078 v3). Default: ``True``
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, what
            :func:`seqcells.backend` says, else "auto"
        precision: How the kernels multiply in float32: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, by PyTorch's switches for its own RNNs

    Inputs and outputs are described at :meth:`forward`.

    Attributes:
        weight_ih: The input weights, [3*H, I].
        weight_hh: The recurrent weights, [3*H, H].
        bias_ih, bias_hh: The biases, [3*H].

    Gates are in the order r, z, n. All are drawn from U(-1/sqrt(H), 1/sqrt(H)), and the same seed gives torch.nn's
    values.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.nn.GRUCell does, for arguments of a wrong type or value.

    Example::

        >>> cell = seqcells.GRUCell(10, 20)
        >>> x, h = torch.randn(5, 3, 10), torch.zeros(3, 20)
        >>> for step in x:
        ...     h = cell(step, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: str | None = None,
        precision: str | None = None,
    ) -> None:
        checks.boolean("reset_after", reset_after)
        self.cell = "gru" if reset_after else "gru_before"
        super().__init__(input_size, hidden_size, bias, device, dtype, backend, precision)
        self.reset_after = reset_after


class RNNCell(_OneState, nn.RNNCell):
    """Apply one step of an Elman network with a tanh or relu.

    It is :class:`torch.nn.RNNCell` with the same arguments, parameters and results, and with ``backend`` and
    ``precision``.

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        bias: If ``False``, there are no ``bias_ih`` and ``bias_hh``. Default: ``True``
        nonlinearity: "tanh" or "relu". Default: "tanh"
        device: The device of the parameters. Default: ``None``, torch's
        dtype: The dtype of the parameters. Default: ``None``, torch's
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, what
            :func:`seqcells.backend` says, else "auto"
        precision: How the kernels multiply in float32: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, by PyTorch's switches for its own RNNs

    Inputs and outputs are described at :meth:`forward`.

    Attributes:
        weight_ih: The input weights, [H, I].
        weight_hh: The recurrent weights, [H, H].
        bias_ih, bias_hh: The biases, [H].

    All are drawn from U(-1/sqrt(H), 1/sqrt(H)), and the same seed gives torch.nn's values.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.nn.RNNCell does, for arguments of a wrong type or value.

    Example::

        >>> cell = seqcells.RNNCell(10, 20, nonlinearity="relu")
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        precision: str | None = None,
    ) -> None:
        self.cell = functional.rnn_cell_name(nonlinearity)
        super().__init__(input_size, hidden_size, bias, device, dtype, backend, precision)
        self.nonlinearity = nonlinearity

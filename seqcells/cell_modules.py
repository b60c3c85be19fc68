"""RecurrentCell: one step of any cell; and LSTMCell, GRUCell and RNNCell, its subclasses with torch.nn's names.

The latter also subclass torch.nn's cells, for isinstance, but inherit no behavior from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.types import Device

from . import arguments, backends, checks, dispatch, layer_arguments, modules
from .cell import Cell, get
from .engines import aten
from .functional import rnn_cell_name, run

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


class RecurrentCell(modules.Module):
    """Apply one step of any cell.

    It is to :class:`seqcells.Recurrent` what :class:`torch.nn.LSTMCell` is to :class:`torch.nn.LSTM`. LSTMCell, GRUCell
    and RNNCell are subclasses with torch.nn's names.

    Args:
        cell: A cell made by :func:`seqcells.cell`, or its name.
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in each state.
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs
        constants: New values for the cell's constants, by name. Default: the values in the cell's definition

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih: The input weights, [Gx*H, I], of the Gx gates whose x the cell reads, in the order of its ``gates``.
        weight_hh: The recurrent weights, [Gu*H, H], of the Gu gates whose U it uses. A cell without a recurrent product
            has none.
        bias_ih, bias_hh: The biases, for those gates that have one.
        [name]: The cell's parameter of that name, [H], or [1] if it is a scalar.

    All parameters are initialized from U(-1/sqrt(H), 1/sqrt(H)), but for those to which the cell gives a start.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.nn.LSTMCell, for arguments of the wrong type or value, including
            an unknown cell, a constant that it lacks, and a parameter whose name is an attribute of modules.

    Example::

        >>> @seqcells.cell(gates="z", states="h c", inputs="a")
        ... def gated(x, U, h, c, a):
        ...     c = c + a * torch.tanh(x.z + U.z(h))
        ...     return torch.tanh(c), c
        >>> cell = seqcells.RecurrentCell(gated, 10, 20)
        >>> h, c = cell(torch.randn(3, 10), a=torch.rand(3))
        >>> h, c = cell(torch.randn(3, 10), (h, c), a=torch.rand(3))
        >>> c.shape
        torch.Size([3, 20])
    """

    cell: Cell
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    _hx: str = "state"  # the name of forward's argument

    def __init__(
        self,
        cell: Cell | str,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        precision: str | None = None,
        **constants: float,
    ) -> None:
        found = modules.cell_of(cell, constants)
        self._set_up(found, input_size, hidden_size, bias, device, dtype, backend, precision)

    def _set_up(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Device,
        dtype: torch.dtype | None,
        backend: str | None,
        precision: str | None,
    ) -> None:
        """The part that the constructors share."""
        nn.Module.__init__(self)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            checks.integer(name, size, bools=True)
            if size < 0:
                raise RuntimeError(f"{name} must not be negative, got {size}")  # as torch.empty does, for torch.nn
        if not isinstance(bias, int):  # 0 and 1 are fine, as in torch.nn's cells
            checks.boolean("bias", bias)
        checks.device(device, optional=True)
        checks.dtype(dtype, optional=True)
        arguments.options(backend, precision, cell=cell.key)
        self.cell = cell
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.backend = backend
        self.precision = precision
        if taken := [name for name in cell.params if hasattr(self, name)]:
            problem = f"its parameter {taken[0]!r} has a name that modules have: give it another"
            raise ValueError(f"cell {cell.name}: {problem}")
        for name, shape in self._shapes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if not bias and self._hx == "hx":  # as torch.nn's
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def _shapes(self, layer: int = 0) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name."""
        return modules.shapes(self.cell, self.hidden_size, self.input_size, self.hidden_size, bool(self.bias))

    def __setstate__(self, state: dict[str, object]) -> None:
        nn.Module.__setstate__(self, state)
        # Modules pickled by earlier versions have the cell's name instead of the cell, or, if LSTMCells, no cell.
        self.__dict__["cell"] = get(self.__dict__.get("cell", "lstm"))

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
        return text if self._hx == "hx" else modules.with_cell(self.cell, text)

    def forward(self, x: Tensor, state: Tensor | tuple[Tensor, ...] | None = None, **inputs: Tensor) -> Any:
        """Run one step.

        Args:
            x: [B, I], or [I] without a batch.
            state: The states before the step, a tuple with one [B, H] for each state, or just the tensor if the cell
                has one state; [H] without a batch. Default: ``None``, zeros
            inputs: All of the cell's per-step inputs, by name: [B] (one value for all units) or [B, H]; without a batch
                [] or [H].

        Returns:
            The states after the step, in the form of the argument. If the cell has ``outputs``, a tuple of the output
            and these states.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn.LSTMCell, for wrong types, shapes, dtypes and devices.
        """
        known = type(x) is Tensor and not inputs and (state is None or type(state) in (Tensor, tuple))
        if not known and (call := self._traced(x, state, **inputs)) is not None:
            return call
        names = self.cell.states
        if len(names) > 1 and state is not None and not isinstance(state, (tuple, list)):
            raise checks.wrong("state", f"a tuple of {len(names)} tensors ({', '.join(names)}) or None", state)
        states: Any = (state,) if len(names) == 1 and state is not None else state  # checked after a failure
        labels = ("state",) if len(names) == 1 else tuple(f"state[{i}]" for i in range(len(names)))
        try:
            y, found = self._step(x, states, labels, inputs)
        except checks.FAILURES as error:
            raise checks.clearer(error, self._check, x, states, inputs) from None
        after = found[0] if len(names) == 1 else found
        return (y, after) if self.cell.outputs else after

    def _check(self, x: Tensor, states: Sequence[Tensor] | None, inputs: Mapping[str, Tensor] | None = None) -> None:
        """Check what `_step` does not check in a call."""
        layer_arguments.step(self, x, states, inputs or {}, self._shapes())

    def _step(
        self,
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        names: tuple[str, ...],
        inputs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the states after a step. names: what errors call the states."""
        kind, rank = type(self).__name__, x.dim()
        if rank not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {rank}D instead")
        if states is not None and len(states) != len(names):
            raise TypeError(f"{kind}: expected {self._hx} to be {len(names)} tensors, got {len(states)}")
        for name, s in zip(names, states or (), strict=False):
            if s.dim() not in (1, 2):
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {s.dim()}D instead")
        batched, extra = rank == 2, inputs or {}
        if extra or self.cell.inputs:
            self._check(x, states, extra)
        if not batched:
            x, extra = x[None], {name: t[None] for name, t in extra.items()}
            states = None if states is None else tuple(s[None] for s in states)
        if x.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}")
        own, weights = self._parameters, []  # nn.Module's __getattr__ is slower
        for part, rows in zip(modules.PARTS, self.cell.rows, strict=True):
            there = rows and (self.bias or part.startswith("w"))
            weights.append((own[part] if part in own else getattr(self, part)) if there else None)
        dtype = next((w.dtype for w in weights if w is not None), x.dtype)
        for t in (x, *(states or ())):
            if t.dtype != dtype and not backends.autocasting(x.device):
                got = f"{_NAMES.get(t.dtype, t.dtype)} and {_NAMES.get(dtype, dtype)}"
                raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {got}")
        for i, s in enumerate(states or ()):
            if s.dim() != 2 or s.shape[0] != x.shape[0]:
                raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{i} batch size {s.shape[0]}")
            if s.shape[1] != self.hidden_size:
                got = f"got {s.shape[1]}, expected {self.hidden_size}"
                raise RuntimeError(f"hidden{i} has inconsistent hidden_size: {got}")
        on_cpu = (
            x.is_cpu and weights[0] is not None and weights[0].is_cpu and weights[1] is not None and weights[1].is_cpu
        )
        if dispatch.own_step(self.cell.key, self.backend, on_cpu) and not torch.is_autocast_enabled("cpu"):
            final = aten.step(self.cell.key, x, states, weights)
            y = final[0]
            if not y.is_cpu:  # torch's own step takes biases on the meta device, too
                self._check(x, states)
        else:
            options = dispatch.ScanOptions(backend=self.backend, precision=self.precision, one_step=True)
            vectors = [{name: getattr(self, name) for name in self.cell.params}]
            now = {name: t[None] for name, t in extra.items()}
            y, final, _ = run(self.cell, x[None], states, [weights], options, None, vectors, now)
            # Engines without an operator for one step return [1, B, H]. Copied: users may detach states in place,
            # which a view does not allow.
            final = tuple(s[0].clone() if s.dim() == 3 else s for s in final)
            y = y[0].clone() if self.cell.outputs else final[0]
        return (y, final) if batched else (y[0], tuple(s[0] for s in final))


class LSTMCell(RecurrentCell, nn.LSTMCell):  # type: ignore[misc]  # forward is ours
    """Apply one step of a long short-term memory (LSTM) cell.

    It has the arguments, parameters and results of :class:`torch.nn.LSTMCell`, and in addition the options ``backend``
    and ``precision``.

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih: The input weights, [4*H, I].
        weight_hh: The recurrent weights, [4*H, H].
        bias_ih, bias_hh: The biases, [4*H].

    Gates are in the order i, f, g, o. All parameters are initialized from U(-1/sqrt(H), 1/sqrt(H)); the same seed
    yields the same values as in torch.nn.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.nn.LSTMCell, for arguments of the wrong type or value.

    Example::

        >>> cell = seqcells.LSTMCell(10, 20)
        >>> x, h, c = torch.randn(5, 3, 10), torch.zeros(3, 20), torch.zeros(3, 20)
        >>> for step in x:
        ...     h, c = cell(step, (h, c))
        >>> h.shape
        torch.Size([3, 20])
    """

    _hx = "hx"

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
        self._set_up(get("lstm"), input_size, hidden_size, bias, device, dtype, backend, precision)

    def forward(  # type: ignore[override]  # torch.nn's names of the arguments
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            input: [B, I], or [I] without a batch.
            hx: The states before the step (h, c), each [B, H], or [H] without a batch. Default: ``None``, zeros

        Returns:
            The states after the step, h and c, in the shape of ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn.LSTMCell, for wrong types, shapes, dtypes and devices.
        """
        # torch.fx is tracing if an argument is a Proxy. The check is inline because every call pays for it.
        known = type(input) is Tensor and (hx is None or (type(hx) is tuple and hx and type(hx[0]) is Tensor))
        if not known and (call := self._traced(input, hx)) is not None:
            return call
        if hx is not None and not isinstance(hx, (tuple, list)):
            raise TypeError(f"LSTMCell: expected hx to be a tuple of two tensors (h, c), got {checks.kind(hx)}")
        # Arguments are checked after a failure only: a check before each step would cost time.
        try:
            h, c = self._step(input, hx, ("hx[0]", "hx[1]"))[1]
        except checks.FAILURES as error:
            raise checks.clearer(error, self._check, input, hx) from None
        return h, c

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]: ...


class _OneState(RecurrentCell):
    """GRUCell and RNNCell: a cell whose only state is its output."""

    _hx = "hx"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # type: ignore[override]  # torch.nn's names
        """Run one step.

        Args:
            input: [B, I], or [I] without a batch.
            hx: The state before the step, [B, H], or [H] without a batch. Default: ``None``, zeros

        Returns:
            The state after the step, in the shape of ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn, for wrong types, shapes, dtypes and devices.
        """
        known = type(input) is Tensor and (hx is None or type(hx) is Tensor)
        if not known and (call := self._traced(input, hx)) is not None:
            return call
        states = None if hx is None else (hx,)
        try:
            return self._step(input, states, ("hidden",))[0]  # the output, which is the state
        except checks.FAILURES as error:
            raise checks.clearer(error, self._check, input, states) from None

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...


class GRUCell(_OneState, nn.GRUCell):  # type: ignore[misc]  # forward is ours
    """Apply one step of a gated recurrent unit (GRU) cell.

    It has the arguments, parameters and results of :class:`torch.nn.GRUCell`, and in addition the options
    ``reset_after``, ``backend`` and ``precision``.

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        reset_after: If ``True``, the reset gate multiplies the product of the state with its weights, as in torch.nn
            and cuDNN. If ``False``, it multiplies the state before that product, as in Cho et al. 2014
            (arXiv:1406.1078 v3). Default: ``True``
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih: The input weights, [3*H, I].
        weight_hh: The recurrent weights, [3*H, H].
        bias_ih, bias_hh: The biases, [3*H].

    Gates are in the order r, z, n. All parameters are initialized from U(-1/sqrt(H), 1/sqrt(H)); the same seed yields
    the same values as in torch.nn.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.nn.GRUCell, for arguments of the wrong type or value.

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
        definition = get("gru" if reset_after else "gru_before")
        self._set_up(definition, input_size, hidden_size, bias, device, dtype, backend, precision)
        self.reset_after = reset_after


class RNNCell(_OneState, nn.RNNCell):  # type: ignore[misc]  # forward is ours
    """Apply one step of an Elman RNN with tanh or relu.

    It has the arguments, parameters and results of :class:`torch.nn.RNNCell`, and in addition the options ``backend``
    and ``precision``.

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        nonlinearity: "tanh" or "relu". Default: "tanh"
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih: The input weights, [H, I].
        weight_hh: The recurrent weights, [H, H].
        bias_ih, bias_hh: The biases, [H].

    All parameters are initialized from U(-1/sqrt(H), 1/sqrt(H)); the same seed yields the same values as in torch.nn.

    Raises:
        TypeError, ValueError, RuntimeError: As torch.nn.RNNCell, for arguments of the wrong type or value.

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
        definition = get(rnn_cell_name(nonlinearity))
        self._set_up(definition, input_size, hidden_size, bias, device, dtype, backend, precision)
        self.nonlinearity = nonlinearity

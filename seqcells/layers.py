"""LSTM, GRU, RNN: torch.nn's modules of those names over whole sequences, with resets, lengths and a choice of backend.

Each is `Recurrent` with a built-in cell, under torch.nn's names. Not subclasses of torch.nn's classes, which
torch.compile refuses by design; `subclasses` has some that are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import checks, functional
from .cell import get
from .recurrent import Recurrent

F = TypeVar("F", bound=Callable[..., Any])
_Pair: TypeAlias = "tuple[Tensor, Tensor] | None"
_Resets: TypeAlias = "Tensor | PackedSequence | Sequence[Any] | None"
_Lengths: TypeAlias = "Tensor | Sequence[int] | None"

if TYPE_CHECKING:

    def _typed_as(function: F) -> Callable[[Callable[..., Any]], F]:
        """For a module's __call__, which takes and gives what its forward does."""


class LSTM(Recurrent):
    """Apply a multi-layer long short-term memory (LSTM) network to an input sequence.

    It is :class:`torch.nn.LSTM` with the same arguments, parameters and results, and with more: ``resets``, ``lengths``
    and ``return_cell_states`` when it is called, ``backend``, ``save`` and ``precision`` here.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers, D
    the number of directions (2 if bidirectional, else 1) and P the size of the output, ``proj_size`` or else H.

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        num_layers: L, the number of layers, each on top of the one before. Default: 1
        bias: If ``False``, there are no ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input and output have the shape [B, T, features] instead of [T, B, features]. The
            states do not change. Default: ``False``
        dropout: The probability with which an element of the output of each layer but the last is zeroed in training.
            Default: 0
        bidirectional: If ``True``, each layer has a second direction, from the last step to the first. Default:
            ``False``
        proj_size: If more than 0, the output is the state multiplied by a matrix [proj_size, H]. Default: 0
        device: The device of the parameters. Default: ``None``, torch's
        dtype: The dtype of the parameters. Default: ``None``, torch's
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, what
            :func:`seqcells.backend` says, else "auto"
        save: What is kept for backward: "gates", or "states", about a third of the memory for one more matrix product.
            Default: "gates"
        precision: How the kernels multiply in float32: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, by PyTorch's switches for its own RNNs

    Inputs and outputs are described at :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [4*H, I], of the layers above the first [4*H, D*P].
        weight_hh_l[k]: The recurrent weights of layer k, [4*H, P].
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, [4*H].
        weight_hr_l[k]: The projection of layer k, [P, H], with ``proj_size`` only.

    Gates are in the order i, f, g, o. The second direction's names end in ``_reverse``. All are drawn from
    U(-1/sqrt(H), 1/sqrt(H)), and the same seed gives torch.nn's values.

    Raises:
        TypeError, ValueError: As torch.nn.LSTM does, for arguments of a wrong type or value.

    Example::

        >>> layer = seqcells.LSTM(10, 20, num_layers=2)
        >>> x = torch.randn(5, 3, 10)
        >>> resets = torch.rand(5, 3) < 0.1
        >>> y, (h_n, c_n) = layer(x, resets=resets)
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    mode = "LSTM"
    _hx = "hx"

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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        save: str = "gates",
        precision: str | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._set_up(get("lstm"), sizes, device, dtype, backend, save, precision)

    @overload  # type: ignore[override]  # torch.nn's names of the arguments
    def forward(
        self, input: Tensor, hx: _Pair = None, *, resets: _Resets = None, lengths: _Lengths = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: _Pair = None, *, resets: _Resets = None, lengths: None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor, hx: _Pair = None, *, resets: _Resets = None, lengths: _Lengths = None,
        return_cell_states: Literal[True],
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: _Pair = None, *, resets: _Resets = None, lengths: None = None,
        return_cell_states: Literal[True],
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor], PackedSequence]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor | PackedSequence, hx: _Pair = None, *, resets: _Resets = None, lengths: _Lengths = None,
        return_cell_states: bool = False,
    ) -> Any: ...  # fmt: skip

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        resets: Tensor | PackedSequence | Sequence[Any] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Run all layers over a sequence.

        Args:
            input: [T, B, I], with ``batch_first`` [B, T, I], without a batch [T, I]; or a PackedSequence.
            hx: The initial states (h_0 [D*L, B, P], c_0 [D*L, B, H]), without a batch [D*L, .]. Default: ``None``,
                zeros
            resets: [T, B], with ``batch_first`` [B, T], without a batch [T]: bools or the numbers 0 and 1, in a tensor
                or a nested list. Where it is set, an episode begins at that step: no state crosses from the step before
                it, in any layer or direction, nor does ``hx`` reach the first step. For a PackedSequence: packed like
                the input, or padded, in the order of the sequences. Default: ``None``, no resets
            lengths: int [B] on any device, or a list of ints: the steps of each sequence in a padded batch. The results
                are those of the packed batch: the output is zero beyond, the states are those after the last step, and
                the padding may hold anything. Default: ``None``, all steps
            return_cell_states: If ``True``, the cell states of every step are returned, too. Default: ``False``

        Returns:
            ``output, (h_n, c_n)`` or ``output, (h_n, c_n), cell_states``. output: h of the last layer after every step,
            [T, B, D*P], in the layout of the input (packed if that is). h_n [D*L, B, P], c_n [D*L, B, H]: the states
            after the last step. cell_states: c of the last layer after every step, [T, B, D*H], laid out as output.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn.LSTM does, for types, shapes, dtypes and devices that do
                not fit; RuntimeError also where the backend that was asked for cannot do it.
        """
        # Whether torch.fx traces. Asked in line, for every call pays for it.
        known = type(input) is Tensor and (hx is None or (type(hx) is tuple and hx and type(hx[0]) is Tensor))
        if not known:
            options = {"resets": resets, "lengths": lengths, "return_cell_states": return_cell_states}
            if (call := self._traced(input, hx, **options)) is not None:
                return call
        y, (h, c), every = self._run(input, hx, resets, lengths, return_cell_states)
        return (y, (h, c), every[1]) if return_cell_states else (y, (h, c))

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class _OneState(Recurrent):
    """GRU and RNN: a layer whose only state is its output."""

    _hx = "hx"

    @overload  # type: ignore[override]  # torch.nn's names of the arguments
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: _Resets = None, lengths: _Lengths = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, resets: _Resets = None, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        resets: Tensor | PackedSequence | Sequence[Any] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Any:
        """Run all layers over a sequence.

        Args:
            input: [T, B, I], with ``batch_first`` [B, T, I], without a batch [T, I]; or a PackedSequence.
            hx: The initial state [D*L, B, H], without a batch [D*L, H]. Default: ``None``, zeros
            resets: [T, B], with ``batch_first`` [B, T], without a batch [T]: bools or the numbers 0 and 1, in a tensor
                or a nested list. Where it is set, an episode begins at that step: no state crosses from the step before
                it, in any layer or direction, nor does ``hx`` reach the first step. For a PackedSequence: packed like
                the input, or padded, in the order of the sequences. Default: ``None``, no resets
            lengths: int [B] on any device, or a list of ints: the steps of each sequence in a padded batch. The results
                are those of the packed batch: the output is zero beyond, the state is that after the last step, and the
                padding may hold anything. Default: ``None``, all steps

        Returns:
            ``output, h_n``. output: h of the last layer after every step, [T, B, D*H], in the layout of the input
            (packed if that is). h_n [D*L, B, H]: the state after the last step.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn does, for types, shapes, dtypes and devices that do not
                fit; RuntimeError also where the backend that was asked for cannot do it.
        """
        known = type(input) is Tensor and (hx is None or type(hx) is Tensor)
        if not known and (call := self._traced(input, hx, resets=resets, lengths=lengths)) is not None:
            return call
        y, (h,), _ = self._run(input, hx, resets, lengths)
        return y, h

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _without_projection(init: F) -> F:
    """A constructor that takes proj_size where torch.nn's does, by name or behind bidirectional, to refuse it."""
    place = list(inspect.signature(init).parameters).index("bidirectional")  # of proj_size, self not counted

    @wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        if "proj_size" in options or (len(args) > place and args[place]):
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        init(self, *args[:place], *args[place + 1 :], **options)

    return cast(F, checked)  # but for proj_size, which only raises


class GRU(_OneState):
    """Apply a multi-layer gated recurrent unit (GRU) network to an input sequence.

    It is :class:`torch.nn.GRU` with the same arguments, parameters and results, and with more: ``resets`` and
    ``lengths`` when it is called, ``reset_after``, ``backend``, ``save`` and ``precision`` here.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers and D
    the number of directions (2 if bidirectional, else 1).

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        num_layers: L, the number of layers, each on top of the one before. Default: 1
        bias: If ``False``, there are no ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input and output have the shape [B, T, features] instead of [T, B, features]. The
            state does not change. Default: ``False``
        dropout: The probability with which an element of the output of each layer but the last is zeroed in training.
            Default: 0
        bidirectional: If ``True``, each layer has a second direction, from the last step to the first. Default:
            ``False``
        device: The device of the parameters. Default: ``None``, torch's
        dtype: The dtype of the parameters. Default: ``None``, torch's
        reset_after: If ``True``, the reset gate multiplies the product of the state with its weights, as in torch.nn
            and cuDNN. If ``False``, it multiplies the state before that product, as in Cho et al. 2014
            (arXiv:1406.1078 v3). Default: ``True``
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, what
            :func:`seqcells.backend` says, else "auto"
        save: What is kept for backward: "gates", or "states", about a third of the memory for one more matrix product.
            Default: "gates"
        precision: How the kernels multiply in float32: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, by PyTorch's switches for its own RNNs

    Inputs and outputs are described at :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [3*H, I], of the layers above the first [3*H, D*H].
        weight_hh_l[k]: The recurrent weights of layer k, [3*H, H].
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, [3*H].

    Gates are in the order r, z, n. The second direction's names end in ``_reverse``. All are drawn from
    U(-1/sqrt(H), 1/sqrt(H)), and the same seed gives torch.nn's values.

    Raises:
        TypeError, ValueError: As torch.nn.GRU does, for arguments of a wrong type or value; so for a ``proj_size``.

    Example::

        >>> layer = seqcells.GRU(10, 20, reset_after=False)
        >>> x = torch.randn(5, 3, 10)
        >>> y, h_n = layer(x, lengths=[5, 4, 2])
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    mode = "GRU"

    @_without_projection
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: str | None = None,
        save: str = "gates",
        precision: str | None = None,
    ) -> None:
        checks.boolean("reset_after", reset_after)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        definition = get("gru" if reset_after else "gru_before")
        self._set_up(definition, sizes, device, dtype, backend, save, precision)
        self.reset_after = reset_after


class RNN(_OneState):
    """Apply a multi-layer Elman network with a tanh or relu to an input sequence.

    It is :class:`torch.nn.RNN` with the same arguments, parameters and results, and with more: ``resets`` and
    ``lengths`` when it is called, ``backend``, ``save`` and ``precision`` here.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers and D
    the number of directions (2 if bidirectional, else 1).

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        num_layers: L, the number of layers, each on top of the one before. Default: 1
        nonlinearity: "tanh" or "relu". Default: "tanh"
        bias: If ``False``, there are no ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input and output have the shape [B, T, features] instead of [T, B, features]. The
            state does not change. Default: ``False``
        dropout: The probability with which an element of the output of each layer but the last is zeroed in training.
            Default: 0
        bidirectional: If ``True``, each layer has a second direction, from the last step to the first. Default:
            ``False``
        device: The device of the parameters. Default: ``None``, torch's
        dtype: The dtype of the parameters. Default: ``None``, torch's
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, what
            :func:`seqcells.backend` says, else "auto"
        save: What is kept for backward: "gates", or "states", about a third of the memory for one more matrix product.
            Default: "gates"
        precision: How the kernels multiply in float32: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, by PyTorch's switches for its own RNNs

    Inputs and outputs are described at :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [H, I], of the layers above the first [H, D*H].
        weight_hh_l[k]: The recurrent weights of layer k, [H, H].
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, [H].

    The second direction's names end in ``_reverse``. All are drawn from U(-1/sqrt(H), 1/sqrt(H)), and the same seed
    gives torch.nn's values.

    Raises:
        TypeError, ValueError: As torch.nn.RNN does, for arguments of a wrong type or value; so for a ``proj_size``.

    Example::

        >>> layer = seqcells.RNN(10, 20, nonlinearity="relu", bidirectional=True)
        >>> y, h_n = layer(torch.randn(5, 3, 10))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    @property
    def mode(self) -> str:
        """torch.nn's name of the kind: "RNN_TANH" or "RNN_RELU"."""
        return f"RNN_{self.nonlinearity.upper()}"

    @_without_projection
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        save: str = "gates",
        precision: str | None = None,
    ) -> None:
        definition = get(functional.rnn_cell_name(nonlinearity))
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        self._set_up(definition, sizes, device, dtype, backend, save, precision)
        self.nonlinearity = nonlinearity

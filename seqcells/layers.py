"""The layers LSTM, GRU and RNN: torch.nn's modules, with resets, lengths and a choice of backend.

Each is a `Recurrent` with a built-in cell and torch.nn's argument names. They do not subclass torch.nn's classes, which
torch.compile refuses by design. For classes that do, see `subclasses`.
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

from . import checks, dropouts, functional
from .cell import get
from .recurrent import Recurrent

F = TypeVar("F", bound=Callable[..., object])
_Pair: TypeAlias = "tuple[Tensor, Tensor] | None"
_Resets: TypeAlias = "Tensor | PackedSequence | Sequence[object] | None"
_Lengths: TypeAlias = "Tensor | Sequence[int] | None"

if TYPE_CHECKING:

    def _typed_as(function: F) -> Callable[[Callable[..., object]], F]:
        """Type a module's __call__ as its forward."""


class LSTM(Recurrent):
    """Apply a multi-layer long short-term memory (LSTM) network to an input sequence.

    It has the arguments, parameters and results of :class:`torch.nn.LSTM`. In addition, the constructor takes
    ``backend``, ``save`` and ``precision``, and :meth:`forward` takes ``resets``, ``lengths`` and
    ``return_cell_states``.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers, D
    the number of directions (2 if bidirectional, else 1) and P the output size (``proj_size`` if greater than 0, else
    H).

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        num_layers: L, the number of stacked layers. Default: 1
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input and output have the shape [B, T, features] instead of [T, B, features]. The
            states do not change. Default: ``False``
        dropout: The probability of dropout on the outputs of each layer except the last, in training. Default: 0
        bidirectional: If ``True``, each layer also runs from the last step to the first. Default: ``False``
        proj_size: If greater than 0, the hidden state is projected to this size by a matrix [proj_size, H]. Default: 0
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        save: What is saved for backward: "gates" or "states". "states" takes a third of the memory, and one more matrix
            product in backward. Default: "gates"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs
        weight_dropout: The probability of dropout on the recurrent weights, in training. Each call draws one mask for
            all of its steps (Merity et al. 2018, arXiv:1708.02182). Default: 0
        recurrent_dropout: The probability of dropout on what every recurrent product reads, in training, with one mask
            for each sequence (Gal & Ghahramani 2016, arXiv:1512.05287). Default: 0
        candidate_dropout: The probability of dropout on the candidate g, in training, with a new mask at each step
            (Semeniuta et al. 2016, arXiv:1603.05118). Default: 0
        zoneout: The probability that a unit keeps its state of the step before, in training (Krueger et al. 2017,
            arXiv:1606.01305); outside training, the state is the mean of old and new. One number, or a tuple with
            one for h and one for c. Default: 0

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [4*H, I], of the layers above the first [4*H, D*P].
        weight_hh_l[k]: The recurrent weights of layer k, [4*H, P].
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, [4*H].
        weight_hr_l[k]: The projection of layer k, [P, H], with ``proj_size`` only.

    Gates are in the order i, f, g, o. The second direction's names end in ``_reverse``. All parameters are initialized
    from U(-1/sqrt(H), 1/sqrt(H)); the same seed yields the same values as in torch.nn.

    Raises:
        TypeError, ValueError: As torch.nn.LSTM, for arguments of the wrong type or value.

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
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        candidate_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._set_up(get("lstm"), sizes, device, dtype, backend, save, precision)
        dropouts.set_up(self, weight_dropout, recurrent_dropout, zoneout, candidate_dropout)

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
    ) -> Any: ...  # two results or three  # fmt: skip

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        resets: Tensor | PackedSequence | Sequence[object] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        return_cell_states: bool = False,
    ) -> object:
        """Run all layers over a sequence.

        Args:
            input: [T, B, I], with ``batch_first`` [B, T, I], without a batch [T, I]; or a PackedSequence.
            hx: The initial states (h_0 [D*L, B, P], c_0 [D*L, B, H]); without a batch [D*L, P] and [D*L, H]. Default:
                ``None``, zeros
            resets: [T, B], with ``batch_first`` [B, T], without a batch [T]: bools or the numbers 0 and 1, in a tensor
                or a nested list. Where set, a new episode begins at that step: no state crosses from the step before
                it, in any layer or direction. At the first step, this means that ``hx`` is not used. For a
                PackedSequence: packed like the input, or padded, in the original order of the sequences. Default:
                ``None``, no resets
            lengths: int [B] on any device, or a list of ints: the number of steps of each sequence in a padded batch.
                The results are those of the packed batch: the output is zero at padding, and the final states are those
                after each sequence's last step. The padding may have any values. Default: ``None``, all steps
            return_cell_states: If ``True``, also return the cell states after every step. Default: ``False``

        Returns:
            ``output, (h_n, c_n)`` or ``output, (h_n, c_n), cell_states``. output: the last layer's h after every step,
            [T, B, D*P], in the input's layout (packed if the input is packed). h_n [D*L, B, P], c_n [D*L, B, H]: the
            final states. cell_states: the last layer's c after every step, [T, B, D*H], in the layout of output.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn.LSTM, for wrong types, shapes, dtypes and devices.
                RuntimeError also if the requested backend does not support the call.
        """
        # torch.fx is tracing if an argument is a Proxy. The check is inline because every call pays for it.
        known = type(input) is Tensor and (hx is None or (type(hx) is tuple and hx and type(hx[0]) is Tensor))
        if not known:
            options = {"resets": resets, "lengths": lengths, "return_cell_states": return_cell_states}
            if (call := self._traced(input, hx, **options)) is not None:
                return call
        y, (h, c), every = self._run(input, hx, resets, lengths, return_cell_states)
        return (y, (h, c), every[1]) if return_cell_states else (y, (h, c))

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self, *args: object, **kwargs: object) -> object: ...


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
        resets: Tensor | PackedSequence | Sequence[object] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> object:
        """Run all layers over a sequence.

        Args:
            input: [T, B, I], with ``batch_first`` [B, T, I], without a batch [T, I]; or a PackedSequence.
            hx: The initial state [D*L, B, H], without a batch [D*L, H]. Default: ``None``, zeros
            resets: [T, B], with ``batch_first`` [B, T], without a batch [T]: bools or the numbers 0 and 1, in a tensor
                or a nested list. Where set, a new episode begins at that step: no state crosses from the step before
                it, in any layer or direction. At the first step, this means that ``hx`` is not used. For a
                PackedSequence: packed like the input, or padded, in the original order of the sequences. Default:
                ``None``, no resets
            lengths: int [B] on any device, or a list of ints: the number of steps of each sequence in a padded batch.
                The results are those of the packed batch: the output is zero at padding, and the final state is that
                after each sequence's last step. The padding may have any values. Default: ``None``, all steps

        Returns:
            ``output, h_n``. output: the last layer's h after every step, [T, B, D*H], in the input's layout (packed if
            the input is packed). h_n [D*L, B, H]: the final state.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn, for wrong types, shapes, dtypes and devices. RuntimeError
                also if the requested backend does not support the call.
        """
        known = type(input) is Tensor and (hx is None or type(hx) is Tensor)
        if not known and (call := self._traced(input, hx, resets=resets, lengths=lengths)) is not None:
            return call
        y, (h,), _ = self._run(input, hx, resets, lengths)
        return y, h

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self, *args: object, **kwargs: object) -> object: ...


def _without_projection(init: F) -> F:
    """A constructor that refuses proj_size where torch.nn's takes it: by name, or by position after bidirectional."""
    place = list(inspect.signature(init).parameters).index("bidirectional")  # proj_size's position without self

    @wraps(init)
    def checked(self: object, *args: object, **options: object) -> None:
        if "proj_size" in options or (len(args) > place and args[place]):
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        init(self, *args[:place], *args[place + 1 :], **options)

    return cast(F, checked)  # but for proj_size, which only raises


class GRU(_OneState):
    """Apply a multi-layer gated recurrent unit (GRU) network to an input sequence.

    It has the arguments, parameters and results of :class:`torch.nn.GRU`. In addition, the constructor takes
    ``reset_after``, ``backend``, ``save`` and ``precision``, and :meth:`forward` takes ``resets`` and ``lengths``.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers and D
    the number of directions (2 if bidirectional, else 1).

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        num_layers: L, the number of stacked layers. Default: 1
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input and output have the shape [B, T, features] instead of [T, B, features]. The
            state does not change. Default: ``False``
        dropout: The probability of dropout on the outputs of each layer except the last, in training. Default: 0
        bidirectional: If ``True``, each layer also runs from the last step to the first. Default: ``False``
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        reset_after: If ``True``, the reset gate multiplies the product of the state with its weights, as in torch.nn
            and cuDNN. If ``False``, it multiplies the state before that product, as in Cho et al. 2014
            (arXiv:1406.1078 v3). Default: ``True``
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        save: What is saved for backward: "gates" or "states". "states" takes a fifth of the memory, and one more matrix
            product in backward. Default: "gates"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs
        weight_dropout: The probability of dropout on the recurrent weights, in training. Each call draws one mask for
            all of its steps (Merity et al. 2018, arXiv:1708.02182). Default: 0
        recurrent_dropout: The probability of dropout on what every recurrent product reads, in training, with one mask
            for each sequence (Gal & Ghahramani 2016, arXiv:1512.05287). Default: 0
        candidate_dropout: The probability of dropout on the candidate n, in training, with a new mask at each step
            (Semeniuta et al. 2016, arXiv:1603.05118). Default: 0
        zoneout: The probability that a unit keeps its state of the step before, in training (Krueger et al. 2017,
            arXiv:1606.01305); outside training, the state is the mean of old and new. Default: 0

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [3*H, I], of the layers above the first [3*H, D*H].
        weight_hh_l[k]: The recurrent weights of layer k, [3*H, H].
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, [3*H].

    Gates are in the order r, z, n. The second direction's names end in ``_reverse``. All parameters are initialized
    from U(-1/sqrt(H), 1/sqrt(H)); the same seed yields the same values as in torch.nn.

    Raises:
        TypeError, ValueError: As torch.nn.GRU, for arguments of the wrong type or value, including ``proj_size``.

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
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        candidate_dropout: float = 0.0,
        zoneout: float = 0.0,
    ) -> None:
        checks.boolean("reset_after", reset_after)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        definition = get("gru" if reset_after else "gru_before")
        self._set_up(definition, sizes, device, dtype, backend, save, precision)
        dropouts.set_up(self, weight_dropout, recurrent_dropout, zoneout, candidate_dropout)
        self.reset_after = reset_after


class RNN(_OneState):
    """Apply a multi-layer Elman RNN with tanh or relu to an input sequence.

    It has the arguments, parameters and results of :class:`torch.nn.RNN`. In addition, the constructor takes
    ``backend``, ``save`` and ``precision``, and :meth:`forward` takes ``resets`` and ``lengths``.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers and D
    the number of directions (2 if bidirectional, else 1).

    Args:
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in the state.
        num_layers: L, the number of stacked layers. Default: 1
        nonlinearity: "tanh" or "relu". Default: "tanh"
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input and output have the shape [B, T, features] instead of [T, B, features]. The
            state does not change. Default: ``False``
        dropout: The probability of dropout on the outputs of each layer except the last, in training. Default: 0
        bidirectional: If ``True``, each layer also runs from the last step to the first. Default: ``False``
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        save: What is saved for backward: "gates" or "states". An RNN has no gates to save, so both are the same.
            Default: "gates"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs
        weight_dropout: The probability of dropout on the recurrent weights, in training. Each call draws one mask for
            all of its steps (Merity et al. 2018, arXiv:1708.02182). Default: 0
        recurrent_dropout: The probability of dropout on what every recurrent product reads, in training, with one mask
            for each sequence (Gal & Ghahramani 2016, arXiv:1512.05287). Default: 0
        zoneout: The probability that a unit keeps its state of the step before, in training (Krueger et al. 2017,
            arXiv:1606.01305); outside training, the state is the mean of old and new. Default: 0

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [H, I], of the layers above the first [H, D*H].
        weight_hh_l[k]: The recurrent weights of layer k, [H, H].
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, [H].

    The second direction's names end in ``_reverse``. All parameters are initialized from U(-1/sqrt(H), 1/sqrt(H)); the
    same seed yields the same values as in torch.nn.

    Raises:
        TypeError, ValueError: As torch.nn.RNN, for arguments of the wrong type or value, including ``proj_size``.

    Example::

        >>> layer = seqcells.RNN(10, 20, nonlinearity="relu", bidirectional=True)
        >>> y, h_n = layer(torch.randn(5, 3, 10))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    @property
    def mode(self) -> str:
        """torch.nn's name for the kind of RNN: "RNN_TANH" or "RNN_RELU"."""
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
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
    ) -> None:
        definition = get(functional.rnn_cell_name(nonlinearity))
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        self._set_up(definition, sizes, device, dtype, backend, save, precision)
        dropouts.set_up(self, weight_dropout, recurrent_dropout, zoneout)
        self.nonlinearity = nonlinearity

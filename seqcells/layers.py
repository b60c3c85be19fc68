"""LSTM, GRU, RNN: torch.nn's modules of those names over whole sequences, with resets, lengths and a choice of backend.

Not subclasses of torch.nn's classes, which torch.compile refuses by design. Parameters are read at each call, so weight
norm, parametrizations, pruning and tying need nothing.
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import arguments, checks, functional, packing, plain, reference
from .functional import How

F = TypeVar("F", bound=Callable[..., Any])
_Pair: TypeAlias = "tuple[Tensor, Tensor] | None"
_Resets: TypeAlias = "Tensor | PackedSequence | Sequence[Any] | None"
_Lengths: TypeAlias = "Tensor | Sequence[int] | None"

if TYPE_CHECKING:

    def _typed_as(function: F) -> Callable[[Callable[..., Any]], F]:
        """For a module's __call__, which takes and gives what its forward does."""


class _Layer(nn.Module):
    """Parameters as torch.nn names them, for each layer k and, with _reverse behind it, its second direction:

    weight_ih_lk [G*H, I] (I: of a layer above the first, the size of the output below), weight_hh_lk [G*H, H],
    bias_ih_lk, bias_hh_lk [G*H]; with a projection weight_hr_lk [P, H], and weight_hh_lk [G*H, P].
    """

    cell: str

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
        super().__init__()
        rate = _rate(dropout)  # first, as in torch.nn
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        # Warnings name the caller's line: GRU and RNN have a constructor of their own between, and its wrapper.
        own = type(self).__init__ is not _Layer.__init__
        _check_options(*sizes, stacklevel=3 + own + (self.cell != "lstm"))
        checks.device(device, optional=True)
        checks.dtype(dtype, optional=True)
        arguments.options(backend, precision, save)
        self.mode = {"gru_before": "GRU"}.get(self.cell, self.cell.upper())
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = rate
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.backend = backend
        self.save = save
        self.precision = precision
        self._all_weights: list[list[str]] = []
        for layer in range(num_layers):
            shapes = self._shapes(layer)
            for suffix in ("", "_reverse")[: 2 if bidirectional else 1]:
                self._all_weights.append([f"{name}_l{layer}{suffix}" for name in shapes])
                for name, shape in zip(self._all_weights[-1], shapes.values(), strict=True):
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of each parameter of that layer's directions."""
        rows, out = reference.get(self.cell).gates * self.hidden_size, self.proj_size or self.hidden_size
        width = out * (2 if self.bidirectional else 1) if layer else self.input_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, width), "weight_hh": (rows, out)}
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)} if self.bias else {}
        return shapes | ({"weight_hr": (self.proj_size, self.hidden_size)} if self.proj_size else {})

    def reset_parameters(self) -> None:
        """All from U(-1/sqrt(H), 1/sqrt(H)), in torch.nn's order: the same seed gives the same weights."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing: the kernels read each parameter where it is."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """Each layer's and direction's parameters, in the order of their names."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        # Not API, but what libraries that handle torch.nn's RNNs read.
        return [getattr(self, name) for name in self._flat_weights_names]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What modules pickled by earlier versions, of one layer and direction, do not have.
        self.__dict__.setdefault("mode", {"gru_before": "GRU"}.get(self.cell, self.cell.upper()))
        names = ["weight_ih_l0", "weight_hh_l0"] + (["bias_ih_l0", "bias_hh_l0"] if self.bias else [])
        self.__dict__.setdefault("_all_weights", [names])
        for name, default in (("precision", None), ("save", "gates"), ("backend", None)):
            self.__dict__.setdefault(name, default)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        shown: dict[str, Any] = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0}
        shown |= {"bidirectional": False, "reset_after": True, "nonlinearity": "tanh"}
        shown |= {"backend": None, "save": "gates", "precision": None}
        for name, default in shown.items():
            value = getattr(self, name, default)
            if value != default:
                text += f", {name}={value!r}"
        return text

    def _directions(self) -> list[list[tuple[Tensor | None, ...]]]:
        """Of each layer its one or two directions' parameters w_ih, w_hh, b_ih, b_hh (and w_hr)."""
        count = 2 if self.bidirectional else 1
        found: list[list[tuple[Tensor | None, ...]]] = []
        for layer in range(self.num_layers):
            shapes = self._shapes(layer).values()
            found.append([])
            for names in self._all_weights[layer * count : (layer + 1) * count]:
                held = (checks.parameter(self, name, shape) for name, shape in zip(names, shapes, strict=True))
                w_ih, w_hh, *rest = held
                b_ih, b_hh = rest[:2] if self.bias else (None, None)
                found[-1].append((w_ih, w_hh, b_ih, b_hh, *(rest[-1:] if self.proj_size else ())))
        return found

    def _check(
        self, input: Any, hx: Any, resets: Any = None, lengths: Any = None, cells: Any = False
    ) -> tuple[list[list[tuple[Tensor | None, ...]]], Tensor | None]:
        """Raise what is wrong with a call; else give `_directions`, and lengths as a tensor."""
        layers = self._directions()
        return layers, arguments.layer(self, layers, input, hx, resets, lengths, cells)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        resets: Tensor | PackedSequence | None,
        lengths: Tensor | Sequence[int] | None,
        cells: bool = False,
    ) -> tuple[Any, tuple[Tensor, ...], Any]:
        """Output, final states, and all cell states of the last layer or None, in the input's own layout."""
        if resets is None and lengths is None and cells is False:
            try:
                found = plain.layers(self, input, hx)
            except checks.FAILURES as error:
                raise checks.clearer(error, self._check, input, hx) from None
            if found is not None:
                return *found, None
        layers, lengths = self._check(input, hx, resets, lengths, cells)
        if isinstance(input, PackedSequence):
            return self._run_packed(layers, input, hx, resets, cells)
        states = None if hx is None else (hx[0], hx[1]) if self.cell == "lstm" else (hx,)
        x, batched = input, input.dim() == 3
        if not batched:
            x = input[:, None]
            resets = None if resets is None else resets[:, None]  # type: ignore[call-overload]
            states = None if states is None else tuple(s[:, None] for s in states)
        elif self.batch_first:
            x = input.transpose(0, 1)
            resets = None if resets is None else resets.t()  # type: ignore[union-attr]
        y, final, every = self._layers(layers, x, states, How(resets=resets, lengths=lengths), cells)  # type: ignore[arg-type]
        if not batched:
            return y[:, 0], tuple(s[:, 0] for s in final), None if every is None else every[:, 0]
        if self.batch_first:
            y, every = y.transpose(0, 1), None if every is None else every.transpose(0, 1)
        return y, final, every

    def _run_packed(
        self,
        layers: list[list[tuple[Tensor | None, ...]]],
        input: PackedSequence,
        hx: Any,
        resets: Tensor | PackedSequence | None,
        cells: bool,
    ) -> tuple[PackedSequence, tuple[Tensor, ...], PackedSequence | None]:
        data, batch_sizes, order, back = input
        states = None
        if hx is not None:
            given = (hx[i] for i in (0, 1)) if self.cell == "lstm" else (hx,)
            states = tuple(given if order is None else (s.index_select(1, order) for s in given))
        batch = arguments.packed_batch(input, states or ())
        # resets and lengths as stand-ins: their values do not matter.
        asked = How(resets, batch_sizes, save=self.save, backend=self.backend, cells=cells)  # type: ignore[arg-type]
        tensors = (*(t for directions in layers for weights in directions for t in weights), *(states or ()))
        more: Any = {"packed": (batch_sizes.shape[0], batch), "projected": self.proj_size > 0}
        chosen = functional.choose(self.cell, data, tensors, asked, self.hidden_size, **more)
        if chosen.backend == "aten" and not chosen.marked:
            y, final = self._layers_packed(layers, data, batch_sizes, batch, states)
            every = None
        else:
            where = packing.layout(batch_sizes, batch, data.shape[0], data.device)
            how = How(resets=self._packed_resets(resets, input, where), lengths=where.lengths, padded=True)
            y, final, every = self._layers(layers, packing.pad(data, where), states, how, cells)
            y, every = packing.pack(y, where), None if every is None else packing.pack(every, where)
        if back is not None:
            final = tuple(s.index_select(1, back) for s in final)
        packed = PackedSequence(y, batch_sizes, order, back)
        return packed, final, None if every is None else PackedSequence(every, batch_sizes, order, back)

    def _packed_resets(
        self, resets: Tensor | PackedSequence | None, input: PackedSequence, where: packing.Layout
    ) -> Tensor | None:
        """resets of a packed input, packed like it or padded in the batch's own order: [T, B] in the packed order."""
        if resets is None:
            return None
        if isinstance(resets, PackedSequence):
            return packing.pad(resets.data, where)
        resets = resets.t() if self.batch_first else resets
        return resets if input.sorted_indices is None else resets.index_select(1, input.sorted_indices)

    def _layers(
        self,
        layers: list[list[tuple[Tensor | None, ...]]],
        x: Tensor,
        states: tuple[Tensor, ...] | None,
        how: How,
        cells: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """All layers over x [T, B, I]; states [layers * directions, B, .]."""
        count, finals, every = 2 if self.bidirectional else 1, [], None
        own = ((False, True)[:count], self.save, self.backend, self.precision)
        fits = not torch._C._is_any_autocast_enabled()  # under autocast it shows when all is cast
        for layer, directions in enumerate(layers):
            last = layer == self.num_layers - 1
            mine = None if states is None else tuple(s[layer * count : (layer + 1) * count] for s in states)
            options = How(how.resets, how.lengths, *own, cells and last, how.padded or layer > 0, fits=fits)
            x, final, every = functional.run(self.cell, x, mine, directions, options)
            finals.append(final)
            if self.dropout and self.training and not last:
                x = dropout(x, self.dropout)
        return x, _joined(finals), every

    def _layers_packed(
        self,
        layers: list[list[tuple[Tensor | None, ...]]],
        x: Tensor,
        batch_sizes: Tensor,
        batch: int,
        states: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers by torch's own, over a PackedSequence's data."""
        count, finals = 2 if self.bidirectional else 1, []
        for layer, directions in enumerate(layers):
            mine = None if states is None else tuple(s[layer * count : (layer + 1) * count] for s in states)
            x, final = functional.aten_packed(self.cell, x, batch_sizes, batch, mine, directions)
            finals.append(final)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = dropout(x, self.dropout)
        return x, _joined(finals)


def _joined(finals: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Each layer's final states [directions, B, .], one below the other."""
    return finals[0] if len(finals) == 1 else tuple(torch.cat(s) for s in zip(*finals, strict=True))


def _rate(dropout: Any) -> float:
    """dropout as a float; what float raises, in words that name it."""
    try:
        return float(dropout)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = ValueError if isinstance(error, OverflowError) else type(error)
        raise kind(f"{_DROPOUT}, got {checks.kind(dropout)}") from None


_DROPOUT = "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"


def _check_options(
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    bidirectional: bool,
    proj_size: int,
    stacklevel: int,
) -> None:
    """torch.nn's checks, in its words and order; and of bidirectional, at whose type it stumbles when called."""
    if not isinstance(dropout, numbers.Number) or not 0 <= dropout <= 1 or isinstance(dropout, bool):
        raise ValueError(_DROPOUT)
    if dropout > 0 and isinstance(num_layers, int) and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last "
            "recurrent layer, so non-zero dropout expects "
            f"num_layers greater than 1, but got dropout={dropout} and "
            f"num_layers={num_layers}",
            stacklevel=stacklevel,
        )
    checks.boolean("bias", bias)
    checks.boolean("batch_first", batch_first)
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        checks.integer(name, size, bools=True)
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero")
    checks.integer("num_layers", num_layers)
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    checks.integer("proj_size", proj_size)
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")
    checks.boolean("bidirectional", bidirectional)


class LSTM(_Layer):
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

    cell = "lstm"

    @overload
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
            resets: bool [T, B], with ``batch_first`` [B, T], without a batch [T]. Where it is ``True``, an episode
                begins at that step: no state crosses from the step before it, in any layer or direction, nor does
                ``hx`` reach the first step. For a PackedSequence: packed like the input, or padded, in the order of the
                sequences. Default: ``None``, no resets
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
        y, (h, c), every = self._run(input, hx, resets, lengths, return_cell_states)  # type: ignore[arg-type]
        return (y, (h, c), every) if return_cell_states else (y, (h, c))

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class _OneState(_Layer):
    """A layer whose only state is its output."""

    @overload
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
            resets: bool [T, B], with ``batch_first`` [B, T], without a batch [T]. Where it is ``True``, an episode
                begins at that step: no state crosses from the step before it, in any layer or direction, nor does
                ``hx`` reach the first step. For a PackedSequence: packed like the input, or padded, in the order of the
                sequences. Default: ``None``, no resets
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
        y, (h,), _ = self._run(input, hx, resets, lengths)  # type: ignore[arg-type]
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

    return checked  # type: ignore[return-value]


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
        self.cell = "gru" if reset_after else "gru_before"
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        super().__init__(*sizes, device, dtype, backend=backend, save=save, precision=precision)
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
        self.cell = functional.rnn_cell_name(nonlinearity)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        super().__init__(*sizes, device, dtype, backend=backend, save=save, precision=precision)
        self.nonlinearity = nonlinearity

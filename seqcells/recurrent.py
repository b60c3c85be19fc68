"""Recurrent: layers of any cell over whole sequences; what LSTM, GRU and RNN of `layers` are, too.

Parameters are read at each call, so weight norm, parametrizations, pruning and tying need nothing.
"""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import arguments, checks, functional, layer_arguments, modules, packing, plain
from .cell import Cell, get
from .functional import How

Parameters = dict[str, Tensor]  # of one layer and direction, by the names of `_shapes`


class Recurrent(modules.Module):
    """Apply a multi-layer recurrent network of any cell to an input sequence.

    It has the options of :class:`torch.nn.LSTM`, and more: the cell is one that :func:`seqcells.cell` made, with any
    number of states, with trained vectors, per-step inputs and constants of its own. LSTM, GRU and RNN are subclasses
    under torch.nn's names.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers and D
    the number of directions (2 if bidirectional, else 1).

    Args:
        cell: The cell, or its name.
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in each state.
        num_layers: L, the number of layers, each on top of the one before. Default: 1
        bias: If ``False``, there are no ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input, output and per-step inputs have the shape [B, T, ...] instead of [T, B, ...].
            The states do not change. Default: ``False``
        dropout: The probability with which an element of the output of each layer but the last is zeroed in training.
            Default: 0
        bidirectional: If ``True``, each layer has a second direction, from the last step to the first. Default:
            ``False``
        device: The device of the parameters. Default: ``None``, torch's
        dtype: The dtype of the parameters. Default: ``None``, torch's
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, what
            :func:`seqcells.backend` says, else "auto"
        save: What is saved for backward: "gates", or "states", less memory for one more matrix product. Default:
            "gates"
        precision: How the kernels multiply in float32: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, by PyTorch's switches for its own RNNs
        constants: The cell's constants by name, where they are not to have the values of its definition.

    Inputs and outputs are described at :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [Gx*H, I], of the layers above the first [Gx*H, D*H]. Gx is the
            number of gates whose x the cell reads; they are in the order of the cell's ``gates``.
        weight_hh_l[k]: The recurrent weights of layer k, [Gu*H, H], of the Gu gates whose U the cell uses, in that
            order. A cell without a recurrent product has none.
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, of those gates that have one.
        [name]_l[k]: The cell's parameter of that name, [H]; a scalar [1].

    The second direction's names end in ``_reverse``. All, the cell's own parameters too, are drawn from
    U(-1/sqrt(H), 1/sqrt(H)), as in torch.nn.

    Raises:
        TypeError, ValueError: As torch.nn.LSTM does, for arguments of a wrong type or value; so for an unknown cell and
            for a constant that the cell does not have. CellError for a cell whose step cannot be understood.

    Example::

        >>> @seqcells.cell(gates="f n", states="h")
        ... def mgu(x, U, h):
        ...     f = torch.sigmoid(x.f + U.f(h))
        ...     n = torch.tanh(x.n + U.n(f * h))
        ...     return h + f * (n - h)
        >>> layer = seqcells.Recurrent(mgu, 10, 20, num_layers=2, bidirectional=True)
        >>> y, h_n = layer(torch.randn(5, 3, 10), lengths=[5, 4, 2])
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([4, 3, 20]))

    A cell with two states, a trained vector, an input of its own for each step and a constant::

        >>> @seqcells.cell(gates="f g", states="h c", params="p", inputs="a", constants="leak=0.1")
        ... def leaky(x, U, h, c, p, a, leak):
        ...     f = a * torch.sigmoid(x.f + U.f(h) + p * c)
        ...     c = (1 - leak) * f * c + torch.tanh(x.g + U.g(h))
        ...     return torch.tanh(c), c
        >>> layer = seqcells.Recurrent(leaky, 10, 20, leak=0.2)
        >>> layer.p_l0.shape
        torch.Size([20])
        >>> y, (h_n, c_n) = layer(torch.randn(5, 3, 10), a=torch.rand(5, 3))
        >>> c_n.shape
        torch.Size([1, 3, 20])
    """

    cell: Cell
    proj_size: int = 0
    _hx: str = "state"  # the name of forward's argument

    def __init__(
        self,
        cell: Cell | str,
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
        backend: str | None = None,
        save: str = "gates",
        precision: str | None = None,
        **constants: float,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        self._set_up(modules.cell_of(cell, constants), *sizes, device, dtype, backend, save, precision)

    def _set_up(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Device,
        dtype: torch.dtype | None,
        backend: str | None,
        save: str,
        precision: str | None,
    ) -> None:
        """What constructors have in common."""
        nn.Module.__init__(self)  # in `subclasses` torch.nn.LSTM's would be next
        rate = _rate(dropout)  # first, as in torch.nn
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        _check_options(*sizes, stacklevel=_outside(self))
        checks.device(device, optional=True)
        checks.dtype(dtype, optional=True)
        arguments.options(backend, precision, save, cell.key)
        self.cell = cell
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
        out = self.proj_size or self.hidden_size
        width = out * (2 if self.bidirectional else 1) if layer else self.input_size
        projection = {"weight_hr": (self.proj_size, self.hidden_size)} if self.proj_size else {}
        return modules.shapes(self.cell, self.hidden_size, width, out, self.bias) | projection

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
        nn.Module.__setstate__(self, state)
        # Modules pickled by earlier versions have the name of their cell, LSTMs not even that; the oldest are of one
        # layer and direction.
        self.__dict__["cell"] = get(self.__dict__.get("cell", "lstm"))
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
        return text if self._hx == "hx" else modules.with_cell(self.cell, text)

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: Tensor | tuple[Tensor, ...] | None = None,
        *,
        resets: Tensor | PackedSequence | Sequence[Any] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        return_states: bool = False,
        **inputs: Tensor | PackedSequence,
    ) -> Any:
        """Run all layers over a sequence.

        Args:
            x: [T, B, I], with ``batch_first`` [B, T, I], without a batch [T, I]; or a PackedSequence.
            state: The initial states, a tuple of one [D*L, B, H] for each state of the cell, or, of a cell with one
                state, that tensor; without a batch [D*L, H]. Default: ``None``, zeros
            resets: [T, B], with ``batch_first`` [B, T], without a batch [T]: bools or the numbers 0 and 1, in a tensor
                or a nested list. Where it is set, an episode begins at that step: no state crosses from the step before
                it, in any layer or direction, nor does ``state`` reach the first step. For a PackedSequence: packed
                like x, or padded, in the order of the sequences. Default: ``None``, no resets
            lengths: int [B] on any device, or a list of ints: the steps of each sequence in a padded batch. The results
                are those of the packed batch: the output is zero beyond, the states are those after the last step, and
                the padding may hold anything. Default: ``None``, all steps
            return_states: If ``True``, the states after every step are returned, too. Default: ``False``
            inputs: The cell's per-step inputs, all of them, by name: [T, B], one value for all units, or [T, B, H],
                laid out as x is. For a PackedSequence: packed like x, or padded, in the order of the sequences. Every
                layer and direction is given them. They are differentiable.

        Returns:
            ``output, state`` or ``output, state, states``. output: the last layer's after every step, [T, B, D*H], in
            the layout of x (packed if that is). state: after the last step, as the argument. states: of the last layer
            after every step, each laid out as output; a tuple, or, of a cell with one state, a tensor.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn.LSTM does, for types, shapes, dtypes and devices that do
                not fit; RuntimeError also where the backend that was asked for cannot do it.
        """
        one = len(self.cell.states) == 1
        # Whether torch.fx traces.
        known = type(x) is Tensor and not inputs and (state is None or type(state) in (Tensor, tuple))
        if not known:
            options = {"resets": resets, "lengths": lengths, "return_states": return_states}
            if (call := self._traced(x, state, **options, **inputs)) is not None:
                return call
        y, final, every = self._run(x, state, resets, lengths, return_states, inputs)
        state = final[0] if one else final
        return (y, state, every[0] if one else every) if return_states else (y, state)

    def _directions(self) -> list[list[Parameters]]:
        """Of each layer its one or two directions' parameters."""
        count = 2 if self.bidirectional else 1
        found: list[list[Parameters]] = []
        for layer in range(self.num_layers):
            shapes = self._shapes(layer)
            found.append([])
            for names in self._all_weights[layer * count : (layer + 1) * count]:
                each = zip(shapes.items(), names, strict=True)
                found[-1].append({part: checks.parameter(self, name, shape) for (part, shape), name in each})
        return found

    def _check(
        self, x: Any, state: Any, resets: Any = None, lengths: Any = None, states: Any = False, inputs: Any = None
    ) -> tuple[list[list[Parameters]], Any, Tensor | None]:
        """Raise what is wrong with a call; else give `_directions`, and resets and lengths as tensors."""
        layers = self._directions()
        return layers, *layer_arguments.layer(self, layers, x, state, resets, lengths, states, inputs or {})

    def _run(
        self,
        x: Tensor | PackedSequence,
        state: Any,
        resets: Any,
        lengths: Tensor | Sequence[int] | None,
        states: bool = False,
        inputs: Mapping[str, Any] | None = None,
    ) -> tuple[Any, tuple[Tensor, ...], Any]:
        """Output, final states, and the last layer's states after every step or None, in the layout of x."""
        if lengths is None and states is False and not inputs:
            try:
                found: Any
                if not isinstance(x, PackedSequence):
                    found = plain.layers(self, x, state, resets)
                else:
                    found = plain.packed(self, x, state) if resets is None else None
            except checks.FAILURES as error:
                raise checks.clearer(error, self._check, x, state, resets) from None
            if found is not None:
                return *found, None
        layers, resets, lengths = self._check(x, state, resets, lengths, states, inputs)
        given = None if state is None else (state,) if len(self.cell.states) == 1 else tuple(state)
        more = dict(inputs or {})
        if isinstance(x, PackedSequence):
            return self._run_packed(layers, x, given, resets, states, more)
        batched = x.dim() == 3
        if not batched:
            x = x[:, None]
            resets = None if resets is None else resets[:, None]
            given = None if given is None else tuple(s[:, None] for s in given)
            more = {name: t[:, None] for name, t in more.items()}
        elif self.batch_first:
            x = x.transpose(0, 1)
            resets = None if resets is None else resets.t()
            more = {name: t.transpose(0, 1) for name, t in more.items()}
        y, final, every = self._layers(layers, x, given, How(resets=resets, lengths=lengths), states, more)
        if not batched:
            return y[:, 0], tuple(s[:, 0] for s in final), None if every is None else tuple(s[:, 0] for s in every)
        if self.batch_first:
            y, every = y.transpose(0, 1), None if every is None else tuple(s.transpose(0, 1) for s in every)
        return y, final, every

    def _run_packed(
        self,
        layers: list[list[Parameters]],
        x: PackedSequence,
        given: tuple[Tensor, ...] | None,
        resets: Tensor | PackedSequence | None,
        states: bool,
        inputs: Mapping[str, Any],
    ) -> tuple[PackedSequence, tuple[Tensor, ...], tuple[PackedSequence, ...] | None]:
        data, batch_sizes, order, back = x
        if given is not None and order is not None:
            given = tuple(s.index_select(1, order) for s in given)
        batch = layer_arguments.packed_batch(x, given or ())
        # resets and lengths as stand-ins: their values do not matter.
        asked = How(resets, batch_sizes, save=self.save, backend=self.backend, cells=states)  # type: ignore[arg-type]
        tensors = (*(t for directions in layers for of in directions for t in of.values()), *(given or ()))
        more: Any = {"packed": (batch_sizes.shape[0], batch), "projected": self.proj_size > 0}
        chosen = functional.choose(self.cell.key, data, tensors, asked, self.hidden_size, **more)
        every = None
        if chosen.backend == "aten" and not chosen.marked:
            groups = [_weights(of) for directions in layers for of in directions]
            own = (self.num_layers, self.dropout, self.training, self.bidirectional)
            y, final = functional.aten_packed(self.cell.key, data, batch_sizes, batch, given, groups, own)
        else:
            where = packing.layout(batch_sizes, batch, data.shape[0], data.device)
            flags = None if resets is None else self._padded(resets, x, where)
            how = How(resets=flags, lengths=where.lengths, padded=True)
            extras = {name: self._padded(t, x, where) for name, t in inputs.items()}
            y, final, found = self._layers(layers, packing.pad(data, where), given, how, states, extras, where)
            y = packing.pack(y, where)
            every = None if found is None else [packing.pack(s, where) for s in found]
        if back is not None:
            final = tuple(s.index_select(1, back) for s in final)
        packed = PackedSequence(y, batch_sizes, order, back)
        shown = None if every is None else tuple(PackedSequence(s, batch_sizes, order, back) for s in every)
        return packed, final, shown

    def _padded(self, given: Tensor | PackedSequence, x: PackedSequence, where: packing.Layout) -> Tensor:
        """resets or a per-step input of a packed x, packed like it or padded in the batch's own order: [T, B, ...] in
        the packed order, zero where padding."""
        if isinstance(given, PackedSequence):
            return packing.pad(given.data, where)
        given = given.transpose(0, 1) if self.batch_first else given
        given = given if x.sorted_indices is None else given.index_select(1, x.sorted_indices)
        return given.masked_fill(where.padding.reshape(*where.padding.shape, *(1,) * (given.dim() - 2)), 0)

    def _layers(
        self,
        layers: list[list[Parameters]],
        x: Tensor,
        given: tuple[Tensor, ...] | None,
        how: How,
        states: bool,
        inputs: Mapping[str, Tensor],
        where: packing.Layout | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """All layers over x [T, B, I]; given [layers * directions, B, .]. where: the rows of a packed input."""
        count, finals, every = 2 if self.bidirectional else 1, [], None
        own = ((False, True)[:count], self.save, self.backend, self.precision)
        fits = not torch._C._is_any_autocast_enabled()  # under autocast it shows when all is cast
        for layer, directions in enumerate(layers):
            last = layer == self.num_layers - 1
            mine = None if given is None else tuple(s[layer * count : (layer + 1) * count] for s in given)
            options = How(how.resets, how.lengths, *own, states and last, how.padded or layer > 0, fits=fits)
            groups = [_weights(of) for of in directions]
            vectors = [{name: of[name] for name in self.cell.params} for of in directions]
            x, final, every = functional.run(self.cell, x, mine, groups, options, params=vectors, inputs=inputs)
            finals.append(final)
            if self.dropout and self.training and not last:
                # Of a packed input only its rows: torch.nn draws as many random numbers.
                rows = x if where is None else packing.pack(x, where)
                rows = dropout(rows, self.dropout)
                x = rows if where is None else packing.pad(rows, where)
        joined = finals[0] if len(finals) == 1 else tuple(torch.cat(s) for s in zip(*finals, strict=True))
        return x, joined, every


def _weights(of: Parameters) -> tuple[Tensor | None, ...]:
    """w_ih, w_hh, b_ih, b_hh (and w_hr), as functional.run takes them."""
    projection = (of["weight_hr"],) if "weight_hr" in of else ()
    return (*(of.get(part) for part in modules.PARTS), *projection)


def _outside(module: nn.Module) -> int:
    """A warning's stacklevel, from a function that a constructor's helper calls: the line that makes the module."""
    level, frame = 2, sys._getframe(1)
    while frame.f_locals.get("self") is module and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


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

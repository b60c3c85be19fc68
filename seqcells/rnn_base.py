"""What LSTM, GRU and RNN of `layers` have in common: parameters, their arguments' checks, a call of all layers."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import arguments, checks, functional, modules, packing, plain, reference
from .functional import How


class _Layer(modules.Module):
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
        nn.Module.__init__(self)  # in `subclasses` torch.nn.LSTM's would be next
        rate = _rate(dropout)  # first, as in torch.nn
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        # Warnings name the caller's line: GRU and RNN have a constructor of their own between, and its wrapper.
        own = type(self).__init__ is not _Layer.__init__
        _check_options(*sizes, stacklevel=3 + own + (self.cell != "lstm"))
        checks.device(device, optional=True)
        checks.dtype(dtype, optional=True)
        arguments.options(backend, precision, save, self.cell)
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
        rows, out = reference.get(self.cell).rows[1] * self.hidden_size, self.proj_size or self.hidden_size
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
        nn.Module.__setstate__(self, state)
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
    ) -> tuple[list[list[tuple[Tensor | None, ...]]], Any, Tensor | None]:
        """Raise what is wrong with a call; else give `_directions`, and resets and lengths as tensors."""
        layers = self._directions()
        return layers, *arguments.layer(self, layers, input, hx, resets, lengths, cells)

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        resets: Any,
        lengths: Tensor | Sequence[int] | None,
        cells: bool = False,
    ) -> tuple[Any, tuple[Tensor, ...], Any]:
        """Output, final states, and all cell states of the last layer or None, in the input's own layout."""
        if lengths is None and cells is False:
            try:
                found: Any
                if not isinstance(input, PackedSequence):
                    found = plain.layers(self, input, hx, resets)
                else:
                    found = plain.packed(self, input, hx) if resets is None else None
            except checks.FAILURES as error:
                raise checks.clearer(error, self._check, input, hx, resets) from None
            if found is not None:
                return *found, None
        layers, resets, lengths = self._check(input, hx, resets, lengths, cells)
        if isinstance(input, PackedSequence):
            return self._run_packed(layers, input, hx, resets, cells)
        states = None if hx is None else (hx[0], hx[1]) if self.cell == "lstm" else (hx,)
        x, batched = input, input.dim() == 3
        if not batched:
            x = input[:, None]
            resets = None if resets is None else resets[:, None]
            states = None if states is None else tuple(s[:, None] for s in states)
        elif self.batch_first:
            x = input.transpose(0, 1)
            resets = None if resets is None else resets.t()
        y, final, every = self._layers(layers, x, states, How(resets=resets, lengths=lengths), cells)
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
            groups = [weights for directions in layers for weights in directions]
            own = (self.num_layers, self.dropout, self.training, self.bidirectional)
            y, final = functional.aten_packed(self.cell, data, batch_sizes, batch, states, groups, own)
            every = None
        else:
            where = packing.layout(batch_sizes, batch, data.shape[0], data.device)
            how = How(resets=self._packed_resets(resets, input, where), lengths=where.lengths, padded=True)
            y, final, every = self._layers(layers, packing.pad(data, where), states, how, cells, where)
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
        where: packing.Layout | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """All layers over x [T, B, I]; states [layers * directions, B, .]. where: the rows of a packed input."""
        count, finals, every = 2 if self.bidirectional else 1, [], None
        own = ((False, True)[:count], self.save, self.backend, self.precision)
        fits = not torch._C._is_any_autocast_enabled()  # under autocast it shows when all is cast
        for layer, directions in enumerate(layers):
            last = layer == self.num_layers - 1
            mine = None if states is None else tuple(s[layer * count : (layer + 1) * count] for s in states)
            options = How(how.resets, how.lengths, *own, cells and last, how.padded or layer > 0, fits=fits)
            x, final, states_after = functional.run(self.cell, x, mine, directions, options)
            every = None if states_after is None else states_after[1]
            finals.append(final)
            if self.dropout and self.training and not last:
                # Of a packed input only its rows: torch.nn draws as many random numbers.
                rows = x if where is None else packing.pack(x, where)
                rows = dropout(rows, self.dropout)
                x = rows if where is None else packing.pad(rows, where)
        joined = finals[0] if len(finals) == 1 else tuple(torch.cat(s) for s in zip(*finals, strict=True))
        return x, joined, every


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

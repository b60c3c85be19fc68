"""Recurrent: layers of any cell over whole sequences, and the base class of LSTM, GRU and RNN in `layers`.

Parameters are read at each call, so weight norm, parametrizations, pruning and weight tying work without further code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import arguments, backends, checks, dispatch, extras, layer_arguments, masks, modules, packing, precisions
from .cell import Cell, get
from .dispatch import ScanOptions
from .dropouts import OPTIONS, of_call, of_weights, set_up
from .engines import aten
from .heads import join_heads, split_heads
from .layer_arguments import Flags, Input, Inputs, Plain, State
from .stacked import run_together, why_apart

States = tuple["Tensor | None", ...]
_OWN = (None, "auto", "aten")  # backends by which torch's own may run
_SAVES, _PRECISIONS = arguments.SAVES, (None, *arguments.PRECISIONS)


class Recurrent(modules.Layer):
    """Apply a multi-layer recurrent network of any cell to an input sequence.

    It has the options of :class:`torch.nn.LSTM`, and runs any cell made by :func:`seqcells.cell`. Such a cell may have
    any number of states, and trained vectors, per-step inputs and constants of its own. LSTM, GRU and RNN are
    subclasses with torch.nn's names.

    Below, T is the number of steps, B the batch size, I the input size, H the hidden size, L the number of layers and D
    the number of directions (2 if bidirectional, else 1).

    Args:
        cell: The cell, or its name.
        input_size: I, the number of features in the input.
        hidden_size: H, the number of features in each state.
        num_layers: L, the number of stacked layers. Default: 1
        bias: If ``False``, there is no ``bias_ih`` and no ``bias_hh``. Default: ``True``
        batch_first: If ``True``, input, output and per-step inputs have the shape [B, T, ...] instead of [T, B, ...].
            The states do not change. Default: ``False``
        dropout: The probability of dropout on the outputs of each layer except the last, in training. Default: 0
        bidirectional: If ``True``, each layer also runs from the last step to the first. Default: ``False``
        device: The device of the parameters. Default: ``None``, torch's default
        dtype: The dtype of the parameters. Default: ``None``, torch's default
        backend: "auto", "triton", "aten", "loop" or "reference", see :mod:`seqcells.backends`. Default: ``None``, the
            one set by :func:`seqcells.backend`, else "auto"
        save: What is saved for backward: "gates" or "states". "states" takes less memory, and one more matrix product
            in backward. Default: "gates"
        precision: The precision of the kernels' float32 matrix products: "ieee", "tf32" or "tf32x3", see
            :func:`seqcells.functional.scan`. Default: ``None``, PyTorch's setting for its own RNNs
        heads: The number of heads: groups of H/heads hidden units whose recurrent products stay within the group.
            Default: 1
        weight_dropout: The probability of dropout on the recurrent weights, in training. Each call draws one mask for
            all of its steps (Merity et al. 2018, arXiv:1708.02182). Default: 0
        recurrent_dropout: The probability of dropout on what every recurrent product reads, in training, with one mask
            for each sequence (Gal & Ghahramani 2016, arXiv:1512.05287). Default: 0
        candidate_dropout: The probability of dropout on the new values that a step adds to its state, in training, with
            a new mask at each step (Semeniuta et al. 2016, arXiv:1603.05118). Only for cells with such a mask, see
            ``dropout`` of :func:`seqcells.cell`. Default: 0
        zoneout: The probability that a unit keeps its state of the step before, in training (Krueger et al. 2017,
            arXiv:1606.01305); outside training, each state is the mean of old and new. One number, or a tuple with
            one for each state. Default: 0
        constants: New values for the cell's constants, by name. Default: the values in the cell's definition

    For inputs and outputs see :meth:`forward`.

    Attributes:
        weight_ih_l[k]: The input weights of layer k, [Gx*H, I], of the layers above the first [Gx*H, D*H]. Gx is the
            number of gates whose x the cell reads; they are in the order of the cell's ``gates``.
        weight_hh_l[k]: The recurrent weights of layer k, [Gu*H, H/heads], of the Gu gates whose U the cell uses, in the
            same order. A cell without a recurrent product has none.
        bias_ih_l[k], bias_hh_l[k]: The biases of layer k, for those gates that have one.
        [name]_l[k]: The cell's parameter of that name, [H], or [1] if it is a scalar.

    The second direction's names end in ``_reverse``. All parameters, including the cell's own, are initialized from
    U(-1/sqrt(H), 1/sqrt(H)), as in torch.nn, but for those to which the cell gives a start.

    Raises:
        TypeError, ValueError: As torch.nn.LSTM, for arguments of the wrong type or value, including an unknown cell and
            a constant that the cell lacks. CellError for a cell whose step cannot be traced.

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

    A cell with two states, a trained vector, a per-step input and a constant::

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
    heads: int = 1
    weight_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    candidate_dropout: float = 0.0
    zoneout: float | tuple[float, ...] = 0.0
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
        heads: int = 1,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        candidate_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        **constants: float,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        self._set_up(modules.cell_of(cell, constants), sizes, device, dtype, backend, save, precision, heads)
        set_up(self, weight_dropout, recurrent_dropout, zoneout, candidate_dropout)

    def _set_up(
        self,
        cell: Cell,
        sizes: tuple[int, int, int, bool, bool, float, bool, int],
        device: Device,
        dtype: torch.dtype | None,
        backend: str | None,
        save: str,
        precision: str | None,
        heads: int = 1,
    ) -> None:
        """The part that the constructors share. sizes: see layer_arguments.sizes."""
        nn.Module.__init__(self)  # not super(), which in `subclasses` is torch.nn.LSTM's
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size = sizes
        rate = layer_arguments.rate(dropout)  # first, as in torch.nn
        layer_arguments.sizes(sizes, stacklevel=modules.outside(self))
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
        self.heads = layer_arguments.heads(heads, hidden_size, bidirectional)
        self._all_weights: list[list[str]] = []
        self._all_shapes: list[tuple[tuple[int, ...], ...]] = []
        for layer in range(num_layers):
            shapes = self._shapes(layer)
            for suffix in ("", "_reverse")[: 2 if bidirectional else 1]:
                self._all_weights.append([f"{name}_l{layer}{suffix}" for name in shapes])
                self._all_shapes.append(tuple(shapes.values()))
                for name, shape in zip(self._all_weights[-1], shapes.values(), strict=True):
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._parts = tuple(shapes)
        self.reset_parameters()

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter of that layer, by name without suffix; the same for both directions."""
        out = self.proj_size or self.hidden_size
        width = out * (2 if self.bidirectional else 1) if layer else self.input_size
        projection = {"weight_hr": (self.proj_size, self.hidden_size)} if self.proj_size else {}
        return modules.shapes(self.cell, self.hidden_size, width, out // self.heads, self.bias) | projection

    def __setstate__(self, state: dict[str, object]) -> None:
        nn.Module.__setstate__(self, state)
        # Modules pickled by earlier versions have the cell's name instead of the cell, or, if LSTMs, no cell at all.
        # The oldest have one layer and direction.
        self.__dict__["cell"] = get(self.__dict__.get("cell", "lstm"))
        names = ["weight_ih_l0", "weight_hh_l0"] + (["bias_ih_l0", "bias_hh_l0"] if self.bias else [])
        self.__dict__.setdefault("_all_weights", [names])
        layers = [self._shapes(k // (2 if self.bidirectional else 1)) for k in range(len(self._all_weights))]
        self.__dict__["_all_shapes"] = [tuple(shapes.values()) for shapes in layers]
        self.__dict__["_parts"] = tuple(layers[0])
        for name, default in (("precision", None), ("save", "gates"), ("backend", None)):
            self.__dict__.setdefault(name, default)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        sizes: dict[str, object] = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0}
        defaults = sizes | {"bidirectional": False, "reset_after": True, "nonlinearity": "tanh"}
        defaults |= {"backend": None, "save": "gates", "precision": None, "heads": 1}
        defaults |= dict.fromkeys(OPTIONS, 0.0)
        for name, default in defaults.items():
            value = getattr(self, name, default)
            if value != default:
                text += f", {name}={value!r}"
        return text if self._hx == "hx" else modules.with_cell(self.cell, text)

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: Tensor | tuple[Tensor, ...] | None = None,
        *,
        resets: Tensor | PackedSequence | Sequence[object] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        return_states: bool = False,
        **inputs: Tensor | PackedSequence,
    ) -> Any:  # which tuple, the arguments say
        """Run all layers over a sequence.

        Args:
            x: [T, B, I], with ``batch_first`` [B, T, I], without a batch [T, I]; or a PackedSequence.
            state: The initial states, a tuple with one [D*L, B, H] for each state of the cell, or just the tensor if
                the cell has one state; without a batch [D*L, H]. Default: ``None``, zeros
            resets: [T, B], with ``batch_first`` [B, T], without a batch [T]: bools or the numbers 0 and 1, in a tensor
                or a nested list. Where set, a new episode begins at that step: no state crosses from the step before
                it, in any layer or direction. At the first step, this means that ``state`` is not used. For a
                PackedSequence: packed like x, or padded, in the original order of the sequences. Default: ``None``, no
                resets
            lengths: int [B] on any device, or a list of ints: the number of steps of each sequence in a padded batch.
                The results are those of the packed batch: the output is zero at padding, and the final states are those
                after each sequence's last step. The padding may have any values. Default: ``None``, all steps
            return_states: If ``True``, also return the states after every step. Default: ``False``
            inputs: All of the cell's per-step inputs, by name: [T, B] (one value for all units) or [T, B, H], in the
                layout of x. For a PackedSequence: packed like x, or padded, in the original order of the sequences.
                Every layer and direction receives the same inputs. They are differentiable.

        Returns:
            ``output, state`` or ``output, state, states``. output: the last layer's output after every step,
            [T, B, D*H], in the layout of x (packed if x is packed). state: the final states, in the form of the
            argument. states: the last layer's states after every step, each in the layout of output; a tuple, or just
            the tensor if the cell has one state.

        Raises:
            TypeError, ValueError, RuntimeError: As torch.nn.LSTM, for wrong types, shapes, dtypes and devices.
                RuntimeError also if the requested backend does not support the call.
        """
        one = len(self.cell.states) == 1
        # torch.fx is tracing if an argument is a Proxy.
        known = type(x) is Tensor and not inputs and (state is None or type(state) in (Tensor, tuple))
        if not known:
            options = {"resets": resets, "lengths": lengths, "return_states": return_states}
            if (call := self._traced(x, state, **options, **inputs)) is not None:
                return call
        y, final, every = self._run(x, state, resets, lengths, return_states, inputs)
        state = final[0] if one else final
        return (y, state, every[0] if one else every) if return_states else (y, state)

    def _weights(self) -> list[Tensor]:
        """All parameters, in the order of their names. RuntimeError for one that is missing or has another shape."""
        found = []
        for names, shapes in zip(self._all_weights, self._all_shapes, strict=True):
            found += [checks.parameter(self, n, s) for n, s in zip(names, shapes, strict=True)]
        return found

    def _check(
        self, x: Input, state: State, resets: object, lengths: object, states: bool, inputs: Inputs
    ) -> tuple[list[Tensor], Flags, Tensor | None]:
        """Check a call. Returns the parameters, and resets and lengths as tensors."""
        weights = self._weights()
        return weights, *layer_arguments.layer(self, weights, (x, state, resets, lengths, states, inputs))

    def _run(
        self,
        x: Tensor | PackedSequence,
        state: Any,  # a tensor, or a tuple where the cell has several
        resets: Any,  # once checked, a tensor or a PackedSequence
        lengths: Tensor | Sequence[int] | None,
        states: bool = False,
        inputs: Mapping[str, Any] | None = None,  # packed only if x is
    ) -> tuple[Any, tuple[Tensor, ...], Any]:  # what `forward` returns
        """The output, the final states, and the last layer's states after every step (or None), in the layout of x."""
        cell = self.cell
        given = None if state is None else (state,) if len(cell.states) == 1 else state
        plain, ends = None, None
        if lengths is None and states is False and not (inputs or cell.inputs):
            plain = layer_arguments.plain(self, x, given, resets)
            if plain is not None:
                if self.backend in _OWN and (found := self._own(x, given, resets, plain)) is not None:
                    return *found, None
                data, bools = x if isinstance(x, Tensor) else x.data, resets is None or resets.dtype is torch.bool
                if not (bools and layer_arguments.plain_weights(self, plain[0], data)):
                    plain = None
        if plain is None:
            weights, resets, ends = self._check(x, state, resets, lengths, states, inputs or {})
        else:
            weights = plain[0]
        if self.weight_dropout and self.training:
            weights = of_weights(self, weights)
        if not (self.save in _SAVES and self.precision in _PRECISIONS):
            arguments.options(self.backend, self.precision, self.save)
        states_: States = (None,) * len(cell.states) if given is None else tuple(given)
        reverse = (False, True) if self.bidirectional else (False,)
        own = (reverse, self.save, self.backend, self.precision, states)
        extra = inputs or {}
        if not isinstance(x, Tensor):
            return self._run_packed(x, states_, (weights, plain), ScanOptions(resets, None, *own, True), extra)
        batched = x.dim() == 3
        if not batched:
            x, resets = x[:, None], None if resets is None else resets[:, None]
            states_ = tuple(None if s is None else s[:, None] for s in states_)
            extra = {name: t[:, None] for name, t in extra.items()}
        elif self.batch_first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.t()
            extra = {name: t.transpose(0, 1) for name, t in extra.items()}
        y, final, every = self._scan(x, states_, (weights, plain), ScanOptions(resets, ends, *own), extra)
        if not batched:
            return y[:, 0], tuple(s[:, 0] for s in final), None if every is None else tuple(s[:, 0] for s in every)
        if self.batch_first:
            y, every = y.transpose(0, 1), None if every is None else tuple(s.transpose(0, 1) for s in every)
        return y, final, every

    def _own(
        self, x: Input, states: States | None, resets: Tensor | None, plain: Plain
    ) -> tuple[Input, tuple[Tensor, ...]] | None:
        """The output and the final states by torch's own, where that is the first rule's choice; else None."""
        weights, grad, size = plain
        sizes = order = back = None
        if isinstance(x, Tensor):
            data = x.transpose(0, 1) if self.batch_first else x
        else:
            data, sizes, order, back = x
        if not dispatch.own_layers(self, data, size, grad):
            return None
        # oneDNN's LSTM reads on past the end of a weight that is too small. All else torch's own says.
        if sizes is None and self.cell.key == "lstm" and not layer_arguments.plain_weights(self, weights, data, 2):
            return None
        if resets is not None and (states is not None or resets.dtype is not torch.bool):  # of one step
            rows = resets.tolist() if size[1] <= arguments.FEW else [[True, False]]  # as if some are set
            values = rows[0] if len(rows) == 1 else [row[0] for row in rows]
            if any(values):
                if not {*values} <= {0, 1}:
                    return None
                if all(values) and not (self.bidirectional or torch.is_grad_enabled()):
                    states = None  # none of them is read
                elif states is not None:  # they zero the states before it
                    flags = resets.view(-1, 1).bool()
                    states = masks.cleared(states, flags, (False, True) if self.bidirectional else (False,))
        if order is not None and states is not None:
            states = tuple(None if s is None else s.index_select(1, order) for s in states)
        initial = (None,) * len(self.cell.states) if states is None else states
        try:
            y, final = aten.stack(self, data, sizes, initial, weights, size[1], grad)
        except checks.FAILURES as error:
            state = None if states is None else states if len(states) > 1 else states[0]
            raise checks.clearer(error, self._check, x, state, resets, None, False, {}) from None
        if sizes is None:
            return y.transpose(0, 1) if self.batch_first else y, final
        final = final if back is None else tuple(s.index_select(1, back) for s in final)
        return PackedSequence(y, sizes, order, back), final

    def _run_packed(
        self,
        x: PackedSequence,
        states: States,
        weights: tuple[Sequence[Tensor], Plain | None],
        options: ScanOptions,
        inputs: Inputs,
    ) -> tuple[PackedSequence, tuple[Tensor, ...], tuple[PackedSequence, ...] | None]:
        """`_run` for a PackedSequence."""
        _, batch_sizes, order, back = x
        if order is not None:
            states = tuple(None if s is None else s.index_select(1, order) for s in states)
        y, final, every = self._scan(x.data, states, weights, options, inputs, x)
        if back is not None:
            final = tuple(s.index_select(1, back) for s in final)
        packed = PackedSequence(y, batch_sizes, order, back)
        states_packed = None if every is None else tuple(PackedSequence(s, batch_sizes, order, back) for s in every)
        return packed, final, states_packed

    def _scan(
        self,
        x: Tensor,
        states: States,
        parameters: tuple[Sequence[Tensor], Plain | None],
        options: ScanOptions,
        inputs: Inputs,
        packed: PackedSequence | None = None,
    ) -> dispatch.Result:
        """Run all layers over x [T, B, I], or over the data of `packed`.

        states [layers * directions, B, .], in the order of `packed`. parameters: the parameters, and the result of
        layer_arguments.plain. Results have the layout of x: [T, B, .], or packed rows.
        """
        H, heads, (weights, plain) = self.hidden_size, self.heads, parameters
        if torch._C._is_any_autocast_enabled() and backends.autocasting(x.device):
            x, states, groups, (_, inputs) = precisions.autocast(self.cell.key, x, states, [weights], (None, inputs))
            with torch.autocast(x.device.type, enabled=False):
                return self._scan(x, states, (groups[0], None), options, inputs, packed)  # type: ignore[arg-type]  # none is None
        cell, drops = self.cell, None
        if self.zoneout or (self.training and (self.recurrent_dropout or self.candidate_dropout)):
            cell, drops = of_call(self, x)
        size, where = None, None
        if packed is not None:
            size = len(packed.batch_sizes), layer_arguments.packed_batch(packed, states)
            options = options._replace(lengths=packed.batch_sizes)
        beside = (t.data if isinstance(t, PackedSequence) else t for t in inputs.values())
        found = (plain[1], True) if plain else dispatch.survey(x, (*weights, *states, *beside))
        kind = (self.proj_size, heads, self.num_layers, self.dropout > 0 and self.training and self.num_layers > 1)
        case = dispatch.case_of(cell, x, found, options, H // heads, packed=size, kind=kind)
        choice = dispatch.choose(case)
        if packed is not None and size is not None and not choice.stack:
            where = packing.layout(packed.batch_sizes, size[1], x.shape[0], x.device)
            x, flags = packing.pad(x, where), options.resets
            flags = None if flags is None else packing.padded(flags, packed, where, self.batch_first)
            options = options._replace(resets=flags, lengths=where.lengths)
            inputs = {name: packing.padded(t, packed, where, self.batch_first) for name, t in inputs.items()}
        mask = None
        if case.observed or options.resets is not None or options.lengths is not None:
            x, states, options, mask = dispatch.prepared(case, choice, x, states, options)
        if choice.stack:
            sizes = None if packed is None else packed.batch_sizes
            batch = x.shape[1] if size is None else size[1]
            return *aten.stack(self, x, sizes, states, weights, batch, case.grad), None
        extra = extras.inputs(cell, inputs, x, H, options.lengths) if inputs else None
        if self.num_layers > 1 and extra is None and drops is None and not why_apart(case, choice, options.precision):
            calls = [self._call(n, x, states, weights) for n in range(self.num_layers)]
            x, joined, every = run_together(calls, mask, case, choice, options)
            return x if where is None else packing.pack(x, where), joined, every
        if heads > 1:
            options = options._replace(reverse=tuple(back for back in options.reverse for _ in range(heads)))
        finals, every = [], None
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = packing.dropped(x, self.dropout, where)
            call = self._call(layer, x, states, weights)._replace(inputs=extra, mask=mask)
            call = call if heads == 1 else split_heads(call, heads, H)
            own = options if layer == self.num_layers - 1 else options._replace(all_states=False)
            own = own if drops is None else own._replace(dropout=drops[layer])
            x, final, every = dispatch.execute(cell, call, own, case, choice)
            finals.append(final if heads == 1 else tuple(join_heads(s, heads) for s in final))
        joined = finals[0] if len(finals) == 1 else tuple(torch.cat(s) for s in zip(*finals, strict=True))
        if where is None:
            return x, joined, every
        return packing.pack(x, where), joined, None if every is None else tuple(packing.pack(s, where) for s in every)

    def _call(self, layer: int, x: Tensor, states: States, weights: Sequence[Tensor]) -> dispatch.Call:
        """One layer's tensors, selected from those of all layers."""
        count = 2 if self.bidirectional else 1
        n, first = len(weights) // (count * self.num_layers), layer * count
        given = [weights[k * n : (k + 1) * n] for k in range(first, first + count)]
        own = tuple(None if s is None else s[first : first + count] for s in states)
        if self._parts == modules.PARTS:
            return dispatch.Call(x, own, given)
        named = [dict(zip(self._parts, of, strict=True)) for of in given]
        nothing = x.new_empty(0, x.shape[-1])  # weight_ih of a cell that reads no x
        groups: list[aten.Weights] = [
            (
                of.get("weight_ih", nothing),
                *(of.get(part) for part in modules.PARTS[1:]),
                *[of[part] for part in of if part == "weight_hr"],
            )
            for of in named
        ]
        if self._parts[0] != "weight_ih":
            # No weight has the hidden size, so states must.
            own = tuple(x.new_zeros(count, x.shape[1], self.hidden_size) if s is None else s for s in own)
        cell = self.cell
        vectors = [{name: of[name] for name in cell.params} for of in named]
        params = extras.params(cell, vectors, x, self.hidden_size) if cell.params else None
        return dispatch.Call(x, own, groups, params=params)

"""Weights from and to other libraries: Keras, haste, xlstm, and hand-written cells of common forms.

The from_ functions take arrays and return a cell's state_dict with torch.nn's names: weight_ih [G*H, I], weight_hh
[G*H, H], bias_ih and bias_hh [G*H]; without biases if there were none. load_ copies such a dict into a cell, or into
one layer and direction of an LSTM, GRU or RNN, of seqcells or torch.nn.

    order of gates      LSTM     GRU
    torch, seqcells     i f g o  r z n
    Keras               i f c o  z r h    kernel [I, G*H], recurrent_kernel [H, G*H]
    haste               i g f o  z r h    the same shapes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import checks, weights
from .cell import get
from .kernels.registry import BUILT_IN

Array = object  # anything numpy.asarray takes, or a tensor
# For each of our cells, other libraries' name: lstm, gru or rnn.
KINDS = {name: name.partition("_")[0] for name in BUILT_IN}
# Our names of the gates in the other library's order.
KERAS = {"lstm": "ifgo", "gru": "zrn", "rnn": "n"}
HASTE = {"lstm": "igfo", "gru": "zrn"}


def from_keras(
    kernel: Array, recurrent_kernel: Array, bias: Array | None = None, *, cell: str = "lstm", reset_after: bool = True
) -> dict[str, Tensor]:
    """Convert the weights of a Keras LSTM, GRU or SimpleRNN, from get_weights(), to a torch.nn cell's state_dict.

    kernel [I, G*H], recurrent_kernel [H, G*H]. bias [G*H], or [2, 3*H] for a GRU with reset_after (Keras's default
    since TensorFlow 2, and torch's form), or None for use_bias=False. cell: "lstm", "gru" or "rnn". reset_after=False
    is seqcells.GRU(reset_after=False). The activations must be tanh and sigmoid (not hard_sigmoid, the default in old
    versions of Keras), in a SimpleRNN tanh or relu. get_weights() of a Bidirectional layer returns the forward weights,
    then the backward ones.
    Raises ValueError for an unknown cell and for wrong shapes.

        >>> state = seqcells.interop.from_keras(torch.randn(10, 80), torch.randn(20, 80), torch.randn(80))
        >>> torch.nn.LSTMCell(10, 20).load_state_dict(state)
        <All keys matched successfully>
    """
    order = _order(KERAS, cell)
    checks.boolean("reset_after", reset_after)
    state = _from_kernels(kernel, recurrent_kernel, order, cell)
    if bias is None:
        return state
    rows = state["weight_ih"].shape[0]
    both = cell == "gru" and reset_after
    hint = f"bias of a GRU with reset_after={reset_after}" if cell == "gru" else "bias"
    b = _checked(hint, bias, (2, rows) if both else (rows,))
    state["bias_ih"] = _reordered(b[0] if both else b, order, _ours(cell))
    state["bias_hh"] = _reordered(b[1], order, _ours(cell)) if both else torch.zeros_like(b)
    return state


def to_keras(module: nn.Module, layer: int = 0, reverse: bool = False) -> list[np.ndarray]:
    """The inverse of from_keras: [kernel, recurrent_kernel, bias], for set_weights() of a Keras layer.

    module: a cell, or an LSTM, GRU or RNN, of which layer and reverse (the second direction) select the weights.
    Without biases: [kernel, recurrent_kernel]. If Keras has a single bias, it is bias_ih + bias_hh.
    Raises TypeError for another module, ValueError for a layer that does not exist and for proj_size.

        >>> [array.shape for array in seqcells.interop.to_keras(seqcells.LSTM(10, 20))]
        [(10, 80), (20, 80), (80,)]
    """
    cell = _kind(module, "to_keras")
    _no_projection(module, "Keras")
    suffix = weights.suffix(module, layer, reverse)
    order, ours = KERAS[cell], _ours(cell)

    def read(part: str) -> Tensor:
        weight = checks.parameter(module, part + suffix, weights.shapes(module, layer)[part])
        if weight.is_meta:
            raise RuntimeError(f"{part + suffix} is on the meta device: it has no values to give")
        return _reordered(weight.detach(), ours, order)

    found = [read("weight_ih").T, read("weight_hh").T]
    if module.bias:
        b_ih, b_hh = read("bias_ih"), read("bias_hh")
        both = cell == "gru" and getattr(module, "reset_after", True)
        found.append(torch.stack([b_ih, b_hh]) if both else b_ih + b_hh)
    # numpy lacks bfloat16.
    return [(t.float() if t.dtype == torch.bfloat16 else t).cpu().contiguous().numpy().copy() for t in found]


def load_keras_(module: nn.Module, arrays: Sequence[Array], layer: int = 0, reverse: bool = False) -> nn.Module:
    """Copy the weights of a Keras layer, from get_weights(), into a cell, or one layer and direction; returns module.

    module, layer, reverse: as in to_keras. arrays: [kernel, recurrent_kernel, bias], see from_keras. Raises as
    from_keras and load_ do.

        >>> arrays = [torch.randn(10, 60), torch.randn(20, 60), torch.randn(2, 60)]
        >>> gru = seqcells.interop.load_keras_(seqcells.GRU(10, 20), arrays)
    """
    cell = _kind(module, "load_keras_")
    if not isinstance(arrays, (tuple, list)):
        raise checks.wrong("arrays", "a list of two or three arrays", arrays)
    if len(arrays) not in (2, 3):
        expected = "[kernel, recurrent_kernel] or [kernel, recurrent_kernel, bias]"
        raise ValueError(f"arrays must be {expected}, got {len(arrays)}")
    reset_after = bool(getattr(module, "reset_after", True))
    return load_(module, from_keras(*arrays, cell=cell, reset_after=reset_after), layer, reverse)


def from_haste(
    kernel: Array,
    recurrent_kernel: Array,
    bias: Array | None = None,
    recurrent_bias: Array | None = None,
    *,
    cell: str = "lstm",
) -> dict[str, Tensor]:
    """Convert the weights of a haste_pytorch.LSTM or GRU (github.com/lmnt-com/haste) to a torch.nn cell's state_dict.

    kernel [I, G*H], recurrent_kernel [H, G*H], bias [G*H]; a GRU (with its reset gate after the product, as in torch)
    also has recurrent_bias [3*H]. cell: "lstm" or "gru". Zoneout and DropConnect are not weights and are not converted.
    Raises ValueError for an unknown cell and for wrong shapes.

        >>> state = seqcells.interop.from_haste(torch.randn(10, 80), torch.randn(20, 80), torch.randn(80))
        >>> state["weight_ih"].shape
        torch.Size([80, 10])
    """
    order = _order(HASTE, cell)
    if cell == "lstm" and recurrent_bias is not None:
        raise ValueError("haste's LSTM has one bias: recurrent_bias is for a GRU")
    if cell == "gru" and (bias is None) != (recurrent_bias is None):
        raise ValueError("haste's GRU has two biases: expected bias and recurrent_bias, or neither")
    state = _from_kernels(kernel, recurrent_kernel, order, cell)
    if bias is None:
        return state
    shape, ours = (state["weight_ih"].shape[0],), _ours(cell)
    state["bias_ih"] = _reordered(_checked("bias", bias, shape), order, ours)
    state["bias_hh"] = torch.zeros_like(state["bias_ih"])
    if recurrent_bias is not None:
        state["bias_hh"] = _reordered(_checked("recurrent_bias", recurrent_bias, shape), order, ours)
    return state


def from_xlstm(recurrent_kernel: Array, bias: Array, input_weights: Sequence[Array] | None = None) -> dict[str, Tensor]:
    """Convert the weights of an sLSTM cell of the package xlstm (github.com/NX-AI/xlstm) to a state_dict for `load_`.

    The module is ``seqcells.Recurrent("slstm", I, H, heads=N)``. recurrent_kernel [N, H/N, 4, H/N] and bias [N, 4, H/N]
    are those of sLSTMCell, in the package's outer format: ``cell._recurrent_kernel_int2ext(cell._recurrent_kernel_)``
    and ``cell._bias_int2ext(cell._bias_)``. input_weights: for the gates i, f, z and o the weights [N, H/N, I/N] of
    their headwise linear layers, which must have the same input. Default: ``None``, for an input [., 4*H] of all four
    gates, as sLSTMCell takes: weight_ih is the identity.
    Raises ValueError for wrong shapes.

        >>> state = seqcells.interop.from_xlstm(torch.randn(2, 5, 4, 5), torch.randn(2, 4, 5))
        >>> layer = seqcells.interop.load_(seqcells.Recurrent("slstm", 40, 10, heads=2), state)
    """
    kernel = _checked("recurrent_kernel", recurrent_kernel, ("N", "H/N", 4, "H/N"))
    N, D = kernel.shape[:2]
    kernel, given = _checked("recurrent_kernel", kernel, (N, D, 4, D)), _checked("bias", bias, (N, 4, D))
    w_ih = torch.eye(4 * N * D, dtype=kernel.dtype)
    if input_weights is not None:
        if not isinstance(input_weights, (tuple, list)):
            raise checks.wrong("input_weights", "a list of four arrays, those of i, f, z and o, or None", input_weights)
        if len(input_weights) != 4:
            raise ValueError(f"input_weights must be four arrays, those of i, f, z and o, got {len(input_weights)}")
        each = [_checked(f"input_weights[{n}]", w, (N, D, "I/N")) for n, w in enumerate(input_weights)]
        each = [_checked(f"input_weights[{n}]", w, tuple(each[0].shape)) for n, w in enumerate(each)]
        w_ih = torch.cat([torch.block_diag(*w) for w in each])
    b_ih = given.transpose(0, 1).flatten()
    w_hh = kernel.permute(2, 0, 3, 1).reshape(4 * N * D, D)
    return {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": torch.zeros_like(b_ih)}


def from_handwritten_lstm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state_dict of an LSTM cell of two Linears, x_fc and h_fc, whose outputs are split into i f g o.

    state: as that of tasks.handwritten.HandwrittenLSTMCell: x_fc.weight [4*H, I], h_fc.weight [4*H, H], both with bias.
    Raises ValueError for wrong names and shapes.

        >>> from seqcells.tasks.handwritten import HandwrittenLSTMCell
        >>> state = seqcells.interop.from_handwritten_lstm(HandwrittenLSTMCell(10, 20).state_dict())
    """
    _names(state, [f"{x}_fc.{kind}" for x in "xh" for kind in ("weight", "bias")])
    found = {"weight_ih": "x_fc.weight", "weight_hh": "h_fc.weight", "bias_ih": "x_fc.bias", "bias_hh": "h_fc.bias"}
    H = _checked("h_fc.weight", state["h_fc.weight"], ("4*H", "H")).shape[1]
    I = _checked("x_fc.weight", state["x_fc.weight"], ("4*H", "I")).shape[1]  # noqa: E741
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    return {part: _checked(name, state[name], s) for (part, name), s in zip(found.items(), shapes, strict=True)}


def from_handwritten_gru(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state_dict of a GRU cell of six Linears with bias: x_fc_r, x_fc_z, x_fc_n, h_fc_r, h_fc_z, h_fc_n.

    state: as that of tasks.handwritten.HandwrittenGRUCell: the weight of each x_fc_ is [H, I], that of each h_fc_
    [H, H]. The reset gate comes before the product: load the result into a GRU with reset_after=False.
    Raises ValueError for wrong names and shapes.

        >>> from seqcells.tasks.handwritten import HandwrittenGRUCell
        >>> state = seqcells.interop.from_handwritten_gru(HandwrittenGRUCell(10, 20).state_dict())
        >>> gru = seqcells.interop.load_(seqcells.GRU(10, 20, reset_after=False), state)
    """
    _names(state, [f"{x}_fc_{gate}.{kind}" for x in "xh" for gate in "rzn" for kind in ("weight", "bias")])
    H = _checked("h_fc_r.weight", state["h_fc_r.weight"], ("H", "H")).shape[1]
    I = _checked("x_fc_r.weight", state["x_fc_r.weight"], ("H", "I")).shape[1]  # noqa: E741
    found = {}
    for x, part, columns in (("x", "ih", I), ("h", "hh", H)):
        for kind, shape in (("weight", (H, columns)), ("bias", (H,))):
            names = [f"{x}_fc_{gate}.{kind}" for gate in "rzn"]
            if len(places := {(state[n].dtype, state[n].device) for n in names if isinstance(state[n], Tensor)}) > 1:
                raise RuntimeError(f"{', '.join(names)} must be of one dtype and on one device, got {places}")
            found[f"{kind}_{part}"] = torch.cat([_checked(name, state[name], shape) for name in names])
    return found


def load_(module: nn.Module, state: Mapping[str, Tensor], layer: int = 0, reverse: bool = False) -> nn.Module:
    """Copy a cell's state_dict into a cell, or into one layer and direction of a layer; returns module.

    module: as in to_keras, or a Recurrent or RecurrentCell of any cell; layer, reverse: as in to_keras. state: the
    state_dict of torch.nn's cell, or of a RecurrentCell of the same cell.
    Values are converted to the module's dtype and device. If the module has biases and state has none, they become
    zero. Raises TypeError for another module; ValueError for a layer that does not exist, for proj_size, for biases
    that the module lacks, and for wrong names and shapes. If anything is wrong, nothing is copied.

        >>> layer = seqcells.GRU(10, 20, num_layers=2, bidirectional=True)
        >>> layer = seqcells.interop.load_(layer, torch.nn.GRUCell(10, 20).state_dict(), layer=0, reverse=True)
    """
    weights.cell_of(module, "load_", _OURS)
    _no_projection(module, "a cell")
    suffix = weights.suffix(module, layer, reverse)
    _mapping(state)
    shapes = weights.shapes(module, layer)
    biases = ("bias_ih", "bias_hh")
    biased = any(name in state for name in biases)
    if biased and not module.bias:
        raise ValueError(f"this {type(module).__name__} has no bias to load into (bias=False)")
    _names(state, [part for part in shapes if biased or part not in biases])
    values = {}
    for part, shape in shapes.items():
        own = checks.parameter(module, part + suffix, shape)
        values[part] = _checked(part, state[part], shape) if part in state else torch.zeros_like(own)
        if values[part].is_meta and not own.is_meta:
            raise RuntimeError(f"{part} is on the meta device: it has no values to copy")
        values[part] = values[part].to(own.device, own.dtype)
    weights.assign(module, {part + suffix: value for part, value in values.items()})
    return module


_OURS = "an LSTM or LSTMCell or GRU or GRUCell or RNN or RNNCell of seqcells or torch.nn"


def _kind(module: nn.Module, caller: str) -> str:
    """ "lstm", "gru" or "rnn". TypeError for any other module."""
    cell = weights.cell_of(module, caller, _OURS)
    if cell.key not in KINDS:
        raise TypeError(f"{checks.wrong(f'{caller}: module', _OURS, module)}, whose cell is {cell.name}")
    return KINDS[cell.key]


def _ours(kind: str) -> str:
    """The gates in our order."""
    return "".join(next(get(key).gates for key, of in KINDS.items() if of == kind))


def _order(orders: dict[str, str], cell: str) -> str:
    checks.one_of("cell", cell, orders)
    return orders[cell]


def _mapping(state: Mapping[str, Tensor]) -> None:
    if not isinstance(state, Mapping):
        raise checks.wrong("state", "a state_dict", state)


def _names(state: Mapping[str, Tensor], expected: Sequence[str]) -> None:
    _mapping(state)
    if set(state) != set(expected):
        missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected), key=str)
        raise ValueError(f"state must have the names {', '.join(expected)}; missing {missing}, unknown {extra}")


def _no_projection(module: nn.Module, what: str) -> None:
    if getattr(module, "proj_size", 0):
        raise ValueError(f"{what} has no projection: this {type(module).__name__} has proj_size={module.proj_size}")


def _checked(name: str, array: Array, expected: tuple[int | str, ...]) -> Tensor:
    """A copy of array as a tensor. TypeError unless it has real numbers, ValueError unless it has the expected shape. A
    str in the expected shape stands for any size."""
    if isinstance(array, Tensor):
        checks.tensor(name, array)
        if array.is_complex() or array.dtype == torch.bool:
            raise TypeError(f"{name} must hold real numbers, got a tensor of {array.dtype}")
        found = array.detach().clone()
    else:
        try:
            plain = np.asarray(array)
        except (TypeError, ValueError) as error:  # such as for a ragged list
            raise ValueError(f"{name} must be an array or a tensor, got {checks.kind(array)}: {error}") from None
        if plain.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be an array of real numbers, got {checks.kind(array)} of {plain.dtype}")
        found = torch.tensor(plain)
    fits = len(found.shape) == len(expected)
    fits = fits and all(isinstance(e, str) or s == e for s, e in zip(found.shape, expected, strict=True))
    if not fits:
        shape = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name}: expected shape ({shape}), got {tuple(found.shape)}")
    return found


def _from_kernels(kernel: Array, recurrent_kernel: Array, order: str, cell: str) -> dict[str, Tensor]:
    """weight_ih and weight_hh of kernels whose columns are the gates in that order."""
    recurrent = _checked("recurrent_kernel", recurrent_kernel, ("H", f"{len(order)}*H"))
    H = recurrent.shape[0]
    recurrent = _checked("recurrent_kernel", recurrent, (H, len(order) * H))
    ours = _ours(cell)
    w_ih = _reordered(_checked("kernel", kernel, ("I", len(order) * H)).T, order, ours)
    return {"weight_ih": w_ih.contiguous(), "weight_hh": _reordered(recurrent.T, order, ours).contiguous()}


def _reordered(rows: Tensor, order: str, wanted: str) -> Tensor:
    """rows [G*H, ...] with the G gates rearranged from order to the wanted order."""
    parts = dict(zip(order, rows.chunk(len(order)), strict=True))
    return torch.cat([parts[gate] for gate in wanted])

"""Wrong values for arguments, by a correct value."""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

T, B, I, H = 4, 3, 2, 5  # noqa: E741  (the letter the whole project uses)


def randn(*shape):
    return torch.randn(shape)


# Nothing that any argument takes.
JUNK = [
    object,
    lambda: None,
    lambda: 5,
    lambda: -1,
    lambda: 0,
    lambda: 1.5,
    lambda: math.nan,
    lambda: 1j,
    lambda: True,
    lambda: "a",
    lambda: "",
    lambda: b"x",
    list,
    tuple,
    dict,
    lambda: [1, 2],
    lambda: ([1.0], [1.0, 2.0]),
    lambda: [None, None],
    lambda: {"a": 1},
    lambda: {1, 2},
    lambda: np.ones(3),
    lambda: np.ones((T, B, I), np.float32),
    lambda: np.float32(1),
    lambda: np.array(None),
    lambda: np.array(["a"]),
    lambda: len,
    lambda: int,
    lambda: torch.Tensor,
    lambda: torch.float32,
    lambda: torch.device("meta"),
    lambda: torch.Generator(),
    lambda: nn.Linear(1, 1),
    lambda: iter([1, 2]),
    lambda: torch.tensor(1.0),
    lambda: torch.tensor([]),
    lambda: torch.ones(2, 2),
    lambda: torch.tensor([True, False]),
    lambda: pack_padded_sequence(randn(T, B, I), [4, 2, 1]),
    lambda: slice(0, 1),
]
TENSORS = [
    lambda t: t.long(),
    lambda t: t.int(),
    lambda t: t != 0,
    lambda t: t.to(torch.complex64),
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.float(),
    lambda t: t[None],
    lambda t: t[..., None],
    lambda t: t[0] if t.dim() and len(t) else t[None],
    lambda t: t[..., 0] if t.dim() and t.shape[-1] else t[None],
    lambda t: t[:0] if t.dim() else t,
    lambda t: t[1:] if t.dim() else t,
    lambda t: t[..., :-1] if t.dim() else t,
    lambda t: torch.cat([t, t]) if t.dim() else t,
    lambda t: torch.cat([t, t], -1) if t.dim() else t,
    lambda t: t.flatten(),
    lambda t: t.mT if t.dim() > 1 else t[:, None] if t.dim() else t,
    lambda t: t.sum(),
    lambda t: t.detach().to("meta"),
    lambda t: t.detach().to_sparse(),
    lambda t: t.detach().to(torch.float32).to_mkldnn() if t.is_floating_point() else t.to_sparse(),
    lambda t: torch.nested.nested_tensor([t.detach(), t.detach()]) if t.is_floating_point() else t.sum(),
    lambda t: t.detach().numpy(),
    lambda t: t.detach().numpy().astype(object),
    lambda t: t.tolist(),
    lambda t: (t,),
    lambda t: [t, t],
    lambda t: ((t, t), t),
    lambda t: {"t": t},
    lambda t: t * 1 - 7,
    lambda t: t + 100,
]


def _but(container, at, value):
    """A copy of a tuple, list or dict with another value in one place."""
    if isinstance(container, dict):
        return container | {at: value}
    return type(container)([*container[:at], value, *container[at + 1 :]])


def _broken_container(random, value):
    """Of a tuple, list or dict of values."""
    empty, whole = type(value)(), list(value)
    if isinstance(value, dict):
        name = random.choice(whole) if whole else "a"
        ways = [
            lambda: {k: v for k, v in value.items() if k != name},
            lambda: value | {random.choice(["extra", 5]): 1},
            lambda: list(value.items()),
        ]
        whole = whole and [name]
    else:
        tensors = [v for v in value if isinstance(v, torch.Tensor)]
        ways = [
            lambda: value[1:],
            lambda: value + value,
            lambda: value[::-1],
            lambda: (value,),
            lambda: dict(enumerate(value)),
            lambda: iter(value),
            lambda: tuple((v,) for v in value),
            lambda: torch.stack(tensors) if len({t.shape for t in tensors}) == 1 else empty,
            lambda: [[v, v[:1]] if isinstance(v, torch.Tensor) and v.dim() else v for v in value],
        ]
    if not whole or random.random() < 0.4:
        return random.choice([*ways, lambda: empty])()
    at = name if isinstance(value, dict) else random.randrange(len(value))
    return _but(value, at, broken(random, value[at]))


BATCH_SIZES = [
    lambda s: s.flip(0),
    lambda s: s[1:],
    lambda s: s[:0],
    lambda s: torch.cat([s, s[:1] * 0]),
    lambda s: torch.cat([s, -s[:1]]),
    lambda s: s + 1,
    lambda s: s.to(torch.int32),
    lambda s: s.double(),
    lambda s: s[:, None],
    lambda s: s.sum(),
    lambda s: s.to("meta"),
    lambda s: s.tolist(),
    lambda s: None,
]
INDICES = [
    lambda i: None,
    lambda i: torch.zeros(B, dtype=torch.int64),
    lambda i: torch.tensor([0, 1, 7]),
    lambda i: torch.tensor([-1, 0, 1]),
    lambda i: torch.arange(B - 1),
    lambda i: torch.arange(B).double(),
    lambda i: torch.arange(B, device="meta"),
    lambda i: torch.arange(B)[:, None],
    lambda i: [0, 1, 2],
    lambda i: "a",
]


def _broken_packed(random, packed):
    field = random.choice(["data", "batch_sizes", "sorted_indices", "unsorted_indices", ""])
    if not field:
        return random.choice([tuple(packed), packed.data, (packed, packed), list(packed)])
    value = getattr(packed, field)
    if field == "data":
        return packed._replace(data=broken(random, value))
    return packed._replace(**{field: random.choice(BATCH_SIZES if field == "batch_sizes" else INDICES)(value)})


def _broken_module(random, module):
    """A module with something wrong with its parameters, or no such module."""
    if random.random() < 0.3:
        return random.choice(
            [lambda: type(module), lambda: module.forward, lambda: [module], lambda: nn.Linear(2, 2)]
        )()
    return without_a_parameter(random, module)


def without_a_parameter(random, module):
    """A copy of a module, one of its parameters deleted or replaced."""
    module = copy.deepcopy(module)
    own = [(m, name) for m in module.modules() for name, p in m._parameters.items() if p is not None]
    if not own:
        return module
    holder, name = random.choice(own)
    held = holder._parameters[name]
    how = random.randrange(5)
    if how == 0:
        delattr(holder, name)
    elif how == 1:
        setattr(holder, name, None)
    elif how == 2:
        del holder._parameters[name]
        object.__setattr__(holder, name, random.choice([held.detach().numpy(), 5, "w", held.tolist()]))
    else:
        shapes = [lambda t: t.half(), lambda t: t.to("meta"), lambda t: t[1:], lambda t: t[None], lambda t: t[:0]]
        setattr(holder, name, nn.Parameter(random.choice(shapes)(held.detach())))
    return module


def broken(random, value):
    """A value that is not right where that one is."""
    if random.random() < 0.35:
        return random.choice(JUNK)()
    if isinstance(value, PackedSequence):
        return _broken_packed(random, value)
    if isinstance(value, torch.Tensor):
        return random.choice(TENSORS)(value)
    if isinstance(value, nn.Module):
        return _broken_module(random, value)
    if isinstance(value, (tuple, list, dict)):
        return _broken_container(random, value)
    if isinstance(value, np.ndarray):
        ways = [lambda: value[:1], lambda: value.T, lambda: value[None], lambda: value.astype(str), lambda: value * 1j]
        return random.choice([*ways, lambda: value.astype(object), lambda: torch.tensor(value).to("meta")])()
    if isinstance(value, bool):
        return random.choice([str(value), int(value), None, np.bool_(value), torch.tensor(value), [value], "no"])
    if isinstance(value, (int, float)):
        return random.choice(
            [str(value), -value, 0, value + 0.5, [value], None, math.inf, math.nan, torch.tensor(value)]
        )
    if isinstance(value, str):
        return random.choice([value.upper() + "x", value.encode(), [value], None, 5, f" {value}", np.array([value])])
    return random.choice(JUNK)()

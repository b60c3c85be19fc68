"""Per-sample gradients of seqcells' layers and cells for opacus. Importing this module is enough.

    import opacus, seqcells.integrations.opacus
    private = opacus.GradSampleModule(model)  # or PrivacyEngine().make_private(module=model, ...)

Opacus calls a layer's grad sampler with the layer's positional inputs and the gradient of its first output. That leaves
out resets=, lengths=, initial states and the gradients of the final states. So a layer with opacus' hooks saves all
arguments of a call, and computes the per-sample gradients once the gradients of all its outputs are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .. import cell_modules, recurrent
from ..convert import CELLS as TORCH_CELLS
from ..convert import LAYERS as TORCH_LAYERS

# In this file, `module: Any` is one of seqcells' layers or cells, whose attributes nn.Module does not have,
# `given` and `args` are a call's arguments, and ctx, torch's, has an attribute of ours.
CELLS: tuple[type[nn.Module], ...] = (cell_modules.RecurrentCell, *TORCH_CELLS.values())
CLASSES: tuple[type[nn.Module], ...] = (recurrent.Recurrent, *TORCH_LAYERS.values(), *CELLS)
# Used between a layer's backward and opacus' call of the sampler, which follows immediately.
_FOUND: dict[nn.Module, dict[Tensor, Tensor]] = {}


@register_grad_sampler(CLASSES)
def grad_sampler(module: nn.Module, activations: object, backprops: object) -> dict[Tensor, Tensor]:
    """The gradients [B, *shape] of each of module's parameters that requires one; called by opacus.

    A subclass of one of seqcells' classes that does not override forward works as it is. Register one whose forward
    returns the same outputs as seqcells':
    `opacus.grad_sample.register_grad_sampler(MyLSTM)(seqcells.integrations.opacus.grad_sampler)`.
    Raises RuntimeError if opacus added its hooks to module before this file was imported.
    """
    if module not in _FOUND:
        raise RuntimeError(f"import seqcells.integrations.opacus before opacus wraps this {type(module).__name__}")
    return _FOUND.pop(module)


def per_sample_gradients(
    module: Any, input: Tensor, given: dict[str, Any], gradients: Sequence[Tensor]
) -> dict[Tensor, Tensor]:
    """The gradients [B, *shape] of each parameter that requires one, by parameter.

    module: a layer or cell of seqcells; its hooks are not called. input: the call's input, a batch; given: the other
    arguments by name. gradients: of the loss (a sum over the samples) with respect to each output tensor, in order.

    Example::

        >>> layer = seqcells.GRU(2, 3)
        >>> x = torch.randn(5, 4, 2)
        >>> y, h = layer(x)
        >>> found = per_sample_gradients(layer, x, {}, [torch.ones_like(y), torch.zeros_like(h)])
        >>> found[layer.weight_hh_l0].shape
        torch.Size([4, 9, 3])
    """
    wanted = {name: p.detach() for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    axis = _batch_axis(module)
    if input.shape[axis] == 0:  # a Poisson sample may be empty; vmap takes none
        return {p: p.new_zeros(0, *p.shape) for p in module.parameters(recurse=False) if p.requires_grad}
    state_axis = 0 if isinstance(module, CELLS) else 1
    axes = {module._hx: state_axis, "resets": axis, "lengths": 0, **dict.fromkeys(module.cell.inputs, axis)}
    # Of a layer: output, the final states and, if asked for, states after every step. A cell's outputs are states.
    every = [state_axis] * len(gradients)
    if not isinstance(module, CELLS):
        after = 1 + len(module.cell.states)
        every[0] = axis
        every[after:] = [axis] * len(every[after:])
    mapped = {name: value for name, value in given.items() if name in axes and value is not None}
    fixed = {name: value for name, value in given.items() if name not in mapped}
    for name in {"resets", "lengths"} & set(mapped):  # these may be lists
        mapped[name] = torch.as_tensor(mapped[name], device=input.device)

    def apart(value: object, axis: int) -> Any:  # of value's structure
        """A batch of one of each sample, and the axis along which these lie."""
        return tree_map(lambda t: t.unsqueeze(axis + 1), value)

    def weighted(weights: dict[str, Tensor], x: Tensor, mapped: dict[str, object], gradients: list[Tensor]) -> Tensor:
        named = {f"module.{name}": weight for name, weight in weights.items()}
        outputs = tree_flatten(torch.func.functional_call(_Bare(module), named, (x,), mapped | fixed))[0]
        return torch.stack([(y * g).sum() for y, g in zip(outputs, gradients, strict=True)]).sum()

    one = torch.vmap(torch.func.grad(weighted), (None, axis, {name: axes[name] for name in mapped}, every))
    found = one(
        wanted,
        apart(input, axis),
        {name: apart(value, axes[name]) for name, value in mapped.items()},
        [apart(g, a) for g, a in zip(gradients, every, strict=True)],
    )
    return {getattr(module, name): g for name, g in found.items()}


class _Bare(nn.Module):
    """A module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module.forward(*args, **kwargs)


def _batch_axis(module: nn.Module) -> int:
    return 0 if isinstance(module, CELLS) or module.batch_first else 1


def _watched(hook: Callable[..., None], module: nn.Module) -> bool:
    """Whether opacus records this call, by its own conditions."""
    return _owner(hook).hooks_enabled and module.training and torch.is_grad_enabled()


def _owner(hook: Callable[..., None]) -> Any:  # opacus is optional, and without types
    """The GradSampleModule that a hook of opacus is a method of; None for another hook."""
    return getattr(getattr(hook, "func", None), "__self__", None)


def _enter(
    hook: Callable[..., None], module: Any, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """A forward pre-hook. Raises for what opacus does not support; only the input stays a positional argument."""
    first = "input" if module._hx == "hx" else "x"
    if not args and first in kwargs:
        args, kwargs = (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}
    if not _watched(hook, module) or not 1 <= len(args) <= 2:
        return None
    kind, cell = type(module).__name__, isinstance(module, CELLS)
    input, *states = args
    if isinstance(input, PackedSequence):
        raise TypeError(f"input of a {kind} under opacus must be a tensor, got a PackedSequence: give lengths= instead")
    if isinstance(input, Tensor) and input.dim() != 3 - cell:
        expected = "[B, I]" if cell else "[B, T, I]" if module.batch_first else "[T, B, I]"
        raise RuntimeError(f"input of a {kind} under opacus must be a batch {expected}, got {tuple(input.shape)}")
    if not cell and module.dropout > 0 and module.num_layers > 1:
        raise ValueError(f"dropout of a {kind} under opacus must be 0, got {module.dropout}: put it between two layers")
    usual = set(module._shapes()) if cell else {n for of in module._all_weights for n in of}
    if others := [name for name, _ in module.named_parameters(recurse=False) if name not in usual]:
        raise ValueError(f"a {kind} under opacus must have no parameters but its own, got {', '.join(others)}")
    return (input,), kwargs | ({module._hx: states[0]} if states else {})


def _leave(
    hook: Callable[..., None], module: Any, args: tuple[Any, ...], kwargs: dict[str, object], result: object
) -> object:
    """A forward hook. Returns the same result, with a backward that has the call's arguments."""
    if not _watched(hook, module):
        return None
    input, *_ = args
    given = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, kwargs)
    # The batch size, which opacus would take from the first or second dimension, by a setting of the whole model.
    module.max_batch_len = max(getattr(module, "max_batch_len", 0), input.shape[_batch_axis(module)])
    outputs, form = tree_flatten(result)
    return tree_unflatten(list(_Outputs.apply(partial(_backward, hook, module, input.detach(), given), *outputs)), form)


def _backward(hook: Any, module: Any, input: Tensor, given: dict[str, Any], gradients: tuple[Tensor, ...]) -> None:
    if not _owner(hook).hooks_enabled:
        return
    times = module.max_batch_len if hook.keywords["loss_reduction"] == "mean" else 1
    _FOUND[module] = per_sample_gradients(module, input, given, [g * times for g in gradients])
    try:
        hook(module, (input,), gradients)
    finally:
        _FOUND.pop(module, None)


class _Outputs(torch.autograd.Function):
    """The outputs of a call, unchanged. backward calls `done` with their gradients, zero where the loss uses none."""

    @staticmethod
    def forward(ctx: Any, done: Callable[[tuple[Tensor, ...]], None], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.done = done
        return tuple(t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.done(gradients)
        return None, *gradients


class _Handle:
    """Removes several hooks."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _register(self: nn.Module, hook: Callable[..., None], prepend: bool = False) -> Any:  # torch's handle or ours
    """nn.Module.register_full_backward_hook, but for opacus' own hook."""
    owner = _owner(hook)
    if not isinstance(owner, AbstractGradSampleHooks):
        return nn.Module.register_full_backward_hook(self, hook, prepend)
    if getattr(owner, "force_functorch", False):
        raise ValueError(
            f"grad_sample_mode must not be 'functorch' with a {type(self).__name__}: use 'hooks' or 'ghost'"
        )
    if any(type(self).forward is base.forward for base in CLASSES):  # opacus looks up the exact class
        register_grad_sampler(type(self))(grad_sampler)
    before = self.register_forward_pre_hook(partial(_enter, hook), with_kwargs=True)
    return _Handle(before, self.register_forward_hook(partial(_leave, hook), with_kwargs=True))


for _class in CLASSES:
    _class.register_full_backward_hook = _register  # type: ignore[method-assign]  # opacus calls it

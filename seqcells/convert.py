"""convert and revert: torch.nn's recurrent modules inside a model become seqcells' and back, where they stand.

A module keeps its identity: its class and its settings change, and everything it holds stays the object it was:
parameters (so optimizers and tied weights stay right), buffers, hooks and their handles, parametrizations, weight_norm,
pruning masks, requires_grad, training, attributes of the user's own. So whoever holds the module, anywhere, holds the
converted one, and a module registered in two places stays one module. torch itself changes a module's class this way
in torch.nn.utils.parametrize and in its lazy modules.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import arguments, cells, checks, layers

LOGGER = logging.getLogger("seqcells")
LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: layers.LSTM, nn.GRU: layers.GRU, nn.RNN: layers.RNN}
CELLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTMCell: cells.LSTMCell,
    nn.GRUCell: cells.GRUCell,
    nn.RNNCell: cells.RNNCell,
}
OURS = LAYERS | CELLS
THEIRS = {ours: theirs for theirs, ours in OURS.items()}

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Change:
    """What became of one module. names: all it has in the model. before, after: its class. skipped: why it was left
    alone, "" if it was not."""

    names: tuple[str, ...]
    before: str
    after: str
    skipped: str = ""

    def __str__(self) -> str:
        what = f"{self.before} left alone: {self.skipped}" if self.skipped else f"{self.before} -> {self.after}"
        return f"{_joined(self.names)}: {what}"


@dataclass(frozen=True)
class _Swap:
    """All that is done to one module, computed before anything is done to any."""

    module: nn.Module
    cls: type[nn.Module]
    drop: frozenset[str]  # attributes only the old class has
    settings: dict[str, Any]  # attributes only the new class has, or both
    absent: tuple[str, ...]  # parameters that are registered as None in the new class and not in the old one
    surplus: tuple[str, ...]  # the opposite

    def do(self) -> None:
        # Past __setattr__: torch.nn.LSTM's keeps lists that are half there at this point.
        state = self.module.__dict__
        for name in self.drop:
            state.pop(name, None)
        state.update(self.settings)
        for name in self.absent:
            state["_parameters"].setdefault(name, None)
        for name in self.surplus:
            del state["_parameters"][name]
        self.module.__class__ = self.cls


def convert(
    model: M,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    backend: str | None = None,
    save: str = "gates",
    precision: str | None = None,
    report: list[Change] | None = None,
) -> M:
    """Make every torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in model one of seqcells', in place.

    Returns model, which may be such a module itself. The parameters are the same objects, so an optimizer made before
    stays right, state_dict's keys are the same, and no random number is drawn.

    include, exclude: a name or names, as model.named_modules() gives them, with fnmatch's wildcards ("encoder.*"; a
    star also matches dots); a module with several names is meant by any of them. backend, save (layers only),
    precision: as in seqcells.LSTM.
    report: a list; a Change is appended for every recurrent module that was changed or left alone. The logger
    "seqcells" says the same, at INFO and WARNING.

    Left alone: subclasses of torch.nn's classes, whose code may rely on them, and modules whose forward was replaced
    on the instance. Modules in torch.jit's or torch.export's programs are not seen at all. A model that torch.compile
    compiled is compiled again at its next call.
    Raises ValueError, before anything is changed, for an unknown backend, save or precision, and for a pattern that
    matches no recurrent module. If anything else raises on the way, all is put back.
    """
    arguments.options(backend, precision, save)
    how = {"backend": backend, "precision": precision}

    def target(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
        return _blank(module, OURS[cls], how | ({"save": save} if cls in LAYERS else {}))

    return _swap_all(model, tuple(OURS), tuple(THEIRS), target, include, exclude, report)


def revert(
    model: M,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    report: list[Change] | None = None,
) -> M:
    """The opposite of convert, also for modules of model that were made as seqcells': in place, the same parameters.

    backend, save and precision are dropped; a forward that passes resets= to the module will no longer run. Subclasses
    of seqcells' classes are left alone. include, exclude, report: as in convert.
    Raises ValueError, before anything is changed, for a pattern that matches no recurrent module and for a module that
    torch.nn has no equal of (a GRU or GRUCell with reset_after=False): exclude it.
    """

    def target(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
        if not getattr(module, "reset_after", True):
            raise ValueError("torch.nn has no GRU with reset_after=False; name it in exclude= to leave it as it is")
        return _blank(module, THEIRS[cls], {})

    return _swap_all(model, tuple(THEIRS), tuple(OURS), target, include, exclude, report)


def _swap_all(
    model: M,
    sources: tuple[type[nn.Module], ...],
    others: tuple[type[nn.Module], ...],
    target: Callable[[nn.Module, type[nn.Module]], nn.Module],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    report: list[Change] | None,
) -> M:
    if not isinstance(model, nn.Module):
        raise checks.wrong("model", "a torch.nn.Module", model)
    if report is not None and (isinstance(report, type) or not callable(getattr(report, "append", None))):
        raise checks.wrong("report", "a list or None", report)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, sources + others):
            names.setdefault(module, []).append(name)
    wanted = _matching(names, include, "include", default=True)
    unwanted = _matching(names, exclude, "exclude", default=False)
    swaps, changes, refused = [], [], []
    for module, known_as in names.items():
        if module not in wanted or module in unwanted or not isinstance(module, sources):
            continue
        cls = parametrize.type_before_parametrizations(module)
        before = after = _qualified(cls)
        skipped = ""
        if cls not in sources:
            skipped = f"a subclass of {_qualified(next(c for c in sources if issubclass(cls, c)))}"
        elif "forward" in module.__dict__:
            skipped = "its forward was replaced on the instance"
        else:
            try:
                blank = target(module, cls)
            except ValueError as e:
                refused.append(f"{_joined(known_as)}: {e}")
                continue
            swaps.append(_plan(module, cls, blank))
            after = _qualified(type(blank))
        changes.append(Change(tuple(known_as), before, after, skipped))
    if refused:
        raise ValueError("\n".join(refused))
    _do(swaps, changes, report)
    return model


def _do(swaps: list[_Swap], changes: list[Change], report: list[Change] | None) -> None:
    """All swaps, and the report of them; none where something raises, whatever it is."""
    undo: list[Callable[[], None]] = []
    try:
        for swap in swaps:
            undo.append(_restorer(swap.module))
            swap.do()
            if isinstance(swap.module, nn.RNNBase) and not parametrize.is_parametrized(swap.module):
                swap.module.flatten_parameters()  # for cuDNN, as torch does at the end of a constructor
        for change in changes if report is not None else ():
            report.append(change)  # type: ignore[union-attr]
            undo.append(getattr(report, "pop", lambda: None))
        for change in changes:
            LOGGER.log(logging.WARNING if change.skipped else logging.INFO, "%s", change)
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise


def _restorer(module: nn.Module) -> Callable[[], None]:
    """What puts the module's class, attributes and parameters back as they are now."""
    cls, attributes, parameters = module.__class__, dict(module.__dict__), dict(module._parameters)

    def restore() -> None:
        module.__class__ = cls
        module.__dict__.clear()
        module.__dict__.update(attributes)
        module._parameters.clear()
        module._parameters.update(parameters)

    return restore


def _joined(names: Iterable[str]) -> str:
    return " = ".join(n or "(the model itself)" for n in names)


def _matching(
    names: dict[nn.Module, list[str]], patterns: str | Iterable[str] | None, argument: str, default: bool
) -> set[nn.Module]:
    """The modules one of whose names one of the patterns matches; all or none where no pattern was given."""
    if patterns is None:
        return set(names) if default else set()
    try:
        given = [patterns] if isinstance(patterns, str) else list(patterns)
    except TypeError:
        raise checks.wrong(argument, "a name or names", patterns) from None
    found = set()
    for pattern in given:
        if not isinstance(pattern, str):
            raise checks.wrong(argument, "a name or names", pattern)
        hits = {m for m, known_as in names.items() if any(fnmatchcase(n, pattern) for n in known_as)}
        if not hits:
            there = ", ".join(repr(n) for known_as in names.values() for n in known_as) or "none"
            raise ValueError(f"{argument}: {pattern!r} matches no recurrent module; there are: {there}")
        found |= hits
    return found


def _qualified(cls: type) -> str:
    """torch.nn.LSTM and seqcells.LSTM as people write them."""
    if cls in OURS:
        return f"torch.nn.{cls.__name__}"
    return f"seqcells.{cls.__name__}" if cls in THEIRS else f"{cls.__module__}.{cls.__qualname__}"


def _blank(module: nn.Module, cls: type[nn.Module], how: dict[str, Any]) -> nn.Module:
    """A module of that class with module's settings, on the meta device: no memory, no random numbers."""
    given = ["input_size", "hidden_size", "bias"]
    if issubclass(cls, (*LAYERS, *LAYERS.values())):
        given += ["num_layers", "batch_first", "bidirectional"]
        given += ["proj_size"] if issubclass(cls, (nn.LSTM, layers.LSTM)) else []
    given += ["nonlinearity"] if hasattr(module, "nonlinearity") else []
    blank = cls(**{name: getattr(module, name) for name in given}, device="meta", **how)
    if hasattr(module, "dropout"):
        blank.dropout = module.dropout  # not by the constructor, which warned already when module was made
    return blank


def _plan(module: nn.Module, cls: type[nn.Module], blank: nn.Module) -> _Swap:
    state, base = module.__dict__, set(nn.Module().__dict__)
    own = {name: value for name, value in blank.__dict__.items() if name not in base}
    # What a fresh module of the old class has and the new class has not; the rest is the user's own and stays.
    old = _blank(module, cls, {})
    drop = frozenset(set(old.__dict__) - base - set(own))
    if isinstance(blank, nn.RNNBase):
        own |= _flat_weights(module, blank._flat_weights_names)
    parameters = state["_parameters"]
    absent = [n for n, p in blank._parameters.items() if p is None and n not in parameters]
    surplus = [n for n, p in parameters.items() if p is None and n in old._parameters and n not in blank._parameters]
    new = type(blank)
    if parametrize.is_parametrized(module):
        # torch puts the properties that compute the parametrized tensors in a class of the module's own. They look
        # into module.parametrizations by name, so they do as well on top of another class.
        body = {k: v for k, v in type(module).__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__")}
        new = type(f"Parametrized{new.__name__}", (new,), body)
    return _Swap(module, new, drop, own, tuple(absent), tuple(surplus))


def _flat_weights(module: nn.Module, names: list[str]) -> dict[str, Any]:
    """torch.nn.LSTM's list of its weights, and the weak references by which it sees that one was replaced."""
    found: list[Tensor | None] = []
    for name in names:
        weight = module._parameters.get(name)
        if weight is None and parametrize.is_parametrized(module, name):
            # Not computed here, which may have effects (spectral_norm's power iteration): a tensor that is not the
            # weight, so that the first forward sees a change and computes all.
            held: Any = module.parametrizations[name]  # type: ignore[index]
            weight = next(chain(held.parameters(recurse=False), held.buffers(recurse=False)), None)
        found.append(module.__dict__.get(name) if weight is None else weight)
        checks.tensor(name, found[-1], optional=True)
    return {"_flat_weights": found, "_flat_weight_refs": [None if w is None else weakref.ref(w) for w in found]}

"""convert and revert: change torch.nn's recurrent modules in a model to seqcells' and back, in place.

A module stays the same object. Its class and its settings change. Everything else stays: parameters (so optimizers and
tied weights remain valid), buffers, hooks and their handles, parametrizations, weight_norm, pruning masks,
requires_grad, training, and attributes that users set. All references to the module remain valid, and a module
registered in two places is still one module. torch changes a module's class in the same way in
torch.nn.utils.parametrize and in its lazy modules.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import arguments, cell_modules, checks, dropouts, layers, modules, recurrent, subclasses
from .modules import spelled

LOGGER = logging.getLogger("seqcells")
LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: layers.LSTM, nn.GRU: layers.GRU, nn.RNN: layers.RNN}
SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: subclasses.LSTM,
    nn.GRU: subclasses.GRU,
    nn.RNN: subclasses.RNN,
}
CELLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTMCell: cell_modules.LSTMCell,
    nn.GRUCell: cell_modules.GRUCell,
    nn.RNNCell: cell_modules.RNNCell,
}
OURS = LAYERS | CELLS
ANY_CELL = (recurrent.Recurrent, cell_modules.RecurrentCell)
THEIRS = {ours: theirs for form in (LAYERS, SUBCLASSES, CELLS) for theirs, ours in form.items()}

M = TypeVar("M", bound=nn.Module)
Classes = Mapping[Any, type[nn.Module]]  # Any: keys of a Mapping must be of exactly its type
Swap = tuple[nn.Module, Callable[[], None]]  # a module, and a function that makes all changes to it


@dataclass(frozen=True)
class Change:
    """The change of one module. names: all its names in the model. before, after: its class. skipped: why it was left
    unchanged, "" if it was changed.

        >>> changes = []
        >>> model = seqcells.convert(torch.nn.Sequential(torch.nn.GRU(10, 20)), report=changes)
        >>> changes[0].names, changes[0].skipped
        (('0',), '')
    """

    names: tuple[str, ...]
    before: str
    after: str
    skipped: str = ""

    def __str__(self) -> str:
        what = f"{self.before} left alone: {self.skipped}" if self.skipped else f"{self.before} -> {self.after}"
        return f"{_joined(self.names)}: {what}"


def convert(
    model: M,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    subclass: bool = False,
    mapping: Classes | None = None,
    backend: str | None = None,
    save: str = "gates",
    precision: str | None = None,
    report: list[Change] | None = None,
) -> M:
    """Convert every torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in model to seqcells' class, in place.

    Returns model, which may be such a module itself. The parameters are the same objects, so an existing optimizer
    remains valid; the keys of state_dict are the same, and no random number is drawn.

    include, exclude: a name or names, as in model.named_modules(), with fnmatch's wildcards ("encoder.*"; a star also
    matches dots). A module with several names matches by any of them.
    subclass: True uses the classes of seqcells.subclasses, for code that checks isinstance(module, torch.nn.LSTM).
    With these torch.compile breaks its graph at each layer, and raises with fullgraph=True, as with torch.nn's own (see
    seqcells.subclasses). Layers of seqcells are converted too, and keep their settings. (seqcells' cells are always
    instances of torch.nn's classes, and torch.compile supports them.)
    mapping: {Theirs: Mine}, for subclasses of torch.nn's classes: modules of exactly the class Theirs become Mine, a
    subclass of the corresponding seqcells class. Attributes stay, and the constructor of Mine is not called. Often an
    empty `class Mine(Theirs, seqcells.subclasses.LSTM)` is enough.
    backend, save (layers only), precision: as in seqcells.LSTM.
    report: a list, to which a Change is appended for every recurrent module that was changed or left unchanged.

    The logger "seqcells" logs a summary at INFO (on stderr if logging is not configured;
    logging.getLogger("seqcells").setLevel("WARNING") silences it), warnings for modules left unchanged and for a model
    without recurrent modules, and every change at DEBUG.

    Left unchanged: subclasses of torch.nn's classes that mapping does not name, because their code may rely on the base
    class, and modules whose forward was replaced on the instance. Modules in programs of torch.jit or torch.export are
    not found. A compiled model is compiled again at its next call. Call convert before fully_shard, which changes the
    classes of modules.
    Raises TypeError or ValueError, before anything is changed, if model is not a module, if backend, save or precision
    is unknown, if mapping has other classes, or if a pattern matches no recurrent module. If anything else raises, all
    changes are undone.

        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 10), torch.nn.LSTM(10, 20))
        >>> model = seqcells.convert(model)
        >>> model[1]
        seqcells.LSTM(10, 20)
    """
    arguments.options(backend, precision, save)
    checks.boolean("subclass", subclass)
    mine, forms = _classes(mapping), CELLS | (SUBCLASSES if subclass else LAYERS)

    def target(module: nn.Module, cls: type[nn.Module]) -> type[nn.Module] | str | None:
        if issubclass(cls, modules.Module):
            if not subclass or isinstance(module, tuple(OURS)) or not issubclass(cls, tuple(THEIRS)):
                return None
            if cls in THEIRS:
                return forms[THEIRS[cls]]
            return _left(cls, f"make it one of {spelled(SUBCLASSES[THEIRS[_base(cls)]])}")
        if (found := mine.get(cls) or forms.get(cls)) is not None:
            return found
        return _left(cls, f"mapping={{{spelled(cls)}: Yours}}, Yours a subclass of {spelled(forms[_base(cls)])}")

    how = {"backend": backend, "save": save, "precision": precision}
    return _swap_all(model, "convert", target, how, include, exclude, report)


def revert(
    model: M,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    mapping: Classes | None = None,
    report: list[Change] | None = None,
) -> M:
    """Convert all of seqcells' modules in model to torch.nn's class, in place, with the same parameters.

    This also applies to modules that convert did not make. backend, save and precision are dropped, and a forward that
    passes resets= to the module will no longer run. Subclasses of seqcells' classes are left unchanged, except those in
    mapping.
    mapping: as in convert, {Theirs: Mine}: modules of exactly the class Mine become Theirs.
    include, exclude, report: as in convert.
    Raises TypeError or ValueError, before anything is changed, as convert, and for a module that torch.nn has no
    counterpart of (a GRU or GRUCell with reset_after=False, a layer with weight_dropout, a Recurrent or RecurrentCell):
    exclude it.

        >>> seqcells.revert(seqcells.LSTM(10, 20))
        LSTM(10, 20)
    """
    theirs: dict[type[nn.Module], type[nn.Module]] = {}
    for cls, mine in _classes(mapping).items():
        if theirs.setdefault(mine, cls) is not cls:
            raise ValueError(f"mapping: {spelled(mine)} stands for two classes: revert needs one for each")

    def target(module: nn.Module, cls: type[nn.Module]) -> type[nn.Module] | str | None:
        if not issubclass(cls, modules.Module):
            return None
        if isinstance(module, ANY_CELL) and not issubclass(cls, tuple(THEIRS)):
            raise ValueError(f"torch.nn has no cell {module.cell.name}; name it in exclude= to leave it as it is")
        if (found := theirs.get(cls) or THEIRS.get(cls)) is None:
            return _left(cls, f"mapping={{Yours: {spelled(cls)}}}, Yours a subclass of {spelled(THEIRS[_base(cls)])}")
        if not getattr(module, "reset_after", True):
            raise ValueError("torch.nn has no GRU with reset_after=False; name it in exclude= to leave it as it is")
        if more := dropouts.names(module):
            raise ValueError(f"torch.nn's layers have no {more[0]}; name it in exclude= to leave it as it is")
        return found

    return _swap_all(model, "revert", target, {}, include, exclude, report)


def _classes(mapping: Classes | None) -> dict[type[nn.Module], type[nn.Module]]:
    """Check mapping and return it as a dict."""
    if mapping is not None and not isinstance(mapping, Mapping):
        raise checks.wrong("mapping", "a dict of classes, {Theirs: Mine}, or None", mapping)
    for theirs, mine in (mapping or {}).items():
        for cls in (theirs, mine):
            if not isinstance(cls, type):
                expected = "a dict of classes, {Theirs: Mine}, or None"
                raise TypeError(f"mapping must be {expected}, got {{{theirs!r}: {mine!r}}}")
        if issubclass(theirs, modules.Module) or not issubclass(theirs, tuple(OURS)):
            expected = f"subclasses of {', '.join(map(spelled, OURS))}"
            raise TypeError(f"mapping: its keys must be {expected}, got {spelled(theirs)}")
        ours = OURS[_base(theirs)]
        if not issubclass(mine, ours):
            expected = f"a subclass of {spelled(ours)}"
            raise TypeError(f"mapping: {spelled(theirs)} must become {expected}, got {spelled(mine)}")
        try:
            object.__new__(theirs).__class__ = mine
        except TypeError:  # incompatible slots, such as those of abc.ABC
            name = spelled(SUBCLASSES.get(_base(theirs), ours))
            raise TypeError(
                f"mapping: Python cannot make a {spelled(theirs)} a {spelled(mine)}, whose bases lay out an object in "
                f"another way: make it a subclass of both, class {mine.__name__}({theirs.__name__}, {name})"
            ) from None
    return dict(mapping or {})


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of seqcells or torch.nn that cls is or inherits from."""
    return next(base for base in cls.__mro__ if base in THEIRS or base in OURS)


def _left(cls: type[nn.Module], remedy: str) -> str:
    """Why a module of that class is left unchanged. remedy: how to have it converted."""
    if any(base.__module__.startswith("torch.distributed.") for base in cls.__mro__):
        return "fully_shard changed its class: call convert or revert before fully_shard"
    return f"a subclass of {spelled(_base(cls))}; to change it: {remedy}"


def _swap_all(
    model: M,
    what: str,
    target: Callable[[nn.Module, type[nn.Module]], type[nn.Module] | str | None],
    options: Mapping[str, object],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    report: list[Change] | None,
) -> M:
    """target returns the class that a module becomes, or why it is left unchanged, or None if there is nothing to
    do."""
    if not isinstance(model, nn.Module):
        error = checks.wrong("model", "a torch.nn.Module", model)
        if isinstance(model, type):
            error.args = (f"{error}: {what} takes an instance, as in {what}({model.__name__}(...))",)
        raise error
    if report is not None and (isinstance(report, type) or not callable(getattr(report, "append", None))):
        raise checks.wrong("report", "a list or None", report)
    names: dict[nn.Module, list[str]] = {}
    kinds: tuple[type[nn.Module], ...] = (*OURS, *THEIRS, *ANY_CELL)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            names.setdefault(module, []).append(name)
    wanted = _matching(names, include, "include", default=True) - _matching(names, exclude, "exclude", default=False)
    swaps, changes, refused = [], [], []
    for module, known_as in names.items():
        if module not in wanted:
            continue
        cls = parametrize.type_before_parametrizations(module)
        try:
            found = target(module, cls)
        except ValueError as e:
            refused.append(f"{_joined(known_as)}: {e}")
            continue
        if found is None:
            continue
        if isinstance(found, type) and "forward" in module.__dict__:
            found = "its forward was replaced on the instance"
        if isinstance(found, type):
            swaps.append((module, _plan(module, cls, found, options)))
            changes.append(Change(tuple(known_as), spelled(cls), spelled(found)))
        else:
            changes.append(Change(tuple(known_as), spelled(cls), spelled(cls), found))
    if refused:
        raise ValueError("\n".join(refused))
    _do(swaps, changes, report, _summary(what, type(model).__name__, len(names), len(wanted), changes))
    return model


def _summary(what: str, model: str, there: int, wanted: int, changes: list[Change]) -> tuple[int, str]:
    """A logging level and a one-line summary. there, wanted: the number of recurrent modules, and of selected ones."""
    found = f"{there} recurrent module{'s' * (there > 1)} in this {model}"
    if not there:
        return logging.WARNING, f"seqcells.{what}: nothing to do: no LSTM, GRU, RNN or cell of these in this {model}"
    if not wanted:
        return logging.INFO, f"seqcells.{what}: nothing to do: include and exclude leave none of {found}"
    if not changes:
        whose = "seqcells'" if what == "convert" else "torch.nn's"
        return logging.INFO, f"seqcells.{what}: nothing to do: already {whose}: {found}"
    done = Counter(f"{c.before} -> {c.after}" for c in changes if not c.skipped)
    left = sum(1 for c in changes if c.skipped)
    text = ", ".join(f"{count} {change}" for change, count in done.items()) or "nothing changed"
    return logging.INFO, f"seqcells.{what}: {text}" + (f"; {left} left alone" if left else "")


def _do(swaps: list[Swap], changes: list[Change], report: list[Change] | None, summary: tuple[int, str]) -> None:
    """Make all swaps and report them. If anything raises, undo them."""
    undo: list[Callable[[], None]] = []
    try:
        for module, swap in swaps:
            undo.append(_restorer(module))
            swap()
            if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
                module.flatten_parameters()  # for cuDNN, as torch does at the end of a constructor
        if report is not None:
            for change in changes:
                report.append(change)
                undo.append(getattr(report, "pop", lambda: None))
        for change in changes:
            LOGGER.log(logging.WARNING if change.skipped else logging.DEBUG, "%s", change)
        LOGGER.log(summary[0], "%s", summary[1])
        # If logging is not configured, Python shows only warnings.
        if summary[0] == logging.INFO and LOGGER.level <= logging.INFO and not LOGGER.hasHandlers():
            print(summary[1], file=sys.stderr)
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise


def _restorer(module: nn.Module) -> Callable[[], None]:
    """A function that restores the module's class, attributes and parameters as they are now."""
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
    """The modules with a name that matches a pattern. If no pattern is given, all or none of them."""
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


def _blank(module: nn.Module, cls: type[nn.Module], options: Mapping[str, object]) -> nn.Module:
    """A module of that class with module's settings, on the meta device: no memory, no random numbers."""
    given = ["input_size", "hidden_size", "bias"]
    if issubclass(cls, (*LAYERS, *LAYERS.values())):
        given += ["num_layers", "batch_first", "bidirectional"]
        given += ["proj_size"] if issubclass(cls, (nn.LSTM, layers.LSTM)) else []
    else:
        options = {name: value for name, value in options.items() if name != "save"}
    given += ["nonlinearity"] if hasattr(module, "nonlinearity") else []
    blank = cls(**{name: getattr(module, name) for name in given}, device="meta", **options)
    if hasattr(module, "dropout"):
        blank.dropout = module.dropout  # not by the constructor, which would repeat its warning
    return blank


def _plan(
    module: nn.Module, cls: type[nn.Module], new: type[nn.Module], options: Mapping[str, object]
) -> Callable[[], None]:
    """A function that changes module from class cls to class new; all else is computed here, before any module is
    changed. options: the settings that only seqcells' classes have."""
    state, base = module.__dict__, set(nn.Module().__dict__)
    # What fresh modules of the two have, of torch.nn's or seqcells' own classes: a user's may want other arguments.
    old = _blank(module, _base(cls), {})
    only_class = issubclass(cls, modules.Module) and issubclass(new, modules.Module)
    blank = old if only_class else _blank(module, _base(new), options)
    own = {name: value for name, value in blank.__dict__.items() if name not in base}
    # What the old class has and the new class lacks; the rest is the user's own and stays.
    drop = set(old.__dict__) - base - set(own)
    own = {} if only_class else own
    if isinstance(blank, nn.RNNBase) and not isinstance(blank, modules.Module):
        own |= _flat_weights(module, blank._flat_weights_names)
    parameters = state["_parameters"]
    # Parameters that are registered as None in the new class and not in the old one, and the opposite.
    absent = [n for n, p in blank._parameters.items() if p is None and n not in parameters]
    surplus = [n for n, p in parameters.items() if p is None and n in old._parameters and n not in blank._parameters]
    if parametrize.is_parametrized(module):
        # torch defines the properties that compute parametrized tensors in a class made for this module. They look up
        # module.parametrizations by name, so they also work on top of another class.
        body = {k: v for k, v in type(module).__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__")}
        new = type(f"Parametrized{new.__name__}", (new,), body)

    def swap() -> None:
        # Not by __setattr__: that of torch.nn.LSTM updates lists that are incomplete at this point.
        for name in drop:
            state.pop(name, None)
        state.update(own)
        for name in absent:
            parameters.setdefault(name, None)
        for name in surplus:
            del parameters[name]
        module.__class__ = new

    return swap


def _flat_weights(module: nn.Module, names: list[str]) -> dict[str, object]:
    """torch.nn.LSTM's list of its weights, and its weak references that show whether one was replaced."""
    found: list[Tensor | None] = []
    for name in names:
        weight: Tensor | None = module._parameters.get(name)
        if weight is None and parametrize.is_parametrized(module, name):
            # The weight is not computed here, because that may have side effects (spectral_norm's power iteration).
            # A placeholder makes the first forward see a change and compute all weights.
            parts = module.get_submodule(f"parametrizations.{name}")
            weight = next(chain(parts.parameters(recurse=False), parts.buffers(recurse=False)), None)
        found.append(module.__dict__.get(name) if weight is None else weight)
        checks.tensor(name, found[-1], optional=True)
    return {"_flat_weights": found, "_flat_weight_refs": [None if w is None else weakref.ref(w) for w in found]}

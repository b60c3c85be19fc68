"""What `verification` and `tuning` found, on disk: one JSON file of each kind for each device and versions.

A file is never written in place: a new one is written beside it and renamed, so that a reader finds the old or the new.
There is no lock: of two writers at once, one may undo what the other added, and it is measured again. Where nothing
can be written (no home, a full disk, a file system that is read-only), what was found lives as long as the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from .backends import parse

T = TypeVar("T")
VERSION = 1
_STALE = 3600.0  # seconds after which a temporary file is one that a killed process left


class Verdict(NamedTuple):
    """good: whether a kernel may run. worst: the largest error, in units of what is allowed; tensor: of which."""

    good: bool
    worst: float
    tensor: str


def _verdict(fields: dict[str, Any]) -> Verdict:
    found = Verdict(**fields)
    if type(found.good) is not bool or type(found.worst) not in (int, float) or type(found.tensor) is not str:
        raise ValueError("a verdict is a bool, a number and a string")
    return found._replace(worst=float(found.worst))


def _medians(fields: dict[str, Any]) -> dict[str, float]:
    for name, ms in fields.items():
        if parse(name)[0] not in ("triton", "aten", "loop"):
            raise ValueError(f"{name} is never measured")
        if type(ms) not in (int, float) or not 0 < ms < math.inf:
            raise ValueError("what was measured is a positive number for each backend")
    return {name: float(ms) for name, ms in fields.items()}


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of what is stored. name: of its files, and in them; made: from JSON, or raises an error for what is not of
    this kind; plain: to JSON; then: what happens if a file is lost."""

    name: str
    made: Callable[[Any], T]
    plain: Callable[[T], dict[str, Any]]
    then: str


VERDICTS = Kind("verdicts", _verdict, Verdict._asdict, "kernels are verified again")
# By a key in words, the median milliseconds by each backend.
MEASUREMENTS: Kind[dict[str, float]] = Kind("measurements", _medians, dict, '"auto" chooses as if nothing was measured')


def folder() -> Path | None:
    """Where the files are: $SEQCELLS_CACHE, or the user's cache directory. None: nowhere."""
    if (given := os.environ.get("SEQCELLS_CACHE")) is not None:
        return Path(given).absolute() if given else None
    import platformdirs  # which takes some milliseconds

    found = platformdirs.user_cache_dir("seqcells", appauthor=False)
    return Path(found) if os.path.isabs(found) else None  # not absolute: there is no home


@cache
def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        # What torch.cuda itself asks for the version; not in torch's stubs.
        return str(getattr(torch._C, "_cuda_getDriverVersion", str)()) if torch.cuda.is_available() else ""


@cache
def _processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def facts(device: torch.device, kernels: bool = True) -> dict[str, str]:
    """What holds for a device and versions only. kernels: of the kernels; else of torch's operations on the CPU."""
    from . import __version__

    versions = {"torch": torch.__version__, "seqcells": __version__}
    if not kernels:
        return {"device": _processor(), **versions}
    import triton

    sources = sorted((Path(__file__).parent / "kernels").glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    versions |= {"triton": triton.__version__, "driver": _driver() if device.type == "cuda" else ""}
    return {"device": name, **versions, "kernels": digest}


def path(device: torch.device, kind: Kind[T]) -> Path | None:
    """The file of a kind for a device; None if there is nowhere to keep one."""
    directory = folder()
    if directory is None:
        return None
    known = facts(device, kind.name == VERDICTS.name or device.type != "cpu")
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return directory / f"{kind.name}-{re.sub(r'[^A-Za-z0-9]+', '-', known['device'])}-{digest[:16]}.json"


def read(file: Path | None, kind: Kind[T]) -> dict[str, T]:
    """What is in a file, by keys in words. Empty if there is none, or, with a warning, if it is of another kind."""
    try:
        text = "" if file is None else file.read_bytes()
    except OSError:
        text = ""
    if not text:
        return {}
    try:
        found = json.loads(text)
        if found["version"] != VERSION:
            raise ValueError(f"its version is {found['version']!r}, not {VERSION}")
        return {key: kind.made(fields) for key, fields in found[kind.name].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        _warn_once(str(file), kind.name, f"{type(error).__name__}: {str(error)[:100]}", kind.then)
        return {}


@cache
def _warn_once(file: str, name: str, why: str, then: str) -> None:
    warnings.warn(
        f"seqcells: {file} is not a file of {name} ({why}). It is ignored and will be replaced: {then}.",
        RuntimeWarning,
        stacklevel=2,
    )


def add(file: Path | None, found: dict[str, T], kind: Kind[T]) -> None:
    """Add to a file. Does nothing if it cannot be written."""
    if file is None:
        return
    temporary = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        both = read(file, kind) | found
        content = {"version": VERSION, kind.name: {key: kind.plain(of) for key, of in both.items()}}
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(handle, "w") as out:
            json.dump(content, out, indent=1)
        os.replace(temporary, file)
        _sweep(file)
    except OSError:  # such as a full disk
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)


def remove(device: torch.device, kind: Kind[T]) -> None:
    """Remove the files of a kind for a device, of all versions. Raises OSError if one cannot be removed."""
    at = path(device, kind)
    if at is not None:
        for file in at.parent.glob(f"{at.name.rpartition('-')[0]}-{'[0-9a-f]' * 16}.json"):
            file.unlink(missing_ok=True)


def _sweep(file: Path) -> None:
    """Remove what killed processes left."""
    for left in file.parent.glob(f".{file.name}.*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
        except OSError:  # another process was quicker
            continue

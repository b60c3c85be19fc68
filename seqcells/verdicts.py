"""The verdicts of `verification` on disk: one JSON file for each device and versions of what made the kernels.

A file is never written in place: a new one is written beside it and renamed, so that a reader finds the old or the new.
There is no lock: of two writers at once, one may undo what the other added, and it is measured again. Where nothing
can be written (no home, a full disk, a file system that is read-only), verdicts live as long as the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

VERSION = 1
_STALE = 3600.0  # seconds after which a temporary file is one that a killed process left


class Verdict(NamedTuple):
    """good: whether a kernel may run. worst: the largest error, in units of what is allowed; tensor: of which."""

    good: bool
    worst: float
    tensor: str


def folder() -> Path | None:
    """Where the files are: $SEQCELLS_CACHE, or the user's cache directory. None: nowhere."""
    if (given := os.environ.get("SEQCELLS_CACHE")) is not None:
        return Path(given).absolute() if given else None
    import platformdirs  # only where a kernel is verified

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
def facts(device: torch.device) -> dict[str, str]:
    """What a verdict depends on beside the kernel itself."""
    import triton

    from . import __version__

    sources = sorted((Path(__file__).parent / "kernels").glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "seqcells": __version__}
    return {"device": name, "driver": _driver() if device.type == "cuda" else "", **versions, "kernels": digest}


def path(device: torch.device) -> Path | None:
    """The file for a device; None if there is nowhere to keep one."""
    directory = folder()
    if directory is None:
        return None
    known = facts(device)
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return directory / f"verdicts-{re.sub(r'[^A-Za-z0-9]+', '-', known['device'])}-{digest[:16]}.json"


def read(file: Path | None) -> dict[str, Verdict]:
    """The verdicts in a file, by the variants' keys. Empty if there is none, or, with a warning, if it is not one."""
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
        return {key: _verdict(**fields) for key, fields in found["verdicts"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _warn_once(str(file), f"{type(error).__name__}: {str(error)[:100]}")
        return {}


def _verdict(good: bool, worst: float, tensor: str) -> Verdict:
    if type(good) is not bool or type(worst) not in (int, float) or type(tensor) is not str:
        raise ValueError("a verdict is a bool, a number and a string")
    return Verdict(good, float(worst), tensor)


@cache
def _warn_once(file: str, why: str) -> None:
    warnings.warn(
        f"seqcells: {file} is not a file of verdicts ({why}). It is ignored and will be replaced: kernels are verified "
        "again.",
        RuntimeWarning,
        stacklevel=2,
    )


def add(file: Path | None, verdicts: dict[str, Verdict]) -> None:
    """Add verdicts to a file. Does nothing if it cannot be written."""
    if file is None:
        return
    temporary = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        both = read(file) | verdicts
        content = {"version": VERSION, "verdicts": {key: v._asdict() for key, v in both.items()}}
        handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(handle, "w") as out:
            json.dump(content, out, indent=1)
        os.replace(temporary, file)
        _sweep(file)
    except OSError:  # such as a full disk
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)


def _sweep(file: Path) -> None:
    """Remove what killed processes left."""
    for left in file.parent.glob(f".{file.name}.*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
        except OSError:  # another process was quicker
            continue

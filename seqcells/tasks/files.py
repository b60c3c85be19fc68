"""Whole files, read and written. Every failure is an OSError whose message is one line that names the file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Replace the content of path, or change nothing. Creates the folder if necessary.

    The content is written to a temporary file in the same folder, which is then renamed, so that a reader finds the old
    content or the new, even with several writers. The temporary file has a random name, is never opened through a link,
    has the permissions of the umask, and is removed after any failure (but not if the process is killed). If path is a
    symbolic link, the link is replaced and its target stays unchanged.
    """
    with _temporary(path, content) as temporary:
        os.replace(temporary, path)


def check(path: Path) -> None:
    """Raise OSError if path cannot be written now. Creates the folder if necessary; does not change path itself."""
    with _temporary(path, b"\0"):
        pass


def read(path: Path) -> bytes:
    """The content of path. FileNotFoundError if there is no such file."""
    try:
        _require_file(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        advice = "change that, or choose another folder to start anew"
        raise OSError(f"cannot read {path}: {error.strerror or error}; {advice}") from error


def _require_file(path: Path) -> None:
    """Raise OSError if path is a directory, a device or a pipe."""
    if path.exists() and not path.is_file():
        raise OSError("it is a directory" if path.is_dir() else "it is not a regular file")


@contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file beside path with that content, removed afterwards if it still exists."""
    temporary = path.parent / f".seqcells-{secrets.token_hex(8)}.tmp"
    try:
        _require_file(path)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("it is read-only")
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(f"{path.parent} is not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:  # x: fails where anything has that name, a link too
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        advice = "free space or change permissions there, or choose another path"
        raise OSError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()

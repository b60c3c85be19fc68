"""tqdm's progress bar if tqdm is installed (the extra `examples`), else an object with its methods that do nothing."""

from __future__ import annotations

from typing import Any


class _Silent:
    n = 0

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, *_: object, **__: object) -> None:
        pass

    def write(self, text: str) -> None:
        print(text)


def bar(**options: object) -> Any:  # tqdm's has no type
    """A tqdm bar, drawn only on a terminal."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _Silent()
    return tqdm(disable=None, **options)

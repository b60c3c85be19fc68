"""Fused Triton kernels for recurrent cells: cells x schedules, each written once. Tensors in, tensors out.

Knows neither autograd nor nn; `seqcells` builds those on top. Its modules import triton, all but buffers, registry and
the plans. So cells, scan, single and stack are imported where they are first used; importing this package imports
nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import cells, scan, single, stack
else:

    def __getattr__(name: str) -> ModuleType:
        # Called once for each: an imported module is an attribute of its package.
        if name not in ("cells", "scan", "single", "stack"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f".{name}", __name__)


__all__ = ["cells", "scan", "single", "stack"]

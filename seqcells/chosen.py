"""The backend that `with seqcells.backend(...)` has set in the current thread or task: this module's `backend`.

It is a context variable behind a property of the module's class. torch.compile can neither trace a context variable nor
guard on one. But it can guard on a module's attribute, which it reads again in the calling thread, and it can trace
setting one.
"""

from __future__ import annotations

import sys
from contextvars import Context, ContextVar
from types import ModuleType

import torch

backend: str  # a name that backends.parse accepts; "auto" if none is set
_backend: ContextVar[str] = ContextVar("seqcells.backend", default="")
of_context = _backend.get  # faster, for where nothing compiles; returns "" if the context has no value: read `backend`


def _of_caller() -> str:
    """The backend in a context that has no value of its own yet.

    The autograd engine's own threads never have one. On a GPU, they run what torch.utils.checkpoint recomputes. They
    use the backend of the thread that called backward, whose context PyTorch passes on (2.13 does, 2.11 does not).
    """
    if torch._C._current_graph_task_id() == -1:
        _backend.set("auto")  # so that this function is called only once
        return "auto"
    context = torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else None
    return (context.get(_backend) if isinstance(context, Context) else None) or "auto"


class _Chosen(ModuleType):
    @property
    def backend(self) -> str:
        return _backend.get() or _of_caller()

    @backend.setter
    def backend(self, name: str) -> None:
        _backend.set(name)


sys.modules[__name__].__class__ = _Chosen

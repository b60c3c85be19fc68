"""The backend that `with seqcells.backend(...)` chose, for the thread or task that asks: this module's `backend`.

It is a context variable behind a property of the module's class. torch.compile can neither trace a context variable nor
guard on one. But it guards on a module's attribute, by getting it again in the thread that calls; and it traces setting
one.
"""

from __future__ import annotations

import sys
from contextvars import Context, ContextVar
from types import ModuleType

import torch

backend: str  # a spelling of backends.parse; "auto" where there is no choice
_backend: ContextVar[str] = ContextVar("seqcells.backend", default="")
of_context = _backend.get  # faster, for where nothing compiles; returns "" if the context has no value: read `backend`


def _of_caller() -> str:
    """The choice in a context that has none of its own yet.

    The autograd engine's own threads have none ever. They run what torch.utils.checkpoint recomputes on a GPU. It gets
    the choice of the thread that called backward, whose context PyTorch (2.13, not 2.11) hands on.
    """
    if torch._C._current_graph_task_id() == -1:
        _backend.set("auto")  # so that it is looked for once
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

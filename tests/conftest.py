"""The kernels run on the GPU if there is one, else in Triton's interpreter, chosen before triton is imported."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

torch.set_num_threads(1)
# The first example of a property may compile or interpret much: time says nothing about it.
hypothesis.settings.register_profile("seqcells", deadline=None)
hypothesis.settings.load_profile("seqcells")


def make_the_interpreter_quicker():
    """Without what takes much of its time here and finds nothing.

    It patches triton.language at every launch, and again at every call of a device function, where the launch's patches
    stand. And it looks whether integers overflow, at every sum, difference and product; at these sizes none can.
    """
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    standing: set[int] = set()

    def patch_if_new(fn):
        if id(fn.__globals__) in standing:
            return interpreter._LangPatchScope()
        standing.add(id(fn.__globals__))
        return patch(fn)

    def launch(self, *args, **kwargs):
        standing.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            standing.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_if_new, launch
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if DEVICE == "cpu":
    make_the_interpreter_quicker()


@pytest.fixture
def poison():
    """Every uninitialised buffer is full of NaN: what a kernel does not write, or reads too early, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.ones(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

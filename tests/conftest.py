"""The kernels run on the GPU if there is one, else in Triton's interpreter, chosen before triton is imported."""

import os
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["SEQCELLS_CACHE"] = ""  # verdicts of one run are not another's

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

torch.set_num_threads(1)
# The first example of a property may compile or interpret much: time says nothing about it.
hypothesis.settings.register_profile("seqcells", deadline=None)
hypothesis.settings.load_profile("seqcells")


def make_the_interpreter_quicker():
    """Without what takes much of its time here and finds nothing.

    It patches triton.language at every launch and every call of a device function, and takes the patches back: here
    they stand from a file's first on. It makes a table of NumPy's types at every load, store and sum. And it looks
    whether integers overflow, at every sum, difference and product; at these sizes none can.
    """
    patch, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    standing, known = set(), {}

    def patch_once(fn):
        if id(fn.__globals__) not in standing:
            standing.add(id(fn.__globals__))
            patch(fn)
        return interpreter._LangPatchScope()  # which takes nothing back

    def np_dtype_of(kind):
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        name = "pointer" if isinstance(scalar, tl.pointer_type) else scalar.name
        if name not in known:
            known[name] = np_dtype(kind)
        return known[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype_of
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if DEVICE == "cpu":
    make_the_interpreter_quicker()


def pytest_ignore_collect(collection_path, config):
    """tests/integrations imports other frameworks, which only `-m integrations` needs."""
    inside = Path(__file__).parent / "integrations" in (collection_path, *collection_path.parents)
    return True if inside and config.option.markexpr != "integrations" else None


@pytest.fixture
def poison():
    """Every uninitialised buffer is full of NaN: what a kernel does not write, or reads too early, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.ones(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

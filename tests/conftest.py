"""The kernels run on the GPU if there is one, else in Triton's interpreter, chosen before triton is imported."""

import gc
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
from triton.language.semantic import TritonSemantic  # noqa: E402
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
    make_types_once()


def make_types_once():
    """Triton's types of blocks, and what a tensor takes from its type: much Python at every operation, and the same for
    the same dtype and shape. Here they are made the first time and copied from then on, and blocks of one shape are not
    broadcast to each other's."""
    block_type, tensor, broadcast = tl.block_type.__init__, tl.tensor.__init__, TritonSemantic.broadcast_impl_value
    blocks, parts = {}, {}

    def element(kind):
        return kind.name, getattr(kind, "address_space", None)  # a pointer's name has its element, and const

    def make_block_type(self, element_ty, shape):
        sizes = tuple([n.value if type(n) is tl.constexpr else n for n in shape])
        key = element(element_ty), sizes, tuple(map(type, sizes))
        if key not in blocks:
            block_type(self, element_ty, shape)
            blocks[key] = vars(self) | {"made_for": key}
        vars(self).update(blocks[key])

    def make_tensor(self, handle, type):
        key = type.made_for if isinstance(type, tl.block_type) else element(type)
        if key not in parts:
            tensor(self, handle, type)
            parts[key] = {name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")}
        vars(self).update(parts[key], handle=handle, type=type, dtype=type.scalar)

    def broadcast_if_they_differ(self, lhs, rhs):
        both = isinstance(lhs.type, tl.block_type) and isinstance(rhs.type, tl.block_type)
        if both and lhs.type.made_for[1] == rhs.type.made_for[1]:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    tl.block_type.__init__, tl.tensor.__init__ = make_block_type, make_tensor
    TritonSemantic.broadcast_impl_value = broadcast_if_they_differ


if DEVICE == "cpu":
    make_the_interpreter_quicker()


def pytest_ignore_collect(collection_path, config):
    """tests/integrations imports other frameworks, which only `-m integrations` needs."""
    inside = Path(__file__).parent / "integrations" in (collection_path, *collection_path.parents)
    return True if inside and config.option.markexpr != "integrations" else None


def pytest_collection_finish():
    """What is there now stays: the garbage collector need not look through torch and triton over and over."""
    gc.freeze()


@pytest.fixture
def poison():
    """Every uninitialised buffer is full of NaN: what a kernel does not write, or reads too early, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all() and torch.ones(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

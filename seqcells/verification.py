"""Whether a kernel may be trusted: it is compared with the reference once, at its first use (`kernel_check`).

"auto" verifies what it is about to launch; a kernel that is wrong is refused as one that does not compile is (see
`fallback`). The verdict is stored (`verdicts`), so that later processes only read it. Nothing is verified while a CUDA
graph is captured or a program is compiled or traced: there a stored verdict decides, and without one the kernel runs. A
compiled program calls operators, in which kernels are verified when it first runs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from . import backends, checks, fallback, verdicts
from .kernels import registry
from .kernels.form import FUNCTIONS
from .kernels.plan import Plan
from .verdicts import VERDICTS, Verdict

if TYPE_CHECKING:
    from .kernel_check import Variant

POLICIES = ("first use", "off", "always")
# A plan that may run, by its id and the fields of a Variant. What launches looks here first.
TRUSTED: dict[tuple[object, ...], Plan] = {}
_MOST = 1 << 12  # of them
_known: dict[tuple[torch.device, str], Verdict] = {}  # of this process
_read: dict[torch.device, dict[str, Verdict]] = {}  # of the file, as it was when first needed
_lock = threading.Lock()
_here = threading.local()
_NOT_COMPILED = {"why", "programs", "microseconds", "cheaper", "elsewhere"}  # fields of a plan


class CURRENT:
    """The policy in force, in this process."""

    policy = "first use"


class verification:
    """Set when kernels are compared with the float64 reference before they are trusted.

    Args:
        policy: One of

            - ``"first use"``, the default: where the backend is ``"auto"`` and the tensors are on CUDA, when a kernel
              is first used on a device. Every output and gradient of a small case with the same tiles must be within
              the tolerance of `seqcells.testing.check`. The verdict is stored, so that later processes only read it. A
              kernel that is wrong is refused with a RuntimeWarning, and the next schedule runs, or a loop of torch
              operations.
            - ``"off"``: never. The first call is then as quick as compiling lets it be.
            - ``"always"``: once in each process, whatever is stored, and also where ``backend="triton"`` asks for the
              kernels by name. There a wrong kernel raises RuntimeError.

    It holds for the whole process, from the call on; as a context manager, until the context ends. The verdicts are in
    the user's cache directory; the environment variable ``SEQCELLS_CACHE`` names another one, and if it is empty,
    nothing is stored. Nothing is verified on the CPU.

    Raises:
        ValueError: if policy is none of these.

    Example::

        >>> with seqcells.verification("off"):
        ...     y, h_n = seqcells.GRU(10, 20)(torch.randn(5, 3, 10))
    """

    def __init__(self, policy: str) -> None:
        checks.one_of("policy", policy, POLICIES)
        self._before = CURRENT.policy
        _set(policy)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        _set(self._before)


def _set(policy: str) -> None:
    if policy == "always" != CURRENT.policy:
        forget()
    CURRENT.policy = policy


def forget() -> None:
    """Forget what this process knows: kernels are verified, or their verdicts read, again."""
    for known in (TRUSTED, _known, _read):
        known.clear()


def insist(of: tuple[Any, ...], plan: Plan, rows: int, other: Callable[[], Plan] | None = None) -> None:
    """`verify` a kernel that the user asked for by name: raises the error itself if it does not compile or launch."""
    try:
        verify(of, plan, rows, other)
    except fallback.Failed as error:
        raise error.__cause__ or error from None


def verify(of: tuple[Any, ...], plan: Plan, rows: int, other: Callable[[], Plan] | None = None) -> None:
    """Return if a kernel may run; raise fallback.Failed if not, or if it does not compile or launch.

    of: the fields of its Variant. rows: the batch size of the call. other: gives the plan of what runs before backward
    or after a step that saves gates.
    """
    if CURRENT.policy == "off" or getattr(_here, "busy", False) or TRUSTED.get((id(plan), *of)) is plan:
        return
    from .kernel_check import Variant  # which imports what imports this module

    v = Variant(*of)
    plans = [plan] if other is None else [plan, other()] if v.direction == "step" else [other(), plan]
    size = _rows(plans, rows)
    at = v.device, _key(v, plans, size)
    verdict = _known.get(at)
    if verdict is None and CURRENT.policy != "always":
        verdict = _stored(v.device).get(at[1])
    if verdict is None:
        if not possible(v.device):
            return
        verdict = _measured(v, plans, size, at)
    if not verdict.good:
        raise fallback.Wrong(verdict.worst, verdict.tensor)
    if len(TRUSTED) >= _MOST:
        TRUSTED.clear()
    TRUSTED[(id(plan), *of)] = plan


def _rows(plans: Sequence[Plan], rows: int) -> int:
    """The batch size of a check: more than one tile, and a part of one; but no more programs that wait for each other
    than the call itself has, since they must all be on the device at once."""
    most = [p.block_b + 3 if rows > p.block_b else max(1, p.block_b - 1) for p in plans if p.waits]
    return min(most, default=max(p.block_b for p in plans) + 3)


def _key(v: Variant, plans: Sequence[Plan], rows: int) -> str:
    """A variant in words, and a hash of everything that its kernels are compiled for."""
    schedule = plans[v.direction == "backward"].schedule
    compiled = [[f.name, getattr(p, f.name)] for p in plans for f in fields(p) if f.name not in _NOT_COMPILED]
    own = [str(part) for name, part in v._asdict().items() if name not in ("cell", "device")]
    digest = hashlib.sha256(json.dumps([source_of(v.cell), own, compiled, rows]).encode()).hexdigest()
    return _words(v.cell, v.direction, schedule, v.dtype, v.hidden_size) + digest[:32]


def _words(cell: str, direction: str, schedule: str, dtype: torch.dtype, hidden_size: int) -> str:
    return f"{cell} {direction} by {schedule}, {str(dtype).removeprefix('torch.')}, hidden size {hidden_size}, "


def said(
    device: torch.device,
    cell: str,
    direction: str,
    schedule: str,
    dtype: torch.dtype,
    hidden_size: int,
    by_name: bool = False,
) -> str:
    """Whether kernels of that kind (with and without masks, of any tile) were verified on a device: what is known or
    stored, without a check. by_name: whether the user asks for the kernels, which then are verified only by "always".
    """
    words = _words(cell, direction, schedule, dtype, hidden_size)
    here = {key: verdict for (place, key), verdict in list(_known.items()) if place == device}
    found = [verdict for key, verdict in (_stored(device) | here).items() if key.startswith(words)]
    wrong = [verdict for verdict in found if not verdict.good]
    if wrong:
        return f"refused: {fallback.Wrong(*max(wrong, key=lambda v: v.worst)[1:])}"
    if found:
        worst = max(verdict.worst for verdict in found)
        return f"verified on this device ({len(found)} of its kind): max error {worst:.2g} of what is allowed"
    if CURRENT.policy == "off" or (by_name and CURRENT.policy != "always"):
        return "not verified: " + ("the policy is off" if CURRENT.policy == "off" else "it is asked for by name")
    return "not verified yet: at its first use"


@cache
def _of_declared(cell: Any) -> str:
    parts = [f"{f.name}={getattr(cell, f.name)}" for f in fields(cell) if f.type not in ("object", object)]
    for name in FUNCTIONS:
        function = getattr(cell, name)
        parts.append("" if function is None else inspect.getsource(getattr(function, "fn", function)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def source_of(cell: str) -> str:
    """A hash of a cell's form and Triton functions."""
    return _of_declared(registry.get(cell))


def _stored(device: torch.device) -> dict[str, Verdict]:
    if device not in _read:
        _read[device] = verdicts.read(verdicts.path(device, VERDICTS), VERDICTS)
    return _read[device]


def possible(device: torch.device) -> bool:
    """Whether tensors have values here, and more kernels may be launched."""
    if backends.traced() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _measured(v: Variant, plans: Sequence[Plan], rows: int, at: tuple[torch.device, str]) -> Verdict:
    """The verdict on a variant that has none, which is also stored."""
    from .kernel_check import Unable, measure

    with _lock:
        if at in _known:  # another thread was quicker
            return _known[at]
        try:
            with ThreadPoolExecutor(1, initializer=_begin) as apart:  # without the caller's modes
                worst, tensor = apart.submit(measure, v, plans, rows).result()
        except Unable as error:
            warnings.warn(
                f"seqcells: {at[1]} could not be verified, and runs: {type(error.__cause__).__name__}: "
                f"{str(error.__cause__)[:300]}",
                RuntimeWarning,
                stacklevel=4,
            )
            return _known.setdefault(at, Verdict(True, 0.0, ""))
        verdict = _known[at] = Verdict(worst <= 1, worst, tensor)
        verdicts.add(verdicts.path(v.device, VERDICTS), {at[1]: verdict}, VERDICTS)
        return verdict


def _begin() -> None:
    _here.busy = True

"""Facts about devices, for the plan. Imports neither torch nor triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class Device:
    """Facts of a device. capability: 90 for sm_90, 0 where it is not CUDA. shared: bytes a program may have.

    tensor: floating-point operations a clock and processor in bf16, dense. l2: bytes a clock and processor from the
    second-level cache when all read at once. memory: GB/s. cache: bytes of second-level cache.
    """

    name: str
    capability: int
    processors: int
    shared: int
    clock: float = 1.8  # GHz
    tensor: int = 4096
    l2: float = 40.0
    memory: float = 3350.0
    cache: int = 50 << 20

    def microseconds(self, clocks: float) -> float:
        return clocks / (self.clock * 1000)


KB = 1024
# Vendors' data sheets and tuning guides; the largest part of each kind. T4: Triton 3.7 compiles no products for the
# tensor cores of Turing, so `tensor` is its multiply-adds; its l2 is a guess, from the RTX 4090's.
KNOWN = {
    "sm_75": Device("T4 (sm_75)", 75, 40, 64 * KB, 1.59, 128, 20, 320, 4 << 20),
    "sm_80": Device("A100 (sm_80)", 80, 108, 163 * KB, 1.41, 2048, 47, 2039, 40 << 20),
    "sm_89": Device("RTX 4090 (sm_89)", 89, 128, 99 * KB, 2.52, 512, 20, 1008, 72 << 20),
    "sm_90": Device("H100 (sm_90)", 90, 132, 227 * KB, 1.83, 4096, 39, 3350, 50 << 20),
    "sm_100": Device("B200 (sm_100)", 100, 148, 227 * KB, 1.85, 8192, 39, 8000, 126 << 20),
    "T4": Device("T4", 75, 40, 64 * KB, 1.59, 128, 20, 320, 4 << 20),
    "A100": Device("A100", 80, 108, 163 * KB, 1.41, 2048, 47, 2039, 40 << 20),
    "H100": Device("H100", 90, 132, 227 * KB, 1.83, 4096, 39, 3350, 50 << 20),
    "H200": Device("H200", 90, 132, 227 * KB, 1.83, 4096, 39, 4800, 50 << 20),
    "B200": Device("B200", 100, 148, 227 * KB, 1.85, 8192, 39, 8000, 126 << 20),
    "GH200": Device("GH200", 90, 132, 227 * KB, 1.83, 4096, 39, 4900, 50 << 20),
    "GB200": Device("GB200", 100, 148, 227 * KB, 1.85, 8192, 39, 8000, 126 << 20),
    "L4": Device("L4", 89, 58, 99 * KB, 2.04, 1024, 32, 300, 48 << 20),
    "RTX4090": Device("RTX 4090", 89, 128, 99 * KB, 2.52, 512, 20, 1008, 72 << 20),
    "MI300X": Device("MI300X", 0, 304, 64 * KB, 2.1, 2048, 27, 5300, 4 << 20),
}
INTERPRETER = Device("interpreter", 0, 132, 227 * KB)


def known(name: str) -> Device | None:
    """The KNOWN device of that name, in any case, with or without "_", "-" and spaces; None if there is none."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c not in "_- ")

    return next((device for key, device in KNOWN.items() if plain(key) == plain(name)), None)


def present(name: str, capability: int, processors: int, shared: int) -> Device:
    """A device of this machine: its own sizes, and the rates of the KNOWN one with its name or capability."""
    words = name.replace("-", " ").split()
    named = [*words, *(a + b for a, b in pairwise(words))]
    like = next((KNOWN[word] for word in named if word in KNOWN), KNOWN.get(f"sm_{capability}", KNOWN["H100"]))
    return replace(like, name=name, capability=capability, processors=processors, shared=shared)

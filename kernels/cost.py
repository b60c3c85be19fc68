"""What a step costs, by a model in microseconds: a pure function, of which the plans choose the least.

The parts (`Cost`): reading U from where it is stored, the tensor cores' work, the activations, the step's own inputs
and outputs, what programs exchange through L2, the barrier or the launch, and the latency of a step's chain of
dependent operations. The rates are the vendors' data sheets and tuning guides. The latencies, and how fast a processor
loads and stores, are measured on an H200 (benchmarks/results/gpu-h200.md) or fitted by hand to the 78 kernels of
`resident` and `grid` that were timed there, at commit 7ec6abe. `stepwise` was not timed.
"""

from __future__ import annotations

from dataclasses import dataclass

# Clocks. CHAIN: what every step waits for beside its products: the operand's way through shared memory, activations, a
# layout conversion (fitted). LINK: a product that adds to the one before (measured). BARRIER: of `grid`, from the store
# to what the others load, and the step around it (fitted; a word and its flag alone take 1245 there, the load 273).
CHAIN, LINK, BARRIER = 280, 26, 2400
LAUNCH = 5.0  # microseconds: between a graph's (about 2) and Python's (15 and more)
TRIP = 273  # clocks to L2 and back (measured)
SHARED_RATE = 128  # bytes a clock
MEMORY_RATE = 32  # bytes a clock that a processor stores (measured); loads wait behind stores
EXCHANGE_RATE = 18  # bytes a clock that a processor loads of what others stored just now (fitted)
ACTIVATION_RATE = 16  # one-instruction functions a clock; the exact ones take about two


@dataclass(frozen=True)
class Cost:
    """The parts of a step's time by the model, in microseconds."""

    u: float  # reading U from shared memory, L2 or memory
    tensor: float  # the products; beside reading U, not after it
    activations: float
    memory: float  # the step's own inputs and outputs
    exchange: float  # states or gradients from other programs, through L2
    start: float  # a barrier or a launch
    chain: float  # latency of the dependent operations of a step

    @property
    def total(self) -> float:
        return max(self.u, self.tensor) + self.activations + self.memory + self.exchange + self.start + self.chain

    def __str__(self) -> str:
        parts = {"U": self.u, "tensor cores": self.tensor, "activations": self.activations, "memory": self.memory}
        parts |= {"exchange": self.exchange, "barrier or launch": self.start, "latency": self.chain}
        shown = [f"{name} {us:.2f}" for name, us in parts.items() if us >= 0.005]
        return f"about {self.total:.2f} us a step ({', '.join(shown)})"


def rate(itemsize: int, precision: str) -> float:
    """Tensor-core operations relative to bf16: tf32 half, three products for tf32x3, none for ieee and float64."""
    if itemsize == 2:
        return 1.0
    if itemsize == 8:
        return 1 / 32
    return {"tf32": 1 / 2, "tf32x3": 1 / 6}.get(precision, 1 / 16)

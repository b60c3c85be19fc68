"""Tiles of the `single` schedule (one step in one launch), and whether it is cheaper than a GEMM and a scan over one
step: a pure function, as `plan` is, with its model and the reason in numbers.

Beside `plan`'s rates, what decides between a kernel of ours and the vendor's GEMM: a warp's own products (mma.sync)
reach 62% of what Hopper's tensor cores do (Luo et al., arXiv:2402.13499; taken for every device), of float32 as it is
half a loop's instructions are its multiply-adds (the report), and the GEMM is taken to reach all of either. `plan`'s
time to read U is as optimistic, and the copies around a scan are not counted: the one speaks for the GEMM where batches
are large, the other against it where they are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .cost import ACTIVATION_RATE, CHAIN, LAUNCH, TRIP, Cost, rate
from .devices import INTERPRETER, KB, Device
from .form import Form
from .plan import Plan, _ceil, _power_of_2, plan

WARP_PRODUCTS, MULTIPLY_ADDS = 0.62, 0.5  # of the rates of tensor cores, and of what is done without


@dataclass(frozen=True)
class Single(Plan):
    """The plan of one step. cheaper: than the GEMM of the input projection and `plan`'s schedule for the rest."""

    cheaper: bool = True
    elsewhere: float = 0.0  # those two, by the model, in microseconds


def slots(cell: Form) -> int:
    """Rows of a program for each unit: a tile of gx or a product apart each, padded to a power of two."""
    return _power_of_2(cell.gates + len(cell.apart), 1, 1 << 10)


def unfit(cell: Form, I: int, H: int, inputs: int = 0) -> str | None:  # noqa: E741  (the project's letter)
    """Why one launch cannot do this cell's step; None if it can. inputs: how many of the tiles of gx are per-step
    inputs."""
    if cell.means:
        return "its means over units need the products of every unit, and a launch cannot wait for all its programs"
    if inputs:
        return "its per-step inputs are not products of x"
    if cell.drawn:
        return "it draws dropout masks"
    if any(operand.level > 1 for operand in cell.operands):
        return "its second product needs the first gates of every unit, and a launch cannot wait for all its programs"
    if len(cell.operands) > 1 or any(operand.state is None for operand in cell.operands):
        return "its products are not all with one of the states"
    adding = [tile for tile in cell.adds if tile >= 0]
    if len(set(adding)) < len(adding):
        return "two products add to the same gate"
    if slots(cell) > 8:
        return "its tiles are tried for at most eight products a unit"
    if max(cell.gates * I, cell.products * H) * H >= 1 << 31:
        return "the weights must have less than 2^31 elements"
    return None


def parts(rows: int) -> int:
    """In how many parts the four warps of a program share the inner sum of a product of so many rows."""
    return max(1, 64 // rows)


def shared_bytes(rows: int, block_b: int, block_k: int, itemsize: int, stages: int) -> int:
    """Shared memory of a program, an upper bound on what the compiler reports: the tiles on their way, or the products'
    parts and a conversion of the result, which come after them."""
    return max(stages * (rows + block_b) * block_k * itemsize, 2 * parts(rows) * rows * block_b * max(4, itemsize)) + KB


class _Problem:
    def __init__(
        self,
        cell: Form,
        B: int,
        I: int,  # noqa: E741
        H: int,
        itemsize: int,
        device: Device,
        precisions: tuple[str, str],
    ) -> None:
        self.cell, self.B, self.I, self.H, self.itemsize, self.device = cell, B, I, H, itemsize, device
        self.precisions = precisions  # of W x and of U h
        self.bytes = (cell.gates * I + cell.products * H) * H * itemsize

    def _clocks(self, rows: int, columns: int, precision: str, ours: bool) -> float:
        """Of one processor, for the products of so many rows (those of the batch times those of a matrix)."""
        share = 1.0
        if ours:
            share = MULTIPLY_ADDS if self.itemsize == 4 and precision == "ieee" else WARP_PRODUCTS
        return 2 * rows * columns / (self.device.tensor * rate(self.itemsize, precision) * share)

    def _streamed(self, bytes: int) -> float:
        """Microseconds to bring weights from memory, where they do not stay in L2."""
        d = self.device
        return bytes / d.memory / 1000 if self.bytes > 0.7 * d.cache else 0.0

    def tiles(self) -> Iterator[tuple[tuple[int, int, int], int, int, int, Cost]]:
        """(tile, warps, stages, programs, cost) of what fits."""
        cell, B, I, H, itemsize, d = self.cell, self.B, self.I, self.H, self.itemsize, self.device  # noqa: E741
        per_unit = slots(cell)
        # Bytes of a row that a turn of the loop takes: a line, and half where registers are short.
        line = 64 if self.exact() else 128
        # Parts of a product are a batched one, which only NVIDIA's have been tried on.
        least = 16 if d.capability or d is INTERPRETER else 64
        for rows in (16, 32, 64, 128):
            block_h = rows // per_unit
            if rows < least or (rows > least and block_h >= 2 * H):
                continue
            for block_b in (8, 16, 32, 64, 128):
                if (block_b > 8 and block_b >= 2 * B) or rows * block_b > self.most_elements(rows):
                    continue
                num_warps = 8 if rows * block_b > 4096 else 4
                part = _power_of_2(_ceil(max(I, H), parts(rows)), 16, max(16, line // itemsize))
                block_k = part * parts(rows)
                # Three turns on their way: two of a small tile would not cover the latency of memory.
                num_stages = next(
                    (n for n in (4, 3, 2) if shared_bytes(rows, block_b, block_k, itemsize, n) <= d.shared), 0
                )
                if not num_stages:
                    continue
                programs = _ceil(H, block_h) * _ceil(B, block_b)
                waves = _ceil(programs, d.processors)
                work = self._clocks(rows * block_b, I, self.precisions[0], True)
                turns = _ceil(I, block_k)
                read = (cell.gates * block_h + min(B, block_b)) * I
                if cell.products:
                    work += self._clocks(rows * block_b, H, self.precisions[1], True)
                    turns += _ceil(H, block_k)
                    read += (cell.products * block_h + min(B, block_b)) * H
                # A turn of the loop waits for its tiles, num_stages - 1 turns at a time.
                trips = turns * TRIP / (num_stages - 1)
                functions = block_b * block_h * (cell.gates + 1) * (2 if itemsize > 2 else 1) / ACTIVATION_RATE
                cost = Cost(
                    u=max(d.microseconds(max(read * itemsize * waves / d.l2, trips)), self._streamed(self.bytes)),
                    tensor=d.microseconds(work * waves),
                    activations=d.microseconds(functions * waves),
                    memory=0.0,
                    exchange=0.0,
                    start=LAUNCH,
                    chain=d.microseconds(CHAIN),
                )
                yield (block_h, block_b, block_k), num_warps, num_stages, programs, cost

    def exact(self) -> bool:
        """Whether some product is done without tensor cores, or with three for one."""
        return self.itemsize == 8 or (self.itemsize == 4 and self.precisions != ("tf32", "tf32"))

    def most_elements(self, rows: int) -> int:
        """Of a product of so many rows, beyond which some target is out of registers or close (found with the report,
        sm_80, sm_90 and sm_100)."""
        if self.device is INTERPRETER:
            return 8192
        if self.itemsize == 8 or (self.itemsize == 4 and "ieee" in self.precisions):
            return 512
        return 1024 if self.exact() else 8192 if rows >= 64 else 32 * rows

    def elsewhere(self) -> tuple[float, str]:
        """The time of the GEMM and of one step of `plan`'s schedule; the copies between them are not counted."""
        cell, B, I, H, d = self.cell, self.B, self.I, self.H, self.device  # noqa: E741
        size = {"B": B, "H": H, "itemsize": self.itemsize}
        there = plan(cell, **size, device=d, precision=self.precisions[1])
        all_l2 = d.l2 * d.processors
        w = cell.gates * H * I * self.itemsize
        gx = 2 * B * cell.gates * H * self.itemsize  # written, and read again
        work = self._clocks(B * cell.gates * H, I, self.precisions[0], False) / d.processors
        gemm = LAUNCH + max(d.microseconds(max(w / all_l2, work)), self._streamed(w)) + d.microseconds(gx / all_l2)
        u = cell.products * H * H * self.itemsize
        step = there.microseconds + (0.0 if there.schedule == "stepwise" else LAUNCH)
        # The plan of a scan takes U for what stays in L2 from step to step; here W was there in between.
        step = max(step, LAUNCH + self._streamed(u))
        return gemm + step, f"a GEMM ({gemm:.2f} us) and a step by {there.schedule} ({step:.2f} us)"


@cache
def plan_single(
    cell: Form,
    *,
    B: int,
    I: int,  # noqa: E741
    H: int,
    itemsize: int,
    device: Device,
    precision: str = "tf32",
    input_precision: str | None = None,
) -> Single:
    """The tiles for one step in one launch, and whether that is cheaper.

    B, I, H: batch, input and hidden size. precision: what float32 products with U are done in; input_precision: those
    with W (None: the same). ValueError where one launch cannot do it (`unfit`).
    """
    if reason := unfit(cell, I, H):
        raise ValueError(f"the single schedule does not fit: {reason}")
    problem = _Problem(cell, B, I, H, itemsize, device, (input_precision or precision, precision))
    # Interpreted, programs run one after another, and each costs the same.
    tile, num_warps, num_stages, programs, cost = min(
        problem.tiles(), key=lambda found: found[3] if device is INTERPRETER else found[4].total
    )
    us, other = problem.elsewhere()
    cheaper = cost.total < us
    why = (
        f"one launch of {programs} programs over {tile[0]} units and {tile[1]} rows reads both matrices "
        f"({problem.bytes // KB} KB) once for every {tile[1]} rows; {cost}; {'cheaper' if cheaper else 'dearer'} than "
        f"{other}"
    )
    return Single(
        "single", *tile, num_warps, num_stages, 255, device.capability, why, programs, cost.total,
        cheaper=cheaper, elsewhere=us,
    )  # fmt: skip

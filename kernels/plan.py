"""Which schedule, tiles and warps for a shape on a device: a pure function, and its reason in words and numbers.

Imports neither torch nor triton: facts in, a frozen Plan out. It is the one whose step costs least by the model of
`cost`; facts about devices are in `devices`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from .cost import (
    ACTIVATION_RATE,
    BARRIER,
    CHAIN,
    EXCHANGE_RATE,
    LAUNCH,
    LINK,
    MEMORY_RATE,
    SHARED_RATE,
    Cost,
    rate,
)
from .devices import INTERPRETER, KB, Device
from .form import Form
from .means import most_rows, refusals

SCHEDULES = ("resident", "grid", "stepwise")
PRECISIONS = ("ieee", "tf32", "tf32x3")


@dataclass(frozen=True)
class Plan:
    """How a scan runs.

    registers: the most a thread may take (left to itself, ptxas spills a few to make room for more programs on a
    processor, which a scan does not have). capability: the device's, 0 where there is no PTX.
    programs: of one launch. microseconds: the model's time of one step. u_in_registers: each thread keeps its part
    of U. waits: programs wait for each other, so that all must be on the device at once.
    """

    schedule: str
    block_h: int
    block_b: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int
    capability: int
    why: str
    programs: int = 1
    microseconds: float = 0.0
    u_in_registers: bool = False
    waits: bool = False


def _power_of_2(n: int, least: int, most: int) -> int:
    p = least
    while p < n and p < most:
        p *= 2
    return p


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def parts(rows: int, block_b: int, warps: int) -> int:
    """In how many parts the warps of a `grid` program share the inner sum of a product [rows, block_b].

    At least one a warp, and so many that a warp has four sums under way, since each waits for itself. With more than
    16 columns it has them without; then the warps share only what 16 rows would leave to one of them.
    """
    if block_b > 16:
        return warps if rows == 16 else 1
    return warps * max(1, 64 // rows)


def chunks(columns: int, least: int, most: int) -> tuple[int, ...]:
    """The powers of two, equal but for the last, that the columns of a `grid` program's slice of U are divided into.

    One chunk, padded, if at most an eighth is padding; else the largest that fits, and what is left. least: 16 columns
    a part.
    """
    whole = _power_of_2(columns, least, 1 << 30)
    if whole <= most and (whole == least or (whole - columns) * 8 <= columns):
        return (whole,)
    first = min(most, whole // 2)
    count = columns // first
    rest = columns - count * first
    return (first,) * count + ((min(first, _power_of_2(rest, least, 1 << 30)),) if rest else ())


def slices(cell: Form, H: int, block_h: int, backward: bool) -> list[tuple[int, int]]:
    """(rows, columns) of the slices of U that a `grid` program keeps on chip. Forward one for each operand: a product
    is a row a unit, padded to a power of two. Backward one for each segment: the units are the rows, with the products
    side by side."""
    if backward:
        return [(block_h, segment.count * H) for segment in cell.segments]
    return [(block_h * _power_of_2(operand.products, 1, 1 << 10), H) for operand in cell.operands]


def _copies(itemsize: int, precision: str) -> int:
    return 2 if itemsize == 4 and precision == "tf32x3" else 1


def resident_bytes(products: int, H: int, itemsize: int, block_b: int, precision: str = "tf32") -> int:
    """Shared memory of the resident kernels, an upper bound on what the compiler reports.

    U whole, and the larger of what the directions exchange: forward an operand and a layout conversion in float32;
    backward an operand tile a product and a conversion. For "tf32x3" the compiler keeps U twice, its TF32 part and the
    rest.
    """
    block_h = _power_of_2(H, 16, 1 << 30)
    exchange = max((products + 1) * itemsize, 4 + itemsize)
    return block_h * (_copies(itemsize, precision) * products * block_h * itemsize + exchange * block_b)


def grid_bytes(cell: Form, H: int, itemsize: int, chosen: Plan, backward: bool, precision: str = "tf32") -> int:
    """Shared memory of a `grid` program, an upper bound on what the compiler reports: its slices of U if it does not
    keep them in registers, and the larger of a chunk of the operand and a product's parts on their way to the layout
    of the step."""
    of_u, passing = 0, 0
    for rows, columns in slices(cell, H, chosen.block_h, backward):
        count = parts(rows, chosen.block_b, chosen.num_warps)
        sizes = chunks(columns, 16 * count, chosen.block_k)
        of_u += rows * sum(sizes) * itemsize * _copies(itemsize, precision)
        passing = max(passing, sizes[0] * chosen.block_b * itemsize, count * rows * chosen.block_b * 4)
    return of_u * (not chosen.u_in_registers) + passing + 4 * KB


# Units a `grid` program owns. Fewer would leave the tensor cores' 16 rows half empty backward; more, U's slice of the
# largest layers too large for one processor, and the registers (tried with the report: 32 spill).
GRID_UNITS = 16
SPREAD_UNITS = 256  # those of a `resident` program of a cell without a product, whose U sets no limit


class _Problem:
    """One scan to plan: the arguments of `plan`, and what its schedules have in common."""

    def __init__(
        self, cell: Form, B: int, H: int, groups: int, itemsize: int, device: Device, precision: str, backward: bool
    ) -> None:
        self.cell, self.B, self.H, self.groups, self.itemsize = cell, B, H, groups, itemsize
        self.device, self.precision, self.backward = device, precision, backward
        self.products, self.levels = cell.products, len({operand.level for operand in cell.operands})
        # Without tensor cores: Triton 3.7 has no products for those of before Ampere.
        self.exact = itemsize == 8 or (itemsize == 4 and precision == "ieee") or 0 < device.capability < 80
        self.width = max(itemsize, 4 * self.exact)  # bytes of an operand's element: then 16 bits become 32
        self.barriers = self.levels + cell.exchanges[backward]  # of a step, by `grid`
        # What a thread has of a step: a tile for each gate and each product apart; two states take as much as three,
        # each more than two another, as does each further operand (found with the report).
        tiles = max(cell.gates + len(cell.apart), 3 if cell.states > 1 else 1) + max(0, cell.states - 2)
        tiles += max(0, len(cell.operands) - 1)
        # And backward a trained vector's gradient: all along where one program takes all steps, else only for a moment.
        params = cell.params if backward else 0
        self.tiles, self.step_tiles = tiles + params + len(cell.drawn), tiles + params // 2
        # Beyond the four of the built-in cells, plans leave more registers to them (likewise).
        self.heavy = self.tiles > 4

    def cost(
        self, u_clocks: float, rows: int, units: int, columns: int, links: int, exchange: int, start: float
    ) -> Cost:
        """Of a program with that many rows and units, whose products' inner sums are columns long in all, and links in
        the longest chain of products that wait for each other."""
        d, cell = self.device, self.cell
        work = 2 * rows * units * columns / (d.tensor * rate(self.itemsize, self.precision))
        functions = rows * units * (max(cell.gates, self.products) + 1) / ACTIVATION_RATE
        exact = 2 if self.itemsize > 2 and not self.backward else 1
        # Forward as it trains: it may save less, which the plan is not told.
        tiles = cell.gates + cell.states + cell.saved + (1 + len(cell.apart) if self.backward else 0)
        return Cost(
            u=d.microseconds(u_clocks),
            tensor=d.microseconds(work),
            activations=d.microseconds(functions * exact),
            memory=d.microseconds(rows * units * tiles * self.itemsize / MEMORY_RATE),
            exchange=d.microseconds(exchange / EXCHANGE_RATE),
            start=start,
            chain=d.microseconds(CHAIN * max(1, self.levels) + LINK * links),
        )

    def links(self, columns: int) -> int:
        """Of a sum of so many products that one warp adds up in one chain. Without tensor cores it is no chain, but
        work."""
        if self.exact:
            return 0
        return _ceil(columns, 16 if self.itemsize == 2 else 8)

    def sharing(self, cost: Cost, programs: int, at_once: int) -> float:
        """Microseconds of a step of programs that share processors, so many at once, the others after them: those at
        once share its rates, and hide each other's latency."""

        def of(n: int) -> float:
            return max(cost.total, n * (cost.total - cost.chain)) if n else 0.0

        turns, rest = divmod(_ceil(programs, self.device.processors), at_once)
        return turns * of(at_once) + of(rest)

    def made(
        self, schedule: str, tile: tuple[int, int, int], warps: int, stages: int, programs: int, why: str, us: float
    ) -> Plan:
        return Plan(schedule, *tile, warps, stages, 255, self.device.capability, why, programs, us)

    # resident

    def unfit_resident(self) -> str | None:
        """Why `resident` cannot be; None if it can."""
        products, H, itemsize, device = self.products, self.H, self.itemsize, self.device
        if not products:
            return f"one program would have all {H} units; {SPREAD_UNITS} at most" if H > SPREAD_UNITS else None
        needed = resident_bytes(products, H, itemsize, 8, self.precision)
        if needed > device.shared:
            return f"U would take {needed // KB} KB of the {device.shared // KB} KB of shared memory on {device.name}"
        if itemsize == 8 and H > 32:
            return "beyond 32 hidden units float64 products spill registers"  # found with the report, sm_90 and sm_100
        if itemsize < 8 and self.exact and (most := 32 if products > 2 else 64) < H:
            return f"beyond {most} hidden units products without tensor cores spill registers"  # likewise
        if itemsize == 4 and self.precision == "tf32x3" and (most := 32 if products > 2 else 64) < H:
            return f"beyond {most} hidden units float32 products by three TF32 products spill registers"  # likewise
        return None

    def resident(self) -> Plan:
        return min(self._residents(), key=lambda found: found.microseconds)

    def _residents(self) -> Iterator[Plan]:
        """With as few rows a program as keep every program on its own processor: more rows only lengthen a step. And
        with eight, if U is then in registers: several such programs share a processor for little more than one costs.
        """
        most = _power_of_2(_ceil(self.B * self.groups, self.device.processors), 8, 32 if self.H <= 128 else 8)
        found = self._resident(most)
        if found.block_b > 8 and (small := self._resident(8)).u_in_registers:
            yield small
        yield found

    def _resident(self, block_b: int) -> Plan:
        """With at most so many rows a program."""
        products, tiles, H, itemsize, device = self.products, self.tiles, self.H, self.itemsize, self.device
        block_h = _power_of_2(H, 16, 1 << 30)
        # Three products a gate: beyond 16 units more rows spill (likewise), and cost as much as more programs.
        if itemsize == 4 and self.precision == "tf32x3" and block_h > 16:
            block_b = 8
        # Tiles beyond 16 KB in all, and beyond 4 KB or 64 columns a warp, spill registers on some target (found with
        # the report; float64 at half that, with padded units at a quarter, and products without tensor cores at half or
        # a quarter of the columns).
        most = min(16384 if itemsize < 8 else 8192 if block_h == H else 4096, block_h * 256)
        while block_b > 8 and (
            tiles * block_b > (64 if not self.exact else 32 if block_h < 64 else 16)
            or tiles * block_h * block_b * itemsize > most
            or resident_bytes(products, H, itemsize, block_b, self.precision) > device.shared
        ):
            block_b //= 2
        wide = block_h > 128 or block_h * block_b >= 4096
        num_warps = 8 if wide or tiles * block_h * block_b * itemsize > 8192 else 4
        # Triton gives every warp 16 units or more; others would repeat their work (without tensor cores fewer spill).
        num_warps = min(num_warps, block_h // 16) if not self.exact else 8 if self.heavy else 4
        # U in registers is read from shared memory once, not at every step. Half of a thread's registers is what it can
        # have beside the tiles of eight rows; three TF32 products keep U twice.
        u_bytes = products * block_h * block_h * itemsize
        in_registers = u_bytes * _copies(itemsize, self.precision)
        u_in_registers = products > 0 and block_b == 8 and not (self.exact or (self.backward and self.heavy))
        most = (384 if self.cell.means else 512) * 32 * min(8, block_h // 16)  # means over units need some themselves
        u_in_registers = u_in_registers and in_registers <= most
        if u_in_registers and in_registers > 512 * 32 * num_warps:
            num_warps = 8
        needed = resident_bytes(products, H, itemsize, block_b, self.precision)
        programs = _ceil(self.B, block_b) * self.groups
        shared = needed - in_registers * u_in_registers
        at_once = max(1, min(65536 // (num_warps * 32 * 255), device.shared // max(1, shared)))
        # Backward in 16 bits the products of all gates are one chain (see `math.is_one_chain`).
        links = self.links(block_h * (products if self.backward and itemsize == 2 else max(1, self.levels)))
        read = 0.0 if u_in_registers else u_bytes / SHARED_RATE
        cost = self.cost(read, block_b, block_h, products * block_h, links, 0, 0.0)
        us = self.sharing(cost, programs, at_once)
        why = (
            f"U ({products}x{H}x{H}, padded to {block_h}) takes {needed // KB} KB of the {device.shared // KB} KB of "
            f"shared memory, so one program keeps it{' in registers' * u_in_registers} and takes all steps for "
            f"{block_b} rows; {cost}"
        )
        chosen = self.made("resident", (block_h, block_b, block_h), num_warps, 1, programs, why, us)
        return replace(chosen, u_in_registers=u_in_registers)

    # grid

    def unfit_grid(self) -> str | None:
        if not self.products:
            return None  # nothing to wait for
        exact = self.itemsize < 8 and self.exact and self.device is not INTERPRETER
        if exact and (self.backward or self.heavy):
            which = "backward" if self.backward else "of so many tiles"
            return f"{which}, products without tensor cores spill registers"  # found with the report
        if self.itemsize == 8 and self.device.capability >= 100:
            return "float64 products spill registers there"  # likewise
        if max(operand.products for operand in self.cell.operands) > 8:
            return "its tiles are tried for at most eight products of an operand"
        if self.device.capability == 0 and self.device is not INTERPRETER:
            return f"{self.device.name} has no cooperative launch here"
        if next(self._grids(), None) is None:
            return (
                f"U ({self.products}x{self.H}x{self.H}) and the batch do not fit the shared memory and registers of "
                f"{self.device.processors} processors on {self.device.name}"
            )
        return None

    def _grids(self) -> Iterator[tuple[Cost, Plan, int]]:
        """What fits: (cost, plan without its reason, bytes of shared memory)."""
        device, interpreted = self.device, self.device is INTERPRETER
        blackwell = device.capability >= 100
        cut = slices(self.cell, self.H, GRID_UNITS, self.backward)
        for block_b in (8, 16, 32, 64):
            programs = _ceil(self.H, GRID_UNITS) * _ceil(self.B, block_b) * self.groups
            if (block_b > 8 and block_b >= 2 * self.B) or (programs > device.processors and not interpreted):
                continue
            if block_b > min(self._most_rows(), most_rows(self.cell, self.H, self.itemsize, self.tiles, device)):
                continue
            num_warps = 4 if block_b <= 16 else 8
            # A thread carries at most 256 bytes of the operand from L2 to shared memory at once; more would spill, and
            # beyond 1024 columns forward a quarter of that (likewise).
            most = 256 * 32 * num_warps // (block_b * self.itemsize)
            if not self.backward and self.H > 1024:
                most //= 4
            # Of many rows, a second long chunk would be on its way with the first, and a masked one takes registers
            # from the moment it is zeroed (likewise; Blackwell spills with one long chunk too).
            if not self.backward and block_b > 16 and (chunks(self.H, 16, most) != (self.H,) or blackwell):
                most = 128 if self.H % 256 or (blackwell and len(cut) > 1) else 256
            if self.backward and (block_b > 32 or (block_b == 16 and self.H > 1024)):
                most //= 2
            # Of float32, 16 rows of a long chunk would spill beside the products of three gates or more (likewise).
            long = block_b == 16 and cut[0][0] > 32 and chunks(self.H, 64, most)[0] > 256
            if not self.backward and self.itemsize == 4 and (long or (blackwell and self.H > 300)):
                most = 128
            least = max(64, *(16 * parts(rows, block_b, num_warps) for rows, _ in cut))
            for block_k in sorted({max(least, most >> n) for n in range(3)}, reverse=True):
                tile = GRID_UNITS, block_b, block_k
                sizes = [(r, chunks(c, 16 * parts(r, block_b, num_warps), block_k)) for r, c in cut]
                columns = sum(r * sum(each) for r, each in sizes) // GRID_UNITS
                u_bytes = columns * GRID_UNITS * self.itemsize
                in_registers = self._u_in_registers(block_b, u_bytes)
                exchange = sum(c for _, c in cut) * min(block_b, self.B) * self.itemsize
                links = self.links(max(sum(each) // parts(r, block_b, num_warps) for r, each in sizes) * self.levels)
                start = device.microseconds(BARRIER * self.barriers)
                read = 0.0 if in_registers else u_bytes / SHARED_RATE
                cost = self.cost(read, block_b, GRID_UNITS, columns, links, exchange, start)
                made = self.made("grid", tile, num_warps, 1, programs, "", cost.total)
                made = replace(made, u_in_registers=in_registers)
                needed = grid_bytes(self.cell, self.H, self.width, made, self.backward, self.precision)
                if needed <= device.shared:
                    yield cost, made, needed
                    break

    def _u_in_registers(self, block_b: int, u_bytes: int) -> bool:
        """Whether a `grid` program of so many rows keeps its slices of U, so many bytes, in registers.

        Half of a thread's, and a quarter backward with 16 rows: so many beside the operand, the sums and the step that
        they do not spill (found with the report). Eight warps would have twice as many, but a step of so few elements
        leaves half of their threads idle and costs six more block barriers (tried: slower where U fits shared memory).
        """
        most = 4 * 32 * (256 if self.backward and block_b == 16 else 512)
        return not (self.exact or self.precision == "tf32x3" or self.heavy) and block_b <= 16 and u_bytes <= most

    def _most_rows(self) -> int:
        """Rows of a `grid` program beyond which some target spills registers (found with the report)."""
        if self.itemsize == 8:
            if self.heavy:
                return 8 if self.H <= 128 else 0
            several = len(self.cell.operands) > 1 and not self.backward
            return 16 if self.H <= 300 else 0 if several else 8
        if self.itemsize > 2:
            if self.heavy:
                return 8 if self.H <= 768 else 0
            return 32 if self.H <= 512 else 16 if self.H <= 768 else 0
        if self.heavy:
            return 32 if self.H <= 512 else 8 if self.H <= 768 else 0
        if self.H <= 512 and not self.exact:
            heavy = self.backward or self.levels > 1
            return 32 if heavy and self.device.capability >= 100 else 64
        return 8 if self.exact else 32 if self.backward or self.H <= 1024 else 8

    def grid(self) -> Plan:
        if not self.products:
            return self._spread()
        cost, chosen, needed = min(self._grids(), key=lambda found: found[0].total)
        why = (
            f"U ({self.products}x{self.H}x{self.H}) is spread over {chosen.programs} programs of {GRID_UNITS} units "
            f"and {chosen.block_b} rows, {needed // KB} KB of {self.device.shared // KB} KB of shared memory each, "
            f"with {self.barriers} barrier{'s' * (self.barriers > 1)} a step; {cost}"
        )
        return replace(chosen, why=why, waits=True)

    def _spread(self) -> Plan:
        """The plan of a cell without a product: tiles of units and rows that do not depend on each other."""
        block_h, block_b, device = 16, 8, self.device

        def programs() -> int:
            return _ceil(self.H, block_h) * _ceil(self.B, block_b) * self.groups

        # Small tiles while there is room for them; then whole lines of memory, then more rows.
        while block_h < min(64, self.H) and programs() > 4 * device.processors:
            block_h *= 2
        while block_b < min(32, self.B) and programs() > 16 * device.processors:
            block_b *= 2
        num_warps = max(1, min(4, block_h * block_b // 128))
        cost = self.cost(0.0, block_b, block_h, 0, 0, 0, 0.0)
        us = self.sharing(cost, programs(), 65536 // (num_warps * 32 * 255))
        why = (
            f"without a product no unit needs another: {programs()} programs of {block_h} units and {block_b} rows "
            f"take all steps by themselves; {cost}"
        )
        return self.made("grid", (block_h, block_b, 16), num_warps, 1, programs(), why, us)

    # stepwise

    def stepwise(self) -> Plan:
        tile, num_warps, num_stages, programs, cost, us = min(self._tiles(), key=lambda found: found[-1])
        end = f"rows{', then one with all units of a row in a program' * bool(self.cell.means)}; {cost}"
        why = f"every step is a launch of {programs} programs over tiles of {tile[0]} units and {tile[1]} {end}"
        return self.made("stepwise", tile, num_warps, num_stages, programs, why, us)

    def _tiles(self) -> Iterator[tuple[tuple[int, int, int], int, int, int, Cost, float]]:
        """Tiles of `stepwise`: (tile, warps, stages, programs, its cost, and that with what does not overlap)."""
        cell, B, H, itemsize, device = self.cell, self.B, self.H, self.itemsize, self.device
        exact = self.exact or (itemsize == 4 and self.precision != "tf32")
        first = cell.first_products
        gates = 1 if self.backward else _power_of_2(max(first, cell.products - first), 1, 1 << 10)
        columns = (cell.products if self.backward else 1) * H
        launches = self.levels * bool(cell.means) + max(1, self.levels) + (cell.published and not self.backward)
        # Long turns wait less often; in other types and before Hopper they spill (found with the report).
        most = 128 if itemsize == 2 and device.capability >= 90 and not (cell.means and H % 128) else 128 // itemsize
        block_k = _power_of_2(H, 16, most)
        for block_h in (16, 32, 64):
            for block_b in (8, 16, 32, 64, 128):
                if (block_h > 16 and block_h >= 2 * H) or (block_b > 8 and block_b >= 2 * B):
                    continue
                # What fits a thread's registers of the pointwise step and of the product (found with the report).
                rows = gates * block_h
                tile = block_h * block_b
                if tile > self._most_elements(exact) or rows * block_b > 16384:
                    continue
                num_warps = 8 if rows * block_b > 4096 or tile > 2048 else 4
                programs = _ceil(H, block_h) * _ceil(B, block_b) * self.groups
                waves = _ceil(programs, device.processors)
                num_stages = 3 if 3 * (rows + block_b) * block_k * itemsize <= device.shared - 2 * KB else 2
                read = (rows + block_b) * columns * itemsize * waves / device.l2
                sums = columns * (1 if self.backward else cell.products)
                cost = self.cost(read, block_b, block_h * waves, sums, self.links(columns), 0, LAUNCH * launches)
                # U streams from L2 if it stays there, else from memory.
                u_bytes = cell.products * H * H * itemsize * self.groups
                memory = u_bytes / device.memory / 1000 if u_bytes > 0.7 * device.cache else 0.0
                us = cost.total + max(0.0, memory - max(cost.u, cost.tensor))
                yield (block_h, block_b, block_k), num_warps, num_stages, programs, cost, us

    def _most_elements(self, exact: bool) -> int:
        """Elements of a stepwise tile. Blackwell's products come back from tensor memory all at once, and masks take
        registers while they are drawn (found with the report)."""
        fewer = not self.backward or self.cell.params or self.itemsize > 2 or self.device.capability >= 100
        most = 512 if exact or self.step_tiles > 4 else 4096 if fewer else 8192
        return min(most, 2048 // self.itemsize) if self.cell.drawn else most


@cache
def plan(
    cell: Form,
    *,
    B: int,
    H: int,
    itemsize: int,
    device: Device,
    groups: int = 1,
    schedule: str | None = None,
    precision: str = "tf32",
    backward: bool = False,
    avoid: tuple[str, ...] = (),
) -> Plan:
    """The plan of a scan: batch B, hidden size H, bytes an element of the data's type, the device's facts.

    precision: what float32 products are done in. schedule: None takes the one that costs least, of those not in
    avoid; a name forces it.
    ValueError for an unknown name, where a schedule does not fit or none is left, and for a U of 2^31 elements or more.
    """
    if schedule not in (None, *SCHEDULES):
        raise ValueError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if max(cell.gates, cell.products) * H * H >= 1 << 31:
        raise ValueError(f"hidden size {H} is too large: the recurrent weights must have less than 2^31 elements")
    problem = _Problem(cell, B, H, groups, itemsize, device, precision, backward)
    unfit = {"resident": problem.unfit_resident(), "grid": problem.unfit_grid(), "stepwise": None}
    unfit |= refusals(cell, H, itemsize, problem.tiles, backward, device) if cell.means else {}
    if schedule is not None and unfit[schedule]:
        raise ValueError(f"the {schedule} schedule does not fit hidden size {H}, batch {B}: {unfit[schedule]}")
    names = [schedule] if schedule else [name for name in SCHEDULES if not unfit[name] and name not in avoid]
    if not names:
        no = "".join(f"; no {name}: {why}" for name, why in unfit.items() if why)
        raise ValueError(f"no schedule is left for hidden size {H}, batch {B}{no}")
    found = {name: getattr(problem, name)() for name in names}
    # Interpreted, a barrier is a launch, so grid has no advantage.
    if schedule is None and device is INTERPRETER and len(found) > 1:
        found.pop("grid", None)
    best = min(found.values(), key=lambda p: p.microseconds)
    others = [f"{p.schedule} would take {p.microseconds:.2f} us" for p in found.values() if p is not best]
    others += [f"no {name}: {why}" for name, why in unfit.items() if why and schedule is None]
    return replace(best, why="; ".join([best.why, *others])) if others else best

"""Cycles of a kernel's step, predicted from its machine code alone: an interval, and its middle.

One multiprocessor is modelled. All warps of one program issue the loop's instructions in order on four schedulers,
again and again, until an iteration takes as long as the one before. The assembler says in every instruction how many
cycles to stall, which scoreboard it sets and which it waits for; what is not fixed there is in LATENCY and the tables
below it. Where there is no loop, the whole launch is issued once.

Each latency is (low, middle, high); the three bounds together give the three results. They are of an H200
(benchmarks/results/gpu-h200.md, measured by benchmarks/latencies.py) where that is said. What is called a guess was
chosen so that the middle agrees with the 78 kernels timed there at commit 7ec6abe: agreement with those is no test of
the guesses. benchmarks/NOTES.md says how well they agree, where they do not, and how well kernels agree that were not
used.

What the model has beside latencies: stores take the load/store unit 32 bytes a cycle at best, and what comes after
them, also an access of shared memory, waits; a program reads what others have just written more slowly than other
data; a barrier over all programs is a fence, an atomic and a poll, and the slowest program decides.

What it leaves out: the first-level cache for global data (unless `cached`), bank conflicts of shared memory and
registers, instruction fetch, whether an access is coalesced (each row of a tile is taken to be a piece of its own),
warps of a program that branch differently, other programs on the same processor, clocks that drop.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

# Cycles from issue until the result may be used.
LATENCY: dict[str, tuple[float, float, float]] = {
    "shared": (22, 23, 28),  # H200: 23.0, a load whose result is the next one's address
    "ldmatrix": (28, 31, 36),  # H200: 35.2 with the addition that makes the next address
    "shuffle": (22, 24, 30),  # Luo et al., arXiv:2402.13499, and earlier papers of that kind: 22 to 25
    "function": (16, 17, 20),  # H200: 17.0 (MUFU: ex2 and tanh)
    "conversion": (14, 17, 24),  # guess: the same unit as functions
    "matrix": (24, 24, 24),  # ptxas's own stall counts; H200: 25.9 with the chain's loop
    "warp group": (24, 32, 48),  # guess: as for the other matrix instructions
    "barrier": (11, 13, 16),  # H200: 21.3 with 4 warps, 29.3 with 8, which is 13 and 2 a warp
    "constant": (26, 32, 60),  # guess
    "register": (20, 30, 50),  # guess: special registers
    "uniform": (8, 12, 16),  # guess: votes, and moves between the two kinds of registers
    "global": (273, 350, 650),  # H200: 273 from L2, one address; the farther half of L2, and memory, are guesses
    "first level": (34, 34, 34),  # H200: 34.0, a load that the first-level cache answers
    "exchange": (315, 500, 700),  # guess: from L2, what another processor has just written; H200: 315 to acquire a word
    "acquire": (315, 315, 340),  # H200: 314.9, the load and the invalidation of the first-level cache
    "atomic": (500, 537, 600),  # H200: 537.2
    "fence": (500, 573, 620),  # H200: 572.5 with 1 warp, 595.4 with 4, both with a store before it
    # From the atomic of a barrier until a poll can see that all have arrived. H200: 672 from one processor to another
    # (1245, data and a flag, less the fence), up to 424 more with 132 programs; that programs differ is a guess.
    "flag": (900, 1500, 1900),
    # From a store until another program can load the word. H200: 519; that programs differ is a guess, as above.
    "word": (519, 1000, 1400),
    "invalidation": (20, 40, 60),  # H200: 42, the difference of an acquiring and a plain load
    "operands": (9, 12, 20),  # guess: until a memory instruction has read its registers
    "other": (15, 25, 40),  # guess
}
# Cycles a 32-byte sector of a global access, up to 16 cycles for all of it. H200: 1, of stores of whole lines; 2 and 3
# are guesses for the tiles' rows, each of which is a part of a line.
SECTOR = (1, 2, 3)
# Bytes a cycle from L2 (data sheets: 64 for one processor, 39 where all read), and of what other programs wrote and
# all read at the same time (guess).
FIRST_LEVEL_BYTES = 128  # NVIDIA's tuning guides
L2_BYTES, EXCHANGE_BYTES = (64, 45, 32), (32, 18, 12)
# Cycles between two matrix instructions of a scheduler. ptxas: 6; mma.sync reaches 0.62 of the rate of a warp group's
# products by Luo et al., which is 6.4; 7 and 8 are guesses.
MATRIX = (6, 7, 8)
FUNCTION = 8  # ptxas: between two functions; 16 results a cycle and processor by NVIDIA's programming guide
QUEUE = 5  # instructions that wait for a unit before the scheduler does: Huerta et al., arXiv:2503.20481, on an A6000
SCHEDULERS = 4
# The control bits are the same from sm_80 to sm_100; the latencies are of sm_90. sm_100 is left out: none of its
# latencies was measured, and its tensor cores have instructions of their own.
CAPABILITIES = (80, 89, 90)
SETTINGS = (0, 1, 2)  # low, middle, high
ITERATIONS = 8
LONGEST = 100_000  # instructions of one path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_UNITS = {
    "half rate": "IADD3 LOP3 SHF PRMT SEL ISETP FSETP FSEL FMNMX MOV LEA VIADD F2FP PLOP3 IMNMX VIMNMX SGXT BMSK IABS "
    "HSETP2 HMNMX2",
    "multiply": "IMAD HFMA2 HMUL2 HADD2",
    "matrix": "HMMA IMMA DMMA",
    "warp group": "HGMMA",
    "function": "MUFU F2I I2F F2F FRND I2I POPC FLO BREV",
    "shared": "LDS LDSM STS STSM ATOMS SHFL LDL STL",
    "load": "LDG LD LDGSTS",
    "store": "STG ST",
    "atomic": "RED REDG ATOM ATOMG",
    "fence": "MEMBAR",
    "invalidation": "CCTL",
    "constant": "LDC LDCU",
    "register": "S2R S2UR",
    "uniform": "R2UR VOTE VOTEU",
    "copies": "LDGDEPBAR",
}
_UNIT = {op: unit for unit, ops in _UNITS.items() for op in ops.split()}


@dataclass(frozen=True)
class Cycles:
    """low <= middle <= high. loop: they are of one iteration of the loop; otherwise of the whole launch."""

    low: float
    middle: float
    high: float
    loop: bool

    def __str__(self) -> str:
        return f"{self.low:.0f}-{self.high:.0f}"


@dataclass(frozen=True)
class Instruction:
    """One instruction with the assembler's control bits: scoreboards are 0 to 5, 7 for none; wait is a mask of them."""

    address: int
    text: str
    stall: int
    sets: int  # the scoreboard that is released with the result
    reads: int  # the one that is released once the operands are read
    wait: int
    conditional: bool
    name: str  # with its modifiers
    op: str
    unit: str
    bytes: int  # of a thread, where it is an access of memory
    poll: bool = False

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)\s*$", self.text) if self.op in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


def decode(sass: str) -> list[Instruction]:
    """The instructions of the first function in cuobjdump's output."""
    code: list[Instruction] = []
    for address, text, high in _LINE.findall(sass):
        at, bits = int(address, 16), int(high, 16) >> 41
        if code and at <= code[-1].address:
            break
        words = text.split()
        conditional = words[0].startswith("@")
        name = words[1] if conditional else words[0]
        op = name.split(".")[0]
        wide = re.search(r"\.(128|64|U16|S16|U8|S8)\b", name)
        size = 4 if wide is None else _BYTES[wide[1]]
        board = bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
        code.append(Instruction(at, text, bits & 15, *board, conditional, name, op, _UNIT.get(op, ""), size))
    return code


def loops(code: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """Of each loop the addresses of its first instruction and of the branch back to it."""
    branches = [(a, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", i)) for a, i in code]
    return [(begin, a) for a, branch in branches if branch and (begin := int(branch.group(1), 16)) < a]


def bounds(code: Sequence[tuple[int, str]]) -> tuple[int, int] | None:
    """The widest loop."""
    return max(loops(code), key=lambda loop: loop[1] - loop[0], default=None)


def path(code: list[Instruction], begin: int, end: int, trips: int = 1) -> list[Instruction]:
    """What a warp issues from begin to end or the first unconditional EXIT: loops within `trips` times, and no
    conditional branch forward taken, but over a loop that loads what others store until it is there. A loop within that
    reads with an acquire is a poll, and done once."""
    at = {i.address: n for n, i in enumerate(code)}
    inner = [(i.target, i.address) for i in code if i.target is not None and begin <= i.target < i.address < end]
    strong = [i.address for i in code if i.unit == "load" and "STRONG" in i.name]
    again = [(first, last) for first, last in inner if any(first <= address <= last for address in strong)]
    found: list[Instruction] = []
    returns: list[int] = []
    left = {last: trips - 1 for _, last in inner}
    n = at[begin]
    while n < len(code) and len(found) < LONGEST:
        i = code[n]
        polls = i.op in ("ATOM", "ATOMG") or i.address in strong
        poll = polls and any(first <= i.address <= last for first, last in inner)
        found.append(replace(i, poll=True) if poll else i)
        if poll:
            left |= {last: 0 for first, last in inner if first <= i.address <= last}
        if i.address == end or (i.op == "EXIT" and not i.conditional):
            break
        n += 1
        always = not i.conditional and not re.search(r"\bU?P\d|DIV|CONV", i.text)
        if i.op == "CALL" and i.target in at:
            returns.append(n)
            n = at[i.target]
        elif i.op == "RET" and returns:
            n = returns.pop()
        elif i.op == "BRA" and i.target in at and i.target > i.address and (always or _over(i, again)):
            n = at[i.target]
        elif left.get(i.address, 0) > 0 and i.target is not None:
            left[i.address] -= 1
            n = at[i.target]
    return found


def _over(branch: Instruction, loops: list[tuple[int, int]]) -> bool:
    """Whether one of the loops lies between the branch and its target."""
    return any(branch.address < first and last < (branch.target or 0) for first, last in loops)


@dataclass
class _Warp:
    n: int
    at: int = 0
    ready: float = 0.0
    boards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    group: float = 0.0  # when its warp group's products are done
    copies: float = 0.0  # and its asynchronous copies
    stored: float = 0.0  # and its accesses of shared memory
    starts: list[float] = field(default_factory=list)


class Processor:
    """Issues `body` for all warps with the latencies of one setting."""

    def __init__(
        self, body: list[Instruction], warps: int, setting: int, cached: bool = False, behind: bool = False
    ) -> None:
        self.body, self.setting = body, setting
        self.latency = {name: values[setting] for name, values in LATENCY.items()}
        self.rate = L2_BYTES[setting]
        if behind:
            self.latency["word"] = 0.0
        if cached:
            self.latency["global"], self.rate = self.latency["first level"], FIRST_LEVEL_BYTES
        self.warps = [_Warp(n) for n in range(warps)]
        self.free: dict[tuple[str, int], float] = defaultdict(float)  # when a scheduler's unit takes the next one
        self.shared = self.memory = self.l2 = 0.0  # when the processor's do
        self.visible = self.flag = 0.0  # when the last store is seen by all, and the last arrival at a barrier
        self.word = 0.0  # when others' last words are there
        self.arrived: list[tuple[_Warp, float]] = []

    def run(self, iterations: int) -> list[float]:
        """When the slowest warp begins each iteration. Stops early once two take as long."""
        # Of several that are ready, the one that is an iteration behind, then the oldest.
        heap = [(0.0, 0, w.n) for w in self.warps]
        while heap:
            t, _, n = heapq.heappop(heap)
            now = self._earliest(self.warps[n])
            if now > t:
                heapq.heappush(heap, (now, len(self.warps[n].starts), n))
                continue
            for w in self._issue(self.warps[n], t):
                heapq.heappush(heap, (w.ready, len(w.starts), w.n))
            if self.warps[n].at == 0 and self._settled(iterations):
                break
        return [max(times) for times in zip(*(w.starts for w in self.warps), strict=False)]

    def _settled(self, iterations: int) -> bool:
        done = min(len(w.starts) for w in self.warps)
        if done > iterations or done < 5:
            return done > iterations
        a, b, c = (max(w.starts[done - k] for w in self.warps) for k in (1, 2, 3))
        return abs((a - b) - (b - c)) < 0.5

    def _earliest(self, w: _Warp) -> float:
        """When its next instruction can issue."""
        i, q = self.body[w.at], w.n % SCHEDULERS
        t = max(w.ready, self.free["issue", q])
        for board in range(6):
            if i.wait >> board & 1 and w.boards[board]:
                t = max(t, *w.boards[board])
        if i.op == "DEPBAR" and (found := re.search(r"SB(\d),\s*0x([0-9a-f]+)", i.text)):
            pending = sorted(w.boards[int(found[1])], reverse=True)[int(found[2], 16) :]
            t = max(t, *pending[:1]) if pending else t
        if i.name.startswith("WARPGROUP.DEPBAR"):
            t = max(t, w.group)
        if i.unit in ("half rate", "multiply", "matrix"):
            return max(t, self.free[i.unit, q])
        if i.unit == "function":
            return max(t, self.free[i.unit, q] - QUEUE * FUNCTION)
        if i.unit in ("shared", "load", "store", "atomic"):
            return max(t, self.free["queue", q] - QUEUE * 4)
        return t

    def _issue(self, w: _Warp, t: float) -> list[_Warp]:
        """Take the instruction, and say which warps may go on: none where it waits at a barrier for others."""
        i, q = self.body[w.at], w.n % SCHEDULERS
        if w.at == 0:
            w.starts.append(t)
        self.free["issue", q] = t + 1
        w.ready = t + max(1, i.stall)
        w.at = (w.at + 1) % len(self.body)
        done, read = self._effect(w, i, t, q)
        for board, when in ((i.sets, done), (i.reads, read)):
            if board < 6:
                w.boards[board] = [*(d for d in w.boards[board] if d > t), when]
        if i.op != "BAR" or not ("SYNC" in i.name or "RED" in i.name):
            return [w]
        self.arrived.append((w, max(t + 1, w.stored)))
        if len(self.arrived) < len(self.warps):
            return []
        released = max(when for _, when in self.arrived) + self.latency["barrier"] + 2 * len(self.warps)
        going = [v for v, _ in self.arrived]
        for v in going:
            v.ready = max(v.ready, released)
        self.arrived = []
        return going

    def _effect(self, w: _Warp, i: Instruction, t: float, q: int) -> tuple[float, float]:
        """When its result is there, and when its operands are read."""
        read = t + self.latency["operands"]
        if i.unit in ("half rate", "multiply"):
            self.free[i.unit, q] = t + 2
        elif i.unit == "matrix":
            self.free[i.unit, q] = t + MATRIX[self.setting]
            return t + self.latency["matrix"], read
        elif i.unit == "warp group":
            columns = re.search(r"64x(\d+)x", i.name)
            begin = max(t, self.free[i.unit, q])
            self.free[i.unit, q] = begin + (max(4, int(columns[1]) / 2) if columns else 8)
            w.group = self.free[i.unit, q] + self.latency[i.unit]
            return w.group, read
        elif i.unit == "function":
            begin = max(t, self.free[i.unit, q])
            self.free[i.unit, q] = begin + FUNCTION
            return begin + self.latency["function" if i.op == "MUFU" else "conversion"], begin + 6
        elif i.unit == "shared":
            return self._shared(w, i, t, q)
        elif i.unit in ("load", "store", "atomic"):
            return self._global(w, i, t, q)
        elif i.unit == "copies":
            return max(t, w.copies), read
        elif i.unit == "fence" and "CTA" not in i.name:
            w.ready = max(t + self.latency["fence"] / 2, self.visible)  # without a store: guess
        elif i.unit == "invalidation":
            w.ready = t + self.latency[i.unit]
        elif i.unit in self.latency:
            return t + self.latency[i.unit], read
        return t + self.latency["other"], read

    def _shared(self, w: _Warp, i: Instruction, t: float, q: int) -> tuple[float, float]:
        """A wave of 128 bytes a cycle, after the global accesses that came first."""
        begin = max(t, self.free["queue", q])
        self.free["queue", q] = begin + 4
        parts = re.search(r"88\.(\d)", i.name)
        waves = int(parts[1]) if parts else max(1, i.bytes // 4)
        begin = max(begin, self.shared, self.memory)
        self.shared = w.stored = begin + waves
        name = {"LDSM": "ldmatrix", "SHFL": "shuffle"}.get(i.op, "shared")
        more = 0 if i.op == "LDSM" else waves - 1
        return begin + more + self.latency[name], begin + waves + self.latency["operands"]

    def _global(self, w: _Warp, i: Instruction, t: float, q: int) -> tuple[float, float]:
        begin = max(t, self.free["queue", q], self.memory)
        self.free["queue", q] = begin + 4
        read = begin + self.latency["operands"]
        if i.unit == "atomic" and not i.poll:
            self.memory, self.flag = begin + 1, begin + self.latency["flag"]
            return begin + self.latency["atomic"], read
        sectors = max(4, i.bytes)  # 32 threads of one byte are a sector, and a tile has at least four rows
        self.memory = begin + max(i.bytes, min(SECTOR[self.setting] * sectors, 16))
        if i.unit == "store":
            self.visible = self.memory + self.latency["fence"]
            if "STRONG" in i.name:
                self.word = begin + self.latency["word"]
            return self.memory, self.memory + self.latency["operands"]
        if i.poll:
            return max(begin + self.latency["acquire" if i.unit == "load" else "atomic"], self.flag), read
        strong = "STRONG" in i.name
        rate = EXCHANGE_BYTES[self.setting] if strong else self.rate
        self.l2 = max(begin, self.l2) + 32 * sectors / rate
        done = self.l2 + self.latency["exchange" if strong else "global"]
        done = max(done, self.word) if strong else done
        if i.op == "LDGSTS":
            w.copies = max(w.copies, done)
        return done, read


def cycles(sass: str, warps: int, trips: int = 1, cached: bool = False, behind: bool = False) -> Cycles | None:
    """The interval of a compiled kernel: sass as `cuobjdump -sass` prints it. None where there is no code in it.
    trips: how often loops within the loop run; those that poll run once. cached: some loads are of what the first-level
    cache holds from earlier iterations, such as weights; the low bound takes all of them for such. behind: words that
    others store were stored some iterations before, as in a stack."""
    code = decode(sass)
    if not code:
        return None
    loop = bounds([(i.address, i.text) for i in code])
    body = path(code, *(loop or (code[0].address, code[-1].address)), trips)
    found = []
    for setting in SETTINGS:
        starts = Processor(body, warps, setting, cached and setting == 0, behind).run(ITERATIONS if loop else 1)
        found.append((starts[-1] - starts[-3]) / 2 if loop else starts[1] - starts[0])
    return Cycles(min(found), sorted(found)[1], max(found), loop is not None)

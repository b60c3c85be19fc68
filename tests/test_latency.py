"""The latency model: listings whose cycles are known by hand, and one compiled kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqcells.kernels import latency

NONE = 7  # no scoreboard
BACK = 5  # cycles that a branch stalls


def listing(*instructions):
    """cuobjdump's text of (instruction, stall[, sets[, reads[, wait]]]), one every 16 bytes."""
    lines = ["\t\tFunction : kernel"]
    for n, (text, stall, *rest) in enumerate(instructions):
        sets, reads, wait = [*rest, *(NONE, NONE, 0)[len(rest) :]]
        control = stall | 1 << 4 | sets << 5 | reads << 8 | wait << 11
        lines.append(f"        /*{16 * n:04x}*/                   {text} ;     /* 0x{0:016x} */")
        lines.append(f"                                                       /* 0x{control << 41:016x} */")
    return "\n".join(lines)


def loop(*body):
    return listing(*body, ("@P0 BRA 0x0", BACK))


def cycles(*body, warps=1, **more):
    return latency.cycles(loop(*body), warps, **more)


def three(found):
    return found.low, found.middle, found.high


def test_the_control_bits_are_read():
    text = listing(("@!P2 LDG.E.128.STRONG.GPU R4, desc[UR6][R2.64]", 4, 2, 1, 0b101001))
    (i,) = latency.decode(text)
    assert (i.stall, i.sets, i.reads, i.wait, i.conditional) == (4, 2, 1, 0b101001, True)
    assert (i.op, i.unit, i.bytes) == ("LDG", "load", 16)
    assert latency.cycles("nothing", 4) is None


@pytest.mark.parametrize("links", [1, 4, 16])
def test_a_chain_of_dependent_products_takes_its_stalls(links):
    chain = [("HMMA.16816.F32.BF16 R4, R8, R12, R4", 15), ("NOP", 9)] * links  # a stall has four bits
    assert three(cycles(*chain)) == (24 * links + BACK,) * 3


def test_independent_products_take_the_matrix_units_turn():
    found = cycles(*[("HMMA.16816.F32.BF16 R4, R8, R12, R4", 1)] * 64)
    assert three(found) == pytest.approx([64 * turn for turn in latency.MATRIX], rel=0.1)
    # Two warps of one scheduler share its unit, four on four schedulers do not.
    body = [("HMMA.16816.F32.BF16 R4, R8, R12, R4", 6)] * 64
    assert cycles(*body, warps=4).low == cycles(*body).low
    assert cycles(*body, warps=8).low == pytest.approx(2 * cycles(*body).low, rel=0.05)


def test_a_load_costs_its_latency_only_where_it_is_waited_for_early():
    load, use = ("LDG.E R4, desc[UR6][R2.64]", 1, 0), ("FADD R5, R4, R5", 4, NONE, NONE, 1)
    work = [("FFMA R6, R6, R6, R6", 4)] * 200
    at_once, late = cycles(load, use, *work), cycles(load, *work, use)
    expected = 1 + 4 * 200 + 4 + BACK
    assert three(late) == (expected,) * 3
    assert cycles(load, use, *work, cached=True).low == expected + 34
    for found, latencies in zip(three(at_once), latency.LATENCY["global"], strict=True):
        assert expected + latencies - 1 <= found < expected + latencies + 20


def test_four_warps_contend_for_the_issue_of_their_scheduler():
    body = [("FFMA R6, R6, R6, R6", 1)] * 40
    assert three(cycles(*body)) == three(cycles(*body, warps=4)) == (40 + BACK,) * 3
    assert three(cycles(*body, warps=16)) == pytest.approx([4 * 41] * 3, abs=8)
    # Instructions that stall leave the turn to others.
    assert three(cycles(*[("FFMA R6, R6, R6, R6", 4)] * 40, warps=16)) == pytest.approx([4 * 41] * 3, abs=8)


def test_a_barrier_waits_for_the_slowest_warp():
    for warps in (4, 8):
        (found,) = {cycles(("BAR.SYNC.DEFER_BLOCKING 0x0", 6), warps=warps).middle}
        assert found == 1 + latency.LATENCY["barrier"][1] + 2 * warps + BACK + (warps > 4)
    # A load before it, that only the code behind it waits for, does not hold it up.
    load = ("LDG.E R4, desc[UR6][R2.64]", 1, 0)
    assert cycles(load, ("BAR.SYNC.DEFER_BLOCKING 0x0", 6), warps=4).high < latency.LATENCY["global"][0]


def test_a_processor_stores_32_bytes_a_cycle_and_loads_wait():
    store = ("STG.E.128 desc[UR6][R2.64], R4", 1)
    assert three(cycles(*[store] * 32)) == pytest.approx([32 * 16] * 3, rel=0.05)  # 512 bytes each
    assert cycles(*[store] * 8, warps=4).low == pytest.approx(4 * 8 * 16, rel=0.05)
    load, use = ("LDG.E R4, desc[UR6][R2.64]", 1, 0), ("FADD R5, R4, R5", 4, NONE, NONE, 1)
    alone, behind = cycles(load, use), cycles(*[store] * 4, load, use)
    assert behind.low == pytest.approx(alone.low + 4 * 16, abs=8)


def test_a_grid_barrier_is_a_fence_an_atomic_and_a_poll():
    body = [
        ("STG.E desc[UR6][R2.64], R4", 1),
        ("MEMBAR.ALL.GPU", 6),
        ("REDG.E.ADD.STRONG.GPU desc[UR6][R8.64], R3", 2),
        ("LDG.E.STRONG.GPU R23, desc[UR6][R8.64]", 4, 2),
        ("CCTL.IVALL", 1, NONE, NONE, 0b100),
        ("ISETP.GE.AND P2, PT, R23, UR20, PT", 13),
        ("@!P2 BRA 0x30", 5),
    ]
    for setting, found in enumerate(three(cycles(*body))):
        parts = sum(latency.LATENCY[name][setting] for name in ("fence", "flag", "invalidation"))
        assert parts < found < parts + 60
    # It polls once, however often other loops within run.
    assert three(cycles(*body, trips=9)) == three(cycles(*body))


def test_words_that_others_store_come_late_and_are_there_at_once():
    """A strong load waits for the last strong store's way to others, and what would load it again is passed over."""
    body = [
        ("STG.E.U16.STRONG.GPU desc[UR6][R2.64], R4", 1),
        ("LDG.E.128.STRONG.SYS R8, desc[UR6][R2.64]", 1, 2),
        ("LOP3.LUT P1, RZ, R8, R9, RZ, 0xc0, !PT", 13, NONE, NONE, 0b100),
        ("@!P1 BRA 0x60", 5),
        ("LDG.E.128.STRONG.GPU R8, desc[UR6][R2.64]", 4, 2),
        ("@P1 BRA 0x40", 5, NONE, NONE, 0b100),
        ("FADD R5, R8, R5", 4),
    ]
    for setting, found in enumerate(three(cycles(*body))):
        word = latency.LATENCY["word"][setting]
        assert word < found < word + 40
    weak = [("STG.E.U16 desc[UR6][R2.64], R4", 1), *body[1:]]
    assert cycles(*weak).middle < latency.LATENCY["exchange"][1] + 100


def test_the_path_through_branches():
    work = ("FFMA R6, R6, R6, R6", 4)
    assert cycles(("@P1 BRA 0x20", 5), work, work).low == 5 + 8 + BACK  # not taken
    assert cycles(("BRA 0x20", 5), ("FFMA R6, R6, R6, R6", 15), work).low == 5 + 4 + BACK  # taken
    assert cycles(work, work, ("@P1 BRA 0x10", 5), trips=3).low == 4 + 3 * 9 + BACK  # a loop within


def test_without_a_loop_it_is_the_whole_launch():
    found = latency.cycles(listing(("LDG.E R4, desc[UR6][R2.64]", 1, 0), ("EXIT", 5, NONE, NONE, 1)), 1)
    assert not found.loop and latency.LATENCY["global"][0] < found.low < latency.LATENCY["global"][0] + 20
    assert cycles(("FFMA R6, R6, R6, R6", 4)).loop


COMPILED = """
from triton.backends.compiler import GPUTarget
from seqcells.kernels import latency, report
case = report.Case("lstm", "infer", "bf16", 8, 32, "sm_90")
(launch,) = report.launches(case)
sass = report.disassemble(report.compile_launch(launch, GPUTarget("cuda", 90, 32)).asm["cubin"])
found = latency.cycles(sass, 2)
assert found == latency.cycles(sass, 2) and found.loop
print(found.low, found.middle, found.high)
"""


def test_a_compiled_kernel():
    """LSTM, 32 units, inference: 487 cycles on an H200 (benchmarks/NOTES.md)."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    how = {"env": env, "cwd": Path(__file__).parents[1], "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", COMPILED], **how)
    assert done.returncode == 0, done.stderr
    low, middle, high = map(float, done.stdout.split())
    assert 300 < low < middle < high < 1200
    assert low < 487 < high

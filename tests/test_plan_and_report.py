"""The plan as a pure function, and the compiled kernels' static cost on three targets, which needs no GPU."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS

from seqcells.kernels import cells, grid, recompute, report, resident, resident_backward, single, stepwise
from seqcells.kernels.devices import INTERPRETER, KNOWN, present
from seqcells.kernels.plan import PRECISIONS, chunks, grid_bytes, parts, plan, resident_bytes
from seqcells.kernels.plan_single import shared_bytes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import static  # noqa: E402

SHAPES = [*(cells.get(name) for name in cells.names()), *(kind.cell for kind in KINDS.values())]
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@settings(max_examples=2000)
@given(
    cell=st.sampled_from(SHAPES),
    B=st.integers(1, 5000),
    H=st.one_of(st.integers(1, 300), st.integers(1, 5000)),
    groups=st.integers(1, 12),
    itemsize=st.sampled_from([2, 4, 8]),
    precision=st.sampled_from(PRECISIONS),
    device=st.sampled_from([*KNOWN.values(), INTERPRETER]),
    backward=st.booleans(),
)
def test_a_plan_fits_is_co_resident_and_covers(cell, B, H, groups, itemsize, precision, device, backward):
    """T is no argument: a plan holds for every length."""
    H = min(H, 512) if cell.means else H  # beyond, there may be none: see test_means
    size = {"B": B, "H": H, "itemsize": itemsize, "groups": groups, "precision": precision, "backward": backward}
    chosen = plan(cell, device=device, **size)
    for length in (chosen.block_h, chosen.block_b, chosen.block_k):
        assert length & (length - 1) == 0
    assert chosen.block_b >= 8 and chosen.block_h >= 16 and chosen.block_k >= 16
    assert chosen.num_warps in (1, 2, 4, 8) and chosen.num_warps * 32 * chosen.registers <= 65536
    assert chosen.microseconds > 0 and "us a step" in chosen.why
    if chosen.schedule == "resident":
        assert resident_bytes(cell.products, H, itemsize, chosen.block_b, precision) <= device.shared
    if chosen.schedule == "grid":
        assert grid_bytes(cell, H, itemsize, chosen, backward, precision) <= device.shared
        assert chosen.waits == (cell.products > 0)
        if chosen.waits:
            assert chosen.programs <= device.processors, "all programs of a barrier run at once, one on a processor"
    # Every unit of every row is in exactly one program: tiles begin where the last ended, and the last holds the end.
    units = 1 if chosen.schedule == "resident" else -(-H // chosen.block_h)
    rows = -(-B // chosen.block_b)
    assert (units - 1) * chosen.block_h < H <= units * chosen.block_h
    assert (rows - 1) * chosen.block_b < B <= rows * chosen.block_b
    assert chosen.programs == units * rows * groups


@given(
    columns=st.integers(1, 20_000),
    rows=st.sampled_from([16, 32, 64, 128]),
    most=st.sampled_from([512, 1024, 2048, 8192]),
    block_b=st.sampled_from([8, 16, 32, 64]),
    warps=st.sampled_from([4, 8]),
)
def test_chunks_cover_a_slices_columns_once(columns, rows, most, block_b, warps):
    least = 16 * parts(rows, block_b, warps)
    sizes = chunks(columns, least, most)
    assert all(size & (size - 1) == 0 and least <= size <= most for size in sizes)
    assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] and sum(sizes[:-1]) < columns <= sum(sizes)


def planned(cell="lstm", B=8, H=64, itemsize=2, device="sm_90", **options):
    return plan(cells.get(cell), B=B, H=H, itemsize=itemsize, device=KNOWN[device], **options)


def test_a_schedule_that_does_not_exist_or_fit_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'turbo': expected one of resident, grid, stepwise"):
        planned(schedule="turbo")
    with pytest.raises(ValueError, match="resident schedule does not fit hidden size 1024, batch 8: U would take"):
        planned(H=1024, schedule="resident")
    with pytest.raises(
        ValueError, match=r"grid schedule does not fit hidden size 4096, batch 8: .* shared memory and registers of 132"
    ):
        planned(H=4096, schedule="grid")
    with pytest.raises(ValueError, match="no cooperative launch"):
        planned(H=512, schedule="grid", device="MI300X")
    with pytest.raises(ValueError, match="hidden size 30000 is too large"):
        planned(H=30_000)


def test_a_device_that_is_there_has_its_own_sizes_and_a_known_ones_rates():
    for name, capability, like in [
        ("NVIDIA H200", 90, "H200"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100"),
        ("NVIDIA GeForce RTX 4090", 89, "RTX4090"),
        ("NVIDIA L40S", 89, "sm_89"),
        ("NVIDIA Something", 70, "H100"),
    ]:
        found = present(name, capability, 7, 4096)
        assert (found.name, found.capability, found.processors, found.shared) == (name, capability, 7, 4096)
        assert (found.clock, found.tensor, found.memory) == (KNOWN[like].clock, KNOWN[like].tensor, KNOWN[like].memory)


def test_what_the_plan_chooses():
    """The shapes the schedules were made for; and the numbers it explains itself with."""
    for backward in (False, True):
        large = planned(B=16, H=1024, backward=backward)
        assert large.schedule == "grid" and large.programs <= 132 and 1 < large.microseconds < 5
        assert planned("gru", B=64, H=512, backward=backward).schedule == "grid"
        assert planned(B=16, H=4096, backward=backward).schedule == "stepwise", "U is larger than all shared memory"
        assert planned(B=16, H=64, backward=backward).schedule == "resident"
        assert planned(B=1024, H=1024, backward=backward).schedule == "stepwise"
        assert planned(B=16, H=512, device="MI300X", backward=backward).schedule == "stepwise"
        for precision in ("ieee", "tf32x3"):
            assert planned(H=65, itemsize=4, precision=precision, backward=backward).schedule != "resident"
        # Programs of eight rows keep U in registers, so that two share a processor for little more than one costs.
        assert planned(B=2112, H=64, backward=backward).block_b == 8
    assert planned(B=2112, H=128, backward=True).block_b == 16, "eight warps have no room for a second program"
    assert (
        "barrier or launch" in large.why and "stepwise would take" in large.why and "no resident: U would" in large.why
    )


def test_batches_share_a_few_tile_sizes_and_lengths_share_all():
    """What a kernel is compiled for is the plan's sizes; T is in none of them, and B only through a few tiles."""
    for cell, H in (("lstm", 64), ("gru", 128), ("lstm", 1024)):
        plans = {planned(cell, B=B, H=H) for B in range(1, 5000)}
        assert len({(p.schedule, p.block_h, p.block_b, p.block_k, p.num_warps, p.num_stages) for p in plans}) <= 10
    found = 0
    for module in (resident, resident_backward, grid, stepwise, recompute, single):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if not (isinstance(node, ast.FunctionDef) and node.name.endswith("kernel")):
                continue
            found += 1
            runtime = {a.arg for a in node.args.args if a.annotation is None and not a.arg.endswith("_ptr")}
            (decorator,) = node.decorator_list
            (option,) = decorator.keywords
            assert option.arg == "do_not_specialize" and set(ast.literal_eval(option.value)) == runtime, node.name
    assert found == 8


def compiled(*arguments):
    return in_a_process_that_compiles("-m", "seqcells.kernels.report", *arguments)


def in_a_process_that_compiles(*arguments):
    """Python in a process of its own: this one interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    how = {"env": env, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run([sys.executable, *arguments], **how)


def few():
    """Cases of the LSTM with every schedule among them, and what docs/performance.md shows."""
    case = report.Case("lstm", "train", "bf16", 8, 64, "sm_90")
    shown = [replace(case, hidden=h, direction=d) for h in (32, 64, 128) for d in ("infer", "train", "backward")]
    sizes = [("bf16", 512, 16), ("fp32", 512, 16), ("bf16", 1024, 1024)]
    large = [replace(case, dtype=t, hidden=h, batch=b, direction=d) for t, h, b in sizes for d in ("train", "backward")]
    masked = replace(case, dtype="fp64", hidden=64, batch=1024, mask="resets", precision="ieee")
    return [
        *shown,
        *large,
        masked,
        replace(case, direction="recompute"),
        replace(case, direction="step train", batch=1),
        replace(case, hidden=33),
        replace(case, hidden=33, direction="backward"),
    ]


MEASURE = """
import json, sys
from pathlib import Path
from seqcells.kernels import report
cases = [report.Case(**case) for case in json.loads(sys.argv[1])]
report.write_json(Path(sys.argv[2]), [row for case in cases for row in report.measure(case)])
"""


@pytest.mark.parametrize("target", ["few", *(pytest.param(t, marks=pytest.mark.slow) for t in report.TARGETS)])
def test_everything_compiles_without_spills_and_fits(target, tmp_path):
    """LSTM, a few shapes. All cells are in `make report-quick`, which CI runs, and all shapes in `make report`."""
    file = tmp_path / "r.json"
    if target == "few":
        target = "sm_90"
        given = json.dumps([asdict(case) for case in few()])
        result = in_a_process_that_compiles("-c", MEASURE, given, str(file))
    else:
        result = compiled("--quick", "--target", target, "--cell", "lstm", "--json", str(file))
        assert len(json.loads(file.read_text())["rows"]) > 60
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert {r["schedule"] for r in rows} == {"resident", "grid", "stepwise", "recompute", "single"}
    for r in rows:
        case = report.Case(**r["case"])
        chosen = report.planned(case)
        if target == "sm_100":
            assert r["cycles"] is None
        else:
            assert 20 < r["cycles"]["low"] <= r["cycles"]["middle"] <= r["cycles"]["high"] < 200_000
            assert r["cycles"]["loop"] == (r["instructions"] > 0)
        assert r["spills"] == 0 and r["registers"] <= 255
        if r["schedule"] == "recompute":
            continue
        # What fits is what the plan says fits.
        itemsize = ITEMSIZE[case.dtype]
        if r["schedule"] == "resident":
            assert r["shared"] <= resident_bytes(4, case.hidden, itemsize, chosen.block_b, case.precision)
        if r["schedule"] == "grid":
            backward = case.direction == "backward"
            assert r["shared"] <= grid_bytes(cells.get("lstm"), case.hidden, itemsize, chosen, backward, case.precision)
        if r["schedule"] == "single":
            tile = 4 * chosen.block_h, chosen.block_b, chosen.block_k
            assert r["shared"] <= shared_bytes(*tile, itemsize, chosen.num_stages)
        elif r["schedule"] != "stepwise":
            assert r["instructions"] > 0 and r["slots"] == r["instructions"] * r["warps"] / 4
    document = static.document(target, content)
    assert f"Static cost of the kernels on {target}" in document
    assert ("There is no model for this target" in document) == (target == "sm_100")
    if target == "sm_90":
        check_the_step(rows)


KINDS_MEASURED = """
import sys
sys.path.insert(0, "tests")
import kinds
from seqcells.kernels import registry, report
shapes = [("resident", 64, 16, "bf16"), ("grid", 300, 16, "bf16"), ("stepwise", 300, 16, "bf16")]
shapes += [("resident", 20, 8, "fp32"), ("stepwise", 1024, 1024, "bf16")]
for kind in kinds.KINDS.values():
    registry.register(kind.cell)
    for schedule, hidden, batch, dtype in shapes:
        for direction in ("train", "backward"):
            case = report.Case(kind.cell.name, direction, dtype, batch, hidden, sys.argv[1], schedule, mask="lengths")
            for row in report.measure(case):
                assert row.good and row.schedule == schedule, row
                print("good")
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_cells_of_other_kinds_compile_without_spills(target):
    result = in_a_process_that_compiles("-c", KINDS_MEASURED, target)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("good") >= 10 * len(KINDS)


def check_the_step(rows):
    """Issue slots and barriers a step, LSTM, bf16, 8 rows: what was asked for, and what docs/performance.md shows."""
    cost = {(r["case"]["hidden"], r["case"]["direction"]): r for r in rows if as_in_the_book(r["case"])}
    # Of backward: 1.8 times inference's slots before its input was loaded as whole words (66, 142, 320).
    for hidden, slots, barriers, back in ((32, 150, 6, 118), (64, 230, 8, 255), (128, 460, 8, 576)):
        shown = [cost[hidden, d] for d in ("infer", "train", "backward")]
        for row in shown[:2]:
            assert row["slots"] <= slots and row["counts"]["BAR"] <= barriers
        assert shown[2]["slots"] <= back
        line = " | ".join(f"{r['slots']:.0f}, {r['counts']['BAR']}" for r in shown)
        if triton.__version__ == "3.7.1":  # constraints.txt's; another release compiles to other counts
            assert f"| LSTM {hidden} | {line} |" in (ROOT / "docs/performance.md").read_text(), line
    # Rows of an odd size are loaded in the products' layout, too.
    assert all(cost[33, d]["counts"]["BAR"] == 2 for d in ("train", "backward"))
    # `grid`: neither U nor what the others computed passes through shared memory; a barrier is one of the sum's parts.
    large = [r for r in rows if (r["schedule"], r["case"]["dtype"], r["case"]["hidden"]) == ("grid", "bf16", 512)]
    large = [r for r in large if r["case"]["batch"] == 16 and r["case"]["groups"] == 1]
    assert {"train", "backward"} <= {r["case"]["direction"] for r in large}
    assert all(not r["counts"].get("LDSM") and r["counts"]["BAR"] <= 2 for r in large)


def as_in_the_book(case):
    usual = (case["mask"], case["dcs"], case["schedule"], case["groups"]) == ("", False, None, 1)
    return usual and (case["dtype"], case["batch"]) == ("bf16", 8)


def test_a_bad_kernel_gives_a_bad_exit_status(monkeypatch):
    case = report.Case("lstm", "infer", "bf16", 8, 64, "sm_90")
    fields = {"case": case, "schedule": "resident", "kernel": "k", "phase": "-", "warps": 4, "block": "64x8"}
    fields |= {"registers": 255, "limit": 9, "code": 1, "instructions": 1, "slots": 1.0}
    fields |= {"counts": {}, "stack": 0}
    assert report.Row(**fields, spills=0, shared=9).good
    assert not report.Row(**fields, spills=1, shared=9).good
    assert not report.Row(**fields, spills=0, shared=10).good
    assert "BAD" in report.table([report.Row(**fields, spills=1, shared=9)])
    cycles = report.latency.Cycles(100.4, 150, 200.0, True)
    assert "100-200" in report.table([report.Row(**fields, spills=0, shared=9, cycles=cycles)])


def test_spills_alone_need_the_machine_code_only_where_there_is_local_memory(monkeypatch):
    kernel = SimpleNamespace(fn=planned)  # any function
    launch = SimpleNamespace(plan=planned(), arguments={"BLOCK_H": 64, "BLOCK_B": 8}, kernel=kernel)
    compiled = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=9))
    spilled = "/*0000*/ LDL R1, [R2] ;\n/*0010*/ @P0 BRA 0x0 ;\n"
    monkeypatch.setattr(report, "launches", lambda case: [launch])
    monkeypatch.setattr(report, "compile_launch", lambda launch, target: compiled)
    case = report.Case("lstm", "infer", "bf16", 8, 64, "sm_100")
    for stack, local, spills_only, read in ((0, 0, True, 0), (8, 0, True, 1), (0, 8, True, 1), (0, 0, False, 1)):
        usage = f"REG:32 STACK:{stack} SHARED:0 LOCAL:{local} "
        monkeypatch.setattr(report, "_tool", lambda how, _, usage=usage: spilled if how == ["-sass"] else usage)
        (row,) = report.measure(case, spills_only=spills_only)
        assert (row.spills, row.code, row.instructions) == (read, 2 * read, 2 * read)
        assert (row.registers, row.stack, row.shared) == (32, stack + local, 9)
        assert ("BAD" in report.table([row])) == (row.spills > 0) == (not row.good)


def test_the_loop_is_the_widest_backward_branch():
    code = [
        (0, "MOV R0, R1"),
        (16, "IADD3 R2, R2, 1, RZ"),
        (32, "@P0 BRA 0x10"),
        (48, "@!P1 BRA 0x0"),
        (64, "BRA 0x40"),
    ]
    assert report.widest_loop(code) == [i for _, i in code[:4]]
    assert report.widest_loop(code[4:]) == []

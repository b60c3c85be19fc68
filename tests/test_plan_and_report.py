"""The plan as a pure function, and the compiled kernels' static cost on three targets, which needs no GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from hypothesis import given
from hypothesis import strategies as st

from seqcells.kernels import recompute, report, resident, stepwise
from seqcells.kernels.plan import KNOWN, plan, resident_bytes

ROOT = Path(__file__).parents[1]
sizes = st.integers(1, 5000)


@given(
    gates=st.integers(1, 6),
    B=sizes,
    H=sizes,
    itemsize=st.sampled_from([2, 4, 8]),
    device=st.sampled_from(list(KNOWN.values())),
)
def test_a_plan_fits_and_covers(gates, B, H, itemsize, device):
    chosen = plan(gates, B, H, itemsize, device)
    assert chosen == plan(gates, B, H, itemsize, device)
    for size in (chosen.block_h, chosen.block_b, chosen.block_k):
        assert size & (size - 1) == 0
    assert chosen.block_b >= 8 and chosen.block_h >= 16 and chosen.block_k >= 16
    assert chosen.num_warps in (1, 2, 4, 8) and chosen.num_warps * 32 * chosen.registers <= 65536
    assert plan(gates, B, 65, 4, device, precision="ieee").schedule == "stepwise"
    if chosen.schedule == "resident":
        assert chosen.block_h >= H
        assert resident_bytes(gates, H, itemsize, chosen.block_b) <= device.shared
    else:
        assert resident_bytes(gates, H, itemsize, 8) > device.shared or (itemsize == 8 and H > 32)
    assert plan(gates, B, H, itemsize, device, "stepwise").schedule == "stepwise"
    assert chosen.why


def test_a_schedule_that_does_not_exist_or_fit_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'grid'"):
        plan(4, 8, 64, 2, KNOWN["sm_90"], "grid")
    with pytest.raises(ValueError, match="does not fit hidden size 1024"):
        plan(4, 8, 1024, 2, KNOWN["sm_90"], "resident")
    with pytest.raises(ValueError, match="hidden size 30000 is too large"):
        plan(4, 8, 30_000, 2, KNOWN["sm_90"])


def test_batches_share_a_few_tile_sizes_and_lengths_share_all():
    """What a kernel is compiled for is the plan's sizes; T is in none of them, and B only through a few tiles."""
    for gates, H in ((4, 64), (3, 128), (4, 1024)):
        plans = {plan(gates, B, H, 2, KNOWN["sm_90"]) for B in range(1, 5000)}
        assert len({(p.schedule, p.block_h, p.block_b, p.block_k, p.num_warps) for p in plans}) <= 5
    found = 0
    for module in (resident, stepwise, recompute):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if not (isinstance(node, ast.FunctionDef) and node.name.endswith("kernel")):
                continue
            found += 1
            runtime = {a.arg for a in node.args.args if a.annotation is None and not a.arg.endswith("_ptr")}
            (decorator,) = node.decorator_list
            (option,) = decorator.keywords
            assert option.arg == "do_not_specialize" and set(ast.literal_eval(option.value)) == runtime, node.name
    assert found == 5


def compiled(*arguments):
    """The report in a process of its own: this one interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "seqcells.kernels.report", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("target", list(KNOWN))
def test_everything_compiles_without_spills_and_fits(target, tmp_path):
    result = compiled("--target", target, "--cell", "lstm", "--json", str(tmp_path / "r.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) > 60
    assert {r["schedule"] for r in rows} == {"resident", "stepwise", "recompute"}
    for r in rows:
        assert r["spills"] == 0 and r["registers"] <= 255
        if r["schedule"] == "resident":
            c = r["case"]
            size = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}[c["dtype"]]
            needed = resident_bytes(4, c["hidden"], size, int(r["block"].split("x")[1]))
            assert r["shared"] <= needed, "what fits is what the plan says fits"
            assert r["instructions"] > 0 and r["slots"] == r["instructions"] * r["warps"] / 4
    if target == "sm_90":
        cost = {(r["case"]["hidden"], r["case"]["direction"]): r for r in rows if as_in_the_readme(r["case"])}
        for hidden, slots in ((64, 430), (128, 850)):
            for direction in ("infer", "train"):
                found = cost[hidden, direction]
                assert found["slots"] <= slots and found["counts"]["BAR"] <= 10
            shown = [cost[hidden, d] for d in ("infer", "train", "backward")]
            shown = [f"{r['slots']:.0f}, {r['counts']['BAR']}" for r in shown]
            line = f"| LSTM {hidden} | {' | '.join(shown)} |"
            if triton.__version__ == "3.7.1":  # constraints.txt's; another release compiles to other counts
                assert line in (ROOT / "README.md").read_text(), line


def as_in_the_readme(case):
    return (case["dtype"], case["batch"], case["resets"], case["schedule"]) == ("bf16", 8, False, None)


def test_a_bad_kernel_gives_a_bad_exit_status(monkeypatch):
    case = report.Case("lstm", "infer", "bf16", 8, 64, "sm_90")
    fields = {"case": case, "schedule": "resident", "kernel": "k", "phase": "-", "warps": 4, "block": "64x8"}
    fields |= {"registers": 255, "limit": 9, "code": 1, "instructions": 1, "slots": 1.0, "counts": {}}
    assert report.Row(**fields, spills=0, shared=9).good
    assert not report.Row(**fields, spills=1, shared=9).good
    assert not report.Row(**fields, spills=0, shared=10).good
    assert "BAD" in report.table([report.Row(**fields, spills=1, shared=9)])


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

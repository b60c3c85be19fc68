"""The benchmarks' own parts: what is refused, what is counted, and what a failing provider leaves behind."""

import json
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cases
import compare
import measure
import providers

COUNT = next(c for c in cases.TASKS if c.why == "count-ones")


def test_a_wrong_answer_is_refused():
    problem = cases.Problem(COUNT, DEVICE)
    judged = cases.answer(problem, providers.judge(problem))
    allowed = cases.tolerance(COUNT, problem.device)
    assert cases.parity(cases.answer(problem, providers.torch_nn(problem)), judged, allowed) <= allowed
    for wrong in ([judged[0] * 1.01, *judged[1:]], [*judged[:-1], judged[-1] * torch.nan]):
        with pytest.raises(ValueError, match="disagrees with the judge"):
            cases.parity(wrong, judged, allowed)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_recurrence_without_the_inputs_product(cell):
    case = cases.Case(cell, 3, 2, 3, 16, heads=2, projected=False)
    problem = cases.Problem(case, DEVICE)
    judged = cases.answer(problem, providers.judge(problem))
    allowed = cases.tolerance(case, problem.device)
    assert cases.parity(cases.answer(problem, providers.PROVIDERS["triton"](problem)), judged, allowed) <= allowed
    with pytest.raises(cases.Unavailable, match="part of every call"):
        providers.PROVIDERS["loop"](problem)


def test_a_provider_that_fails_is_recorded_and_the_others_go_on(monkeypatch):
    def broken(problem):
        raise RuntimeError("no such kernel image")

    monkeypatch.setitem(compare.PROVIDERS, "flashrnn", broken)
    names = ["torch.nn", "flashrnn", "split", "auto"]
    rows = {row["provider"]: row for row in compare.compared(COUNT, DEVICE, 0.0, names)}
    assert rows["flashrnn"]["failed"] == "RuntimeError: no such kernel image"
    assert "for resets" in rows["split"]["unavailable"]
    for name in ("torch.nn", "auto"):
        assert rows[name]["seconds"] > 0 and rows[name]["error"] < 1e-3
    written = compare.document(list(rows.values()), compare.machine(DEVICE), "a test")
    assert "no such kernel image" in written and f"| {COUNT.name} |" in written


def test_no_time_leaves_a_note():
    rows = compare.sweep([COUNT], DEVICE, minutes=0.0)
    assert [row["not_reached"] for row in rows] == [True] and "1 cases were not reached" in compare.failures(rows)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru-before", "rnn"])
def test_what_the_kernels_keep_for_backward(cell):
    """Of G gates: "gates" (G + 2) T B H elements at most beyond input, weights and output, "states" 2 T B H."""
    case = cases.Case(cell, 5, 4, 3, 16)
    problem, unit = cases.Problem(case, DEVICE), 5 * 4 * 16 * 4
    for save, most in (("gates", cases.GATES[cell] + 2), ("states", 2)):
        work = providers.ours("triton", save)(problem)
        assert 0 < measure.saved_bytes(problem, work) <= most * unit, save


def test_the_cases_name_the_shapes_of_the_tasks_and_of_the_field():
    named = cases.grid()
    assert {c.H for c in cases.TASKS} == {2, 8, 16, 20, 32, 64, 128, 150, 300}
    assert {c.B for c in named if c.T == 1024 and c.H == 768} == {2, 8, 16, 32, 64, 128, 256}
    assert {(c.H, c.heads) for c in named if c.why == "FlashRNN's"} == {(64, 12), (128, 6), (256, 3), (768, 1)}
    assert {c.mode for c in named} == {cases.INFERENCE, cases.TRAINING, cases.STEP}
    assert len({c.name for c in named}) == len(named)


def test_what_was_asked_is_held_against_what_was_found():
    """torch.nn where it has the cell, the loop by hand where it has not; and what the products leave room for."""

    def row(case, provider, seconds, floor=None):
        found = {"case": asdict(case), "name": case.name, "provider": provider, "seconds": seconds}
        return found | {"us_a_step": seconds * 1e6 / case.T, "floor_us_a_step": floor}

    lacking = cases.Case("gru-before", 10, 2, 3, 4)
    other = cases.Case("lstm", 10, 2, 3, 4, resets=0.1)
    rows = [row(COUNT, "torch.nn", 0.94), row(COUNT, "auto", 1.0), row(COUNT, "reference", 9.0)]
    rows += [row(lacking, "reference", 2e-5, 0.5), row(lacking, "auto", 1e-5, 0.5)]
    rows += [row(other, "reference", 2e-5, 1.0), row(other, "auto", 1e-5, 1.0)]
    lines = compare.goals(rows).splitlines()[2:]
    assert lines == [
        f"| {COUNT.name} | torch.nn | 0.94 | 0.95 |  | not reached |",
        f"| {lacking.name} | reference | 2.00 | 3 | 4.0 | not reached |",
        f"| {other.name} | reference | 2.00 | 3 | 2.0 | out of reach |",
    ]


def test_the_floor_is_the_products_of_the_rows_there_are(monkeypatch):
    counted = []
    for name in ("mm", "addmm_"):
        target, own = (torch, torch.mm) if name == "mm" else (torch.Tensor, torch.Tensor.addmm_)

        def count(a, b, *c, own=own, **more):
            rows, inner, columns = (*b.shape, c[0].shape[1]) if c else (*a.shape, b.shape[1])
            counted.append(rows * inner * columns)
            return own(a, b, *c, **more)

        monkeypatch.setattr(target, name, count)
    case = cases.Case("gru", 7, 5, 3, 4, lengths=True)
    problem = cases.Problem(case, "cpu")
    measure.products(problem, rows=8)()
    rows = int(problem.lengths.sum())
    assert sum(counted) == rows * 12 * (3 + 4 + 4 + 3 + 4)  # forward: input and h; back: h; both weights' gradients
    assert measure.products(cases.Problem(cases.Case("gru", 7, 5, 3, 4, layers=2), "cpu")) is None


def static_document():
    """static.py's, of rows as the report has them."""
    import static

    rows = []
    for hidden in (32, 64, 128):
        for direction in ("infer", "train", "backward"):
            case = {"cell": "lstm", "direction": direction, "dtype": "bf16", "batch": 8, "hidden": hidden}
            case |= {"target": "sm_90", "schedule": None, "mask": "", "dcs": False, "precision": "tf32", "groups": 1}
            cycles = {"low": 4.0 * hidden, "middle": 5.0 * hidden, "high": 8.0 * hidden, "loop": True}
            row = {"case": case, "cycles": cycles, "schedule": "resident", "phase": "-", "block": f"{hidden}x8"}
            row |= {"registers": 99, "shared": 1024, "instructions": 9, "slots": 9.0, "counts": {"BAR": 2}}
            rows.append(row | {"batches": [8], "good": True, "microseconds": 0.3})
    text = static.document("sm_90", {"triton": "3.7.1", "rows": rows}, "## The end")
    assert "| lstm | 64 | 256-512 (0.14-0.28), 2 |" in text and text.endswith("## The end\n")
    assert "36 slots, 2" in static.cost(rows[0] | {"cycles": None, "slots": 36.0})
    return text


def test_gpu_py_prints_the_model_beside_what_was_measured():
    import gpu
    import predicted

    row = {"measured": 0.5, "model": [0.4, 0.6, 0.8], "floor": 0.3, "plan": "resident 64x8, 4 warps"}
    found = {"lstm train bfloat16 B=8 H=64": row, "gru infer tf32 B=8 H=64": row | {"model": None}}
    found["gru infer bfloat16 B=8 H=64"] = {"failed": "no result"}
    lines = gpu.model_table(found).splitlines()[2:]
    assert lines[0].startswith("| lstm train bfloat16 B=8 H=64 | 0.500 | 0.400-0.600-0.800 | 0.83 | 0.300 |")
    assert "| 0.500 | - | - |" in lines[1] and "no result" in lines[2]
    # What it writes is what predicted.py reads, and so are the sentences of earlier files.
    smi = "driver_version, clocks.max.sm [MHz]\n580, 1980 MHz"
    parts = {"device": {"nvidia-smi": smi}, "kernels": found}
    timed = list(predicted.read({"parts": parts}, "sm_90"))
    assert [(t.measured, t.clock) for t in timed] == [(0.5, 1.98)] * 2
    old = {"kernels": {"lstm train tf32 B=8 H=64": "0.827 us a step, the plan's model 0.666", "x": "not reached"}}
    (timed,) = predicted.read([old], "sm_90")
    assert (timed.measured, timed.clock) == (0.827, 1.83)
    inside, above = (predicted.Compared(timed, "grid", [0.5, 0.8, high]) for high in (0.9, 0.82))
    assert inside.within and not above.within and inside.group == "grid forward"
    assert "| grid forward | 2 | 1.03 | 1.03 | 1.03 | 1 |" in predicted.summary([inside, above])


def test_peers_that_are_not_installed_are_left_out(monkeypatch, capsys):
    import peers_static

    monkeypatch.setattr(peers_static, "versions", dict)
    assert "Neither FlashRNN nor TorchRL was installed" in peers_static.section(lambda *_: "-")
    assert "FlashRNN and TorchRL: not installed" in capsys.readouterr().err


def test_pictures_come_of_a_run(tmp_path):
    import plot

    chosen = [cases.Case("gru", 4, 2, 3, 16 * n, why="by H") for n in (1, 3, 5)]
    rows = compare.sweep(chosen, DEVICE, 1.0, ["torch.nn", "auto", "reference"], dry=True)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"rows": rows}))
    table = tmp_path / "static-sm_90.md"
    table.write_text(static_document())
    assert plot.main([str(file), str(tmp_path), "--static", str(table)]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} >= {"run-scaling-gru-H.png", "static-sm_90.png"}


def drawn(monkeypatch, folder, rows, **facts):
    """Figures by the names of their files, and what main said of it; none higher than a screen."""
    import plot

    figures, save = {}, plot.save

    def kept(figure, path):
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plot, "save", kept)
    (folder / "run.json").write_text(json.dumps({"machine": {"cpu": "A CPU", "threads": "1"} | facts, "rows": rows}))
    assert plot.main([str(folder / "run.json"), str(folder)]) == 0
    for name in figures:
        assert struct.unpack(">II", (folder / name).read_bytes()[16:24])[1] <= 1000, name
    return figures


def timed(case, provider, seconds):
    found = {"case": asdict(case), "name": case.name, "device": "cpu", "provider": provider, "seconds": seconds}
    return found | {"us_a_step": seconds * 1e6 / case.T, "floor_us_a_step": 1.0, "saved_bytes": 4096}


def test_a_ratios_bar_starts_from_one(tmp_path, monkeypatch):
    import plot

    assert plot.LOOKS.keys() == providers.PROVIDERS.keys()
    chosen = [cases.Case("gru", 10 + n, 2, 3, 4, why="a layer") for n in range(90)]
    rows = [timed(c, "torch.nn", 1.0) for c in chosen]
    rows += [timed(c, "auto", 2.0 if n == 0 else 0.1) for n, c in enumerate(chosen)]
    figures = drawn(monkeypatch, tmp_path, rows)
    pages = [f for name, f in figures.items() if name.startswith("run-torch.nn")]
    assert len(pages) > 1, "a second picture rather than one that is too high"
    (axes,) = pages[0].axes
    assert "as fast seqcells is as torch.nn" in pages[0].get_suptitle()
    assert "training, float32, A CPU, 1 thread" in pages[0].get_suptitle()
    ends = [sorted((bar.get_x(), bar.get_x() + bar.get_width())) for bar in axes.patches]
    assert ends[0] == pytest.approx([0.5, 1]) and ends[1] == pytest.approx([1, 10])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.5", "0.7", "1", "1.5", "2", "3", "4", "5", "7", "10"]
    assert [t.get_text() for t in axes.get_yticklabels()][:2] == ["GRU T=10 B=2 I=3 H=4", "GRU T=11 B=2 I=3 H=4"]
    assert sum(len(f.axes[0].patches) for f in pages) == 90


def test_a_picture_of_scaling_says_what_is_fixed(tmp_path, monkeypatch):
    import plot

    chosen = [cases.Case("lstm", 64, 16, H, H, why="by H") for H in (16, 64, 256)]
    rows = [timed(c, p, s * c.H) for c in chosen for p, s in (("torch.nn", 1e-4), ("auto", 5e-5), ("reference", 3e-3))]
    figure = drawn(monkeypatch, tmp_path, rows, threads="2")["run-scaling-lstm-H.png"]
    title = figure.get_suptitle()
    assert title == "LSTM, training, by hidden size\nT=64 B=16 I=H, float32, A CPU, 2 threads"
    times = figure.axes[0]
    widths = {line.get_label(): line.get_linewidth() for line in times.get_lines()}
    assert max(widths, key=widths.get) == plot.LOOKS["auto"][1]
    ticks = [t.get_text() for axes in figure.axes for t in axes.get_yticklabels()]
    assert "1" in ticks and "50" in ticks and not any("$" in t for t in ticks)


def test_no_committed_picture_is_higher_than_a_screen():
    pictures = list((Path(cases.__file__).parent / "results").glob("*.png"))
    assert pictures
    for picture in pictures:
        assert struct.unpack(">II", picture.read_bytes()[16:24])[1] <= 1000, picture.name

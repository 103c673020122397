"""The blind rows: which they are, that a killed measurement goes on, and what is said of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fmsim.exec.measure.sizes import Sizes
from fmsim.geometry import PRESETS
from fmsim.hw import load_hardware
from fmsim.hw.modules import stand_in

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import blind

TOKENS = {"32K": 32_768, "128K": 128_000, "512K": 512_000}


def test_no_row_is_of_what_a_calibration_times():
    sizes = Sizes()
    timed = {(1, tokens) for tokens in sizes.contexts}
    timed |= {(batch, sizes.contexts[0]) for batch in sizes.batches}
    timed |= {(batch, tokens) for batch in sizes.crowds for tokens in sizes.crowd_contexts}
    assert not timed & {(ask.batch, TOKENS[ask.context]) for ask in blind.ROWS}


def test_the_rows_are_of_all_kinds():
    rows = blind.ROWS
    assert len(rows) >= 30 and len({ask.name for ask in rows}) == len(rows)
    assert {ask.context for ask in rows} == set(TOKENS)
    assert 1 in {ask.batch for ask in rows} and 144 <= max(ask.batch for ask in rows) <= 160
    assert {ask.params.get("granularity", 1) for ask in rows} == {1, 4, 16, 64}
    assert {ask.params.get("on_miss") for ask in rows} == {None, "mask", "fallback"}
    names = " ".join(ask.name for ask in rows)
    for word in ("full", "recency", "h2o", "lru", "lsa", "held"):
        assert word in names
    for ask in rows:  # beyond a warm-up, with a decision
        assert ask.steps > (128 if ask.params.get("cadence") else 16)


def test_rows_that_a_seed_draws_are_others():
    rows = blind.drawn(40, seed=1)
    assert rows == blind.drawn(40, seed=1) != blind.drawn(40, seed=2)
    names = {ask.name for ask in rows}
    assert len(names) == 40 and not names & {ask.name for ask in blind.ROWS}
    assert all(2 <= ask.batch <= 160 for ask in rows)
    assert all(ask.batch <= 40 for ask in rows if ask.label == "full")
    known = {(ask.label, str(ask.params)) for ask in blind.ROWS}
    assert {(ask.label, str(ask.params)) for ask in rows} <= known


class Counting(blind.Bench):
    """Measures nothing, and counts."""

    def __init__(self):
        super().__init__("a model", "cpu")
        self.asked = []

    def row(self, ask):
        self.asked.append(ask.name)
        return ask._asdict() | {"measured_step_p50_s": 0.01, "wall_s": 1.0}


def test_a_killed_measurement_goes_on(tmp_path):
    asks = blind.ROWS[:4]
    (tmp_path / f"{asks[0].name}.json").write_text("{}")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"{asks[1].name}.claim").write_text(str(dead.pid))  # it died at this row
    (tmp_path / f"{asks[2].name}.claim").write_text(str(os.getppid()))  # another is at this one
    bench = Counting()
    assert blind.measure(asks, bench, float("inf"), tmp_path) == 0
    assert bench.asked == [asks[1].name, asks[3].name]
    assert json.loads((tmp_path / f"{asks[3].name}.json").read_text())["batch"] == asks[3].batch


def test_no_row_is_begun_when_time_is_up(tmp_path):
    bench = Counting()
    blind.measure(blind.ROWS, bench, 0.5, tmp_path)  # a row takes one second
    assert len(bench.asked) == 1


def result(**changes):
    row = {
        "context": "32K",
        "label": "lru",
        "batch": 6,
        "looked_at": True,
        "simulated_step_p50_s": 0.0098,
        "measured_step_p50_s": 0.01,
        "step_error": -0.02,
        "simulated_tokens_per_s": 636.0,
        "measured_tokens_per_s": 600.0,
        "tokens_error": 0.06,
    }
    failed = {"context": "512K", "label": "full", "batch": 9, "failed": "FmsimError: too large"}
    head = {"device": "NVIDIA H200", "date": "2026-01-02T03:04:05", "within": 0, "frozen": True}
    head |= {"missing": [], "unseen": 1, "unseen_within": 0}
    return head | {"rows": [row, failed]} | changes


def said(found):
    return " ".join(blind.table(found).split())


def test_a_table_says_what_was_off_and_what_failed():
    made = said(result())
    assert "NVIDIA H200, 2026-01-02: 0 of 2 rows within 5% in both figures." in made
    assert "| 32K | lru (seen) | 6 | 9.80 | 10.00 | -2.0% | 636.0 | 600.0 | +6.0% |" in made
    assert "512K, `full`, 9: FmsimError: too large" in made and "was changed" not in made
    assert "Of the 1 others 0 are within." in made
    assert "others" not in said(result(unseen=2))
    none = said(result(unseen=0))
    assert "All had been seen" in none and "(seen)" not in none and "others" not in none
    assert "The simulator was changed after" in said(result(frozen=False))
    assert "Not measured: 2 rows." in said(result(missing=["a", "b"]))
    assert blind.off(result()["rows"][0]) == pytest.approx(0.06)


def test_a_result_finds_its_place_on_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / blind.PAGE
    page.parent.mkdir(parents=True)
    page.write_text(f"# Rows\n\n{blind.PLACE}\n")
    monkeypatch.setattr(blind, "ROOT", tmp_path)
    monkeypatch.setattr(blind, "RESULTS", page.parent)
    assert blind._write(result(), None) == 1  # not within what is asked
    assert blind._write(result(within=2), None) == 0  # written once more, in its place
    text = page.read_text()
    assert text.count("| 32K | lru (seen) | 6 |") == 1 and text.count(blind.PLACE) == 1
    assert "2 of 2 rows" in text and (page.parent / "blind-h200.json").is_file()
    assert blind.part_of(Path("x/blind-h200.json")) == (blind.PAGE, "blind h200")


@pytest.mark.parametrize(
    ("name", "experts", "file"),
    [("h200-1gpu", 16, "calibration-h200-1gpu.json"), ("h100-1gpu", 40, "exec.json")],
)
def test_a_calibrated_gpu_ships(name, experts, file):
    hw = load_hardware(name)
    assert hw.n_gpus == 1 and hw.experts == experts and not hw.reserve_bytes.guess
    assert "runtime" in hw.reserve_bytes.source and "activations" in hw.reserve_bytes.source
    assert f"benchmarks/results/{file}" in hw.kernel_source and "2026-11-2" in hw.kernel_source
    assert (ROOT / "benchmarks/results" / file).is_file()
    flash = PRESETS["v4-flash"]
    few = replace(flash, n_experts=experts)
    assert hw.weight_bytes(flash) == hw.weight_bytes(few) < hw.hbm_bytes.value
    assert f"{experts} of v4-flash's experts" in stand_in(hw, flash)

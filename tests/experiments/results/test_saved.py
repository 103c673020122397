"""What commands wrote, read back as rows, as a frame, and written as tables."""

import json
import sys

import numpy as np
import pytest
from command import fmsim_here
from made_trace import make_trace

import fmsim
from fmsim import FmsimError
from fmsim.trace import write

SCENARIO = "name: small\ntrace: small.safetensors\npolicies: [full, lru, h2o]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    write(path / "small.safetensors", make_trace())
    (path / "small.yaml").write_text(SCENARIO)
    for command in (
        ("run", "small.yaml", "--out", "out", "-q"),
        ("sweep", "small.yaml", "-p", "lru", "-g", "batch=1,2", "-q"),
        ("tune", "small.yaml", "-p", "h2o", "-n", "3", "--floor", "0.1", "-q"),
    ):
        done = fmsim_here(*command, folder=path)
        assert done.returncode == 0, done.stderr
    return path


def test_rows_of_a_run_are_flat_and_know_what_they_are_of(folder):
    rows = fmsim.load_rows(folder / "out")
    assert [row["policy"] for row in rows] == ["full", "lru", "h2o"]
    report = json.loads((folder / "out/report.json").read_text())
    for row, known in zip(rows, report["policies"], strict=True):
        assert row["step_s_p99"] == known["step_s"]["p99"]
        assert (row["name"], row["model"], row["trace"]) == (
            "small",
            "v4-flash",
            "small.safetensors",
        )
        assert not any(isinstance(value, (dict, list)) for value in row.values())


@pytest.mark.parametrize("name, n", [("sweep.jsonl", 2), ("tune.jsonl", 3)])
def test_rows_of_a_sweep_and_a_search(folder, name, n):
    rows = fmsim.load_rows(folder / name)
    assert len(rows) == n
    assert not any(isinstance(value, (dict, list)) for row in rows for value in row.values())


def test_a_frame_and_what_is_told_without_pandas(folder, monkeypatch):
    pytest.importorskip("pandas")
    frame = fmsim.load_frame(folder / "out")
    assert list(frame["policy"]) == ["full", "lru", "h2o"] and frame["mass_kept"].max() <= 1
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FmsimError, match=r"pip install 'fmsim\[pandas\]'"):
        fmsim.load_frame(folder / "out")


def test_tables_by_the_name_s_end(folder, tmp_path, monkeypatch):
    rows = fmsim.load_rows(folder / "out")
    fmsim.save_rows(rows, tmp_path / "x.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").open()]
    assert [line["policy"] for line in lines] == ["full", "lru", "h2o"]
    assert all(value is not None for line in lines for value in line.values())
    numbers = {"loss": np.float32(0.25), "n": np.int64(3), "done": np.True_}
    fmsim.save_rows([numbers], tmp_path / "numpy.jsonl")
    assert json.loads((tmp_path / "numpy.jsonl").read_text()) == {
        "loss": 0.25,
        "n": 3,
        "done": True,
    }
    fmsim.save_rows(rows, tmp_path / "x.csv")
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4
    parquet = pytest.importorskip("pyarrow.parquet")
    fmsim.save_rows(rows, tmp_path / "x.parquet")
    assert parquet.read_table(tmp_path / "x.parquet").to_pylist()[1]["policy"] == "lru"
    with pytest.raises(FmsimError, match="cannot be written"):
        fmsim.save_rows(rows, "/dev/null/x.csv")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FmsimError, match=r"pip install 'fmsim\[parquet\]'"):
        fmsim.save_rows(rows, tmp_path / "y.parquet")


def test_what_is_no_result_is_refused(folder, tmp_path):
    with pytest.raises(FmsimError, match="give a folder of `fmsim run --out`"):
        fmsim.load_rows(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(FmsimError, match="not a report of fmsim"):
        fmsim.load_rows(tmp_path)


def test_a_run_prints_lines_for_a_tracker(folder):
    printed = fmsim_here("run", "small.yaml", "--jsonl", "-q", folder=folder)
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [row["policy"] for row in rows] == ["full", "lru", "h2o"]
    assert not any(isinstance(value, dict) for row in rows for value in row.values())

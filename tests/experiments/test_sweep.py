"""`fmsim sweep`: the grid's grammar, what makes a run itself, and that a killed sweep goes on where
it was.
"""

import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from command import fmsim, fmsim_here
from made_trace import make_trace

from fmsim.api import run_scenario
from fmsim.errors import FmsimError
from fmsim.experiments.results.rows import SCHEMA_VERSION, RowFile
from fmsim.experiments.sweep import Axis, SweepRun, left, plan, sweep
from fmsim.policies.lru import LRU
from fmsim.trace import write

SCENARIO = (
    "name: small\ntrace: small.safetensors\npolicies: [full, lru, {policy: h2o, budget: 10%}]\n"
)
MAIN = [sys.executable, "-c", "from fmsim.cli import main; main()"]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write(folder / "small.safetensors", make_trace())
    (folder / "small.yaml").write_text(SCENARIO)
    return folder / "small.yaml"


def budgets(n):
    return "policies.lru.budget=" + ",".join(f"{20 + i} entries" for i in range(n))


def planned(scenario, *grids, overrides=(), selected=()):
    axes = [Axis.parse(grid) for grid in grids]
    return list(plan(str(scenario), overrides, axes, selected).runs())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        (
            "policies.lsa.budget=5%,10%, 2x topk",
            "policies.lsa.budget",
            [("5%", "5%"), ("10%", "10%"), ("2x topk", "2x topk")],
        ),
        ("batch=1,16", "batch", [("1", 1), ("16", 16)]),
        (
            "hardware_figures.host_bytes=1e12,2.5e12",
            "hardware_figures.host_bytes",
            [("1e12", 1e12), ("2.5e12", 2.5e12)],
        ),
        ("layer_map=[0,1],[1,0]", "layer_map", [("[0,1]", "[0,1]"), ("[1,0]", "[1,0]")]),
        ("name='a,b',c", "name", [("'a,b'", "'a,b'"), ("c", "c")]),
    ],
)
def test_an_axis_is_a_key_and_a_yaml_list(text, key, values):
    assert Axis.parse(text) == Axis(key, tuple(values))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch", "write KEY=VALUE,VALUE"),
        ("batch=", "write KEY=VALUE,VALUE"),
        ("batch=[1,2", "not a YAML list"),
        ("batch=1,1", "stands there twice"),
        ("batch=1,2,hardware=h100,h200", "one key a --grid; repeat --grid"),
    ],
)
def test_a_wrong_axis_is_told(text, says):
    with pytest.raises(FmsimError, match=says):
        Axis.parse(text)


def test_a_policys_own_key_varies_that_policy_alone(scenario):
    runs = planned(scenario, "policies.lru.budget=5%,10%,20%", "hardware=h100,h200")
    told = [(run.label, dict(run.settings)) for run in runs]
    assert len(runs) == 2 + 2 + 6 and len({run.key for run in runs}) == 10
    assert ("full", {"hardware": "h200"}) in told and (
        "lru",
        {"policies.lru.budget": "20%", "hardware": "h100"},
    ) in told
    assert len(planned(scenario, "policies.1.budget=5%,10%")) == 1 + 2 + 1  # by place
    assert (
        len(planned(scenario, "policies.*.budget=5%,10%", selected=["lru", "h2o"])) == 4
    )  # every policy


def test_a_runs_key_follows_what_its_result_depends_on(scenario, tmp_path):
    [run] = planned(scenario, "batch=1", selected=["lru"])
    same = [
        planned(scenario, "hardware=h100", selected=["lru"]),  # the default, said aloud
        planned(scenario, "batch=1", overrides=["policies.lru.budget=2x topk"], selected=["lru"]),
        planned(scenario, "name=another", selected=["lru"]),
    ]
    write(tmp_path / "other.safetensors", make_trace(seed=1))
    other = [
        planned(scenario, "batch=2", selected=["lru"]),
        planned(scenario, "policies.lru.granularity=4", selected=["lru"]),
        planned(scenario, "hardware_figures.link_bytes_per_s=27e9", selected=["lru"]),
        planned(scenario, "batch=1", selected=["h2o"]),
        planned(scenario, f"trace={tmp_path / 'other.safetensors'}", selected=["lru"]),
    ]
    assert {only.key for [only] in same} == {run.key}
    assert len({run.key, *(only.key for [only] in other)}) == 1 + len(other)


def test_a_trace_in_anothers_place_is_replayed_anew_in_this_process(tmp_path):
    class Local(LRU):
        """No other process can be told of it."""

        name = "local"

    asked = {"name": "small", "trace": str(tmp_path / "small.safetensors"), "policies": ["full"]}
    found = []
    for seed in (0, 1):
        write(tmp_path / "new.safetensors", make_trace(n_steps=40, seed=seed))
        (tmp_path / "new.safetensors").replace(tmp_path / "small.safetensors")
        [row] = sweep(asked, (), [Axis.of("batch", [1])], [Local])
        [run] = run_scenario(asked, [Local]).runs
        assert row["misses"] == run.row["misses"]
        found.append((row["key"], row["misses"]))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def test_rows_hold_what_run_would_print_and_a_faster_link_stalls_less(scenario, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = fmsim_here(
        "sweep",
        scenario,
        "-p",
        "lru",
        "-g",
        "hardware_figures.link_bytes_per_s=10e9,55.1e9,220e9",
        "--out",
        out,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert sorted(map(str, rows)) == sorted(map(str, rows_of(out)))
    stalls = [row["stall_ratio"] for row in rows]
    assert stalls == sorted(stalls, reverse=True) and len(set(stalls)) == 3
    alone = json.loads(fmsim_here("run", scenario, "-p", "lru", "--json").stdout)["policies"][0]
    assert rows[1]["decode_tokens_per_s"] == pytest.approx(alone["decode_tokens_per_s"], rel=1e-12)
    assert (rows[1]["kv_hbm_bytes"], rows[1]["step_s_p99"]) == (
        alone["kv_hbm_bytes"],
        pytest.approx(alone["step_s"]["p99"]),
    )


def test_a_workload_gives_rows_of_what_the_server_did(scenario, tmp_path):
    workload = (
        "workload={kind: bursts, burst: 2, every_s: 10, prompt_tokens: 4096, output_tokens: [64,"
        " 200], duration_s: 10}"
    )
    arguments = [
        "-p",
        "lru",
        "--set",
        workload,
        "-g",
        "workload.seed=0,1",
        "--out",
        tmp_path / "rows.jsonl",
    ]
    shown = fmsim_here("sweep", scenario, *arguments)
    assert shown.returncode == 0 and "TTFT p95" in shown.stdout, shown.stderr
    rows = json.loads(fmsim_here("sweep", scenario, *arguments, "--json").stdout)
    alone = json.loads(
        fmsim_here("run", scenario, "-p", "lru", "--set", workload, "--json").stdout
    )["policies"][0]
    assert [row["set.workload.seed"] for row in rows] == [0, 1] and rows[0]["tokens"] != rows[1][
        "tokens"
    ]
    assert (rows[0]["tokens"], rows[0]["ttft_s_p95"], rows[0]["requests_finished"]) == (
        alone["tokens"],
        alone["ttft_s"]["p95"],
        2,
    )


def test_a_run_that_does_not_fit_is_a_row_too(scenario, tmp_path):
    done = fmsim_here(
        "sweep", scenario, "-p", "full", "-g", "batch=1,100000", "--out", tmp_path / "rows.jsonl"
    )
    assert done.returncode == 0 and "no run" in done.stdout and "GiB more than" in done.stdout
    assert [
        ("error" in row)
        for row in sorted(rows_of(tmp_path / "rows.jsonl"), key=lambda row: row["set.batch"])
    ] == [False, True]
    alone = fmsim_here("sweep", scenario, "-p", "full", "-g", "batch=100000", folder=tmp_path)
    assert alone.returncode == 1 and "GiB more than" in alone.stdout  # nothing fits


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-g", "batch=1", "-g", "batch=2"], "the key stands there twice"),
        (["-g", "policies.lru.budgt=1,2"], "budgt"),
        (["-g", "hardware=h100,h20o"], "--grid hardware=h20o: hardware: no hardware preset 'h20o'"),
        (["-g", "hardware_figures.link_byte_per_s=1"], "did you mean 'link_bytes_per_s'?"),
        (
            ["-g", "batch=1", "--out", "/dev/null/x.jsonl"],
            "--out /dev/null/x.jsonl: cannot be used",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_runs(scenario, tmp_path, arguments, says):
    done = fmsim_here(
        "sweep",
        scenario,
        *(["--out", tmp_path / "rows.jsonl"] if "--out" not in arguments else []),
        *arguments,
    )
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_killed_sweep_goes_on_and_runs_nothing_twice(scenario, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = ["sweep", scenario, "-p", "lru", "-g", budgets(24), "--out", out, "-j", "2"]
    with subprocess.Popen([*MAIN, *map(str, command)], stdout=subprocess.DEVNULL) as process:
        while not out.exists() or out.read_text().count("\n") < 3:
            assert process.poll() is None, "the sweep ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    before = out.read_bytes()
    assert 3 <= before.count(b"\n") < 24
    whole, cut = before[: before.rstrip(b"\n").rfind(b"\n") + 1], before[:-7]
    out.write_bytes(cut)  # as if the kill had struck within the last write
    done = fmsim(*command)
    assert done.returncode == 0, done.stderr
    assert f"{24 - len(whole.splitlines())} of 24 runs done now" in done.stdout
    rows = rows_of(out)
    assert out.read_bytes().startswith(whole)
    assert len(rows) == len({row["key"] for row in rows}) == 24
    after = out.read_bytes()
    assert "0 of 24 runs done now" in fmsim_here(*command).stdout and out.read_bytes() == after


def test_workers_end_with_a_killed_sweep(scenario, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = ["sweep", scenario, "-p", "lru", "-g", budgets(60), "--out", out, "-j", "2"]
    with subprocess.Popen([*MAIN, *map(str, command)], stdout=subprocess.PIPE) as process:
        while not out.exists() or not out.read_text():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        # its end comes when the last process that inherited the pipe has ended
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert 1 <= len(out.read_text().splitlines()) < 60


def test_a_file_of_something_else_is_not_touched(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\nhello\n')
    with pytest.raises(FmsimError, match="rows.jsonl, line 2: not a row"):
        RowFile(path)
    assert path.read_text() == '{"key": "a"}\nhello\n'


def test_a_row_that_cannot_be_written_is_told_with_its_file(tmp_path, monkeypatch):
    with RowFile(tmp_path / "rows.jsonl", "--study") as file:
        file.put({"key": "a"})
        monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(FmsimError, match=r"--study .*rows.jsonl: cannot be .*\(No space left"):
            file.put({"key": "b"})


def test_rows_of_another_schema_are_refused_by_name(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text('{"key": "a", "policy": "lru"}\n')
    with pytest.raises(FmsimError, match="old.jsonl: row 1 has schema 1, but this fmsim writes 3"):
        RowFile(path)
    assert path.read_text() == '{"key": "a", "policy": "lru"}\n'


def test_rows_in_parquet_read_back_and_grow(tmp_path):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pyarrow is not installed: pip install 'fmsim[parquet]'"
    )
    path = tmp_path / "rows.parquet"
    with RowFile(path) as file:
        file.put({"key": "a", "batch": 1})
    with RowFile(path) as file:
        file.put({"key": "b", "error": "took too long", "failed": True})
    with RowFile(path) as file:
        file.put({"key": "b", "error": "does not fit"})
    version = {"schema_version": SCHEMA_VERSION}
    with RowFile(path) as file:
        assert file.rows == [
            version | {"key": "a", "batch": 1},
            version | {"key": "b", "error": "does not fit"},
        ]
    assert parquet.read_table(path).column_names == ["schema_version", "key", "batch", "error"]
    path.write_bytes(b"not parquet")
    with pytest.raises(FmsimError, match="not a Parquet file"):
        RowFile(path)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_rows(scenario, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fmsim[ray]'")
    grid = [
        "sweep",
        scenario,
        "-p",
        "lru",
        "-p",
        "h2o",
        "-g",
        "policies.*.budget=10%,20%",
        "--json",
    ]
    on_ray = fmsim(*grid, "--out", tmp_path / "ray.jsonl", "--engine", "ray")
    local = fmsim_here(*grid, "--out", tmp_path / "local.jsonl")
    assert on_ray.returncode == local.returncode == 0, on_ray.stderr
    assert (
        json.loads(on_ray.stdout) == json.loads(local.stdout)
        and len(rows_of(tmp_path / "ray.jsonl")) == 4
    )


def test_without_ray_the_fix_is_told(scenario, tmp_path):
    hidden = "import sys; sys.modules['ray'] = None; from fmsim.cli import main; main()"
    command = [
        "sweep",
        scenario,
        "-g",
        "batch=1",
        "--engine",
        "ray",
        "--out",
        tmp_path / "rows.jsonl",
    ]
    done = subprocess.run(
        [sys.executable, "-c", hidden, *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "pip install 'fmsim[ray]'" in done.stderr


def test_left_are_the_runs_without_a_row_or_with_one_that_failed(scenario):
    runs = planned(scenario, "batch=1,2,3", selected=["full"])
    rows = [{"key": runs[1].key, "error": "does not fit"}, {"key": "of another sweep"}, {}]
    assert list(left(runs, rows)) == [runs[0], runs[2]]
    rows.append({"key": runs[0].key, "error": "it took longer", "failed": True})
    assert list(left(runs, rows)) == [runs[0], runs[2]]


def test_a_run_that_took_too_long_is_run_again_in_its_rows_place(scenario, tmp_path, monkeypatch):
    out, axes = tmp_path / "rows.jsonl", [Axis.of("batch", [1])]
    with monkeypatch.context() as slow:
        slow.setattr(SweepRun, "row", lambda run: time.sleep(60))
        [late] = sweep(scenario, (), axes, ["h2o"], out, timeout_s=0.01)
    assert late["failed"] and "took longer" in late["error"]
    [other] = sweep(scenario, (), axes, ["full"], out)
    [done] = sweep(scenario, (), axes, ["h2o"], out)
    assert done["key"] == late["key"] and "error" not in done
    assert rows_of(out) == [done, other]

"""A capture or a trace by itself ends in a table of policies, in one command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.experiments.captures import captured
from fmsim.experiments.driving import layers_that_drive
from fmsim.experiments.run import run_scenario
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.scenario import ScenarioFile
from fmsim.trace.importers import files
from fmsim.trace.importers.dsa import record_dsa
from tests.support import captures
from tests.support.command import fmsim_here

ROWS = captures.rows(np.random.default_rng(7))


def imported(folder):
    """The trace of a response of SGLang."""
    model = files.model_of(str(captures.config_file(folder)), None, None, 1)
    (folder / "a.json").write_text(json.dumps(captures.sglang(ROWS)))
    source, place = folder / "a.json", folder / "a.safetensors"
    [(_, trace)] = files.import_file(source, place, "sglang", model, None)
    return trace


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_a_response_ends_in_a_table(kind, tmp_path):
    config = captures.config_file(tmp_path)
    response = captures.sglang(ROWS) if kind == "sglang" else captures.vllm(ROWS)
    (tmp_path / "answer.json").write_text(json.dumps(response))
    command = ["run", "answer.json", "--format", kind, "--model", str(config)]
    done = fmsim_here(*command, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["policy"]: row for row in report["policies"]}
    assert set(rows) == {"full", "recency", "lru", "lfu", "belady"}
    details = report["scenario"]["details"]
    assert report["scenario"]["trace"]["masses"] is False
    assert all(row["mass_kept"] is None and row["entry_recall"] is None for row in rows.values())
    hits = {name: rows[name]["hit_rate"] for name in rows}
    assert hits["full"] == 1 and hits["belady"] >= max(hits["lru"], hits["lfu"])
    assert details["lru"]["exact"] is True and details["recency"]["exact"] is False
    assert rows["lru"]["h2d_bytes"] > 0 and rows["lru"]["stall_ratio"] > 0
    table = fmsim_here(*command, folder=tmp_path).stdout
    assert "no attention masses" in table and "hit" in table


def test_a_model_recorded_by_transformers_ends_in_a_table(tmp_path):
    small = {key: value for key, value in captures.CONFIG.items() if key != "model_type"}
    torch.manual_seed(1)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**small, n_group=1, topk_group=1)).eval()
    prompt = np.random.default_rng(2).integers(0, 256, 60).tolist()
    trace = record_dsa(model, prompt, 20, name="tiny", prompt_text="random")
    traces.write(tmp_path / "tiny.safetensors", trace)
    config = captures.config_file(tmp_path)
    done = fmsim_here("run", "tiny.safetensors", "--model", str(config), "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["policy"]: row for row in json.loads(done.stdout)["policies"]}
    assert {"h2o", "oracle", "belady"} <= set(rows)
    assert rows["lru"]["mass_kept"] == 1 and 0 < rows["h2o"]["mass_kept"] < 1


@pytest.mark.parametrize("name", ["lru", "lfu", "belady", "recency"])
def test_masses_change_nothing_for_what_needs_none(name, tmp_path):
    """The same rows with any masses give the same hits and loads."""
    trace = imported(tmp_path)
    ids = np.asarray(trace.entry_ids)
    mass = np.where(ids < 0, 0, np.random.default_rng(1).random(ids.shape) / 16).astype(np.float32)
    rest = np.full(ids.shape[:2], 0.1, np.float32)
    weighed = replace(trace, mass=mass, window_mass=rest, sink_mass=rest)
    policy = {"policy": name, "budget": "16 entries"}
    without, having = (Replayer(one).run(registry.build(policy)) for one in (trace, weighed))
    assert (without.masses, having.masses) == (False, True)
    for field in ("hit", "accessed", "demand_loads", "resident", "evicted"):
        np.testing.assert_array_equal(getattr(without, field), getattr(having, field))
    assert not without.mass_total.any() and having.mass_total.any()


@pytest.mark.parametrize("spec", ["h2o", "oracle", {"policy": "lru", "on_miss": "fallback"}])
def test_what_needs_masses_says_so(spec, tmp_path):
    trace = imported(tmp_path)
    spec = {"policy": spec} if isinstance(spec, str) else spec
    with pytest.raises(FmsimError, match="this trace lacks"):
        Replayer(trace).run(registry.build(spec))


def test_a_trace_that_fmsim_carries_runs_by_its_name(tmp_path):
    done = fmsim_here("run", "nano-32k-needles", folder=tmp_path)
    assert done.returncode == 2 and "is of 'nano', which is no preset; give --model" in done.stderr


def test_another_familys_trace_drives_only_where_it_is_said(tmp_path):
    path = Path("traces/nano-32k-needles.safetensors")
    overrides = ["model=v3.2", "hardware=h200"]
    with pytest.raises(FmsimError, match="entry_tokens: 1 and layer_map: spread"):
        run_scenario(captured.of_trace(path, overrides, ["full"]))
    overrides += ["layer_map=spread", "entry_tokens=4"]
    with pytest.raises(FmsimError, match="v3.2 has entries of 1 tokens"):
        run_scenario(captured.of_trace(path, overrides, ["full"]))
    report = run_scenario(captured.of_trace(path, [*overrides, "entry_tokens=1"], ["full"]))
    assert "stand in" in report.scenario["stands_for"]
    assert report.runs[0].row["kv_hbm_ratio"] == 1


def test_layers_that_share_a_selection_have_one_trace_layer():
    geometry = PRESETS["glm-5.2"]
    rows = np.zeros((30, 21, 1), np.int32)
    header = traces.TraceHeader(
        geometry={"csa_layers": list(range(21)), "index_topk": 1},
        model=traces.ModelInfo(name="glm-5.2", dtype="none"),
        source="test",
        prompt_kind="none",
        prompt_tokens=10,
        entry_tokens=1,
        seed=0,
        device="none",
        created="now",
    )
    recorder = traces.TraceRecorder(header, *rows.shape)
    for layer in range(21):
        recorder.step(0, layer, rows[:, layer])
    assert layers_that_drive(recorder.finish(), geometry) == geometry.selection_map()


def test_a_context_beyond_the_positions_is_refused(tmp_path):
    path = captures.config_file(tmp_path, max_position_embeddings=50)
    (tmp_path / "a.json").write_text(json.dumps(captures.sglang(ROWS)))
    command = ["run", "a.json", "--format", "sglang", "--model", str(path), "-p", "full"]
    done = fmsim_here(*command, folder=tmp_path)
    assert done.returncode == 2 and "69 tokens" in done.stderr and "50 positions" in done.stderr
    assert fmsim_here(*command, "--beyond-positions", folder=tmp_path).returncode == 0
    with pytest.raises(FmsimError, match="--model"):
        captured.of_capture(tmp_path / "a.json", "sglang", None, None)
    with pytest.raises(FmsimError, match="there are sglang"):
        captured.of_capture(tmp_path / "a.json", "other", str(path), None)


def test_a_scenario_still_is_a_scenario(tmp_path):
    assert ScenarioFile("scenarios/32k.yaml").scenario.beyond_positions is False

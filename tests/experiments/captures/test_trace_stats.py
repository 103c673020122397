"""Statistics of a trace, against counts by hand and by plain loops."""

import json

import numpy as np
from typer.testing import CliRunner

from fmsim import trace as traces
from fmsim.cli.trace import app
from fmsim.errors import FmsimError
from fmsim.experiments.captures.trace_stats import stats


def made(rows, prompt=100):
    """Of ids [T, L, K], without masses, entries of one token."""
    rows = np.asarray(rows)
    header = traces.TraceHeader(
        geometry={"csa_layers": list(range(rows.shape[1])), "index_topk": rows.shape[2]},
        model=traces.ModelInfo(name="made", dtype="none"),
        source="test",
        prompt_kind="none",
        prompt_tokens=prompt,
        entry_tokens=1,
        seed=0,
        device="none",
        created="now",
    )
    recorder = traces.TraceRecorder(header, *rows.shape)
    for layer in range(rows.shape[1]):
        recorder.step(0, layer, rows[:, layer])
    return recorder.finish()


def test_counts_by_hand():
    # layer 0: {1,2} {2,3} {2,3} {1,9}; layer 1: {1,2} {5,6} {2,7} {8,9}
    trace = made([[[1, 2], [1, 2]], [[2, 3], [5, 6]], [[2, 3], [2, 7]], [[1, 9], [8, 9]]])
    found = stats(trace)
    first, second = found["layers"]
    assert first["union"] == {"4": 4 / 2, "16": None, "64": None}
    assert first["step_overlap"] == 3 / 6 and second["step_overlap"] == 0
    assert first["layer_overlap"] is None and second["layer_overlap"] == 4 / 8
    # layer 0 selects again: 2 after 1, 2 and 3 after 1, 1 after 3 steps
    assert first["reuse_steps"]["p50"] == 1 and first["first_uses"] == 4 / 8
    assert found["masses"] is False
    assert found["all"]["step_overlap"] == 1 / 4


def test_misses_are_fewer_in_a_larger_cache_and_under_belady():
    rng = np.random.default_rng(1)
    rows = np.sort(rng.random((60, 2, 40)).argsort(-1)[..., :8], axis=-1)
    found = stats(made(rows))
    for row in found["layers"]:
        lru, belady = row["misses"]["lru"], row["misses"]["belady"]
        assert lru["1"] >= lru["2"] >= lru["4"] and belady["1"] >= belady["2"] >= belady["4"]
        assert all(belady[n] <= lru[n] for n in lru)


def test_the_command_prints_and_writes_a_page(tmp_path):
    trace = made(np.tile(np.arange(4), (20, 3, 1)))
    path = tmp_path / "t.safetensors"
    traces.write(path, trace)
    page = tmp_path / "t.html"
    run = CliRunner().invoke(app, ["stats", str(path), "--json", "--html", str(page)])
    assert run.exit_code == 0, run.exception
    found = json.loads(run.stdout)
    assert found["all"]["step_overlap"] == 1 and found["all"]["union"]["16"] == 1
    text = page.read_text()
    assert text.count("<tr>") == 5 and "100.0%" in text
    assert text.count("://") == text.count("http://www.w3.org/2000/svg")
    assert "mean" in CliRunner().invoke(app, ["stats", str(path)]).stdout
    wrong = CliRunner().invoke(app, ["stats", str(path), "--html", "/dev/null/t.html"])
    assert isinstance(wrong.exception, FmsimError) and "--html" in str(wrong.exception)

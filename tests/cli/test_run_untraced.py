"""`fmsim run` without a trace: sizes, walls, the full cache's time, why the rest is absent."""

import json

import pytest
import typer
from typer.testing import CliRunner

from fmsim.cli.run import run
from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS

APP = typer.Typer()
APP.command()(run)
H200 = ["--hardware", "h200"]


def report(*given):
    found = CliRunner().invoke(APP, [*given, "--json"])
    assert found.exit_code == 0, found.exception
    return json.loads(found.stdout)


@pytest.mark.parametrize("model", ["v4-flash", "v3.2", "glm-5.2", "v4.1-flash", "minimax-m3"])
def test_every_family_has_sizes_walls_and_the_full_caches_time(model):
    found = report("--model", model, *H200, "--context", "128K")
    about, rows = found["scenario"], {row["policy"]: row for row in found["footprints"]}
    geometry = PRESETS[model].on_gpu(8)
    tokens = about["context_tokens"] + about["output_tokens"]
    full = rows["full"]
    assert full["gpu_bytes"] == geometry.full_kv_bytes(tokens) + geometry.window_bytes
    assert full["host_bytes"] == 0 and full["max_requests"] == full["walls"]["GPU memory"]
    assert full["decode_tokens_per_s"] == pytest.approx(1 / full["step_s"])
    for name in ("lru 2x topk", "lsa 10%"):
        assert rows[name]["host_bytes"] == geometry.host_kv_bytes(tokens)
        assert rows[name]["gpu_bytes"] < full["gpu_bytes"]
        assert not set(about["absent"]["columns"]) & set(rows[name])
    assert f"fmsim plan --model {model}" in about["absent"]["reason"]


def test_the_table_says_what_is_absent_and_where_kv_lies():
    shown = CliRunner().invoke(APP, ["--model", "minimax-m3", *H200], env={"COLUMNS": "400"})
    assert "KV heads on 4 GPUs, bytes are of one" in shown.stdout
    assert "need selections: no trace says what a block-sparse model selected" in shown.stdout


def test_a_model_whose_token_nobody_counted_has_sizes_and_no_time(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "hidden_size: 6144\nn_heads: 64\nhead_dim: 544\nparameters: 100000000000\n"
        "layers: [{repeat: 4, kind: sparse, entry_tokens: 1, entry_bytes: 656, topk: 64}]\n"
    )
    found = report("--model", str(tmp_path / "mine.yaml"), *H200)
    assert "decode_tokens_per_s" not in found["footprints"][0]
    assert "parameters_of_a_token" in found["scenario"]["absent"]["untimed"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "or --model"),
        (["--model", "v3.2", *H200, "--context", "256K"], "163,840 positions"),
        (["--model", "v3.2", *H200, "--batch", "1000"], "take a smaller batch"),
        (["--model", "v3.2"], "does not fit"),
        (["--model", "v3.2", "--policy", "lru"], "--policy: needs a scenario"),
        (["--model", "v3.2", "--set", "batch=3"], "--set: needs a scenario"),
        (["traces/nano-32k-needles.safetensors", "--context", "1M"], "--context"),
    ],
)
def test_what_cannot_be_said_is_told(given, says):
    found = CliRunner().invoke(APP, given)
    assert isinstance(found.exception, FmsimError) and says in str(found.exception)


def test_longer_than_the_positions_where_the_user_wants_it():
    found = report("--model", "v3.2", *H200, "--context", "256K", "--beyond-positions")
    assert found["scenario"]["context_tokens"] == 2**18


def test_a_trace_cannot_drive_entries_of_two_lengths():
    given = ["traces/nano-32k-needles.safetensors", "--model", "v4.1-flash", *H200]
    found = CliRunner().invoke(APP, given)
    assert "fmsim run --model v4.1-flash" in str(found.exception)

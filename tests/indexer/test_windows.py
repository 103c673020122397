"""Traces as training data, and the commands, on small traces made by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from fmsim import trace as traces
from fmsim.cli.indexer import app
from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint
from fmsim.indexer.labels import LabelRule
from fmsim.indexer.windows import read_windows
from fmsim.trace import float8
from fmsim.trace.format import ModelInfo, Trace, TraceHeader

LAYERS, TOPK, HIDDEN, HEAD_DIM, TAU = 2, 3, 6, 4, 8
GEOMETRY = {
    "csa_layers": [2, 4],
    "index_topk": TOPK,
    "hidden_size": HIDDEN,
    "index_head_dim": HEAD_DIM,
    "rope_dims": 2,
    "compress_rope": {"rope_type": "default", "rope_theta": 160_000.0},
}


def small_trace(seed: int = 0, prompt_tokens: int = 42, steps: int = 20) -> Trace:
    random = np.random.default_rng(seed)
    ids = np.empty((steps, LAYERS, TOPK), np.int32)
    for step in range(steps):
        for layer in range(LAYERS):
            ids[step, layer] = np.sort(random.permutation((prompt_tokens + step + 1) // 4)[:TOPK])
    mass = random.dirichlet(np.ones(TOPK + 2), (steps, LAYERS)).astype(np.float32)
    entries = (prompt_tokens + steps) // 4
    codes, scales = float8.quantise(random.standard_normal((LAYERS, entries, HEAD_DIM)))
    header = TraceHeader(
        geometry=GEOMETRY,
        model=ModelInfo(name="made by hand", dtype="float32"),
        source="deepseek_v4",
        prompt_kind="needles",
        prompt_tokens=prompt_tokens,
        seed=seed,
        tau=TAU,
        device="cpu",
        created="2026-01-01T00:00:00Z",
    )
    hidden = random.standard_normal((-(-steps // TAU), LAYERS, HIDDEN)).astype(np.float32)
    return Trace(
        header,
        ids,
        mass[..., :TOPK],
        mass[..., TOPK],
        mass[..., TOPK + 1],
        np.zeros(prompt_tokens + steps, np.int32),
        np.ones(steps, bool),
        hidden,
        codes,
        scales,
    )


def test_queries_stand_before_their_windows_and_labels_follow_them():
    trace = small_trace()
    windows = read_windows(
        trace, "small", LabelRule(head_share=1e-9)
    )  # golden: the heaviest entry of each list
    assert windows.positions.tolist() == [41, 49, 57]
    assert windows.entries.tolist() == [10, 12, 14]
    assert windows.keys.shape == (LAYERS, 14, HEAD_DIM)
    np.testing.assert_allclose(
        windows.keys, float8.decode(trace.index_keys[:, :14]) * trace.index_key_scales[..., None]
    )
    for window, seen in enumerate(windows.entries):
        steps = slice(TAU * window, TAU * (window + 1))
        ids, mass = trace.entry_ids[steps], trace.mass[steps]
        heaviest = np.take_along_axis(ids, mass.argmax(-1, keepdims=True), -1)
        assert np.flatnonzero(windows.golden[window]).tolist() == sorted(
            {entry for entry in heaviest.flat if entry < seen}
        )
        assert windows.mass[window].sum() == pytest.approx(mass[ids < seen].sum(), rel=1e-5)
    longer = read_windows(trace, "small", LabelRule(head_share=1e-9, horizon_steps=2 * TAU))
    expected = windows.golden[0] | (windows.golden[1] & (np.arange(14) < 10))
    assert (longer.golden[0] == expected)[:10].all()


def test_a_stale_state_serves_the_window_after_its_own():
    """What a policy has that recalls ahead: window w is chosen from the state before w - 1."""
    trace, rule = small_trace(), LabelRule(head_share=1e-9)
    fresh, stale = (
        read_windows(trace, "small", rule),
        read_windows(trace, "small", replace(rule, state_age=1)),
    )
    assert stale.state_age == 1 and stale.positions.tolist() == [41, 41, 49]
    assert stale.entries.tolist() == [10, 10, 12]
    assert np.array_equal(stale.hidden, fresh.hidden[[0, 0, 1]])
    for window, seen in enumerate(stale.entries):  # the same window's needs, of what is visible
        assert np.array_equal(stale.golden[window, :seen], fresh.golden[window, :seen])
        assert np.array_equal(stale.mass[window, :seen], fresh.mass[window, :seen])
        assert not stale.golden[window, seen:].any()


@pytest.mark.parametrize("missing", ["hidden", "index_keys"])
def test_a_trace_without_states_or_keys_is_refused(missing):
    with pytest.raises(
        FmsimError, match=f"old.safetensors: this deepseek_v4 trace holds no {missing}"
    ):
        read_windows(replace(small_trace(), **{missing: None}), "old.safetensors", LabelRule())


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        traces.write(path, small_trace(seed))
    return [str(path) for path in paths]


def test_train_then_eval_from_the_command_line(files, tmp_path):
    out = str(tmp_path / "indexer.safetensors")
    options = [
        "--heads",
        "2",
        "--rank",
        "4",
        "--steps",
        "4",
        "--evaluate-every",
        "2",
        "--device",
        "cpu",
        "--kept-share",
        "0.3",
    ]
    trained = CliRunner().invoke(
        app, ["train", *files[:2], "--held-out", files[2], "--out", out, *options]
    )
    assert trained.exit_code == 0, trained.output
    assert "step     4" in trained.output and "peak memory" in trained.output
    found = checkpoint.load(out)
    assert (sorted(found.layers), found.hidden_size, found.head_dim) == ([0, 1], HIDDEN, HEAD_DIM)
    assert found.training["held_out"] == ["2.safetensors"]
    table = CliRunner().invoke(app, ["eval", out, files[2]])
    assert table.exit_code == 0 and "golden entries recalled" in table.output
    plot = tmp_path / "plots" / "recall.html"
    assert (
        CliRunner()
        .invoke(app, ["eval", out, files[2], "--native", out, "--plot", str(plot)])
        .exit_code
        == 0
    )
    assert "native, held" in plot.read_text() and "attention mass kept" in plot.read_text()
    numbers = json.loads(CliRunner().invoke(app, ["eval", out, files[2], "--json"]).stdout)
    assert numbers["threshold"]["kept_share"] == pytest.approx(0.3, abs=0.06)
    assert numbers["mass_recall"]["oracle"][-1] >= numbers["mass_recall"]["lsa (max)"][-1]


def test_training_on_stale_states_is_an_option_that_the_checkpoint_tells(files, tmp_path):
    options = ["--steps", "2", "--heads", "2", "--rank", "4", "--device", "cpu"]
    found = {}
    for age in (0, 1):
        out = str(tmp_path / f"aged-{age}.safetensors")
        call = ["train", *files[:2], "--held-out", files[2], "--out", out, *options]
        run = CliRunner().invoke(app, call if age == 0 else [*call, "--state-age", "1"])
        assert run.exit_code == 0, run.output
        found[age] = checkpoint.load(out)
        assert found[age].training["state_age"] == age
    weights = [loaded.layers[0].weights_proj for loaded in found.values()]
    assert not np.array_equal(*weights)  # other queries, other weights
    shown = CliRunner().invoke(app, ["eval", out, files[2]]).stdout
    assert "a state 1 window older" in " ".join(shown.split())
    shown = CliRunner().invoke(app, ["eval", out, files[2], "--state-age", "0"]).stdout
    assert "the state before it" in " ".join(shown.split())


def test_policies_stand_at_equal_bytes_where_a_budget_is_given(files, tmp_path):
    out = str(tmp_path / "indexer.safetensors")
    options = ["--steps", "1", "--heads", "2", "--rank", "4", "--device", "cpu"]
    assert CliRunner().invoke(app, ["train", *files, "--out", out, *options]).exit_code == 0
    call = ["eval", out, files[2], "--budget", "10%", "--budget", "0.001 MiB gpu"]
    rows = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)["policies"]
    found = {(row["budget"], row["policy"]): row for row in rows["2.safetensors"]}
    assert found["0.001 MiB gpu", "lsa, filled"]["least_bytes"] > 2**10
    assert "mass_kept" in found["10%", "oracle"]
    shown = CliRunner().invoke(app, call).stdout
    assert "policies at equal bytes" in shown and "needs" in shown
    wrong = CliRunner().invoke(app, ["eval", out, files[2], "--budget", "10 gpu"])
    assert isinstance(wrong.exception, FmsimError) and "--budget" in str(wrong.exception)


def test_without_held_out_traces_every_tenth_is_one(files, tmp_path):
    out = str(tmp_path / "indexer.safetensors")
    options = ["--steps", "1", "--heads", "2", "--rank", "4", "--device", "cpu"]
    run = CliRunner().invoke(app, ["train", *files, "--out", out, *options])
    assert run.exit_code == 0, run.output
    assert checkpoint.load(out).training["held_out"] == ["0.safetensors"]
    alone = CliRunner().invoke(app, ["train", files[0], "--out", out])
    assert isinstance(alone.exception, FmsimError)
    assert "one trace is held out, which leaves none to train on" in str(alone.exception)


def test_labels_that_a_trace_holds_are_counted_as_votes():
    """Four layers voted: entry 1 twice and entry 3 four times in the first step, entry 3 once in
    the second; the other rows' padding and what is younger than the query say nothing.
    """
    ids = np.full((TAU, 1, 3), -1, np.int32)
    share = np.zeros((TAU, 1, 3), np.float32)
    ids[0, 0], share[0, 0] = [1, 3, 12], [0.5, 1.0, 1.0]
    ids[1, 0, 0], share[1, 0, 0] = 3, 0.25
    whole = small_trace(steps=TAU)
    trace = SimpleNamespace(
        header=SimpleNamespace(
            tau=TAU, prompt_tokens=42, entry_tokens=4, geometry={"label_layers": 4}
        ),
        n_windows=1,
        entry_ids=ids,
        mass=share,
        holds_labels=True,
        hidden=whole.hidden,
        index_keys=whole.index_keys,
        keys=lambda most: np.zeros((LAYERS, most, HEAD_DIM), np.float32),
        csa_numbers=[2, 4],
        keyed=[0, 1],
    )
    golden = lambda rule: np.flatnonzero(read_windows(trace, "held", rule).golden[0]).tolist()
    assert golden(LabelRule()) == [1, 3] and golden(LabelRule(min_layers=3)) == [3]
    found = read_windows(trace, "held", LabelRule())
    assert found.mass[0].tolist() == [0, 0.5, 0, 1.25, 0, 0, 0, 0, 0, 0]
    one = read_windows(trace, "held", LabelRule(horizon_steps=1))
    assert one.mass[0, 3] == 1.0

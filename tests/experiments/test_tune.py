"""`fmsim tune`: ranges from schemas and by hand, the front and the floor, and that a seed fixes the
search.
"""

import json
import time

import pytest
from command import fmsim, fmsim_here
from made_trace import make_trace

from fmsim.errors import DoesNotFit, FmsimError
from fmsim.experiments.results.rows import RowFile
from fmsim.experiments.tune import Range, Trial, Tuning, ranges_of, tune
from fmsim.scenario import ScenarioFile
from fmsim.trace import write

pytest.importorskip("optuna", reason="optuna is not installed (extra: tune)")
SCENARIO = (
    "name: small\ntrace: small.safetensors\npolicies: [lru, {policy: h2o, label: heavy, budget:"
    " 10%}, {policy: oracle, on_miss: fallback}]\n"
)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    write(folder / "small.safetensors", make_trace())
    (folder / "small.yaml").write_text(SCENARIO)
    return folder / "small.yaml"


def test_a_schema_gives_what_it_bounds():
    ranges = {range_.name: range_ for range_ in ranges_of("lsa")}
    assert ranges["granularity"].choices == (1, 4, 16, 64) and ranges["stale"].choices == (
        False,
        True,
    )
    assert (ranges["budget"].low, ranges["budget"].high, ranges["budget"].unit) == (1, 50, "%")
    assert (ranges["threshold"].low, ranges["threshold"].high) == (0.01, 0.99)  # the ends are open
    assert not {"cadence", "checkpoint", "layers", "kmax", "sink_entries"} & set(
        ranges
    )  # no bound above
    assert "on_miss" not in {range_.name for range_ in ranges_of("recency")}  # one choice
    assert not {"fallback_above", "fallback_below"} & {
        range_.name for range_ in ranges_of("h2o")
    }  # it never falls back


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("budget=2%..30%", Range("budget", low=2, high=30, unit="%")),
        ("budget=1x topk..8x topk", Range("budget", low=1, high=8, unit="x topk")),
        ("budget=1..8 GiB", Range("budget", low=1, high=8, unit=" GiB")),
        ("threshold=.1..0.9", Range("threshold", low=0.1, high=0.9)),
        ("cadence=16..256", Range("cadence", low=16, high=256, integer=True)),
        ("scope=shared, per_layer", Range("scope", ("shared", "per_layer"))),
        ("granularity", Range("granularity", (1, 4, 16, 64))),
    ],
)
def test_a_range_by_hand(text, expected):
    [found] = ranges_of("lsa", [text])
    assert found == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("budgt=1%..2%", "no parameter 'budgt'; it has budget"),
        ("kmax", "its schema has no bounds; write kmax=LOW..HIGH"),
        ("budget=low..high", "write budget=LOW..HIGH"),
        ("budget=1%..2 GiB", "with one unit"),
        ("threshold=0.9..0.1", "0.9 is not below 0.1"),
    ],
)
def test_a_wrong_range_is_told(text, says):
    with pytest.raises(FmsimError, match=says):
        ranges_of("lsa", [text])


def made(tokens_per_s, mass_kept, kv=1):
    return Trial(
        {},
        {"decode_tokens_per_s": tokens_per_s, "mass_kept": mass_kept, "gpu_bytes": kv},
        mass_kept == 1,
    )


def test_the_front_and_the_best_by_hand():
    trials = [
        made(10, 0.9),
        made(12, 0.8),
        made(12, 0.85),
        made(9, 0.9),
        made(8, 1.0),
        made(8, 0.95),
        made(12, 0.85, kv=0.5),
    ]
    tuning = Tuning("lru", 0.9, trials, [])
    assert [trial.objectives for trial in tuning.front] == [(12, 0.85), (10, 0.9), (8, 1.0)]
    assert tuning.front[0].figures["gpu_bytes"] == 0.5  # of equals the smaller
    assert tuning.best.objectives == (10, 0.9)
    assert Tuning("lru", 1.01, trials, []).best is None


def test_a_search_keeps_the_floor_finds_the_fast_and_repeats_by_its_seed(scenario):
    search = lambda seed: tune(
        ScenarioFile(scenario, policies=["oracle"]),
        ranges_of("oracle", ["budget=1%..60%", "granularity"]),
        8,
        0.9,
        seed,
    )
    first, again, other = search(0), search(0), search(1)
    assert first.trials == again.trials != other.trials
    assert len({json.dumps(trial.values) for trial in first.trials}) == len(
        first.trials
    )  # a setting that comes again is not run again
    assert first.best.figures["mass_kept"] >= 0.9
    assert first.best.objectives[0] == max(
        t.objectives[0] for t in first.trials if t.figures["mass_kept"] >= 0.9
    )
    for trial in first.trials:
        assert any(
            f.objectives[0] >= trial.objectives[0] and f.objectives[1] >= trial.objectives[1]
            for f in first.front
        )


def test_the_command_shows_the_front_and_prints_json(scenario, tmp_path):
    arguments = [
        "tune",
        scenario,
        "--study",
        tmp_path / "study.jsonl",
        "-p",
        "heavy",
        "--range",
        "budget=5%..90%",
        "-n",
        "6",
        "--floor",
        "0.1",
    ]
    shown = fmsim(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert "heavy, best" in shown.stdout and "keeps 10% of the mass" in shown.stdout
    found = json.loads(fmsim_here(*arguments, "--json").stdout)
    assert list(found) == ["best", "pareto", "trials", "failed"] and 1 <= len(found["trials"]) <= 6
    assert found["best"] in found["pareto"] and found["best"]["mass_kept"] >= 0.1
    assert all(
        set(trial["values"]) == {"budget"} and trial["values"]["budget"].endswith("%")
        for trial in found["trials"]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "lry"], "did you mean 'lru'?"),
        (["-p", "lru", "--range", "granularity=3,5"], "policy lru: granularity"),
        (
            ["-p", "lru", "--set", "batch=100000"],
            "none of 2 settings could run; the last: policy lru, batch 100000",
        ),
        (["-p", "lru", "--range", "nonsense"], "no parameter 'nonsense'"),
    ],
)
def test_a_users_mistake_is_told_in_one_line(scenario, tmp_path, arguments, says):
    done = fmsim_here("tune", scenario, "-n", "2", *arguments, folder=tmp_path)
    assert (
        done.returncode == (1 if "batch=100000" in arguments else 2)
        and says in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_of_a_workload_the_requests_that_keep_the_level_are_searched_for(scenario, tmp_path):
    workload = (
        "workload={kind: poisson, rate_per_s: 4, prompt_tokens: 2000, output_tokens: 8,"
        " duration_s: 2, slo: {ttft_s: 1, tpot_s: 0.1}}"
    )
    arguments = ["-p", "lru", "--range", "budget=1x topk..4x topk", "-n", "3", "--json"]
    done = fmsim_here("tune", scenario, *arguments, "--set", workload, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    speeds = [trial["goodput_per_s"] for trial in found["trials"]]
    assert found["best"]["goodput_per_s"] == max(speeds) > 0
    assert "tpot_s" in found["best"] and "decode_tokens_per_s" not in found["best"]


def test_an_interrupted_search_goes_on_as_if_nothing_had_been(scenario, tmp_path):
    study = tmp_path / "study.jsonl"
    common = ["tune", scenario, "-p", "heavy", "--range", "budget=5%..90%", "--json"]
    whole = fmsim_here(*common, "-n", "5", "--study", tmp_path / "other.jsonl")
    fmsim_here(*common, "-n", "3", "--study", study)
    before = study.read_bytes()
    study.write_bytes(before[:-9])  # as if a kill had struck within the last write
    again = fmsim_here(*common, "-n", "5", "--study", study)
    assert again.returncode == 0 and again.stdout == whole.stdout
    rows = [json.loads(line) for line in study.read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == 5
    assert study.read_bytes().startswith(before[: before[:-9].rfind(b"\n") + 1])


def test_a_trial_that_took_too_long_is_run_again_in_its_rows_place(scenario, tmp_path, monkeypatch):
    file = ScenarioFile(scenario, policies=["lru"])
    ranges = ranges_of("lru", ["budget=20%..30%"])
    study = tmp_path / "study.jsonl"
    with monkeypatch.context() as slow, RowFile(study) as kept:
        slow.setattr("fmsim.experiments.tune._figures", lambda *given: time.sleep(60))
        with pytest.raises(DoesNotFit, match="took longer than its time limit"):
            tune(file, ranges, 1, 0.9, study_file=kept, timeout_s=0.01)
    with RowFile(study) as kept:
        assert len(tune(file, ranges, 1, 0.9, study_file=kept).trials) == 1
        assert len(kept.rows) == 1 and "error" not in kept.rows[0]

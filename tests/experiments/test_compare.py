"""What `fmsim compare` tells: settings, changes, and which of them are beyond error."""

import json
import math

import pytest
from command import fmsim_here

from fmsim.experiments.compare import compare
from fmsim.report.grid import View
from fmsim.report.tables import comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two results that differ in one policy's budget and the hardware."""
    folder = tmp_path_factory.mktemp("compare")
    both = ("run", "32k", "-p", "lsa", "-p", "full", "-q")
    before = ("--set", "policies.lsa.budget=10%")
    changes = ("--set", "policies.lsa.budget=20%", "--set", "hardware=h200")
    assert fmsim_here(*both, *before, "--out", "a", folder=folder).returncode == 0
    assert fmsim_here(*both, *changes, "--out", "b", folder=folder).returncode == 0
    return folder


def rows_of(found, policy):
    return {row["figure"]: row for row in found["rows"] if row["policy"] == policy}


def test_two_results_what_was_set_and_what_came_of_it(folder):
    found = compare(str(folder / "a"), str(folder / "b"))
    settings = {one["key"]: (one["a"], one["b"]) for one in found["settings"]}
    assert settings["lsa.budget"] == ("10%", "20%")
    assert settings["hardware.name"] == ("h100", "h200")
    assert not any(key.startswith(("trace", "full.")) for key in settings)
    reports = [json.loads((folder / side / "report.json").read_text()) for side in "ab"]
    rows = [{row["policy"]: row for row in report["policies"]} for report in reports]
    got = rows_of(found, "lsa")["mass_kept"]
    assert (got["a"], got["b"]) == tuple(side["lsa"]["mass_kept"] for side in rows)
    assert got["change"] == got["b"] - got["a"]
    assert got["error"] == "paired"
    independent = math.hypot(*(side["lsa"]["ci95"]["mass_kept"]["half_width"] for side in rows))
    assert 0 < got["half_width"] != pytest.approx(independent)
    fit = rows_of(found, "full")["max_requests"]
    assert fit["better"] is True and fit["ratio"] == pytest.approx(fit["b"] / fit["a"])
    assert rows_of(found, "full")["mass_kept"]["change"] == 0


def test_a_small_change_is_within_error_and_a_large_one_is_not():
    near = compare("lsa:budget=25%", "lsa-history:budget=25%", "32k")["rows"]
    far = compare("recency:budget=2%", "h2o:budget=40%", "32k")["rows"]
    assert near[0]["figure"] == far[0]["figure"] == "mass_kept"
    assert (near[0]["beyond_error"], near[0]["better"]) == (False, None)
    assert (far[0]["beyond_error"], far[0]["better"]) == (True, True)


def test_two_policies_at_each_budget_with_the_runs_own_paired_difference():
    done = fmsim_here("run", "32k", "-p", "h2o", "-p", "lsa", "--json")
    told = {
        f"{row['policy']} -> {row['other']}": row
        for row in json.loads(done.stdout)["differences"]
        if row["figure"] == "mass_kept"
    }
    found = compare("h2o", "lsa", "32k")
    rows = {row["policy"]: row for row in found["rows"] if row["figure"] == "mass_kept"}
    assert list(rows) == list(told) and len(rows) == 2  # one a budget
    for pair, row in rows.items():
        assert row["change"] == pytest.approx(-told[pair]["difference"])
        assert row["half_width"] == pytest.approx(told[pair]["half_width"])
    assert (found["a"], found["b"]) == ("h2o", "lsa")


def test_a_name_is_a_label_before_it_is_a_policy_and_a_budget_too_small_is_left_out():
    found = compare("lru held", "lru", "32k")
    assert {row["policy"] for row in found["rows"]} == {"lru held 40% gpu -> lru 40% gpu"}


def test_scenarios_with_other_traces_have_independent_errors():
    found = compare("32k", "128k", overrides=["policies=[full, {policy: lsa, budget: 10%}]"])
    got = rows_of(found, "lsa")["mass_kept"]
    assert got["error"] == "independent" and got["half_width"] > 0
    assert {"key": "trace.prompt_tokens", "a": 32768, "b": 128000} in found["settings"]


def test_two_servers():
    found = compare("serve", "serve", overrides=["workload.duration_s=5", "policies=[full]"])
    assert {row["figure"] for row in found["rows"]} >= {"held", "ttft_s.p95", "goodput_per_s"}
    assert not found["settings"] and all(row["change"] == 0 for row in found["rows"])


def test_a_factor_within_a_percent_is_told_in_percent():
    row = {
        "policy": "a -> b",
        "figure": "decode_tokens_per_s",
        "a": 1000.0,
        "b": 1004.5,
        "unit": "",
    }
    row |= {"error": "simulated", "half_width": None, "beyond_error": True, "better": True}
    shown = comparison.table(
        [row | {"change": 1, "ratio": ratio} for ratio in (1.0045, 0.991, 1.25)]
    )
    assert [cells[4] for cells in shown.rows] == ["+0.45%", "-0.90%", "x 1.25"]


@pytest.mark.parametrize("width", (80, 100, 120))
def test_the_table_fits(folder, width, capsys):
    found = compare(str(folder / "a"), str(folder / "b"))
    comparison.show(found, View(width))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert len({len(line) for line in lines if line[:1] in "┏┃┡│├└"}) == 1
    comparison.show(found, View(width, ("change",)))
    heads = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("┃"))
    assert heads.replace("┃", " ").split() == ["policy", "figure", "change"]


@pytest.mark.parametrize(
    "given, says",
    [
        (("lru", "lsaa"), "no policy named 'lsaa'; did you mean 'lsa'?"),
        (("32k", "lsa"), "lsa is neither a folder of `fmsim run --out` nor a scenario"),
        (("32k", "serve"), "only one of 32k and serve has a workload"),
        (("lru:budget=2x topk", "h2o", "--scenario", "32k"), "have no budget in common"),
    ],
)
def test_what_cannot_be_compared_is_told(given, says):
    done = fmsim_here("compare", *given)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1

"""`import fmsim`: its public names, and that a path, a name or an object will do."""

import doctest
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from command import RUN_FIELDS, fmsim_here
from made_trace import make_trace

import fmsim
from fmsim import FmsimError, Policy, api
from fmsim.geometry import PRESETS
from fmsim.hw import load_hardware
from fmsim.policies import registry
from fmsim.trace import write

ROOT = Path(__file__).parents[1]
PLUGIN = '''
from fmsim import Policy, PolicyParams
from pydantic import Field


class Oldest(Policy):
    """Keeps the oldest."""

    name, action, evidence, decision_scope = "oldest", "hierarchical", "position", "step"

    class Params(PolicyParams):
        from_entry: int = Field(0, ge=0, description="older ones are not kept")

    def worth(self, step, pages):
        worth = self.ctx.xp.astype(-pages, self.ctx.xp.float32)
        return self.ctx.xp.where(pages < self.params.from_entry, -1e9, worth)


class Broken(Policy):
    """Has no name."""
'''


class Newest(Policy):
    """Keeps the newest."""

    name, action, evidence, decision_scope = "newest", "hierarchical", "position", "step"

    def worth(self, step, pages):
        return self.ctx.xp.astype(pages, self.ctx.xp.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("api")
    write(path / "small.safetensors", make_trace())
    (path / "small.yaml").write_text(
        "name: small\ntrace: small.safetensors\npolicies: [full, lru]\n"
    )
    (path / "oldest.py").write_text(PLUGIN)
    return path


def run_json(folder, *arguments):
    done = fmsim_here("run", "small.yaml", "--json", "-q", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["policies"]


def test_public_names_are_there_and_are_no_rooms():
    for name in fmsim.__all__:
        assert getattr(fmsim, name).__doc__, name
    rooms = {path.stem for path in (ROOT / "fmsim").iterdir()}
    assert not rooms & set(fmsim.__all__)
    assert set(fmsim.__all__) <= set(dir(fmsim)) and (ROOT / "fmsim/py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fmsim.nonsense


def test_the_names_of_a_type_checker_are_those_of_a_run():
    code = (
        "from fmsim import *; import fmsim, sys; print('torch' in sys.modules, len(fmsim.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", str(len(fmsim.__all__))], done.stderr


@pytest.mark.parametrize(
    "function", [n for n in fmsim.__all__ if hasattr(api, n) and n[0].islower()]
)
def test_every_function_has_an_example(function):
    assert ">>> " in getattr(api, function).__doc__


def test_the_examples_print_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    for module in (api, fmsim):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


def test_a_policy_may_be_given_in_any_way(folder):
    trace = fmsim.load_trace(folder / "small.safetensors")
    ways = (
        "lru:budget=5%",
        {"policy": "lru", "budget": "5%"},
        fmsim.build_policy("lru", budget="5%"),
        registry.get("lru")(budget="5%"),
    )
    first, *others = [fmsim.replay_trace(trace, way, max_steps=40) for way in ways]
    assert first.params["budget"] == "5%" and first.n_steps == 40
    for other in others:
        assert np.array_equal(first.hit, other.hit)
    by_path = fmsim.replay_trace(str(folder / "small.safetensors"), Newest, max_steps=40)
    assert by_path.policy == "newest" and by_path.hit.shape == first.hit.shape


def test_names_and_objects_of_models_and_hardware_are_alike(folder):
    ledger = fmsim.replay_trace(folder / "small.safetensors", "lru", max_steps=40)
    named = fmsim.row(ledger, fmsim.simulate_decode(ledger, batch=2))
    how = {"model": PRESETS["v4-flash"], "hardware": load_hardware("h100")}
    made = fmsim.row(ledger, fmsim.simulate_decode(ledger, batch=2, **how), **how)
    # what was answered is known of a scenario's model, not of a ledger
    assert named == made and list(named) == [name for name in RUN_FIELDS if name != "answers_kept"]
    late = fmsim.simulate_decode(ledger)
    assert fmsim.row(ledger, late.after(1))["mass_kept"] == 1  # an engine's, without its first step
    other = fmsim.replay_trace(folder / "small.safetensors", "full", max_steps=40)
    shorter = fmsim.replay_trace(folder / "small.safetensors", "lru", max_steps=39)
    for call, says in (
        (lambda: fmsim.row(ledger, late, hardware="h200"), "hardware: .* of h100, not h200"),
        (lambda: fmsim.row(other, late), "policy: the timeline is of lru, not full"),
        (lambda: fmsim.row(shorter, late), "timeline: has 40 steps, the ledger 39"),
        (lambda: fmsim.row(ledger, fmsim.simulate_decode(shorter)), "has 39 steps, the ledger 40"),
        (lambda: fmsim.row(ledger, late.after(2)), "has 38 steps, the ledger 40"),
    ):
        with pytest.raises(FmsimError, match=says):
            call()
    with pytest.raises(FmsimError, match="did you mean 'v4-flash'"):
        fmsim.replay_trace(folder / "small.safetensors", "lru", model="v4-flsh")


def test_misses_and_hit_rate_are_those_of_the_ledger(folder):
    report = fmsim.run_scenario(folder / "small.yaml", "lru")
    [run] = report.runs
    hit, accessed = run.ledger.hit.sum(axis=0), run.ledger.accessed.sum(axis=0)
    assert run.row["hit_rate"] == pytest.approx(hit.sum() / accessed.sum())
    layers = PRESETS["v4-flash"].n_csa // run.ledger.n_layers
    assert run.row["misses"] == layers * (accessed - hit).sum() > 0
    [full] = fmsim.run_scenario(folder / "small.yaml", "full").runs
    assert (full.row["hit_rate"], full.row["misses"]) == (1, 0)


def test_a_scenario_may_be_made_in_python(folder):
    keys = {
        "name": "made",
        "trace": folder / "small.safetensors",
        "policies": ["lru", Newest, {"policy": Newest, "label": "wide", "budget": "30%"}],
    }
    report = fmsim.run_scenario(
        keys, overrides={"policies.newest.budget": "5%", "batch": np.int64(2)}
    )
    assert [run.label for run in report.runs] == ["lru", "newest", "wide"]
    assert [run.ledger.params["budget"] for run in report.runs] == ["2x topk", "5%", "30%"]
    scenario = fmsim.Scenario.model_validate(keys)
    again = fmsim.run_scenario(scenario, ["wide", "full"])
    assert [run.label for run in again.runs] == ["wide", "full"]
    assert keys["policies"][2] == {"policy": Newest, "label": "wide", "budget": "30%"}
    with pytest.raises(FmsimError, match=r"^scenario: batch: Input should be"):
        fmsim.run_scenario(keys | {"batch": 0})


def test_frames_hold_the_figures(folder, monkeypatch):
    report = fmsim.run_scenario(folder / "small.yaml", ["lru", Newest])
    [lru, newest] = report.runs
    assert len(repr((report, lru, lru.ledger, lru.timeline))) < 400  # not the arrays
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    rows = report.to_frame()
    assert [row["policy"] for row in rows] == ["lru", "newest"]
    assert rows[0]["step_s_p99"] == lru.row["step_s"]["p99"] and rows[0]["exact"] is True
    steps, layers = lru.ledger.to_frame(), lru.ledger.to_frame(by="layer")
    assert len(steps) == lru.ledger.n_steps
    assert len(layers) == lru.ledger.n_steps * lru.ledger.n_layers
    for key in ("hit", "demand_loads", "misses"):
        assert sum(row[key] for row in steps) == sum(row[key] for row in layers)
    assert sum(row["hit"] for row in steps) == lru.ledger.hit.sum()
    with pytest.raises(FmsimError, match="'step' or 'layer'"):
        lru.ledger.to_frame(by="token")
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    assert isinstance(report.to_frame(), pandas.DataFrame)
    assert newest.ledger.to_frame()["misses"].sum() == sum(
        (newest.ledger.accessed - newest.ledger.hit).ravel()
    )


def test_a_report_shows_itself_and_escapes_what_it_shows(folder):
    label = "<script>alert(1)</script>"
    policies = [{"policy": "lru", "label": label}]
    html = fmsim.run_scenario(folder / "small.yaml", policies)._repr_html_()
    seen = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append(tag)
    parser.feed(html)
    assert "script" not in seen and seen.count("tr") == 2 and "&lt;script&gt;" in html


def test_a_sweep_runs_what_has_no_row_yet(folder):
    out = folder / "rows.jsonl"
    told = []
    grid = {"batch": np.arange(1, 3), "policies.*.budget": ["5%", "10%"]}
    sweep = lambda policies: fmsim.sweep_scenario(
        folder / "small.yaml", grid, policies, out=out, progress=lambda *event: told.append(event)
    )
    rows = sweep(["lru"])
    assert len(rows) == 4 and told[0][1:] == (0, 4) and told[-1][1:] == (4, 4)
    told.clear()
    both = sweep(["lru", Newest])
    assert told[0][1:] == (0, 8) and told[-1][1:] == (4, 8)  # four of them stand there
    assert [row["policy"] for row in both] == ["lru"] * 4 + ["newest"] * 4
    assert {row["set.policies.*.budget"] for row in both} == {"5%", "10%"}
    assert not any("error" in row for row in both)


def test_a_server_needs_a_workload(folder):
    with pytest.raises(FmsimError, match="the scenario has none"):
        fmsim.simulate_server(folder / "small.yaml")


# a file and a class, at the command line


def test_a_policy_may_be_a_file_and_a_class(folder):
    file = "oldest.py:Oldest"
    rows = run_json(
        folder,
        *("-p", "lru", "-p", file, "-p", f"{file}:from_entry=3,budget=5%"),
        *("--set", "policies.oldest.budget=20%"),
    )
    assert [row["policy"] for row in rows] == ["lru", "oldest", "oldest:from_entry=3,budget=5%"]
    assert rows[1]["hit_rate"] > rows[2]["hit_rate"]
    shown = fmsim_here("policy", "show", file, folder=folder)
    assert "oldest" in shown.stdout and "from_entry" in shown.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("sweep", "small.yaml", "-g", "batch=1,2", "--out", "s.jsonl", "-j", "2"),
        ("tune", "small.yaml", "-n", "2", "--floor", "0", "-r", "from_entry=0..9"),
        ("plan", "small.yaml"),
    ],
    ids=lambda command: command[0],
)
def test_other_commands_take_a_file_and_a_class_too(folder, command):
    done = fmsim_here(*command, "-p", "oldest.py:Oldest", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert '"oldest"' in done.stdout or command[0] == "tune"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "oldest.py"], "policy oldest.py: write oldest.py:CLASS; there is oldest.py:Oldest"),
        (["-p", "oldest.py:Old"], "there is oldest.py:Oldest"),
        (["-p", "oldest.py:Broken"], "policy oldest.py:Broken: it has no `name`"),
        (["-p", "none.py:Oldest"], "policy none.py:Oldest: no such file: none.py"),
        (["-p", "oldest.py:Oldest:from_entry=-1"], "--policy oldest.py:Oldest:from_entry=-1"),
        (["-p", "oldest.py:Oldest:fast"], "'fast' is no key=value"),
        (["-p", "lru", "--set", "policies.oldest.budget=5%"], "has no policy 'oldest'"),
        (["-p", "wrong.py:Any"], "NameError: name 'nonsense' is not defined (wrong.py, line 1)"),
    ],
)
def test_a_mistake_with_a_file_is_told(folder, arguments, says):
    (folder / "wrong.py").write_text("nonsense\n")
    done = fmsim_here("run", "small.yaml", *arguments, folder=folder)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_reading_a_scenario_runs_no_code(folder):
    (folder / "code.yaml").write_text(
        "name: code\ntrace: small.safetensors\npolicies:\n  - full\n  - oldest.py:Oldest\n"
    )
    done = fmsim_here("run", "code.yaml", folder=folder)
    assert done.returncode == 2 and "code.yaml, line 5: policies.1" in done.stderr


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fmsim.run_scenario(5), "scenario: give a file.*not 5"),
        (lambda: fmsim.run_scenario("32k", 5), "policies: give a policy or several, not 5"),
        (lambda: fmsim.replay_trace("any", "lru", max_steps=0), "max_steps: give a whole number"),
        (lambda: fmsim.simulate_decode(None, batch=1.5), "batch: .* at least 1, not 1.5"),
        (lambda: fmsim.plan_capacity("32k", context_tokens=-1), "context_tokens: give a whole"),
        (lambda: fmsim.plan_capacity("32k", tpot_s=float("nan")), "tpot_s: give seconds above"),
        (lambda: fmsim.plan_capacity("32k", usd_per_gpu_hour=float("inf")), "give dollars from 0"),
        (
            lambda: fmsim.run_scenario("32k", timeout_s=float("nan")),
            "timeout_s: give seconds above",
        ),
        (lambda: fmsim.plan_capacity("32k", ["full"], hardware="h10"), "no hardware preset 'h10'"),
        (lambda: fmsim.plan_capacity("32k", usd_per_gpu_hour="3"), "give dollars from 0"),
        (lambda: fmsim.plan_capacity("32k", tpot_s="50ms"), "tpot_s: give seconds above.*'50ms'"),
        (lambda: fmsim.run_scenario("32k", timeout_s="3"), "timeout_s: give seconds above"),
        (lambda: fmsim.run_scenario("32k", timeout_s=None), "timeout_s: give seconds above"),
        (lambda: fmsim.run_scenario("32k", overrides="batch=2"), "overrides: give a mapping"),
        (lambda: fmsim.run_scenario("32k", overrides=[5]), "overrides: give a mapping"),
        (
            lambda: fmsim.run_scenario("32k", overrides={"batch": {5}}),
            r"^batch: give a number.*\{5\}",
        ),
        (
            lambda: fmsim.run_scenario({"name": "a", "trace": "any", "policies": None}),
            "policies: give a list.*not None",
        ),
        (
            lambda: fmsim.run_scenario(api.ScenarioFile("32k"), ["lru"]),
            "scenario: a ScenarioFile has its policies and overrides",
        ),
        (
            lambda: fmsim.plan_capacity(api.ScenarioFile("32k"), overrides={"batch": 64}),
            "scenario: a ScenarioFile has its policies and overrides",
        ),
        (
            lambda: fmsim.sweep_scenario(api.ScenarioFile("32k"), {"batch": [1]}),
            "scenario: give a file.*not <.*ScenarioFile",
        ),
        (lambda: fmsim.sweep_scenario("32k", {"batch": []}, ["full"]), "grid: batch has no values"),
        (lambda: fmsim.sweep_scenario("32k", {"batch": [1]}, jobs=-1), "jobs: give a whole number"),
        (lambda: fmsim.sweep_scenario("32k", {"batch": [1]}, max_runs=0), "max_runs: give a whole"),
        (lambda: fmsim.sweep_scenario("32k", {"batch": 3}), "grid: batch needs a list.*not 3"),
        (lambda: fmsim.sweep_scenario("32k", {"hardware": "h100"}), "grid: hardware needs a list"),
        (lambda: fmsim.sweep_scenario("32k", 3), "grid: give a mapping"),
    ],
)
def test_a_wrong_argument_is_told_by_its_name(call, says):
    with pytest.raises(FmsimError, match=says):
        call()

"""Scenarios by name, and those that `fmsim init` writes."""

import json
import re
from pathlib import Path

import pytest
from command import fmsim_here

from fmsim.errors import FmsimError
from fmsim.experiments import scenarios
from fmsim.experiments.scenarios import Wish
from fmsim.scenario import ScenarioFile, schema, shipped

ROOT = Path(__file__).parents[2]


def test_a_name_is_a_carried_scenario_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ScenarioFile("32k")
    assert file.path == ROOT / "scenarios" / "32k.yaml"
    assert file.trace_file() == ROOT / "traces" / "nano-32k-needles.safetensors"
    assert ScenarioFile("paper/h20-512k").scenario.hardware == "h20"


def test_a_file_of_that_name_with_its_ending_is_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("32k.yaml").write_text("name: mine\ntrace: nano-32k-needles\npolicies: [full]\n")
    assert ScenarioFile("32k.yaml").scenario.name == "mine"


@pytest.mark.parametrize(
    "given, meant", [("502k", "500k"), ("scenarios/500k.yaml", "500k"), ("servee", "serve")]
)
def test_a_scenario_that_is_not_there_is_guessed(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FmsimError, match=f"no such scenario file; did you mean {meant}, which"):
        ScenarioFile(given)


@pytest.mark.parametrize("name", shipped.scenarios())
def test_what_show_prints_is_the_same_scenario_and_runs_elsewhere(name, tmp_path):
    text = scenarios.text_of(name)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    carried, mine = ScenarioFile(name), ScenarioFile(path)
    assert mine.trace_file() == carried.trace_file()
    assert mine.scenario.policies == carried.scenario.policies


def test_the_list_has_every_scenario_as_a_table_and_as_json():
    found = json.loads(fmsim_here("scenario", "list", "--json").stdout)["scenarios"]
    names = [path.stem for path in (ROOT / "scenarios").rglob("*.yaml")]
    assert sorted(row["name"].rpartition("/")[2] for row in found) == sorted(names)
    assert all(row["name"] in fmsim_here("scenario", "list").stdout for row in found)


@pytest.mark.parametrize(
    "model, hardware, context, trace",
    [
        ("v4-flash", "h100", 30_000, "nano-32k-needles"),
        ("v4-pro", "b200", 400_000, "nano-500k-needles"),
        ("glm-5.2", "h200", 8_000, "nano-32k-needles"),
        ("minimax-m3", "b200", 128_000, "nano-32k-needles"),
    ],
)
def test_a_written_scenario_runs(model, hardware, context, trace, tmp_path):
    path = tmp_path / "mine.yaml"
    said = scenarios.write(path, Wish(model, hardware, context))
    assert said.startswith(f"{trace}, ")
    done = fmsim_here("run", path, "-p", "full", "--json")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)["scenario"]
    assert (about["model"]["name"], about["hardware"]["name"]) == (model, hardware)
    assert about["trace"]["file"].endswith(f"{trace}.safetensors")


def test_its_workload_runs_when_the_marks_are_taken_away(tmp_path):
    path = tmp_path / "mine.yaml"
    scenarios.write(path, Wish("v4-flash", "h100", 32_768))
    head, mark, rest = path.read_text().partition("# workload:")
    path.write_text(head + re.sub("^# ", "", mark + rest, flags=re.MULTILINE))
    override = ("--set", "workload.duration_s=5")
    done = fmsim_here("run", path, "-p", "full", *override, "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--model", "v4-pro"], "v4-pro does not fit H100 SXM 80 GB"),
        (["--model", "v4.1-flash"], "a trace has entries of one length"),
        (["--hardware", "h101"], "no hardware preset 'h101'; did you mean 'h100'?"),
        (["--context", "much"], "--context much: give a number of tokens"),
    ],
)
def test_what_could_not_run_is_not_written(arguments, line, tmp_path):
    done = fmsim_here("init", "mine.yaml", *arguments, folder=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) != (0, [])
    assert line in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays_unless_forced(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    done = fmsim_here("init", path)
    assert "is there already; name another, or give --force" in done.stderr
    assert path.read_text() == "mine"
    assert fmsim_here("init", path, "--force", "-c", "32K").returncode == 0
    assert ScenarioFile(path).scenario.trace.stem == "nano-32k-needles"


def test_the_schema_that_the_repositorys_scenarios_name_is_the_one_printed():
    found = json.loads(fmsim_here("schema").stdout)
    assert found == json.loads((ROOT / "scenarios" / schema.FILE).read_text())
    for path in (ROOT / "scenarios").rglob("*.yaml"):
        first = path.read_text().partition("\n")[0]
        named = first.removeprefix("# yaml-language-server: $schema=")
        assert (path.parent / named).resolve() == ROOT / "scenarios" / schema.FILE

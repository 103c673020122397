"""*answers kept* of `fmsim run`: what was measured stands beside the replay where model, length,
policy and budget are the same, and nowhere else.
"""

import pytest
from made_trace import make_trace

from fmsim.experiments import measured_answers as measured
from fmsim.experiments.results.folder import Results
from fmsim.experiments.run import run_scenario
from fmsim.policies import registry
from fmsim.report.tables import decode as table
from fmsim.scenario import ScenarioFile
from fmsim.trace import ModelInfo, write

MODEL = ModelInfo(name="tiny", sha256="ab" * 32, dtype="float32")
PROMPT = 4096  # tokens of the made trace
SCENARIO = """\
name: small
trace: small.safetensors
budgets: [60% gpu, 80% gpu]
policies: [full, recency, {policy: lru, cadence: 64, on_miss: mask}]
"""
HELD = {"policy": "lru", "cadence": 64, "on_miss": "mask"}


def row(spec, kept, tokens=PROMPT, half_width=0.02):
    """As `benchmarks/accuracy.sh` leaves it."""
    identity = measured.identity(registry.build(spec))
    return identity | {"tokens": tokens, "kept": kept, "half_width": half_width, "contexts": 9}


TABLE = {
    "about": {
        "command": "c",
        "date": "2026-11-28T22:00:00+00:00",
        "device": "a GPU",
        "geometry": "v4-flash",
        "model": {"name": "tiny", "sha256": MODEL.sha256},
        "families": ["niah_single"],
    },
    "rows": [
        row({"policy": "full"}, 1.0, half_width=0.0),
        row(HELD | {"budget": "60% gpu"}, 0.9),
        row(HELD | {"budget": "60% gpu"}, 0.5, tokens=2 * PROMPT),
        row({"policy": "recency", "budget": "60%"}, 0.8),  # another accounting
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenario")
    trace = make_trace()
    write(path / "small.safetensors", trace.with_header(model=MODEL))
    (path / "small.yaml").write_text(SCENARIO)
    return path


@pytest.fixture
def shipped(monkeypatch):
    """Sets what was measured."""
    return lambda found: monkeypatch.setattr(measured, "_table", lambda: found)


def run(folder, *overrides):
    report = run_scenario(ScenarioFile(folder / "small.yaml", list(overrides)))
    return report, {one.label: one.row["answers_kept"] for one in report.runs}


def test_only_the_same_model_length_policy_and_budget_has_answers(folder, shipped):
    shipped(TABLE)
    report, found = run(folder)
    assert found.pop("full") == {"value": 1.0, "half_width": 0.0, "contexts": 9, "tokens": PROMPT}
    assert found.pop("lru 60% gpu")["value"] == 0.9
    assert len(found) == 3 and not any(found.values())
    assert report.scenario["answers"] == TABLE["about"]
    assert report.scenario["measured"] == ["answers_kept"]
    assert report.flat_rows()[0]["answers_kept_value"] == 1.0


def test_they_stand_in_the_table_and_are_read_back(folder, shipped, tmp_path):
    shipped(TABLE)
    report, _ = run(folder)
    report.save(tmp_path)
    read = Results.load(tmp_path).report
    lines = table.markdown(read).splitlines()
    place = [cell.strip() for cell in lines[0].split("|")].index("answers kept")
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:] if "---" not in line]
    shown = [(row[1], row[place]) for row in cells]
    assert ("full", "100.0%") in shown and ("lru", "90.0% ±2.0") in shown
    assert ("lru", "-") in shown and ("recency", "-") in shown
    assert any("tiny" in note and "a GPU" in note for note in table.notes(read["scenario"]))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"about": TABLE["about"] | {"model": {"name": "tiny", "sha256": "cd" * 32}}},
        {"about": TABLE["about"] | {"geometry": "v4-pro"}},
        {"rows": [each | {"tokens": 2 * PROMPT} for each in TABLE["rows"]]},
    ],
    ids=["none", "other weights", "bytes of another model", "another length"],
)
def test_without_such_answers_there_is_no_column(folder, shipped, change):
    shipped(TABLE | change)
    report, found = run(folder)
    assert not any(found.values()) and "answers" not in report.scenario
    assert "answers kept" not in table.markdown(report.as_json())
    assert not any("answers kept" in note for note in table.notes(report.scenario))

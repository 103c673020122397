"""A scenario's mistakes are told by file, line, key and fix."""

import pytest

from fmsim.errors import FmsimError
from fmsim.scenario import ScenarioFile

GOOD = """\
name: small
trace: traces/small.safetensors
hardware: h200
policies:
  - full
  - {policy: lru, budget: 20%}
  - policy: lru
    label: lru-wide
    budget: 50%
"""


@pytest.fixture
def load(tmp_path):
    def write(text=GOOD, *overrides):
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return ScenarioFile(path, overrides)

    return write


def test_a_file_becomes_a_scenario(load, tmp_path):
    file = load()
    assert (file.scenario.hardware, file.scenario.model, file.scenario.batch) == (
        "h200",
        "v4-flash",
        1,
    )
    assert [spec.label for spec in file.scenario.policies] == ["full", "lru", "lru-wide"]
    assert file.scenario.policies[2].params == {"budget": "50%"}
    assert file.file(file.scenario.trace) == tmp_path / "traces/small.safetensors"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            GOOD.replace("hardware", "hardwre"),
            r"small.yaml, line 3: hardwre: unknown key; did you mean 'hardware'\?",
        ),
        (GOOD + "zebra: 1\n", r"line 10: zebra: unknown key; known are name, "),
        (GOOD.replace("name: small\n", ""), r"small.yaml: the key 'name' is missing"),
        (GOOD + "batch: none\n", r"line 10: batch: .*valid integer.*, not 'none'"),
        (GOOD + "batch: 0\n", r"line 10: batch: .*greater than or equal to 1"),
        (GOOD.replace("- full", "- 7"), r"line 5: policies.0: give a policy's name, .*not 7"),
        (
            GOOD.replace("    label: lru-wide\n", ""),
            r"line 4: policies: lru stands there twice; give each a 'label'",
        ),
        (GOOD.replace("policies:\n", "policies: [\n"), r"small.yaml, line \d+: not valid YAML"),
        ("- a\n", r"a scenario is a mapping of keys"),
    ],
)
def test_a_mistake_names_its_line_and_the_fix(load, text, says):
    with pytest.raises(FmsimError, match=says):
        load(text)


def test_overrides_reach_into_policies_by_label(load):
    file = load(
        GOOD,
        "batch=8",
        "policies.lru-wide.budget=75%",
        "policies.full.granularity=4",
        "policies.1.cadence=64",
    )
    assert file.scenario.batch == 8
    assert [spec.params for spec in file.scenario.policies] == [
        {"granularity": 4},
        {"budget": "20%", "cadence": 64},
        {"budget": "75%"},
    ]


def test_an_overridden_trace_is_relative_to_the_working_directory(load):
    file = load(GOOD, "trace=elsewhere/other.safetensors")
    assert str(file.file(file.scenario.trace)) == "elsewhere/other.safetensors"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch", "--set batch: write key=value"),
        ("policies.mru.budget=1", "--set policies.mru.budget=1: the scenario has no policy 'mru'"),
        ("batch=many", "--set batch=many: batch: "),
        ("hardwre=h100", r"--set hardwre=h100: hardwre: unknown key; did you mean 'hardware'\?"),
        ("name.first=x", "--set name.first=x: 'name' is a value"),
        ("batch=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(load, override, says):
    with pytest.raises(FmsimError, match=says.replace("(", r"\(")):
        load(GOOD, override)


def test_a_missing_file_suggests_the_nearest(load, tmp_path):
    load()
    with pytest.raises(
        FmsimError, match=r"smal.yaml: no such scenario file; did you mean .*small.yaml\?"
    ):
        ScenarioFile(tmp_path / "smal.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FmsimError, match="cannot be read as UTF-8 text"):
        ScenarioFile(tmp_path / "binary.yaml")

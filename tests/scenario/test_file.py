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
    file = load(GOOD, "workload={kind: file, file: asked.jsonl}")
    assert str(file.file(file.scenario.workload.file)) == "asked.jsonl"
    for written in ("./other.safetensors", "'other.safetensors'"):
        file = load(GOOD, f"trace={written}")
        assert str(file.file(file.scenario.trace)) == "other.safetensors"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch", "--set batch: write key=value"),
        ("policies.mru.budget=1", "--set policies.mru.budget=1: the scenario has no policy 'mru'"),
        ("batch=many", "--set batch=many: batch: "),
        ("hardwre=h100", "--set hardwre=h100: hardwre: unknown key; did you mean 'hardware'?"),
        ("name.first=x", "--set name.first=x: 'name' is a value"),
        ("batch=[", "not valid YAML"),
        ("policies=[]", "policies: give one or more, not []"),
        ("policies=full", "policies: give a list, such as [a, b], not 'full'"),
    ],
)
def test_a_wrong_override_is_named(load, override, says):
    with pytest.raises(FmsimError) as error:
        load(GOOD, override)
    assert says in str(error.value)


def test_a_missing_file_suggests_the_nearest(load, tmp_path):
    load()
    with pytest.raises(
        FmsimError, match=r"smal.yaml: no such scenario file; did you mean .*small.yaml\?"
    ):
        ScenarioFile(tmp_path / "smal.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FmsimError, match="cannot be read as UTF-8 text"):
        ScenarioFile(tmp_path / "binary.yaml")


BUDGETS = {
    "name": "it",
    "trace": "t.safetensors",
    "budgets": ["10% gpu", "0.25 GiB gpu"],
    "policies": [
        "full",
        "lru",
        {"policy": "lru", "label": "own", "budget": "2x topk"},
        {"policy": "lsa", "kmax": 100},
    ],
}


def runs_of(source, **options):
    file = ScenarioFile(source, **options)
    return [(spec.label, spec.entry, spec.params.get("budget")) for spec in file.selected]


def test_policies_without_a_budget_of_their_own_run_at_each_of_the_scenarios():
    assert runs_of(BUDGETS) == [
        ("full", "full", None),
        ("lru 10% gpu", "lru", "10% gpu"),
        ("own", "own", "2x topk"),
        ("lsa", "lsa", None),
        ("lru 256 MiB gpu", "lru", "256 MiB gpu"),
    ]
    # one budget needs no name, a policy of --policy is one of the scenario's, and --set gives it
    # a budget of its own
    assert runs_of(BUDGETS | {"budgets": "10%"})[1] == ("lru", "lru", "10%")
    assert runs_of(BUDGETS, policies=["lfu"]) == [
        ("lfu 10% gpu", "lfu", "10% gpu"),
        ("lfu 256 MiB gpu", "lfu", "256 MiB gpu"),
    ]
    assert runs_of(BUDGETS, policies=["lru"], overrides=["policies.lru.budget=5%"]) == [
        ("lru", "lru", "5%"),
        ("own", "own", "2x topk"),
    ]
    assert runs_of(BUDGETS, policies=["lru"], overrides=["budgets=[7%]"])[0][2] == "7%"
    # a scenario that was read gives the same again
    again = ScenarioFile(BUDGETS).scenario
    assert runs_of(again) == runs_of(BUDGETS)


@pytest.mark.parametrize(
    ("budgets", "says"),
    [
        (["10% gpu", "10%gpu"], "budgets: a budget stands there twice"),
        (["much"], "budget 'much' is not understood; write e.g. '12.5% gpu'"),
        (7, "budgets"),
    ],
)
def test_budgets_that_cannot_be_are_refused(budgets, says):
    with pytest.raises(FmsimError, match=says):
        ScenarioFile(BUDGETS | {"budgets": budgets})

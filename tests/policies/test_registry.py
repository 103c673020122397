"""Names, files and parameters of policies as text, and back."""

import re
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest

from fmsim.errors import FmsimError, FmsimWarning
from fmsim.policies import registry
from fmsim.policies.base import Policy, PolicyParams
from fmsim.policies.budget import Budget
from fmsim.policies.lru import LRU


@pytest.mark.parametrize(
    ("text", "name", "params"),
    [
        ("lru", "lru", {}),
        ("lru:budget=10%", "lru", {"budget": "10%"}),
        ("lru: budget = 10% , granularity=4", "lru", {"budget": "10%", "granularity": 4}),
        ("lsa:layers=[1, 2],stale=false", "lsa", {"layers": [1, 2], "stale": False}),
        ("a/b.py:Mine", "a/b.py:Mine", {}),
        ("a/b.py:Mine:k=3,weight=0.5", "a/b.py:Mine", {"k": 3, "weight": 0.5}),
        ("a/b.py", "a/b.py", {}),
    ],
)
def test_a_policy_on_the_command_line(text, name, params):
    assert registry.split(text) == (name, params)


@pytest.mark.parametrize("text", ["lru:10%", "lru:=3", "lru:budget", "lru:budget=1%,x"])
def test_what_is_no_parameter_is_told(text):
    if text == "lru:budget=1%,x":  # the value goes on to the next key
        assert registry.split(text) == ("lru", {"budget": "1%,x"})
        return
    with pytest.raises(FmsimError, match="is no key=value"):
        registry.split(text)


def test_a_file_is_named_from_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    root = Path(tmp_path).resolve()
    assert registry.absolute("own.py:Mine:k=3") == f"{root}/own.py:Mine:k=3"
    assert registry.absolute("lru") == "lru" and registry.absolute(LRU) is LRU


def test_true_and_false_are_values_of_booleans_alone():
    for annotation, takes in (
        (bool, True),
        (bool | None, True),
        (int, False),
        (float, False),
        (int | None, False),
        (Literal[1, 4], False),  # though True == 1
        (Literal[True, 4], True),
        (tuple[int, ...] | None, False),
        (Literal["a"], False),
        (str, True),  # pydantic itself refuses it
    ):
        assert registry.takes_bool(annotation) is takes, annotation


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        (Path | None, "Path | None"),
        (Literal["a", 4], "a | 4"),
        (tuple[int, ...], "tuple[int, ...]"),
        (tuple[int, ...] | None, "tuple[int, ...] | None"),
        (list[float], "list[float]"),
        (None, "None"),
        (type(None), "None"),
        (Budget, "Budget"),
    ],
)
def test_types_in_words(annotation, text):
    shown = registry.type_name(annotation)
    if annotation == tuple[int, ...] | None:
        assert shown.startswith("tuple")
    else:
        assert shown == text


def test_of_two_policies_with_one_name_the_first_is_used(monkeypatch):
    lru, mine = "fmsim.policies.lru:LRU", "elsewhere:Mine"
    points = [
        EntryPoint(name, value, registry.GROUP)
        for name, value in (("lru", lru), ("mine", mine), ("lru", "elsewhere:LRU"))
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    says = "policy 'lru' is declared twice: fmsim.policies.lru:LRU is used, elsewhere:LRU is not"
    with pytest.warns(FmsimWarning, match=says):
        found = registry._found.__wrapped__()
    assert (found["lru"].value, found["mine"].value) == (lru, mine)
    del points[2]
    with warnings.catch_warnings(action="error"):  # the same twice is no contradiction
        assert registry._found.__wrapped__() == found


def test_a_file_says_which_policies_are_in_it(tmp_path):
    path = tmp_path / "some.py"
    for text, there in (
        ("", "no policy in it"),
        ("from fmsim.policies.lru import LRU\nclass Mine(LRU): pass\n", f"{path}:Mine"),
    ):
        path.write_text(text)
        registry._module.cache_clear()
        with pytest.raises(FmsimError, match=re.escape(f"there is {there}")):
            registry.get(f"{path}:Other")


class Own(LRU):
    """One line.

    And more.
    """

    name = "own"

    class Params(PolicyParams):
        needed: int


def test_what_is_shown_of_a_policy():
    shown = registry.info(Own)
    assert (shown["name"], shown["action"], shown["decision_scope"]) == (
        "own",
        LRU.action,
        LRU.decision_scope,
    )
    assert shown["summary"] == "One line." and shown["doc"] == "One line.\n\nAnd more."
    assert shown["module"] == __name__ and registry.info("lru")["module"] == "fmsim.policies.lru"
    rows = {row["name"]: row for row in shown["parameters"]}
    assert rows["needed"] == {
        "name": "needed",
        "type": "int",
        "default": "required",
        "description": "",
    }
    assert rows["budget"]["default"] == "2x topk" and rows["budget"]["type"] == "Budget"
    assert rows["cadence"]["description"].startswith("steps between decisions")


def test_fmsims_own_and_others():
    assert registry.is_builtin(LRU) and registry.is_builtin(LRU())
    assert not registry.is_builtin(Own)
    assert registry.label_of("lru") == "lru" and registry.label_of(Own) == "own"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("lru", "cadence", True),
        ("lru", "cadence", False),
        ("lru", "granularity", True),
        ("h2o", "cadence", True),
        ("lsa", "kmax", True),
        ("lsa", "threshold", False),
        ("lsa", "layers", [0, True]),
    ],
)
def test_a_boolean_is_no_number_of_a_parameter(name, key, value):
    with pytest.raises(FmsimError, match=f"{key}: .* is no value of it; give a number"):
        registry.build({"policy": name, key: value})


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_is_a_value_of_what_is_true_or_false(value):
    assert registry.build({"policy": "lru", "prompt_history": value}).params.prompt_history is value


def test_an_object_is_built_anew_with_its_parameters_and_the_given_ones():
    first = registry.build({"policy": "lru", "budget": "7 entries", "granularity": 4})
    second = registry.build({"policy": first, "granularity": 16})
    assert second is not first and type(second) is LRU
    assert (str(second.params.budget), second.params.granularity) == ("7 entries", 16)
    for wrong in ({}, {"policy": 3}, {"policy": None}):
        with pytest.raises(FmsimError, match="the key 'policy' must name one of"):
            registry.build(wrong)
    with pytest.raises(FmsimError, match="did you mean 'lru'"):
        registry.build("lrru")


WHOLE = {
    "name": "whole",
    "action": "evict",
    "evidence": "position",
    "decision_scope": "layer",
    "worth": lambda self, step, pages: pages,
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        *(({"name": wrong}, "has no `name`") for wrong in ("", "a\nb", 3, None)),
        *(({key: None}, f"has no `{key}`") for key in ("action", "evidence", "decision_scope")),
        ({"action": "keep"}, "says `action` is 'keep'; it must be one of visibility_only, evict"),
        ({"evidence": "evict"}, "says `evidence` is 'evict'; it must be one of position"),
        ({"decision_scope": 3}, "says `decision_scope` is 3; it must be one of request, step"),
        *(({"Params": wrong}, "has `Params` that do not extend") for wrong in (int, LRU.Params())),
        ({"worth": None}, "defines no `worth`"),
    ],
)
def test_what_a_class_lacks_of_a_policy(changes, says):
    """`None` leaves it out."""
    said = {name: value for name, value in (WHOLE | changes).items() if value is not None}
    fault = registry.fault_of(type("Made", (Policy,), said))
    assert fault is None if says is None else fault.startswith(says)
    for other in (3, int, LRU()):
        assert registry.fault_of(other) == "is not a subclass of fmsim.Policy"


def test_who_needs_masses_and_whose_rows_are_apart():
    named = lambda declared: {
        name for name in registry.OWN if registry.get(name).__dict__.get(declared)
    }
    assert named("needs_mass") == {"foresight", "h2o", "oracle"}
    assert named("by_row") == {"full", "h2o", "lfu", "lru", "lruk", "recency"}
    assert named("rows_apart") == {"clock", "fifo", "hisparse", "sieve", "s3fifo"}

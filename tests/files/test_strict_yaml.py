"""YAML reads as version 1.2 says, and what would exhaust the machine is refused by its line."""

import pytest

from fmsim.errors import FmsimError
from fmsim.files import strict_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("-12", -12),
        ("12:30:45", "12:30:45"),
        ("2021-13-45", "2021-13-45"),
        ("1_000", "1_000"),
        ("1e9", 1e9),
        ("-.5", -0.5),
        ("yes", "yes"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("!!float 2", 2.0),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = strict_yaml.load(text, "x.yaml")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml, line 3: the key 'a' stands there twice, first in line 1"),
        ("'1': 1\n1: 2\n1: 3", "line 3: the key 1 stands there twice, first in line 2"),
        ("a:\n  b: .inf", "line 2: .inf is not a finite number"),
        ("a: 1e400", "line 1: '1e400' is not a finite number"),
        ("a: .nan", "not a finite number"),
        ("\n!!float abc", "line 2: 'abc' is no float, as its tag says"),
        ("!!python/object:os.system {}", "is not allowed here"),
        ("a: 1\n---\nb: 2", "line 2: holds more than one document"),
        ("&a [*a]", "the alias *a stands inside what it names"),
        ("[" * 100_000, "nested deeper than 50 levels"),
        ("? [1]\n: 2", "a key must be a word"),
        ("a: \ud800", "lone surrogate"),
        ("a: [", "not valid YAML"),
        ("\x00", "control characters are not allowed"),
    ],
)
def test_what_is_refused_is_told_with_its_line(text, says):
    with pytest.raises(FmsimError) as error:
        strict_yaml.load(text, "x.yaml")
    assert str(error.value).startswith("x.yaml") and says in str(error.value)


def test_aliases_expand_to_a_bound():
    """Nine levels of ten are 10**9 values; five of them, 111,111, are too many, four are not."""

    def levels(n):
        lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
        lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, n)]
        return "\n".join(lines)

    with pytest.raises(FmsimError, match="line 5: expands to more than 100,000 values"):
        strict_yaml.load(levels(9), "x.yaml")
    assert len(strict_yaml.load(levels(4), "x.yaml")) == 4


def test_a_lists_items_keep_their_text():
    assert strict_yaml.list_texts("5%, [0,1],'a,b', 2x topk") == ["5%", "[0,1]", "'a,b'", "2x topk"]
    with pytest.raises(FmsimError, match="^list"):
        strict_yaml.list_texts("1], [2")

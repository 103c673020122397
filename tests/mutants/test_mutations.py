"""What mutations of a source are made, and what they leave alone."""

from tests.mutants.mutations import mutations_of
from tests.mutants.near import Near
from tests.mutants.summary import summary

SOURCE = '''\
class Box:
    """Holds 3 things."""

    size: int = 2

    def room(self, used: int) -> int:
        if used < 0:
            raise ValueError(f"{used} is less than {0}")
        self.used = used
        return max(self.size - used, 0)
'''


def test_each_place_is_changed_once_and_words_never():
    found = mutations_of("box.py", SOURCE)
    changed = [
        (one.line, one.function, one.apply(SOURCE).splitlines()[one.line - 1].strip())
        for one in found
    ]
    assert sorted(changed) == [
        (4, "", "size: int = 3"),
        (7, "Box.room", "if (not used < 0):"),
        (7, "Box.room", "if (used <= 0):"),
        (7, "Box.room", "if used < 1:"),
        (9, "Box.room", "pass"),
        (10, "Box.room", "return max((self.size + used), 0)"),
        (10, "Box.room", "return max(self.size - used, 1)"),
        (10, "Box.room", "return min(self.size - used, 0)"),
    ]


def test_the_diff_says_where_and_what():
    [one] = [one for one in mutations_of("box.py", SOURCE) if one.new == "min"]
    assert one.diff(SOURCE).splitlines() == [
        "box.py:10 Box.room: another function",
        "@@ -9,2 +9,2 @@",
        "         self.used = used",
        "-        return max(self.size - used, 0)",
        "+        return min(self.size - used, 0)",
    ]


def test_a_mutation_knows_the_lines_of_its_statement_without_a_body():
    source = "def f(a):\n    if (\n        a > 1\n    ):\n        return (\n            a + 2)\n"
    lines = {one.new: one.lines for one in mutations_of("a.py", source)}
    assert lines == {
        "(not a > 1)": (2, 4),
        "(a >= 1)": (2, 4),
        "2": (2, 4),
        "(a - 2)": (5, 6),
        "3": (5, 6),
    }


def test_bytes_beyond_ascii_do_not_shift_the_place():
    source = 'NAME = "é"; LIMIT = 1.5\n'
    [one] = mutations_of("a.py", source)
    assert one.apply(source) == 'NAME = "é"; LIMIT = 3.0\n'


def test_what_no_test_could_tell_is_left_alone():
    source = "a = b.reshape(-1, 3)\nc = zip(a, b[2:], strict=True)\n"
    source += "def f():\n    warn('no', stacklevel=3)\n"
    assert [one.new for one in mutations_of("a.py", source)] == ["4", "3", "pass"]


def test_a_summary_counts_by_room_with_and_without_what_no_test_can_tell():
    states = ["killed"] * 7 + ["timed out", "survived", "survived", "unreached", "unfinished"]
    rows = [
        {
            "room": "sim" if at else "replay",
            "state": state,
            "diff": f"a.py:{at} f: constant\n-1\n+  2",
        }
        for at, state in enumerate(states)
    ]
    found = summary(rows, {"a.py:8 f: constant: 2": "not read", "a.py:1 f: constant: 2": "it died"})
    assert found["rooms"]["all"] == {
        "mutants": 11,
        "died": 8,
        "equivalent": 1,
        "died_share": 0.7273,
        "died_share_of_others": 0.8,
    }
    assert found["rooms"]["replay"]["died_share"] == 1 and found["rooms"]["sim"]["mutants"] == 10
    assert [(one["mutant"][5], one["equivalent"]) for one in found["survivors"]] == [
        ("8", "not read"),
        ("9", None),
        ("1", None),
    ]


def test_what_tests_reach_is_kept_and_said_anew_by_file(tmp_path):
    reached = {"tests/test_a.py::one": ["a.py:7", "a.py:f"], "tests/test_b.py::two": ["a.py:7"]}
    near = Near()
    tests = {test: {"seconds": 1.0, "reached": places} for test, places in reached.items()}
    near.add({"tests": tests, "shared": [], "left_out": ["tests/test_c.py"]})
    near.save(tmp_path / "all")
    again = Near()
    again.load(tmp_path / "all")
    assert (again.seconds, again.left_out) == (near.seconds, near.left_out)
    assert {place: set(tests) for place, tests in again.by_place.items()} == {
        place: set(tests) for place, tests in near.by_place.items()
    }
    newer = Near()
    newer.add(
        {
            "tests": {"tests/test_b.py::new": {"seconds": 2.0, "reached": ["a.py:f"]}},
            "shared": [],
            "left_out": [],
        }
    )
    newer.save(tmp_path / "newer")
    again.load(tmp_path / "newer")
    assert again.by_place["a.py:7"] == ["tests/test_a.py::one"]
    assert again.by_path["a.py"] == ["tests/test_a.py::one", "tests/test_b.py::new"]
    assert again.seconds == {"tests/test_a.py::one": 1.0, "tests/test_b.py::new": 2.0}

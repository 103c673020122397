"""One public name, one thing: no two classes of the package are called alike."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fmsim"

# Of the replay and the engine, while their decode loops become one: delete each with its second.
STILL_TWO = {"Outcome", "Timeline"}


def public_classes() -> dict[str, list[str]]:
    """Name -> the files that define a class of it at their top level."""
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    return places


def test_no_two_public_classes_share_a_name():
    shared = {name: paths for name, paths in public_classes().items() if len(paths) > 1}
    assert {name: paths for name, paths in shared.items() if name not in STILL_TWO} == {}


def test_every_exception_is_still_one():
    assert {name for name, paths in public_classes().items() if len(paths) > 1} == STILL_TWO

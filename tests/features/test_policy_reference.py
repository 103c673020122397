"""docs/reference/policy.md says what the code says."""

import importlib.util
import re
from pathlib import Path

from fmsim.policies.base import Context, Observation, Policy, PolicyParams

DOCS = Path(__file__).parents[2] / "docs"


def load():
    spec = importlib.util.spec_from_file_location("policy_reference", DOCS / "policy_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    made = load()
    page = made.PAGE.read_text(encoding="utf-8")
    wanted = made.with_reference(page, made.reference())
    assert page == wanted, "run python docs/generate/policy_reference.py"


def test_the_page_leaves_nothing_out():
    page = load().PAGE.read_text(encoding="utf-8")
    shown = set(re.findall(r"^ *- `(\w+)", page, flags=re.MULTILINE))
    methods = {name for name in vars(Policy) if not name.startswith("_")} - {"Params"}
    fields = {*Context.__dataclass_fields__, *Observation.__dataclass_fields__} - {"_start"}
    assert methods | fields | set(PolicyParams.model_fields) <= shown


def test_a_field_is_described_by_the_comments_beside_or_above_it():
    made = load()
    body = ["one: int  # first", "# over", "# it", "two: str = 'x'", "three: int"]
    source = "class A:\n" + "".join(f"    {line}\n" for line in body)
    [tree] = made.ast.parse(source).body
    comments, lines = made.comments_of(source), source.splitlines()
    said = [made.comment_at(node, comments, lines) for node in tree.body]
    assert said == ["first", "over it", ""]

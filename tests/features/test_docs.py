"""The documentation: short pages, links that lead somewhere, and a reference that leaves nothing
out.
"""

import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fmsim import api
from fmsim.cli.run import run
from fmsim.policies import registry
from fmsim.policies.base import Context, Observation, Policy, PolicyParams
from fmsim.scenario import ScenarioFile
from fmsim.scenario.schema import of_scenarios
from fmsim.trace import format as trace_format

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path[:0] = [str(DOCS / "generate"), str(ROOT / "benchmarks")]
import all as generated
import command_reference
import describe
import regions

PAGES = sorted(DOCS.rglob("*.md"))
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.md"))
FIRST_READ = [ROOT / "README.md", DOCS / "index.md", *sorted((DOCS / "tutorial").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_LINES = 250
MOST_OF_README = 120


def name(page):
    return str(page.relative_to(ROOT))


def read(page):
    return page.read_text(encoding="utf-8")


def by_hand(page):
    """(number, line) of what no script has written, code and tables aside."""
    inside = code = False
    for number, line in enumerate(read(page).splitlines(), 1):
        inside = inside or line.startswith("<!-- made: ")
        code = code ^ line.startswith("```")
        if not (inside or code or line.startswith(("|", "```"))):
            yield number, line
        inside = inside and not line.startswith("<!-- end of ")


def anchors(page):
    """What a link behind # may name: headings, as GitHub and mkdocs call them."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_no_page_is_longer_than_a_reader_s_patience():
    long = {name(page): len(read(page).splitlines()) for page in [*PAGES, *RESULTS]}
    assert not {page: lines for page, lines in long.items() if lines > MOST_LINES}
    assert len(read(ROOT / "README.md").splitlines()) <= MOST_OF_README


def test_what_is_read_first_fits_eighty_columns():
    wide = [
        f"{name(page)}, line {number}"
        for page in FIRST_READ
        for number, line in by_hand(page)
        if len(re.sub(r"\]\([^)]*\)", "]", line)) > 80  # a link's target is not read
    ]
    assert not wide


@pytest.mark.parametrize(
    "page", [*PAGES, *RESULTS, *sorted(ROOT.glob("*.md"))], ids=lambda page: name(page)
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.is_file(), f"{name(page)}: {link}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{name(page)}: {link}"


def test_pages_that_the_code_names_are_there():
    files = [*(ROOT / "fmsim").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    files += [*(ROOT / "scenarios").rglob("*.yaml"), ROOT / "pyproject.toml"]
    for file in files:
        for path in re.findall(r"\b(?:docs|benchmarks/results)/[\w/-]+\.md", read(file)):
            assert (ROOT / path).is_file(), f"{name(file)} names {path}"


def test_the_navigation_has_every_page():
    settings = read(ROOT / "mkdocs.yml")
    named = set(re.findall(r": ([\w/-]+\.md)$", settings, re.MULTILINE))
    assert named == {str(page.relative_to(DOCS)) for page in PAGES}


def test_the_glossary_is_sorted_and_used():
    terms = re.findall(r"^### (.*)$", read(DOCS / "glossary.md"), re.MULTILINE)
    assert len(terms) >= 22 and terms == sorted(terms, key=str.lower)
    linked = {
        link.partition("#")[2]
        for page in [*PAGES, ROOT / "README.md"]
        for link in LINK.findall(read(page))
        if "glossary.md#" in link
    }
    assert len(linked) >= 12
    for page in FIRST_READ[2:]:
        assert "glossary.md#" in read(page) or page.stem in ("plan-a-server", "run-on-a-gpu")


# The reference.


@pytest.mark.parametrize("page", generated.PAGES)
def test_a_generated_page_is_up_to_date(page):
    assert read(DOCS / page) == generated.wanted(page), "run python docs/generate/all.py"


def test_every_option_of_every_command_is_there():
    shown = "\n".join(read(DOCS / f"reference/{page}.md") for page in command_reference.PAGES)
    sections = dict(re.findall(r"^##+ `fmsim ([\w -]+)`\n(.*?)(?=^##|\Z)", shown, re.M | re.S))

    def check(path, command):
        for inner in getattr(command, "commands", {}).values():
            check((*path, inner.name), inner)
        for param in command.params:
            for option in param.opts:
                if option.startswith("--") and option not in ("--help", "--show-completion"):
                    assert f"`{option}`" in sections[" ".join(path)], (path, option)

    found = command_reference.commands()
    assert len(found) > 15
    for command in found.values():
        check((command.name,), command)


def test_settings_of_the_examples_of_run_are_those_of_their_scenarios():
    lines = [line.split("#")[0] for line in run.__doc__.splitlines() if "scenarios/" in line]
    examples = [words for line in lines if "--set" in (words := shlex.split(line))]
    assert len(examples) > 2
    for _, _, scenario, *words in examples:
        given = [value for option, value in pairwise(words) if option == "--set"]
        assert ScenarioFile(ROOT / scenario, given).scenario


def test_every_scenario_key_is_there():
    shown = read(DOCS / "reference/scenario.md")
    parts = of_scenarios()
    blocks = {"Deployment", "Server", "Slo", *("Poisson", "Bursts", "ClosedLoop")}
    blocks |= {"SessionWorkload", "RequestFile"}
    keys = set(parts["properties"])
    for block in blocks:
        keys |= set(parts["$defs"][block]["properties"])
    assert len(keys) > 60
    assert not {key for key in keys if f"`{key}`" not in shown and f"`{key}:" not in shown}


def test_every_policy_and_parameter_is_there():
    shown = read(DOCS / "reference/policies.md")
    table = read(DOCS / "explanation/residency.md").partition("## The policies")[2]
    for policy in registry.names():
        found = registry.get(policy)
        if not found.__module__.startswith("fmsim."):
            continue
        assert f"### `{policy}`" in shown and f"`{policy}`" in table
        own = shown.partition(f"### `{policy}`\n")[2].partition("\n### ")[0]
        parent = re.search(r"the parameters of \[`([\w-]+)`\]", own)
        told = registry.get(parent[1]).Params if parent else PolicyParams
        for key in set(found.Params.model_fields) - set(told.model_fields):
            if key not in PolicyParams.model_fields:
                assert f"- `{key}` (" in own, (policy, key)


def test_every_method_and_field_of_a_policy_is_there():
    shown = read(DOCS / "reference/policy.md") + read(DOCS / "reference/policy-context.md")
    listed = set(re.findall(r"^ *- `(\w+)", shown, flags=re.MULTILINE))
    methods = {key for key in vars(Policy) if not key.startswith("_")} - {"Params"}
    fields = {*Context.__dataclass_fields__, *Observation.__dataclass_fields__} - {"_start"}
    assert methods | fields | set(PolicyParams.model_fields) <= listed


def test_every_tensor_and_key_of_a_trace_is_there():
    shown = read(DOCS / "reference/trace-format.md")
    header = set(trace_format.TraceHeader.model_fields)
    path = ROOT / "traces" / "nano-32k-needles.safetensors"
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        tensors = set(file.keys())
    assert len(header) > 10 and len(tensors) > 5
    assert not {key for key in header | tensors if f"`{key}`" not in shown}


def keys_of(found, leave=()):
    """All keys of nested objects, lists of objects included; below `leave` they are names."""
    keys = set()
    if isinstance(found, list):
        for each in found[:1]:
            keys |= keys_of(each, leave)
    if isinstance(found, dict):
        for key, value in found.items():
            keys.add(key)
            if key in leave:
                for each in list(value.values())[:1] if isinstance(value, dict) else []:
                    keys |= keys_of(each, leave)
            elif key not in ("params", "ci95", "quality", "figures", "deployment"):
                keys |= keys_of(value, leave)
    return keys


def shown_keys(*pages):
    return set(re.findall(r"`([\w.]+)`", "\n".join(read(DOCS / page) for page in pages)))


def test_every_field_of_a_run_is_there():
    report = json.loads(read(ROOT / "benchmarks/results/500k.json"))
    named = ("runs", "details")
    labels = set(report["scenario"]["runs"]) | set(report["scenario"]["budgets"])
    apart = {"command", "date"} | labels
    assert keys_of(report, named) - apart <= shown_keys("reference/results.md")


def test_every_field_of_a_workload_and_a_plan_is_there():
    server = api.simulate_server(
        ROOT / "scenarios/serve.yaml", ["full"], {"workload.duration_s": 5}
    ).as_json()
    plan = api.plan_capacity(ROOT / "scenarios/32k.yaml", ["full"])
    shown = shown_keys("reference/results.md", "reference/results-more.md", "reference/scenario.md")
    walls = {"GPU memory", "host memory", "PCIe", "compute"}
    found = keys_of(server, ("details",)) | keys_of(plan, ("runs",))
    labels = {"full", *plan["scenario"]["budgets"]}
    assert len(found) > 100 and not found - walls - labels - shown


def test_a_field_is_described_by_the_comments_beside_or_above_it():
    import ast

    body = ["one: int  # first", "# over", "# it", "two: str = 'x'", "three: int"]
    source = "class A:\n" + "".join(f"    {line}\n" for line in body)
    [tree] = ast.parse(source).body
    comments, lines = describe.comments_of(source), source.splitlines()
    said = [describe.comment_at(node, comments, lines) for node in tree.body]
    assert said == ["first", "over it", ""]


def test_a_generated_part_is_marked_by_its_script():
    for page in generated.PAGES:
        [begin] = [b for b in regions.BEGIN.finditer(read(DOCS / page)) if b["name"] == "reference"]
        assert begin["script"] == "docs/generate/all.py"

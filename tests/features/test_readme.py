"""The README's commands are what CI runs, and its own files are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("fmsim/**/*.md"),
    *ROOT.glob("benchmarks/results/*.md"),
]
WIDTH = 100


def lines_of(text):
    """Lines, those that end with a backslash joined to the next one."""
    return re.sub(r" \\\n *", " ", text).splitlines()


CI = lines_of((ROOT / ".ci/run").read_text())


def commands():
    return [
        line
        for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
        for line in lines_of(block)
    ]


def test_ci_runs_the_readmes_test_command_and_its_scenario():
    tests = [line for line in commands() if "pytest" in line]
    scenario = [
        line for line in commands() if line.startswith("python3.11") and "fmsim run" in line
    ]
    assert len(tests) == len(scenario) == 1
    assert tests[0] in CI
    assert scenario[0].split(" && ")[-1] in CI


def test_every_scenario_named_is_there():
    named = set(re.findall(r"scenarios/[\w-]+\.yaml", README))
    assert named and all((ROOT / path).is_file() for path in named)


def test_ci_stops_at_the_first_failure_and_can_be_executed():
    assert "set -euo pipefail" in CI
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_a_page_has_at_most_100_columns():
    """But for rows of tables, which cannot be broken."""
    assert len(PAGES) > 10
    wide = [
        f"{page.relative_to(ROOT)}, line {number}: {len(line)} columns"
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH and "://" not in line and not line.startswith("|")
    ]
    assert not wide

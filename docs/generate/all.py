"""Write the generated part of every reference page, from the code that it describes.

python docs/generate/all.py            writes each page's part "reference"
python docs/generate/all.py --check    writes nothing; exit status 1 where a page is old
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import command_reference
import policy_list
import policy_reference
import preset_list
import python_reference
import results_reference
import rooms_table
import scenario_reference

DOCS = Path(__file__).parents[1]
sys.path.insert(0, str(DOCS.parent / "benchmarks"))
import regions

PART = "reference"
PAGES: dict[str, Callable[[], str]] = {
    "explanation/architecture.md": rooms_table.table,
    "reference/policies.md": policy_list.policies,
    "reference/policy.md": policy_reference.policy,
    "reference/policy-context.md": policy_reference.context,
    "reference/presets.md": preset_list.presets,
    "reference/python.md": python_reference.names,
    "reference/results.md": results_reference.figures,
    "reference/scenario.md": scenario_reference.keys,
    **{
        f"reference/{name}.md": partial(command_reference.page, name)
        for name in command_reference.PAGES
    },
}


def main() -> int:
    old = [name for name in PAGES if (DOCS / name).read_text(encoding="utf-8") != wanted(name)]
    if "--check" in sys.argv[1:]:
        for name in old:
            print(f"docs/{name} is old; run python docs/generate/all.py")
        return int(bool(old))
    for name in old:
        (DOCS / name).write_text(wanted(name), encoding="utf-8")
    return 0


def wanted(name: str) -> str:
    """The page with what the code says now. Raises ValueError where it has no such part."""
    page = (DOCS / name).read_text(encoding="utf-8")
    return regions.replace(page, PART, PAGES[name]().strip())


if __name__ == "__main__":
    sys.exit(main())

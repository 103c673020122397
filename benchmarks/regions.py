"""The parts of a page that a script writes: between a line that names them and one that ends them.

    <!-- made: NAME by benchmarks/SCRIPT.py -->
    <!-- end of NAME -->

Each is rendered from one file of benchmarks/results; `benchmarks/answers.py` knows which.
"""

from __future__ import annotations

import re

BEGIN = re.compile(r"^<!-- made: (?P<name>[\w -]+?) by (?P<script>[\w./-]+) -->$", re.MULTILINE)


def find(page: str) -> dict[str, str]:
    """What stands in each marked part of a page, by name.

    Raises ValueError where a part does not end, or where two have one name.
    """
    parts: dict[str, str] = {}
    for begin in BEGIN.finditer(page):
        name = begin["name"]
        if name in parts:
            raise ValueError(f"two parts are called {name!r}")
        start, end = _bounds(page, name)
        parts[name] = page[start:end].strip("\n")
    return parts


def replace(page: str, name: str, made: str) -> str:
    """The page with `made` as its part called `name`. Raises ValueError where it has none."""
    start, end = _bounds(page, name)
    return f"{page[:start]}\n\n{made}\n\n{page[end:]}"


def marked(name: str, script: str, before: str = "") -> str:
    """A new page with one empty part."""
    return f"{before}<!-- made: {name} by {script} -->\n\n<!-- end of {name} -->\n"


def line_of(page: str, name: str) -> int:
    """The line of the page on which the part's text begins."""
    start, _ = _bounds(page, name)
    skipped = len(page[start:]) - len(page[start:].lstrip("\n"))
    return page[: start + skipped].count("\n") + 1


def _bounds(page: str, name: str) -> tuple[int, int]:
    """Where the part's text begins and ends, blank lines included."""
    begin = next((found for found in BEGIN.finditer(page) if found["name"] == name), None)
    if begin is None:
        raise ValueError(f"no part is called {name!r}; mark it with <!-- made: {name} by ... -->")
    end = page.find(f"<!-- end of {name} -->", begin.end())
    if end < 0:
        raise ValueError(f"the part {name!r} has no line <!-- end of {name} -->")
    return begin.end(), end

"""docs/explanation/architecture.md's list of rooms: what each holds, and what it may not import.

What a room holds is the first paragraph of its `__init__.py`; the order of the rooms and what they
may not import are import-linter's contracts in pyproject.toml, which `lint-imports` checks.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WIDTH = 100


def table(root: Path = ROOT) -> str:
    """A list item a room, lowest first: what it holds, its rules, and the rooms within it."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    order, *others = settings["tool"]["importlinter"]["contracts"]
    lines: list[str] = []
    for layer in reversed(order["layers"]):
        for name in sorted(layer.replace(":", "|").split("|")):
            place = root / "fmsim" / name.strip(" ()")
            if place.is_dir() or place.with_suffix(".py").exists():
                lines += room(place, root / "fmsim", others)
    return "\n".join(lines) + "\n"


def room(place: Path, package: Path, contracts: list[dict[str, Any]]) -> list[str]:
    """The room at `place`, and below it those within."""
    name = place.relative_to(package).as_posix()
    depth = "  " * name.count("/")
    rule = "".join(f" *{text}.*" for text in rules(name, contracts))
    slash = "/" if place.is_dir() else ".py"
    lines = textwrap.wrap(
        f"{depth}- `{name}{slash}`: {holds(place)}{rule}",
        WIDTH,
        subsequent_indent=depth + "  ",
        break_on_hyphens=False,
    )
    for inner in sorted(place.glob("*/__init__.py")):
        lines += room(inner.parent, package, contracts)
    return lines


def holds(place: Path) -> str:
    """The first paragraph of the docstring of a package, or of a module."""
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{file}: begin with a docstring that says what the room holds")
    return " ".join(docstring.partition("\n\n")[0].split())


def rules(name: str, contracts: list[dict[str, Any]]) -> list[str]:
    """Names of the contracts on this room alone, or on several modules of it."""
    found = []
    for contract in contracts:
        modules = [module.partition(".")[2].replace(".", "/") for module in sources(contract)]
        rooms = set(modules) if len(modules) == 1 else {path.split("/")[0] for path in modules}
        if rooms == {name}:
            found.append(contract["name"])
    return found


def sources(contract: dict[str, Any]) -> list[str]:
    found: list[str] = contract.get("source_modules") or contract["containers"]
    return found

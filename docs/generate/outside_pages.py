"""mkdocs hook: pages may link to files of the repository that lie outside docs/.

Such links work where the repository is browsed. For the site the files are taken along, below
`repository/`, and the links are turned there. A link to nothing is left as it is, and mkdocs'
strict build fails on it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = "repository"
# Taken along: what pages name. Traces and weights are too large.
PARTS = ("*.md", "benchmarks/results/*", "scenarios/**/*", "fmsim/nano/model/README.md")
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for pattern in PARTS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                name = f"{SITE}/{path.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links to the repository's files turned to the site's copies."""
    source = page.file.src_uri
    home = ROOT / source.removeprefix(f"{SITE}/") if source.startswith(SITE) else DOCS / source

    def turned(found: re.Match[str]) -> str:
        before, target, anchor, after = found.groups()
        if "://" in target:
            return found[0]
        place = Path(os.path.normpath(home.parent / target))
        if not place.is_file():
            return found[0]
        name = place_in_site(place)
        relative = os.path.relpath(name, os.path.dirname(source))
        return f"{before}{relative}{anchor or ''}{after}"

    return LINK.sub(turned, markdown)


def place_in_site(place: Path) -> str:
    """Where a file of the repository stands among the site's sources."""
    if place.is_relative_to(DOCS):
        return place.relative_to(DOCS).as_posix()
    return f"{SITE}/{place.relative_to(ROOT).as_posix()}"

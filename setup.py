"""Puts the scenarios and their traces into the wheel; all else stands in pyproject.toml.

They stay at the top of the repository, where people look for them and where a scenario's
`../traces/` holds. setuptools takes data from within a package only, and a link to them there does
not survive every checkout and archive. So the build copies them, and an editable install reads them
where they are (fmsim/scenario/shipped.py). Traces that no scenario names are
left out: the wheel is 62 MB.
"""

import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TRACE = re.compile(r"^trace:\s*(\S+)", re.MULTILINE)


def shipped() -> list[str]:
    """Files that the wheel carries, relative to this folder."""
    files = [path for path in Path("scenarios").rglob("*") if path.is_file()]
    named = [
        Path(os.path.normpath(path.parent / found[1]))
        for path in files
        if path.suffix == ".yaml" and (found := TRACE.search(path.read_text(encoding="utf-8")))
    ]
    return sorted({path.as_posix() for path in [*files, *named]})


class WithScenarios(build_py):
    """Copies them below fmsim/shipped/ of what becomes the wheel."""

    def copies(self) -> dict[str, str]:
        """Of each file the place in the build."""
        return {name: str(Path(self.build_lib, "fmsim", "shipped", name)) for name in shipped()}

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name, place in self.copies().items():
            self.mkpath(str(Path(place).parent))
            self.copy_file(name, place)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copies = [] if self.editable_mode else list(self.copies().values())
        return [*super().get_outputs(include_bytecode), *copies]

    def get_source_files(self) -> list[str]:
        """What a source archive carries."""
        return [*super().get_source_files(), *shipped()]


setup(cmdclass={"build_py": WithScenarios})

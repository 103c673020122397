"""Puts the scenarios and their traces into the wheel; all else stands in pyproject.toml.

They stay at the top of the repository, where people look for them and where a scenario's
`../traces/` holds. setuptools takes data from within a package only, and a link to them there does
not survive every checkout and archive. So the build copies them, and an editable install reads them
where they are (fmsim/scenario/shipped.py).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


def shipped() -> list[str]:
    """Files that the wheel carries beside the package, relative to this folder."""
    folders = Path("scenarios"), Path("traces")
    return sorted(
        path.as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()
    )


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

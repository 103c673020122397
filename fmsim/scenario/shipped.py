"""The scenarios and traces that fmsim carries, by name, wherever it is run.

They lie in one folder: in the installed package's own `shipped/`, where setup.py puts a copy, or
at the top of a checkout. A user's own files are never looked for in either.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
COPY = PACKAGE / "shipped"
FOLDER = COPY if COPY.is_dir() else PACKAGE.parent
SCENARIOS = FOLDER / "scenarios"
TRACES = FOLDER / "traces"


def scenarios() -> dict[str, Path]:
    """Files by name: "500k", "paper/h20-512k"."""
    return {
        path.relative_to(SCENARIOS).with_suffix("").as_posix(): path
        for path in sorted(SCENARIOS.rglob("*.yaml"))
    }


def traces() -> dict[str, Path]:
    """Files by name: "nano-500k-needles"."""
    return {path.stem: path for path in sorted(TRACES.glob("*.safetensors"))}


def scenario(given: str | Path) -> Path:
    """The file that is meant: fmsim's own of that name, or else a path."""
    return scenarios().get(str(given), Path(given))


def trace(given: str | Path) -> Path | None:
    """fmsim's own trace of that name, if it is one."""
    return traces().get(str(given))

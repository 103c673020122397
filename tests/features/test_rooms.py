"""What each module may know: docs/architecture.md, checked on the import statements."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fmsim"

# room -> what it must not import
FORBIDDEN = {
    "geometry.py": ("fmsim.",),
    "scenario.py": ("fmsim.replay.replayer", "fmsim.hw", "fmsim.exec"),
    "trace": ("fmsim.policies", "fmsim.hw", "fmsim.exec", "fmsim.indexer"),
    "policies": ("fmsim.hw", "fmsim.exec", "fmsim.trace"),
    "residency.py": ("fmsim.policies", "fmsim.hw", "fmsim.exec"),
    "replay.py": ("fmsim.hw", "fmsim.exec"),
    "tally.py": ("fmsim.hw", "fmsim.exec"),
    "run.py": ("fmsim.exec",),
    "footprint.py": ("fmsim.hw", "fmsim.exec", "fmsim.policies"),
    "hw": ("fmsim.policies", "fmsim.exec"),
    "simulate.py": ("fmsim.policies", "fmsim.exec"),
    "metrics.py": ("fmsim.policies", "fmsim.exec", "fmsim.sim.decode"),
    "stack_distance.py": ("fmsim.hw", "fmsim.sim.decode", "fmsim.exec"),
    "curves.py": ("fmsim.hw", "fmsim.sim.decode", "fmsim.exec"),
    "results.py": (
        "fmsim.policies",
        "fmsim.hw",
        "fmsim.replay.replayer",
        "fmsim.exec",
        "fmsim.trace",
    ),
    "rows.py": (
        "fmsim.policies",
        "fmsim.hw",
        "fmsim.replay.replayer",
        "fmsim.experiments.run",
        "fmsim.exec",
        "fmsim.trace",
    ),
    "sweep.py": ("fmsim.exec", "fmsim.report"),
    "tune.py": ("fmsim.exec", "fmsim.report"),
    "serve": ("fmsim.exec", "fmsim.report"),
    "serve/spec.py": ("fmsim.",),
    "serve/demand.py": ("fmsim.policies", "fmsim.replay.replayer", "fmsim.trace"),
    "serve/server.py": ("fmsim.policies", "fmsim.replay.replayer", "fmsim.trace"),
    "serve/plan.py": ("fmsim.policies", "fmsim.replay.replayer", "fmsim.trace"),
    "indexer": ("fmsim.hw", "fmsim.sim.decode", "fmsim.exec"),
    "exec": ("fmsim.sim.decode",),
    "exec/kernels": (
        "fmsim.sim.decode",
        "fmsim.policies",
        "fmsim.replay.residency",
        "fmsim.hw",
        "fmsim.exec.model",
        "fmsim.exec.decode.session",
    ),
    "tasks": ("fmsim.policies", "fmsim.hw", "fmsim.exec", "fmsim.replay.replayer", "fmsim.trace"),
    "accuracy": ("fmsim.report",),
    "accuracy/summary.py": ("fmsim.exec", "fmsim.policies"),
    "accuracy/signals.py": ("fmsim.exec", "fmsim.policies"),
    "report": ("fmsim.policies", "fmsim.hw", "fmsim.replay.replayer", "fmsim.exec", "fmsim.trace"),
}
TORCH_ROOMS = ("exec", "indexer", "nano", "trace/dense")


def sources(room: str) -> list[Path]:
    path = PACKAGE / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_knows_only_what_it_may(room):
    paths = sources(room)
    assert paths
    for path in paths:
        for name in imported(path):
            assert not name.startswith(FORBIDDEN[room]), (
                f"{path.relative_to(PACKAGE)} imports {name}"
            )


def test_torch_stays_in_its_rooms():
    for path in PACKAGE.rglob("*.py"):
        room = str(path.relative_to(PACKAGE))
        if not room.startswith(TORCH_ROOMS):
            heavy = {
                name
                for name in imported(path, top_level_only=True)
                if name.split(".")[0] in ("torch", "transformers")
            }
            assert not heavy, f"{room} imports {heavy}"

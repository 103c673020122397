"""The house's rules: import-linter's contracts in pyproject.toml, and what loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fmsim"
HEAVY = {"torch", "transformers", "triton"}
HEAVY_ROOMS = ("exec", "experiments/witness", "indexer", "nano", "trace/importers")
# What `import fmsim` must not load.
SLOW_TO_LOAD = {"torch", "transformers", "numpy", "simpy", "plotly", "optuna"}


def test_every_import_contract_is_kept(capsys):
    cli = pytest.importorskip("importlinter.cli", reason="import-linter: pip install fmsim[dev]")
    status = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


def imported_at_load(path: Path) -> set[str]:
    """Top-level packages that a module imports as soon as it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_torch_is_loaded_by_its_rooms_only():
    loads = {
        str(path.relative_to(PACKAGE)): imported_at_load(path) & HEAVY
        for path in PACKAGE.rglob("*.py")
    }
    assert any(heavy for heavy in loads.values())
    elsewhere = [path for path in loads if loads[path] and not path.startswith(HEAVY_ROOMS)]
    assert not elsewhere, f"{elsewhere} import {HEAVY} at load; import it in the function"


def test_import_fmsim_loads_nothing_slow():
    """`fmsim --help` is in tests/experiments/test_run.py."""
    code = "import sys, fmsim; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "fmsim" in loaded
    assert not SLOW_TO_LOAD & set(loaded)

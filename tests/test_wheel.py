"""The wheel by itself: in an environment without this folder it runs its scenarios by name."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_BYTES = 70_000_000


def pip(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools here is older than pyproject.toml asks for, and CI has no network")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = files.stdout.splitlines() if files.returncode == 0 else _found()
    wanted = ("fmsim/", "scenarios/", "traces/")
    for name in names:
        if (name.startswith(wanted) or "/" not in name) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    built = pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    if "No module named pip" in built.stderr:
        pytest.skip("no pip here")
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def _found():
    """Files of a checkout without git."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*")
        if "__pycache__" not in path.parts and ".venv" not in path.parts
    ]


def test_it_carries_all_scenarios_and_traces_and_stays_small(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if "/shipped/" in name}
    files = [path for name in ("scenarios", "traces") for path in (ROOT / name).rglob("*.*")]
    assert inside == {f"fmsim/shipped/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert wheel.stat().st_size < MOST_BYTES


def test_installed_alone_it_runs_a_scenario_by_name_in_any_folder(wheel, tmp_path):
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    installed = pip(
        "--python", python, "install", "-q", "--no-compile", "--no-index", "--no-deps", wheel
    )
    assert installed.returncode == 0, installed.stderr
    site = next(place.glob("lib/python*/site-packages"))
    # what fmsim needs comes from this environment, whose own .pth files do not count there
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])

    def fmsim(*arguments):
        return subprocess.run(
            [place / "bin" / "fmsim", *arguments],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )

    run = fmsim("run", "32k", "-p", "full", "-p", "lsa", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert Path(report["scenario"]["trace"]["file"]).is_relative_to(site)
    assert {row["policy"].split()[0] for row in report["policies"]} == {"full", "lsa"}
    made = fmsim("init", "mine.yaml", "--context", "32K")
    assert made.returncode == 0, made.stderr
    assert fmsim("run", "mine.yaml", "-p", "full").returncode == 0


def test_the_version_stands_in_one_place_and_is_the_one_that_is_told():
    import tomllib

    import fmsim

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fmsim.__version__"}
    assert f"\nversion: {fmsim.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {fmsim.__version__}, " in (ROOT / "CHANGELOG.md").read_text()

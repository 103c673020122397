"""`fmsim policy new`: the package that it writes works as it is."""

import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import Mock

import pytest
from command import fmsim, fmsim_here

from fmsim.errors import FmsimError
from fmsim.policies import registry
from fmsim.testing import new_plugin


@pytest.mark.slow
def test_the_package_passes_its_own_tests(tmp_path):
    done = fmsim_here("policy", "new", "my-cache", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("fmsim-my-cache: README.md, ")
    package = tmp_path / "fmsim-my-cache"
    points = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"fmsim.policies": {"my-cache": "fmsim_my_cache:MyCache"}}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."]
    tested = subprocess.run(command, cwd=package, capture_output=True, text=True)
    assert tested.returncode == 0 and "declarations" not in tested.stdout, tested.stdout
    shown = fmsim_here("policy", "show", "fmsim_my_cache.py:MyCache", folder=package)
    assert "weight_of_mass" in shown.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lru", "taken"),
        ("My", "lower-case"),
        ("../x", "lower-case"),
        ("a-", "lower-case"),
        ("there", "fmsim-there: exists already"),
    ],
)
def test_a_name_that_will_not_do_is_refused(tmp_path, name, says):
    (tmp_path / "fmsim-there").mkdir()
    with pytest.raises(FmsimError, match=says):
        new_plugin.write(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fmsim-there"]


BAD = {
    "nameless": "class P(Policy):\n    action = 'evict'\n",
    "undeclared": "class P(Policy):\n    name = 'undeclared'\n",
    "odd": "class P(Policy):\n    name, action = 'odd', 'dance'\n",
    "leaving": "raise SystemExit(3)\n",
    "failing": "import no_such_module\n",
}


def test_a_package_is_whole_or_not_there(tmp_path, monkeypatch):
    full = Mock(side_effect=[None, OSError(28, "No space left on device")])
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FmsimError, match=r"fmsim-mine: cannot be written \(No space left"):
        new_plugin.write("mine", tmp_path)
    assert not list(tmp_path.iterdir())


def test_plug_ins_that_cannot_be_used_are_named_once_and_left_out(tmp_path):
    """In a process of its own, with the metadata that an install would write."""
    points = []
    for name, body in BAD.items():
        (tmp_path / f"{name}.py").write_text(f"from fmsim import Policy\n\n\n{body}")
        points.append(f"{name} = {name}:P\n")
    info = tmp_path / "bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fmsim.policies]\n" + "".join(points))
    done = fmsim("policy", "list", folder=tmp_path)
    assert done.returncode == 0 and "lru" in done.stdout
    warned = done.stderr.splitlines()
    own = [line for line in warned if any(f"policy '{name}'" in line for name in BAD)]
    assert len(own) == len(BAD) and all(line.startswith("fmsim: ") for line in own)
    for name in BAD:
        assert sum(f"policy '{name}'" in line for line in own) == 1
        assert f"{name} " not in done.stdout
    assert "has no `action`" in next(line for line in own if "undeclared" in line)
    assert registry.GROUP == "fmsim.policies"

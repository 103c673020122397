"""docs/tutorial/write-a-policy.md: its plug-in works as printed."""

import re
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "policies.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), flags=re.DOTALL)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The printed files in a folder on the import path, with the metadata that an install would
    write.
    """
    import tomllib

    policy, test = blocks("python")
    project = tomllib.loads(blocks("toml")[0])
    (tmp_path / "fmsim_lru2.py").write_text(policy)
    (tmp_path / "test_lru2.py").write_text(test)
    info = tmp_path / "fmsim_lru2-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fmsim-lru2\nVersion: 0.1.0\n")
    points = project["project"]["entry-points"]["fmsim.policies"]
    (info / "entry_points.txt").write_text(
        "[fmsim.policies]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from fmsim.policies import registry

    registry._found.cache_clear(), registry._load.cache_clear()
    yield
    for module in ("fmsim_lru2", "test_lru2"):
        sys.modules.pop(module, None)
    registry._found.cache_clear(), registry._load.cache_clear()


def test_the_printed_plug_in_conforms_and_appears_by_itself(package):
    from test_lru2 import test_lru2

    from fmsim.policies import registry

    [mark] = test_lru2.pytestmark
    for check in mark.args[1]:
        test_lru2(check)
    assert "lru2" in registry.names()
    assert (
        registry.build(
            {"policy": "lru2", "budget": "10%", "newcomer_steps": 8}
        ).params.newcomer_steps
        == 8
    )
    assert registry.info("lru2")["parameters"][-1]["name"] == "newcomer_steps"


def test_the_page_names_every_policy_and_no_other():
    from fmsim.policies import registry

    rows = re.findall(
        r"^\| (`[\w-]+`(?:, `[\w-]+`)*) \|",
        DOC.read_text().partition("come with fmsim")[2],
        flags=re.MULTILINE,
    )
    ours = {name for name in registry.names() if registry.get(name).__module__.startswith("fmsim.")}
    assert set(re.findall(r"[\w-]+", " ".join(rows))) == ours

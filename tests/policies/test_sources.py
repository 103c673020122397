"""What of a policy's code its digest covers."""

import importlib

import pytest

from fmsim.policies import registry
from fmsim.policies.lru import LRU
from fmsim.policies.sources import source_digest

OWN = """
{imports}
from fmsim.policies.lru import LRU

class Mine(LRU):
    name = "mine"

    def later(self):
        import sourced_late
"""
LONE = {  # a file in a folder, and modules beside it
    "own.py": OWN.format(imports="from sourced_near import FAR"),
    "sourced_near.py": "import numpy\nfrom sourced_pack.deep import FAR\n",
    "sourced_late.py": "",
    "sourced_pack/__init__.py": "",
    "sourced_pack/deep.py": "from .far import FAR\nimport sourced_near\n",
    "sourced_pack/far.py": "FAR = 1\n",
}
MEMBER = {  # a module of a package
    "own.py": OWN.format(imports="from sourced_own.near import FAR\nfrom . import beside"),
    "near.py": "from .inner.deep import FAR\n",
    "beside.py": "",
    "inner/__init__.py": "",
    "inner/deep.py": "from ..far import FAR\nfrom ...above import ABOVE\n",
    "far.py": "FAR = 1\n",
}
OTHERS = {"__init__.py": "", "unused.py": "", "../above.py": "ABOVE = 1\n"}


@pytest.mark.parametrize("needed", [LONE, MEMBER])
def test_a_digest_covers_what_a_policys_file_imports_from_its_folder(tmp_path, monkeypatch, needed):
    folder = tmp_path / "sourced_own"
    for name, text in (needed | OTHERS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if needed is LONE:
        monkeypatch.syspath_prepend(folder)
        policy = registry.get(f"{folder}/own.py:Mine")
    else:
        (folder / "inner/deep.py").write_text("from ..far import FAR\n")  # this one can be imported
        monkeypatch.syspath_prepend(tmp_path)
        policy = importlib.import_module("sourced_own.own").Mine
        (folder / "inner/deep.py").write_text(needed["inner/deep.py"])
    seen = [source_digest(policy)]
    for name, text in needed.items():
        (folder / name).write_text(f"{text}# changed\n")
        seen.append(source_digest(policy))
    assert len(set(seen)) == 1 + len(needed)
    for name, text in OTHERS.items():
        (folder / name).write_text(f"{text}# changed\n")
        assert source_digest(policy) == seen[-1], name


def test_policies_have_digests_of_their_own():
    class Typed(LRU):
        name = "typed"

    digests = {source_digest(policy) for policy in (LRU, Typed)}
    assert len(digests) == 2 and all(len(digest) == 16 for digest in digests)

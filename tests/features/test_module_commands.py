"""Every `python -m fmsim...` that the code and the docs tell of is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_is_to_be_run_can_be_run():
    told = {}
    for folder in ("fmsim", "docs", "tests", "benchmarks"):
        for path in [*ROOT.joinpath(folder).rglob("*.py"), *ROOT.joinpath(folder).rglob("*.md")]:
            for name in re.findall(r"python -m\s+(fmsim[\w.]*\w)", path.read_text()):
                told.setdefault(name, path.relative_to(ROOT))
    assert "fmsim.nano.training.train" in told
    for name, path in told.items():
        module = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        assert module.is_file(), f"{path} tells of python -m {name}"
        assert "__main__" in module.read_text(), f"{path}: {name} is no script"

"""benchmarks/indexer.py: a page that shows the figures of its file, on every trace of nano."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import indexer

from fmsim.experiments.rivals import specs
from fmsim.trace import read

RESULT = json.loads((ROOT / "benchmarks" / "results" / "indexer.json").read_text())


def test_the_file_has_every_policy_on_every_trace_at_every_budget():
    paths = sorted((ROOT / "traces").glob("nano-*.safetensors"))
    assert list(RESULT["traces"]) == [path.stem for path in paths]
    labels = set(specs(None, read(paths[0]), native=True))
    for found in RESULT["traces"].values():
        rows = {(row["budget"], row["policy"]) for row in found["policies"]}
        assert rows == {(budget, label) for budget in indexer.BUDGETS for label in labels}
        assert list(found["rankings"]) == ["1", "2", "3"]
        assert {ranked["state_age"] for ranked in found["rankings"].values()} == {1}

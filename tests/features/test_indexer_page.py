"""benchmarks/indexer.py: a page that shows the figures of its file, on traces of nano."""

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
    assert list(RESULT["traces"]) == list(indexer.TRACES)
    for name, found in RESULT["traces"].items():
        trace = read(ROOT / "traces" / f"{name}.safetensors")
        labels = set(specs(None, trace, native=len(trace.keyed) == trace.n_layers))
        rows = {(row["budget"], row["policy"]) for row in found["policies"]}
        assert rows == {(budget, label) for budget in indexer.BUDGETS for label in labels}
        assert list(found["rankings"]) == ["1", "2", "3"]
        assert {ranked["state_age"] for ranked in found["rankings"].values()} == {1}

"""What a plan without a trace takes a policy to do is what its replay does."""

from pathlib import Path

import pytest

from fmsim.experiments.run import run_scenario
from fmsim.indexer import checkpoint
from fmsim.scenario import ScenarioFile
from fmsim.sim.serving.capacity import behaviour

ROOT = Path(__file__).parents[2]


def test_lsa_keeps_and_turns_over_what_the_shipped_indexer_does():
    share = f"{behaviour.LSA_SHARE:.0%}"
    file = ScenarioFile(ROOT / "scenarios/500k.yaml", [], [f"lsa:budget={share}"])
    [run] = run_scenario(file).runs
    assert run.row["mass_kept"] == pytest.approx(behaviour.LSA_MASS_KEPT, abs=0.005)
    assert run.row["set_overlap"] == pytest.approx(behaviour.LSA_OVERLAP, abs=0.005)
    assert len(checkpoint.load(checkpoint.SHIPPED).layers) == behaviour.LSA_LAYERS

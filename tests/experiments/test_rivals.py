"""The memory indexer beside its rivals at equal bytes on the GPU."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fmsim import bootstrap
from fmsim.experiments.rivals import FIRST, compare, specs
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, spread
from fmsim.trace import read

TRACE = Path(__file__).parents[2] / "traces/nano-32k-needles.safetensors"
FLASH = PRESETS["v4-flash"]
BUDGETS = ("12.5% gpu", "40% gpu")


@pytest.fixture(scope="module")
def trace():
    return read(TRACE)


@pytest.fixture(scope="module")
def rows(trace):
    return {(row["budget"], row["policy"]): row for row in compare(trace, BUDGETS, FLASH)}


def test_all_fill_the_same_bytes_or_say_what_they_need(rows, trace):
    full_bytes = FLASH.full_gpu_bytes(trace.header.prompt_tokens + trace.n_steps)
    for (budget, label), row in rows.items():
        limit = {"12.5% gpu": 0.125, "40% gpu": 0.4}[budget] * full_bytes
        if "why" in row:
            assert row["least_bytes"] > limit and "sees all" in label
        else:
            assert limit - 21 * 716 * 2 < row["gpu_bytes"] <= limit, label
    fewest = rows["40% gpu", "lru, held, sees all"]["entries"]
    assert fewest < rows["40% gpu", "lru, held"]["entries"]  # all index keys cost slots


def test_figures_are_those_of_a_replay_but_for_window_0(rows, trace):
    label = "lfu, held"
    memory = ModelMemory(FLASH, spread(trace.n_layers, FLASH.n_csa))
    spec = specs(None, trace, False)[label] | {"budget": "40% gpu"}
    ledger = Replayer(trace, memory=memory).run(registry.build(spec))
    row = rows["40% gpu", label]
    kept, mass = ledger.mass_kept.sum(axis=1), ledger.mass_total.sum(axis=1)
    assert row["first_window"]["mass_kept"] == pytest.approx(kept[:64].sum() / mass[:64].sum())
    assert row["mass_kept"] == pytest.approx(kept[64:].sum() / mass[64:].sum(), rel=1e-6)
    starts = range(0, trace.n_steps // 64 * 64 - 64, 64)  # a short rest goes with the last window
    assert trace.n_steps % 64 < 32
    by_hand = bootstrap.ratio(
        np.add.reduceat(kept[64:].astype(float), starts),
        np.add.reduceat(mass[64:].astype(float), starts),
    )
    assert row["ci95"]["mass_kept"]["half_width"] == pytest.approx(by_hand.half_width, rel=1e-5)
    beside = row["versus_lsa"]["mass_kept"]
    expected = row["mass_kept"] - rows["40% gpu", FIRST]["mass_kept"]
    assert beside["difference"] == pytest.approx(expected)
    assert rows["40% gpu", FIRST]["versus_lsa"] == {}


def test_history_begins_with_the_prompt_where_the_trace_has_it(trace):
    seeded, bare = (
        specs(None, each, True) for each in (trace, dataclasses.replace(trace, prompt_mass=None))
    )
    for label in ("lru, held", "lfu, held, sees all", "lsa-history"):
        assert seeded[label]["prompt_history"] and "prompt_history" not in bare[label]
    assert "native" in seeded and "native" not in specs(None, trace, False)

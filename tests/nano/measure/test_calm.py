"""How restless a selection is."""

import numpy as np
import pytest

from fmsim.nano.measure.calm import lru_misses


def test_misses_of_a_buffer_are_counted_as_a_list_would():
    rng = np.random.default_rng(0)
    ids = np.stack([np.sort(rng.permutation(60)[:8]) for _ in range(120)])
    entries = np.full(120, 64)
    uses = {entry: [entry - 64, -1] for entry in range(64)}
    missed = asked = 0
    for step, chosen in enumerate(ids):
        order = sorted(uses, key=lambda entry: (uses[entry], entry))
        missed += sum(entry in order[:-16] for entry in chosen) if step >= 64 else 0
        asked += len(chosen) if step >= 64 else 0
        for entry in chosen:
            uses[entry] = [step + 1, max(0, uses[entry][0])]
    assert lru_misses(ids, entries, 16) == pytest.approx(missed / asked, abs=0.02)
    assert lru_misses(ids, entries, 64) == 0.0

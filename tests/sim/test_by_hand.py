"""Times and bytes worked by hand, at sizes that occur."""

import numpy as np
import pytest
import simpy
from hand_ledger import FLASH, ledger

from fmsim.hw.memory import FairLink
from fmsim.sim.footprint import footprint
from fmsim.sim.metrics import exact


def test_a_link_takes_bytes_over_bandwidth():
    """55 GB at 27.5 GB/s are 2 s; two transfers at once share it, and take 4 s."""
    env = simpy.Environment()
    link = FairLink(env, 27.5e9)
    env.run(link.transfer(55e9))
    assert env.now == pytest.approx(2.0)
    both = [link.transfer(55e9), link.transfer(55e9)]
    env.run(env.all_of(both))
    assert env.now == pytest.approx(6.0)


def test_pages_of_four_entries_take_the_bytes_of_four_entries():
    """At 32,001 tokens, 200 slots of 4 entries in each of 21 CSA layers and 10 spare ones for
    misses, all index keys there.

    Windows 43 x 128 x 584 = 3,214,336; HCA 20 x 250 x 584 = 2,920,000; entries 21 x 800 x 584 =
    9,811,200; spare 21 x 40 x 584 = 490,560; keys 21 x 8,000 x 132 = 22,176,000.
    """
    made = ledger(n_steps=1, slots=200, granularity=4, on_miss="fetch", miss_slots=10)
    found = footprint(made, FLASH).allocated
    assert (found.slots, found.spare, found.index_keys) == (9_811_200, 490_560, 22_176_000)
    assert found.total == 38_612_096


def test_a_layer_without_mass_loses_nothing():
    total = np.full((2, 3), 0.5, np.float32)
    total[:, 1] = 0
    assert exact(ledger(n_steps=2, mass_total=total, mass_kept=total)) is True
    kept = total.copy()
    kept[1, 2] = 0.499
    assert exact(ledger(n_steps=2, mass_total=total, mass_kept=kept)) is False

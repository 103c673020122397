"""What a request of another length asks, from a ledger recorded at one."""

import numpy as np
from hand_ledger import FLASH, ledger, loads

from fmsim.sim.serving.demand import Demand

PROMPT = 32_000  # tokens of the hand-made ledger's prompt


def test_a_layer_has_no_more_than_a_short_request_gives_it():
    """Three layers of 1200, 800 and 400 slots, for seven of the model's layers each."""
    counts = np.tile(np.array([1200, 800, 400], np.int32), (128, 1))
    demand = Demand(
        ledger(
            n_groups=3,
            slots=1200,
            group_slots=[1200, 800, 400],
            resident=counts,
            params={"budget": "800 entries"},
            on_miss="fetch",
            demand_loads=loads(128, 3, s5=50),
        ),
        FLASH,
    )
    assert demand.pools(PROMPT, 128).gpu.slots == 7 * 2400 * 584
    prompt = 4 * 600 - 128
    assert demand.pools(prompt, 128).gpu.slots == 7 * (600 + 600 + 400) * 584
    assert not demand.fits_whole(prompt, 128)  # the last layers miss
    assert demand.fits_whole(4 * 400 - 128, 128)


def test_a_ledger_of_one_window_repeats_whole():
    """Decisions at 0 and 64 alone: 64 steps hold no window that a decision filled."""
    positions = np.array([0, 63, 64, 70, 128])
    one = Demand(ledger(n_steps=64, lookahead_loads=loads(64, s0=1)), FLASH)
    assert one.at(positions).tolist() == [0, 63, 0, 6, 0]
    two = Demand(ledger(n_steps=128, lookahead_loads=loads(128, s64=1)), FLASH)
    assert two.at(np.array([64, 127, 128, 191, 192])).tolist() == [64, 127, 64, 127, 64]

"""benchmarks/nano/ship.py: a shortened trace knows which answers it still has."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_trace import make_trace

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "nano"))
import ship

from fmsim import trace as traces
from fmsim.errors import FmsimError

ENDS = (20, 64, 100)  # of three answers of five tokens


def recorded(exact=3):
    """110 steps with three answers; the last ten steps are forced."""
    forced = np.ones(110, bool)
    for end in ENDS:
        forced[end - 5 : end] = False
    whole = replace(make_trace(prompt_tokens=4096, n_steps=110), forced=forced)
    return whole.with_header(quality={"asked": 3, "exact": exact})


@pytest.mark.parametrize(("steps", "within"), [(110, 3), (100, 3), (99, 2), (64, 2), (19, 0)])
def test_an_answer_counts_where_all_of_it_is_there(steps, within):
    part = ship.shortened(recorded(), steps)
    assert part.n_steps == steps
    assert (part.header.quality["asked"], part.header.quality["exact"]) == (within, within)
    assert 0 <= part.header.quality["lru_misses"] <= 1


def test_where_one_is_wrong_nobody_knows_which():
    with pytest.raises(FmsimError, match="2 of 3 answers are right"):
        ship.shortened(recorded(exact=2), 64)


def test_traces_of_a_context_share_a_file_with_the_keys_that_are_asked_for(tmp_path, monkeypatch):
    for kind in ("needles", "memory"):
        traces.write(tmp_path / f"nano-4k-{kind}.safetensors", recorded())
    given = ["ship.py", str(tmp_path), str(tmp_path / "out"), "--keyed", "0,2"]
    monkeypatch.setattr(sys, "argv", [*given, "--steps", "nano-4k-memory:64"])
    ship.main()
    assert len(list((tmp_path / "out").glob("*.context"))) == 1
    for kind, steps in (("needles", 110), ("memory", 64)):
        found = traces.read(tmp_path / "out" / f"nano-4k-{kind}.safetensors", check=True)
        assert (found.n_steps, found.keyed) == (steps, [0, 2])
    monkeypatch.setattr(sys, "argv", [*given, "--whole", "nano-4k"])
    ship.main()
    assert traces.read(tmp_path / "out" / "nano-4k-memory.safetensors").keyed == [0, 1, 2]

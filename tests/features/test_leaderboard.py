"""benchmarks/leaderboard.py: equal bytes, and a page that shows the figures of its file."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import leaderboard

RESULT = json.loads((ROOT / "benchmarks" / "results" / "leaderboard.json").read_text())


@pytest.fixture(scope="module")
def board():
    return leaderboard.Board(ROOT / "traces" / "nano-32k-needles.safetensors")


def test_the_file_has_every_policy_on_every_trace_within_its_budget():
    labels = set(leaderboard.contestants([]))
    traces = set(leaderboard.TRACES)
    assert set(RESULT["full_bytes"]) == traces
    found = {(row["policy"], row["trace"], row["share"]) for row in RESULT["rows"]}
    wanted = {(a, b, c) for a in labels for b in traces for c in leaderboard.SHARES}
    assert found == wanted and len(RESULT["rows"]) == len(wanted)
    for row in RESULT["rows"]:
        if "why" not in row:
            limit = row["share"] * RESULT["full_bytes"][row["trace"]]
            assert row["gpu_bytes"] <= limit


def test_a_policy_that_cannot_be_so_small_says_what_takes_the_bytes(board):
    row = board.row("lru", {"policy": "lru"}, 0.125)
    assert row["why"].endswith("index keys alone take 21.8 MiB") and "entries" not in row
    assert row["least_bytes"] > 0.125 * board.full_bytes
    row = board.row("lsa", {"policy": "lsa", "checkpoint": "none.safetensors"}, 0.4)
    assert "no such indexer checkpoint" in row["why"]

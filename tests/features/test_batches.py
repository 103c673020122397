"""benchmarks/batches.py: what marks a batch whose step stands out."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="a whole model needs fmsim[model]")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import batches


def test_a_step_is_compared_with_the_line_between_its_neighbours():
    """Between 20 ms at 64 requests and 40 at 128 lie 30 at 96; 39 are 1.3 times that."""
    found = batches.of_neighbours({128: 0.040, 64: 0.020, 96: 0.039})
    assert found == {96: pytest.approx(1.3)} and found[96] > batches.MOST


def test_rows_are_by_batch_and_the_ends_have_no_neighbours():
    rows = batches.with_neighbours("bfloat16", {4: 0.012, 1: 0.010, 2: 0.011})
    assert [row["batch"] for row in rows] == [1, 2, 4]
    assert ["of_neighbours" in row for row in rows] == [False, True, False]


def test_an_even_slope_stands_out_nowhere():
    found = batches.of_neighbours({batch: 0.01 + batch * 1e-4 for batch in batches.BATCHES})
    assert list(found) == sorted(batches.BATCHES)[1:-1]
    assert all(share == pytest.approx(1) for share in found.values())

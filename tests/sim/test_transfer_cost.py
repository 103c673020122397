"""Gathers on a link of round times, between the points that were timed and beyond them."""

import numpy as np
import pytest
from hand_ledger import H100

from fmsim.hw import hardware_names, load_hardware
from fmsim.hw.spec import Figure, Gather
from fmsim.sim.transfer_cost import NVME_LATENCY_S, GatherCurve, nvme_read_bytes

US = 1e-6
# microseconds by rows: 10 us and 0.2 ns a byte, beyond 50,000 bytes of small rows 0.1 ns; and
# 20 us and 0.2 ns a byte
SMALL, LARGE = {10: 11, 100: 20, 1000: 65}, {10: 24, 100: 60}


def curve(bytes_per_s=20e9, speedup=1.0, sizes=((2000, LARGE), (500, SMALL))):
    gathers = tuple(
        Gather(
            row_bytes=size,
            source="made by hand",
            bytes_per_s={rows: rows * size / (us * US) for rows, us in took.items()},
        )
        for size, took in sizes
    )
    figure = Figure(value=bytes_per_s, source="made by hand")
    changes = {
        "bandwidth_bytes_per_s": figure,
        "gathers": gathers,
        "gather_speedup": speedup,
    }
    return GatherCurve(H100.link.model_copy(update=changes))


@pytest.mark.parametrize(
    ("row_bytes", "n_bytes", "us"),
    [
        (500, 0, 0),
        (500, 1, 10.0002),
        (500, 5000, 11),
        (500, 27_500, 15.5),
        (500, 50_000, 20),
        (500, 275_000, 42.5),
        (500, 1_000_000, 115),
        (2000, 20_000, 24),
        (2000, 400_000, 100),
        # half-way between, as logarithms go: the mean of both
        (1000, 50_000, (20 + 30) / 2),
        (1000, 500_000, (65 + 120) / 2),
        (1000, 2_000_000, (215 + 420) / 2),
        # sizes beyond those that were timed: the nearest one
        (100, 50_000, 20),
        (9000, 50_000, 30),
    ],
)
def test_a_gather_takes_its_fixed_time_and_its_bytes(row_bytes, n_bytes, us):
    found = curve()
    assert found.seconds(row_bytes, np.array([n_bytes, 0]))[0] == pytest.approx(us * US)
    assert found.one_s(row_bytes, n_bytes) == pytest.approx(us * US)


def test_fixed_times():
    found = [curve().fixed_s(size) for size in (100, 500, 1000, 2000)]
    assert found == pytest.approx([10 * US, 10 * US, 15 * US, 20 * US])


def test_no_gather_is_faster_than_the_link():
    """At 4 GB/s 500,000 bytes take 125 us, 5,000 bytes 1.25 us."""
    slow = curve(bytes_per_s=4e9)
    for n_bytes, us in ((500_000, 125), (5000, 11)):
        assert slow.seconds(500, n_bytes) == pytest.approx(us * US)
        assert slow.one_s(500, n_bytes) == pytest.approx(us * US)


def test_a_link_twice_as_fast_moves_bytes_in_half_the_time_and_starts_as_late():
    fast = curve(speedup=2.0)
    assert fast.seconds(500, 50_000) == pytest.approx(15 * US)
    assert fast.fixed_s(500) == pytest.approx(10 * US)


def test_one_size_of_rows_stands_for_all():
    alone = curve(sizes=((500, SMALL),))
    assert [alone.one_s(size, 50_000) for size in (1, 500, 10**6)] == pytest.approx([20 * US] * 3)


def test_drives_read_whole_units():
    assert [nvme_read_bytes(n) for n in (1, 4096, 4097, 9000)] == [4096, 4096, 8192, 12_288]
    assert NVME_LATENCY_S == 90e-6


def test_a_first_segment_that_falls_leaves_time_for_the_bytes():
    """12 us for 10 rows and 11 for 20: at 20 GB/s these 10,000 bytes take 0.5, so the fixed cost is
    10.5 us, and not the 13 of a line through both.
    """
    noisy = curve(sizes=((500, {10: 12, 20: 11, 100: 20}),))
    assert noisy.fixed_s(500) == pytest.approx(10.5 * US)
    assert noisy.one_s(500, 10_000) == pytest.approx(11 * US)
    twice = curve(bytes_per_s=40e9, speedup=2.0, sizes=((500, {10: 12, 20: 11, 100: 20}),))
    assert twice.fixed_s(500) == pytest.approx(10.5 * US)  # at the 20 GB/s that were measured
    early = curve(sizes=((500, {10: 1, 20: 4}),))  # a line through both would begin below zero
    assert early.fixed_s(500) == 0 and early.one_s(500, 2500) == pytest.approx(0.5 * US)


@pytest.mark.parametrize("name", hardware_names())
def test_every_gather_of_a_preset_takes_longer_than_its_fixed_cost(name):
    found = GatherCurve(load_hardware(name).link)
    for row_bytes in (100, 584, 600, 716, 2336, 37_376, 10**6):
        for rows in (1, 2, 32, 42, 64, 128, 4096):
            taken_s = found.one_s(row_bytes, rows * row_bytes)
            assert taken_s > found.fixed_s(row_bytes) > 0

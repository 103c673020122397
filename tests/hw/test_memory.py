"""The link conserves bytes, never exceeds its bandwidth and shares it fairly; pools say what is
short.
"""

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS
from fmsim.hw import load_hardware
from fmsim.hw.memory import FairLink, MemorySystem


def run(bandwidth, transfers):
    """transfers: (start_s, bytes, limit).

    Returns the end of each, the link, and the total rate after every start.
    """
    env = simpy.Environment()
    link = FairLink(env, bandwidth)
    ends, totals = [None] * len(transfers), []

    def one(index, start_s, n_bytes, limit):
        yield env.timeout(start_s)
        done = link.transfer(n_bytes, limit)
        totals.append(sum(link.rates))
        yield done
        totals.append(sum(link.rates))
        ends[index] = env.now

    for index, transfer in enumerate(transfers):
        env.process(one(index, *transfer))
    env.run()
    return ends, link, totals


FREE = float("inf")


def test_transfers_end_late_in_a_long_run():
    """At 10^7 s the clock's resolution is 2 ns, in which a fast link moves many bytes: no end may
    wait for less than that.
    """
    transfers = [(1e7 + i * 1e-7, 3000.0 + i, FREE) for i in range(40)]
    ends, link, _ = run(55.1e9, transfers)
    assert all(end is not None for end in ends) and link.idle
    assert link.moved_bytes == pytest.approx(sum(n_bytes for _, n_bytes, _ in transfers))


@pytest.mark.parametrize(
    ("transfers", "ends"),
    [
        ([(0, 100, FREE)], [10]),
        ([(0, 100, 5)], [20]),  # its own limit binds
        ([(0, 100, FREE), (0, 100, FREE)], [20, 20]),
        (
            [(0, 100, FREE), (5, 100, FREE)],
            [15, 20],
        ),  # 50 alone, then 50 at half speed; the second then alone
        (
            [(0, 100, FREE), (0, 20, 2)],
            [12, 10],
        ),  # the limited one leaves 8 of 10 to the other: 80, then 20 alone
        ([(0, 30, FREE), (0, 60, FREE), (0, 90, FREE)], [9, 15, 18]),
        ([(0, 0, FREE)], [0]),
    ],
)
def test_fair_sharing_in_worked_cases(transfers, ends):
    assert run(10, transfers)[0] == pytest.approx(ends)


TRANSFER = st.tuples(
    st.floats(0, 50), st.floats(0, 1e4), st.one_of(st.just(FREE), st.floats(0.1, 200))
)


@given(bandwidth=st.floats(0.5, 500), transfers=st.lists(TRANSFER, min_size=1, max_size=8))
def test_bytes_are_conserved_and_the_bandwidth_is_never_exceeded(bandwidth, transfers):
    ends, link, totals = run(bandwidth, transfers)
    wanted = sum(n_bytes for _, n_bytes, _ in transfers)
    assert link.moved_bytes == pytest.approx(wanted)
    assert link.idle
    assert max(totals) <= bandwidth * (1 + 1e-9)
    for end, (start, n_bytes, limit) in zip(ends, transfers):
        assert end >= start + n_bytes / min(limit, bandwidth) - 1e-6 * (1 + end)
    # over the whole span no more than the bandwidth, which also bounds the last end from below
    first = min(start for start, _, _ in transfers)
    assert wanted <= bandwidth * (max(ends) - first) * (1 + 1e-9) + 1e-5


@given(bandwidth=st.floats(1, 100), sizes=st.lists(st.floats(1, 1e3), min_size=1, max_size=6))
def test_a_link_never_idles_while_unlimited_work_waits(bandwidth, sizes):
    ends, _, _ = run(bandwidth, [(0, size, FREE) for size in sizes])
    assert max(ends) == pytest.approx(sum(sizes) / bandwidth)
    assert [end for _, end in sorted(zip(sizes, ends))] == sorted(ends)


def test_what_does_not_fit_names_the_short_figure():
    memory = MemorySystem(simpy.Environment(), load_hardware("h100"), PRESETS["v4-flash"])
    free = memory.hbm.level
    memory.take(free - 2**30, 0, "the first request")
    with pytest.raises(FmsimError, match=r"2\.00 GiB of GPU memory, 1\.00 GiB more"):
        memory.take(2 * 2**30, 0, "the second request")
    with pytest.raises(FmsimError, match="host memory"):
        memory.take(0, 1e15, "a mirror")
    with pytest.raises(FmsimError, match="v4-pro does not fit H100"):
        MemorySystem(simpy.Environment(), load_hardware("h100"), PRESETS["v4-pro"])

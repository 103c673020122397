"""Hit counts against libCacheSim, a test-time oracle: one layer, one access a step, an empty cache
to start with.
"""

import numpy as np
import pytest
from hand_trace import stream
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.policies.belady import Belady
from fmsim.policies.clock import Clock
from fmsim.policies.fifo import FIFO
from fmsim.policies.lfu import LFU
from fmsim.policies.lru import LRU
from fmsim.policies.lruk import LRUK
from fmsim.policies.random_fetch import RandomFetch
from fmsim.policies.s3fifo import S3FIFO
from fmsim.policies.sieve import Sieve
from fmsim.replay.replayer import Replayer

lcs = pytest.importorskip("libcachesim", reason="libcachesim has no wheel here")
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])


def their_hits(cache, entries, slots, path, **params):
    """Hits of a libCacheSim cache of `slots` unit objects; its records carry the index of each
    object's next request.
    """
    records = np.zeros(len(entries), RECORD)
    records["time"], records["id"], records["size"] = (
        np.arange(len(entries)),
        np.asarray(entries) + 1,
        1,
    )
    following = {}
    for i in range(len(entries) - 1, -1, -1):
        records["next"][i] = following.get(entries[i], -1)
        following[entries[i]] = i + 1
    records.tofile(path)
    misses, _ = cache(cache_size=slots, hashpower=10, **params).process_trace(
        lcs.TraceReader(str(path), lcs.TraceType.ORACLE_GENERAL_TRACE)
    )
    return round(len(entries) * (1 - misses))


PAIRS = [
    (LRU, "LRU"),
    (LFU, "LFU"),
    (Belady, "Belady"),
    (FIFO, "FIFO"),
    (Clock, "Clock"),
    (Sieve, "Sieve"),
    (LRUK, "LRUK"),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(("pages", "slots", "steps"), [(50, 8, 800), (200, 30, 1200), (20, 1, 300)])
def test_hits_equal_libcachesim(ours, theirs, pages, slots, steps, tmp_path):
    entries = (np.random.default_rng(pages).zipf(1.2, steps) % pages).tolist()
    ledger = Replayer(stream(entries, pages), cold=True).run(ours(budget=f"{slots} entries"))
    assert ledger.hit.sum() == their_hits(getattr(lcs, theirs), entries, slots, tmp_path / "trace")
    assert 0 < ledger.hit.sum() < steps


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 9))
def test_any_short_stream_gives_libcachesims_hits(tmp_path_factory, entries, slots):
    path, replayer = (
        tmp_path_factory.mktemp("stream") / "trace",
        Replayer(stream(entries, 10), cold=True),
    )
    for ours, theirs in PAIRS:
        assert replayer.run(ours(budget=f"{slots} entries")).hit.sum() == their_hits(
            getattr(lcs, theirs), entries, slots, path
        )


def our_hits(policy, entries, n_entries):
    return Replayer(stream(entries, n_entries), cold=True).run(policy).hit.sum()


@pytest.mark.parametrize("k", [1, 3])
def test_the_k_of_lruk(k, tmp_path):
    entries = (np.random.default_rng(k).zipf(1.2, 1500) % 60).tolist()
    ours = our_hits(LRUK(budget="12 entries", k=k), entries, 60)
    assert ours == their_hits(lcs.LRUK, entries, 12, tmp_path / "trace", k=k)


@pytest.mark.parametrize("slots", [20, 47, 100])
def test_s3fifo_with_the_shares_of_its_paper(slots, tmp_path):
    entries = (np.random.default_rng(slots).zipf(1.1, 1500) % 400).tolist()
    ours = our_hits(S3FIFO(budget=f"{slots} entries"), entries, 400)
    assert ours == their_hits(lcs.S3FIFO, entries, slots, tmp_path / "trace")
    assert 0 < ours < 1500


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=200),
    st.integers(8, 18),  # libCacheSim refuses a small queue of fewer than two
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0.25, 0.9, 2.0]),
)
def test_s3fifo_with_any_shares(tmp_path_factory, entries, slots, uses, ghosts):
    path = tmp_path_factory.mktemp("stream") / "trace"
    ours = S3FIFO(
        budget=f"{slots} entries", small_share=0.25, ghost_share=ghosts, uses_to_stay=uses
    )
    theirs = dict(small_size_ratio=0.25, ghost_size_ratio=ghosts, move_to_main_threshold=uses)
    assert our_hits(ours, entries, 20) == their_hits(lcs.S3FIFO, entries, slots, path, **theirs)


def test_random_fetch_hits_as_often_as_libcachesims_random(tmp_path):
    """Its draws are its own, so rates are compared: on a loop, where LRU and FIFO hit nothing."""
    entries = list(range(40)) * 100
    ours = our_hits(RandomFetch(budget="30 entries"), entries, 40)
    theirs = their_hits(lcs.Random, entries, 30, tmp_path / "trace")
    assert ours == pytest.approx(theirs, rel=0.1)
    assert our_hits(FIFO(budget="30 entries"), entries, 40) == 0

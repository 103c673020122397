"""Hit counts against libCacheSim, a test-time oracle: one layer, one access a step, an empty cache
to start with.
"""

import numpy as np
import pytest
from hand_trace import stream
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.policies.belady import Belady
from fmsim.policies.lfu import LFU
from fmsim.policies.lru import LRU
from fmsim.replay.replayer import Replayer

lcs = pytest.importorskip("libcachesim", reason="libcachesim has no wheel here")
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])


def their_hits(cache, entries, slots, path):
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
    misses, _ = cache(cache_size=slots).process_trace(
        lcs.TraceReader(str(path), lcs.TraceType.ORACLE_GENERAL_TRACE)
    )
    return round(len(entries) * (1 - misses))


PAIRS = [(LRU, "LRU"), (LFU, "LFU"), (Belady, "Belady")]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    ("pages", "slots", "steps"), [(50, 8, 1500), (200, 30, 2500), (20, 1, 400)]
)
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

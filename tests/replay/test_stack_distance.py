"""LRU's misses at every budget from one pass: against a walk through Mattson's list, and against
replaying LRU at each size.
"""

from pathlib import Path

import numpy as np
import pytest
from hand_trace import HandTrace
from hypothesis import given, settings
from hypothesis import strategies as st
from made_trace import make_trace

from fmsim.policies.lru import LRU
from fmsim.replay.replayer import Replayer
from fmsim.replay.stack_distance import Course, distances, distances_plain, least_slots
from fmsim.trace import read

SHIPPED = Path(__file__).parents[2] / "traces/smollm2-8k-continuation.safetensors"


def course_of(replayer, granularity):
    return Course(granularity, replayer.prompt_entries, replayer.entries)


def assert_as_replayed(replayer, granularity, shared, sizes=None):
    """Pages loaded and entries missed, at `sizes` (all that count by default)."""
    paged, course = replayer.paged(granularity, shared), course_of(replayer, granularity)
    found = distances(paged, course)
    for slots in sizes or range(least_slots(paged, course), paged.n_pages + 1):
        policy = LRU(
            budget=f"{slots * granularity} entries",
            granularity=granularity,
            scope="shared" if shared else "per_layer",
        )
        ledger = replayer.run(policy)
        assert ((found >= slots).sum(axis=2) == ledger.demand_loads).all(), slots
        missed = np.where(found >= slots, paged.count, 0).sum(axis=2)
        assert (missed.sum(axis=1) == (ledger.accessed - ledger.hit).sum(axis=1)).all(), slots


def test_by_hand():
    """Prompt pages 0 to 3 start as 3, 2, 1, 0, the newest first."""
    replayer = Replayer(HandTrace([[[3]], [[0]], [[3]], [[1, 2]], [[0]], [[2]]], prompt_entries=4))
    found = distances(replayer.paged(1, False), course_of(replayer, 1))[:, 0]
    # 3210 -> 3210 -> 0321 -> 3021 -> 2130 (2 and 1 were never used before: the higher page first)
    # -> 0213
    assert found.tolist() == [[0, -1], [3, -1], [1, -1], [3, 2], [3, -1], [1, -1]]


@st.composite
def traces(draw):
    """Two layers, from 1 to 40 steps of up to 5 entries among those visible, which grow as the
    decode goes on.
    """
    prompt = draw(st.integers(6, 40))
    n_steps = draw(st.integers(1, 40))
    visible = [prompt + (step + 1) // 4 for step in range(n_steps)]
    step_ids = lambda n: st.lists(
        st.sets(st.integers(0, n - 1), min_size=1, max_size=5), min_size=2, max_size=2
    )
    return HandTrace(
        [[sorted(ids) for ids in draw(step_ids(n))] for n in visible],
        prompt_entries=prompt,
        still=False,
    )


@settings(max_examples=60, deadline=None)
@given(traces(), st.sampled_from([1, 4, 16]), st.booleans())
def test_one_pass_agrees_with_mattsons_walk_and_with_every_replay(trace, granularity, shared):
    replayer = Replayer(trace)
    paged, course = replayer.paged(granularity, shared), course_of(replayer, granularity)
    least = least_slots(paged, course)
    fast, plain = distances(paged, course), distances_plain(paged, course)
    assert (
        np.maximum(fast, least - 1) == np.maximum(plain, least - 1)
    ).all()  # the order of what every size holds says nothing
    assert_as_replayed(replayer, granularity, shared)


@pytest.mark.parametrize("seed", range(100))
def test_a_page_that_has_just_closed_sinks_as_in_mattsons_walk(seed):
    """Of one to three entries a step, many are of pages that decode began."""
    rng = np.random.default_rng(seed)
    prompt, n_steps, granularity = rng.integers(1, 25), rng.integers(1, 41), (4, 16)[seed % 2]
    visible = [int(prompt) + (step + 1) // 4 for step in range(n_steps)]
    rows = [[np.unique(rng.integers(0, n, rng.integers(1, 4))).tolist()] for n in visible]
    replayer = Replayer(HandTrace(rows, prompt_entries=int(prompt), still=False))
    paged, course = replayer.paged(granularity, False), course_of(replayer, granularity)
    fast, plain = distances(paged, course), distances_plain(paged, course)
    inner = least_slots(paged, course) - 1
    assert np.maximum(fast, inner).tolist() == np.maximum(plain, inner).tolist()


def test_a_page_that_waits_to_sink_waits_until_the_next_one_closes():
    """One entry a step, over 30 that close: of most of them several pages were never used."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        rows = [[[int(rng.integers(0, 6 + (step + 1) // 4))]] for step in range(120)]
        replayer = Replayer(HandTrace(rows, prompt_entries=6, still=False))
        paged, course = replayer.paged(4, False), course_of(replayer, 4)
        found = [np.maximum(way(paged, course), 1) for way in (distances, distances_plain)]
        assert np.array_equal(*found), seed


def test_a_steps_pages_must_fit_beside_the_open_one():
    """Entries 0 and 5 are two pages of four; a page of one entry is never open."""
    replayer = Replayer(HandTrace([[[0, 1, 5]], [[2]]], prompt_entries=6))
    for granularity, least in ((1, 3), (4, 2 + 1), (16, 1 + 1)):
        paged, course = replayer.paged(granularity, False), course_of(replayer, granularity)
        assert least_slots(paged, course) == least


@pytest.mark.parametrize("granularity", [1, 16, 64])
def test_a_recorded_trace_at_some_sizes(granularity):
    replayer = Replayer(read(SHIPPED))
    least = least_slots(replayer.paged(granularity, False), course_of(replayer, granularity))
    n_pages = replayer.paged(granularity, False).n_pages
    assert_as_replayed(
        replayer,
        granularity,
        False,
        sorted({least, (least + n_pages) // 3, n_pages - 1, n_pages} - set(range(least))),
    )


def test_a_larger_budget_never_misses_more():
    replayer = Replayer(make_trace())
    found = distances(replayer.paged(4, True), course_of(replayer, 4))
    misses = [int((found >= slots).sum()) for slots in range(found.max() + 2)]
    assert misses == sorted(misses, reverse=True) and misses[0] > misses[-1] == 0


def test_a_step_without_entries_changes_nothing():
    replayer = Replayer(HandTrace([[[1]], [[]], [[1]]], prompt_entries=4))
    assert distances(replayer.paged(1, False), course_of(replayer, 1))[:, 0].tolist() == [
        [2],
        [-1],
        [0],
    ]

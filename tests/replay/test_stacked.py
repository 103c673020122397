"""Requests of different lengths, kept by one cache manager, against a cache manager each: the same
page in every slot at every step.
"""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fmsim.errors import DoesNotFit
from fmsim.policies import registry
from fmsim.policies.lru import LRU
from fmsim.replay import stacked
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.context import RequestShape, build_context
from fmsim.replay.ledger_builder import LedgerBuilder
from fmsim.replay.of_each import PolicyOfEach
from fmsim.replay.paging import page_rows, page_step
from fmsim.replay.stacked import StackedManager, captured, served_by_one

STEPS, LAYERS, TOPK, RATE, TAU = 40, 2, 6, 4, 8
SPECS = (
    {"policy": "lru"},
    {"policy": "lru", "prompt_history": True},
    {"policy": "lru", "on_miss": "mask", "cadence": TAU},
    {"policy": "lru", "on_miss": "mask", "cadence": TAU, "sees": "all"},
    {"policy": "lru", "on_miss": "fallback"},
    {"policy": "lfu"},
    {"policy": "lfu", "on_miss": "fallback", "fallback_below": 0.7},
    {"policy": "lruk"},
    {"policy": "h2o"},
    {"policy": "h2o", "sees": "all"},
    {"policy": "recency"},
    {"policy": "fifo"},
    {"policy": "clock"},
    {"policy": "sieve"},
    {"policy": "s3fifo"},
    {"policy": "hisparse"},
    {"policy": "hisparse", "initial": "empty"},
    {"policy": "random-fetch"},
    {"policy": "snapkv"},
    {"policy": "pyramid"},
)


def manager_of(spec, tokens, rng, xp=None):
    policy = registry.build(spec)
    shape = RequestShape(
        n_layers=LAYERS,
        prompt_entries=tokens // RATE,
        n_entries=(tokens + STEPS) // RATE,
        topk=TOPK,
        n_steps=STEPS,
        entry_tokens=RATE,
        tau=TAU,
    )
    mass = rng.random((LAYERS, tokens // RATE), dtype=np.float32)
    return CacheManager(policy, build_context(policy, shape, prompt_mass=mass, xp=xp))


def selected(manager, n_entries, rng):
    """Of each layer, ids [L, K] and their mass."""
    ids = np.full((LAYERS, TOPK), -1, dtype=np.int64)
    for row in ids:
        some = np.sort(rng.permutation(n_entries)[:TOPK])
        row[: len(some)] = some
    mass = rng.random(ids.shape, dtype=np.float32).astype(np.float16).astype(np.float32)
    return ids, np.where(ids < 0, np.float32(0), mass)


def by_page(manager, ids, mass, shared):
    granularity = manager.ctx.granularity
    if shared:
        return page_rows(
            ids.reshape(-1, LAYERS * TOPK), mass.reshape(-1, LAYERS * TOPK), granularity
        )
    return page_step(ids.reshape(-1, TOPK), mass.reshape(-1, TOPK), granularity, shared=False)


def one_step(manager, book, step, n_entries, use, number):
    """What `DecodeLoop` does of a step; `number` is the step as `settle` gets it."""
    written = manager.write(step, n_entries)
    book.moved(step, "written", written)
    cadence = manager.policy.params.cadence
    if cadence > 1 and step and step % cadence == 0:
        book.moved(step, "lookahead_loads", manager.decide(step))
    if step and step % TAU == 0:
        book.window_began(step)
    if not manager.passive:
        book.moved(step, "demand_loads", manager.settle(number, manager.look_up(use)))
    return written is not None


def pinned(test, pages, rows=slice(None)):
    """bool [groups or 1, pages], of a manager's `test`, which is None where nothing is pinned."""
    if test is None:
        return np.zeros(pages.shape, dtype=bool)
    found = np.asarray(test(pages))
    return found[rows][:1] if len(found) > 1 else found


def drawn(policy, budget, granularity=1, apart=False, tokens=(61, 150, 96), **more):
    """What `given` draws, said outright."""
    return {
        "library": "numpy",
        "seed": 0,
        "spec": {"policy": policy} | more,
        "budget": budget,
        "granularity": granularity,
        "scope": "per_layer",
        "apart": apart,
        "tokens": list(tokens),
    }


@settings(max_examples=30, deadline=None)
@example(**drawn("lru", "25%", on_miss="mask", cadence=TAU))
@example(**drawn("lru", "25%", on_miss="mask", cadence=TAU, apart=True))
@example(**drawn("clock", "25%"))
@example(**drawn("clock", "25%", apart=True))
@example(**drawn("hisparse", "25%", apart=True))
@example(**drawn("h2o", "25%", granularity=4))
@example(**drawn("snapkv", "60%"))
@example(**drawn("lru", "40 entries", tokens=(61, 190), on_miss="mask", cadence=TAU))
@example(**drawn("lru", "4 entries", tokens=(2, 61)))
@given(
    library=st.sampled_from(["numpy", "numpy", "numpy", "torch"]),  # torch takes ten times as long
    seed=st.integers(0, 2**32),
    spec=st.sampled_from(SPECS),
    budget=st.sampled_from(["4 entries", "9 entries", "25%", "60%", "40 entries"]),
    granularity=st.sampled_from([1, 4]),
    scope=st.sampled_from(["per_layer", "shared"]),
    apart=st.booleans(),
    tokens=st.lists(st.integers(60, 200), min_size=1, max_size=4),
)
def test_a_row_of_many_is_kept_as_it_is_alone(
    library, seed, spec, budget, granularity, scope, apart, tokens
):
    """By one policy for all rows where that may be, or each by its own request's."""
    scope = "per_layer" if spec["policy"] == "pyramid" else scope
    spec = spec | {"budget": budget, "granularity": granularity, "scope": scope}
    rng = np.random.default_rng(seed)
    xp = None if library == "numpy" else pytest.importorskip("array_api_compat.torch")
    try:
        alone = [manager_of(spec, count, np.random.default_rng(count), xp) for count in tokens]
    except DoesNotFit:  # fewer slots than are pinned
        assume(False)
    parts = [manager_of(spec, count, np.random.default_rng(count), xp) for count in tokens]
    one_of_all = served_by_one(parts)
    assert one_of_all or not captured(parts[0].policy)
    entries = np.array([[(count + step + 1) // RATE for count in tokens] for step in range(STEPS)])
    with patch.object(stacked, "served_by_one", lambda parts: one_of_all and not apart):
        together = StackedManager(parts, entries)
    for name, of_all in (("all_keys", all), ("keeps_all", all), ("comes_back", any)):
        assert getattr(together.needs, name) == of_all(getattr(m.needs, name) for m in alone)
    there = np.asarray if xp is None else xp.asarray
    books = [LedgerBuilder(manager, STEPS) for manager in alone]
    whole = LedgerBuilder(together, STEPS)
    shared = scope == "shared"
    held = together._pinned()  # as a CUDA graph holds it from its capture on
    for step in range(STEPS):
        picked = [
            selected(manager, count, rng)
            for manager, count in zip(alone, entries[step], strict=True)
        ]
        began = []
        for manager, book, (ids, mass), count in zip(
            alone, books, picked, entries[step], strict=True
        ):
            use = by_page(manager, there(ids), there(mass), shared)
            began.append(one_step(manager, book, step, int(count), use, step))
        ids, mass = (there(np.concatenate(part)) for part in zip(*picked, strict=True))
        use = by_page(together, ids, mass, shared)
        inside = captured(together.policy)
        number = there(np.array(step)) if inside else step  # as a CUDA graph has it
        assert one_step(together, whole, step, None, use, number) == any(began)
        for r, manager in enumerate(alone):
            rows = slice(together.starts[r], together.starts[r + 1])
            pages = there(np.arange(together.ctx.n_pages))[None, :]
            expected = pinned(manager._pinned(), pages)[:, : manager.visible]
            assert np.array_equal(pinned(held, pages, rows)[:, : manager.visible], expected)
            mine = np.asarray(together.residency.slots[rows])
            expected = np.asarray(manager.residency.slots)
            assert np.array_equal(mine[:, : expected.shape[1]], expected), (step, r)
            assert (mine[:, expected.shape[1] :] == -1).all()
            part = whole.of_rows(rows, manager)
            for name, count in books[r].counts.items():
                assert np.array_equal(part.counts[name][step], count[step]), (name, step, r)
    for r, manager in enumerate(alone):
        part = whole.of_rows(slice(together.starts[r], together.starts[r + 1]), manager)
        assert np.array_equal(np.asarray(part.overlap), np.asarray(books[r].overlap))
        assert np.array_equal(np.asarray(part.initial), np.asarray(books[r].initial))


def test_each_ones_pages_are_asked_for_beside_anothers():
    """Two requests of two groups and of one; a request that asks for nothing, and all of them."""
    asked = [np.array([[4, 5, 6], [7, -1, -1]]), None]
    policies = [
        SimpleNamespace(
            prefetch=lambda step, n=n: asked[n],
            ctx=SimpleNamespace(device=None),
            params=None,
            floor=0.5,
        )
        for n in (0, 1)
    ]
    both = PolicyOfEach(policies, [slice(0, 2), slice(2, 3)], np)
    assert both.floor == 0.5
    found = both.prefetch(3)
    assert found.tolist() == [[4, 5, 6], [7, -1, -1], [-1, -1, -1]] and found.dtype == np.int64
    asked[1] = np.array([[9]])
    assert both.prefetch(3).tolist() == [[4, 5, 6], [7, -1, -1], [9, -1, -1]]
    asked[0] = None
    assert both.prefetch(3).tolist() == [[-1], [-1], [9]]
    asked[1] = None
    assert both.prefetch(3) is None


def test_each_one_decides_and_says_what_the_pages_it_sees_are_worth():
    """Two pages are seen by two groups, four by a third; beyond the two anything may stand."""
    decided = []
    policies = [
        SimpleNamespace(
            decide=lambda step, n=n: decided.append((n, step)),
            worth_of_first=lambda step, seen, n=n: np.full((2 - n, seen), step + n, np.float32),
            ctx=SimpleNamespace(device=None),
            params=None,
            floor=None,
        )
        for n in (0, 1)
    ]
    both = PolicyOfEach(policies, [slice(0, 2), slice(2, 3)], np)
    both.decide(5)
    assert decided == [(0, 5), (1, 5)]
    found = both.worth_of_seen(5, [2, 4])
    assert found.shape == (3, 4) and found.dtype == np.float32
    assert found[:2, :2].tolist() == [[5, 5]] * 2 and found[2].tolist() == [6] * 4


def test_a_request_is_foreseen_by_its_own_manager_and_entries():
    """Beyond the last step its entries are those of the last."""
    parts = [
        SimpleNamespace(foresee=lambda *given, name=name: (name, *given)) for name in ("a", "b")
    ]
    whole = SimpleNamespace(managers=parts, _entries=np.array([[10, 20], [11, 21], [12, 22]]))
    asked = [(0, 0), (1, 1), (2, 1), (9, 0)]
    found = [StackedManager.foresee(whole, step, 99, 5, part) for step, part in asked]
    assert found == [("a", 0, 10, 5), ("b", 1, 21, 5), ("b", 2, 22, 5), ("a", 9, 12, 5)]
    assert StackedManager.foresee(whole, 0, 99, 5) == ("a", 0, 10, 5)


def test_what_is_scored_is_counted_for_each_request():
    alone = [
        manager_of({"policy": "lru", "budget": "25%"}, 61 + n, np.random.default_rng(0))
        for n in (0, 9)
    ]
    together = StackedManager(alone, np.full((STEPS, 2), 30))
    whole = LedgerBuilder(together, STEPS)
    parts = [whole.of_rows(rows, manager) for rows, manager in zip(together.rows, alone)]
    for scored, manager in zip((100, 200), alone):
        manager.policy.scored_entries = lambda step, scored=scored: scored + step
    whole.score(3)
    assert [np.flatnonzero(part.scored).tolist() for part in parts] == [[3], [3]]
    assert [part.scored[3] for part in parts] == [103, 203] and not whole.scored.any()


class OfOnesOwn(LRU):
    """A subclass that has not said that its rows are apart."""

    name = "of-ones-own"


def test_a_subclass_does_not_inherit_the_claim():
    assert captured(LRU()) and not captured(OfOnesOwn())
    assert not captured(registry.build({"policy": "fifo"}))  # it follows what moves
    for nosy in ("moved", "prefetch"):
        policy = type("Nosy", (LRU,), {"by_row": True, nosy: lambda self, *given: None})
        assert not captured(policy())
    assert not captured(type("Early", (LRU,), {"by_row": True, "decides_ahead": True})())


def test_one_policy_serves_rows_that_may_be_captured_or_lie_apart():
    served = {
        name: served_by_one([SimpleNamespace(policy=registry.build({"policy": name}))])
        for name in ("lru", "fifo", "snapkv", "random-fetch")
    }
    assert served == {"lru": True, "fifo": True, "snapkv": False, "random-fetch": False}
    assert not served_by_one([SimpleNamespace(policy=OfOnesOwn())])

"""The replay: conservation, what a miss costs under each rule, the bound of belady, and ledgers on
disk.
"""

import dataclasses

import numpy as np
import pytest
from hand_trace import HandTrace
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS
from fmsim.policies import registry
from fmsim.replay.cache_manager import heaviest_missing
from fmsim.replay.golden import golden_mask
from fmsim.replay.ledger import Ledger
from fmsim.replay.paging import Accesses, page_trace, read_trace
from fmsim.replay.replayer import Replayer, replay
from fmsim.sim.footprint import ModelMemory
from fmsim.testing import sample_trace

N_ENTRIES = 24


@pytest.fixture(scope="module")
def replayer():
    return Replayer(sample_trace())


def run(source, **spec):
    return source.run(registry.build(spec))


def balance(ledger):
    moved = ledger.demand_loads + ledger.lookahead_loads + ledger.written - ledger.evicted
    return np.diff(ledger.resident, axis=0, prepend=ledger.initial[None]) - moved


@pytest.mark.parametrize("granularity", [1, 4, 16])
@pytest.mark.parametrize("scope", ["per_layer", "shared"])
@pytest.mark.parametrize("on_miss", ["fetch", "mask", "fallback"])
@pytest.mark.parametrize("cadence", [1, 16])
def test_slots_are_conserved_under_every_switch(replayer, granularity, scope, on_miss, cadence):
    ledger = run(
        replayer,
        policy="lru",
        budget="128 entries",
        granularity=granularity,
        scope=scope,
        on_miss=on_miss,
        cadence=cadence,
        sees="all",
    )
    assert not balance(ledger).any() and (ledger.resident <= ledger.n_slots).all()
    assert (
        ledger.n_groups == (1 if scope == "shared" else 2) and ledger.n_slots == 128 // granularity
    )
    assert (ledger.hit <= ledger.accessed).all() and (
        ledger.golden_hit <= np.minimum(ledger.golden, ledger.hit)
    ).all()
    assert (ledger.mass_kept <= ledger.mass_total + 1e-6).all()
    if cadence == 1:
        assert ledger.lookahead_loads.sum() == 0
    elif on_miss == "mask":
        assert ledger.lookahead_loads.sum() > 0
    if on_miss == "fetch":
        assert np.allclose(ledger.mass_kept, ledger.mass_total)
    if on_miss == "mask":
        assert ledger.demand_loads.sum() == 0 and (ledger.mass_kept < ledger.mass_total).any()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.sets(st.integers(0, N_ENTRIES - 1), min_size=1, max_size=5), min_size=2, max_size=2
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(5, 12),
    st.booleans(),
)
def test_no_demand_policy_beats_belady(steps, slots, cold):
    """Whenever a step's entries fit; from an empty GPU, or from what belady itself would have kept
    of the prompt.
    """
    source = Replayer(
        HandTrace([[sorted(ids) for ids in step] for step in steps], prompt_entries=N_ENTRIES),
        cold=cold,
    )
    best = run(source, policy="belady", budget=f"{slots} entries")
    for name in ("lru", "lfu"):
        ledger = run(source, policy=name, budget=f"{slots} entries")
        assert (best.demand_loads.sum(axis=0) <= ledger.demand_loads.sum(axis=0)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=7),
    st.integers(4, 6),
)
def test_belady_has_the_fewest_misses_there_can_be(steps, slots):
    """Against every choice of victims, tried out."""
    states = {frozenset(): 0}
    for ids in steps:
        reached = {}
        for held, misses in states.items():
            for kept in subsets(held - ids, slots - len(ids)):
                reached[kept | ids] = min(reached.get(kept | ids, 99), misses + len(ids - held))
        states = reached
    ledger = run(
        Replayer(HandTrace([[sorted(ids)] for ids in steps], prompt_entries=10), cold=True),
        policy="belady",
        budget=f"{slots} entries",
    )
    assert ledger.demand_loads.sum() == min(states.values())


def subsets(items, most):
    """The largest subsets of at most `most` items: to keep less never helps."""
    from itertools import combinations

    return [frozenset(kept) for kept in combinations(sorted(items), min(most, len(items)))]


def test_a_step_that_needs_more_pages_than_slots_thrashes_and_counts():
    trace = HandTrace([[[0, 1, 2, 3, 4]]] * 3)
    ledger = replay(trace, registry.build({"policy": "lru", "budget": "2 entries"}), cold=True)
    assert ledger.demand_loads[:, 0].tolist() == [5, 3, 3] and ledger.evicted[:, 0].tolist() == [
        3,
        3,
        3,
    ]
    assert ledger.hit[:, 0].tolist() == [0, 2, 2] and np.allclose(
        ledger.mass_kept, ledger.mass_total
    )


def test_fallback_fetches_the_heaviest_until_enough_is_there():
    # resident from the start: 5, 6 and 7; the step wants 4 entries, and three quarters of them must
    # be there
    trace = HandTrace(
        [[[0, 1, 6, 7]], [[1, 6, 7]]],
        masses=[[[0.125, 0.25, 0.03125, 0.03125]], [[0.25, 0.0625, 0.0625]]],
    )
    spec = {
        "policy": "lru",
        "budget": "3 entries",
        "on_miss": "fallback",
        "fallback_above": 1.0,
        "cadence": 64,
    }
    source = Replayer(trace)
    ledger = run(source, **spec, fallback_below=0.75)
    assert ledger.demand_loads[:, 0].tolist() == [1, 0] and ledger.hit[:, 0].tolist() == [2, 3]
    assert ledger.mass_kept[0, 0] == pytest.approx(0.3125)  # 1 was fetched, 0 was masked
    assert ledger.heaviest_lost[:, 0].tolist() == [0.125, 0.0]
    assert run(source, **spec, fallback_below=0.5).demand_loads.sum() == 0
    assert run(source, **spec, fallback_below=1.0).demand_loads[:, 0].tolist() == [
        2,
        1,
    ]  # one slot for two: 1 passed through


def test_fallback_fetches_what_is_heavy_by_itself():
    # the same: 0 has two sevenths of the first step's mass, 1 four; in the second, 1 has two thirds
    trace = HandTrace(
        [[[0, 1, 6, 7]], [[1, 6, 7]]],
        masses=[[[0.125, 0.25, 0.03125, 0.03125]], [[0.25, 0.0625, 0.0625]]],
    )
    spec = {"policy": "lru", "budget": "3 entries", "on_miss": "fallback", "cadence": 64}
    source = Replayer(trace)
    assert run(source, **spec, fallback_above=0.67).demand_loads.sum() == 0
    assert run(source, **spec, fallback_above=0.6).demand_loads[:, 0].tolist() == [0, 1]
    assert run(source, **spec, fallback_above=0.5).demand_loads[:, 0].tolist() == [1, 0]
    assert run(source, **spec, fallback_above=0.28).demand_loads[:, 0].tolist() == [2, 1]
    assert run(source, **spec, fallback_above=0.5, fallback_below=1.0).demand_loads[
        :, 0
    ].tolist() == [
        2,
        1,
    ]  # either calls for it
    many = Replayer(
        HandTrace([[[0, 1, 2, 3, 6]]], masses=[[[0.0625, 0.0625, 0.0625, 0.0625, 0.25]]])
    )
    assert (
        run(many, **spec, fallback_above=0.13).demand_loads.sum() == 0
    )  # half of the mass is missing, but no page of it matters
    assert run(many, **spec, fallback_above=0.12).demand_loads.sum() == 4


@st.composite
def steps_in_part_there(draw):
    """pages [G, n] padded with -1, counts, masses of a trace's precision, and which pages are
    missing.
    """
    groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    number = st.integers(0, 2**11)
    rows = st.lists(
        st.lists(number, min_size=width, max_size=width), min_size=groups, max_size=groups
    )
    pages = np.argsort(np.array(draw(rows)), axis=1).astype(np.int32)
    pages[:, draw(st.integers(1, width)) :] = -1
    count = np.where(pages >= 0, 1 + np.array(draw(rows)) % 4, 0).astype(np.int32)
    mass = np.where(pages >= 0, np.array(draw(rows)) / 2**11, 0).astype(np.float32)
    return Accesses(pages, count, mass), (np.array(draw(rows)) % 2 == 1) & (pages >= 0)


@given(step=steps_in_part_there(), above=st.floats(0.01, 1.0), below=st.floats(0.0, 1.0))
def test_what_fallback_fetches_is_enough_and_no_more(step, above, below):
    use, missing = step
    taken = heaviest_missing(use, missing, above, below)
    assert not (taken & ~missing).any()
    for row in range(len(taken)):
        left, mass = missing[row] & ~taken[row], use.mass[row].astype(np.float64)
        got, needed = use.count[row, ~left].sum(), use.count[row].sum() * below
        assert got >= needed and not (mass[left] > mass.sum() * above).any()
        if taken[row].any():
            lightest = min(
                np.flatnonzero(taken[row]), key=lambda at: (use.mass[row, at], use.pages[row, at])
            )
            assert got - use.count[row, lightest] < needed or mass[lightest] > mass.sum() * above
            assert not left.any() or use.mass[row, left].max() <= use.mass[row, lightest]
    torch = pytest.importorskip("torch")
    on_torch = heaviest_missing(
        Accesses(*map(torch.from_numpy, (use.pages, use.count, use.mass))),
        torch.from_numpy(missing),
        above,
        below,
    )
    np.testing.assert_array_equal(on_torch.numpy(), taken)


def test_entries_that_close_are_on_the_gpu_at_once():
    trace = HandTrace([[[0]], [[0]], [[0]], [[8]]], still=False)
    ledger = replay(trace, registry.build({"policy": "lru", "budget": "2 entries"}))
    assert (
        ledger.written[:, 0].tolist() == [0, 0, 0, 1]
        and ledger.hit[3, 0] == 1
        and ledger.demand_loads[3, 0] == 0
    )


def test_the_page_being_filled_stays():
    trace = HandTrace([[[0, 1, 2, 3]], [[4, 5, 6, 7]]] * 6, prompt_entries=9, still=False)
    ledger = replay(
        trace, registry.build({"policy": "lru", "budget": "8 entries", "granularity": 4})
    )  # pages 0 1 2, two slots
    assert ledger.n_slots == 2 and ledger.resident[:, 0].tolist() == [2] * 12
    assert ledger.demand_loads[:, 0].tolist() == [1] * 11 + [1]  # 0 and 1 share the one slot left


def test_a_budget_below_what_is_pinned_is_refused():
    with pytest.raises(
        FmsimError, match=r"policy random: budget 2 entries .* 3 are pinned.*raise budget"
    ):
        replay(
            HandTrace([[[0]]] * 12, still=False),
            registry.build({"policy": "random", "budget": "2 entries"}),
        )


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("h2o:budget=50%", "h2o: ranks by attention mass, which this trace lacks"),
        ("lru:budget=50%,on_miss=fallback", "lru: on_miss fallback asks for mass, which this"),
    ],
)
def test_who_needs_masses_is_told_what_for_where_there_are_none(spec, why):
    trace = HandTrace([[[0]]])
    trace.mass = None
    with pytest.raises(FmsimError, match=f"^policy {why}"):
        Replayer(trace).run(registry.build(spec))
    found = Replayer(trace).run(registry.build("lru:budget=50%"))
    assert not found.masses and found.mass_total.sum() == 0


def test_golden_entries_are_worked_out_where_they_are_not_given():
    """Of masses 4, 2 and 1 the first two reach 0.6 of the sum."""
    trace = HandTrace([[[0, 1, 2]]], [[[0.5, 0.25, 0.125]]])
    source = Replayer(trace).source(registry.build("lru"))
    ids, mass = read_trace(trace)
    there = np.ones(ids.shape, bool)
    for told, n_golden in ((None, 2), (ids == 2, 1)):
        ledger = source.book.ledger(ids, mass, there, there, masses=True, golden=told)
        assert ledger.golden.tolist() == ledger.golden_hit.tolist() == [[n_golden]]


def test_labels_are_golden_and_half_of_what_an_indexer_needs_is_nothing():
    """Entry 0 as any other; hidden states without index keys say nothing, nor the reverse."""
    trace = HandTrace([[[0, 1, 2]], [[5]]], [[[0.5, 0.25, 0.125]], [[0.5]]])
    trace.holds_labels = True
    ledger = Replayer(trace).run(registry.build("lru"))
    assert ledger.golden.tolist() == [[3], [1]]
    for present in ("hidden", "index_keys"):
        half = HandTrace([[[0]]])
        setattr(half, present, np.zeros((1, 1, 1)))
        assert not Replayer(half).has_lookahead


def test_what_stands_in_place_of_an_entry_has_no_mass():
    trace = HandTrace([[[0, 1]], [[2]]], [[[0.5, 0.25]], [[0.5]]])
    trace.mass[1, 0, 1] = 0.25  # beside an id of -1
    ids, mass = read_trace(trace)
    assert ids.tolist() == [[[0, 1]], [[2, -1]]] and mass.tolist() == [[[0.5, 0.25]], [[0.5, 0.0]]]


def test_bytes_are_shared_by_the_models_layers():
    policy = registry.build({"policy": "lru", "budget": "0.5 MiB"})
    ledger = Replayer(sample_trace(), memory=ModelMemory(PRESETS["v4-flash"])).run(policy)
    assert ledger.n_slots == 2**19 // (584 * 21)


def test_golden_is_the_head_of_the_list_with_the_entry_that_reaches_its_share():
    mass = np.array(
        [[[0.25, 0.0625, 0.5, 0.125], [0.125, 0.125, 0.125, 0.125], [0, 0, 0, 0]]], np.float32
    )
    golden = golden_mask(np.zeros(mass.shape, np.int32), mass)
    assert golden.tolist() == [[[True, False, True, False], [True, True, True, False], [False] * 4]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.sets(st.integers(0, 40), max_size=6), min_size=2, max_size=2),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
)
def test_paging_keeps_every_entry_and_its_mass(steps, granularity, shared):
    width = max(1, *(len(ids) for step in steps for ids in step))
    ids = np.array(
        [[sorted(row) + [-1] * (width - len(row)) for row in step] for step in steps], np.int32
    )
    mass = np.where(ids < 0, 0, (1 + ids) / 64).astype(np.float32)
    paged = page_trace(ids, mass, granularity, shared, 41)
    spread = paged.by_entry(paged.pages >= 0, 2)
    for t, step in enumerate(steps):
        for group, rows in enumerate([step[0] | step[1]] if shared else step):
            pages = paged.pages[t, group]
            assert pages[pages >= 0].tolist() == sorted({entry // granularity for entry in rows})
        assert all(spread[t, layer, k] for layer in range(2) for k in range(len(step[layer])))
        assert paged.mass[t].sum() == pytest.approx(mass[t].sum())
        assert np.where(paged.pages[t] >= 0, paged.count[t], 0).sum() == sum(
            len(row) for row in step
        )


def test_a_ledger_reads_back_as_it_was_saved(replayer, tmp_path):
    ledger = run(replayer, policy="oracle", budget="10%")
    ledger.save(tmp_path / "deep" / "oracle.npz")
    again = Ledger.load(tmp_path / "deep" / "oracle.npz")
    for field in dataclasses.fields(Ledger):
        assert np.array_equal(getattr(again, field.name), getattr(ledger, field.name)), field.name
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["oracle.npz"]


@pytest.mark.parametrize("harm", ["absent", "truncated", "foreign"])
def test_a_bad_ledger_file_gives_one_clear_error(replayer, tmp_path, harm):
    path = tmp_path / "ledger.npz"
    if harm == "truncated":
        run(replayer, policy="lru").save(path)
        path.write_bytes(path.read_bytes()[:200])
    elif harm == "foreign":
        np.savez(path, x=np.zeros(3))
    with pytest.raises(FmsimError, match="ledger.npz: (no such|not a whole)"):
        Ledger.load(path)

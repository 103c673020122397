"""What fmsim's engine takes beside the modules, against sums worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hand_kernels import kernel_table
from hand_ledger import FLASH, H100, ledger, loads

from fmsim.hw.modules import WHOLE_ENTRIES, modules
from fmsim.hw.spec import STEP_KINDS, Bookkeeping, DecisionWork, EngineTimes, StepWork
from fmsim.sim import engine_cost
from fmsim.sim.decode import simulate
from fmsim.sim.engine_cost import EngineCosts
from fmsim.sim.footprint import footprint
from fmsim.sim.step_cost import StepModel, memory_indexer_s
from fmsim.sim.transfer_cost import GatherCurve

GATHER = GatherCurve(H100.link)


def engine_times(**changes) -> EngineTimes:
    """Round figures, each of another size, so that a sum tells its parts."""
    plain = {kind: StepWork(fixed_ms=1.0 + number) for number, kind in enumerate(STEP_KINDS)}
    steps = {
        kind: Bookkeeping(
            plain=work,
            closing=StepWork(fixed_ms=100.0),
            decision=DecisionWork(fixed_ms=2000.0) if kind in ("decided", "ahead") else None,
        )
        for kind, work in plain.items()
    }
    given = {
        "in_row_batch_ms": {1: 0.0, 64: 0.0},
        "csa_crowd_ms": {},
        "hca_crowd_ms": {},
        "closing_batch_ms": {1: 0.0, 3: 0.0},
        "masses_batch_ms": {1: 0.01, 3: 0.03},
        "pages_batch_ms": {1: {1: 0.002, 3: 0.006}, 16: {1: 0.0, 3: 0.0}},
        "listed_batch_ms": {1: 0.004, 3: 0.004},
        "listed_scores": {1: StepWork(fixed_ms=0.001, slot_ns=10.0)},
        "staging_ms": {1: {0: 0.005, 8: 0.013}, 3: {0: 0.007, 8: 0.031}},
        "beside_bytes_per_s": 10e9,
        "beside_slower": 0.0,
        "steps": steps,
    }
    return EngineTimes(**given | changes)


def costs(given, batch=1, **changes) -> EngineCosts:
    place = footprint(given, FLASH)
    return EngineCosts(engine_times(**changes), given, FLASH, place, GATHER, batch)


def test_a_step_is_its_kind_and_what_closes_and_decides():
    """Kinds take 1, 2, 3 ... ms; pages of one entry 21 x 2 us more."""
    pages_s = 21 * 2e-6
    kept = ledger(slots=9000, on_miss="fetch", cadence=1, all_keys=True)
    assert costs(kept).step_s() == pytest.approx(np.full(128, 1e-3 + pages_s))
    held = ledger(cadence=1, all_keys=True, written=loads(128, s3=1))
    expected = np.full(128, 2e-3 + pages_s)
    expected[3] += 0.1
    assert costs(held).step_s() == pytest.approx(expected)
    sizes = {"n_groups": 3, "group_slots": [9000, 800, 800]}
    begins = loads(128, 3)
    begins[3, 1] = 1  # a page of one group
    uneven = ledger(**sizes, cadence=1, all_keys=True, written=begins)
    assert costs(uneven).step_s() == pytest.approx(expected)  # not all is kept
    seen = replace(held, observes=True, cadence=64, decides_ahead=False)
    expected += 1e-3
    expected[64] += 2.0
    assert costs(seen).step_s() == pytest.approx(expected)
    weighed = replace(seen, observes_mass=True)
    assert costs(weighed).step_s() == pytest.approx(expected + 21 * 0.01e-3)


def test_misses_are_loaded_at_a_price_even_where_there_are_none():
    missing = ledger(
        n_groups=3, on_miss="fetch", cadence=1, miss_slots=512, demand_loads=loads(128, 3, s10=4)
    )
    found = costs(missing, batch=2)  # halfway between batches 1 and 3
    base = 0.004 + 0.006  # pages of one entry, and staging without a page
    assert found.step_s() == pytest.approx(np.full(128, 4e-3 + 21 * base / 1e3))
    of_four = (0.013 + 0.031) / 4 - 0.006 / 2
    waits = found.miss_s()
    assert waits.shape == (128, 21)
    assert waits[10] == pytest.approx(np.full(21, of_four / 1e3))
    assert np.count_nonzero(waits) == 21
    fallback = replace(missing, on_miss="fallback")
    assert costs(fallback, batch=2).step_s() == pytest.approx(found.step_s() + 1e-3)


def test_bookkeeping_of_misses_runs_beside_the_layers_before_the_first_that_selects():
    """Of 4 ms, and 104 where a page begins, what two layers leave; who loads nothing waits for all
    of it.
    """
    missing = ledger(on_miss="fetch", cadence=1, miss_slots=512, written=loads(128, s3=1))
    held = replace(missing, miss_slots=0, on_miss="mask")
    place = footprint(missing, FLASH)
    for given, before_ms, hidden_ms in ((missing, 3.0, (3.0, 3.0)), (missing, 9.0, (4.0, 9.0))):
        alone, beside = (
            EngineCosts(engine_times(), given, FLASH, place, GATHER, 1, before_s=s).step_s()
            for s in (0.0, before_ms / 1e3)
        )
        less_s = np.full(128, hidden_ms[0] / 1e3)
        less_s[3] = hidden_ms[1] / 1e3
        assert alone - beside == pytest.approx(less_s)
        kept = EngineCosts(engine_times(), held, FLASH, place, GATHER, 1, before_s=before_ms / 1e3)
        assert (kept.step_s() == costs(held).step_s()).all()


def test_the_layers_before_the_first_that_selects():
    """Two windows of V4-Flash, each with hyper-connections, router and experts."""
    layer_ms = (0.05 + 0.024 + 0.006 + 0.03) * (1 + 1 / 64)
    expected_s = 2 * layer_ms * H100.kernel_factor.value / 1e3
    assert StepModel(hardware(), FLASH).before_selecting_s(1) == pytest.approx(expected_s)
    alone = replace(FLASH, layer_types=FLASH.layer_types[2:3])  # a layer that selects
    assert StepModel(hardware(), alone).before_selecting_s(1) == 0.0


def test_more_misses_than_were_timed_are_gathers_beyond():
    missing = ledger(
        n_groups=3, on_miss="fetch", cadence=1, miss_slots=512, demand_loads=loads(128, 3, s10=100)
    )
    assert costs(ledger()).miss_s().tolist() == [[0.0] * 21] * 128
    more_s = GATHER.one_s(584, 100 * 584) - GATHER.one_s(584, 8 * 584)
    assert costs(missing).miss_s()[10, 0] == pytest.approx(8e-6 + more_s)


def test_misses_between_three_points_that_were_timed():
    """None at 5 us, 8 at 13 and 16 at 37: 12 take 20 us more than none."""
    missing = ledger(
        n_groups=3, on_miss="fetch", cadence=1, miss_slots=512, demand_loads=loads(128, 3, s10=12)
    )
    timed = {0: 0.005, 8: 0.013, 16: 0.037}
    found = costs(missing, staging_ms={1: timed, 3: timed}).miss_s()
    assert found[10] == pytest.approx(np.full(21, 20e-6))


def test_larger_pages_have_times_of_their_own():
    """8 pages take 8 us of one entry, 40 of 16; pages of 4 lie halfway, at as many bytes. Larger
    ones, and more of them, are gathers beyond.
    """
    of_16 = {0: 0.005, 8: 0.045}
    of_1 = {0: 0.005, 8: 0.013}
    own = {1: {1: of_1, 3: of_1}, 16: {1: of_16, 3: of_16}}
    sizes = {"fetching_ms": own, "common_fetching_ms": own}
    for granularity, n_pages, expected_ms in ((16, 8, 0.04), (4, 2, (0.008 + 0.0025) / 2)):
        missing = ledger(
            granularity=granularity,
            slots=50,
            on_miss="fetch",
            miss_slots=64,
            demand_loads=loads(128, s1=n_pages),
        )
        found = costs(missing, **sizes).miss_s()
        assert found[1, 0] == pytest.approx(expected_ms / 1e3)
    for granularity, n_pages in ((16, 64), (64, 2), (64, 16)):
        missing = ledger(
            granularity=granularity,
            slots=50,
            on_miss="fetch",
            miss_slots=64,
            demand_loads=loads(128, s1=n_pages),
        )
        found = costs(missing, **sizes).miss_s()
        row_bytes, timed = 584 * granularity, min(8, n_pages * granularity // 16)
        more_s = GATHER.one_s(row_bytes, n_pages * row_bytes)
        more_s = max(0.0, more_s - GATHER.one_s(584 * 16, timed * 584 * 16))
        assert found[1, 0] == pytest.approx(5e-6 * timed + more_s)


def test_rows_in_common_have_times_of_their_own():
    """8 pages take 30 us, those that all requests miss 20, and those of fallback 8."""
    own, common = ({1: {batch: {0: 0.0, 8: ms} for batch in (1, 3)}} for ms in (0.03, 0.02))
    hw = hardware(fetching_ms=own, common_fetching_ms=common)
    for on_miss, one_text, us in (("fetch", False, 30), ("fetch", True, 20), ("fallback", True, 8)):
        missing = ledger(on_miss=on_miss, miss_slots=512, demand_loads=loads(128, s1=8))
        found = simulate(missing, FLASH, hw, one_text=one_text)
        assert found.stall_s[1] == pytest.approx(21 * us / 1e6)


def test_what_gets_a_slot_is_no_more_than_the_step_leaves_free():
    """Of 512 entries 112 are missed, so the hits of 28 missed pages are 100."""
    for slots, kept in ((800, 28), (120, 20), (80, 0)):
        missing = ledger(
            n_groups=3,
            slots=slots,
            on_miss="fetch",
            miss_slots=512,
            demand_loads=loads(128, 3, s1=28),
        )
        found = costs(missing)
        assert found.kept_pages() == pytest.approx(
            np.array([[0.0] * 3, [kept] * 3] + 126 * [[0.0] * 3])
        )
        with_s, without_s = (
            simulate(given, FLASH, hardware()).step_s
            for given in (missing, replace(missing, demand_loads=loads(128, 3)))
        )
        copied_s = 2 * kept * 21 * 584 / H100.hbm_bytes_per_s.value  # read, and written again
        expected_s = found.miss_s()[1].sum() + copied_s
        assert with_s[1] - without_s[1] == pytest.approx(expected_s, rel=1e-6)


def test_misses_and_late_rows_cross_the_link_for_every_request():
    missing = ledger(
        n_groups=3, on_miss="fetch", cadence=1, miss_slots=512, demand_loads=loads(128, 3, s10=100)
    )
    found = costs(missing, batch=3)
    more_s = GATHER.one_s(584, 300 * 584) - GATHER.one_s(584, 24 * 584)
    assert found.miss_s()[10] == pytest.approx(np.full(21, 24e-6 + more_s))
    late_s = found.late_s(np.array([3 * 42_000.0]), np.array([1e-9]))
    assert late_s == pytest.approx([GATHER.one_s(584, 3 * 42_000 * 584)], rel=1e-6)


def test_residents_are_listed_and_scored_in_their_own_pages():
    """800 slots of 3 layers each: 8,000 + 1 ... entries of which 800 are scored."""
    masked = ledger(n_groups=3, cadence=1, entry_tokens=4)
    place = footprint(masked, FLASH)
    assert place.keys_tiered and place.scored_entries[0] == 800
    scored_ms = 0.001 + 800 * 10 / 1e6
    found = costs(masked).step_s()
    plain_s = 2e-3 + 21 * (0.002 + 0.004 + scored_ms) / 1e3
    closing = np.arange(128) % 4 == 3
    closing[3] = True
    assert found == pytest.approx(np.where(closing, plain_s + 0.1, plain_s))


def test_two_requests_residents_are_scored_together():
    """Halfway between batches of 1 and 3: 4 us of pages and of the list; 1,600 entries."""
    masked = ledger(n_groups=3, cadence=1, entry_tokens=4)
    found = costs(masked, batch=2).step_s()
    scored_ms = 0.001 + 1600 * 10 / 1e6
    assert found[0] == pytest.approx(2e-3 + 21 * (0.004 + 0.004 + scored_ms) / 1e3)


def test_an_entry_that_closes_is_pooled_in_every_layer():
    kept = ledger(slots=9000, on_miss="fetch", cadence=1, all_keys=True, entry_tokens=4)
    still, moving = (costs(kept, closing_batch_ms={1: ms, 2: ms}).step_s() for ms in (0.0, 0.005))
    closes = np.arange(128) % 4 == 3
    assert moving - still == pytest.approx(np.where(closes, 21 * 5e-6, 0.0))


def test_sizes_add_what_they_cost():
    work = StepWork(fixed_ms=1.0, slot_ns=2.0, page_ns=3.0, move_ns=5.0)
    bare = StepWork(fixed_ms=0.0)
    steps = dict.fromkeys(STEP_KINDS, Bookkeeping(plain=work, closing=bare))
    missing = ledger(n_groups=3, on_miss="fetch", cadence=1, miss_slots=512)
    found = costs(
        missing,
        batch=2,
        steps=steps,
        staging_ms={1: {0: 0, 8: 0}, 2: {0: 0, 8: 0}},
        pages_batch_ms={1: {1: 0.0, 2: 0.0}},
    )
    n_pages = (4 * 8000 + 128) // 4
    sized_ns = 2 * 2400 + 3 * 21 * n_pages * 2 + 5 * 21 * 512 * 2
    assert found.step_s() == pytest.approx(np.full(128, 1e-3 + sized_ns / 1e9))
    free = {"steps": steps, "pages_batch_ms": {1: {1: 0.0, 2: 0.0}}}
    # who loads nothing has a row a group, or where these have slots of their own one a layer
    for group_slots, rows in (([800], 1), ([800] * 3, 3), ([700, 800, 900], 21)):
        held = ledger(n_groups=len(group_slots), group_slots=group_slots, cadence=1, all_keys=True)
        lists = 1 if len(group_slots) == 1 else 21  # of moves
        sized_ns = 2 * sum(group_slots) + 3 * rows * n_pages * 2 + 5 * lists * 512 * 2
        found = costs(held, batch=2, **free).step_s()
        assert found == pytest.approx(np.full(128, 1e-3 + sized_ns / 1e9))
        decides = replace(held, cadence=64, decides_ahead=False)  # a decision that costs nothing
        assert (costs(decides, batch=2, **free).step_s() == found).all()
    never = {kind: Bookkeeping(plain=StepWork(fixed_ms=-5.0), closing=bare) for kind in STEP_KINDS}
    found = costs(held, batch=2, **free | {"steps": never}).step_s()
    assert found.tolist() == [0.0] * 128  # a sum that was fitted is no less than nothing


def test_bookkeeping_of_misses_is_of_as_many_requests_and_pages():
    """Between times of 1 and 3 requests, and between pages of 21 layers."""
    grid = {1: {21_000: 1.0, 189_672: 3.0}, 3: {21_000: 5.0, 189_672: 11.0}}
    bare = StepWork(fixed_ms=0.0)
    kind = Bookkeeping(plain=StepWork(fixed_ms=70.0, slot_ns=2.0), closing=bare, loading_ms=grid)
    missing = ledger(n_groups=3, on_miss="fallback", cadence=1, miss_slots=512, slots=900)
    given = {"staging_ms": {1: {0: 0, 8: 0}}, "pages_batch_ms": {1: {1: 0.0, 2: 0.0}}}
    found = costs(missing, batch=2, steps={"fallback": kind}, **given).step_s()
    n_pages = (4 * 8000 + 128) // 4
    share = (n_pages - 1000) / 8032
    expected_ms = (1 - share) * 3.0 + share * 7.0 + 2 * 2700 / 1e6
    assert found == pytest.approx(np.full(128, expected_ms / 1e3))


def test_a_decision_ranks_pages_once_and_lists_them_for_every_request():
    """Of three groups with slots of their own: tables and lists are of 21 layers, lists as long as
    the slots of the largest.
    """
    work = StepWork(fixed_ms=0.0)
    given = {"slot_ns": 2.0, "page_ns": 3.0, "table_ns": 7.0, "move_ns": 5.0}
    decision = DecisionWork(fixed_ms=1.0, **given)
    steps = dict.fromkeys(STEP_KINDS, Bookkeeping(plain=work, closing=work, decision=decision))
    sizes = {"n_groups": 3, "group_slots": [700, 800, 900], "all_keys": True}
    n_pages = (4 * 8000 + 128) // 4
    for batch in (1, 2):
        found = costs(ledger(**sizes), batch=batch, steps=steps).step_s()
        once_ns = 2 * 2400 + 3 * 3 * n_pages
        of_each_ns = 7 * 21 * n_pages + 5 * 21 * 900
        expected_s = 1e-3 + (once_ns + batch * of_each_ns) / 1e9
        assert found[64] - found[63] == pytest.approx(expected_s)


def test_pages_are_priced_by_the_nearest_size_and_those_of_64_entries_not_at_all():
    """Of sizes 1 and 16; residents of pages of 64 entries are scored where they lie."""
    sizes = {
        "pages_batch_ms": {1: {1: 0.2, 2: 0.4}, 16: {1: 0.01, 2: 0.02}},
        "listed_scores": {1: StepWork(fixed_ms=0.5), 16: StepWork(fixed_ms=-0.05)},
    }
    for granularity, page_ms, score_ms in ((1, 0.2, 0.5), (16, 0.01, 0.0), (64, 0.0, 0.0)):
        held = ledger(cadence=1, granularity=granularity, slots=64)
        found = costs(held, **sizes)
        ms = page_ms + 0.004 + score_ms  # and the residents' list
        closing = np.where(found._begins(), 100.0, 0.0)
        assert found.step_s() * 1e3 == pytest.approx(2.0 + 21 * ms + closing)


def test_a_choice_among_residents_is_priced_as_a_layer_was_timed():
    """Between 1 and 3 requests, 600 and 1,000 residents, and pages of 1 and 16."""
    of_16 = {batch: {600: 0.1 * batch, 1000: 0.3 * batch} for batch in (1, 3)}
    of_1 = {batch: {count: 3 * ms for count, ms in line.items()} for batch, line in of_16.items()}
    held = ledger(cadence=1, granularity=4, slots=200, entry_tokens=4)
    found = costs(held, batch=2, residents_ms={1: of_1, 16: of_16})
    assert footprint(held, FLASH).scored_entries[0] == 800
    closing = np.where(found._begins(), 100.0, 0.0)
    assert found.step_s() * 1e3 == pytest.approx(2.0 + 21 * 2 * 0.4 + closing)


def test_where_misses_are_loaded_late_pages_come_in_six_parts():
    """Their layers take turns with what comes: a fast step waits for the last part, a slow one for
    the first.
    """
    kept = ledger(all_keys=True, on_miss="fallback", miss_slots=512)
    assert costs(kept).late_s(np.array([1.0]), np.array([0.0])) > 1e-6
    n_pages = np.array([0.0, 42_000.0, 42_000.0])
    come_s = GATHER.one_s(584, 42_000 * 584)
    fast_s, slow_s = come_s / 100, 100 * come_s
    found = costs(kept).late_s(n_pages, np.array([fast_s, fast_s, slow_s]))
    assert found == pytest.approx([0.0, come_s - 5 / 6 * fast_s, come_s / 6])


def test_where_misses_are_masked_late_keys_are_waited_for_and_entries_read():
    """All of both requests' pages are late, so each layer reads all 512 entries of both. Layers
    without keys are the last: a step waits for a part of these, or none.
    """
    n_pages = np.array([2 * 21 * 800.0])
    found = costs(ledger(), batch=2).late_s(n_pages, np.array([0.0]))
    keys_s, read_s = GATHER.one_s(132, 2 * 16_800 * 132), 21 * GATHER.one_s(584, 2 * 512 * 584)
    assert found == pytest.approx([keys_s + read_s])
    for targets, waited_s in (([], keys_s / 6), (list(range(8)), 0.0)):
        found = costs(ledger(target_layers=targets), batch=2).late_s(n_pages, np.array([1.0]))
        assert found == pytest.approx([waited_s + read_s], rel=1e-5)
    rates = {100: 1e9, 10_000: 9e9}  # as the copies beside a step were timed, of 14 layers' keys
    kept = costs(ledger(target_layers=list(range(7))), batch=2, late_bytes_per_s=rates)
    keys_s = 2 * 14 * 800 * 132 / (1e9 + 8e9 * np.log(1.32) / np.log(100))
    assert kept.late_s(n_pages, np.array([0.0])) == pytest.approx([keys_s + read_s])


def test_late_entries_come_beside_steps_that_read_them_until_they_are_here():
    """A quarter of 40 requests' slots, in one step and a part of the next: these are half again as
    long beside them. The second reads entries of what is left alone.
    """
    rows, selected = 40 * 21 * 1500, 40 * 128
    come_s, read_s = GATHER.one_s(584, rows * 584), 21 * GATHER.one_s(584, selected * 584)
    step_s = 0.6 * come_s
    kept = ledger(slots=6000, all_keys=True)
    late = {584: 0.5, 37_376: 9.0}
    for slower in ({"late_slower": late}, {"late_slower": {}, "beside_slower": 0.5}):
        found = costs(kept, batch=40, **slower).late_s(
            np.array([0.0, rows, 0.0, 0.0]), np.full(4, step_s)
        )
        first_s = read_s + 0.5 * (step_s + read_s)
        left_s = come_s - (step_s + read_s)
        second_s = read_s * left_s / come_s + 0.5 * left_s
        assert found == pytest.approx([0.0, first_s, second_s, 0.0])
    again = costs(kept, batch=40, late_slower=late)  # the next decision's pages come after these
    found = again.late_s(np.array([0.0, rows, rows, 0.0]), np.full(4, step_s))
    read_s *= (left_s + come_s) / come_s
    assert found[:3] == pytest.approx([0.0, first_s, read_s + 0.5 * (step_s + read_s)])


def hardware(**changes):
    table = kernel_table().model_copy(update={"engine": engine_times(**changes)})
    return H100.model_copy(update={"kernel_tables": None, "kernels": {"v4-flash": table}})


def test_a_recall_ahead_has_its_spare_pages_and_the_rest_comes_late():
    """300 pages of 21 layers, of which 100 have room: these come before, the others at once. A step
    waits for the first sixth of their keys, and reads entries.
    """
    recalled = ledger(
        lookahead_loads=loads(128, s64=300), ahead_slots=[100], entry_tokens=4, scored=np.zeros(128)
    )
    hw = hardware()
    timeline = simulate(recalled, FLASH, hw)
    keys_s = GATHER.one_s(132, 200 * 21 * 132)
    read_s = 21 * GATHER.one_s(584, 512 * 200 / 800 * 584)
    assert timeline.recall_wait_s[64] == pytest.approx(keys_s / 6 + read_s)
    kinds = [(each.step, each.n_bytes) for each in timeline.transfers if each.kind == "recall"]
    assert sorted(kinds) == [(64, 100 * 21 * 716), (64, 200 * 21 * 716)]
    beside = next(each for each in timeline.transfers if each.start_s == 0)
    at_10 = 100 * 21 * 716 / 10e9
    assert beside.end_s - beside.start_s == pytest.approx(at_10 + GATHER.fixed_s(716))
    assert timeline.h2d_bytes[64] == 300 * 21 * 716
    bare = simulate(replace(recalled, ahead_slots=[]), FLASH, hw)  # no room: all of it is late
    kinds = [(each.step, each.n_bytes) for each in bare.transfers if each.kind == "recall"]
    assert kinds == [(64, 300 * 21 * 716)]
    two = simulate(replace(recalled, ahead_slots=[]), FLASH, hw, batch=2)
    weighed = replace(recalled, scored=np.where(np.arange(128) % 64, 0, 630_000))
    more_s = (
        simulate(weighed, FLASH, hw, batch=2).step_s - simulate(recalled, FLASH, hw, batch=2).step_s
    )
    in_turns_s = memory_indexer_s(hw, FLASH, np.array([20_000.0]))[0]  # two requests', in 63 steps
    assert more_s == pytest.approx(np.where(np.arange(128) % 64, in_turns_s, 0.0))
    keys_s = GATHER.one_s(132, 2 * 300 * 21 * 132)
    read_s = 21 * GATHER.one_s(584, 2 * 512 * 300 / 800 * 584)
    assert two.recall_wait_s[64] == pytest.approx(keys_s / 6 + read_s)
    early_ledger = replace(recalled, ahead_slots=[300])
    early = simulate(early_ledger, FLASH, hw)
    kinds = [each.n_bytes for each in early.transfers if each.kind == "recall"]
    assert kinds == [300 * 21 * 716] and early.recall_wait_s[64] == 0
    # from spare pages to slots: read, and written again, or as was timed of entries and of keys
    none = simulate(replace(early_ledger, lookahead_loads=loads(128)), FLASH, hw)
    arriving_s = 300 * 21 * 716 / H100.hbm_bytes_per_s.value
    assert early.step_s[64] - none.step_s[64] == pytest.approx(2 * arriving_s, rel=1e-3)
    timed = simulate(early_ledger, FLASH, hardware(within_bytes_per_s={132: 1e9, 584: 2e9}))
    settled_s = 300 * 21 * (132 / 1e9 + 584 / 2e9)
    assert timed.step_s[64] - none.step_s[64] == pytest.approx(settled_s, rel=1e-3)
    seldom = ledger(n_steps=256, lookahead_loads=loads(256, s64=300))  # once in four windows
    timeline = simulate(seldom, FLASH, H100)
    assert [each.kind for each in timeline.transfers].count("recall") == 1
    assert timeline.recall_wait_s.sum() == 0  # where nothing is recalled nothing is waited for


def test_sizes_are_the_engines():
    from fmsim.exec.kernels import tuning

    assert engine_cost.LATE_LAUNCHES == tuning.LATE_LAUNCHES
    assert tuning.TOP_K.whole == WHOLE_ENTRIES


def test_a_step_beside_a_recall_is_slower():
    recalled = ledger(lookahead_loads=loads(128, s64=300), ahead_slots=[300], scored=np.zeros(128))
    slow = simulate(recalled, FLASH, hardware(beside_slower=0.5, beside_bytes_per_s=1e6))
    fast = simulate(recalled, FLASH, hardware(beside_slower=0.0, beside_bytes_per_s=1e6))
    assert slow.step_s[1] == pytest.approx(1.5 * fast.step_s[1])


def test_crowds_of_long_contexts_take_what_was_measured():
    """At batch 8 and 131,072 tokens a CSA layer took 0.5 ms; halfway there it adds half."""
    crowd = {8: {131_072: 0.5, 262_144: 0.9}, 64: {131_072: 4.0, 262_144: 8.0}}
    hw = hardware(csa_crowd_ms=crowd, hca_crowd_ms=crowd)
    short = 0.08 * (1 + 8 / 64) * (1 + 0)
    tokens = np.array([1024.0, 131_072.0, (1024 + 131_072) / 2, 262_144.0, 393_216.0])
    found = StepModel(hw, FLASH).equal(8, tokens, tokens / 4).csa_s * 1e3
    factor = hw.kernel_factor.value
    assert found[0] == pytest.approx(factor * short)
    assert found[1] == pytest.approx(factor * 0.5)
    assert found[2] == pytest.approx(factor * (short + 0.5) / 2)
    assert found[3] == pytest.approx(factor * 0.9)
    assert found[4] == pytest.approx(factor * 1.3)  # its last slope goes on


def test_a_context_takes_what_the_next_power_of_two_takes_where_one_program_selects():
    """Beyond what a program holds a longer one adds what lies between measured contexts."""
    tokens = np.array([1024.0, 8192.0, 8196.0, 16_384.0, 16_388.0])
    line_ms = 0.01 * (tokens - 1024) / (131_072 - 1024)
    more_ms = np.array([0.0, 0.0, line_ms[3] - line_ms[2], 0.0, 0.0])
    factor = H100.kernel_factor.value
    found = StepModel(hardware(), FLASH).equal(1, tokens, tokens / 4).csa_s * 1e3
    assert found / factor == pytest.approx(0.08 * (1 + 1 / 64) + line_ms + more_ms)
    crowd = {8: {131_072: 0.5}, 64: {131_072: 0.9}}
    found = StepModel(hardware(csa_crowd_ms=crowd), FLASH).equal(8, tokens, tokens / 4).csa_s * 1e3
    short = 0.08 * (1 + 8 / 64)
    assert found / factor == pytest.approx(short + (0.5 - short) * line_ms / 0.01 + more_ms)


def test_a_row_of_layers_takes_more_than_its_modules():
    alone, row = (modules(hardware(in_row_batch_ms={1: ms, 8: ms}), FLASH) for ms in (0.0, 0.1))
    factor = H100.kernel_factor.value
    assert row.rest_ms(4, 4) - alone.rest_ms(4, 4) == pytest.approx(43 * 0.1 * factor)

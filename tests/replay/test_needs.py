"""A budget in bytes on the GPU, solved for slots: worked by hand, and against every other size."""

import random
from dataclasses import dataclass

import pytest
from hand_ledger import FLASH
from hand_trace import HandTrace
from made_trace import make_trace, save_indexer
from tapered import Tapered

from fmsim.errors import BudgetTooSmall, FmsimError
from fmsim.policies import registry
from fmsim.policies.pyramid import Pyramid
from fmsim.replay.needs import most_that_fit
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import ModelMemory, allocation


@dataclass(frozen=True)
class OneLayer:
    """A model of one layer: 10 B an entry, 2 B a key, 7 B that are always there."""

    entry_bytes: float = 10
    model_layers: int = 1

    def full_bytes(self, request):
        return 12 * request.prompt_entries + 7

    def taken_bytes(self, needs, request):
        [slots], [ahead] = needs.group_slots, needs.ahead_slots
        pages = slots + ahead + needs.miss_slots
        keyed = request.prompt_entries if needs.all_keys else (slots + ahead) * needs.granularity
        return 10 * pages * needs.granularity + 2 * keyed + 7

    def shortage(self, needs, request, limit_bytes):
        return f"{self.taken_bytes(needs, request)} and not {limit_bytes}"


def slots(spec, prompt_entries=100, topk=4):
    trace = HandTrace([[list(range(topk))]], prompt_entries=prompt_entries)
    return Replayer(trace, memory=OneLayer()).run(registry.build(spec)).n_slots


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # The full cache takes 1,207 B, half of it is 603.
        # lru: 7 + 200 of keys; of 396 left 39 pages, 4 of them for a step's misses.
        ("lru:budget=50% gpu", 35),
        ("lru:budget=603 B gpu", 35),
        ("lru:budget=597 B gpu", 35),
        ("lru:budget=596 B gpu", 34),
        # held, and sees residents: 12 B a page with its key, none for misses; 596 / 12
        ("lru:budget=50% gpu,cadence=64,on_miss=mask", 49),
        # held, and sees all: 396 / 10
        ("lru:budget=50% gpu,cadence=64,on_miss=mask,sees=all", 39),
        # pages of four entries: 16 of them for a step's misses, 396 / 40 = 9 pages in all
        ("lru:budget=50% gpu,granularity=4", 5),
        ("recency:budget=50% gpu", 49),
        ("recency:budget=1206 B gpu", 99),  # 7 + 12 x 99 take 1,195, and one more 1,207
        # the oracle recalls ahead: 40 slots and 10 spare take 12 x 50 + 7 = 607, 39 and 10 take 595
        ("oracle:budget=50% gpu", 39),
        # hisparse has one slot beside its budget
        ("hisparse:budget=50% gpu", 35),
        # all fits: every page has a slot, and nothing is spare
        ("lru:budget=100% gpu", 100),
        # the oracle gives up what is not used, so it recalls even then: 80 slots and 20 spare
        ("oracle:budget=100% gpu", 80),
        ("lru:budget=100% gpu,granularity=4", 25),
    ],
)
def test_slots_worked_by_hand(spec, expected):
    assert slots(spec) == expected


@pytest.mark.parametrize(
    ("spec", "comes_back"),
    [
        ("lru:budget=9 entries", True),
        ("lru:budget=9 entries,on_miss=fallback", True),
        ("lru:budget=9 entries,on_miss=mask", False),
        ("lru:budget=9 entries,on_miss=mask,cadence=2", True),
        ("lru:budget=100 entries", False),
    ],
)
def test_pages_come_back_by_a_miss_or_a_decision(spec, comes_back):
    trace = HandTrace([[[0, 1, 2, 3]]], prompt_entries=100)
    assert Replayer(trace).run(registry.build(spec)).comes_back is comes_back


def test_layers_that_share_a_set_miss_together():
    """Two layers of two selected entries each; of three entries not more than three."""
    trace = HandTrace([[[0, 1], [2, 3]]], prompt_entries=100)
    for spec, slots in (("lru:budget=9 entries", 2), ("lru:budget=9 entries,scope=shared", 4)):
        assert Replayer(trace).run(registry.build(spec)).miss_slots == slots
    short = HandTrace([[[0, 1], [1, 2]]], prompt_entries=3)
    shared = registry.build("lru:budget=2 entries,scope=shared")
    assert Replayer(short).run(shared).miss_slots == 3


def test_what_a_budget_is_exceeded_by_is_said():
    with pytest.raises(BudgetTooSmall) as found:
        slots("lru:budget=20% gpu")  # 241 B; one slot takes 10 + 40 + 200 + 7
    assert str(found.value) == "policy lru: budget 20% gpu is 241 B, and 257 and not 241"
    assert found.value.least_bytes == 257


def test_one_page_that_does_not_fit_is_one_too_many():
    """One slot and no miss: 10 + 2 of a key + 7; the full cache takes as much."""
    assert slots("lru:budget=19 B gpu", prompt_entries=1, topk=1) == 1
    with pytest.raises(BudgetTooSmall) as found:
        slots("lru:budget=18 B gpu", prompt_entries=1, topk=1)
    assert found.value.least_bytes == 19


def test_without_a_model_an_entry_has_v4s_bytes_in_each_layer_of_the_trace():
    trace = HandTrace([[[0], [0]]], prompt_entries=100)
    for n_bytes, slots in ((2 * 584 * 10, 10), (2 * 584 * 10 - 1, 9)):
        assert Replayer(trace).run(registry.build(f"lru:budget={n_bytes} B")).n_slots == slots


def test_without_a_model_there_are_no_bytes():
    with pytest.raises(FmsimError, match=r"policy lru: budget 20% gpu .* no model is named"):
        Replayer(HandTrace([[[0]]])).run(registry.build("lru:budget=20% gpu"))


def test_flash_says_what_takes_the_bytes():
    """At 320,000 tokens index keys take 21 x 80,000 x 132 B."""
    memory = ModelMemory(FLASH)
    replayer = Replayer(HandTrace([[[0]] * 3], prompt_entries=80_000), memory=memory)
    fixed = 43 * 128 * 584 + 20 * 2500 * 584
    assert FLASH.full_gpu_bytes(320_001) == fixed + 21 * 80_000 * 716
    with pytest.raises(BudgetTooSmall) as found:
        replayer.run(registry.build("lru:budget=10% gpu"))
    assert str(found.value) == (
        "policy lru: budget 10% gpu is 0.115 GiB, and index keys alone take 0.207 GiB"
    )
    assert found.value.least_bytes == fixed + 21 * (80_000 * 132 + (1 + 1) * 584)


MADE = {
    "lru": lambda budget, _: registry.build({"policy": "lru", "budget": budget}),
    "fallback": lambda budget, _: registry.build(
        {"policy": "lfu", "on_miss": "fallback", "granularity": 4, "budget": budget}
    ),
    "snapkv": lambda budget, _: registry.build({"policy": "snapkv", "budget": budget}),
    "pyramid": lambda budget, _: Pyramid(budget=budget),
    "uneven": lambda budget, _: Tapered(budget=budget, granularity=4, cadence=16),
    "lsa": lambda budget, checkpoint: registry.build(
        {"policy": "lsa", "checkpoint": checkpoint, "budget": budget, "granularity": 4}
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_page_more_would_exceed_the_budget(name, tmp_path):
    """Of random budgets: what is allocated is within it, and with another page it is not."""
    checkpoint = save_indexer(tmp_path / "indexer.safetensors")
    layer_map = (0,) * 15 + (1,) * 3 + (2,) * 3
    replayer = Replayer(
        make_trace(prompt_tokens=8000, n_steps=8), memory=ModelMemory(FLASH, layer_map)
    )
    full_bytes = FLASH.full_gpu_bytes(8008)
    rng = random.Random(0)
    for _ in range(4):
        limit = rng.randint(int(0.5 * full_bytes), int(0.9 * full_bytes))
        ledger = replayer.run(MADE[name](f"{limit} B gpu", checkpoint))
        assert allocation(ledger, FLASH, layer_map).total <= limit
        # The same policy with its slots named has as many, and with a page more it is too large.
        mean = sum(ledger.group_slots) / ledger.n_groups
        entries = round(mean * ledger.granularity)
        again = replayer.run(MADE[name](f"{entries} entries", checkpoint))
        assert again.group_slots == ledger.group_slots
        entries += ledger.granularity
        larger = replayer.run(MADE[name](f"{entries} entries", checkpoint))
        assert allocation(larger, FLASH, layer_map).total > limit


def test_the_most_pages_that_fit_against_every_number():
    draw = random.Random(13)
    for _ in range(200):
        most = draw.randint(1, 60)
        sizes = [0, *sorted(draw.sample(range(1, 1000), most))]
        sizes[most] -= draw.choice([0, 0, 300])  # what keeps all has nothing spare
        limit = draw.randint(0, 1000)

        def fits(pages, sizes=sizes, limit=limit):
            return sizes[pages] <= limit

        expected = max((n for n in range(1, most + 1) if fits(n)), default=0)
        assert most_that_fit(fits, most) == expected

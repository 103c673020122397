"""What each policy's worth is made of, in numbers, and what a context says of itself."""

import numpy as np
import pytest

from fmsim.errors import FmsimError
from fmsim.policies.base import Context, LookaheadPolicy, Observation, Pins
from fmsim.policies.belady import Belady
from fmsim.policies.fifo import FIFO
from fmsim.policies.h2o import H2O
from fmsim.policies.lfu import LFU
from fmsim.policies.lru import LRU
from fmsim.policies.lruk import LRUK
from fmsim.policies.oracle import Oracle
from fmsim.policies.pyramid import Pyramid
from fmsim.policies.random import Random
from fmsim.policies.random_fetch import RandomFetch
from fmsim.policies.recency import Recency

MASS = np.array([[0.0, 0.25, 0.5, 1.0, 0.0, 0.0]], np.float32)


def context(**more):
    """Six pages, four of them the prompt's, four slots."""
    return Context(1, 1, 6, 4, 1, 4, 2, 16, tau=4, **more)


def made(policy, **more):
    policy.reset(context(**more))
    return policy


def worths(policy, step=0):
    return np.asarray(policy.worth(step, np.arange(6, dtype=np.int32)[None]))[0].tolist()


def saw(pages, fetched=(), mass=None):
    row = np.array([pages], np.int32)
    came = np.isin(row, list(fetched))
    masses = np.ones(row.shape, np.float32) if mass is None else np.array([mass], np.float32)
    return Observation(row, np.ones_like(row), masses, ~came & (row >= 0), came)


def ids(pages):
    return np.array([pages], np.int32)


def test_scores_that_were_prepared_are_not_worked_out_again():
    asked = []

    class Scored(LookaheadPolicy):
        name = "scored"

        def score(self, step):
            asked.append(step)
            return np.full((1, 3), step, np.float32)

    policy = made(Scored())
    policy.prepare([0, 4])
    assert asked == [0, 4]
    policy.decide(4)
    assert worths(policy) == [4, 4, 4, np.inf, np.inf, np.inf] and asked == [0, 4]
    policy.decide(8)
    assert asked == [0, 4, 8]


def test_lru_ranks_by_the_last_two_uses():
    policy = made(LRU())
    policy.observe(0, saw([1, 2, -1]))
    policy.wrote(2, ids([4]))
    policy.observe(2, saw([2, 3]))
    bits = 2**18
    assert worths(policy) == [0, bits, 3 * bits + 1, 3 * bits, 3 * bits - 1, 0]


def test_lfu_counts_steps_and_then_the_last_use():
    policy = made(LFU())
    policy.observe(0, saw([1, 2]))
    policy.observe(3, saw([1, 3], fetched=[3]))
    policy.observe(4, saw([2], fetched=[2]))
    policy.wrote(5, ids([4]))
    bits = 2**20
    assert worths(policy) == [0, 2 * bits + 9, bits + 10, bits + 8, 12, 0]
    policy.rank[0, 1] = (2**17 - 1) << 20
    policy.observe(6, saw([1]))
    assert worths(policy)[1] == (2**17 - 1) * bits + 15  # it counts no further
    assert worths(policy)[1] < 2**37


def test_lruk_ranks_by_the_second_last_use_and_before_that_by_when_a_page_came():
    policy = made(LRUK(k=2, prompt_history=True), prompt_mass=MASS)
    policy.observe(0, saw([1, 2], fetched=[1]))
    policy.observe(4, saw([1, 3]))
    policy.wrote(5, ids([4]))
    seldom, often = 2**18, 2 * 2**18
    heavy = int(np.float32(0.0).view(np.int32))
    assert worths(policy) == [heavy, often + 1, seldom + 1, seldom + 5, seldom + 6, 0]
    policy.observe(7, saw([1, 2], fetched=[1]))  # 1 came anew: its uses are forgotten
    assert worths(policy)[1:3] == [seldom + 8, often + 1]
    policy.observe(9, saw([4, 5]))  # it closed at step 5: that was its first use
    assert worths(policy)[4:] == [often + 6, seldom + 10]
    alone = made(LRUK(k=1))
    alone.observe(2, saw([5]))
    assert worths(alone)[5] == often + 3


def test_prompt_history_ranks_what_was_never_used_below_all_that_was():
    for policy in (LRU(prompt_history=True), LFU(prompt_history=True), LRUK(prompt_history=True)):
        made(policy, prompt_mass=MASS)
        before = worths(policy)
        assert before[0] == before[4] == 0 < before[1] < before[2] < before[3]
        policy.observe(0, saw([0]))
        assert worths(policy)[0] > before[3]
    with pytest.raises(FmsimError, match="policy lru: the trace holds no attention"):
        made(LRU(prompt_history=True))


def test_fifo_ranks_by_when_a_page_came():
    policy = made(FIFO())
    policy.moved(0, ids([0, 3]), ids([-1, -1]))  # what the prefill leaves
    assert worths(policy) == [0] * 6
    policy.moved(3, ids([1, 2]), ids([0, -1]))
    policy.moved(5, ids([0]), ids([2]))
    assert worths(policy) == [6, 4, 0, 0, 0, 0]


def test_h2o_sums_mass_and_keeps_half_of_its_slots_for_the_newest():
    policy = made(H2O(), prompt_mass=MASS)
    policy.observe(0, saw([1, 4, -1], mass=[0.5, 0.25, 9.0]))
    assert worths(policy) == [0, 0.75, 0.5, 1.0, 0.25, 0]
    assert policy.pins() == Pins(recent=2)
    policy.reset(context())
    assert worths(policy) == [0] * 6


def test_belady_ranks_by_the_next_use():
    class Known:
        never = 9

        def first_use(self):
            return np.array([[3, 9, 0, 1, 9, 2]], np.int32)

        def next_use(self, step):
            return np.array([[step + 4, 9]], np.int32)

    policy = made(Belady(), future=Known())
    assert worths(policy) == [6, 0, 9, 8, 0, 7]
    policy.observe(0, saw([2, 3]))
    assert worths(policy) == [6, 0, 5, 0, 0, 7]


def test_the_oracle_ranks_what_the_window_uses_by_mass_and_all_of_it_above_the_rest():
    class Known:
        def window(self, step, cadence):
            assert (step, cadence) == (16, 8)
            return MASS, np.array([[True, True, False, True, True, False]])

    policy = made(Oracle(cadence=8), future=Known())
    least = 2.0**-24  # a used page without mass is worth so much, and what is not used nothing
    policy.decide(16)
    assert worths(policy, step=16) == [least, 0.25 + least, 0, 1.0, least, 0]
    assert policy.floor == least


def test_recency_and_its_sink_in_pages():
    policy = Recency(sink_tokens=9)
    policy.reset(context())
    assert worths(policy) == [0, 1, 2, 3, 4, 5]
    assert policy.pins() == Pins(sink=3)  # nine tokens lie in three entries of four
    assert made(Recency(sink_tokens=0)).pins() == Pins(sink=0)
    coarse = Recency(sink_tokens=17, granularity=4)
    coarse.reset(Context(1, 1, 6, 4, 4, 20, 2, 16))
    assert coarse.pins() == Pins(sink=2)  # five entries, two pages


def test_random_draws_once_by_the_seed():
    first, again, other = (made(Random(recent_tokens=5), seed=seed) for seed in (1, 1, 2))
    drawn = np.random.default_rng(1).random((1, 7), dtype=np.float32)[0, :6]
    assert worths(first) == worths(first, step=9) == worths(again) == drawn.tolist()
    assert worths(other) != worths(first)
    assert first.pins() == Pins(recent=2, decoded=True)


def mixed(number):
    for _ in range(2):
        number = (number ^ number >> 16) * 0x45D9F3B % 2**31
    return number ^ number >> 16


def test_random_fetch_draws_by_seed_step_layer_and_page():
    """Plain integers: salt of layer and seed, mixed with the step, then with the page."""
    top = 2**31 - 1
    policy = RandomFetch()
    policy.reset(Context(2, 2, 6, 4, 1, 4, 2, 16, seed=3))
    pages = np.tile(np.arange(-1, 6, dtype=np.int32), (2, 1))
    for step in (0, 1, 5):
        expected = [
            [mixed(mixed(mixed(layer + 3 * 64) + step & top) + page + 1 & top) for page in row]
            for layer, row in enumerate(pages.tolist())
        ]
        assert policy.worth(step, pages).tolist() == expected
    far = RandomFetch()
    far.reset(Context(1, 1, 6, 4, 1, 4, 2, 16, seed=2**40 + 1))
    assert far.salt.tolist() == [[mixed((2**40 + 1) * 64 % top)]]


def test_pyramid_keeps_the_prompts_window_and_what_is_decoded():
    policy = made(Pyramid(window_tokens=5), prompt_mass=MASS)
    inf = float("inf")
    assert worths(policy) == [0, 0.25, inf, inf, 0, 0]
    assert policy.pins() == Pins(recent=2, decoded=True)
    assert made(Pyramid(window_tokens=99)).pins().recent == 25
    assert worths(made(Pyramid(window_tokens=99), prompt_mass=MASS)) == [inf] * 4 + [0] * 2
    assert Pyramid(beta=4).layer_shares(3) == pytest.approx([1.75, 1.0, 0.25])
    assert Pyramid(beta=4).layer_shares(1) == pytest.approx([0.25])


def test_a_context_says_of_itself():
    ctx = Context(2, 2, 5, 3, 4, 10, 2, 16, tau=4, lookahead=lambda window: window * 100)
    assert [ctx.pages(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert ctx.group_slots == (3, 3) and ctx.entry_tokens == 4 and ctx.seed == 0
    assert [ctx.newest_state(step) for step in (0, 3, 4, 11)] == [0, 0, 100, 200]
    assert Context(1, 1, 5, 3, 1, 10, 2, 16).tau == 64
    with pytest.raises(TypeError, match="_start"):
        context(_start=None)
    table = ctx.table(7, "int64")
    assert table.shape == (2, 6) and table.dtype == np.int64 and (table == 7).all()
    pages = np.array([[4, 0], [1, -1]])
    ctx.put(table, pages, np.array([[1, 2], [3, 4]]))
    assert table[:, :5].tolist() == [[2, 7, 7, 7, 1], [7, 3, 7, 7, 7]]
    assert ctx.read(table, pages).tolist() == [[1, 2], [3, 4]]
    assert ctx.table().dtype == np.float32 and (ctx.table() == 0).all()
    for wrong in ((2, 5), (1, 6), (2, 7)):
        with pytest.raises(FmsimError, match="take a table as ctx.table makes it"):
            ctx.read(np.zeros(wrong), pages)
        with pytest.raises(FmsimError, match="take a table as ctx.table makes it"):
            ctx.put(np.zeros(wrong), pages, 1.0)

"""Worths, pins and budgets in numbers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights, ScorerConfig
from fmsim.policies import prompt, registry
from fmsim.policies.base import Context, LookaheadState, Observation, Pins
from fmsim.policies.budget import Budget
from fmsim.policies.foresight import Foresight
from fmsim.policies.lru import STEP_BITS
from fmsim.policies.lru_prefetch import LRUPrefetch
from fmsim.policies.lsa import LSA
from fmsim.policies.lsa_history import LSAHistory
from fmsim.policies.snapkv import SnapKV

INF = float("inf")


def worths(policy, step=0):
    pages = np.arange(policy.ctx.n_pages, dtype=np.int32)[None]
    return np.asarray(policy.worth(step, pages))[0].tolist()


def context(n_pages, prompt_entries, slots=4, granularity=1, **more):
    return Context(1, 1, n_pages, slots, granularity, prompt_entries, 2, 16, tau=4, **more)


def test_snapkv_averages_three_neighbours_and_keeps_the_window():
    """Six pages of a prompt, two of them its last 8 tokens; beyond its ends there is nothing."""
    mass = np.array([[3.0, 0.0, 6.0, 9.0, 1.0, 1.0, 0.0]], np.float32)
    policy = SnapKV(pool=3, window_tokens=8)
    policy.reset(context(7, 6, prompt_mass=mass))
    assert worths(policy) == pytest.approx([1, 3, 5, 16 / 3, INF, INF, 0])
    assert policy.pins() == Pins(decoded=True)
    alone = SnapKV(pool=1, window_tokens=5)  # 5 tokens lie in two entries of 4
    alone.reset(context(7, 6, prompt_mass=mass))
    assert worths(alone) == [3, 0, 6, 9, INF, INF, 0]
    whole = SnapKV(window_tokens=99)
    whole.reset(context(7, 6, prompt_mass=mass))
    assert worths(whole) == [INF] * 6 + [0]


@pytest.fixture
def weights(tmp_path):
    one = np.ones((1, 1), np.float32)
    layers = {0: LayerWeights(one, one[0], one, one)}
    path = tmp_path / "indexer.safetensors"
    checkpoint.save(Checkpoint(layers, ScorerConfig(rope_dims=0, rope_theta=1e4), 0.5), path)
    return path


def lookahead(window):
    """Logits 0, 1, 2, 3, 0, 1, ... of the 6 entries that are there, one more a window."""
    seen = 6 + window
    keys = (np.arange(seen, dtype=np.float32) % 4)[None, :, None]
    return LookaheadState(np.ones((1, 1), np.float32), 4 * seen - 1, keys, seen)


def seen(pages, count=None):
    row = np.array([pages], np.int32)
    ones = np.ones_like(row) if count is None else np.array([count], np.int32)
    hit = np.ones(row.shape, bool)
    return Observation(row, ones, np.ones(row.shape, np.float32), hit, ~hit)


def test_history_adds_the_logarithm_of_faded_uses(weights):
    """Entry 0 was used three times before the decision at 4, entry 1 once: log2(4) and log2(2),
    twice over. At 8 half of that and a further use of 0: log2(1 + 1.5 + 1) and log2(1.5).
    """
    policy = LSAHistory(checkpoint=weights, cadence=4, weight=2.0, fade=0.5, stale=False)
    policy.reset(context(8, 6, lookahead=lookahead))
    policy.decide(0)
    assert worths(policy)[:6] == pytest.approx([0, 1, 2, 3, 0, 1], rel=1e-4)
    for pages in ([0, 1], [0, -1], [0, -1]):
        policy.observe(1, seen(pages))
    policy.decide(4)
    assert worths(policy)[:7] == pytest.approx([4, 3, 2, 3, 0, 1, 2], rel=1e-4)
    policy.observe(5, seen([0]))
    policy.observe(5, seen([2], count=[0]))  # shown, and not selected
    policy.decide(8)
    expected = [2 * np.log2(3.5), 1 + 2 * np.log2(1.5), 2, 3, 0, 1, 2, 3]
    assert worths(policy) == pytest.approx(expected, rel=1e-4)


def test_history_may_begin_with_the_prompts_attention_and_fills_its_budget(weights):
    """Masses 3, 0 and 1 are so many uses: log2(4), 0 and log2(2) above the logits."""
    mass = np.array([[3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    policy = LSAHistory(checkpoint=weights, cadence=4, prompt_history=True, threshold=0.9)
    policy.reset(context(8, 6, lookahead=lookahead, prompt_mass=mass))
    assert policy.floor is None  # though LSA of this threshold has one
    policy.decide(0)
    assert worths(policy)[:6] == pytest.approx([2, 1, 3, 3, 0, 1], rel=1e-4)
    plain = LSAHistory(checkpoint=weights, cadence=4)
    plain.reset(context(8, 6, lookahead=lookahead, prompt_mass=mass))
    plain.decide(0)
    assert worths(plain)[:6] == pytest.approx([0, 1, 2, 3, 0, 1], rel=1e-4)


def test_stale_history_is_that_of_the_window_before(weights):
    policy = LSAHistory(checkpoint=weights, cadence=4, stale=True)
    policy.reset(context(8, 6, lookahead=lookahead))
    policy.decide(0)
    policy.observe(1, seen([0]))
    policy.decide(4)
    assert worths(policy)[0] == 0
    policy.decide(8)
    assert worths(policy)[0] == pytest.approx(1)  # log2(1 + 1)


def test_foresight_adds_logarithms_of_what_a_layer_attended_to(weights, tmp_path):
    """The prompt put 3e-6 on page 1 in layer 0 alone: log2(1 + 3) = 2. In layer 1 a step puts 7e-3
    on page 0: log2(1 + 7) = 3 in units of 1e-3. After a decision half is left of that, of the
    prompt's all. Layer 1 weighs the one head twice, and has twice the logits 0 1 2 3 0 1.
    """
    found = checkpoint.load(weights)
    served = np.array([[[1.0]], [[2.0]]], np.float32)
    checkpoint.save(replace(found, served={0: served}), tmp_path / "served.safetensors")
    mass = np.zeros((2, 8), np.float32)
    mass[0, 1] = 3e-6
    given = {
        "weight": 0,
        "heavy_weight": 1,
        "prompt_weight": 0.5,
        "age_weight": 0,
        "prompt_share": 0,
    }
    policy = Foresight(checkpoint=tmp_path / "served.safetensors", cadence=4, **given)
    policy.reset(Context(2, 2, 8, 4, 1, 6, 2, 16, tau=4, lookahead=lookahead, prompt_mass=mass))
    policy.decide(0)
    pages = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    logits = np.array([0.0, 1, 2, 3, 0, 1])
    prompt = np.array([0.0, 1, 0, 0, 0, 0])
    assert policy.worth(0, pages)[0] == pytest.approx(logits + prompt, rel=1e-4)
    assert policy.worth(0, pages)[1] == pytest.approx(2 * logits, rel=1e-4)
    row = np.array([[-1], [0]], np.int32)
    here = row >= 0
    policy.observe(1, Observation(row, here.astype(np.int32), 7e-3 * here, here, ~here))
    for step, bonus in ((4, 3), (8, np.log2(4.5))):
        policy.decide(step)
        assert policy.worth(step, pages)[0] == pytest.approx(logits + prompt, rel=1e-4)
        assert policy.worth(step, pages)[1, 0] == pytest.approx(bonus, rel=1e-4)
    assert policy.floor is None and not policy.decides_ahead
    shared = Foresight(checkpoint=weights, cadence=4, **given | {"age_weight": -1})
    shared.reset(Context(2, 2, 8, 4, 1, 6, 2, 16, tau=4, lookahead=lookahead))
    shared.decide(0)  # one logit for all layers; ages are 6 to 1 entries
    assert shared.worth(0, pages) == pytest.approx(
        np.stack([logits - np.log2(1 + np.arange(6, 0, -1))] * 2), rel=1e-4, abs=1e-6
    )


def test_foresight_adds_light_attention_and_ages_of_whole_pages(weights):
    """Pages of four entries with the logits 3 and 1. The prompt put 14e-6 and 6e-6 on them; half
    of it is a layer's at first: log2(1 + 7) and log2(1 + 3), twice over. Ages are 8 and 4 entries.
    """
    mass = np.array([[14e-6, 6e-6, 0]], np.float32)
    given = {"weight": 2, "heavy_weight": 0, "prompt_weight": 0, "prompt_share": 0.5}
    policy = Foresight(checkpoint=weights, cadence=4, granularity=4, age_weight=-3, **given)
    policy.reset(context(3, 6, granularity=4, lookahead=lookahead, prompt_mass=mass))
    policy.decide(0)
    ages = 3 * np.log2([9, 5])
    assert worths(policy)[:2] == pytest.approx(np.array([3 + 6, 1 + 4]) - ages, rel=1e-4)


def test_foresight_needs_weights_for_every_layer_of_the_trace(weights, tmp_path):
    """Weights for two CSA layers serve the layers 0 and 1, and not 2."""
    found = checkpoint.load(weights)
    path = tmp_path / "served.safetensors"
    checkpoint.save(replace(found, served={0: np.ones((2, 1, 1), np.float32)}), path)
    for numbers, fits in (((0, 1), True), ((0, 2), False)):
        policy = Foresight(checkpoint=path, cadence=4)
        state = lambda window: replace(lookahead(window), csa_numbers=(0,))
        ctx = Context(2, 2, 8, 4, 1, 6, 2, 16, tau=4, lookahead=state, csa_numbers=numbers)
        if fits:
            policy.reset(ctx)
        else:
            with pytest.raises(FmsimError, match=r"serves 2 CSA layers.*CSA layers \[0, 2\]"):
                policy.reset(ctx)


def test_a_state_that_policies_share_is_scored_by_each_with_its_own_weights(tmp_path):
    """The head weighs 1 or 2, in the retriever or in what it serves; or layer 5 is scored, whose
    keys are 9 everywhere. Rows of the state are of the layers 5 and 3.
    """
    one, two = np.ones((1, 1), np.float32), np.full((1, 1), 2, np.float32)
    keys = np.concatenate([np.full((1, 6, 1), 9, np.float32), lookahead(0).keys])
    shared = LookaheadState(np.ones((2, 1), np.float32), 23, keys, 6, csa_numbers=(5, 3))
    config = ScorerConfig(rope_dims=0, rope_theta=1e4)

    def scores(policy, heads, served=None, **given):
        layers = dict.fromkeys((3, 5), LayerWeights(one, one[0], one, heads))
        serves = {} if served is None else dict.fromkeys((3, 5), np.stack([served] * 6))
        path = tmp_path / "indexer.safetensors"
        checkpoint.save(Checkpoint(layers, config, 0.5, served=serves), path)
        made = policy(checkpoint=path, cadence=4, stale=False, **given)
        groups = 2 if made.params.scope == "per_layer" else 1
        ctx = Context(2, groups, 8, 4, 1, 6, 2, 16, tau=4, lookahead=lambda window: shared)
        made.reset(replace(ctx, csa_numbers=(3, 5)))
        return made.score(0)[:, :4].tolist()

    rising, nines = [0, 1, 2, 3], [9] * 4
    close = lambda rows: [pytest.approx(row, rel=1e-4) for row in rows]
    assert scores(LSA, one, layers=(3,)) == close([rising])
    assert scores(LSA, two, layers=(3,)) == close([[0, 2, 4, 6]])
    assert scores(LSA, one, layers=(5,)) == close([nines])
    assert scores(LSA, one, scope="per_layer") == close([rising, nines])
    plain = dict.fromkeys(("weight", "heavy_weight", "prompt_weight", "age_weight"), 0)
    given = {"layers": (3,)} | plain
    assert scores(Foresight, one, served=one, **given) == close([rising] * 2)
    assert scores(Foresight, one, served=two, **given) == close([[0, 2, 4, 6]] * 2)


def test_prefetch_takes_the_best_that_are_not_there_every_spacing_steps(weights):
    """Of logits 0 1 2 3 0 1, with 3 and 0 resident: 2, then 5 before 1, as ties go."""
    policy = LRUPrefetch(checkpoint=weights, spacing=4, most=2)
    there = SimpleNamespace(has=lambda pages: np.isin(pages, [0, 3]))
    policy.reset(context(8, 6, lookahead=lookahead, residents=there))
    wanted = policy.prefetch(0)
    assert wanted.tolist() == [[2, 5]]
    assert policy.used[0, 2] == (1 << STEP_BITS) - 1
    assert policy.prefetch(1) is None and policy.scored_entries(1) == 0
    assert policy.prefetch(4).tolist() == [[6, 2]] and policy.scored_entries(4) == 7
    many = LRUPrefetch(checkpoint=weights, spacing=4, most=100)
    many.reset(context(8, 6, lookahead=lookahead, residents=there))
    assert many.prefetch(0).tolist() == [[2, 5, 1, 4]]  # as many as there are slots
    whole = LRUPrefetch(checkpoint=weights, spacing=4)
    whole.reset(context(8, 6, slots=8, lookahead=lookahead, residents=there))
    assert whole.prefetch(0) is None  # every page has a slot


def test_pins_count_at_most():
    assert Pins().most(10, 8) == 1  # the page that is being filled
    assert Pins(sink=2, recent=3).most(10, 8) == 5
    assert Pins(sink=2, recent=1, decoded=True).most(10, 6) == 6
    assert Pins(sink=2, recent=9).most(10, 8) == 10


def test_prompt_ranks_grow_with_the_attention():
    mass = np.array([[0.0, 1e-3, 1.0, 1.5, 2.0]], np.float32)
    ranks = prompt.ranks(context(5, 5, prompt_mass=mass), "lru", 20)[0]
    assert (np.diff(ranks) > 0).all() and ranks[0] == 0 and ranks[-1] < 2**20
    assert ranks[2] == np.float32(1.0).view(np.int32) >> 11


def test_budgets_on_the_gpu_are_bytes_of_a_request():
    share, fixed = Budget.parse("12.5% gpu"), Budget.parse("0.25 GiB gpu")
    assert (share.on_gpu, fixed.on_gpu, Budget.parse("10%").on_gpu) == (True, True, False)
    assert share.gpu_bytes(1001) == 125  # rounded down
    assert fixed.gpu_bytes(10**12) == 2**28
    sizes = {"prompt_entries": 1000, "topk": 512, "entry_bytes": 584.0, "model_layers": 21}
    assert Budget.parse("12 MB").entries(**sizes) == pytest.approx(12e6 / 584 / 21)
    assert share.entries(**sizes, gpu_entries=77) == 77
    assert Budget.parse("10%").slots(16, **sizes) == 6  # 100 entries fill six pages of 16
    assert Budget.parse("1 entry").slots(16, **sizes) == 1
    for text in ("1 TiB", "1 GiB gpu", "1.5 MiB", "1 KiB", "1023 B"):
        assert str(Budget.parse(text)) == text
    assert Budget.parse(f"{10**15} entries").amount == 1e15
    for wrong in (f"{10**15 + 1} entries", "0 entries", "0%"):
        with pytest.raises(ValueError, match="must be above zero, and at most 1e"):
            Budget.parse(wrong)


def lsa(weights, granularity=4, **given):
    """Ten entries of logits 0 1 2 3, 0 1 2 3 and 0 1 in three pages; the last is not full."""
    policy = LSA(checkpoint=weights, cadence=4, granularity=granularity, stale=False, **given)
    ten = lambda window: lookahead(window + 4)
    policy.reset(Context(1, 1, 6, 4, granularity, 10, 2, 16, tau=4, lookahead=ten))
    return policy


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def test_a_pages_worth_is_its_best_entrys_logit(weights):
    policy = lsa(weights, threshold=0.8)
    policy.decide(0)
    assert worths(policy) == pytest.approx([3, 3, 1, INF, INF, INF], rel=1e-4)
    assert policy.floor == pytest.approx(np.log(4))  # the logit of 0.8
    assert policy.confidence == pytest.approx(3, rel=1e-4)
    assert policy.scored_entries(0) == 10 and policy.scored_entries(4) == 11
    assert lsa(weights, fill=False).floor == 0.0  # the checkpoint's 0.5
    blank = LookaheadState(np.ones((1, 1), np.float32), 2, np.zeros((1, 0, 1), np.float32), 0)
    policy = LSA(checkpoint=weights, cadence=4, stale=False)
    policy.reset(Context(1, 1, 6, 4, 1, 0, 2, 16, tau=4, lookahead=lambda window: blank))
    policy.decide(0)
    assert policy.confidence == -INF  # of a prompt that closed no entry
    policy = lsa(weights, threshold=0.8)
    ahead = policy.ahead(4, 5)[0].tolist()  # an entry more, and two pages that have no score yet
    assert ahead == pytest.approx([3, 3, 2, INF, INF], rel=1e-4)


def test_a_pages_worth_may_be_how_many_of_its_entries_are_above_the_threshold(weights):
    """Those of 2 and 3, log 4 being 1.39; pages with as many go by their best."""
    policy = lsa(weights, threshold=0.8, page_rank="count")
    policy.decide(0)
    two, none = 2 + sigmoid(3) / 2, sigmoid(1) / 2
    assert worths(policy)[:3] == pytest.approx([two, two, none], rel=1e-4)
    assert policy.floor == 1.0


def test_an_entry_at_the_threshold_counts(weights):
    """Scores of 0.5, of logits of 0, are as high as the checkpoint's: 4, 4 and 2 entries."""
    policy = lsa(weights, page_rank="count", fill=False)
    policy.decide(0)
    expected = [4 + sigmoid(3) / 2, 4 + sigmoid(3) / 2, 2 + sigmoid(1) / 2]
    assert worths(policy)[:3] == pytest.approx(expected, rel=1e-4)


def test_what_lsa_pins_in_pages(weights):
    assert lsa(weights).pins() == Pins(sink=1, recent=8, decoded=True)
    policy = lsa(weights, sink_entries=5, recent_entries=9)
    assert policy.pins() == Pins(sink=2, recent=3, decoded=True)
    assert policy.target_layers() == (0,)


@pytest.mark.parametrize(("stale", "known"), [(True, [0, 0, 4, 8]), (False, [0, 4, 8, 12])])
def test_a_stale_state_is_one_cadence_old(weights, stale, known):
    policy = LSA(checkpoint=weights, cadence=4, stale=stale)
    asked = []
    state = lambda step: asked.append(step) or lookahead(0)
    policy.reset(context(8, 6, lookahead=lookahead, newest_state=state))
    for step in (0, 4, 8, 12):
        policy._state(step)
    assert asked == known
    assert (policy.decides_ahead, policy.state_steps) == (stale, 4)


def test_scores_of_several_layers_become_one_or_stay_apart(tmp_path):
    """Two layers whose keys are 0 1 2 3 ..., and three times that."""
    one = np.ones((1, 1), np.float32)
    path = tmp_path / "two.safetensors"
    layers = dict.fromkeys((0, 1), LayerWeights(one, one[0], one, one))
    checkpoint.save(Checkpoint(layers, ScorerConfig(rope_dims=0, rope_theta=1e4), 0.5), path)

    def both(window):
        keys = lookahead(window).keys
        return LookaheadState(
            np.ones((2, 1), np.float32), 23, np.concatenate([keys, 3 * keys]), keys.shape[1]
        )

    def scores(**given):
        policy = LSA(checkpoint=path, cadence=4, stale=False, **given)
        groups = 2 if given.get("scope") == "per_layer" else 1
        policy.reset(Context(2, groups, 8, 4, 1, 6, 2, 16, tau=4, lookahead=both))
        assert policy.score(0).dtype == np.float32
        return policy.score(0)[:, :4]

    rows = [[0, 1, 2, 3], [0, 3, 6, 9]]
    assert scores() == pytest.approx(np.array(rows[1:]), rel=1e-4)
    assert scores(combine="mean") == pytest.approx(np.array([[0, 2, 4, 6]]), rel=1e-4)
    assert scores(scope="per_layer") == pytest.approx(np.array(rows), rel=1e-4)
    assert scores(layers=(0,)) == pytest.approx(np.array(rows[:1]), rel=1e-4)
    with pytest.raises(FmsimError, match=r"no retriever for CSA layers \[2\]"):
        scores(layers=(2,))
    with pytest.raises(FmsimError, match="scope per_layer needs the trace's CSA layers"):
        scores(scope="per_layer", layers=(0,))
    with pytest.raises(FmsimError, match="holds no hidden states or index keys"):
        LSA(checkpoint=path).reset(context(8, 6))


def test_prefetch_asks_for_nothing_that_is_there(weights):
    """Three of six pages are there, and there are four slots: the other three, and padding."""
    policy = LRUPrefetch(checkpoint=weights, spacing=4)
    there = SimpleNamespace(has=lambda pages: np.isin(pages, [1, 3, 5]))
    policy.reset(context(8, 6, lookahead=lookahead, residents=there))
    assert policy.prefetch(0).tolist() == [[2, 4, 0, -1]]
    there.has = lambda pages: np.isin(pages, [0, 1, 3, 5])  # page 0, too
    assert policy.prefetch(0).tolist() == [[2, 4, -1, -1]]


def test_five_faults_of_parameters_are_told_and_no_more():
    wrong = dict.fromkeys(("cadence", "fallback_above", "fallback_below", "granularity"), -1)
    wrong |= {"scope": "x", "on_miss": "y", "sees": "z"}
    with pytest.raises(FmsimError) as error:
        registry.build({"policy": "lru"} | wrong)
    assert str(error.value).count("Input should") == 5

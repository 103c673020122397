"""Each policy on a case worked out by hand; budgets, parameters and the registry."""

import importlib.metadata
from dataclasses import replace

import numpy as np
import pytest
from hand_trace import HandTrace, stream
from hypothesis import given
from hypothesis import strategies as st

from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights, ScorerConfig
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.policies.budget import Budget
from fmsim.replay.replayer import Replayer
from fmsim.testing import check_policy, policy_checks, sample_trace

NAMES = list(registry.OWN)
SCORED = (
    "lsa",
    "lsa-history",
    "foresight",
    "lru-prefetch",
)  # they need a memory indexer that fits the trace


def indexer_of_sample(path):
    """A memory indexer of random weights whose widths are those of the kit's `sample_trace`."""
    rng, heads, width = np.random.default_rng(0), 2, 8
    shapes = ((6, width), (6,), (heads * width, 6), (heads, width))
    layers = {
        layer: LayerWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
        for layer in (0, 1)
    }
    checkpoint.save(Checkpoint(layers, ScorerConfig(rope_dims=4, rope_theta=1e4), 0.5), path)
    return path


def hits(trace, spec, **options):
    return Replayer(trace, **options).run(registry.build(spec)).hit[:, 0].tolist()


def demand(name, entries, slots):
    return hits(stream(entries, 10), {"policy": name, "budget": f"{slots} entries"}, cold=True)


def test_lru_evicts_what_was_used_longest_ago():
    assert demand("lru", [1, 2, 1, 3, 2, 1], 2) == [0, 0, 1, 0, 0, 0]  # 3 evicts 2, 2 evicts 1


def test_lru_ranks_a_steps_hits_above_what_it_fetched():
    trace = HandTrace([[[1, 2]], [[2, 3]], [[4]], [[2]], [[3]]])
    spec = {"policy": "lru", "budget": "2 entries"}
    assert hits(trace, spec, cold=True) == [
        0,
        1,
        0,
        1,
        0,
    ]  # 4 evicts 3, fetched in the step in which 2 was hit


def test_lfu_evicts_the_rarest_and_of_equals_the_one_used_longest_ago():
    assert demand("lfu", [1, 1, 2, 3, 1, 2], 2) == [0, 1, 0, 0, 1, 0]  # 3 evicts 2
    assert demand("lfu", [1, 2, 3, 4, 3, 2], 3) == [0, 0, 0, 0, 1, 1]  # 4 evicts 1


def test_lfu_forgets_a_page_that_left():
    assert demand("lfu", [1, 1, 1, 2, 2, 2, 2, 3, 1], 1)[-1] == 0
    assert demand("lfu", [1, 1, 2, 2, 3, 3, 3, 1, 2], 2) == [
        0,
        1,
        0,
        1,
        0,
        1,
        1,
        0,
        0,
    ]  # 1 comes back at one use: 2 evicts it


def test_belady_evicts_what_is_needed_last():
    assert demand("belady", [1, 2, 3, 1, 2, 4, 1], 2) == [0, 0, 0, 1, 0, 0, 1]
    assert sum(demand("belady", [1, 2, 3, 1, 2, 4, 1], 2)) > sum(
        demand("lru", [1, 2, 3, 1, 2, 4, 1], 2)
    )


def test_full_never_misses_and_grows_with_the_text():
    ledger = Replayer(HandTrace([[[0, 7]]] * 8, still=False)).run(registry.build("full"))
    assert (ledger.hit == ledger.accessed).all() and ledger.evicted.sum() == 0
    assert ledger.resident[:, 0].tolist() == [8, 8, 8, 9, 9, 9, 9, 10]


def test_recency_keeps_the_sink_and_the_newest():
    trace = HandTrace([[list(range(8))]] * 4 + [[list(range(1, 9))]], still=False)
    replayer = Replayer(trace)
    assert replayer.run(registry.build({"policy": "recency", "budget": "3 entries"})).hit[
        :, 0
    ].tolist() == [
        3,
        3,
        3,
        2,
        2,
    ]  # entry 8 closes
    bare = registry.build({"policy": "recency", "budget": "3 entries", "sink_tokens": 0})
    assert replayer.run(bare).hit[:, 0].tolist() == [3, 3, 3, 2, 3]


def test_random_draws_once_by_the_seed_and_keeps_what_is_decoded():
    trace = HandTrace([[list(range(100))]] * 5 + [[[100]]], prompt_entries=100, still=False)
    policy = registry.build({"policy": "random", "budget": "40 entries"})
    ledger = Replayer(trace).run(policy)
    assert ledger.hit[:, 0].tolist() == [40, 40, 40, 39, 39, 1] and ledger.demand_loads.sum() == 0
    trace.header.seed = 1
    assert (Replayer(trace).run(policy).golden_hit != ledger.golden_hit).any()


def test_h2o_keeps_the_recent_half_and_the_heaviest_of_the_rest():
    # prompt mass makes 1 and 3 heavy; 6 and 7 are recent; at step 3 entry 8 closes, so 6 competes
    # with 1 and 3
    mass = [[0, 5, 0, 4, 0, 0, 0, 0]]
    spec = {"policy": "h2o", "budget": "4 entries"}
    seen = HandTrace([[[1, 3, 6, 7]]] * 3 + [[[1, 3, 6, 7, 8]]], prompt_mass=mass, still=False)
    ledger = Replayer(seen).run(registry.build(spec))
    assert ledger.hit[:, 0].tolist() == [4, 4, 4, 4]  # 6 had 3/16 only, so it left
    light = HandTrace([[[6]]] * 3 + [[[3, 6]]], prompt_mass=np.multiply(mass, 0.01), still=False)
    assert Replayer(light).run(registry.build(spec)).hit[:, 0].tolist() == [
        1,
        1,
        1,
        1,
    ]  # now 3 left: 6 gathered more


def test_h2o_evicts_for_good():
    trace = HandTrace([[[2]]] * 6, prompt_mass=[[0, 5, 0, 4, 0, 0, 0, 0]])
    assert hits(trace, {"policy": "h2o", "budget": "4 entries"}) == [0] * 6
    with pytest.raises(FmsimError, match="on_miss"):
        registry.build({"policy": "h2o", "on_miss": "fetch"})


def test_oracle_holds_the_next_windows_union_and_nothing_else():
    first, second = [[[0, 1]], [[1, 2]]], [[[5, 6]], [[6, 7]]]
    replayer = Replayer(HandTrace(first + second))
    ledger = replayer.run(registry.build({"policy": "oracle", "budget": "4 entries", "cadence": 2}))
    assert (ledger.hit == ledger.accessed).all() and ledger.resident[:, 0].tolist() == [3, 3, 3, 3]
    assert ledger.lookahead_loads[:, 0].tolist() == [0, 0, 3, 0] and ledger.evicted[
        :, 0
    ].tolist() == [0, 0, 3, 0]


def test_oracle_ranks_by_mass_when_the_union_does_not_fit():
    trace = HandTrace([[[0, 1, 2]]], masses=[[[0.1, 0.3, 0.2]]])
    ledger = Replayer(trace).run(registry.build({"policy": "oracle", "budget": "2 entries"}))
    assert ledger.mass_kept[0, 0] == pytest.approx(0.5, abs=1e-3)


def test_lookahead_cadence_recalls_what_lfu_counted():
    trace = HandTrace([[[1]], [[1]], [[2]], [[1]], [[1]]])
    spec = {"policy": "lfu", "budget": "1 entries", "cadence": 3, "on_miss": "mask"}
    assert hits(trace, spec | {"sees": "all"}) == [0, 0, 0, 1, 1]
    assert hits(trace, spec) == [0, 0, 0, 0, 0]  # what is masked is never seen, so never counted


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("more", [{}, {"prompt_history": True, "budget": "60 entries"}])
def test_conformance_with_a_memory_indexer(name, more, tmp_path):
    policy = registry.get(name)
    if not set(more) <= set(policy.Params.model_fields):
        pytest.skip("keeps no history")
    check_policy(policy(checkpoint=indexer_of_sample(tmp_path / "indexer.safetensors"), **more))


def three_windows():
    """A trace of 20 steps in windows of 8: as many boundaries as 130 steps have at a tau of 64."""
    trace = sample_trace(n_steps=20)
    header = trace.header.model_copy(update={"tau": 8})
    return replace(trace, header=header, hidden=np.repeat(trace.hidden, 3, axis=0))


@pytest.mark.parametrize("name", ["lru", "lfu", "lruk"])
def test_conformance_with_a_history_from_the_prompt(name):
    check_policy(registry.get(name)(prompt_history=True), three_windows())


@pytest.mark.parametrize("name", ["fifo", "random-fetch", "clock", "sieve", "s3fifo", "hisparse"])
@pytest.mark.parametrize("budget", ["1 entry", "5 entries", "200 entries", "402 entries"])
def test_conformance_at_extreme_budgets(name, budget):
    for check in policy_checks(registry.get(name)(budget=budget), three_windows()):
        if not check.name.endswith(": budget 20 entries"):  # no extreme, and tests/testing has it
            check()


# budgets


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("2x topk", 128),
        ("2 x topk", 128),
        ("10%", 100),
        ("4096 entries", 4096),
        ("1 entry", 1),
        ("0.001%", 1),
        ("584 B", 1),
        ("1 MiB", 85),
        ("2.1 MB", 171),
    ],
)
def test_budget_in_slots(text, slots):
    assert (
        Budget.parse(text).slots(1, prompt_entries=1000, topk=64, entry_bytes=584, model_layers=21)
        == slots
    )


def test_budget_counts_whole_slots():
    assert (
        Budget.parse("100 entries").slots(
            16, prompt_entries=1000, topk=64, entry_bytes=584, model_layers=21
        )
        == 6
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ten",
        "10",
        "-5%",
        "0%",
        "10 parsecs",
        "5 x",
        "5 gpu",
        "5 entries gpu",
        "2x topk gpu",
        None,
    ],
)
def test_budget_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


UNITS = ["bytes", "entries", "share", "topk", "gpu bytes", "gpu share"]


@given(st.floats(1e-3, 1e12), st.sampled_from(UNITS))
def test_budget_text_reads_back(amount, unit):
    again = Budget.parse(str(Budget(amount, unit)))
    assert again.unit == unit and again.amount == pytest.approx(amount, rel=1e-15)
    assert str(Budget.parse("12.5 % GPU")) == "12.5% gpu"
    assert Budget.parse("0.25 GiBgpu") == Budget(2**28, "gpu bytes")
    assert str(Budget.parse("7%")) == "7%" and str(Budget.parse("1.5 GiB")) == "1.5 GiB"


# registry


def test_names_are_the_nine():
    assert registry.names()[: len(NAMES)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_info_describes_every_policy_and_parameter(name):
    info = registry.info(name)
    assert info["name"] == name == registry.get(name).name and info["summary"] and info["evidence"]
    assert {"cadence", "scope", "granularity", "on_miss", "budget"} <= {
        p["name"] for p in info["parameters"]
    }
    assert all(p["description"] for p in info["parameters"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lry", "did you mean 'lru'"),
        ({}, "'policy' must name one of"),
        ({"policy": "lru", "budgte": "10%"}, "lru: no parameter 'budgte'; did you mean 'budget'"),
        ({"policy": "lru", "budget": "lots"}, "write e.g. '12.5% gpu'"),
        ({"policy": "lru", "granularity": 5}, "granularity"),
    ],
)
def test_a_bad_spec_says_what_to_write(spec, message):
    with pytest.raises(FmsimError, match=message):
        registry.build(spec)


@pytest.fixture
def plugged(monkeypatch):
    """Declares more entry points, for as long as the test lasts."""

    def plug(**points):
        found = [
            importlib.metadata.EntryPoint(name, value, registry.GROUP)
            for name, value in points.items()
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)
        registry._found.cache_clear(), registry._load.cache_clear()

    yield plug
    monkeypatch.undo()
    registry._found.cache_clear(), registry._load.cache_clear()


def test_a_plug_in_that_does_not_import_is_named_and_left_out(plugged):
    plugged(
        lru="fmsim.policies.lru:LRU",
        broken="no_such_module:Policy",
        odd="fmsim.policies.budget:Budget",
    )
    with (
        pytest.warns(UserWarning, match="'broken'.*ModuleNotFoundError"),
        pytest.warns(UserWarning, match="'odd'"),
    ):
        assert registry.names() == NAMES
    registry._load.cache_clear()
    with (
        pytest.warns(UserWarning, match="'odd'.*not a subclass"),
        pytest.warns(UserWarning, match="'broken'"),
    ):
        registry.names()
    with pytest.raises(FmsimError, match="no policy named 'broken'"):
        registry.build("broken")


# misbehaviour


def misbehaving(answer):
    class Bad(Policy):
        """Bad."""

        name, action, evidence, decision_scope = "bad", "evict", "position", "step"

        def worth(self, step, pages):
            good = self.ctx.xp.zeros(pages.shape, dtype=self.ctx.xp.float32)
            return answer(good) if step == 2 else good

    return Bad(budget="2 entries")


def raises(good):
    raise KeyError("lost")


LINE_OF_RAISE = raises.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raises, rf"raised KeyError: 'lost' \(test_builtin.py, line {LINE_OF_RAISE}\)$"),
        (lambda good: good[:, :1], "has shape"),
        (lambda good: good.tolist(), "list, not an array"),
        (lambda good: good * np.float32("nan"), "is NaN"),
        (lambda good: good.astype(bool), "dtype bool"),
        (lambda good: good.astype(int) - 1, "outside"),
    ],
)
def test_a_faulty_policy_gives_one_error_with_its_name_and_step(answer, message):
    with pytest.raises(FmsimError, match=f"policy bad, step 2: .*{message}"):
        Replayer(stream([1, 2, 3, 4, 5], 10)).run(misbehaving(answer))

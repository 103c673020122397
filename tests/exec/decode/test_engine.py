"""A decode under a policy: against the plain decode where nothing is lost, and against the replay
of its own trace.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from dataclasses import fields

from tiny_indexer import lookahead
from tiny_model import CSA, HCA, oracle, ours

from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.kv.beside import Beside
from fmsim.exec.runs.record import trace_header, trace_of
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer

STEPS, TAU, LENGTH = 36, 8, 158


@pytest.fixture(scope="module")
def prompt():
    model = ours(oracle(layer_types=[CSA, HCA, CSA], index_topk=8))
    return Prompt(
        model,
        torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist(),
        STEPS,
    )


def decoded(prompt, spec, **options):
    engine = Engine(prompt, registry.build(spec), tau=TAU, **options)
    engine.read(range(4))
    engine.generate(STEPS - 4)
    return engine


@pytest.fixture(scope="module")
def plain(prompt):
    """A decode that keeps everything, and its greedy tokens."""
    session = prompt.session()
    for token in range(4):
        session.read([token])
    return session, session.generate(STEPS - 4)


EXACT = [
    "full",
    {"policy": "lru", "budget": "5 entries"},  # fewer than a step selects: pages pass through
    {"policy": "lfu", "granularity": 4, "scope": "shared", "budget": "20%"},
    {"policy": "h2o", "budget": "60 entries"},  # room for all there will be
]


@pytest.mark.parametrize("spec", EXACT, ids=str)
def test_an_exact_policy_changes_no_token_and_no_logit(prompt, plain, spec):
    session, tokens = plain
    engine = decoded(prompt, spec)
    assert engine.tokens[4:] == tokens
    torch.testing.assert_close(engine.logits[0], session.logits, atol=1e-4, rtol=0)
    ledger = engine.ledger()
    np.testing.assert_array_equal(ledger.mass_kept, ledger.mass_total)


@pytest.mark.parametrize(
    "spec",
    ["full", {"policy": "lru", "budget": "9 entries"}, {"policy": "h2o", "budget": "30%"}],
    ids=str,
)
def test_attention_from_kernels_decodes_the_same(prompt, spec):
    """Here their references; on a GPU, kernels in a CUDA graph (tests/test_gpu_engine.py)."""
    plain, kernels = decoded(prompt, spec, kernels=False), decoded(prompt, spec, kernels=True)
    assert kernels.tokens == plain.tokens
    torch.testing.assert_close(kernels.logits, plain.logits, atol=1e-4, rtol=0)
    one, other = plain.ledger(), kernels.ledger()
    for field in fields(one):
        if field.name.startswith("mass"):
            np.testing.assert_allclose(
                getattr(one, field.name), getattr(other, field.name), rtol=1e-3
            )
        else:
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


# With other pages and scopes than in test_every_policy.py, which has every policy.
REPLAYED = [*EXACT[1:], {"policy": "h2o", "budget": "50%", "scope": "shared", "granularity": 4}]


@pytest.mark.parametrize("spec", REPLAYED, ids=str)
def test_the_replay_of_its_trace_takes_the_same_decisions(prompt, spec):
    engine = decoded(prompt, spec, select="all")
    header = trace_header(
        prompt.model, len(prompt.tokens), name="tiny", seed=0, sha256=None, tau=TAU
    )
    trace = trace_of(engine.request, header, [True] * 4 + [False] * (STEPS - 4))
    replayed, measured = (
        Replayer(trace).run(registry.build(spec)),
        engine.ledger(),
    )
    for field in fields(replayed):
        if field.name == "all_keys":
            continue  # this engine keeps them, to measure what was lost
        one, other = getattr(replayed, field.name), getattr(measured, field.name)
        if field.name.startswith("mass"):
            # numpy sums strided and whole rows in another order
            np.testing.assert_allclose(one, other, rtol=1e-6)
        else:
            assert np.array_equal(one, other), field.name


def test_masked_selection_is_of_resident_entries_alone(prompt):
    spec = {"policy": "recency", "budget": "40%"}
    resident, full = decoded(prompt, spec), decoded(prompt, spec, select="all")
    pager = resident.pagers[0]
    assert (pager.ids >= 0).all()  # the next best fill the row
    assert (
        resident.request.residency.table[0][pager.ids[0].long()] >= 0
    ).all()  # pages of one entry
    pager = full.pagers[0]
    assert 0 < (pager.ids >= 0).sum() < 8
    assert torch.equal(pager.ids >= 0, pager.hit)


def test_fallback_fetches_until_enough_is_there(prompt):
    spec = {"policy": "lru", "on_miss": "fallback", "budget": "10 entries", "fallback_below": 0.75}
    ledger = decoded(prompt, spec | {"fallback_above": 1.0}).ledger()
    assert ledger.demand_loads.sum() > 0
    assert (ledger.hit + ledger.demand_loads >= 0.75 * ledger.accessed).all()
    assert (ledger.hit + ledger.demand_loads < ledger.accessed).any()
    change = np.diff(ledger.resident, axis=0, prepend=ledger.initial[None])
    assert np.array_equal(
        change, ledger.demand_loads + ledger.lookahead_loads + ledger.written - ledger.evicted
    )
    spec = {"policy": "lru", "on_miss": "fallback", "budget": "10 entries"}
    # of the indexer's softmax
    loads = [
        decoded(prompt, spec | {"fallback_above": above}).ledger().demand_loads.sum()
        for above in (1.0, 0.15, 0.01)
    ]
    assert 0 == loads[0] < loads[1] < loads[2]


def test_a_lookahead_policy_scores_the_running_models_own_states(prompt, tmp_path):
    engine = decoded(prompt, lookahead(tmp_path, "20 entries", stale=False))
    ledger = engine.ledger()
    assert ledger.lookahead_loads.sum() > 0 and (ledger.resident <= 20).all()
    assert (
        engine.h2d_bytes == ledger.lookahead_loads.sum() * 2 * 16 * 4
    )  # two layers share a set; 16 dims of float32
    assert np.flatnonzero(ledger.scored).tolist() == list(range(0, STEPS, TAU))


@pytest.mark.parametrize("name", ["lsa", "lsa ahead", "lru-prefetch"])
def test_states_come_at_a_spacing_of_the_policys_own(prompt, tmp_path, name):
    """Every 12 steps, whether windows of the trace are 8 steps or 4: the same states, so the same
    decisions.
    """
    if name == "lru-prefetch":
        lsa = lookahead(tmp_path, "20 entries")
        spec = {"policy": name, "spacing": 12, "budget": "20 entries", "most": 5}
        spec |= {"checkpoint": lsa["checkpoint"]}
    else:
        spec = lookahead(tmp_path, "20 entries", cadence=12, stale=name == "lsa ahead")
    ledgers, positions = [], []
    for tau in (8, 4):
        engine = Engine(prompt, registry.build(spec), tau=tau)
        for step in range(STEPS):
            engine.step([step] if step < 4 else None)
            if step == 25:
                positions.append(engine.request.newest_state(25).position)
        ledgers.append(engine.ledger())
        assert sorted(engine.request.hidden) == sorted({*range(0, STEPS + 1, tau), 24, 36})
    assert positions == [LENGTH + 24 - 1] * 2
    assert ledgers[0].lookahead_loads.sum() > 0
    assert np.flatnonzero(ledgers[0].scored).tolist() == [0, 12, 24]
    for name in ("resident", "lookahead_loads", "demand_loads", "hit", "scored"):
        assert np.array_equal(getattr(ledgers[0], name), getattr(ledgers[1], name)), name


def test_what_an_engine_cannot_do_is_one_clear_error(prompt):
    with pytest.raises(FmsimError, match="future"):
        Engine(prompt, registry.build("belady"))
    engine = decoded(prompt, "full")
    with pytest.raises(FmsimError, match="room for 36 decode steps"):
        engine.read([1])


def test_what_a_decision_will_recall_is_copied_ahead_of_it(prompt, tmp_path):
    """With room for all ahead, or for one page, and the others held back to the end: the same
    tokens, sets and bytes.
    """
    spec, found, held = lookahead(tmp_path, "28 entries"), [], []
    for room in (1, 10**9):  # pages ahead: as many as slots, or one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fmsim.replay.needs.AHEAD", room)
            patch.setattr(Beside, "late", lambda self, work, *used: held.append(work))
            found.append(decoded(prompt, spec))
    early, late = found
    sizes = [one.tiers.entries.sizes[0].ahead for one in found]
    assert sizes == [(28, 28), (1, 1)]
    assert early.tokens == late.tokens and torch.equal(early.logits, late.logits)
    assert early.ledger().lookahead_loads.sum() > 20 and held
    for engine in found:
        assert engine.h2d_bytes == engine.ledger().lookahead_loads.sum() * 2 * 16 * 4


def test_what_a_threshold_gives_up_is_measured_though_every_page_has_room(prompt, tmp_path):
    """48 entries in all: one slot fewer changes nothing where the threshold keeps fewer still."""
    one, other = (
        decoded(prompt, lookahead(tmp_path, f"{slots} entries", threshold=0.999999, stale=False))
        for slots in (47, 48)
    )
    ledgers = [engine.ledger() for engine in (one, other)]
    assert (
        ledgers[0].resident.max() < 47
        and ledgers[0].lookahead_loads.sum() > 0
        and ledgers[0].mass_kept.sum() < ledgers[0].mass_total.sum()
    )
    for name in ("resident", "lookahead_loads", "hit", "mass_total", "mass_kept"):
        assert np.array_equal(getattr(ledgers[0], name), getattr(ledgers[1], name)), name
    assert one.h2d_bytes == other.h2d_bytes > 0

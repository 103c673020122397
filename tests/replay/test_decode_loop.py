"""What the loop tells tiers, clock and policies, and when."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hand_trace import HandTrace
from made_trace import make_trace

from fmsim.policies import registry
from fmsim.policies.base import Pins, Policy
from fmsim.policies.guard import Guarded
from fmsim.replay.decode_loop import DecodeLoop, NoTiers
from fmsim.replay.replayer import Replayer


class Noted:
    """Tiers and clock that write down what they are told, with the step."""

    def __init__(self, ahead_pages=10**6):
        self.most = ahead_pages
        self.step_number = -1
        self.told = []

    def ahead_pages(self, request):
        return self.most

    def _note(self, what, pages):
        row = np.asarray(pages)[0]
        self.told.append((self.step_number, what, sorted(row[row >= 0].tolist())))

    def wrote(self, request, moves):
        self._note("wrote", moves.pages)

    def recall(self, request, moves):
        self._note("recall", moves.pages)

    def recall_ahead(self, request, pages, part):
        self._note("ahead", pages)

    def decided(self):
        self.told.append((self.step_number, "decided", None))

    def settle(self, request, moves):
        self._note("settle", moves.pages)

    def moved_bytes(self):
        return 0

    @contextmanager
    def step(self, moved):
        assert moved() == 0
        self.step_number += 1
        yield

    @contextmanager
    def recall_part(self):
        self.told.append((self.step_number, "first", None))
        yield
        self.told.append((self.step_number, "then", None))


def driven(trace, policy, steps, **options):
    noted = Noted(**options)
    source = Replayer(trace).source(Guarded(registry.build(policy)))
    clock = type("Clock", (), {"step": noted.step, "recall": noted.recall_part})
    loop = DecodeLoop([source.book], source, noted, clock)
    for _ in range(steps):
        loop.advance()
    return noted.told


def of_kind(told, kind):
    return {step: pages for step, what, pages in told if what == kind and pages}


def test_what_is_recalled_was_foreseen_one_cadence_before():
    """The oracle knows its next window; of 40 steps and decisions at 8, 16, 24 and 32, the one at
    32 is the last that there is.
    """
    trace = make_trace(prompt_tokens=1024, n_steps=40, n_layers=1)
    policy = {"policy": "oracle", "budget": "24 entries", "cadence": 8}
    told = driven(trace, policy, 40)
    recalls, ahead = of_kind(told, "recall"), of_kind(told, "ahead")
    assert sorted(recalls) == [8, 16, 24, 32] and sorted(ahead) == [0, 8, 16, 24]
    for step, pages in recalls.items():
        assert set(ahead[step - 8]) <= set(pages)
        assert len(pages) - len(ahead[step - 8]) <= 2  # two entries close in between
    few = of_kind(driven(trace, policy, 40, ahead_pages=3), "ahead")
    assert few == {step: pages[:3] for step, pages in ahead.items()}
    untold = driven(trace, policy, 40, ahead_pages=0)
    assert not any(what == "ahead" for _, what, _ in untold)
    assert not any(what == "ahead" for _, what, _ in driven(trace, policy | {"cadence": 1}, 40))


def test_a_decision_every_second_step_is_foreseen_too():
    trace = make_trace(prompt_tokens=1024, n_steps=8, n_layers=1)
    told = driven(trace, {"policy": "oracle", "budget": "24 entries", "cadence": 2}, 8)
    assert sorted(of_kind(told, "ahead")) == [0, 2, 4]


def test_in_a_replay_nothing_is_recalled_ahead_and_nothing_moves():
    assert (NoTiers().ahead_pages(0), NoTiers().moved_bytes()) == (0, 0)


@pytest.mark.parametrize(
    ("cadence", "tau", "state_steps", "parts", "later"),
    [
        (16, 8, None, [1], [[0]]),  # a request alone does it at its decision
        (16, 8, None, [1, 3], [[1], [2, 4, 6]]),  # 7 steps for four: 1 + 7 n / 4
        (4, 8, None, [2, 2], [[1, 1], [2, 3]]),  # until the next decision 3 steps
        (16, 8, 3, [1, 1, 1], [[1], [1], [2]]),  # until the next state 2
        (16, 8, 2, [1, 1], [[1], [1]]),
        (16, 1, None, [1, 1], [[0], [0]]),  # states of every step: none is left to wait for
    ],
)
def test_many_requests_take_turns_to_foresee(cadence, tau, state_steps, parts, later):
    policy = SimpleNamespace(state_steps=state_steps, params=SimpleNamespace(cadence=cadence))
    ctx = SimpleNamespace(tau=tau)
    books = [
        SimpleNamespace(manager=SimpleNamespace(policy=policy, ctx=ctx, parts=count))
        for count in parts
    ]
    loop = DecodeLoop(books, source=None)
    found = [[loop._later(request, part) for part in range(n)] for request, n in enumerate(parts)]
    assert found == later


def test_each_part_of_many_is_foreseen_once_a_cadence_for_the_decision_to_come():
    """Two parts, of decisions at 4 and 8: the first a step after the last decision, the second two;
    the last decision comes in step 8, of 12.
    """
    foreseen = []
    manager = SimpleNamespace(
        policy=SimpleNamespace(
            params=SimpleNamespace(cadence=4), prefetches=False, state_steps=None
        ),
        ctx=SimpleNamespace(tau=100, n_steps=12),
        parts=2,
        decide=lambda step: None,
        foresee=lambda *asked: foreseen.append(asked),
    )
    told = {"moved": lambda *given: None, "score": lambda step: None}
    tiers = SimpleNamespace(ahead_pages=lambda request: 7, recall=lambda *given: None)
    source = SimpleNamespace(n_entries=lambda request, step: 100 + step)
    loop = DecodeLoop([SimpleNamespace(manager=manager, **told)], source, tiers)
    for step in range(12):
        loop._decide(0, step)
        assert len(foreseen) == [0, 1, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4][step]
    assert foreseen == [(at, 100 + at, 7, part) for at in (4, 8) for part in (0, 1)]


def test_writes_and_recalls_come_before_the_accesses_and_fetches_behind_them():
    """Four tokens an entry: entry 8 closes at step 3. At step 2, 5 is fetched."""
    trace = HandTrace([[[0]], [[0]], [[5]], [[8]]], prompt_entries=8, still=False)
    told = driven(trace, {"policy": "lru", "budget": "2 entries"}, 4)
    part = lambda step: [(what, pages) for at, what, pages in told if at == step]
    decided = ("decided", None)
    assert part(2) == [("first", None), decided, ("then", None), ("settle", [5])]
    assert part(3) == [("first", None), ("wrote", [8]), decided, ("then", None), ("settle", [])]


@pytest.mark.parametrize("on_miss", ["mask", "fetch"])
def test_a_policy_sees_the_mass_of_what_was_attended_to_alone(on_miss):
    """Two slots hold 6 and 7, the newest; 1 is selected too, with more mass."""
    seen = []

    class Looks(Policy):
        name = "looks"
        action, evidence, decision_scope = "hierarchical", "attention_history", "layer"

        def observe(self, step, obs):
            order = np.argsort(obs.pages[0])
            seen.append(
                [getattr(obs, name)[0][order].tolist() for name in ("pages", "mass", "hit")]
            )

        def worth(self, step, pages):
            return self.ctx.xp.astype(pages, self.ctx.xp.float32)

    trace = HandTrace([[[1, 7]]], masses=[[[0.5, 0.25]]], prompt_entries=8)
    spec = {"policy": Looks, "budget": "2 entries", "on_miss": on_miss}
    Replayer(trace).run(registry.build(spec))
    [[pages, mass, hit]] = seen
    assert hit[pages.index(7)] and mass[pages.index(7)] == 0.25
    if on_miss == "fetch":
        assert (pages, mass) == ([1, 7], [0.5, 0.25])
    else:
        assert sum(mass) == 0.25 and not hit[1 - pages.index(7)]


def test_decoded_pages_are_pinned_from_the_first_that_the_prompt_did_not_fill():
    """Pages of four entries; a prompt of 5 fills page 0, and begins page 1. At step 15 entry 8
    closes and page 2 begins. Of two slots page 0 gives up its own, though it is worth most.
    """

    class Oldest(Policy):
        name = "oldest"
        action, evidence, decision_scope = "evict", "position", "layer"

        def pins(self):
            return Pins(decoded=True)

        def worth(self, step, pages):
            return -self.ctx.xp.astype(pages, self.ctx.xp.float32)  # the oldest is worth most

    trace = HandTrace([[[0]]] * 16, prompt_entries=5, still=False)
    held = []
    spec = {"policy": Oldest, "budget": "8 entries", "granularity": 4, "on_miss": "mask"}
    Replayer(trace).run(registry.build(spec), lambda m: held.append(sorted(m.residency.slots[0])))
    assert held[14] == [0, 1] and held[15] == [1, 2]


class Scores(Policy):
    name = "scores"
    action, evidence, decision_scope = "hierarchical", "position", "layer"

    def worth(self, step, pages):
        return pages.astype(np.float32)

    def scored_entries(self, step):
        return 100 + step


class ScoresAndFetches(Scores):
    name = "scores_and_fetches"

    def prefetch(self, step):
        return np.array([[0]]) if step == 2 else None


@pytest.mark.parametrize(
    ("policy", "cadence", "scored"),
    [
        (Scores, 4, [100, 0, 0, 0, 104, 0, 0, 0, 108]),
        (Scores, 1, [100, 0, 0, 0, 0, 0, 0, 0, 0]),
        (ScoresAndFetches, 1, [100, 101, 102, 103, 104, 105, 106, 107, 108]),
    ],
)
def test_entries_are_scored_at_decisions_and_by_what_prefetches_at_every_step(
    policy, cadence, scored
):
    ledger = Replayer(HandTrace([[[0]]] * 9)).run(policy(budget="2 entries", cadence=cadence))
    assert ledger.scored.tolist() == scored


def test_what_is_prefetched_is_brought_in():
    """At step 2 alone; 6 and 7, the newest, are there."""
    trace = HandTrace([[[7]]] * 4)
    told = driven(trace, {"policy": ScoresAndFetches, "budget": "2 entries"}, 4)
    assert of_kind(told, "recall") == {2: [0]}

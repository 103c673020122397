"""The conformance kit: fmsim's own policies keep its rules, and one that breaks a rule is told."""

from typing import Literal

import numpy as np
import pytest
from every_policy import own_policies
from pydantic import Field

import fmsim
from fmsim import LookaheadPolicy, Policy, PolicyParams, check_policy, policy_checks
from fmsim.policies import registry
from fmsim.policies.lru import LRU
from fmsim.policies.recency import Recency
from fmsim.testing import sample_trace


def needs_indexer(name):
    """Those are checked in tests/policies, with one that fits the kit's trace."""
    return "checkpoint" in registry.get(name).Params.model_fields


@pytest.mark.parametrize(
    "check",
    [
        check
        for name in own_policies()
        if not needs_indexer(name)
        for check in policy_checks(registry.get(name))
    ],
    ids=lambda check: f"{check.policy}-{check}",
)
def test_fmsims_own_policies_keep_every_rule(check):
    check()


class Good(Policy):
    """Keeps what was used last."""

    name, action, evidence, decision_scope = "good", "hierarchical", "attention_history", "layer"

    def reset(self, ctx):
        super().reset(ctx)
        self.last = ctx.table()

    def observe(self, step, obs):
        self.ctx.put(self.last, obs.pages, float(step + 1))

    def worth(self, step, pages):
        return self.ctx.read(self.last, pages)


def _nameless():
    class Nameless(Good):
        """No name."""

        name = None

    return Nameless


def _undeclared():
    class Undeclared(Policy):
        """No action."""

        name, evidence, decision_scope = "undeclared", "position", "step"

        def worth(self, step, pages):
            return pages

    return Undeclared


def _undescribed():
    class Undescribed(Good):
        """A parameter without a description."""

        class Params(PolicyParams):
            size: int = 3

    return Undescribed


def _needy():
    class Needy(Good):
        """Cannot be made."""

        class Params(PolicyParams):
            size: int = Field(description="that has no default")

    return Needy


def _raising():
    class Raising(Good):
        """Raises."""

        def worth(self, step, pages):
            raise KeyError("lost")

    return Raising


def _leaving():
    class Leaving(Good):
        """Ends the process."""

        def reset(self, ctx):
            raise SystemExit(3)

    return Leaving


def _moody():
    class Moody(Good):
        """Draws from a generator of its own."""

        rng = np.random.default_rng(0)

        def worth(self, step, pages):
            return self.rng.random(pages.shape, dtype=np.float32)

    return Moody


def _forgetful():
    class Forgetful(Good):
        """Keeps its table over a second reset."""

        def reset(self, ctx):
            super().reset(ctx)
            self.last = self.__dict__.setdefault("kept", self.last)

    return Forgetful


def _fetching():
    class Fetching(Good):
        """Says that it evicts for good, and fetches."""

        action = "evict"

    return Fetching


def _evicting():
    class Evicting(Good):
        """Says that it moves nothing, and evicts."""

        action = "visibility_only"

        Params = Recency.Params

    return Evicting


def _weighing():
    class Weighing(Good):
        """Says that it goes by positions, and reads masses."""

        evidence = "position"

        def observe(self, step, obs):
            self.ctx.put(self.last, obs.pages, obs.mass)

    return Weighing


def _writing():
    class Writing(Good):
        """Writes to what it is handed, under torch alone."""

        def observe(self, step, obs):
            if not isinstance(obs.hit, np.ndarray):
                obs.hit[:] = True
            super().observe(step, obs)

    return Writing


def _writing_in_numpy():
    class WritingHere(Good):
        """Writes to what it is handed."""

        def observe(self, step, obs):
            obs.hit[:] = True

    return WritingHere


def _numpy_only():
    class NumpyOnly(Good):
        """Ranks otherwise where arrays are torch's."""

        def worth(self, step, pages):
            worth = super().worth(step, pages)
            return worth if isinstance(worth, np.ndarray) else -worth

    return NumpyOnly


def _counting():
    class Counting(Good):
        """Changes what it keeps by being asked."""

        def worth(self, step, pages):
            worth = super().worth(step, pages)
            self.ctx.put(self.last, pages[:, :1], 0.0)
            return worth

    return Counting


def _two_tongued():
    class TwoTongued(Good):
        """Says one thing of pages and another of the first pages."""

        def worth_of_first(self, step, n):
            return self.last[:, :n] + 1

    return TwoTongued


def _doubled():
    class Doubled(Good):
        """Answers in float64."""

        def worth(self, step, pages):
            return self.ctx.xp.astype(super().worth(step, pages), self.ctx.xp.float64)

    return Doubled


class Scoring(LookaheadPolicy):
    """Keeps what scores highest by the hidden state of a window."""

    name, action, evidence, decision_scope = "scoring", "hierarchical", "predicted_future", "layer"

    class Params(PolicyParams):
        cadence: int = Field(16, gt=1, description="steps between decisions")
        scope: Literal["per_layer"] = Field("per_layer", description="each layer its own set")
        granularity: Literal[1] = Field(1, description="entries in a slot")

    def score(self, step):
        return self.score_of(step // self.ctx.tau)

    def score_of(self, window):
        state = self.ctx.lookahead(window)
        xp = self.ctx.xp
        return xp.sum(state.keys * state.hidden[:, None, :], axis=2)


def _foretelling():
    class Foretelling(Scoring):
        """Reads the hidden state of a window that has not begun."""

        def score_of(self, window):
            state = self.ctx.lookahead(1)
            n = self.ctx.pages(self.ctx.prompt_entries)
            return self.ctx.xp.sum(state.keys * state.hidden[:, None, :], axis=2)[:, :n]

    return Foretelling


def _looking_back():
    class LookingBack(Scoring):
        """Says that it goes by history, and scores index keys."""

        evidence = "attention_history"

    return LookingBack


def _changing_its_mind():
    class Changing(Scoring):
        """Says what it will decide, and decides otherwise."""

        @property
        def decides_ahead(self):
            return True

        def ahead(self, step, n):
            return -super().ahead(step, n)

    return Changing


SAYS = {
    _nameless: "has no `name`",
    _undeclared: "has no `action`; it must be one of visibility_only, evict, hierarchical",
    _undescribed: "parameter size has no description",
    _needy: "size: Field required",
    _raising: "raised KeyError: 'lost'",
    _leaving: "SystemExit|sys.exit",
    _moody: "differs after a second reset",
    _forgetful: "differs after a second reset",
    _fetching: "`action` is 'evict', but it loads",
    _evicting: "`action` is 'visibility_only', but it evicts",
    _weighing: "`evidence` is 'position', but attention mass changes what it keeps",
    _looking_back: "`evidence` is 'attention_history', but hidden states or index keys change",
    _foretelling: "what is still to come changes",
    _writing: "observe writes to obs.hit",
    _writing_in_numpy: "observe raised ValueError: .*read-only",
    _numpy_only: "numpy and torch put different pages",
    _counting: "asked again|asking for worth",
    _two_tongued: "worth_of_first differs",
    _doubled: "dtype float64",
    _changing_its_mind: "`ahead` said otherwise",
}


@pytest.mark.parametrize("make", SAYS, ids=lambda make: make.__name__.strip("_"))
def test_a_broken_rule_is_told_in_a_sentence(make):
    with pytest.raises(AssertionError, match=SAYS[make]) as found:
        check_policy(make())
    assert str(found.value).startswith("policy ") and "\n" not in str(found.value)


@pytest.mark.parametrize("policy", [Good, Scoring, Good(budget="20%", granularity=4)])
def test_what_breaks_none_passes(policy):
    check_policy(policy)


def test_checks_have_names_that_differ():
    names = [str(check) for check in policy_checks(LRU)]
    assert len(set(names)) == len(names) and names[0] == "declarations"
    fixed = [str(check) for check in policy_checks(Recency)]
    assert not any("fallback" in name for name in fixed)  # it fixes on_miss


def test_a_trace_of_ones_own_is_replayed():
    trace = sample_trace(prompt_tokens=800, n_steps=200, n_layers=1)
    check_policy(Good, trace)
    assert fmsim.check_policy is check_policy

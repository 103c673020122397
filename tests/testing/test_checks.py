"""The conformance kit: fmsim's own policies keep its rules, and one that breaks a rule is told."""

import re
from typing import Literal

import numpy as np
import pytest
from every_policy import own_policies
from pydantic import Field

import fmsim
from fmsim import LookaheadPolicy, Policy, PolicyParams, check_policy, policy_checks
from fmsim.policies import registry
from fmsim.policies.base import Pins
from fmsim.policies.lru import LRU
from fmsim.policies.recency import Recency
from fmsim.testing import rules, sample_trace


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


def _spaced():
    class Spaced(Good):
        """A name that `--set policies.NAME.key=` cannot hold."""

        name = "two words"

    return Spaced


def _overfull():
    class Overfull(Good):
        """Wants more slots than there are pages."""

        def n_slots(self, n_pages, **sizes):
            return n_pages + 1

    return Overfull


def _elsewhere():
    class Elsewhere(Good):
        """Makes an array on the host, wherever the others are."""

        def worth(self, step, pages):
            xp = self.ctx.xp
            return super().worth(step, pages) + xp.zeros(pages.shape, dtype=xp.float32)

    return Elsewhere


def _of_another_width():
    class OfAnotherWidth(Good):
        """Reads an array that is no table."""

        def worth(self, step, pages):
            return self.ctx.read(self.last[:, 1:], pages)

    return OfAnotherWidth


def _writing_to_the_prompts():
    class WritingToThePrompts(Good):
        """Writes to the prompt's masses, under torch alone."""

        def observe(self, step, obs):
            if not isinstance(obs.hit, np.ndarray):
                self.ctx.prompt_mass[:] = 0
            super().observe(step, obs)

    return WritingToThePrompts


def _reading_other_keys():
    class ReadingOtherKeys(Scoring):
        """Says that it scores the first layer's keys, and scores all."""

        def target_layers(self):
            return (0,)

    return ReadingOtherKeys


class OfLayers(PolicyParams):
    scope: Literal["per_layer"] = Field("per_layer", description="each layer its own set")


def _wavering():
    class Wavering(Good):
        """Shares its slots out by pins that go by its slots."""

        Params = OfLayers

        def layer_shares(self, n_layers):
            return [n_layers - layer for layer in range(n_layers)]

        def pins(self):
            return Pins(sink=self.ctx.n_slots // 8)

    return Wavering


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
    _spaced: "the `name` 'two words'",
    _overfull: "n_slots returned",
    _elsewhere: "xp.zeros without a device",
    _of_another_width: "take a table as ctx.table makes it",
    _writing_to_the_prompts: "observe writes to ctx.prompt_mass",
    _reading_other_keys: "index keys of other layers than its target layers",
    _wavering: "its layers' slots are shared out by that answer",
}


@pytest.mark.parametrize("make", SAYS, ids=lambda make: make.__name__.strip("_"))
def test_a_broken_rule_is_told_in_a_sentence(make):
    with pytest.raises(AssertionError, match=SAYS[make]) as found:
        check_policy(make())
    assert str(found.value).startswith("policy ") and "\n" not in str(found.value)


def test_every_rule_finds_a_policy_that_breaks_it():
    """All but two, which no policy can break: they hold the cache manager to its word."""
    found = set()
    anywhere = {_raising, _leaving, _writing_in_numpy, _doubled, _of_another_width, _overfull}
    for make in set(SAYS) - anywhere:  # those are told by whatever rule comes first
        for check in policy_checks(make()):
            rule, _, how = str(check).partition(": ")
            if rule in found or how not in ("", "as it is"):
                continue
            try:
                check()
            except AssertionError as error:
                if re.search(SAYS[make], str(error)):
                    found.add(rule)
    named = {rule.__name__.replace("_", " ") for rule in rules.OF_REPLAYS}
    rules_of = named | {"declarations", "parameters"}
    assert rules_of - found == {"budget holds", "moves add up"}


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
    for check in policy_checks(Good, trace):
        if str(check).endswith(": as it is"):
            check()
    assert fmsim.check_policy is check_policy

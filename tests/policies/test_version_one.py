"""Plug-ins written against the interface's first version, as its documentation had them."""

from typing import Literal

import pytest
from made_trace import make_trace
from pydantic import Field

from fmsim.errors import PolicyError
from fmsim.policies.base import LookaheadPolicy, Pins, Policy, PolicyParams
from fmsim.policies.budget import Budget
from fmsim.replay.replayer import Replayer
from fmsim.testing import check_policy


class LRU2(Policy):
    """Keep pages whose second to last use is the latest (LRU-K, O'Neil et al., SIGMOD 1993, K = 2).

    Word for word what version 1's tutorial printed.
    """

    name = "lru2"
    action = "hierarchical"  # misses are loaded from host memory
    evidence = "attention_history"
    decision_scope = "layer"

    class Params(PolicyParams):
        newcomer_steps: int = Field(
            64, ge=0, description="a page's first use counts as two: this many steps apart"
        )

    def reset(self, ctx):
        super().reset(ctx)
        self.last = ctx.table()  # float32 [G, P + 1], zeros
        self.second = ctx.table()

    def observe(self, step, obs):
        read, put = self.ctx.read, self.ctx.put
        last = read(self.last, obs.pages)
        first_use = last == 0
        older = self.ctx.xp.where(first_use, float(max(step - self.params.newcomer_steps, 0)), last)
        put(self.second, obs.pages, older)
        put(self.last, obs.pages, float(step + 1))

    def worth(self, step, pages):
        return self.ctx.read(self.second, pages)


class Newest(Policy):
    """Version 1's pins, `wrote`, a default of its own, and a table named like a later method."""

    name, action, evidence, decision_scope = "newest", "hierarchical", "position", "step"

    class Params(PolicyParams):
        budget: Budget = Field(Budget(0.2, "share"), description="GPU memory for entries")
        on_miss: Literal["fetch", "mask"] = Field("fetch", description="load, or do without")

    def reset(self, ctx):
        super().reset(ctx)
        self.moved = ctx.table()

    def pins(self):
        return Pins(sink=1, recent=2, decoded=False)

    def wrote(self, step, pages):
        self.ctx.put(self.moved, pages, float(step))

    def worth(self, step, pages):
        return self.ctx.read(self.moved, pages) + self.ctx.xp.astype(pages, self.ctx.xp.float32)


class Scoring(LookaheadPolicy):
    """Version 1's lookahead: `score`, and a decision one window ahead as a class attribute."""

    name, action, evidence, decision_scope = "scoring", "hierarchical", "predicted_future", "layer"
    decides_ahead = True

    class Params(PolicyParams):
        cadence: Literal[64] = Field(64, description="steps between decisions")
        scope: Literal["per_layer"] = Field("per_layer", description="each layer its own set")
        granularity: Literal[1] = Field(1, description="entries in a slot")

    def score(self, step):
        state = self.ctx.lookahead(max(step // self.ctx.tau - 1, 0))
        return self.ctx.xp.sum(state.keys * state.hidden[:, None, :], axis=2)


@pytest.mark.parametrize("policy", [LRU2, Newest, Scoring])
def test_a_plug_in_of_version_one_runs(policy):
    check_policy(policy)


@pytest.mark.parametrize("name", ["watches", "prefetches", "state_steps"])
def test_a_name_that_came_later_is_refused_in_a_sentence(name):
    def reset(self, ctx):
        Policy.reset(self, ctx)
        setattr(self, name, 3)

    clashing = type("Clashing", (LRU2,), {"reset": reset, "name": "clashing"})
    said = f"policy clashing, reset: reset raised AttributeError: .*'{name}'"
    with pytest.raises(PolicyError, match=said) as found:
        Replayer(make_trace(n_steps=4)).run(clashing())
    assert "\n" not in str(found.value)


def test_a_method_by_a_later_name_is_refused_in_a_sentence():
    class Fetching(LRU2):
        name = "fetching"

        def prefetch(self, pages, when):
            """A helper of its own, of another signature."""

    said = r"policy fetching, step 0: prefetch raised TypeError: .*missing 1 required"
    with pytest.raises(PolicyError, match=said):
        Replayer(make_trace(n_steps=4)).run(Fetching())

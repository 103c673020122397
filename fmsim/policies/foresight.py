"""A memory indexer with scores for each layer, and what each layer was seen to attend to."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint, scorer
from fmsim.policies.base import (
    Array,
    Context,
    DecisionScope,
    LookaheadState,
    Observation,
    Pins,
)
from fmsim.policies.lsa import LSA, digest

LIGHT, HEAVY = 1e-6, 1e-3  # units of attention


class Foresight(LSA):
    """Keep what a memory indexer scores high for a layer, or the layer attended to of late, by one
    sum.

    A page's worth to a layer is the indexer's logit, `weight` x log2(1 + a / 1e-6), `heavy_weight`
    x log2(1 + a / 1e-3), `prompt_weight` x log2(1 + p / 1e-6) and `age_weight` x log2(1 + its age
    in entries). Attention p is the layer's, of the prompt's last queries; a is `prompt_share` of
    it, then what the layer put on the page in each step while it was here, of which `fade` is left
    from one decision to the next. So a page that is not here can come back by its logit. The
    indexer scores the keys of few layers, but weighs its heads for each layer apart
    (`Checkpoint.served`); one that has no such weights gives all layers one logit. The newest
    state is used: the wait for a recall is short, and not worth the spare slots that it would take
    to overlap it. The budget is filled. Own work: network and weights were fitted together, on
    training text alone (`benchmarks/results/foresight.md`).
    """

    name = "foresight"
    decision_scope: ClassVar[DecisionScope] = "layer"
    scores_apart = False  # the layers scored are not those that are served
    default_checkpoint = checkpoint.FORESIGHT
    needs_mass = True

    class Params(LSA.Params):
        scope: Literal["per_layer"] = Field("per_layer", description="each layer its own set")
        page_rank: Literal["max"] = Field("max", description="pages go by their best entry")
        stale: bool = Field(
            False, description="use the state of one window ago, so that recall overlaps decoding"
        )
        weight: float = Field(0.154, ge=0, description="of attention's logarithm, in units of 1e-6")
        heavy_weight: float = Field(0.137, ge=0, description="the same, in units of 1e-3")
        prompt_weight: float = Field(
            0.097, ge=0, description="of that of the prompt's last queries, in units of 1e-6"
        )
        age_weight: float = Field(-0.097, description="of the logarithm of a page's age in entries")
        fade: float = Field(
            0.5, ge=0, le=1, description="what is left of attention from one decision to the next"
        )
        prompt_share: float = Field(
            0.15, ge=0, description="how much of the prompt's attention is a layer's at first"
        )
        recent_entries: int = Field(4, ge=0, description="newest entries, always resident")

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.floor = None
        self.served = self._served(list(ctx.csa_numbers or range(ctx.n_layers)))
        self.prompt = ctx.table()
        if ctx.prompt_mass is not None:
            self.prompt[:, : ctx.n_pages] = ctx.prompt_mass
        self.attention = self.prompt * self.params.prompt_share

    def _served(self, numbers: list[int]) -> list[Array]:
        """By layer scored, the weights of its heads for each of the trace's layers: float64 [L,
        heads, hidden_size]; none where the checkpoint has none.
        """
        served = [self.loaded.served[layer] for layer in self.layers if self.loaded.served]
        if served and len(served[0]) <= max(numbers):
            raise FmsimError(
                f"policy foresight: the checkpoint serves {len(served[0])} CSA layers, but the"
                f" trace has the CSA layers {numbers}"
            )
        for weights in served:
            self._digest += digest(numbers, [], [weights])
        xp, device = self.ctx.xp, self.ctx.device
        return [xp.asarray(each[numbers], dtype=xp.float64, device=device) for each in served]

    def _logits(self, state: LookaheadState) -> Array:
        """float32 [G, n entries], or [1, n entries] where all layers have one."""
        if not self.served:
            return super()._logits(state)
        if self._digest not in state.known:
            scored = scorer.combine(self._scored_by(state), self.params.combine)
            state.known[self._digest] = self.ctx.xp.astype(scored, self.ctx.xp.float32)
        return state.known[self._digest]

    def _scored_by(self, state: LookaheadState) -> Array:
        """float64 [layers scored, G, n entries]."""
        if not self.served:
            return super()._scored_by(state)
        xp = self.ctx.xp
        scored = []
        for weights, served, row in zip(self.weights, self.served, self.rows, strict=True):
            hidden, keys = (xp.astype(a[row], xp.float64) for a in (state.hidden, state.keys))
            given = weights, self.config, served, hidden, state.position, keys
            scored.append(scorer.served_logits(*given))
        return xp.stack(scored, axis=0)

    def pins(self) -> Pins:
        pages = self.ctx.pages
        return Pins(sink=pages(self.params.sink_entries), recent=pages(self.params.recent_entries))

    def observe(self, step: int, obs: Observation) -> None:
        before = self.ctx.read(self.attention, obs.pages)
        self.ctx.put(self.attention, obs.pages, before + obs.mass)

    def score(self, step: int) -> Array:
        xp, given, scores = self.ctx.xp, self.params, super().score(step)
        n = scores.shape[1]
        # float64: libraries round alike to float32
        seen, prompt = (xp.astype(t[:, :n], xp.float64) for t in (self.attention, self.prompt))
        age = xp.arange(n, 0, -1, dtype=xp.float64, device=self.ctx.device)
        bonus = (
            given.weight * xp.log2(1 + seen / LIGHT)
            + given.heavy_weight * xp.log2(1 + seen / HEAVY)
            + given.prompt_weight * xp.log2(1 + prompt / LIGHT)
            + given.age_weight * xp.log2(1 + age * self.ctx.granularity)[None]
        )
        return xp.astype(xp.astype(scores, xp.float64) + bonus, xp.float32)

    def decide(self, step: int) -> None:
        super().decide(step)
        if step:
            self.attention = self.attention * self.params.fade

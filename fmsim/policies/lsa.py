"""Lookahead Sparse Attention: a trained memory indexer chooses what the next window may attend
to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint, scorer
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import LayerWeights
from fmsim.policies.base import (
    Array,
    Context,
    DecisionScope,
    Evidence,
    LookaheadPolicy,
    LookaheadState,
    Pins,
    PolicyParams,
)
from fmsim.policies.budget import Budget


def digest(config: Any, rows: Sequence[int], parts: Iterable[Iterable[Any]]) -> bytes:
    """Of all that an indexer's logits depend on beside the state."""
    found = hashlib.blake2b(repr((config, list(rows))).encode(), digest_size=16)
    for weights in parts:
        for part in weights:
            found.update(np.ascontiguousarray(part).tobytes())
    return found.digest()


class LSA(LookaheadPolicy):
    """Keep what the memory indexer scores highest for the coming window (arXiv 2606.09079).

    Every `cadence` steps the indexer scores all compressed entries from the hidden state of the
    last token, one retriever a CSA layer, and one set serves all layers: a page's worth is its best
    entry's logit, the layers' combined by max. The newest entries and all that were decoded stay
    resident. The budget is filled, unless `threshold` says what is not worth keeping. The paper's
    accuracy was measured with a threshold of 0.5, 2,048 recent entries and no limit; the released
    engine's fixed budget is `kmax` with granularity 64 and page_rank "count".
    """

    name = "lsa"
    action = "hierarchical"
    evidence: ClassVar[Evidence] = "predicted_future"
    decision_scope: ClassVar[DecisionScope] = "request"
    default_checkpoint: ClassVar[Path] = checkpoint.SHIPPED

    class Params(PolicyParams):
        budget: Budget = Field(
            Budget(0.1, "share"),
            description="what is kept, or with a threshold the most; pinned pages included",
        )
        cadence: int = Field(64, ge=1, description="steps between decisions: the paper's tau")
        scope: Literal["per_layer", "shared"] = Field(
            "shared", description="one set for all CSA layers, or each its own"
        )
        on_miss: Literal["fetch", "mask", "fallback"] = Field(
            "mask", description="the paper masks what is not resident"
        )
        checkpoint: Path | None = Field(
            None, description="the indexer's weights; by default those shipped for nano"
        )
        layers: tuple[int, ...] | None = Field(
            None, min_length=1, description="CSA layers scored, from 0; by default the checkpoint's"
        )
        combine: Literal["max", "mean"] = Field(
            "max", description="how the layers' logits become one"
        )
        threshold: float | None = Field(
            None, gt=0, lt=1, description="lowest score kept, even where there is room"
        )
        fill: bool = Field(
            True,
            description="without a threshold: fill the budget; false: go by the checkpoint's"
            " threshold, or 0.5",
        )
        page_rank: Literal["max", "count"] = Field(
            "max", description="by the best entry, or by entries above the threshold"
        )
        sink_entries: int = Field(
            1, ge=0, description="first entries of the prompt, always resident"
        )
        recent_entries: int = Field(
            32, ge=0, description="newest entries, always resident: what the sliding window covers"
        )
        kmax: int | None = Field(None, ge=1, description="the budget as a number of pages in all")
        stale: bool = Field(
            True, description="use the state of one window ago, so that recall overlaps decoding"
        )

        @model_validator(mode="before")
        @classmethod
        def _kmax_is_a_budget(cls, given: Any) -> Any:
            if not isinstance(given, dict) or given.get("kmax") is None:
                return given
            pages = Budget(float(given["kmax"]) * int(given.get("granularity", 1)), "entries")
            if Budget.parse(given.get("budget", pages)) != pages:
                raise ValueError("kmax is a budget in pages; give one of kmax and budget")
            return given | {"budget": pages}

    params: Params

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self._highest: dict[int, Array] = {}  # by decision: the best page's
        self._scored: dict[int, int] = {}  # by decision: entries, in all layers
        if ctx.lookahead is None:
            raise FmsimError(
                "policy lsa: the trace holds no hidden states or index keys to score; "
                "use one that `fmsim trace record` wrote of a DeepSeek-V4 or DSA model, or another"
                " policy"
            )
        loaded, state = self._load(), ctx.lookahead(0)
        self.loaded = loaded
        numbers = list(ctx.csa_numbers or range(ctx.n_layers))
        self.layers = self._layers_of(loaded)
        scored = replace(loaded, layers={layer: loaded.layers[layer] for layer in self.layers})
        given = list(state.csa_numbers or numbers)
        scored.check_fits(
            given, state.hidden.shape[1], state.keys.shape[2], "policy lsa: the trace"
        )
        if self.scores_apart and self.layers != numbers:
            raise FmsimError(
                f"policy lsa: scope per_layer needs the trace's CSA layers, {numbers}, not"
                f" {self.layers}"
            )
        self.rows = [given.index(layer) for layer in self.layers]  # of the lookahead state
        self.config = loaded.config
        parts = [loaded.layers[layer] for layer in self.layers]
        # In float64, rounded to float32 at the end: so that libraries that sum in other orders rank
        # pages alike.
        self.weights = [
            LayerWeights(
                *(ctx.xp.asarray(part, dtype=ctx.xp.float64, device=ctx.device) for part in layer)
            )
            for layer in parts
        ]
        # scores of a state depend on these alone
        self._digest = digest(self.config, self.rows, parts)
        self.lowest_logit = scorer.logit(self.params.threshold or loaded.threshold or 0.5)
        if self.params.fill and self.params.threshold is None:
            self.floor = None
        else:
            self.floor = self.lowest_logit if self.params.page_rank == "max" else 1.0

    def target_layers(self) -> tuple[int, ...]:
        return tuple(self._layers_of(self._load()))

    def _load(self) -> Checkpoint:
        return checkpoint.load(self.params.checkpoint or self.default_checkpoint)

    def _layers_of(self, loaded: Checkpoint) -> list[int]:
        """The layers that are scored."""
        layers = list(self.params.layers or loaded.layers)
        absent = sorted(set(layers) - set(loaded.layers))
        if absent:
            raise FmsimError(
                f"policy lsa: layers: no retriever for CSA layers {absent}; the checkpoint has"
                f" {list(loaded.layers)}"
            )
        return layers

    @property
    def scores_apart(self) -> bool:
        """Each layer goes by its own scores alone."""
        return self.params.scope == "per_layer"

    @property
    def state_steps(self) -> int:
        return self.params.cadence

    @property
    def decides_ahead(self) -> bool:
        return self.params.stale

    def pins(self) -> Pins:
        pages = self.ctx.pages
        return Pins(
            sink=pages(self.params.sink_entries),
            recent=pages(self.params.recent_entries),
            decoded=True,
        )

    def _logits(self, state: LookaheadState) -> Array:
        """float32 [G or 1, n entries] of a state, once for all policies that share it."""
        if self._digest not in state.known:
            scored = self._scored_by(state)
            state.known[self._digest] = self.ctx.xp.astype(scored, self.ctx.xp.float32)
        found = state.known[self._digest]
        return found if self.scores_apart else scorer.combine(found, self.params.combine)[None]

    def _scored_by(self, state: LookaheadState) -> Array:
        """float64 [layers scored, n entries]."""
        xp = self.ctx.xp
        hidden, keys = (
            [xp.astype(array[row], xp.float64) for row in self.rows]
            for array in (state.hidden, state.keys)
        )
        return scorer.layer_logits(self.weights, self.config, hidden, state.position, keys)

    def score(self, step: int) -> Array:
        state, xp = self._state(step), self.ctx.xp
        logits = self._logits(state)
        pages = self.ctx.pages(state.n_entries)
        missing = pages * self.ctx.granularity - state.n_entries
        padding = xp.full(
            (logits.shape[0], missing), -np.inf, dtype=logits.dtype, device=self.ctx.device
        )
        in_pages = xp.reshape(
            xp.concat((logits, padding), axis=1), (logits.shape[0], pages, self.ctx.granularity)
        )
        best = xp.max(in_pages, axis=2)
        nothing = xp.asarray(-np.inf, dtype=best.dtype, device=self.ctx.device)
        self._highest[step] = xp.max(best) if pages else nothing  # a prompt that closed no entry
        self._scored[step] = state.n_entries * len(self.layers)
        if self.params.page_rank == "max":
            return best
        above = xp.sum(xp.astype(in_pages >= self.lowest_logit, best.dtype), axis=2)
        return above + scorer.sigmoid(best) * 0.5  # pages with as many go by their best entry

    def decide(self, step: int) -> None:
        super().decide(step)
        self.confidence = self._highest.get(
            step
        )  # that there is anything to recall at all: a signal to weigh against misses

    def scored_entries(self, step: int) -> int:
        return (
            self._scored[step]
            if step in self._scored
            else self._state(step).n_entries * len(self.layers)
        )  # of a subclass with scores of its own

    def _state(self, step: int) -> LookaheadState:
        """The newest state known when the set from `step` on is chosen.

        A stale one is known one cadence earlier; the first set has none older than its own.
        """
        assert self.ctx.newest_state is not None  # reset has refused to start without
        known = max(step - self.params.cadence, 0) if self.params.stale else step
        return self.ctx.newest_state(known)

"""The policy interface: a policy is a priority over pages.

Axes used throughout: G groups (the trace's CSA layers, or 1 when they share), P pages of the whole
run (a page is `granularity` consecutive entries), n any number of pages asked about. A page id of
-1 is padding.

A policy keeps tables of shape [G, P + 1]; the last column is the sink that padding reads and
writes, since -1 is also its index. So `ctx.read(table, pages)` and `ctx.put` never need a mask.
Everything a policy computes stays in array programs over `ctx.xp` (numpy in the replay, torch in
the engine) without Python branches on array values: that is what makes both take the same
decisions, slot for slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmsim.errors import FmsimError, shown
from fmsim.policies.budget import Budget
from fmsim.policies.handed import Array as Array
from fmsim.policies.handed import Context as Context
from fmsim.policies.handed import Future as Future
from fmsim.policies.handed import LookaheadState as LookaheadState
from fmsim.policies.handed import Observation as Observation
from fmsim.policies.handed import Residents as Residents

Action = Literal["visibility_only", "evict", "hierarchical"]
Evidence = Literal[
    "position", "kv_derived", "current_query", "attention_history", "predicted_future", "future"
]
DecisionScope = Literal["request", "step", "layer"]


class PolicyParams(BaseModel):
    """The switches every policy has.

    A policy's own `Params` adds to them and changes their defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    budget: Budget = Field(
        Budget(2, "topk"),
        description=(
            "all that a request takes on the GPU: '12.5% gpu' of the full cache, '0.25 GiB gpu'; or"
            " entries: '12 GiB', '4096 entries', '10%' of the prompt, '2x topk'"
        ),
    )
    cadence: int = Field(
        1,
        ge=1,
        description=(
            "steps between decisions over all pages; 1 = reactive: pages come in only by a write or"
            " a miss"
        ),
    )
    scope: Literal["per_layer", "shared"] = Field(
        "per_layer", description="each CSA layer its own resident set, or one set for all"
    )
    granularity: Literal[1, 4, 16, 64] = Field(1, description="entries in a slot")
    on_miss: Literal["fetch", "mask", "fallback"] = Field(
        "fetch", description="stall and load; attend without; or load the heavy, mask the rest"
    )
    sees: Literal["resident", "all"] = Field(
        "resident",
        description="on_miss mask: what the policy is shown of a step, resident entries alone, or"
        " all that was selected, for which all index keys stay on the GPU",
    )
    fallback_above: float = Field(
        0.05,
        gt=0,
        le=1,
        description="on_miss fallback: fetch a page that has a larger share of the step's mass",
    )
    fallback_below: float = Field(
        0.0,
        ge=0,
        le=1,
        description="on_miss fallback: fetch until this share of the selected entries is resident",
    )


class DemandParams(PolicyParams):
    """The switches of a policy that says what to evict, and nothing of what to bring in."""

    cadence: Literal[1] = Field(1, description="pages come in by a write or a miss")
    on_miss: Literal["fetch", "fallback"] = Field(
        "fetch", description="stall and load; or load the heavy, mask the rest"
    )


@dataclass(frozen=True)
class Pins:
    """Pages that are never evicted while they are resident, and always chosen at a decision.

    All in pages.
    """

    sink: int = 0  # the first pages of the prompt
    recent: int = 0  # the newest visible pages
    decoded: bool = False  # every page that holds an entry closed during decode

    def most(self, n_pages: int, prompt_pages: int) -> int:
        """The most that are pinned at once, of a run with `n_pages` at its end; at least the page
        that is being filled. `prompt_pages` are those that the prompt fills whole.
        """
        decoded = n_pages - prompt_pages if self.decoded else 0
        return min(n_pages, self.sink + max(self.recent, decoded, 1))


class Policy:
    """A priority over pages.

    Subclasses set the declarations, may extend `Params`, and define `worth`.

    The residency manager keeps the S pages of highest worth (S slots a group). With cadence 1 it
    asks only for pages that are resident, to find victims for what a miss or a newly closed page
    brings in. With a longer cadence it also asks, at every decision, for all visible pages, and
    recalls the best.
    """

    name: ClassVar[str]
    action: ClassVar[Action]
    evidence: ClassVar[Evidence]
    decision_scope: ClassVar[DecisionScope]

    class Params(PolicyParams):
        pass

    # it means nothing without attention masses; a trace that has none is refused
    needs_mass: ClassVar[bool] = False
    # It keeps three rules: no row of its tables depends on another row, nor (`pins` aside) on a
    # length in `ctx`; what it learns stays in arrays that it changes in place; it calculates with
    # `step`, and never branches on it. So an engine may stack the groups of many requests, and hold
    # `observe` and `worth` in a CUDA graph, with `step` an array of one number. Not inherited: a
    # subclass says it anew.
    by_row: ClassVar[bool] = False
    # It keeps the first of these rules, but a row may depend on its slots: an engine may stack the
    # groups of many requests. Not inherited either.
    rows_apart: ClassVar[bool] = False
    floor: float | None = (
        None  # a page of lower worth is not kept at a decision, even where there is room
    )

    def __init__(self, params: PolicyParams | None = None, **kwargs: Any) -> None:
        try:
            self.params = params if params is not None else self.Params(**kwargs)
        except ValidationError as error:
            raise FmsimError(f"policy {self.name}: {describe(error)}") from None

    @property
    def observes(self) -> bool:
        """The policy learns from what a step selects."""
        return type(self).observe is not Policy.observe

    @property
    def watches(self) -> bool:
        """The policy follows what moves."""
        return type(self).moved is not Policy.moved

    @property
    def prefetches(self) -> bool:
        """The policy asks for pages before they are missed, between decisions."""
        return type(self).prefetch is not Policy.prefetch

    @property
    def decides_ahead(self) -> bool:
        """A decision needs nothing that is not known one cadence before it, so that an engine can
        recall in the meantime. A policy that says so defines `ahead`.
        """
        return False

    @property
    def state_steps(self) -> int | None:
        """Steps between the states that the policy asks `ctx.newest_state` for; None: tau. An
        engine keeps the last two of them beside those of every tau; a trace has those of every tau
        alone.
        """
        return None

    def n_slots(self, n_pages: int, **sizes: Any) -> int:
        """Slots in each group, at most one a page; `sizes` are the arguments of
        `Budget.entries`.
        """
        return min(n_pages, self.params.budget.slots(self.params.granularity, **sizes))

    def layer_shares(self, n_layers: int) -> Sequence[float] | None:
        """How the budget is shared over the trace's layers, one number each: twice the number,
        twice the slots. None: evenly.

        Only with scope per_layer, and asked before the run starts. Every layer first gets what
        `pins` may need, and the rest is shared; so `reset` and `pins` are called once more, before
        the run, and the answer of `pins` must not depend on `ctx.n_slots`.
        """
        return None

    def reset(self, ctx: Context) -> None:
        """Start a run: make tables. Overriding methods call this first."""
        self.ctx = ctx

    def pins(self) -> Pins:
        """What must not be evicted; asked once after reset."""
        return Pins()

    def observe(self, step: int, obs: Observation) -> None:
        """Learn from one step's accesses."""

    def wrote(self, step: int, pages: Array) -> None:
        """Learn that `pages` int32 [G, n] closed at this step and were written to the GPU."""

    def moved(self, step: int, loaded: Array, evicted: Array) -> None:
        """Learn that the resident set changed: pages int64 [G, n] that got a slot, and pages [G, m]
        that lost theirs; -1 = padding. What made way for a write, a prefetch or a miss comes in the
        order of eviction, least worth first.

        Called after every change: by a write, a decision, a prefetch or a miss; and for what the
        prefill leaves, with step 0. Both have one column at least. Where nothing moved it may be
        called too, with padding alone. What passes through within a step is in neither.
        """

    def prefetch(self, step: int) -> Array | None:
        """Pages to load before this step's accesses: int [G, n], unique in a row, -1 = padding.

        Asked at every step, with cadence 1 only. What is resident already is left out, and so are
        pages that nothing was written to yet. A page gets its slot as a missed one does.
        """
        return None

    def decide(self, step: int) -> None:
        """Called at reset time (step 0) and at every decision before `worth` is asked for all
        visible pages.
        """

    def worth(self, step: int, pages: Array) -> Array:
        """How much each of `pages` int32 [G, n] is worth keeping: float32 [G, n], or int64 in [0,
        2**37) for exact order.

        Never NaN, not for padding (-1) either. Ties keep the higher page id.
        """
        raise NotImplementedError  # abstract: every policy defines it

    def worth_of_first(self, step: int, n: int) -> Array:
        """`worth` of pages 0 to n - 1, [G, n].

        Override only where a slice of a table is cheaper.
        """
        pages = self.ctx.xp.arange(n, dtype=self.ctx.xp.int32, device=self.ctx.device)
        return self.worth(step, self.ctx.xp.broadcast_to(pages[None, :], (self.ctx.n_groups, n)))

    def ahead(self, step: int, n: int) -> Array:
        """What `worth_of_first` will be at the decision at the later `step`, [G, n]."""
        raise NotImplementedError  # abstract: every policy that decides ahead defines it

    def target_layers(self) -> tuple[int, ...]:
        """The model's CSA layers, from 0, whose index keys a memory indexer scores at decisions.

        An engine asks before `reset`.
        """
        return ()

    def scored_entries(self, step: int) -> int:
        """Entries that a memory indexer scored at this step's decision, summed over its layers.

        For the cost model.
        """
        return 0


class LookaheadPolicy(Policy):
    """A policy that scores all visible pages at each decision, and holds the scores until the next.

    Subclasses define `score`. A page younger than its scores outranks every scored one until the
    next decision.
    """

    def reset(self, ctx: Context) -> None:
        super().reset(ctx)
        self.scores = ctx.table(float("inf"))
        self._prepared: dict[int, Array] = {}  # steps, and their scores

    def score(self, step: int) -> Array:
        """float32 [G, n] for the first n pages: the worth of each in the window that starts at
        `step`.
        """
        raise NotImplementedError  # abstract: every lookahead policy defines it

    def prepare(self, steps: Iterable[int]) -> None:
        """Score the decisions at `steps` now: for whom their times would otherwise count."""
        self._prepared |= {step: self.score(step) for step in steps}

    def decide(self, step: int) -> None:
        scores = self._prepare(step)
        self.scores[:, : scores.shape[1]] = scores

    def ahead(self, step: int, n: int) -> Array:
        """What `worth_of_first` will be at the decision at the later `step`, [G, n]; +inf for pages
        that are younger than its scores.
        """
        scores = self._prepare(step)
        worth = self.ctx.table(float("inf"))[:, :n]
        worth[:, : scores.shape[1]] = scores[:, :n]
        return worth

    def _prepare(self, step: int) -> Array:
        """The scores for `step`, computed once."""
        if step not in self._prepared:
            self._prepared = {step: self.score(step)}
        return self._prepared[step]

    def worth(self, step: int, pages: Array) -> Array:
        return self.ctx.read(self.scores, pages)

    def worth_of_first(self, step: int, n: int) -> Array:
        return self.scores[:, :n]


def describe(error: ValidationError) -> str:
    """A pydantic error in one line: which key, and what is wrong with it."""
    return "; ".join(
        f"{shown('.'.join(map(str, item['loc']))) or 'parameters'}:"
        f" {shown(item['msg'].removeprefix('Value error, '))}"
        for item in error.errors()[:5]
    )

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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmsim import arrays
from fmsim.errors import FmsimError, shown
from fmsim.policies.budget import Budget

Array = Any  # a numpy or torch array; the array API has no common type

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


@dataclass(frozen=True)
class LookaheadState:
    """What a lookahead policy may score for window w: nothing in it is younger than the window's
    start.
    """

    hidden: Array  # [L, H] float32: the CSA layers' attention input at `position`
    position: int  # absolute position of the last token before the window
    # [L, n_entries, D] float32: index keys of the entries visible at `position`; in an engine
    # perhaps by `keys[target layer]` only
    keys: Array
    n_entries: int  # visible at `position`


class Future(Protocol):
    """What is to come; handed only to policies whose evidence is "future"."""

    def window(self, step: int, horizon: int) -> tuple[Array, Array]:
        """Over the steps [step, step + horizon): (mass float32 [G, P] summed, used bool [G, P])."""

    def first_use(self) -> Array:
        """int32 [G, P]: the first step that uses each page, or `never`."""

    def next_use(self, step: int) -> Array:
        """int32 [G, n], beside `Observation.pages` of this step: the next later step that uses the
        page, or `never`.
        """

    never: int  # later than any step


class Residents(Protocol):
    """What is resident now: a view that changes as pages move."""

    def has(self, pages: Array) -> Array:
        """bool [G, n]: which of `pages` int [G, n] are resident; False for padding (-1)."""

    @property
    def pages(self) -> Array:
        """int32 [G, S]: the page in each slot, -1 where a slot is empty, and beyond the slots that
        the group has (`Context.group_slots`). Not to be written to.
        """


@dataclass(frozen=True)
class Context:
    """What a policy knows at reset, before the first decode step.

    Counts are of the trace's layers and entries.
    """

    n_layers: int  # CSA layers of the trace
    n_groups: int  # G: n_layers, or 1 with scope shared
    n_pages: int  # P: all pages there will be at the end of the run
    n_slots: int  # S: slots in each group, from the budget; the most of any group
    granularity: int  # entries in a page
    prompt_entries: int  # that the prompt leaves
    topk: int  # entries that a layer selects in a step
    n_steps: int  # T; the engine passes the most it will decode
    tau: int = 64  # steps in a window of `lookahead`
    entry_tokens: int = 4  # tokens of the text in an entry (the CSA rate)
    csa_numbers: tuple[
        int, ...
    ] = ()  # which of the model's CSA layers the n_layers are, from 0; the first ones if empty
    seed: int = 0  # of all that a policy draws
    # slots of each group, where a policy shares its budget unevenly; else n_slots each
    group_slots: tuple[int, ...] = ()
    prompt_mass: Array | None = (
        None  # [G, P] float32: attention mass of the prompt's queries on each page
    )
    lookahead: Callable[[int], LookaheadState] | None = None  # window -> state
    # step -> the newest state that is known when the step begins, of a step that the trace has
    # (every tau) or that the engine keeps (every tau, and every `Policy.state_steps`)
    newest_state: Callable[[int], LookaheadState] | None = None
    future: Future | None = None  # for evidence "future" alone
    # what is resident now; given by every cache manager, a context made by hand may lack it
    residents: Residents = None  # type: ignore[assignment]
    xp: Any = None  # array namespace; numpy unless given
    device: Any = None  # of the arrays; None is the namespace's own
    _start: Array = field(
        init=False, repr=False, default=None
    )  # [G, 1] where each row of a table starts

    def __post_init__(self) -> None:
        if self.xp is None:
            import array_api_compat.numpy as numpy_namespace

            object.__setattr__(self, "xp", numpy_namespace)
        if not self.group_slots:
            object.__setattr__(self, "group_slots", (self.n_slots,) * self.n_groups)
        if self.newest_state is None and self.lookahead is not None:
            of_window, tau = self.lookahead, self.tau
            object.__setattr__(self, "newest_state", lambda step: of_window(step // tau))
        start = self.xp.arange(self.n_groups, dtype=self.xp.int64, device=self.device)[:, None] * (
            self.n_pages + 1
        )
        object.__setattr__(self, "_start", start)

    def pages(self, entries: int) -> int:
        """The number of pages that `entries` entries fill, rounded up."""
        return -(-entries // self.granularity)

    def table(self, value: float = 0, dtype: str = "float32") -> Array:
        """A [G, P + 1] table filled with `value`; its last column is the sink of padding."""
        shape = (self.n_groups, self.n_pages + 1)
        return self.xp.full(shape, value, dtype=getattr(self.xp, dtype), device=self.device)

    def read(self, table: Array, pages: Array) -> Array:
        """table[g, pages[g, i]] as [G, n]; page -1 reads the sink. `table` is one of `table`'s
        shape.
        """
        self._check(table)
        return arrays.read(table, self._start, pages)

    def put(self, table: Array, pages: Array, values: Array | float) -> None:
        """table[g, pages[g, i]] = values[g, i] in place; page -1 writes the sink.

        Pages are unique in a row, padding aside. `values` may be a number.
        """
        self._check(table)
        arrays.put(table, self._start, pages, values)

    def _check(self, table: Array) -> None:
        """Another width would read another row's pages in silence."""
        if table.shape != (self.n_groups, self.n_pages + 1):
            raise FmsimError(
                f"ctx.read and ctx.put take a table as ctx.table makes it,"
                f" [{self.n_groups}, {self.n_pages + 1}]; this one is {list(table.shape)}"
            )


@dataclass(frozen=True)
class Observation:
    """One step's use of pages, after misses were dealt with.

    All arrays [G, n]; pages unique in a row, -1 = padding.

    Where all index keys stay on the GPU, `pages` are all that the native indexer selected. Where a
    policy masks and `sees` residents alone, they are those of the resident pages. `mass` is seen
    only where the page was attended to, so it is 0 for a masked page.
    """

    pages: Array  # int32
    count: Array  # int32: entries selected in the page (over all layers where they share)
    mass: Array  # float32: attention mass on them
    hit: Array  # bool: resident when the step began
    fetched: Array  # bool: loaded for this step


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

    needs_mass: ClassVar[bool] = False  # it means nothing without attention masses
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
        prefill leaves, with step 0.
        """

    def prefetch(self, step: int) -> Array | None:
        """Pages to load before this step's accesses: int [G, n], unique in a row, -1 = padding.

        Asked at every step, with cadence 1 only. What is resident already is left out, and a page
        gets its slot as a missed one does.
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

"""What a policy is handed: the context, observations, what is resident, what may be scored.

Axes as in `fmsim.policies.base`: G groups, P pages of the whole run, S slots, n pages asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fmsim import arrays
from fmsim.errors import FmsimError

Array = Any  # a numpy or torch array; the array API has no common type


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
    # numbers, among the model's CSA layers, of the rows of `hidden` and `keys`, where these are not
    # all of `Context.csa_numbers`
    csa_numbers: tuple[int, ...] = ()
    # what was worked out from this state alone, by what it depends on: in a replay several policies
    # are handed one state, and score it alike
    known: dict[Any, Array] = field(default_factory=dict, repr=False, compare=False)


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
    # [G, P] float32: attention mass of the prompt's last queries on each page; None where the trace
    # has none
    prompt_mass: Array | None = None
    lookahead: Callable[[int], LookaheadState] | None = None  # window -> state
    # step -> the newest state that is known when the step begins, of a step that the trace has
    # (every tau) or that the engine keeps (every tau, and every `Policy.state_steps`)
    newest_state: Callable[[int], LookaheadState] | None = None
    future: Future | None = None  # for evidence "future" alone
    # what is resident now; given by every cache manager, a context made by hand may lack it
    residents: Residents = None  # type: ignore[assignment]
    # array namespace: numpy, or torch in an engine, both with the names of the array API standard
    # (array_api_compat)
    xp: Any = None
    # of the arrays; what a policy makes itself takes it too: `xp.arange(n, device=ctx.device)`
    device: Any = None
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
        """A [G, P + 1] table filled with `value`; its last column is the sink of padding.

        `dtype` is a name: "float32", "int64", "bool".
        """
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

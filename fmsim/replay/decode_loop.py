"""The order of a decode step. It stands here and nowhere else.

A step, for each request of a batch:

1. Entries that closed are written: a page that begins gets a slot.
2. At a decision the resident set is chosen anew, and what it lacks is recalled. What the *next*
   decision will recall is said now, or where there are many requests at a step of each one's own
   after it, where the policy knows it, so that it can come in the meantime. A policy without
   decisions may prefetch pages instead.
3. The native indexer selects. Misses are loaded as `on_miss` says.
4. The policy sees the step. What was fetched gets a slot.

What varies is plugged in. An access source says what is selected: a trace, or a model's indexer.
Tiers carry out the moves: nothing does in a replay, a tiered cache does in an engine. A clock
tells the time: nothing does in a replay, device events do in an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from fmsim.replay.cache_manager import Served
from fmsim.replay.ledger_builder import LedgerBuilder
from fmsim.replay.residency import Moves

Array = Any


class AccessSource(Protocol):
    """What the native indexers of a batch select."""

    def n_entries(self, request: int, step: int) -> int:
        """Entries that are visible to a request in a step; also of the decision to come."""

    def serve(self, step: int) -> Sequence[Served | None]:
        """Let every request select, and load its misses as its `on_miss` says.

        None for a request whose selection changes nothing, and that nobody looks at.
        """


class Tiers(Protocol):
    """What moves the bytes of a batch. Pages and slots are those of `Moves`, int64 [G, m]."""

    def ahead_pages(self, request: int) -> int:
        """Pages of each group that can be recalled ahead of a decision."""

    def wrote(self, request: int, moves: Moves) -> None:
        """Pages began at this step. The entries themselves come from the GPU."""

    def recall(self, request: int, moves: Moves) -> None:
        """A decision's pages come into their slots, before anything attends to them."""

    def recall_ahead(self, request: int, pages: Array, part: int) -> None:
        """Begin to load what the next decision will recall: int64 [G, m], -1 = padding; of the
        `part` of the request that it is (`CacheManager.parts`).
        """

    def decided(self) -> None:
        """Every request has written and decided: the model comes next."""

    def settle(self, request: int, moves: Moves) -> None:
        """What the step fetched gets slots."""

    def moved_bytes(self) -> Any:
        """Bytes moved from the host so far, all requests together."""


class LoopClock(Protocol):
    """What tells the time of a step."""

    def step(self, moved: Callable[[], Any]) -> AbstractContextManager[None]:
        """Around a step; `moved` tells the bytes moved so far."""

    def recall(self) -> AbstractContextManager[None]:
        """Within a step, around its first two parts."""


class NoTiers:
    """Tiers of a replay: nothing moves."""

    def ahead_pages(self, request: int) -> int:
        return 0

    def wrote(self, request: int, moves: Moves) -> None:
        pass

    def recall(self, request: int, moves: Moves) -> None:
        pass

    def recall_ahead(self, request: int, pages: Array, part: int) -> None:
        pass

    def decided(self) -> None:
        pass

    def settle(self, request: int, moves: Moves) -> None:
        pass

    def moved_bytes(self) -> int:
        return 0


class NoClock:
    """Clock of a replay: time stands still."""

    def step(self, moved: Callable[[], Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def recall(self) -> AbstractContextManager[None]:
        return nullcontext()


class DecodeLoop:
    """A batch of requests. `books[r]` counts what request r moves, and has its cache manager. Many
    that one manager keeps are one request here, of as many `CacheManager.parts`.

    `step` is the step that comes next.
    """

    def __init__(
        self,
        books: Sequence[LedgerBuilder],
        source: AccessSource,
        tiers: Tiers | None = None,
        clock: LoopClock | None = None,
    ) -> None:
        self.books = list(books)
        self.source = source
        self.tiers = NoTiers() if tiers is None else tiers
        self.clock = NoClock() if clock is None else clock
        self.step = 0

    def advance(self) -> None:
        """Decode one step."""
        step = self.step
        with self.clock.step(self.tiers.moved_bytes):
            with self.clock.recall():
                for request in range(len(self.books)):
                    self._write(request, step)
                    self._decide(request, step)
                self.tiers.decided()
            for request, served in enumerate(self.source.serve(step)):
                if served is not None:
                    self._settle(request, step, served)
        self.step += 1

    def _write(self, request: int, step: int) -> None:
        """Entries that closed: new pages get slots."""
        written = self.books[request].manager.write(step, self.source.n_entries(request, step))
        if written is not None:
            self.books[request].moved(step, "written", written)
            self.tiers.wrote(request, written)

    def _decide(self, request: int, step: int) -> None:
        """At a decision: recall what it lacks, and begin with what the next one will.

        The set of the first step is what the prefill left.
        """
        book = self.books[request]
        manager = book.manager
        cadence = manager.policy.params.cadence
        decides = cadence > 1 and step % cadence == 0
        if decides and step:
            recalled = manager.decide(step)
            book.moved(step, "lookahead_loads", recalled)
            self.tiers.recall(request, recalled)
        prefetches = cadence == 1 and manager.policy.prefetches
        if prefetches:
            self._prefetch(request, step)
        if decides or prefetches or step == 0:
            book.score(step)
        for part in range(manager.parts if cadence > 1 else 0):
            if step % cadence == self._later(request, part):
                self._foresee(request, part, step - step % cadence + cadence)
        if step and step % manager.ctx.tau == 0:
            book.window_began(step)

    def _later(self, request: int, part: int) -> int:
        """Steps after a decision at which the next one is foreseen: many requests take turns, so
        that no step does it for all. The states that they go by are still kept.
        """
        parts = [book.manager.parts for book in self.books]
        if sum(parts) == 1:
            return 0
        manager = self.books[request].manager
        spacing = manager.policy.state_steps or manager.ctx.tau
        turns = min(manager.policy.params.cadence, spacing) - 1
        return min(turns, 1 + (sum(parts[:request]) + part) * turns // sum(parts))

    def _prefetch(self, request: int, step: int) -> None:
        """What the policy asks for between decisions comes in before the step's accesses."""
        moves = self.books[request].manager.prefetch(step)
        if moves is not None:
            self.books[request].moved(step, "lookahead_loads", moves)
            self.tiers.recall(request, moves)

    def _foresee(self, request: int, part: int, decision: int) -> None:
        """Begin to recall for the decision at the later step `decision`."""
        manager = self.books[request].manager
        most = self.tiers.ahead_pages(request)
        if not most or decision >= manager.ctx.n_steps:
            return
        n_entries = self.source.n_entries(request, decision)
        pages = manager.foresee(decision, n_entries, most, part)
        if pages is not None:
            self.tiers.recall_ahead(request, pages, part)

    def _settle(self, request: int, step: int, served: Served) -> None:
        """The policy sees what was selected; what was fetched gets slots."""
        moves = self.books[request].manager.settle(step, served)
        if moves is not None:
            self.books[request].moved(step, "demand_loads", moves)
            self.tiers.settle(request, moves)

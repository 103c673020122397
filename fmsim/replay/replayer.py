"""Replay a trace against a policy: what moves, what is kept.

It runs no clock, so its ledger is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fmsim.policies.base import Context, LookaheadState, Policy
from fmsim.policies.guard import Guarded
from fmsim.replay import paging
from fmsim.replay.cache_manager import Accesses, Keeper
from fmsim.replay.ledger import Ledger
from fmsim.replay.tally import Tally

ENTRY_TOKENS = 4  # the CSA rate: entry i is visible from position 4 * i + 3


class Replayer:
    """One trace, read once and replayed against any number of policies.

    entry_bytes and model_layers (KV bytes of one entry in one CSA layer, and the layers that share
    the GPU) turn a budget in bytes into slots; they default to V4-Flash's 584 B and the trace's own
    layers. `cold` starts with nothing resident, as a cache benchmark does; otherwise the prefill
    leaves what the policy chooses at step 0. Only the first `max_steps` are replayed.
    """

    def __init__(
        self,
        trace: Any,
        *,
        entry_bytes: float = 584,
        model_layers: int | None = None,
        cold: bool = False,
        max_steps: int | None = None,
    ) -> None:
        self.trace, self.header, self.cold = trace, trace.header, cold
        self.ids, self.mass = (part[:max_steps] for part in paging.read_trace(trace))
        self.n_steps, self.n_layers, self.topk = self.ids.shape
        self.entries = [int(trace.n_entries(step)) for step in range(self.n_steps)]
        self.prompt_entries = self.header.prompt_tokens // ENTRY_TOKENS
        self.entry_bytes, self.model_layers = entry_bytes, model_layers or self.n_layers
        self.valid = self.ids >= 0
        self.golden = self.valid if trace.holds_labels else paging.golden_mask(self.ids, self.mass)
        self._paged: dict[tuple[int, bool], paging.Paged] = {}
        self.has_lookahead = (
            trace.hidden is not None and trace.index_keys is not None
        )  # dense models have none
        self._keys: np.ndarray | None = None

    def run(self, policy: Policy, watch: Callable[[Keeper], None] = lambda keeper: None) -> Ledger:
        """Replay one policy; `watch` sees the keeper at the end of each step.

        Raises FmsimError, naming policy and step, where the policy misbehaves.
        """
        paged = self.paged(policy.params.granularity, policy.params.scope == "shared")
        guarded = Guarded(policy)
        ctx = self.context(policy, paged)
        keeper = Keeper(guarded, ctx)
        if not self.cold:
            keeper.start()
        return Run(self, paged, keeper).ledger(watch)

    def paged(self, granularity: int, shared: bool) -> paging.Paged:
        """The trace by pages; kept for the next policy of the same granularity and scope."""
        key = (granularity, shared)
        if key not in self._paged:
            n_pages = -(-max(self.entries[-1], self.prompt_entries) // granularity)
            self._paged[key] = paging.page_trace(self.ids, self.mass, granularity, shared, n_pages)
        return self._paged[key]

    def context(self, policy: Policy, paged: paging.Paged) -> Context:
        """What `policy` may know before the first step."""
        params = policy.params
        sizes = {
            "prompt_entries": self.prompt_entries,
            "topk": self.topk,
            "entry_bytes": self.entry_bytes,
            "model_layers": self.model_layers,
        }
        return Context(
            n_layers=self.n_layers,
            n_groups=paged.pages.shape[1],
            n_pages=paged.n_pages,
            n_slots=policy.n_slots(paged.n_pages, **sizes),
            granularity=params.granularity,
            prompt_entries=self.prompt_entries,
            topk=self.topk,
            csa_numbers=tuple(self.trace.csa_numbers),
            n_steps=self.n_steps,
            tau=self.header.tau,
            seed=self.header.seed,
            prompt_mass=self._prompt_mass(params.granularity, paged),
            lookahead=self._lookahead if self.has_lookahead else None,
            future=paging.PagedFuture(paged) if policy.evidence == "future" else None,
        )

    def _prompt_mass(self, granularity: int, paged: paging.Paged) -> np.ndarray | None:
        """[G, P] float32, or None where the trace has none."""
        if self.trace.prompt_mass is None:
            return None
        return paging.page_mass(
            self.trace.prompt_mass, granularity, paged.n_pages, paged.pages.shape[1] < self.n_layers
        )

    def _lookahead(self, window: int) -> LookaheadState:
        """The state at the last token before decode window `window`; index keys are decoded once,
        on first use.
        """
        if self._keys is None:
            self._keys = self.trace.keys(self.entries[-1])
        position = self.header.prompt_tokens + self.header.tau * window - 1
        n_entries = (position + 1) // ENTRY_TOKENS
        return LookaheadState(
            np.asarray(self.trace.hidden[window], dtype=np.float32),
            position,
            self._keys[:, :n_entries],
            n_entries,
        )


class Run:
    """One policy's way through the trace."""

    def __init__(self, source: Replayer, paged: paging.Paged, keeper: Keeper) -> None:
        self.source, self.paged, self.tally = source, paged, Tally(keeper, source.n_steps)
        self.hit = np.zeros(paged.pages.shape, dtype=bool)
        self.attended = np.zeros(paged.pages.shape, dtype=bool)

    def ledger(self, watch: Callable[[Keeper], None]) -> Ledger:
        """Run all steps."""
        source, paged = self.source, self.paged
        for step in range(source.n_steps):
            self.tally.begin(step, source.entries[step])
            outcome = self.tally.access(
                step, Accesses(paged.pages[step], paged.count[step], paged.mass[step])
            )
            self.hit[step] = outcome.hit
            self.attended[step] = outcome.hit | outcome.fetched
            watch(self.tally.keeper)
        hit, attended = (
            paged.by_entry(flag, source.n_layers) for flag in (self.hit, self.attended)
        )
        return self.tally.ledger(source.ids, source.mass, hit, attended, source.golden)


def replay(trace: Any, policy: Policy, **options: Any) -> Ledger:
    """Replay one policy against `trace`; `options` are Replayer's.

    Make one Replayer for several policies of a trace.
    """
    return Replayer(trace, **options).run(policy)


def context_in(ctx: Context, xp: Any, device: Any = None) -> Context:
    """The same context with the arrays of another library, on `device`: for an engine that is
    driven by a trace.
    """

    def there(array: Any) -> Any:
        return xp.asarray(np.array(array), device=device)

    def lookahead(window: int) -> LookaheadState:
        state = ctx.lookahead(window)
        return replace(state, hidden=there(state.hidden), keys=there(state.keys))

    return replace(
        ctx,
        xp=xp,
        device=device,
        prompt_mass=None if ctx.prompt_mass is None else there(ctx.prompt_mass),
        lookahead=None if ctx.lookahead is None else lookahead,
        future=None if ctx.future is None else _FutureIn(ctx.future, there),
    )


class _FutureIn:
    """A `Future` whose arrays are another library's."""

    def __init__(self, future: Any, there: Callable[[Any], Any]) -> None:
        self.future, self.there, self.never = future, there, future.never

    def window(self, step: int, horizon: int) -> tuple[Any, Any]:
        mass, used = self.future.window(step, horizon)
        return self.there(mass), self.there(used)

    def first_use(self) -> Any:
        return self.there(self.future.first_use())

    def next_use(self, step: int) -> Any:
        return self.there(self.future.next_use(step))

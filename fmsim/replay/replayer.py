"""Replay a trace against a policy: what moves, what is kept.

It runs no clock, so its ledger is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.policies.base import LookaheadState, Policy
from fmsim.policies.guard import Guarded
from fmsim.replay import paging
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.context import RequestShape, build_context
from fmsim.replay.decode_loop import DecodeLoop
from fmsim.replay.golden import golden_mask
from fmsim.replay.ledger import Ledger
from fmsim.replay.needs import GpuMemory
from fmsim.replay.trace_source import TraceSource


class Replayer:
    """One trace, read once and replayed against any number of policies.

    `memory` is the decoding model's (`fmsim.sim.footprint.ModelMemory`): it says what a budget in
    bytes buys. Without one, bytes are V4's in the trace's own layers. `cold` starts with nothing
    resident, as a cache benchmark does; otherwise the prefill leaves what the policy chooses at
    step 0. Only the first `max_steps` are replayed, and of the trace's layers only `layers`,
    ascending from 0; a lookahead policy is still shown all layers that have index keys.
    """

    def __init__(
        self,
        trace: Any,
        *,
        memory: GpuMemory | None = None,
        cold: bool = False,
        max_steps: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.trace = trace
        self.header = trace.header
        self.cold = cold
        self.has_mass = trace.mass is not None
        self._layers = slice(None) if layers is None else list(layers)
        self.ids, self.mass = (part[:max_steps, self._layers] for part in paging.read_trace(trace))
        self.n_steps, self.n_layers, self.topk = self.ids.shape
        self.entries = [int(trace.n_entries(step)) for step in range(self.n_steps)]
        self.golden = self.ids >= 0 if trace.holds_labels else golden_mask(self.ids, self.mass)
        self.shape = RequestShape(
            n_layers=self.n_layers,
            prompt_entries=self.header.prompt_tokens // self.header.entry_tokens,
            n_entries=self.entries[-1],
            topk=self.topk,
            n_steps=self.n_steps,
            entry_tokens=self.header.entry_tokens,
            tau=self.header.tau,
            memory=memory,
            csa_numbers=tuple(np.array(trace.csa_numbers)[self._layers].tolist()),
            seed=self.header.seed,
        )
        self._paged: dict[tuple[int, bool], paging.Paged] = {}
        # traces of dense models have neither
        self.has_lookahead = trace.hidden is not None and trace.index_keys is not None
        self._keyed = trace.keyed if self.has_lookahead else []
        self._keys: np.ndarray | None = None
        self._states: dict[int, LookaheadState] = {}  # by window, in numpy
        prompt_mass = trace.prompt_mass
        self.prompt_mass = None if prompt_mass is None else prompt_mass[self._layers]

    @property
    def prompt_entries(self) -> int:
        """Entries that the prompt leaves."""
        return self.shape.prompt_entries

    def run(
        self, policy: Policy, watch: Callable[[CacheManager], None] = lambda manager: None
    ) -> Ledger:
        """Replay one policy; `watch` sees the cache manager at the end of each step.

        Raises FmsimError, naming policy and step, where the policy misbehaves.
        """
        source = self.source(Guarded(policy, self.trace.csa_numbers))
        loop = DecodeLoop([source.book], source)
        for _ in range(self.n_steps):
            loop.advance()
            watch(source.manager)
        return source.ledger(self)

    def source(self, policy: Policy | Guarded, xp: Any = None, device: Any = None) -> TraceSource:
        """The trace's accesses under `policy`, in arrays of `xp` (numpy unless given) on `device`.

        Its cache manager is at the start of the decode.
        """
        params = policy.params
        self._check_masses(policy)
        paged = self.paged(params.granularity, params.scope == "shared")
        ctx = build_context(
            policy,
            self.shape,
            prompt_mass=self.prompt_mass,
            lookahead=self._lookahead_in(xp, device) if self.has_lookahead else None,
            future=paged if policy.evidence == "future" else None,
            xp=xp,
            device=device,
        )
        return TraceSource(paged, self.entries, CacheManager(policy, ctx, cold=self.cold))

    def _check_masses(self, policy: Policy | Guarded) -> None:
        """Refuse what ranks by attention mass where the trace has none."""
        if self.has_mass or not (policy.needs_mass or policy.params.on_miss == "fallback"):
            return
        what = "ranks by attention mass" if policy.needs_mass else "on_miss fallback asks for mass"
        raise FmsimError(
            f"policy {policy.name}: {what}, which this trace lacks: engines capture what was"
            " selected, not how much; leave it out (full, lru, lfu, recency and belady need none)"
        )

    def paged(self, granularity: int, shared: bool) -> paging.Paged:
        """The trace by pages; kept for the next policy of the same granularity and scope."""
        key = (granularity, shared)
        if key not in self._paged:
            n_pages = self.shape.n_pages(granularity)
            self._paged[key] = paging.page_trace(self.ids, self.mass, granularity, shared, n_pages)
        return self._paged[key]

    def _lookahead_in(self, xp: Any, device: Any) -> Callable[[int], LookaheadState]:
        """The state at the last token before a decode window, in arrays of `xp`.

        In numpy all policies are handed one object.
        """

        def there(array: np.ndarray) -> Any:
            return array if xp is None else xp.asarray(np.array(array), device=device)

        numbers = tuple(self.trace.csa_numbers[layer] for layer in self._keyed)

        def state(window: int) -> LookaheadState:
            hidden, position, keys = self._lookahead(window)
            return LookaheadState(there(hidden), position, there(keys), keys.shape[1], numbers)

        def kept(window: int) -> LookaheadState:
            if window not in self._states:
                self._states[window] = state(window)
            return self._states[window]

        return kept if xp is None else state

    def _lookahead(self, window: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Hidden states, position and index keys at a window's start; keys are decoded once."""
        if self._keys is None:
            self._keys = self.trace.keys(self.entries[-1])
        position = self.header.prompt_tokens + self.header.tau * window - 1
        n_entries = (position + 1) // self.header.entry_tokens
        hidden = np.asarray(self.trace.hidden[window], dtype=np.float32)[self._keyed]
        return hidden, position, self._keys[:, :n_entries]


def replay(trace: Any, policy: Policy, **options: Any) -> Ledger:
    """Replay one policy against `trace`; `options` are Replayer's.

    Make one Replayer for several policies of a trace.
    """
    return Replayer(trace, **options).run(policy)

"""One cache manager for many requests: their groups become rows of the same arrays.

What a batch decides then takes as many array operations as one request does, where one policy
serves all rows (`served_by_one`). Else each request keeps its own policy, and what is not the
policy's is done for all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from fmsim.policies.base import Policy
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.of_each import PolicyOfEach
from fmsim.replay.residency import Moves, Residency, ResidentView

Array = Any


def captured(policy: Policy) -> bool:
    """Whether a CUDA graph may hold what it does of a step; a subclass must say so anew."""
    claimed = type(policy).__dict__.get("by_row", False)
    return claimed and not (policy.watches or policy.prefetches or policy.decides_ahead)


def _policy_of(manager: CacheManager) -> Policy:
    policy = manager.policy
    assert isinstance(policy, Policy)  # an engine's, not a replay's guarded one
    return policy


def served_by_one(managers: Sequence[CacheManager]) -> bool:
    """Whether one policy may serve all rows of `managers`."""
    policy = _policy_of(managers[0])
    return captured(policy) or type(policy).__dict__.get("rows_apart", False)


class StackedManager(CacheManager):
    """Goes on from `managers`, one a request, of one kind of policy, at their first step.

    Request r's group g is row ``starts[r] + g``; `entries` int64 [T, R] are visible to each request
    in each step. Steps are numbers. Of a policy that can be `captured` they may be arrays of one
    number where nothing is written or decided, so that a CUDA graph holds what a step selects. The
    `managers` show their rows of it from now on.
    """

    def __init__(self, managers: Sequence[CacheManager], entries: np.ndarray) -> None:
        first = managers[0]
        groups = [manager.ctx.n_groups for manager in managers]
        self.starts = np.cumsum([0, *groups]).tolist()
        self.managers = list(managers)
        self.rows = [slice(*ends) for ends in pairwise(self.starts)]
        slots = [count for manager in managers for count in manager.ctx.group_slots]
        self.residency = Residency.stacked([manager.residency for manager in managers], slots)
        self.ctx = replace(
            first.ctx,
            n_groups=self.starts[-1],
            n_pages=self.residency.n_pages,
            n_slots=self.residency.n_slots,
            prompt_entries=max(manager.ctx.prompt_entries for manager in managers),
            group_slots=tuple(slots),
            prompt_mass=self._prompt_mass(managers),
            lookahead=None,
            newest_state=None,
            future=None,
            residents=ResidentView(self.residency),
        )
        self._look_at_rows()
        self._take_policies()
        self.needs = replace(
            first.needs,
            n_groups=self.ctx.n_groups,
            group_slots=self.ctx.group_slots,
            ahead_slots=tuple(count for manager in managers for count in manager.needs.ahead_slots),
            all_keys=all(manager.needs.all_keys for manager in managers),
            keeps_all=all(manager.needs.keeps_all for manager in managers),
            comes_back=any(manager.needs.comes_back for manager in managers),
        )
        self._entries = entries
        self._plan(managers, entries, groups)

    def _look_at_rows(self) -> None:
        for manager, rows in zip(self.managers, self.rows, strict=True):
            ctx = manager.ctx
            manager.residency = self.residency.of_rows(rows, ctx.n_pages, ctx.n_slots)
            assert isinstance(ctx.residents, ResidentView)
            ctx.residents.look_at(manager.residency)

    def _take_policies(self) -> None:
        policies = [_policy_of(manager) for manager in self.managers]
        if not served_by_one(self.managers):
            self.policy: Policy = PolicyOfEach(policies, self.rows, self.ctx.xp)
            return
        first = policies[0]
        self.policy = type(first)(first.params)
        self.policy.reset(self.ctx)
        if self.policy.watches:  # what the prefills left
            xp, held = self.ctx.xp, self.residency.slots
            self.policy.moved(0, xp.astype(held, xp.int64), xp.full_like(held[:, :1], -1))

    @property
    def parts(self) -> int:
        return len(self.managers)

    def _prompt_mass(self, managers: Sequence[CacheManager]) -> Array | None:
        first = managers[0].ctx
        if first.prompt_mass is None:
            return None
        shape = (self.residency.n_groups, self.residency.n_pages)
        whole = first.xp.zeros(shape, dtype=first.xp.float32, device=first.device)
        for start, manager in zip(self.starts, managers, strict=False):
            mass: Array = manager.ctx.prompt_mass
            whole[start : start + len(mass), : mass.shape[1]] = mass
        return whole

    def _plan(
        self, managers: Sequence[CacheManager], entries: np.ndarray, groups: Sequence[int]
    ) -> None:
        """Of every step, on the device: pages visible and pinned, and the pages that begin."""
        ctx = self.ctx
        before = [[manager.visible for manager in managers]]
        seen = [
            [manager._view(int(count)) for manager, count in zip(managers, row, strict=True)]
            for row in entries
        ]
        visible = np.array([[view[0] for view in row] for row in seen], dtype=np.int64)
        tail = np.array([[view[1] for view in row] for row in seen], dtype=np.int64)
        first = np.concatenate([np.array(before), visible])[:-1]
        width = max(1, int((visible - first).max(initial=0)))
        new = first[..., None] + np.arange(width)
        new = np.where(new < visible[..., None], new, -1)

        def there(of_requests: np.ndarray, dtype: type) -> Array:
            by_row: Array = np.repeat(of_requests, groups, axis=1).astype(dtype)
            return ctx.xp.asarray(by_row, device=ctx.device)

        self._views = seen
        self._begins = [bool(row.any()) for row in visible > first]
        self._most = visible.max(axis=1)
        sinks = np.array([manager.pins.sink for manager in managers])[None]
        self._pins = bool(sinks.any() or (tail < visible).any())
        self._sink = there(sinks[..., None], np.int64)[0]
        self._new = there(new, np.int32)
        self._visible = there(visible[..., None], np.int64)
        self._tail = there(tail[..., None], np.int64)
        # of the step under way, where a CUDA graph finds it
        self._tail_now = self._tail[0] + 0
        self._at = 0

    def _pinned(self, view: tuple[int, int] | None = None) -> Any:
        if not self._pins:
            return None
        sink, tail = self._sink, self._tail_now
        return lambda pages: (pages < sink) | (pages >= tail)

    def _seen(self) -> Any:
        return self._visible[self._at]

    def write(self, step: int, n_entries: int) -> Moves | None:
        """As `CacheManager.write`; how many entries are visible to each request is known."""
        self._at = step
        for manager, view in zip(self.managers, self._views[step], strict=True):
            manager.visible, manager.tail = view
        if self._pins:
            self._tail_now[...] = self._tail[step]
        self.visible = int(self._most[step])
        if not self._begins[step]:
            return None
        new = self._new[step]
        self.policy.wrote(step, new)
        return self._admit(step, new, new >= 0)

    def decide(self, step: int) -> Moves:
        """As `CacheManager.decide`, among the pages that each request sees."""
        self.policy.decide(step)
        if isinstance(self.policy, PolicyOfEach):
            found = self.policy.worth_of_seen(step, [view[0] for view in self._views[self._at]])
        else:
            found = self.policy.worth_of_first(step, self.visible)
        worth = self._ranked(step, found)
        moves = self.residency.choose(worth, self.policy.floor, self._pinned(), self._seen())
        return self._told(step, moves)

    def foresee(self, step: int, n_entries: int, most: int, part: int = 0) -> Array | None:
        """As `CacheManager.foresee`, of request `part` alone."""
        entries = int(self._entries[min(step, len(self._entries) - 1), part])
        return self.managers[part].foresee(step, entries, most)

"""The policies of many requests behind the face of one, for rows that one cache manager keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fmsim.policies.base import Observation, Policy

Array = Any


class PolicyOfEach(Policy):
    """`policies`, one a request and all of one kind, each asked about its own `rows`.

    Each was reset with its own request's context. Arrays here are [G, n] of all requests' groups.
    """

    name = "of-each"

    def __init__(self, policies: Sequence[Policy], rows: Sequence[slice], xp: Any) -> None:
        first = policies[0]
        super().__init__(first.params)
        self.policies = list(policies)
        self.rows = list(rows)
        self.xp = xp
        self.floor = first.floor

    @property
    def observes(self) -> bool:
        return self.policies[0].observes

    @property
    def watches(self) -> bool:
        return self.policies[0].watches

    @property
    def prefetches(self) -> bool:
        return self.policies[0].prefetches

    @property
    def decides_ahead(self) -> bool:
        return self.policies[0].decides_ahead

    @property
    def state_steps(self) -> int | None:
        return self.policies[0].state_steps

    def observe(self, step: int, obs: Observation) -> None:
        parts = {field.name: getattr(obs, field.name) for field in fields(obs)}
        for policy, rows in self._each():
            policy.observe(step, Observation(**{name: part[rows] for name, part in parts.items()}))

    def wrote(self, step: int, pages: Array) -> None:
        for policy, rows in self._each():
            policy.wrote(step, pages[rows])

    def moved(self, step: int, loaded: Array, evicted: Array) -> None:
        for policy, rows in self._each():
            policy.moved(step, loaded[rows], evicted[rows])

    def decide(self, step: int) -> None:
        for policy in self.policies:
            policy.decide(step)

    def prefetch(self, step: int) -> Array | None:
        found = [policy.prefetch(step) for policy in self.policies]
        if all(pages is None for pages in found):
            return None
        widths = [1 if pages is None else pages.shape[1] for pages in found]
        whole = self._table(max(widths), self.xp.int64, -1)
        for pages, width, rows in zip(found, widths, self.rows, strict=True):
            if pages is not None:
                whole[rows, :width] = pages
        return whole

    def worth(self, step: int, pages: Array) -> Array:
        return self.xp.concat([policy.worth(step, pages[rows]) for policy, rows in self._each()])

    def worth_of_seen(self, step: int, seen: Sequence[int]) -> Array:
        """`worth` of the pages that each request sees, [G, the most of them]; beyond, anything."""
        found = [
            policy.worth_of_first(step, n) for policy, n in zip(self.policies, seen, strict=True)
        ]
        whole = self._table(max(seen), found[0].dtype, 0)
        for worth, n, rows in zip(found, seen, self.rows, strict=True):
            whole[rows, :n] = worth
        return whole

    def _each(self) -> Sequence[tuple[Policy, slice]]:
        return list(zip(self.policies, self.rows, strict=True))

    def _table(self, width: int, dtype: Any, value: int) -> Array:
        device = self.policies[0].ctx.device
        return self.xp.full((self.rows[-1].stop, width), value, dtype=dtype, device=device)

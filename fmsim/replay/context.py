"""What a policy is told before the first step: one builder for replay and engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fmsim.policies.base import Context, LookaheadState, Policy
from fmsim.policies.guard import Guarded
from fmsim.replay.layer_slots import check_shares, divide
from fmsim.replay.paging import Paged, PagedFuture, page_mass

Array = Any


@dataclass(frozen=True)
class RequestShape:
    """One request's sizes. Entries are compressed ones; layers are those that select."""

    n_layers: int
    prompt_entries: int
    n_entries: int  # at the end of the run
    topk: int
    n_steps: int
    entry_tokens: int
    tau: int
    entry_bytes: float  # KV of one entry in one layer
    model_layers: int  # that share the GPU: a budget in bytes is over all of them
    csa_numbers: tuple[int, ...] = ()
    seed: int = 0

    def n_pages(self, granularity: int) -> int:
        """All pages there will be at the end of the run."""
        return -(-max(self.n_entries, self.prompt_entries) // granularity)


def build_context(
    policy: Policy | Guarded,
    shape: RequestShape,
    *,
    prompt_mass: np.ndarray | None = None,
    lookahead: Callable[[int], LookaheadState] | None = None,
    future: Paged | None = None,
    xp: Any = None,
    device: Any = None,
) -> Context:
    """The context of `policy` in arrays of `xp` (numpy unless given) on `device`.

    `prompt_mass` float [L, E] is the prompt's attention mass by entry. `lookahead` gives arrays of
    `xp`. `future` is what is to come, for a policy that is told.
    """
    params = policy.params
    shared = params.scope == "shared"
    n_pages = shape.n_pages(params.granularity)

    def there(array: np.ndarray) -> Array:
        return array if xp is None else xp.asarray(np.array(array), device=device)

    mass = None
    if prompt_mass is not None:
        mass = there(page_mass(prompt_mass, params.granularity, n_pages, shared))
    ctx = Context(
        n_layers=shape.n_layers,
        n_groups=1 if shared else shape.n_layers,
        n_pages=n_pages,
        n_slots=policy.n_slots(
            n_pages,
            prompt_entries=shape.prompt_entries,
            topk=shape.topk,
            entry_bytes=shape.entry_bytes,
            model_layers=shape.model_layers,
        ),
        granularity=params.granularity,
        prompt_entries=shape.prompt_entries,
        topk=shape.topk,
        n_steps=shape.n_steps,
        tau=shape.tau,
        entry_tokens=shape.entry_tokens,
        csa_numbers=shape.csa_numbers,
        seed=shape.seed,
        prompt_mass=mass,
        lookahead=lookahead,
        future=None if future is None else PagedFuture(future, there),
        xp=xp,
        device=device,
    )
    shares = policy.layer_shares(shape.n_layers)
    return ctx if shares is None else _shared_unevenly(policy, ctx, shares)


def _shared_unevenly(policy: Policy | Guarded, ctx: Context, shares: Sequence[float]) -> Context:
    """The same context with slots by `shares`, what the policy pins in every group first."""
    check_shares(policy.name, shares, ctx.n_layers, policy.params.scope)
    policy.reset(ctx)
    least = policy.pins().most(ctx.n_pages, ctx.prompt_entries // ctx.granularity)
    if least > ctx.n_slots:  # even shares would not do: the cache manager says what is short
        return ctx
    slots = divide(ctx.n_slots, shares, ctx.n_pages, least)
    return replace(ctx, n_slots=max(slots), group_slots=slots)

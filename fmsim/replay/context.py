"""What a policy is told before the first step: one builder for replay and engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fmsim.errors import BudgetTooSmall, FmsimError
from fmsim.policies.base import Context, LookaheadState, Policy
from fmsim.policies.budget import Budget
from fmsim.policies.guard import Guarded
from fmsim.replay.layer_slots import check_shares, divide
from fmsim.replay.needs import GpuMemory, Needs, most_that_fit, needs_of
from fmsim.replay.paging import Paged, PagedFuture, page_mass
from fmsim.units import sized

Array = Any
ENTRY_BYTES = 584  # of one V4 entry


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
    memory: GpuMemory | None = None  # the model's that decodes; a budget in bytes is of it
    csa_numbers: tuple[int, ...] = ()
    seed: int = 0

    def sizes(self) -> dict[str, Any]:
        """The arguments of `Budget.entries`; without a model's memory V4's bytes in these
        layers.
        """
        return {
            "prompt_entries": self.prompt_entries,
            "topk": self.topk,
            "entry_bytes": ENTRY_BYTES if self.memory is None else self.memory.entry_bytes,
            "model_layers": self.n_layers if self.memory is None else self.memory.model_layers,
        }

    def n_pages(self, granularity: int) -> int:
        """All pages there will be at the end of the run."""
        return -(-max(self.n_entries, self.prompt_entries) // granularity)


def build_context(
    policy: Policy | Guarded,
    shape: RequestShape,
    *,
    prompt_mass: np.ndarray | None = None,
    lookahead: Callable[[int], LookaheadState] | None = None,
    newest_state: Callable[[int], LookaheadState] | None = None,
    future: Paged | None = None,
    xp: Any = None,
    device: Any = None,
) -> Context:
    """The context of `policy` in arrays of `xp` (numpy unless given) on `device`.

    `prompt_mass` float [L, E] is the prompt's attention mass by entry. `lookahead` and
    `newest_state` give arrays of `xp`; without the latter, windows begin with the newest states.
    `future` is what is to come, for a policy that is told. Raises BudgetTooSmall for a budget in
    bytes on the GPU that cannot be.
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
        n_slots=n_pages,
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
        newest_state=newest_state,
        future=None if future is None else PagedFuture(future, there),
        xp=xp,
        device=device,
    )

    def with_slots(gpu_entries: int | None) -> Context:
        """The context with the slots of the budget; of one on the GPU those for `gpu_entries`."""
        n_slots = policy.n_slots(n_pages, **shape.sizes(), gpu_entries=gpu_entries)
        sized = replace(ctx, n_slots=n_slots, group_slots=())
        shares = policy.layer_shares(shape.n_layers)
        return sized if shares is None else _shared_unevenly(policy, sized, shares)

    budget = params.budget
    if not (isinstance(budget, Budget) and budget.on_gpu):  # `full` has no budget
        return with_slots(None)
    return _within(policy, budget, shape, with_slots)


def _within(
    policy: Policy | Guarded,
    budget: Budget,
    shape: RequestShape,
    with_slots: Callable[[int], Context],
) -> Context:
    """The context with as many slots as leave all that the request takes on the GPU within
    `budget`.

    Raises BudgetTooSmall where the first page does not fit, with what takes the bytes.
    """
    memory = shape.memory
    if memory is None:
        raise FmsimError(
            f"policy {policy.name}: budget {budget} is of a model's bytes, and no model is named"
        )
    granularity = policy.params.granularity
    target_layers = tuple(policy.target_layers())
    limit_bytes = budget.gpu_bytes(memory.full_bytes(shape))

    def needs(ctx: Context) -> Needs:
        return needs_of(policy, ctx, target_layers)

    def fits(pages: int) -> bool:
        return memory.taken_bytes(needs(with_slots(pages * granularity)), shape) <= limit_bytes

    most = shape.n_pages(granularity)
    if fits(most):
        ctx = with_slots(most * granularity)
        policy.reset(ctx)  # who keeps all, but for what is below a floor, has it only now
        if memory.taken_bytes(needs(ctx), shape) <= limit_bytes:
            return ctx
    found = most_that_fit(fits, most - 1) if most > 1 else 0
    if found:
        return with_slots(found * granularity)
    least = needs(with_slots(granularity))
    error = BudgetTooSmall(
        f"policy {policy.name}: budget {budget} is {sized(limit_bytes)}, and"
        f" {memory.shortage(least, shape, limit_bytes)}"
    )
    error.least_bytes = memory.taken_bytes(least, shape)
    raise error


def _shared_unevenly(policy: Policy | Guarded, ctx: Context, shares: Sequence[float]) -> Context:
    """The same context with slots by `shares`, what the policy pins in every group first."""
    check_shares(policy.name, shares, ctx.n_layers, policy.params.scope)
    policy.reset(ctx)
    least = policy.pins().most(ctx.n_pages, ctx.prompt_entries // ctx.granularity)
    if least > ctx.n_slots:  # even shares would not do: the cache manager says what is short
        return ctx
    slots = divide(ctx.n_slots, shares, ctx.n_pages, least)
    return replace(ctx, n_slots=max(slots), group_slots=slots)

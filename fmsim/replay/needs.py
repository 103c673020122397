"""What a request's cache needs of a GPU beside its slots, known before a step is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fmsim.policies.base import Context, Policy
from fmsim.policies.guard import Guarded

AHEAD = 4  # slots to each spare slot for what is recalled ahead of a decision


class Lifetime(Protocol):
    """How long a request becomes; a `Ledger` says it too."""

    @property
    def prompt_entries(self) -> int:
        """Entries that the prompt leaves."""

    @property
    def n_steps(self) -> int:
        """Tokens that are decoded."""

    @property
    def entry_tokens(self) -> int:
        """Tokens of the text in an entry."""


class Declared(Protocol):
    """What a policy's run declares of its memory; a `Ledger` does too. G groups of CSA layers."""

    @property
    def n_layers(self) -> int:
        """CSA layers of what is replayed."""

    @property
    def n_groups(self) -> int:
        """G: n_layers, or 1 where they share one set."""

    @property
    def granularity(self) -> int:
        """Entries in a slot."""

    @property
    def group_slots(self) -> Sequence[int]:
        """[G]: the budget's slots."""

    @property
    def ahead_slots(self) -> Sequence[int]:
        """[G]: spare slots for what is recalled ahead of its decision; none where empty."""

    @property
    def miss_slots(self) -> int:
        """Spare slots of each group for one step's misses."""

    @property
    def all_keys(self) -> bool:
        """Every layer keeps all its index keys."""

    @property
    def target_layers(self) -> Sequence[int]:
        """The layers that keep all of them even where others do not."""


@dataclass(frozen=True)
class Slots:
    """`Declared` of a request that nobody has decoded."""

    n_layers: int
    n_groups: int
    granularity: int
    group_slots: tuple[int, ...]
    ahead_slots: tuple[int, ...]
    miss_slots: int
    all_keys: bool
    target_layers: tuple[int, ...]


@dataclass(frozen=True)
class Needs(Slots):
    """The same of a policy that has not run yet, and whether anything can be missing."""

    keeps_all: bool  # every page has a slot, and no decision gives one up
    comes_back: bool  # pages can be loaded from the host: by a miss, a decision or a prefetch


def needs_of(policy: Policy | Guarded, ctx: Context, target_layers: tuple[int, ...]) -> Needs:
    """What `policy`, reset with `ctx`, needs with the slots that `ctx` has; `target_layers` are
    its own.

    - The native indexer scores every entry, so all index keys stay on the GPU; but where a policy
      masks and sees residents alone, a layer scores what is resident, and keys come and go with
      their entries. Then only the layers that a memory indexer scores keep all (arXiv 2606.09079).
    - Where misses are loaded, every page that a step selects may be missing.
    - What is recalled ahead of its decision lies beside the slots until then.
    """
    params = policy.params
    keeps_all = min(ctx.group_slots) >= ctx.n_pages and policy.floor is None
    ahead = params.cadence > 1 or policy.prefetches
    comes_back = not keeps_all and (params.on_miss != "mask" or ahead)
    recalls_ahead = comes_back and policy.decides_ahead and params.cadence > 1
    misses = not keeps_all and params.on_miss != "mask"
    selecting_layers = ctx.n_layers // ctx.n_groups
    return Needs(
        n_layers=ctx.n_layers,
        n_groups=ctx.n_groups,
        granularity=ctx.granularity,
        group_slots=ctx.group_slots,
        ahead_slots=spare_ahead(ctx.group_slots) if recalls_ahead else (0,) * ctx.n_groups,
        miss_slots=min(ctx.topk * selecting_layers, ctx.n_pages) if misses else 0,
        all_keys=params.on_miss != "mask" or params.sees == "all" or keeps_all,
        target_layers=target_layers,
        keeps_all=keeps_all,
        comes_back=comes_back,
    )


def spare_ahead(group_slots: Sequence[int]) -> tuple[int, ...]:
    """[G]: spare slots for what is recalled ahead of its decision, beside each group's slots."""
    return tuple(-(-slots // AHEAD) for slots in group_slots)


def most_that_fit(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of pages, `most` at the most, that `fits`; 0 where not even one does.

    More pages take more bytes; but all of them may take less than one page fewer does, since what
    keeps everything has nothing spare. So `most` is asked first.
    """
    if fits(most):
        return most
    found = 0
    beyond = most
    while beyond - found > 1:
        middle = (found + beyond) // 2
        found, beyond = (middle, beyond) if fits(middle) else (found, middle)
    return found


class GpuMemory(Protocol):
    """A model's bytes on a GPU: what a budget in bytes buys."""

    @property
    def entry_bytes(self) -> float:
        """KV of one entry in one CSA layer."""

    @property
    def model_layers(self) -> int:
        """CSA layers."""

    def full_bytes(self, request: Lifetime) -> int:
        """All that the full cache of one request takes."""

    def taken_bytes(self, needs: Declared, request: Lifetime) -> int:
        """All that is allocated for a request with these `needs`."""

    def shortage(self, needs: Declared, request: Lifetime, limit_bytes: int) -> str:
        """What of these `needs` takes more than `limit_bytes`, in words."""

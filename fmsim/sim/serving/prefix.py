"""KV that outlives its request, so that a later prompt which begins alike need not compute it.

Prompts are cut into blocks of so many tokens; a block's id stands for all tokens up to its end, as
in Mooncake's traces and in the hash tables of SGLang and vLLM. A rank keeps blocks in tiers:

- on the GPU, where the policy keeps whole caches there. Under any other the slots are one request's
  own, so nothing is shared on the GPU;
- in host memory, a copy of every block;
- on NVMe, what host memory had to give up, where the server has any.

In each tier a block that a running request uses is pinned. Of the others the least recently used
goes first, and of one request's the last block before the first: what follows a missing block is of
no use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import simpy

from fmsim.hw.memory import MemorySystem, give, take

TIERS = ("GPU", "host", "NVMe")  # from above


@dataclass(frozen=True)
class FoundBlocks:
    """Leading blocks of a prompt that are there, each in the highest tier that has it."""

    gpu: tuple[int, ...] = ()
    host: tuple[int, ...] = ()
    nvme: tuple[int, ...] = ()

    @property
    def n_blocks(self) -> int:
        return len(self.gpu) + len(self.host) + len(self.nvme)


NOTHING_FOUND = FoundBlocks()


class BlockTier:
    """Blocks in one memory, beside what running requests hold of it themselves."""

    def __init__(self, pool: simpy.Container, block_bytes: float, below: BlockTier | None = None):
        """`below`: where evicted blocks go; otherwise they are gone."""
        self.pool = pool
        self.block_bytes = block_bytes
        self.below = below
        self.written = 0  # blocks that came in
        self._unpinned: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._pins: dict[int, int] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._unpinned or block in self._pins

    def __len__(self) -> int:
        return len(self._unpinned) + len(self._pins)

    def room(self, beside: Iterable[int] = ()) -> float:
        """Bytes free, or held by blocks that may go; not those of `beside`."""
        kept = sum(block in self._unpinned for block in beside)
        return float(self.pool.level) + (len(self._unpinned) - kept) * self.block_bytes

    def pin(self, blocks: Iterable[int]) -> None:
        """Keep these, which are here, until as many `unpin`."""
        for block in blocks:
            self._unpinned.pop(block, None)
            self._pins[block] = self._pins.get(block, 0) + 1

    def adopt(self, block: int, own_bytes: float) -> bool:
        """Pin a block that a request made. `own_bytes` of it the request holds here itself, and
        gives to the tier; where the tier has the block already, they are free again.

        False where there is no room for the rest of it: the request then keeps its own.
        """
        if block in self:
            give(self.pool, own_bytes)
        else:
            more = self.block_bytes - own_bytes
            self.make_room(more)
            if self.pool.level < more:
                return False
            take(self.pool, more)
            self.written += 1
        self.pin([block])
        return True

    def adopt_all(
        self, blocks: Sequence[int], pinned: list[int], own_bytes: float, held_bytes: float
    ) -> float:
        """Adopt those that are not in `pinned`, which then has them, as long as the request, which
        holds `held_bytes`, has its part of a block. Returns the bytes that it gave.
        """
        given, known = 0.0, set(pinned)
        for block in blocks:
            if block in known:
                continue
            if held_bytes - given < own_bytes or not self.adopt(block, own_bytes):
                break  # the rest of it lies elsewhere, or there is no more room
            given += own_bytes
            pinned.append(block)
        return given

    def unpin(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._unpinned[block] = None

    def make_room(self, n_bytes: float) -> None:
        """Evict until `n_bytes` are free, or nothing may go."""
        while self.pool.level < n_bytes and self._unpinned:
            block, _ = self._unpinned.popitem(last=False)
            give(self.pool, self.block_bytes)
            if self.below is not None:
                self.below.store([block])

    def store(self, blocks: Sequence[int]) -> int:
        """Keep these, unpinned and newest, as far as there is room; returns how many came in."""
        came = 0
        for block in reversed(blocks):
            if block in self._pins:
                continue
            if block in self._unpinned:
                self._unpinned.move_to_end(block)
                continue
            self.make_room(self.block_bytes)
            if self.pool.level < self.block_bytes:
                break
            take(self.pool, self.block_bytes)
            self._unpinned[block] = None
            came += 1
        self.written += came
        return came


@dataclass
class Pinned:
    """Blocks that one request uses, by tier."""

    gpu: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    nvme: list[int] = field(default_factory=list)


class PrefixStore:
    """A rank's blocks in all its tiers."""

    def __init__(
        self, gpu: BlockTier | None, host: BlockTier, nvme: BlockTier | None, block_tokens: int
    ) -> None:
        self.gpu = gpu
        self.host = host
        self.nvme = nvme
        self.block_tokens = block_tokens

    def find(self, blocks: Sequence[int]) -> FoundBlocks:
        """The leading ones that are here."""
        tiers: tuple[list[int], list[int], list[int]] = ([], [], [])
        for block in blocks:
            if self.gpu is not None and block in self.gpu:
                tiers[0].append(block)
            elif block in self.host:
                tiers[1].append(block)
            elif self.nvme is not None and block in self.nvme:
                tiers[2].append(block)
            else:
                break
        return FoundBlocks(*map(tuple, tiers)) if any(tiers) else NOTHING_FOUND

    def pin(self, found: FoundBlocks, pinned: Pinned) -> None:
        """For a request that begins."""
        for tier, blocks, own in self._of(pinned, found.gpu, found.host, found.nvme):
            tier.pin(blocks)
            own.extend(blocks)

    def unpin(self, pinned: Pinned) -> None:
        """For a request that is done."""
        for tier, _, own in self._of(pinned):
            tier.unpin(own)
            own.clear()

    def _of(
        self, pinned: Pinned, *blocks: Sequence[int]
    ) -> list[tuple[BlockTier, Sequence[int], list[int]]]:
        tiers = (self.gpu, self.host, self.nvme)
        of_each = blocks or ((), (), ())
        found = zip(tiers, of_each, (pinned.gpu, pinned.host, pinned.nvme))
        return [(tier, own, all_own) for tier, own, all_own in found if tier is not None]


def stores(
    ranks: Sequence[MemorySystem], block_bytes: float, block_tokens: int, on_gpu: bool
) -> list[PrefixStore]:
    """One a rank; `on_gpu`: the policy keeps whole caches there."""
    found = []
    for rank in ranks:
        nvme = None if rank.nvme is None else BlockTier(rank.nvme, block_bytes)
        gpu = BlockTier(rank.hbm, block_bytes) if on_gpu else None
        host = BlockTier(rank.host, block_bytes, nvme)
        found.append(PrefixStore(gpu, host, nvme, block_tokens))
    return found

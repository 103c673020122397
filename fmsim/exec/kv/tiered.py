"""CSA entries of a batch in two tiers: all of them in a host mirror, and in GPU memory the pages
that a policy keeps.

A page of the mirror and a slot of the pool hold the same bytes, in a layout of
`fmsim.exec.kernels.layout`. What a `fmsim.replay.residency.Residency` moves is carried out here,
and counted as it is copied. Missed pages are first *staged*: read from the mirror into spare pages
of the pool, where the layer that waits for them attends to them; when the step ends, those that got
a slot are copied there within the GPU, and the others are dropped.

On a GPU the mirror is pinned. On a CPU both tiers are ordinary memory, and every copy is really
made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.layout import Layout, read_entries, write_entries
from fmsim.exec.kernels.pages import staging
from fmsim.exec.kernels.pages.block_tables import enter_slots
from fmsim.exec.kernels.pages.late_entries import bring_entries
from fmsim.exec.kv.beside import Beside
from fmsim.exec.kv.copies import Copies, LayerPages
from fmsim.exec.kv.home import Home, Requests, part_of
from fmsim.exec.kv.late import LatePages
from fmsim.exec.kv.memory import check_memory
from fmsim.exec.kv.mirror import HostMirror


@dataclass(frozen=True)
class RequestSize:
    """Pages that one request will have at its end, slots that it may fill in each layer, pages that
    a layer may miss in one step, and pages that may be recalled ahead of a decision in each layer.
    """

    pages: int
    slots: tuple[int, ...]  # a number a layer
    staged: int
    ahead: tuple[int, ...]  # a number a layer

    def of(self, rows: Sequence[int]) -> RequestSize:
        """The same with row ``rows[l]`` of slots and of pages ahead for each layer l."""
        slots = tuple(self.slots[row] for row in rows)
        return replace(self, slots=slots, ahead=tuple(self.ahead[row] for row in rows))


class TieredCache:
    """`layers` CSA layers of a batch of requests; ``mirrored`` is False where nothing ever comes
    back from the host.

    Layers may have different numbers of slots (`RequestSize`); ``pool[l]`` uint8 [pages, page
    bytes] is layer l's, in one `storage` [pages of all layers, page bytes]. `even`: all layers'
    pools are laid out alike.

    A request's slot s is page ``slot_start[l][b] + s`` of layer l's pool, and its page p is page
    ``page_start[b] + p`` of a layer's mirror. With ``one_text`` all requests have read the same,
    and share the mirror of one; with ``shared_name`` the processes of a host do
    (`fmsim.exec.kv.mirror`). What is recalled beside a decode is copied `beside`, which caches may
    share. `recalled_pages` and `staged_pages` count what was copied from the mirror, int64 on
    the device, all layers together.
    """

    def __init__(
        self,
        layout: Layout,
        layers: int,
        granularity: int,
        sizes: Sequence[RequestSize],
        device: torch.device | str = "cpu",
        mirrored: bool = True,
        one_text: bool = False,
        shared_name: str | None = None,
        beside: Beside | None = None,
    ):
        self.layout = layout
        self.layers = layers
        self.granularity = granularity
        self.sizes = tuple(sizes)
        self.device, self.mirrored = torch.device(device), mirrored
        self.page_bytes = granularity * layout.entry_bytes
        # Of each layer: the requests' slots, then their pages for misses, then those ahead.
        parts = [
            _starts(
                [
                    *(size.slots[layer] for size in sizes),
                    *(size.staged for size in sizes),
                    *(size.ahead[layer] for size in sizes),
                ]
            )
            for layer in range(layers)
        ]
        batch = len(self.sizes)
        self.slot_start = [starts[: batch + 1] for starts in parts]
        self.even = all(starts == parts[0] for starts in parts)
        self.page_start = (
            [0] * len(self.sizes) + [self.sizes[0].pages]
            if one_text
            else _starts(size.pages for size in sizes)
        )
        self.pool_start = _starts(starts[-1] for starts in parts)
        mirror_pages = self.page_start[-1] if mirrored else 0
        check_memory(
            self.device,
            self.pool_start[-1] * self.page_bytes,
            layers * mirror_pages * self.page_bytes,
        )
        self.storage = torch.zeros(
            self.pool_start[-1], self.page_bytes, dtype=torch.uint8, device=self.device
        )
        self.pool = self.storage.split([starts[-1] for starts in parts])
        self._host = HostMirror(
            layers, mirror_pages, self.page_bytes, self.device, shared_name if mirrored else None
        )
        self.mirror = self._host.pages
        # int64 [L, B, 1], or [1, B, 1] for all layers alike: where a request's parts begin
        first = torch.tensor(parts[:1] if self.even else parts, device=self.device)[:, :-1, None]
        self._first_slot, self._first_stage, self._first_ahead = (
            part.contiguous() for part in first.split(batch, 1)
        )
        self._first_block = self._first_slot[..., 0].int()
        self._first_page = torch.tensor(self.page_start, device=self.device)[:-1, None]
        self._of_pool = LayerPages(self.storage, self._layers_begin(self.pool_start[:-1]))
        self._of_mirror = LayerPages(
            self.mirror.flatten(0, 1),
            self._layers_begin([layer * mirror_pages for layer in range(layers)]),
        )
        # int64 [L, B]: where a request's slots begin in the storage, and its pages in all of the
        # mirror
        self._slot_page = self._of_pool.first[:, 0] + self._first_slot[..., 0]
        self._mirror_page = self._of_mirror.first[:, 0] + self._first_page[:, 0]
        self.beside = beside or Beside(self.device)
        self._copies = Copies(self._of_pool, self.even)
        self._late = LatePages(self._copies, self.pool_start, self.beside)
        self._ahead: Tensor | None = (
            None  # pool pages of what was recalled ahead, int32 [L or 1, B, P + 1], or -1
        )
        self.recalled_pages, self.staged_pages = (
            torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(2)
        )

    @cached_property
    def mirror_table(self) -> Tensor:
        """int32 [B, P + 1]: the mirror's page of each of a request's pages, -1 beyond its last."""
        number = torch.arange(
            max(size.pages for size in self.sizes) + 1, dtype=torch.int32, device=self.device
        )
        pages = torch.tensor([size.pages for size in self.sizes], device=self.device)[:, None]
        return torch.where(number < pages, number + self._first_page.int(), -1)

    def homes(self, layer: int, blocks: Tensor) -> list[Home]:
        """Where a layer's entries lie: the pool through `blocks` int32 [B, P + 1], and the mirror
        if there is one.
        """
        resident = Home(self.pool[layer], blocks)
        return (
            [resident, Home(self.mirror[layer], self.mirror_table)] if self.mirrored else [resident]
        )

    def _layers_begin(self, starts: list[int]) -> Tensor:
        return torch.tensor(starts, device=self.device)[:, None, None]

    @property
    def stage_pages(self) -> int:
        """Staging pages of each layer, for the misses of a step."""
        return sum(size.staged for size in self.sizes)

    @property
    def slot_bytes(self) -> int:
        """What the slots alone take of GPU memory."""
        return sum(starts[-1] for starts in self.slot_start) * self.page_bytes

    @property
    def pool_bytes(self) -> int:
        """What the pool takes of GPU memory, staging included."""
        return self.storage.untyped_storage().nbytes()

    @property
    def full_bytes(self) -> int:
        """What the pool would take if every page had a slot."""
        return self.layers * sum(size.pages for size in self.sizes) * self.page_bytes

    @property
    def mirror_bytes(self) -> int:
        return self._host.n_bytes

    @property
    def made_mirror(self) -> bool:
        """The mirror's memory was created here, and is another process's where not."""
        return self._host.created

    def fill(self, request: int, layer: int, entries: Tensor, table: Tensor) -> None:
        """A prefill's entries [E, C]: all to the mirror, and to the pool those whose page has a
        slot in `table` int32 [P + 1].
        """
        numbers = torch.arange(len(entries), device=entries.device)
        if self.mirrored:
            places = self.page_start[request] * self.granularity + numbers
            write_entries(
                self.mirror[layer],
                self.layout,
                places.to(self.mirror.device),
                entries.to(self.mirror.device),
            )
        self._write_pool(request, layer, entries, numbers, table)

    def append(self, request: int, layer: int, entry: Tensor, index: Tensor, table: Tensor) -> None:
        """Write a new entry [1, C], number `index` [1] (-1 = none), through to both tiers."""
        if self.mirrored:
            place = torch.where(index < 0, -1, self.page_start[request] * self.granularity + index)
            write_entries(
                self.mirror[layer],
                self.layout,
                place.to(self.mirror.device),
                entry.to(self.mirror.device),
            )
        self._write_pool(request, layer, entry, index, table)

    def blocks(self, table: Tensor, out: Tensor, request: Requests = None) -> None:
        """The pool page of each page of requests, int32 [L, B, P + 1] into `out`, -1 where it is
        not resident; `table` are rows of residencies' tables, or where layers are alike any rows.
        """
        enter_slots(_by_request(table), self._first_block[:, part_of(request)], out)

    def fetch(self, pages: Tensor, slots: Tensor, request: Requests = None) -> None:
        """Copy pages of the mirror into slots, of every layer; -1 = padding.

        Here and below pages and slots are [L, m] for one request, or for all alike, or [L, B, m]
        for several. Of even layers that move alike there may be one row for all.
        """
        if self.mirrored:
            self._admit(_by_request(pages), _by_request(slots), None, request)

    def recall(
        self, pages: Tensor, slots: Tensor, request: Requests = None, late: bool = False
    ) -> None:
        """`fetch`, for a decision: what was recalled ahead of it is here already.

        Where the rest may come ``late`` it is copied beside what runs, a layer after the other, and
        whoever reads a layer calls `wait_for` before, or `bring` for what it reads.
        """
        if not self.mirrored:
            return
        self.take(slots, request)
        pages, slots, staged = _by_request(pages), _by_request(slots), None
        if self._ahead is not None:
            part = part_of(request)
            self.beside.wait_for_ahead(part)
            pages = pages.expand(-1, self._first_ahead[:, part].shape[1], -1)
            staged = self._places(self._ahead[:, part], pages)
        self._admit(pages, slots, staged, request, late=late)
        if self._ahead is not None:
            self._ahead[:, part_of(request)].fill_(-1)

    def wait_for(self, layer: int) -> None:
        """What is recalled late into a layer is there for what comes after."""
        self._late.wait_for(layer)

    def take(self, slots: Tensor, request: Requests = None) -> None:
        """Slots get other pages: what was to come into them late stays away."""
        if self._late.come():  # nothing is launched then
            return
        slots = _by_request(slots)
        first = self._first_slot[:, part_of(request)]
        self._late.take_back(torch.where(slots < 0, -1, slots + first))

    def bring(self, layer: int, ids: Tensor, blocks: Tensor) -> None:
        """Read entries ``ids`` int32 [B, K] (-1 = none) whose pages are still on their way, each by
        itself, into the slots that ``blocks`` int32 [B, P + 1] name. Their pages are counted when
        they are recalled, and these bytes, which cross the link twice, are not.
        """
        if self.mirrored:
            bring_entries(
                ids,
                blocks,
                self._late.on_the_way(layer),
                self._first_page[:, 0],
                self.mirror[layer],
                self.pool[layer],
                self.layout,
            )

    def recall_ahead(self, pages: Tensor, request: Requests = None) -> None:
        """Begin to copy pages, up to a request's `ahead`, out of the mirror, beside whatever else
        runs; the next `recall` finds them here.
        """
        part = part_of(request)
        first = self._first_ahead[:, part]
        if self._ahead is None:
            most = max(size.pages for size in self.sizes)
            self._ahead = torch.full(
                (len(pages), len(self.sizes), most + 1), -1, dtype=torch.int32, device=self.device
            )
        blocks = self._ahead[:, part]
        pages = _by_request(pages).expand(-1, first.shape[1], -1)
        to = torch.where(pages < 0, -1, first + torch.arange(pages.shape[2], device=pages.device))
        blocks.fill_(-1)
        blocks.scatter_(2, torch.where(pages < 0, blocks.shape[2] - 1, pages), to.int())
        blocks[:, :, -1] = -1
        self._count(to)
        source = torch.where(pages < 0, -1, pages + self._first_page[part])
        with self.beside.ahead(part, source, to):
            self._copies.copy(self._of_mirror, source, to, tuning.GATHER_BESIDE)

    def stage(self, layer: int, pages: Tensor, fetched: Tensor, blocks: Tensor) -> None:
        """Bring pages [B, n] of each request where `fetched` from the mirror into staging pages,
        and enter them in `blocks` int32 [B, P + 1].
        """
        staging.stage(
            self._of_mirror.pages,
            self.pool[layer],
            pages,
            fetched,
            self._mirror_page[layer],
            self._first_stage[0 if self.even else layer, :, 0],
            blocks,
            self.staged_pages,
        )

    def settle(
        self,
        pages: Tensor,
        slots: Tensor,
        blocks: Tensor,
        request: Requests = None,
        all_staged: bool = False,
    ) -> None:
        """Give pages that were let in their slots: from staging where `blocks` int32 [L, B, P + 1]
        has them there, or from the mirror, unless they are `all_staged`.
        """
        shape = (self.layers, blocks.shape[1], pages.shape[-1])
        pages, slots = (_by_request(part).expand(shape) for part in (pages, slots))
        slot_page = self._slot_page[:, part_of(request)]
        staging.keep(self.storage, self._of_pool.first.view(-1), slot_page, pages, slots, blocks)
        if not all_staged:
            staged = self._places(blocks, pages) >= 0
            self._admit(pages, torch.where(staged, -1, slots), None, request)

    def _places(self, blocks: Tensor, pages: Tensor) -> Tensor:
        """Of pages [L or 1, B, m] the pool's, int64, by ``blocks``."""
        return blocks.gather(2, torch.where(pages < 0, blocks.shape[2] - 1, pages)).long()

    def _admit(
        self,
        pages: Tensor,
        slots: Tensor,
        staged: Tensor | None,
        request: Requests,
        late: bool = False,
    ) -> None:
        """Copy pages [L or 1, B or 1, m] into slots: within the GPU where they are `staged` in the
        pool, or from the mirror, which is counted.
        """
        part = part_of(request)
        to = torch.where(slots < 0, -1, slots + self._first_slot[:, part])
        if staged is not None:
            self._copies.copy(self._of_pool, staged, to, tuning.COPY_WITHIN)
            to = torch.where(staged >= 0, -1, to)
        source, to = torch.broadcast_tensors(
            torch.where(pages < 0, -1, pages + self._first_page[part]), to
        )
        self._count(to)
        if self.mirrored and late:
            self._late.copy(self._of_mirror, source, to)
        elif self.mirrored:
            self._copies.copy(self._of_mirror, source, to)

    def _count(self, to: Tensor) -> None:
        """Pages that are recalled to [L or 1, B, m], in every layer."""
        self.recalled_pages += (to >= 0).sum() * (self.layers // len(to))

    def read(self, layer: int, blocks: Tensor, ids: Tensor) -> Tensor:
        """float32 [K, C]: entries `ids` [K] through `blocks` [P + 1]; whatever where an id is -1 or
        its page is not there.
        """
        page = blocks[torch.where(ids < 0, -1, ids // self.granularity)]
        return read_entries(
            self.pool[layer],
            self.layout,
            torch.where(page < 0, 0, page) * self.granularity + ids % self.granularity,
        )

    def read_mirror(self, request: int, layer: int, ids: Tensor) -> Tensor:
        """The same straight from the mirror, for measuring what attention would have seen; not
        counted as traffic.
        """
        places = self.page_start[request] * self.granularity + ids.clamp(min=0)
        return read_entries(self.mirror[layer], self.layout, places.to(self.mirror.device)).to(
            self.device
        )

    def _write_pool(
        self, request: int, layer: int, entries: Tensor, numbers: Tensor, table: Tensor
    ) -> None:
        slot = table[torch.where(numbers < 0, -1, numbers // self.granularity)]
        page = slot + self.slot_start[layer][request]
        write_entries(
            self.pool[layer],
            self.layout,
            torch.where(slot < 0, -1, page * self.granularity + numbers % self.granularity),
            entries,
        )


def _by_request(rows: Tensor) -> Tensor:
    """[L, n] -> [L, 1, n]; what is [L, B, n] already stays."""
    return rows[:, None] if rows.ndim == 2 else rows


def _starts(sizes: Iterable[int]) -> list[int]:
    """Offsets of parts laid end to end, and the end."""
    return [0, *accumulate(sizes)]

"""What a policy adds to a CSA layer: masses, pages that are small, a choice among residents alone,
loading misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fmsim.exec.decode.decode_attention import AllEntries
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kv.home import PER_PAGE, Home
from fmsim.exec.kv.resident import ResidentPages
from fmsim.exec.kv.tiered import RequestSize, TieredCache
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.fetching import fetches
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.kernel_cases import TOP_K
from fmsim.exec.measure.module_times import AttentionTimer
from fmsim.exec.measure.sizes import Sizes
from fmsim.exec.measure.timing import median_s, overhead_s
from fmsim.exec.model.attention import Attention

ENTRIES = 8192  # of a request whose attention is timed with and without
Work = Callable[[], object]


def masses_ms(device: str, sizes: Sizes, report: Report) -> dict[int, float]:
    """By batch, what it adds to attention over the smallest pages that it tells its masses."""
    found = {}
    entries = min(sizes.page_entries)
    for batch in sizes.some_batches:
        without, with_masses = (
            median_s(cases.attention(batch, ENTRIES, device, told, per_page=entries).run, device)
            for told in (False, True)
        )
        found[batch] = 1e3 * (with_masses - without)
        report(f"masses, batch {batch}: {found[batch]:+.4f} ms")
    return found


class _InPages(AllEntries):
    """Entries in pages of ``per_page``, and index keys in pages of 64."""

    def __init__(self, per_page: int, attention: Attention, batch: int, entries: int, *layouts):
        super().__init__(attention, batch, entries, *layouts)
        latent, _ = layouts
        self.per_page = per_page
        self.device = attention.kv_proj.weight.device
        self.homes = [Home.of_its_own(latent, batch, entries, self.device, per_page)]


class _Residents(_InPages):
    """Keys in such pages too, and a choice among a list of what is there: all pages, of which each
    request has its own.
    """

    def __init__(self, per_page: int, attention: Attention, batch: int, entries: int, *layouts):
        super().__init__(per_page, attention, batch, entries, *layouts)
        self.key_homes = [Home.of_its_own(self.key, batch, entries, self.device, per_page)]
        n_pages = self.key_homes[0].table.shape[1]
        first = [[request * n_pages for request in range(batch)]]
        self.resident = ResidentPages([n_pages] * batch, first, n_pages, per_page, self.device)
        self.resident.list(torch.randperm(n_pages, device=self.device).int()[None])
        self.resident.see(entries)

    def choose(
        self, queries: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, top_k: int
    ) -> None:
        of = queries[:, 0], weights[:, 0].float()
        self.ids = self.resident.best(0, *of, self.key_homes[0].pool, self.key, top_k)


def in_pages(timer: AttentionTimer, batch: int, sizes: Sizes) -> Iterator[tuple[int, Work]]:
    """A CSA layer at the smallest context, by entries a page; 64 first."""
    tokens = sizes.contexts[0]
    yield PER_PAGE, timer.work(batch, tokens)
    for entries in sizes.page_entries:
        yield entries, timer.work(batch, tokens, pager=partial(_InPages, entries))


def over_residents(
    timer: AttentionTimer, batch: int, count: int, sizes: Sizes
) -> Iterator[tuple[int, Work]]:
    """A CSA layer that selects among ``count`` entries: all there are first, by 0; then residents,
    by entries a page.
    """
    tokens = count * timer.attention.compressor.rate
    yield 0, timer.work(batch, tokens)
    for entries in sizes.resident_pages:
        yield entries, timer.work(batch, tokens, pager=partial(_Residents, entries))


def pages_ms(
    timer: AttentionTimer, device: str, sizes: Sizes, report: Report
) -> dict[int, dict[int, float]]:
    """By entries a page and batch, what a CSA layer takes more than with pages of 64."""
    found: dict[int, dict[int, float]] = {entries: {} for entries in sizes.page_entries}
    for batch in sizes.paged_batches:
        times_s = {at: median_s(work, device) for at, work in in_pages(timer, batch, sizes)}
        for entries, column in found.items():
            column[batch] = 1e3 * (times_s[entries] - times_s[PER_PAGE])
            report(f"pages of {entries}, batch {batch}: {column[batch]:+.4f} ms")
    return found


def residents_ms(
    timer: AttentionTimer, device: str, sizes: Sizes, report: Report
) -> dict[int, dict[int, dict[int, float]]]:
    """By entries a page, batch and resident entries, what a CSA layer that selects among these
    takes more than one that has no others.
    """
    found: dict[int, dict[int, dict[int, float]]] = {}
    for batch in sizes.paged_batches:
        for count in sizes.residents:
            works = over_residents(timer, batch, count, sizes)
            times_s = {at: median_s(work, device) for at, work in works}
            for entries in sizes.resident_pages:
                more_ms = 1e3 * (times_s[entries] - times_s[0])
                found.setdefault(entries, {}).setdefault(batch, {})[count] = more_ms
                report(f"{batch} x {count:,} residents in pages of {entries}: {more_ms:+.4f} ms")
    return found


def staging_ms(
    layout: Layout, device: str, sizes: Sizes, report: Report
) -> dict[int, dict[int, float]]:
    """By batch and pages loaded, one layer's misses: pages of one entry, of TOP_K that a step of a
    request selects, into spare pages of the pool.
    """
    found: dict[int, dict[int, float]] = {}
    alone_s = overhead_s(device)
    for batch in sizes.some_batches:
        found[batch] = {}
        for count, work in zip(sizes.staged, _loads(batch, layout, device, sizes), strict=True):
            found[batch][count] = 1e3 * (median_s(work, device) - alone_s)
            report(f"loading {count} pages each, batch {batch}: {found[batch][count]:.4f} ms")
    return found


def _loads(batch: int, layout: Layout, device: str, sizes: Sizes) -> Iterator[Work]:
    """Of each number in `Sizes.staged`, pages of each request's own."""
    n_pages = sizes.staged_entries
    places = min(TOP_K, n_pages)
    size = RequestSize(n_pages, (1,), places, (0,))
    cache = TieredCache(layout, 1, 1, [size] * batch, device, one_text=True)
    blocks = torch.full((batch, n_pages + 1), -1, dtype=torch.int32, device=device)
    chosen = [torch.randperm(n_pages, device=device)[:places] for _ in range(batch)]
    pages = torch.stack(chosen).sort().values
    for count in sizes.staged:
        fetched = torch.zeros(batch, places, dtype=torch.bool, device=device)
        fetched[:, torch.linspace(0, places - 1, count, device=device).long()] = True
        yield partial(cache.stage, 0, pages, fetched, blocks)


def _attention(batch: int, layout: Layout, device: str, sizes: Sizes) -> Iterator[Work]:
    for told in (False, True):
        yield cases.attention(batch, ENTRIES, device, told, per_page=min(sizes.page_entries)).run


def _others(batch: int, layout: Layout, device: str, sizes: Sizes) -> Iterator[Work]:
    yield from _loads(batch, layout, device, sizes)
    if batch == sizes.some_batches[0]:
        for size, counts in sizes.gathers.items():
            yield cases.recall(size, counts[0], device, host_bytes=2**20).run
        for row, count in sizes.kernel_shapes:
            yield cases.selection(row, count, device).run
            yield cases.memory_scoring(row, count, device).run


def _fetching(batch: int, layout: Layout, device: str, sizes: Sizes) -> Iterator[Work]:
    """With the first batch those of all."""
    for number in sizes.fetching_batches if batch == sizes.some_batches[0] else ():
        for entries in sizes.fetched:
            yield from fetches(number, entries, True, layout, device, sizes)


# what `compile_ahead` launches: all kernels of the functions above at a batch
CASES: dict[str, Callable[[int, Layout, str, Sizes], Iterator[Work]]] = {
    "attention's variants": _attention,
    "loads of misses": _fetching,
    "other kernels": _others,
}

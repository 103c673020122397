"""What a policy adds to a CSA layer: masses, small pages, naming residents, loading misses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fmsim import arrays
from fmsim.exec.kernels.layout import Layout
from fmsim.exec.kv.home import PER_PAGE
from fmsim.exec.kv.tiered import RequestSize, TieredCache
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.fetching import fetches
from fmsim.exec.measure.jobs import Report
from fmsim.exec.measure.kernel_cases import TOP_K
from fmsim.exec.measure.sizes import Sizes
from fmsim.exec.measure.timing import median_s, overhead_s

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


def pages_ms(device: str, sizes: Sizes, report: Report) -> dict[int, dict[int, float]]:
    """By entries a page and batch, what attention takes more than over pages of 64."""
    found: dict[int, dict[int, float]] = {entries: {} for entries in sizes.page_entries}
    for batch in sizes.some_batches:
        of_64_s = median_s(cases.attention(batch, ENTRIES, device).run, device)
        for entries, column in found.items():
            case = cases.attention(batch, ENTRIES, device, per_page=entries)
            column[batch] = 1e3 * (median_s(case.run, device) - of_64_s)
            report(f"pages of {entries}, batch {batch}: {column[batch]:+.4f} ms")
    return found


def listed_ms(device: str, sizes: Sizes, report: Report) -> dict[int, float]:
    """By batch, naming the entries that were selected among those in a list."""
    found = {}
    alone_s = overhead_s(device)
    for batch in sizes.some_batches:
        found[batch] = 1e3 * (median_s(_naming(batch, device), device) - alone_s)
        report(f"naming residents, batch {batch}: {found[batch]:.4f} ms")
    return found


def _naming(batch: int, device: str) -> Work:
    listed = torch.zeros(batch, ENTRIES + 1, dtype=torch.int32, device=device)
    start = arrays.offsets(listed, torch)
    places = torch.randint(0, ENTRIES, (batch, TOP_K), dtype=torch.int32, device=device)
    return lambda: arrays.read(listed, start, places)


def listed_scores(device: str, sizes: Sizes, report: Report) -> dict[int, dict[str, float]]:
    """By entries a page, what scoring residents takes more than with pages of 64, in `StepWork`'s
    fields: fixed, and an entry of a request.
    """
    found = {}
    for entries in sizes.page_entries:
        more = []
        for batch, count in sizes.listed:
            these_s, of_64_s = (
                median_s(cases.index_scoring(batch, count, device, per_page=page).run, device)
                for page in (entries, PER_PAGE)
            )
            more.append(1e3 * (these_s - of_64_s))
            report(f"scores in pages of {entries}, {batch} x {count:,}: {more[-1]:+.4f} ms")
        first, last = (batch * count for batch, count in sizes.listed)
        slope = max(0.0, (more[1] - more[0]) / (last - first))
        found[entries] = {"fixed_ms": more[0] - slope * first, "slot_ns": 1e6 * slope}
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
    yield cases.attention(batch, ENTRIES, device, True, per_page=min(sizes.page_entries)).run
    for entries in (*sizes.page_entries, PER_PAGE):
        yield cases.attention(batch, ENTRIES, device, per_page=entries).run


def _others(batch: int, layout: Layout, device: str, sizes: Sizes) -> Iterator[Work]:
    yield _naming(batch, device)
    yield from _loads(batch, layout, device, sizes)
    if batch == sizes.some_batches[0]:
        for row, count in sizes.listed:
            for entries in (*sizes.page_entries, PER_PAGE):
                yield cases.index_scoring(row, count, device, per_page=entries).run
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

"""Layers with different numbers of slots: every page that is moved lies in its slot, whole, and no
other is touched; nothing is allocated beside what is asked for.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")

from kernel_pools import no_waits, on_each_device

from fmsim.exec.decode.device_tiers import StepTables
from fmsim.exec.kernels.layout import plain
from fmsim.exec.kv.paired import PairedTiers
from fmsim.exec.kv.tiered import RequestSize

GROUPS, TIERED = [0, 1, 1, 2], [1, 3]  # of four layers
PAGES = (9, 7)  # of two requests
ENTRY, KEY = plain(torch.float32, 3), plain(torch.float32, 5)


class Moved:
    """Tiers under random moves, and where each page should lie: `slots[b][g]` page by slot."""

    def __init__(self, seed, granularity, staged, alike, device):
        self.rng = np.random.default_rng(seed)
        self.device, self.staged = device, staged
        self.sizes = [
            RequestSize(
                pages,
                self._by_group(1, pages + 1, alike),
                staged,
                (0, 0, 0) if staged else self._by_group(0, 4, alike),
            )
            for pages in PAGES
        ]
        tiered = [] if staged else TIERED
        self.tiers = PairedTiers(ENTRY, KEY, GROUPS, tiered, granularity, self.sizes, device)
        self.tables = StepTables(self.tiers, 3, max(PAGES), len(PAGES))
        for cache in self.tiers.caches:
            content = self.rng.integers(1, 256, cache.mirror.shape)
            cache.mirror.copy_(torch.from_numpy(content))
        self.slots = [[{} for _ in range(3)] for _ in PAGES]

    def _by_group(self, low, high, alike):
        counts = self.rng.integers(low, high, 3).tolist()
        return tuple([counts[0]] * 3 if alike else counts)

    def there(self, rows):
        """Rows of different lengths, padded with -1, int64 on the device."""
        width = max(1, *map(len, rows))
        padded = [list(row) + [-1] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=self.device)

    def some(self, b, g, most):
        """Up to `most` pages that are not resident."""
        absent = sorted(set(range(PAGES[b])) - set(self.slots[b][g].values()))
        return self.rng.permutation(absent)[: self.rng.integers(0, most + 1)].tolist()

    def placed(self, b, pages):
        """Give pages [g][m] random slots; -> these."""
        slots = []
        for g, row in enumerate(pages):
            slots.append(self.rng.permutation(self.sizes[b].slots[g])[: len(row)].tolist())
            self.slots[b][g].update(zip(slots[-1], row))
        return slots

    def table(self, b):
        """int32 [G, P + 1], as a residency's."""
        table = torch.full((3, PAGES[b] + 1), -1, dtype=torch.int32)
        for g, held in enumerate(self.slots[b]):
            for slot, page in held.items():
                table[g, page] = slot
        return table.to(self.device)

    def check(self):
        """Every resident page in its slot, in every layer of every cache."""
        for cache, layers in zip(self.tiers.caches, (range(len(GROUPS)), TIERED)):
            for number, layer in enumerate(layers):
                for b in range(len(PAGES)):
                    for slot, page in self.slots[b][GROUPS[layer]].items():
                        found = cache.pool[number][cache.slot_start[number][b] + slot]
                        kept = cache.mirror[number, cache.page_start[b] + page]
                        assert torch.equal(found.cpu(), kept), (layer, b, slot, page)


@on_each_device
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    granularity=st.sampled_from([1, 4]),
    alike=st.booleans(),
    late=st.booleans(),
)
def test_recalls_ahead_of_a_decision_or_not(device, seed, granularity, alike, late):
    moved, copied = Moved(seed, granularity, 0, alike, device), np.zeros(2, int)
    for _ in range(4):
        for b, size in enumerate(moved.sizes):
            ahead = [moved.some(b, g, size.ahead[g]) for g in range(3)]
            pages = [moved.some(b, g, size.slots[g]) for g in range(3)]
            slots = moved.placed(b, pages)
            ahead_there, *there = (moved.there(rows) for rows in (ahead, pages, slots))
            width = max(size.ahead)
            with no_waits():
                if width:
                    moved.tiers.recall_ahead(ahead_there[:, :width], b)
                moved.tiers.recall(*there, b, late)
                for layer in range(len(GROUPS)):
                    moved.tiers.wait_for(layer)
            for g in range(3):
                came = len(set(ahead[g]) | set(pages[g]))
                copied += came * np.array([GROUPS.count(g), sum(GROUPS[n] == g for n in TIERED)])
            moved.check()
    assert [int(cache.recalled_pages) for cache in moved.tiers.caches] == copied.tolist()


@on_each_device
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), granularity=st.sampled_from([1, 4]), alike=st.booleans())
def test_misses_are_staged_and_settle(device, seed, granularity, alike):
    moved, fetched = Moved(seed, granularity, 5, alike, device), 0
    entries = moved.tiers.entries
    for _ in range(4):
        missed = [[moved.some(b, g, 5) for g in range(3)] for b in range(len(PAGES))]
        let_in = [
            [row[: moved.sizes[b].slots[g]] for g, row in enumerate(rows)]
            for b, rows in enumerate(missed)
        ]
        for b in range(len(PAGES)):
            moved.tables.show(moved.table(b), b)
        for layer, group in enumerate(GROUPS):
            pages = moved.there([*(rows[group] for rows in missed), range(5)])[:-1]
            blocks = moved.tables.blocks(layer, group)
            with no_waits():
                entries.stage(layer, pages, pages >= 0, blocks)
            for b, rows in enumerate(missed):
                fetched += len(rows[group])
                for page in [*rows[group], *moved.slots[b][group].values()]:
                    found = entries.pool[layer][blocks[b, page].item()]
                    assert torch.equal(
                        found.cpu(), entries.mirror[layer, entries.page_start[b] + page]
                    )
        for b, pages in enumerate(let_in):
            slots = moved.placed(b, pages)
            there = [moved.there(rows) for rows in (pages, slots)]
            with no_waits():
                moved.tiers.settle(*there, moved.tables.rows[:, b : b + 1], b)
        moved.check()
    assert int(entries.staged_pages) == fetched and int(entries.recalled_pages) == 0


def test_each_layer_has_its_own_slots_and_no_byte_more():
    """Pages of 12 bytes, and of 20 for keys: slots of 5, 2, 2 and 3, and as many ahead as 2, 1, 1
    and 1; keys beside the second and the last.
    """
    size = RequestSize(9, (5, 2, 3), 0, (2, 1, 1))
    tiers = PairedTiers(ENTRY, KEY, GROUPS, TIERED, 1, [size])
    assert tiers.slot_bytes == 12 * 12 + 5 * 20
    assert tiers.pool_bytes == 17 * 12 + 7 * 20
    assert [len(pool) for pool in tiers.entries.pool] == [7, 3, 3, 4]
    assert [len(pool) for pool in tiers.keys.pool] == [3, 4]
    tables = StepTables(tiers, 3, 9, 1)
    assert tables.rows.shape == (4, 1, 10) and not tables.stages


def test_residents_are_listed_of_every_group():
    """Of three, the last of which no layer follows."""
    size = RequestSize(9, (2, 2, 2), 0, (0, 0, 0))
    tiers = PairedTiers(ENTRY, KEY, [0, 1], [1], 1, [size])
    tiers.resident.list(torch.tensor([[3, 1], [-1, 4], [5, 6]], dtype=torch.int32))
    assert tiers.resident.entries[:, 0].tolist() == [[1, 3, -1], [4, -1, -1], [5, 6, -1]]

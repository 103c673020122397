"""A whole batch's pages recalled late, many requests at once, lie where each layer that waits for
them looks, and a layer that does not wait has the entries that it looks for; in a CUDA graph too.
A slot that is given to another page meanwhile keeps that page's bytes.
"""

import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")

from kernel_pools import on_each_device

from fmsim.exec.kernels.layout import plain
from fmsim.exec.kv import late
from fmsim.exec.kv.beside import Beside
from fmsim.exec.kv.tiered import RequestSize, TieredCache

LAYERS, BATCH, PAGES, SLOTS, WIDTH = 13, 3, 50, 20, 32
CYCLES = 50_000_000  # of a GPU: longer than a step here


class Held(Beside):
    """What is late comes late: on a CPU when it is `let` go, on a GPU after a while."""

    def __init__(self, device):
        super().__init__(torch.device(device))
        self.works, self.cycles = [], CYCLES

    def late(self, work, *used):
        def after_a_while():
            torch.cuda._sleep(self.cycles)
            work()

        if self.device.type == "cuda":
            super().late(after_a_while, *used)
        else:
            self.works.append(work)

    def let(self):
        while self.works:
            self.works.pop(0)()


def filled(device, even, per_page=1, beside=None):
    slots = tuple(SLOTS - (0 if even else layer % 2) for layer in range(LAYERS))
    size = RequestSize(PAGES, slots, 0, (4,) * LAYERS)
    layout = plain(torch.float32, WIDTH)
    cache = TieredCache(layout, LAYERS, per_page, [size] * BATCH, device, beside=beside)
    content = torch.rand(cache.mirror.view(torch.float32).shape).view(torch.uint8)
    cache.mirror.copy_(content)
    return cache


def drawn(device, generator):
    """Pages and slots [L, B, m], those of a row unlike."""
    pages, slots = (
        torch.stack(
            [torch.randperm(count, generator=generator)[:12] for _ in range(LAYERS * BATCH)]
        )
        for count in (PAGES, SLOTS - 1)
    )
    pages[:, 9:] = slots[:, 9:] = -1
    return [part.view(LAYERS, BATCH, -1).to(device) for part in (pages, slots)]


@on_each_device
@pytest.mark.parametrize("even", [True, False])
def test_each_layer_finds_its_pages_once_it_waited(device, even):
    beside = Held(device) if device == "cuda" else None
    cache, generator = filled(device, even, beside=beside), torch.Generator().manual_seed(1)
    found = torch.zeros(LAYERS, BATCH, 12, cache.page_bytes, dtype=torch.uint8, device=device)
    places = torch.zeros(LAYERS, BATCH, 12, dtype=torch.int64, device=device)

    def read():
        for layer in range(LAYERS):
            cache.wait_for(layer)
            found[layer].copy_(cache.pool[layer][places[layer]])

    if device == "cuda":
        from fmsim.exec.decode.step_state import graph_after_one

        read = graph_after_one(read)
    read()  # as it is, and on a GPU from a graph from now on
    for turn in range(3):
        pages, slots = drawn(device, generator)
        if turn % 2:
            cache.recall_ahead(pages[:, :, :4])
        for layer in range(LAYERS):
            start = torch.tensor(cache.slot_start[layer][:-1], device=device)
            places[layer].copy_(slots[layer].clamp(min=0) + start[:, None])
        cache.recall(pages, slots, late=True)
        read()
        for layer in range(LAYERS):
            for b in range(BATCH):
                page = pages[layer, b, :9].cpu() + cache.page_start[b]
                assert torch.equal(found[layer, b, :9].cpu(), cache.mirror[layer][page]), layer
    assert int(cache.recalled_pages) == 3 * LAYERS * BATCH * 9


@on_each_device
@pytest.mark.parametrize("even", [True, False])
def test_entries_that_a_layer_looks_for_come_before_their_pages(device, even):
    per_page, beside = 4, Held(device)
    cache, generator = filled(device, even, per_page, beside), torch.Generator().manual_seed(2)
    ids = torch.zeros(LAYERS, BATCH, 30, dtype=torch.int32, device=device)
    blocks = torch.full((LAYERS, BATCH, PAGES + 1), -1, dtype=torch.int32, device=device)
    found = torch.zeros(LAYERS, BATCH, 30, WIDTH, device=device)

    def read():
        for layer in range(LAYERS):
            cache.bring(layer, ids[layer], blocks[layer])
            for b in range(BATCH):
                found[layer, b] = cache.read(layer, blocks[layer, b], ids[layer, b])

    if device == "cuda":
        from fmsim.exec.decode.step_state import graph_after_one

        read = graph_after_one(read)
    read()
    for turn in range(3):
        pages, slots = drawn(device, generator)
        if turn % 2:
            cache.recall_ahead(pages[:, :, :4])
        held = torch.randint(0, 9, ids.shape, generator=generator)
        number = torch.randint(0, per_page, ids.shape, generator=generator)
        ids.copy_(pages.cpu().gather(2, held) * per_page + number)
        blocks.fill_(-1)
        for layer in range(LAYERS):
            start = torch.tensor(cache.slot_start[layer][:-1], device=device)[:, None]
            at = (slots[layer, :, :9] + start).int()
            blocks[layer].scatter_(1, pages[layer, :, :9], at)
        cache.recall(pages, slots, late=True)
        read()
        expected = torch.stack(
            [
                torch.stack([cache.read_mirror(b, layer, ids[layer, b]) for b in range(BATCH)])
                for layer in range(LAYERS)
            ]
        )
        assert torch.equal(found, expected)
        beside.let()
        if device == "cuda":
            torch.cuda.synchronize()
        for layer in range(LAYERS):
            assert not cache._late.on_the_way(layer).any()
            for b in range(BATCH):
                block = blocks[layer, b, pages[layer, b, :9]].long()
                whole = cache.pool[layer][block].cpu()
                page = pages[layer, b, :9].cpu() + cache.page_start[b]
                assert torch.equal(whole, cache.mirror[layer][page])


@on_each_device
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("per_page", [1, 64])
def test_a_slot_that_is_given_away_keeps_what_it_got(device, even, per_page):
    """At any moment: before its page is copied, while that is, and after. Each request's recall,
    and what it gives away, leaves the others' alone.
    """
    beside = Held(device)
    cache, generator = filled(device, even, per_page, beside), torch.Generator().manual_seed(3)
    for turn in range(4 if device == "cpu" else 40):
        cycles = int(torch.randint(1, 2 * CYCLES, (), generator=generator))
        beside.cycles = cycles if turn % 2 else 1
        pages, slots = drawn(device, generator)
        for b in range(BATCH):
            cache.recall(pages[:, b], slots[:, b], b, late=True)
        if device == "cuda" and turn % 4 > 1:
            torch.cuda._sleep(beside.cycles)
        given, kept = slots[:, :, :3], slots[:, :, 3:9]
        for b in range(1, BATCH):
            cache.take(given[:, b], b)
            for layer in range(LAYERS):
                cache.pool[layer][given[layer, b] + cache.slot_start[layer][b]] = turn
        if turn % 2:
            beside.let()
        again = torch.roll(given, 1, 2), torch.roll(pages[:, :, :3], 1, 2)  # of the next decision
        cache.recall(again[1][:, 2], again[0][:, 2], 2, late=True)
        beside.let()
        if device == "cuda":
            torch.cuda.synchronize()
        for layer in range(LAYERS):
            assert not cache._late.on_the_way(layer).any()
            for b in range(BATCH):
                first, page = cache.slot_start[layer][b], cache.page_start[b]
                rows = cache.pool[layer][kept[layer, b] + first].cpu()
                assert torch.equal(rows, cache.mirror[layer][pages[layer, b, 3:9].cpu() + page])
                rows = cache.pool[layer][given[layer, b] + first].cpu()
                own = cache.mirror[layer][pages[layer, b, :3].cpu() + page]
                assert torch.equal(rows, own) if b != 1 else (rows == turn).all()


def test_the_first_recall_loads_what_takes_slots_back(monkeypatch):
    """On a GPU a later step would wait for the kernel."""
    taken = []
    monkeypatch.setattr(late, "take_back", lambda waiting, slots: taken.append(slots))
    cache, generator = filled("cpu", True), torch.Generator().manual_seed(1)
    pages, slots = drawn("cpu", generator)
    cache.recall(pages, slots, late=True)
    [none] = taken
    assert (none == -1).all()
    cache.recall(pages, slots, late=True)
    [_, again] = taken
    assert (again >= 0).any()


@on_each_device
def test_one_requests_recall_waits_for_no_others(device):
    """What was launched after both recalls is done while the first of them has not begun."""
    beside = Held(device)
    cache, generator = filled(device, True, beside=beside), torch.Generator().manual_seed(4)
    for cycles in (1, 2_000_000_000):  # the first time kernels are compiled
        beside.cycles = cycles
        pages, slots = drawn(device, generator)
        cache.recall(pages[:, 0], slots[:, 0], 0, late=True)
        cache.take(slots[:, 1], 1)
        cache.recall(pages[:, 1], slots[:, 1], 1, late=True)
        if device == "cpu":
            assert len(beside.works) == 2
            beside.let()
        else:
            torch.cuda.current_stream().synchronize()
            assert cycles == 1 or not cache._late.come()
            torch.cuda.synchronize()
    for layer in range(LAYERS):
        for b in range(2):
            rows = cache.pool[layer][slots[layer, b, :9] + cache.slot_start[layer][b]].cpu()
            page = pages[layer, b, :9].cpu() + cache.page_start[b]
            assert torch.equal(rows, cache.mirror[layer][page])

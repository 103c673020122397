"""A whole batch's pages recalled late, many requests at once, lie where each layer that waits for
them looks; a CUDA graph waits too.
"""

import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")

from kernel_pools import on_each_device

from fmsim.exec.kernels.layout import plain
from fmsim.exec.kv.tiered import RequestSize, TieredCache

LAYERS, BATCH, PAGES, SLOTS, WIDTH = 13, 3, 50, 20, 32


def filled(device, even):
    slots = tuple(SLOTS - (0 if even else layer % 2) for layer in range(LAYERS))
    size = RequestSize(PAGES, slots, 0, (4,) * LAYERS)
    cache = TieredCache(plain(torch.float32, WIDTH), LAYERS, 1, [size] * BATCH, device)
    content = torch.randint(0, 256, cache.mirror.shape, dtype=torch.uint8)
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
    cache, generator = filled(device, even), torch.Generator().manual_seed(1)
    found = torch.zeros(LAYERS, BATCH, 12, cache.page_bytes, dtype=torch.uint8, device=device)
    places = torch.zeros(LAYERS, BATCH, 12, dtype=torch.int64, device=device)

    def read():
        for layer in range(LAYERS):
            cache.wait_for(layer)
            found[layer].copy_(cache.pool[layer][places[layer]])

    if device == "cuda":
        from fmsim.exec.decode.step_state import graph_after_one

        read = graph_after_one(read)
    for turn in range(4):  # the first as it is, the others from a graph
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
    assert int(cache.recalled_pages) == 4 * LAYERS * BATCH * 9

"""FlashMLA on our own pools: the lists of slots that it takes, and where it is installed what it
makes of them.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the kernels need fmsim[model]")

from kernel_pools import on_each_device, relative_error, scattered_pool

from fmsim.exec.kernels.attention import flash_mla
from fmsim.exec.kernels.attention.rows import Rows
from fmsim.exec.kernels.attention.sparse_attention import (
    sparse_attention_reference,
    sparse_attention_triton,
)
from fmsim.exec.kernels.layout import LATENT, write_entries


def drawn(seed, batch, window, per_page, entries, selected, missing):
    """Rows of packed latents, some of whose pages are not there."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, entries, LATENT.width, generator=generator)
    pool, table = scattered_pool(values, LATENT, per_page, missing, generator)
    near = LATENT.new_pool(batch, window)
    tokens = torch.randn(batch * window, LATENT.width, generator=generator)
    write_entries(near, LATENT, torch.arange(batch * window), tokens)
    lengths = torch.randint(1, window + 1, (batch,), generator=generator, dtype=torch.int32)
    ids = torch.stack(
        [torch.randperm(entries, generator=generator)[:selected] for _ in range(batch)]
    ).int()
    ids[:, selected - selected // 5 :] = -1
    return Rows(LATENT, near, lengths, pool, table, ids)


def moved(rows, device):
    return Rows(rows.layout, *(part.to(device) for part in rows[1:]))


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    window=st.sampled_from([64, 128]),
    per_page=st.sampled_from([1, 4, 64]),
    selected=st.sampled_from([0, 1, 64, 90]),
)
def test_the_lists_name_what_is_there(device, seed, batch, window, per_page, selected):
    rows = drawn(seed, batch, window, per_page, 100, selected, 0.3)
    expected = flash_mla.listed_reference(rows)
    found = flash_mla.listed_triton(moved(rows, device))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
    near, slots = expected
    assert slots.shape[1] % flash_mla.LISTED == 0 and slots.shape[1] >= selected
    assert (near >= 0).sum(1).tolist() == rows.window_lengths.tolist()


def test_it_does_not_serve_a_cpu():
    rows = drawn(1, 32, 128, 64, 100, 64, 0.0)
    assert not flash_mla.serves(32, 64, LATENT, rows.window, rows.pool, rows.count)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "batch, selected",
    [(4, 4100), (9, 1100), *((batch, n) for batch in (16, 97) for n in (0, 90, 512, 4100))],
)
@pytest.mark.parametrize("per_page", [4, 64])
def test_it_attends_as_the_reference(batch, per_page, selected):
    if flash_mla.package() is None:
        pytest.skip("sgl-flash-mla is not installed")
    rows = moved(drawn(7, batch, 128, per_page, max(selected, 64), selected, 0.1), "cuda")
    heads = 64
    queries = torch.randn(batch, heads, LATENT.width, device="cuda").bfloat16()
    sinks = torch.randn(heads, device="cuda")
    assert flash_mla.serves(batch, heads, LATENT, rows.window, rows.pool, rows.count)
    expected, _ = sparse_attention_reference(queries, rows, sinks, 0.05)
    found, masses = sparse_attention_triton(queries, rows, sinks, 0.05)
    assert masses is None and found.dtype == queries.dtype
    assert relative_error(found, expected) < 1e-2
    again, _ = sparse_attention_triton(queries, rows, sinks, 0.05)
    assert torch.equal(found, again)

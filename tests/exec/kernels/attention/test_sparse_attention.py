"""Sparse decode attention: the kernel against its reference over random shapes, and the reference
against the model's.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import behind, on_each_device, relative_error, scattered_pool

from fmsim.exec.kernels.attention.rows import Rows, balanced_splits
from fmsim.exec.kernels.attention.sparse_attention import (
    sparse_attention_reference,
    sparse_attention_triton,
)
from fmsim.exec.kernels.layout import LATENT, plain, write_entries
from fmsim.exec.kernels.tuning import AttentionTuning, GatheredAttentionTuning
from fmsim.exec.model.attention import Attention as ModelAttention
from fmsim.exec.model.kinds import CSA
from fmsim.nano.config import nano_config

IN_PLACE = AttentionTuning(block_heads=16, block_rows=16, programs=12)
WHOLE = AttentionTuning(block_heads=32, block_rows=16, programs=1)
GATHERED = GatheredAttentionTuning(gather_rows=8, block_heads=16, block_rows=16, programs=12)

each_way = pytest.mark.parametrize(
    "tune",
    [IN_PLACE, WHOLE, GATHERED],
    ids=["in place", "unsplit", "gathered"],
)


def draw(seed, batch, heads, layout, dtype, window, per_page, entries, selected, missing):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, layout.width, generator=generator).to(dtype)
    rows = torch.randn(batch, entries, layout.width, generator=generator)
    pool, table = scattered_pool(rows, layout, per_page, missing, generator)
    # a window beyond its length is whatever a former request left there: any bytes, not even
    # numbers
    near = torch.randint(
        0, 256, (batch, window * layout.entry_bytes), dtype=torch.uint8, generator=generator
    )
    lengths = torch.randint(0, window + 1, (batch,), generator=generator).to(torch.int32)
    for b, length in enumerate(lengths.tolist()):
        write_entries(
            near[b : b + 1],
            layout,
            torch.arange(length),
            torch.randn(length, layout.width, generator=generator),
        )
    ids = torch.stack(
        [torch.randperm(entries, generator=generator)[:selected] for _ in range(batch)]
    )
    ids = torch.nn.functional.pad(ids, (0, selected - ids.shape[1]), value=-1).to(torch.int32)
    sinks = torch.randn(heads, generator=generator)
    return queries, Rows(layout, near, lengths, pool, table, ids), sinks, layout.width**-0.5


def moved(rows: Rows, device) -> Rows:
    return Rows(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in rows))


def test_the_reference_is_the_models_attention():
    """The model's own `_attend`, given the same window and entries: output and masses."""
    torch.manual_seed(0)
    config = nano_config()
    attention = ModelAttention(config, CSA)
    attention.sinks.data.normal_()
    queries, rows, _, scale = draw(
        3, 1, 6, plain(torch.float32, 64), torch.float32, 128, 4, 50, 30, 0.0
    )
    rows = rows._replace(window_lengths=torch.tensor([128], dtype=torch.int32))
    near = torch.randn(128, 64)
    write_entries(rows.window, rows.layout, torch.arange(128), near)
    slots = rows.table[0, rows.ids[0].long() // 4].long() * 4 + rows.ids[0] % 4
    chosen = rows.pool.view(torch.float32).view(-1, 64)[slots]
    # one query, whose window is the last 128 of 129 keys
    local = torch.cat((torch.zeros(1, 64), near))[None, None]
    window_logits = attention._window_logits(queries[:, None], local, 128)
    entry_logits = torch.einsum("bhc,kc->bhk", queries, chosen)[:, None] * scale
    expected, masses = attention._attend(
        queries[:, None], window_logits, local, entry_logits, chosen[None, None]
    )
    out, found = sparse_attention_reference(queries, rows, attention.sinks, scale, want_masses=True)
    torch.testing.assert_close(out, expected[:, 0].detach())
    for got, want in zip(found, masses, strict=True):
        torch.testing.assert_close(got, want[:, 0].detach())


@on_each_device
@each_way
@settings(max_examples=40 if torch.cuda.is_available() else 5, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 2),
    kind=st.sampled_from(["v4", "nano float32", "nano bfloat16"]),
    window=st.sampled_from([1, 8, 40]),
    per_page=st.sampled_from([1, 4, 64]),
    entries=st.integers(1, 130),
    selected=st.sampled_from([0, 1, 33, 64]),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    masses=st.booleans(),
    turned=st.booleans(),
    known=st.booleans(),
)
def test_the_kernel_is_the_reference(
    device,
    tune,
    seed,
    batch,
    kind,
    window,
    per_page,
    entries,
    selected,
    missing,
    masses,
    turned,
    known,
):
    dtype = torch.float32 if kind == "nano float32" else torch.bfloat16
    layout, heads = (LATENT, 20) if kind == "v4" else (plain(dtype, 64), 6)
    queries, rows, sinks, scale = draw(
        seed, batch, heads, layout, dtype, window, per_page, entries, selected, missing
    )
    queries, rows, sinks = queries.to(device), moved(rows, device), sinks.to(device)
    rows = rows._replace(pool=behind(seed % 4, rows.pool, device))
    turn = None
    if turned:
        angles = torch.linspace(0, 3 + seed % 7, batch * 8, device=device).view(batch, 8)
        turn = angles.cos(), angles.sin()
    expected, wanted = sparse_attention_reference(queries, rows, sinks, scale, masses, turn)
    found, got = sparse_attention_triton(
        queries, rows, sinks, scale, masses, turn, known=known, tune=tune
    )
    assert found.dtype == queries.dtype
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 8e-3)
    if masses:
        for have, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            got.entries.sum(1) + got.window + got.sink, torch.ones(batch, device=device)
        )
    else:
        assert got is None and wanted is None


@on_each_device
@each_way
@pytest.mark.parametrize("programs", [1, 4, 64])
def test_splits_change_nothing(device, tune, programs):
    queries, rows, sinks, scale = draw(
        5, 1, 6, plain(torch.float32, 64), torch.float32, 40, 4, 100, 64, 0.2
    )
    queries, rows, sinks = queries.to(device), moved(rows, device), sinks.to(device)
    expected, _ = sparse_attention_reference(queries, rows, sinks, scale)
    found, _ = sparse_attention_triton(
        queries, rows, sinks, scale, tune=tune._replace(programs=programs)
    )
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("blocks", "runs", "splits"),
    [(66, 64, 2), (66, 97, 4), (66, 70, 3), (10, 97, 1), (66, 16, 8), (1, 3, 1)],
)
def test_splits_fill_the_last_turn_where_parts_are_long(blocks, runs, splits):
    """97 runs of 66 blocks on 132 processors: whole, one turn of 66; in four parts three turns of
    17, the third of which is nearly full.
    """
    assert balanced_splits(blocks, runs, 132) == splits


@on_each_device
@each_way
def test_with_nothing_to_attend_to_the_output_is_zero(device, tune):
    queries, rows, sinks, scale = draw(
        6, 1, 6, plain(torch.float32, 64), torch.float32, 8, 4, 16, 8, 1.0
    )
    rows = moved(rows._replace(window_lengths=torch.zeros(1, dtype=torch.int32)), device)
    out, masses = sparse_attention_triton(
        queries.to(device), rows, sinks.to(device), scale, True, tune=tune
    )
    assert (
        (out == 0).all()
        and masses.sink.item() == pytest.approx(1.0)
        and (masses.entries == 0).all()
    )

"""Index scoring: the kernel against its reference over random shapes, and the reference against the
model's formula.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import behind, on_each_device, scattered_pool

from fmsim.exec.kernels.layout import KEY, plain
from fmsim.exec.kernels.selection.index_score import (
    index_scores_reference,
    index_scores_triton,
    index_weights_reference,
    index_weights_triton,
    new_scores,
)
from fmsim.exec.kernels.tuning import IndexScoresTuning
from fmsim.exec.model.indexer import index_scores

SMALL = IndexScoresTuning(block_entries=64, programs=6, run_blocks=2, fewest_runs=1)
# Hopper's matrix units add float8 products with some 14 bits, not 24: 2.6e-4 of the scores were
# seen on an H100. The interpreter does not.
FLOAT8_PRODUCTS = 1e-3


def draw(seed, batch, heads, layout, per_page, entries, missing, dtype):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, layout.width, generator=generator).to(dtype)
    weights = torch.randn(batch, heads, generator=generator)
    keys = (
        torch.randn(batch, entries, layout.width, generator=generator)
        * torch.logspace(-2, 2, entries)[:, None]
    )
    pool, table = scattered_pool(keys, layout, per_page, missing, generator)
    lengths = torch.randint(0, entries + 1, (batch,), generator=generator).to(torch.int32)
    lengths[0] = entries
    return queries, weights, pool, layout, table, lengths


def test_the_reference_is_the_models_formula():
    queries, weights, pool, layout, table, lengths = draw(
        0, 2, 4, plain(torch.float32, 32), 4, 40, 0.0, torch.float32
    )
    keys = torch.stack([pool[table[b].long()].view(torch.float32).view(40, 32) for b in range(2)])
    expected = index_scores(queries[:, None], weights[:, None], keys)[:, 0]
    found = index_scores_reference(queries, weights, pool, layout, table, lengths).scores
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[b, :length], expected[b, :length])


@on_each_device
def test_weights_are_a_part_of_longer_rows(device):
    projected = torch.randn(3, 1, 80, device=device).bfloat16()[..., 11:75]
    found = index_weights_triton(projected, 0.3)
    assert torch.equal(found, index_weights_reference(projected, 0.3))


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    heads=st.sampled_from([4, 16, 64]),
    per_page=st.sampled_from([1, 4, 64]),
    entries=st.integers(1, 300),
    missing=st.sampled_from([0.0, 0.3]),
    kind=st.sampled_from(["fp8", "fp8 queries", "bfloat16", "float32"]),
)
def test_the_kernel_is_the_reference(device, seed, batch, heads, per_page, entries, missing, kind):
    layout = plain(getattr(torch, kind), 32) if hasattr(torch, kind) else KEY
    dtype = {"fp8 queries": torch.float8_e4m3fn, "float32": torch.float32}.get(kind, torch.bfloat16)
    given_ = [
        part.to(device) if isinstance(part, torch.Tensor) else part
        for part in draw(seed, batch, heads, layout, per_page, entries, missing, dtype)
    ]
    given_[2] = behind(seed % 4, given_[2], device)
    expected, found = index_scores_reference(*given_), index_scores_triton(*given_, tune=SMALL)
    queries, weights, *rest = given_
    # what the heads add up to before they cancel: rounding is relative to it
    added = index_scores_reference(queries, weights.abs(), *rest)
    limit = FLOAT8_PRODUCTS if kind == "fp8 queries" and device == "cuda" else 1e-5
    for want, got, size in zip(expected, found, added, strict=True):
        assert torch.equal(want.isinf(), got.isinf())
        finite = ~want.isinf()
        assert (got - want)[finite].norm() <= limit * size[finite].norm()


@on_each_device
def test_what_lies_beyond_a_length_stays(device):
    parts = draw(1, 2, 16, KEY, 4, 100, 0.0, torch.bfloat16)
    queries, weights, pool, layout, table, _ = (
        part.to(device) if isinstance(part, torch.Tensor) else part for part in parts
    )
    out = new_scores(2, 100, device)
    out.scores.fill_(7.0)
    out.maxima.fill_(7.0)
    index_scores_triton(
        queries,
        weights,
        pool,
        layout,
        table,
        torch.tensor([33, 0], dtype=torch.int32, device=device),
        out,
        tune=SMALL,
    )
    assert (
        (out.scores[0, 33:] == 7).all()
        and (out.scores[1] == 7).all()
        and (out.scores[0, :33] != 7).all()
    )
    assert (out.maxima[0, 2:] == 7).all() and (out.maxima[1] == 7).all()
    assert out.maxima[0, 1] == out.scores[0, 32] and out.maxima[0, 0] == out.scores[0, :32].max()

"""Memory-indexer scoring over layers: the kernel against its reference, and the reference against
the scorer of the simulator.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error, scattered_pool

from fmsim.exec.kernels.layout import KEY, plain, read_entries, slots_of
from fmsim.exec.kernels.selection.memory_score import memory_scores_reference, memory_scores_triton
from fmsim.exec.kernels.tuning import IndexScoresTuning
from fmsim.indexer import scorer
from fmsim.indexer.scorer import LayerWeights, ScorerConfig

SMALL = IndexScoresTuning(block_entries=64, programs=4)


def draw(seed, layers, batch, heads, layout, dtype, entries, missing):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(layers, batch, heads, layout.width, generator=generator).to(dtype)
    weights = torch.randn(layers, batch, heads, generator=generator)
    pools = [
        scattered_pool(
            torch.randn(batch, entries, layout.width, generator=generator),
            layout,
            4,
            missing,
            generator,
        )
        for _ in range(layers)
    ]
    lengths = torch.randint(0, entries + 1, (batch,), generator=generator).to(torch.int32)
    lengths[0] = entries
    return (
        queries,
        weights,
        [pool for pool, _ in pools],
        layout,
        [table for _, table in pools],
        lengths,
    )


def test_the_reference_is_the_simulators_scorer():
    """From the hidden states on: `scorer.layer_logits` and `combine`, as the lsa policy calls
    them.
    """
    rng = np.random.default_rng(0)
    config, heads, size, layout = (
        ScorerConfig(rope_dims=16, rope_theta=160_000.0, hadamard=True),
        8,
        32,
        plain(torch.float32, 32),
    )
    layers = [
        LayerWeights(
            *(
                rng.standard_normal(shape, np.float32)
                for shape in ((24, 48), (24,), (heads * size, 24), (heads, 48))
            )
        )
        for _ in range(3)
    ]
    hidden = rng.standard_normal((3, 48), np.float32)
    _, _, pools, _, tables, lengths = draw(0, 3, 1, heads, layout, torch.float32, 50, 0.0)
    slots = [slots_of(table, torch.arange(50)[None], 4)[0] for table in tables]
    keys = [
        read_entries(pool, layout, slot).numpy() for pool, slot in zip(pools, slots, strict=True)
    ]
    made = [scorer.queries(weights, config, hidden[n], 1234) for n, weights in enumerate(layers)]
    queries, weights = (
        torch.from_numpy(np.stack(parts))[:, None] for parts in zip(*made, strict=True)
    )
    for how in ("max", "mean"):
        expected = scorer.combine(scorer.layer_logits(layers, config, hidden, 1234, keys), how)
        found = memory_scores_reference(
            queries, weights, pools, layout, tables, lengths, how
        ).scores[0, :50]
        torch.testing.assert_close(found, torch.from_numpy(expected))


@on_each_device
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(1, 4),
    batch=st.integers(1, 2),
    heads=st.sampled_from([32, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float8_e4m3fn]),
    entries=st.integers(1, 200),
    missing=st.sampled_from([0.0, 0.3]),
    how=st.sampled_from(["max", "mean"]),
)
def test_the_kernel_is_the_reference(
    device, seed, layers, batch, heads, dtype, entries, missing, how
):
    queries, weights, pools, layout, tables, lengths = draw(
        seed, layers, batch, heads, KEY, dtype, entries, missing
    )
    pools, tables = ([part.to(device) for part in parts] for parts in (pools, tables))
    given_ = queries.to(device), weights.to(device), pools, layout, tables, lengths.to(device), how
    expected, found = memory_scores_reference(*given_), memory_scores_triton(*given_, tune=SMALL)
    # a GPU adds float8's products up in fewer bits than float32 has
    limit = 1e-3 if dtype == torch.float8_e4m3fn and device == "cuda" else 1e-5
    for want, got in zip(expected, found, strict=True):
        assert torch.equal(want.isinf(), got.isinf())
        finite = ~want.isinf()
        assert not finite.any() or relative_error(got[finite], want[finite]) < limit

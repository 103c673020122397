"""Compression and append: the kernel against its reference, and the reference against the model's
compressor, token by token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error

from fmsim.exec.kernels.compress import (
    Pooling,
    compress_and_append_reference,
    compress_and_append_triton,
)
from fmsim.exec.kernels.layout import KEY, LATENT, plain, read_entries
from fmsim.exec.model.cache import CompressorState
from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.model.norm_rope import inverse_frequencies
from fmsim.indexer.scorer import hadamard_matrix
from fmsim.nano.config import nano_config

LAYOUTS = {
    "latent": LATENT,
    "key": KEY,
    "float32": plain(torch.float32, 64),
    "bfloat16": plain(torch.bfloat16, 32),
}


def rotation(
    starts: torch.Tensor, pooling: Pooling, tokens: int, inv_freq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    entry = starts[:, None] // pooling.rate + torch.arange(
        pooling.most_closed(tokens), device=starts.device
    )
    angles = (entry * pooling.rate)[..., None].float() * inv_freq
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", [CSA, HCA])
def test_the_reference_is_the_models_compressor(kind, dtype, limit):
    """A prompt in two chunks, then tokens one by one, across several entries' ends.

    Bias and norm stay float32, as the loader keeps them.
    """
    torch.manual_seed(0)
    config = nano_config()
    model = Compressor(config, kind, 64, overlapping=kind == CSA).requires_grad_(False)
    model.position_bias.normal_()
    model.kv_norm.weight.uniform_(0.5, 1.5)
    for projection in (model.kv_proj, model.gate_proj):
        projection.to(dtype)
    inv_freq, layout = inverse_frequencies(config, "compress"), plain(torch.float32, 64)
    lengths = [3 * model.rate + 2, 1, model.rate - 1, *[1] * (model.rate + 3)]
    x = torch.randn(1, sum(lengths), config.hidden_size).to(dtype)
    expected = model.compress(
        x, None, inv_freq, CompressorState(torch.zeros(1, 20, 64, dtype=dtype))
    )
    pooling = Pooling(
        model.rate,
        2 if kind == CSA else 1,
        model.position_bias,
        model.kv_norm.weight,
        config.rms_norm_eps,
    )
    ring, pool, table, start = (
        pooling.new_ring(1, dtype),
        layout.new_pool(5, 4),
        torch.tensor([[2, 0, 4, 1, 3]], dtype=torch.int32),
        0,
    )
    for length in lengths:
        part, starts = x[:, start : start + length], torch.tensor([start], dtype=torch.int32)
        turn = rotation(starts, pooling, length, inv_freq)
        compress_and_append_reference(
            model.kv_proj(part),
            model.gate_proj(part),
            starts,
            pooling,
            ring,
            turn,
            pool,
            layout,
            table,
        )
        start += length
    ids = torch.arange(expected.shape[1])
    found = read_entries(pool, layout, table[0, ids // 4].long() * 4 + ids % 4)
    assert expected.dtype == dtype and relative_error(found, expected[0]) < limit


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(list(LAYOUTS)),
    series=st.integers(1, 2),
    rate=st.sampled_from([4, 16]),
    batch=st.integers(1, 2),
    tokens=st.sampled_from([1, 2, 9, 40]),
    per_page=st.sampled_from([1, 4]),
    missing=st.sampled_from([0.0, 0.3]),
    hadamard=st.booleans(),
    apart=st.booleans(),
)
def test_the_kernel_is_the_reference(
    device, seed, kind, series, rate, batch, tokens, per_page, missing, hadamard, apart
):
    """``apart``: kv and gate are parts of longer rows, as a product of several projections at once
    gives them.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    layout, pages = LAYOUTS[kind], 20
    width = layout.width
    matrix = (
        torch.from_numpy(hadamard_matrix(width)).to(device) if hadamard and width < 512 else None
    )
    pooling = Pooling(rate, series, random(rate, series * width), random(width), 1e-6, matrix)
    rows = [
        random(batch, tokens, series * width + more * apart).to(torch.bfloat16) for more in (16, 48)
    ]
    kv, gate = (part[..., : series * width] for part in rows)
    starts = torch.randint(0, 3 * rate, (batch,), generator=generator).to(device, torch.int32)
    rings = [pooling.new_ring(batch, torch.bfloat16) for _ in range(2)]
    rings[0].kv.copy_(random(*rings[0].kv.shape)), rings[0].gate.copy_(random(*rings[0].gate.shape))
    rings[1].kv.copy_(rings[0].kv), rings[1].gate.copy_(rings[0].gate)
    table = torch.randperm(batch * pages, generator=generator).view(batch, pages).to(torch.int32)
    table = table.masked_fill(torch.rand(table.shape, generator=generator) < missing, -1).to(device)
    turn = rotation(starts, pooling, tokens, torch.logspace(0, -4, 8, device=device))
    pools = [
        torch.full(
            (batch * pages, per_page * layout.entry_bytes), 0x3C, dtype=torch.uint8, device=device
        )
        for _ in range(2)
    ]
    compress_and_append_reference(
        kv, gate, starts, pooling, rings[0], turn, pools[0], layout, table
    )
    compress_and_append_triton(kv, gate, starts, pooling, rings[1], turn, pools[1], layout, table)
    assert torch.equal(rings[0].kv, rings[1].kv) and torch.equal(rings[0].gate, rings[1].gate)
    slots = torch.arange(batch * pages * per_page, device=device)
    expected, found = (read_entries(pool, layout, slots) for pool in pools)
    untouched = (pools[0] == 0x3C).all(1)
    assert torch.equal(untouched, (pools[1] == 0x3C).all(1))
    # float32 sums in another order may round to the neighbouring code, now and then; and the
    # interpreter cuts bfloat16 off, by up to one step
    limit = 1e-6 if kind == "float32" else 2**-7
    assert relative_error(found, expected) < limit

"""Compression and append: the kernel against its reference, and the reference against the model's
compressor, token by token.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error

from fmsim.exec.kernels.layout import KEY, LATENT, plain, read_entries
from fmsim.exec.kernels.norms.norm_rope import Turn
from fmsim.exec.kernels.pages.compress import (
    Append,
    Pooling,
    Ring,
    append_reference,
    append_triton,
)
from fmsim.exec.model.cache import CompressorState
from fmsim.exec.model.compressor import Compressor
from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.model.norm_rope import inverse_frequencies
from fmsim.nano.config import nano_config

LAYOUTS = {
    "latent": LATENT,
    "key": KEY,
    "float32": plain(torch.float32, 64),
    "bfloat16": plain(torch.bfloat16, 32),
}


def turn_of(positions: torch.Tensor, rate: int, inv_freq: torch.Tensor) -> Turn:
    angles = (positions // rate * rate)[:, None, None].float() * inv_freq
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", [CSA, HCA])
def test_the_reference_is_the_models_compressor(kind, dtype, limit):
    """Token by token, across several entries' ends. Bias and norm stay float32, as the loader keeps
    them.
    """
    torch.manual_seed(0)
    config = nano_config()
    model = Compressor(config, kind, 64, overlapping=kind == CSA).requires_grad_(False)
    model.position_bias.normal_()
    model.kv_norm.weight.uniform_(0.5, 1.5)
    for projection in (model.kv_proj, model.gate_proj):
        projection.to(dtype)
    inv_freq, layout = inverse_frequencies(config, "compress"), plain(torch.float32, 64)
    x = torch.randn(1, 3 * model.rate + 2, config.hidden_size).to(dtype)
    state = CompressorState(torch.zeros(1, 20, 64, dtype=dtype))
    expected = model.compress(x, None, inv_freq, state)
    pooling = Pooling(
        model.rate,
        2 if kind == CSA else 1,
        model.position_bias,
        model.kv_norm.weight,
        config.rms_norm_eps,
    )
    ring, pool = pooling.new_ring(1, dtype), layout.new_pool(5, 4)
    table = torch.tensor([[2, 0, 4, 1, 3]], dtype=torch.int32)
    kvs, gates = model.kv_proj(x), model.gate_proj(x)
    for token in range(x.shape[1]):
        at, new = torch.tensor([token], dtype=torch.int32), slice(token, token + 1)
        turn = turn_of(at, model.rate, inv_freq)
        of = Append(kvs[:, new], gates[:, new], pooling, ring, turn, pool, layout, table)
        append_reference([of], at)
    ids = torch.arange(expected.shape[1])
    found = read_entries(pool, layout, table[0, ids // 4].long() * 4 + ids % 4)
    assert expected.dtype == dtype and relative_error(found, expected[0]) < limit


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.lists(
        st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from([1, 4, 16]), st.integers(1, 2)),
        min_size=1,
        max_size=3,
    ),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 5),
    per_page=st.sampled_from([1, 4]),
    missing=st.sampled_from([0.0, 0.3]),
    apart=st.booleans(),
    alongside=st.booleans(),
)
def test_the_kernel_is_the_reference(
    device, seed, kinds, batch, tokens, per_page, missing, apart, alongside
):
    """Some tokens, one by one, from rings of any content on. ``apart``: kv and gate are parts of
    longer rows, as a product of several projections at once gives them.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    def made(kind, rate, series):
        layout, pages = LAYOUTS[kind], 20
        bias, norm = random(rate, series * layout.width), random(layout.width)
        pooling = Pooling(rate, series, bias, norm, 1e-6)
        ring = pooling.new_ring(batch, torch.bfloat16)
        for part in ring:
            part.copy_(random(*part.shape))
        table = torch.randperm(batch * pages, generator=generator).view(batch, pages)
        gone = torch.rand(table.shape, generator=generator) < missing
        table = table.masked_fill(gone, -1).to(device, torch.int32)
        shape = (batch * pages, per_page * layout.entry_bytes)
        pool = torch.full(shape, 0x3C, dtype=torch.uint8, device=device)
        return Append(None, None, pooling, ring, None, pool, layout, table)

    def again(of):
        return of._replace(ring=Ring(*(part.clone() for part in of.ring)), pool=of.pool.clone())

    ways = [made(*kind) for kind in kinds], []
    ways[1].extend(again(of) for of in ways[0])
    start = torch.randint(0, 20 - tokens, (batch,), generator=generator).to(device, torch.int32)
    inv_freq = torch.logspace(0, -4, 8, device=device)
    for at in range(tokens):
        new = []
        for of in ways[0]:
            width = of.pooling.series * of.pooling.width
            rows = [random(batch, 1, width + more * apart).bfloat16() for more in (16, 48)]
            turn = turn_of(start + at, of.pooling.rate, inv_freq)
            new.append({"kv": rows[0][..., :width], "gate": rows[1][..., :width], "rotation": turn})
        for run, way in zip((append_reference, append_triton), ways, strict=True):
            given = [of._replace(**token) for of, token in zip(way, new, strict=True)]
            run(given, start + at, alongside)
    for one, other in zip(*ways, strict=True):
        assert all(map(torch.equal, one.ring, other.ring))
        slots = torch.arange(len(one.pool) * per_page, device=device)
        expected, found = (read_entries(of.pool, one.layout, slots) for of in (one, other))
        assert torch.equal((one.pool == 0x3C).all(1), (other.pool == 0x3C).all(1))
        # float32 sums in another order may round to the neighbouring code, now and then; and the
        # interpreter cuts bfloat16 off, by up to one step
        limit = 1e-6 if one.layout == LAYOUTS["float32"] else 2**-7
        assert relative_error(found, expected) < limit

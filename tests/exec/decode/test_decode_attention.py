"""A layer's decode step from kernels (here their references) against the model's attention, token
by token.
"""

import pytest
import torch
from kernel_pools import on_each_device, relative_error

from fmsim.exec.decode.decode_attention import DecodeAttention
from fmsim.exec.kernels.layout import plain
from fmsim.exec.kernels.norms.rounded_rows import round_rows
from fmsim.exec.measure.timing import captured
from fmsim.exec.model.attention import Attention
from fmsim.exec.model.cache import CompressorState, LayerCache
from fmsim.exec.model.kinds import CSA, HCA, SLIDING
from fmsim.exec.model.weights.quantised import fill_float8, hold_float8, published_float8
from fmsim.nano.config import nano_config


@pytest.mark.parametrize(
    ("kind", "float8"), [(SLIDING, False), (CSA, False), (CSA, True), (HCA, True)]
)
@torch.inference_mode()
def test_it_is_the_models_attention(kind, float8):
    """Across the window's end and 128-token entries; more CSA entries close than the indexer may
    take.

    Two sequences of different lengths.
    """
    torch.manual_seed(0)
    config = nano_config()
    config.index_topk, config.index_n_heads = (
        20,
        16,
    )  # of many heads some respond, so no two scores are equally zero
    attention = Attention(config, kind)
    attention.sinks.normal_()
    if float8:
        hold_float8(attention, published_float8(attention))
        fill_float8(attention)
    tokens, lag = 140, 10
    decode = DecodeAttention(attention, 2, 200, plain(torch.float32, 64), plain(torch.float32, 32))
    inputs = torch.randn(2, tokens, config.hidden_size)

    def cache() -> LayerCache:
        kv = None if kind == SLIDING else CompressorState(torch.zeros(1, 100, 64))
        return LayerCache(
            kv=kv, index=CompressorState(torch.zeros(1, 100, 32)) if kind == CSA else None
        )

    if kind == CSA:
        decode.pager.wants_masses = True
    caches = [cache(), cache()]
    for step in range(tokens):
        late = max(step - lag, 0)  # the second sequence starts again and again, then runs behind
        if late == 0:
            caches[1] = cache()
        positions = torch.tensor([step, late])
        x = torch.stack([inputs[0, step], inputs[1, late]])[:, None]
        expected = [attention(x[b : b + 1], positions[b].view(1, 1), caches[b]) for b in range(2)]
        found = decode(x, positions.to(torch.int32))
        torch.testing.assert_close(
            found, torch.cat([out for out, _ in expected]), rtol=1e-4, atol=1e-5
        )
        if kind == CSA:
            ids, masses = decode.pager.ids, decode.pager.masses
            for b, (_, access) in enumerate(expected):
                count = int((ids[b] >= 0).sum())
                assert ids[b, :count].tolist() == access.ids[0, 0, :count].tolist()
                torch.testing.assert_close(
                    masses.entries[b, :count], access.mass[0, 0, :count], rtol=1e-4, atol=1e-6
                )


@on_each_device
@torch.inference_mode()
def test_rows_are_rounded_where_they_are_made(device):
    """Of 17 sequences: the result is as if each product rounded its own input."""
    torch.manual_seed(0)
    config = nano_config()
    config.o_groups, config.o_lora_rank = 3, 128  # whole scales
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    attention = Attention(config, CSA).to(device, dtype)
    hold_float8(attention, published_float8(attention), float8_rows=True)
    fill_float8(attention)
    layouts = plain(dtype, 64), plain(dtype, 32)
    there, apart = (DecodeAttention(attention, 17, 200, *layouts) for _ in range(2))
    assert there.rounds_latent and there.rounds_out
    apart.rounds_latent = apart.rounds_out = False
    for step in range(5):
        positions = torch.full((17,), step, dtype=torch.int32, device=device)
        x = torch.randn(17, 1, config.hidden_size, device=device).to(dtype)
        expected, found = apart(x, positions), there(round_rows(x), positions)
        assert relative_error(found, expected) <= (0 if device == "cpu" else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph needs one")
@pytest.mark.parametrize("float8", [False, True])
@torch.inference_mode()
def test_a_cuda_graph_holds_a_step(float8):
    """One captured step, replayed at every position, gives what steps run one by one give: nothing
    in it depends on a length.
    """
    torch.manual_seed(0)
    config = nano_config()
    attention = Attention(config, CSA).cuda().to(torch.bfloat16)
    if float8:
        hold_float8(attention, published_float8(attention))
        fill_float8(attention)
    eager, held = (
        DecodeAttention(attention, 2, 200, plain(torch.bfloat16, 64), plain(torch.bfloat16, 32))
        for _ in range(2)
    )
    x = torch.zeros(2, 1, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    positions, out = torch.zeros(2, device="cuda", dtype=torch.int32), torch.zeros_like(x)
    replay = captured(lambda: out.copy_(held(x, positions)))
    for step in range(150):
        x.normal_()
        positions.copy_(torch.tensor([step, step // 2]))
        replay()
        assert torch.equal(out, eager(x, positions))

"""The experts of few tokens: the kernels against a plain loop over the experts."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device, relative_error
from torch.nn import functional as F
from transformers import DeepseekV4Config

from fmsim.exec.kernels.experts import mixture as kernels
from fmsim.exec.kernels.experts.mixture import (
    mixture_of_experts,
    mixture_of_experts_reference,
    mixture_of_experts_triton,
)
from fmsim.exec.kernels.experts.tiles import OwnPairs, tiles_of
from fmsim.exec.kernels.tuning import ExpertsTuning
from fmsim.exec.kernels.weights import dequantise, scale_shape
from fmsim.exec.model.experts import Experts, SwiGLU

SMALL = ExpertsTuning(gate_rows=64, down_rows=32, block_depth=32, warps=4, stages=2, sum_columns=64)
# bfloat16: gated values and results are rounded, and Triton's interpreter cuts the last bits off
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 2e-2}


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [..., out, in] in float8 with scales that differ, and are no powers of two."""
    scale = (0.5 + torch.rand(scale_shape(weight.shape))) / 64
    return (weight / dequantise(torch.ones_like(weight), scale)).to(torch.float8_e4m3fn), scale


def made(
    seed: int, count: int, hidden: int, width: int, dtype: torch.dtype, device: str
) -> tuple[Experts, SwiGLU]:
    """Routed experts and a shared one whose gates reach the limit now and then."""
    torch.manual_seed(seed)
    config = DeepseekV4Config(
        hidden_size=hidden, moe_intermediate_size=width, n_routed_experts=count, swiglu_limit=2.0
    )
    routed, shared = Experts(config).requires_grad_(False), SwiGLU(config).requires_grad_(False)
    for parameter in (*routed.parameters(), *shared.parameters()):
        parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    if dtype == torch.float8_e4m3fn:
        routed.gate_up_proj.data, routed.gate_up_scale = quantised(routed.gate_up_proj)
        routed.down_proj.data, routed.down_scale = quantised(routed.down_proj)
        for linear in shared.children():
            linear.weight.data, scale = quantised(linear.weight)
            linear.register_buffer("scale", scale)
        return routed.to(device), shared.to(device)
    return routed.to(device, dtype), shared.to(device, dtype)


def drawn(
    tokens: int,
    count: int,
    top_k: int,
    hidden: int,
    favourites: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[torch.Tensor, ...]:
    """x, chosen, weights: each token's own choice among ``favourites`` experts, the last; more than
    once where they are fewer than it needs.
    """
    chosen = (
        (torch.rand(tokens, favourites).argsort(1).repeat(1, top_k)[:, :top_k]) + count - favourites
    )
    return (
        torch.randn(tokens, hidden).to(device, dtype),
        chosen.to(device),
        torch.rand(tokens, top_k).to(device),
    )


def exact(x, chosen, weights, routed: Experts, shared: SwiGLU | None) -> torch.Tensor:
    """float64, by the formula, pair by pair; gated values in the type of x."""

    def wide(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return (weight if scale is None else dequantise(weight, scale)).double()

    def swiglu(
        row: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        return (
            F.silu((gate @ row).clamp(max=routed.limit))
            * (up @ row).clamp(-routed.limit, routed.limit)
        ).to(x.dtype).double() @ down.T

    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, row in enumerate(x.double()):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            scales = (
                (None, None)
                if routed.down_scale is None
                else (routed.gate_up_scale[expert], routed.down_scale[expert])
            )
            out[token] += weight * swiglu(
                row,
                *wide(routed.gate_up_proj[expert], scales[0]).chunk(2),
                wide(routed.down_proj[expert], scales[1]),
            )
        if shared is not None:
            out[token] += swiglu(
                row,
                *(
                    wide(linear.weight, getattr(linear, "scale", None))
                    for linear in shared.children()
                ),
            )
    return out


@on_each_device
@settings(max_examples=12, deadline=None)
@example(
    seed=0,
    tokens=20,
    count=3,
    top_k=3,
    favourites=1,
    hidden=40,
    width=24,
    dtype=torch.bfloat16,
    tile=16,
    with_shared=True,
)  # all on one expert
@example(
    seed=0,
    tokens=1,
    count=2,
    top_k=2,
    favourites=2,
    hidden=136,
    width=40,
    dtype=torch.float8_e4m3fn,
    tile=1,
    with_shared=True,
)
@example(
    seed=0,
    tokens=3,
    count=2,
    top_k=1,
    favourites=2,
    hidden=40,
    width=136,
    dtype=torch.float8_e4m3fn,
    tile=16,
    with_shared=True,
)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 20),
    count=st.integers(1, 9),
    top_k=st.integers(1, 4),
    favourites=st.integers(1, 9),
    hidden=st.sampled_from([16, 40, 64]),
    width=st.sampled_from([8, 20, 48]),
    dtype=st.sampled_from(list(LIMITS)),
    tile=st.sampled_from([1, 8, 16, 32]),
    with_shared=st.booleans(),
)
@torch.no_grad()
def test_the_kernels_are_the_formula(
    device, seed, tokens, count, top_k, favourites, hidden, width, dtype, tile, with_shared
):
    routed, shared = made(seed, count, hidden, width, dtype, device)
    kind = torch.float32 if dtype == torch.float32 else torch.bfloat16
    inputs = drawn(tokens, count, top_k, hidden, min(favourites, count), kind, device)
    given_ = *inputs, routed, shared if with_shared else None
    found = mixture_of_experts_triton(*given_, SMALL._replace(token_tile=tile))
    assert found.dtype == kind and found.shape == (tokens, hidden)
    assert relative_error(found, exact(*given_)) < LIMITS[dtype]
    assert relative_error(routed._one_by_one(*inputs), exact(*inputs, routed, None)) < LIMITS[dtype]


@on_each_device
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(2, 40),
    count=st.integers(1, 5),
    top_k=st.integers(1, 3),
    favourites=st.integers(1, 5),
    with_shared=st.booleans(),
)
def test_every_pair_is_in_one_tile_of_its_expert(
    device, seed, tokens, count, top_k, favourites, with_shared
):
    """Whatever was chosen: the number of tiles is set before that is known."""
    torch.manual_seed(seed)
    _, chosen, _ = drawn(tokens, count, top_k, 1, min(favourites, count), torch.float32, device)
    slots = top_k + with_shared
    size, n_tiles, schedule = tiles_of(chosen, slots, count, SMALL)
    tiles, order = (
        schedule[: 3 * n_tiles].view(3, n_tiles).T.tolist(),
        schedule[3 * n_tiles :].tolist(),
    )
    expert_of = [[*row, count][:slots] for row in chosen.tolist()]
    seen = []
    for expert, first, pairs in tiles:
        if expert >= 0:
            own = order[first : first + pairs]
            assert 1 <= pairs <= size and all(
                expert_of[pair // slots][pair % slots] == expert for pair in own
            )
            seen += own
    assert sorted(seen) == list(range(tokens * slots))


@on_each_device
@pytest.mark.parametrize("tokens", [1, 20])
@torch.no_grad()
def test_the_same_inputs_give_the_same_bytes(device, tokens):
    given_ = (
        *drawn(tokens, 3, 3, 40, 2, torch.bfloat16, device),
        *made(0, 3, 40, 24, torch.bfloat16, device),
    )
    assert torch.equal(
        mixture_of_experts_triton(*given_, SMALL), mixture_of_experts_triton(*given_, SMALL)
    )


@on_each_device
@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_experts_that_nobody_chose_are_not_read(device, tokens):
    routed, shared = made(0, 6, 40, 24, torch.float32, device)
    inputs = drawn(tokens, 6, 2, 40, 3, torch.float32, device)
    expected = exact(*inputs, routed, shared)
    routed.gate_up_proj[:3], routed.down_proj[:3] = float("nan"), float("nan")
    assert (
        relative_error(mixture_of_experts_triton(*inputs, routed, shared, SMALL), expected)
        < LIMITS[torch.float32]
    )


@on_each_device
@settings(max_examples=1, deadline=None)
@example(seed=0, tokens=9, counts=(2, 3), dtype=torch.bfloat16)  # the last token on its own
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(2, 12),
    counts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.bfloat16]),
)
@torch.no_grad()
def test_parts_add_up_to_the_whole(device, seed, tokens, counts, dtype):
    """Experts cut in two, and tokens of the shared one, whose weights are of the same type or of
    another.
    """
    count = sum(counts)
    routed, _ = made(seed, count, 40, 24, dtype, device)
    _, shared = made(seed, 1, 40, 24, torch.bfloat16, device)
    inputs = drawn(tokens, count, 2, 40, count, torch.bfloat16, device)
    first, own_tokens = 0, (tokens // 3, tokens - tokens // 3)
    sums = [torch.zeros_like(inputs[0], dtype=torch.float32) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels.tuning, "MOST_EXPERT_TOKENS", 8)
        for number, count in enumerate(counts):
            held = copy.deepcopy(routed)
            held.keep(slice(first, first + count))
            part = OwnPairs(first, sum(own_tokens[:number]), own_tokens[number])
            given_ = *inputs, held, shared
            sums[0] += mixture_of_experts_triton(*given_, SMALL, part)
            sums[1] += mixture_of_experts_reference(*given_, part)
            first += count
    expected = exact(*inputs, routed, shared)
    for summed in sums:
        assert relative_error(summed, expected) < LIMITS[torch.bfloat16]


@on_each_device
@torch.no_grad()
def test_what_is_no_number_comes_out_as_none(device):
    """Clamping hides no nan, and that of one token reaches no other."""
    routed, shared = made(0, 4, 40, 24, torch.float32, device)
    x, chosen, weights = drawn(3, 4, 2, 40, 4, torch.float32, device)
    x[1, 7] = float("nan")
    assert mixture_of_experts_triton(x, chosen, weights, routed, shared, SMALL).isnan().all(
        1
    ).tolist() == [False, True, False]


@on_each_device
@torch.no_grad()
def test_a_shared_expert_of_another_type_is_added(device):
    routed, _ = made(0, 4, 40, 24, torch.float8_e4m3fn, device)
    _, shared = made(1, 4, 40, 24, torch.bfloat16, device)
    inputs = drawn(3, 4, 2, 40, 4, torch.bfloat16, device)
    found = mixture_of_experts_triton(*inputs, routed, shared, SMALL)
    assert relative_error(found, exact(*inputs, routed, shared)) < LIMITS[torch.bfloat16]


@on_each_device
@torch.no_grad()
def test_many_tokens_are_taken_a_part_at_a_time(device, monkeypatch):
    monkeypatch.setattr(kernels.tuning, "MOST_EXPERT_TOKENS", 8)
    routed, shared = made(0, 4, 40, 24, torch.float8_e4m3fn, device)
    inputs = drawn(20, 4, 2, 40, 4, torch.bfloat16, device)
    assert kernels.takes(inputs[0], routed) == (device == "cuda")
    assert (
        relative_error(
            mixture_of_experts_triton(*inputs, routed, shared, SMALL),
            exact(*inputs, routed, shared),
        )
        < LIMITS[torch.bfloat16]
    )


def test_where_the_kernels_are_taken():
    """On a CPU never; the model's own experts are the reference there."""
    routed, shared = made(0, 4, 40, 24, torch.float32, "cpu")
    inputs = drawn(3, 4, 2, 40, 4, torch.float32, "cpu")
    with torch.no_grad():
        assert not kernels.takes(inputs[0], routed)
        assert torch.equal(
            mixture_of_experts(*inputs, routed, shared), routed(*inputs) + shared(inputs[0])
        )


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: a CUDA graph cannot be captured"
)
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("tokens", [1, 8, 70])
@torch.no_grad()
def test_a_cuda_graph_holds_them_for_any_routing(dtype, tokens):
    """In every type of weights, with the sizes that are set: the host is not asked who was
    chosen.
    """
    from fmsim.exec.measure.timing import captured

    routed, shared = made(0, 32, 384, 256, dtype, "cuda")
    x, chosen, weights = drawn(
        tokens, 32, 6, 384, 6, torch.float32 if dtype == torch.float32 else torch.bfloat16, "cuda"
    )
    assert kernels.takes(x, routed)
    out = torch.empty_like(x)
    replay = captured(lambda: out.copy_(mixture_of_experts(x, chosen, weights, routed, shared)))
    for favourites in (6, 17, 32):
        for static, new in zip(
            (x, chosen, weights),
            drawn(tokens, 32, 6, 384, favourites, x.dtype, "cuda"),
            strict=True,
        ):
            static.copy_(new)
        replay()
        assert relative_error(out, exact(x, chosen, weights, routed, shared)) < LIMITS[dtype]

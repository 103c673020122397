"""Kernels that read a layer's weights, at a given shape, on made-up inputs: norms, RoPE,
hyper-connections, router, experts and projections.

Sizes are DeepSeek-V4-Flash's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.experts.mixture import mixture_of_experts
from fmsim.exec.kernels.experts.router import route
from fmsim.exec.kernels.norms.norm_rope import norm_rope, norm_rope_reference
from fmsim.exec.kernels.norms.rms_norm import rms_norm, rms_norm_reference
from fmsim.exec.kernels.norms.rounded_rows import Float8Rows, round_rows
from fmsim.exec.kernels.products.hyper_connection import (
    Pending,
    enter,
    enter_reference,
    read_out,
    read_out_reference,
)
from fmsim.exec.kernels.products.linear import grouped_product, linear, linear_reference
from fmsim.exec.kernels.weights import dequantise, quantise
from fmsim.exec.measure.kernel_cases import Case
from fmsim.exec.model.experts import Experts, Router, SwiGLU
from fmsim.exec.model.hyper_connection import HyperConnection, HyperHead
from fmsim.exec.model.norm_rope import RMSNorm
from fmsim.exec.model.weights.quantised import fill_float8, hold_float8, published_float8

ROPE_PAIRS, QUERY_LATENT = 32, 1024
HIDDEN, STREAMS = 4096, 4
EXPERTS, EXPERT_WIDTH, ACTIVE = 24, 2048, 6  # as many of them as fit a GPU beside one long request
# Of a CSA layer's float8 weights, by what they read: rows, inputs of each, groups.
PROJECTIONS = {
    "input": (1536, HIDDEN, 1),
    "latent": (40_960, QUERY_LATENT, 1),
    "attended": (8192, HIDDEN, 8),
    "output": (HIDDEN, 8192, 1),
}


def connecting(batch: int, device, head: bool = False) -> Case:
    """A block's output into the streams and the next one's normalised input out of them; ``head``:
    at the end of the model.
    """
    config = DeepseekV4Config(hidden_size=HIDDEN, hc_mult=STREAMS)
    with torch.device(device):
        before = HyperConnection(config)
        after = (HyperHead if head else HyperConnection)(config)
        norm = RMSNorm(HIDDEN, config.rms_norm_eps)
        for parameter in after.parameters():
            parameter.detach().normal_(std=max(parameter.shape) ** -0.5)
        streams, out = (
            torch.randn(batch, 1, *shape).to(torch.bfloat16)
            for shape in ((STREAMS, HIDDEN), (HIDDEN,))
        )
        pending = Pending(
            before,
            out,
            torch.rand(batch, 1, STREAMS),
            torch.full((batch, 1, STREAMS, STREAMS), 1 / STREAMS),
        )
    weights = sum(parameter.numel() for parameter in after.parameters()) * 4 + HIDDEN * 4
    given = streams, pending, after, norm
    passed = STREAMS + 2 if head else 2 * STREAMS + 2  # rows of HIDDEN values read and written
    n_bytes = weights + batch * passed * HIDDEN * 2
    if head:
        return Case(
            "hyper-connection, head",
            f"{batch} x {HIDDEN:,}",
            n_bytes,
            lambda: read_out(*given),
            lambda: read_out_reference(*given),
        )
    return Case(
        "hyper-connection",
        f"{batch} x {HIDDEN:,}",
        n_bytes,
        lambda: enter(*given)[1],
        lambda: enter_reference(*given)[1],
        given=given,
    )


def turning(batch: int, heads: int, width: int, device, normalised: bool = False) -> Case:
    """RoPE of queries, and where ``normalised`` the norm of each head before."""
    x = torch.randn(batch, heads, width, device=device).to(torch.bfloat16)
    angles = torch.rand(batch, ROPE_PAIRS, device=device)
    given = x, (angles.cos(), angles.sin()), 1e-6 if normalised else None
    n_bytes = 2 * x.numel() * 2 + 2 * angles.numel() * 4
    name = "norm and RoPE" if normalised else "RoPE"
    return Case(
        name,
        f"{batch} x {heads} x {width}",
        n_bytes,
        lambda: norm_rope(*given),
        lambda: norm_rope_reference(*given),
    )


def norming(batch: int, device) -> Case:
    """RMSNorm of the queries' latent."""
    norm = RMSNorm(QUERY_LATENT, 1e-6).to(device, torch.bfloat16)
    x = torch.randn(batch, 1, QUERY_LATENT, device=device).to(torch.bfloat16)
    n_bytes = (2 * batch + 1) * QUERY_LATENT * 2
    return Case(
        "RMSNorm",
        f"{batch} x {QUERY_LATENT:,}",
        n_bytes,
        lambda: rms_norm(x, norm),
        lambda: rms_norm_reference(x, norm),
    )


def routing(batch: int, device, experts: int = 256) -> Case:
    """The choice of experts after the router's product.

    The order of a token's experts is free, so results are compared in tests only.
    """
    config = DeepseekV4Config(
        hidden_size=HIDDEN, n_routed_experts=experts, num_experts_per_tok=ACTIVE
    )
    with torch.device(device):
        router = Router(config, hashed=False)
        logits = torch.randn(batch, experts).to(torch.bfloat16)
    given = logits, torch.zeros(batch, dtype=torch.int64, device=device)
    n_bytes = batch * (experts * 2 + ACTIVE * 12) + experts * 4
    return Case(
        "routing",
        f"{batch} x {experts}",
        n_bytes,
        lambda: route(*given, router),
        peers={"torch": lambda: router.choose(*given)},
    )


def mixing(batch: int, device, float8: bool = False) -> Case:
    """The routed experts of a layer and the shared one; each token's choice is random."""
    config = DeepseekV4Config(
        hidden_size=HIDDEN, moe_intermediate_size=EXPERT_WIDTH, n_routed_experts=EXPERTS
    )
    with torch.device("meta"):
        layer = (
            nn.ModuleDict({"routed": Experts(config), "shared": SwiGLU(config)})
            .to(torch.bfloat16)
            .requires_grad_(False)
        )
    if float8:
        hold_float8(layer, published_float8(layer))
    routed, shared = layer.to_empty(device=device).values()
    fill_float8(layer)
    with torch.device(device):
        for parameter in layer.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        x, weights = torch.randn(batch, HIDDEN).to(torch.bfloat16), torch.rand(batch, ACTIVE)
        chosen = torch.rand(batch, EXPERTS).topk(ACTIVE).indices
    given = x, chosen, weights, routed, shared
    read = [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight]
    for expert in chosen.unique().tolist():
        read += [routed.gate_up_proj[expert], routed.down_proj[expert]]
    n_bytes = sum(matrix.nbytes for matrix in read) + 2 * x.nbytes

    def reference() -> Tensor:
        return routed._one_by_one(x, chosen, weights) + shared(x)

    peers = (
        None
        if float8
        else {"F.grouped_mm": lambda: routed._grouped(x, chosen, weights) + shared(x)}
    )
    name = "experts, float8" if float8 else "experts"
    return Case(
        name,
        f"{batch} x {ACTIVE} of {EXPERTS}",
        n_bytes,
        lambda: mixture_of_experts(*given),
        reference,
        peers,
    )


def projecting(
    batch: int, outputs: int, inputs: int, groups: int, device, float8_rows: bool = False
) -> Case:
    """A product with float8 weights; the same with bfloat16 weights through torch is its peer.
    Float8 rows were rounded before, as where they are made.
    """
    weight, scale = quantise(torch.randn(outputs, inputs, device=device) * inputs**-0.5)
    x = torch.randn(batch, 1, groups * inputs, device=device).to(torch.bfloat16)
    wide = dequantise(weight, scale, dtype=torch.bfloat16)
    rows = round_rows(x) if float8_rows else x
    given = rows, weight, scale, groups
    read = [rows.codes, rows.scales] if isinstance(rows, Float8Rows) else [x]
    n_bytes = sum(part.nbytes for part in (weight, scale, *read)) + batch * outputs * 2
    shape = f"{batch} x {inputs:,} x {outputs:,}" + (f" / {groups}" if groups > 1 else "")
    return Case(
        "float8 linear, float8 rows" if float8_rows else "float8 linear",
        shape,
        n_bytes,
        lambda: linear(*given),
        lambda: linear_reference(*given),
        {"torch, bf16": lambda: grouped_product(x, wide, groups)},
        given,
        2 * batch * outputs * inputs,
    )

"""Every kernel at a given shape, on made-up inputs: what the benchmark and the calibration time.

Sizes and contents are DeepSeek-V4-Flash's; pages lie in random order, since that is what a paged
cache looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from fmsim.exec.kernels.attention_rows import Rows, matrix_type
from fmsim.exec.kernels.compress import Pooling, compress_and_append
from fmsim.exec.kernels.experts import mixture_of_experts
from fmsim.exec.kernels.gather import copy_rows
from fmsim.exec.kernels.hyper_connection import (
    Pending,
    enter,
    enter_reference,
    read_out,
    read_out_reference,
)
from fmsim.exec.kernels.index_score import index_scores, index_scores_reference, new_scores
from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.layout import KEY, LATENT, Layout
from fmsim.exec.kernels.linear import grouped_product, linear, linear_reference
from fmsim.exec.kernels.memory_score import memory_scores
from fmsim.exec.kernels.norm_rope import norm_rope, norm_rope_reference
from fmsim.exec.kernels.rms_norm import rms_norm, rms_norm_reference
from fmsim.exec.kernels.router import route
from fmsim.exec.kernels.sparse_attention import sparse_attention, sparse_attention_reference
from fmsim.exec.kernels.top_k import top_k, top_k_reference
from fmsim.exec.kernels.weights import dequantise, quantise
from fmsim.exec.kv.mirror import HostMirror
from fmsim.exec.model.experts import Experts, Router, SwiGLU
from fmsim.exec.model.hyper_connection import HyperConnection, HyperHead
from fmsim.exec.model.norm_rope import RMSNorm
from fmsim.exec.model.quantised import fill_float8, hold_float8, published_float8
from fmsim.indexer.scorer import PUBLISHED_HEADS

PER_PAGE, WINDOW, TOP_K = 64, 128, 512
HEADS, ROPE_PAIRS, QUERY_LATENT = 64, 32, 1024
HIDDEN, STREAMS = 4096, 4
COPY_NODES = 4096
EXPERTS, EXPERT_WIDTH, ACTIVE = 24, 2048, 6  # as many of them as fit a GPU beside one long request
# Of a CSA layer's float8 weights, by what they read: rows, inputs of each, groups.
PROJECTIONS = {
    "input": (1536, HIDDEN, 1),
    "latent": (40_960, QUERY_LATENT, 1),
    "attended": (8192, HIDDEN, 8),
    "output": (HIDDEN, 8192, 1),
}


@dataclass(frozen=True)
class Case:
    """``n_bytes``: the fewest bytes that ``run`` must move, each input read once and each output
    written once.

    ``reference`` computes the same in torch, where that fits in memory; ``peers`` are other ways to
    the same result.
    """

    kernel: str
    shape: str
    n_bytes: int
    run: Callable[[], object]
    reference: Callable[[], object] | None = None
    peers: dict[str, Callable[[], object]] | None = None


def fill_entries(pool: Tensor, layout: Layout) -> Tensor:
    """Made-up entries without nan (codes below 0x78) in every page of a pool, which is returned."""
    per_page = layout.per_page(pool)
    values, scales = (
        pool[:, : per_page * layout.value_bytes],
        pool[:, per_page * layout.value_bytes :],
    )
    if layout.kind == "plain":
        width = layout.dtype.itemsize
        values.copy_(
            torch.randn(len(pool), values.shape[1] // width, device=pool.device)
            .to(layout.dtype)
            .view(torch.uint8)
            if width > 1
            else values
        )
        return pool
    values.random_(0, 0x78)
    if layout.kind == "key":
        scales.copy_(
            torch.tensor([0, 0, 0x80, 0x3C], dtype=torch.uint8, device=pool.device).repeat(per_page)
        )  # float32 2^-6
    else:
        values.unflatten(1, (per_page, -1))[..., 448:] = 0x3F  # bfloat16 0.75
        scales.fill_(119)  # 2^-8
    return pool


def paged(layout: Layout, batch: int, entries: int, device) -> tuple[Tensor, Tensor]:
    """A pool of made-up entries, and a block table over its pages in random order."""
    pages = cdiv(entries, PER_PAGE)
    pool = fill_entries(
        torch.empty(batch * pages, PER_PAGE * layout.entry_bytes, dtype=torch.uint8, device=device),
        layout,
    )
    return pool, torch.randperm(batch * pages, device=device).view(batch, pages).to(torch.int32)


def index_scoring(batch: int, entries: int, device, float8_queries: bool = False) -> Case:
    pool, table = paged(KEY, batch, entries, device)
    queries = torch.randn(batch, HEADS, KEY.width, device=device).to(
        torch.float8_e4m3fn if float8_queries else torch.bfloat16
    )
    weights, lengths = (
        torch.randn(batch, HEADS, device=device),
        torch.full((batch,), entries, dtype=torch.int32, device=device),
    )
    inputs, out = (
        (queries, weights, pool, KEY, table, lengths),
        new_scores(batch, table.shape[1] * PER_PAGE, device),
    )
    n_bytes = batch * entries * (KEY.entry_bytes + 4)
    name = "index scores, float8 queries" if float8_queries else "index scores"
    of = slice(None), slice(entries)
    return Case(
        name,
        f"{batch} x {entries:,}",
        n_bytes,
        lambda: index_scores(*inputs, out).scores[of],
        lambda: index_scores_reference(*inputs).scores[of],
    )


def selection(
    batch: int, entries: int, device, others: dict[str, Callable[[Tensor], object]] | None = None
) -> Case:
    """``others``: further ways to the same set, by name, each called with the scores."""
    scores, lengths = (
        torch.randn(batch, entries, device=device),
        torch.full((batch,), entries, dtype=torch.int32, device=device),
    )
    maxima = (
        torch.nn.functional.pad(scores, (0, -entries % 32), value=float("-inf"))
        .view(batch, -1, 32)
        .amax(2)
    )
    peers = {
        "without pre-selection": lambda: top_k(scores, lengths, TOP_K),
        "torch.topk": lambda: scores.topk(min(TOP_K, entries), sorted=False).indices,
    }
    peers |= {name: lambda way=way: way(scores) for name, way in (others or {}).items()}
    n_bytes = batch * (entries * 4 + TOP_K * 4)
    return Case(
        "top-k",
        f"{batch} x {entries:,}",
        n_bytes,
        lambda: top_k(scores, lengths, TOP_K, maxima),
        lambda: top_k_reference(scores, lengths, TOP_K),
        peers,
    )


def attention(
    batch: int, entries: int, device, masses: bool = False, selected: int = TOP_K
) -> Case:
    """``selected`` of the entries, at random; all of them, as in an HCA layer, where they are as
    many.
    """
    pool, table = paged(LATENT, batch, entries, device)
    window = torch.full(
        (batch, WINDOW * LATENT.entry_bytes), 0x3F, dtype=torch.uint8, device=device
    )
    window[:, WINDOW * LATENT.value_bytes :] = 119
    selected = min(selected, entries)
    ids = torch.stack(
        [torch.randperm(entries, device=device)[:selected].sort().values for _ in range(batch)]
    ).to(torch.int32)
    rows = Rows(
        LATENT,
        window,
        torch.full((batch,), WINDOW, dtype=torch.int32, device=device),
        pool,
        table,
        ids,
    )
    queries, sinks = (
        torch.randn(batch, HEADS, LATENT.width, device=device).to(matrix_type(LATENT)),
        torch.zeros(HEADS, device=device),
    )
    inputs = queries, rows, sinks, LATENT.width**-0.5, masses
    n_bytes = batch * ((WINDOW + selected) * LATENT.entry_bytes + 2 * queries[0].numel() * 2)
    name = "sparse attention with masses" if masses else "sparse attention"
    return Case(
        name,
        f"{batch} x {selected + WINDOW:,}",
        n_bytes,
        lambda: sparse_attention(*inputs)[0],
        lambda: sparse_attention_reference(*inputs)[0],
    )


def appending(batch: int, layout: Layout, rate: int, series: int, device) -> Case:
    """A token that closes an entry in every sequence."""
    width, device = layout.width, torch.device(device)
    pool, table = paged(layout, batch, PER_PAGE, device)
    pooling = Pooling(
        rate,
        series,
        torch.randn(rate, series * width, device=device),
        torch.ones(width, device=device),
        1e-6,
    )
    ring = pooling.new_ring(batch, torch.bfloat16)
    kv, gate = (
        torch.randn(batch, 1, series * width, device=device).to(torch.bfloat16) for _ in range(2)
    )
    starts = torch.full((batch,), 2 * rate - 1, dtype=torch.int32, device=device)
    turn = torch.ones(batch, 1, 32, device=device), torch.zeros(batch, 1, 32, device=device)
    n_bytes = batch * (series * rate * width * 2 * 2 + layout.entry_bytes)
    return Case(
        f"append, {layout.kind}",
        f"{batch} x {rate}",
        n_bytes,
        lambda: compress_and_append(kv, gate, starts, pooling, ring, turn, pool, layout, table),
    )


def connecting(batch: int, device, head: bool = False) -> Case:
    """A block's output into the streams and the next one's normalised input out of them; ``head``:
    at the end of the model.
    """
    config = DeepseekV4Config(hidden_size=HIDDEN, hc_mult=STREAMS)
    with torch.device(device):
        before, after, norm = (
            HyperConnection(config),
            (HyperHead if head else HyperConnection)(config),
            RMSNorm(HIDDEN, config.rms_norm_eps),
        )
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
    )


def turning(batch: int, heads: int, width: int, device, normalised: bool = False) -> Case:
    """RoPE of queries, and where ``normalised`` the norm of each head before."""
    x, angles = (
        torch.randn(batch, heads, width, device=device).to(torch.bfloat16),
        torch.rand(batch, ROPE_PAIRS, device=device),
    )
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
    norm, x = (
        RMSNorm(QUERY_LATENT, 1e-6).to(device, torch.bfloat16),
        torch.randn(batch, 1, QUERY_LATENT, device=device).to(torch.bfloat16),
    )
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
        router, logits = (
            Router(config, hashed=False),
            torch.randn(batch, experts).to(torch.bfloat16),
        )
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


def projecting(batch: int, outputs: int, inputs: int, groups: int, device) -> Case:
    """A product with float8 weights; the same with bfloat16 weights through torch is its peer."""
    weight, scale = quantise(torch.randn(outputs, inputs, device=device) * inputs**-0.5)
    x, wide = (
        torch.randn(batch, 1, groups * inputs, device=device).to(torch.bfloat16),
        dequantise(weight, scale, dtype=torch.bfloat16),
    )
    given = x, weight, scale, groups
    n_bytes = weight.nbytes + scale.nbytes + x.nbytes + batch * outputs * 2
    name = f"{batch} x {inputs:,} x {outputs:,}" + (f" / {groups}" if groups > 1 else "")
    peers = {"torch, bf16": lambda: grouped_product(x, wide, groups)}
    return Case(
        "float8 linear",
        name,
        n_bytes,
        lambda: linear(*given),
        lambda: linear_reference(*given),
        peers,
    )


def memory_scoring(batch: int, entries: int, device, layers: int = 3) -> Case:
    pools, tables = zip(*(paged(KEY, batch, entries, device) for _ in range(layers)), strict=True)
    queries = torch.randn(layers, batch, PUBLISHED_HEADS, KEY.width, device=device).to(
        torch.bfloat16
    )
    weights, lengths = (
        torch.randn(layers, batch, PUBLISHED_HEADS, device=device),
        torch.full((batch,), entries, dtype=torch.int32, device=device),
    )
    out = new_scores(batch, tables[0].shape[1] * PER_PAGE, device)
    n_bytes = batch * entries * (layers * KEY.entry_bytes + 4)
    return Case(
        "memory scores",
        f"{layers} x {batch} x {entries:,}",
        n_bytes,
        lambda: memory_scores(queries, weights, pools, KEY, tables, lengths, out=out),
    )


def recall(
    row_bytes: int,
    count: int,
    device,
    programs: int | None = None,
    host_bytes: int = 2**31,
    ascending: bool = False,
    layers: int = 1,
) -> Case:
    """Random rows of pinned host memory into slots of the device's; in random order, or ascending
    as a residency asks for them.

    With several ``layers`` each has its share of the rows and of the memory, one after another as
    in a mirror.
    """
    device, each = torch.device(device), count // layers
    host_rows = max(each, host_bytes // row_bytes // layers)
    mirror = HostMirror(layers, host_rows, row_bytes, device)
    target = torch.empty(layers, each, row_bytes, dtype=torch.uint8, device=device)
    pages = torch.randint(0, host_rows, (layers, each), device=device)
    pages = pages.sort(1).values if ascending else pages
    slots = torch.stack([torch.randperm(each, device=device) for _ in range(layers)])
    counts = torch.full((layers,), each, dtype=torch.int32, device=device)
    moves = [
        (layer, slot, page)
        for layer in range(layers)
        for slot, page in zip(slots[layer].tolist(), pages[layer].tolist(), strict=True)
    ]

    def by_copy_engine() -> None:
        for layer, slot, page in moves:
            target[layer, slot].copy_(mirror.pages[layer, page], non_blocking=True)

    name = (
        f"recall, {row_bytes:,} B"
        + (", ascending" if ascending else "")
        + (f", {layers} layers" if layers > 1 else "")
    )
    peers = (
        {"copy engine": by_copy_engine} if layers * each <= COPY_NODES else {}
    )  # each move is a node of a CUDA graph
    run = lambda: copy_rows(mirror.pages, target, pages, slots, counts, programs)
    return Case(name, f"{layers * each:,}", row_bytes * layers * each, run, peers=peers)

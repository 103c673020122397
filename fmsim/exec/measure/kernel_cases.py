"""Kernels over the KV cache at a given shape, on made-up inputs: what the benchmark and the
calibration time. `module_cases` has the others.

Sizes and contents are DeepSeek-V4-Flash's; pages lie in random order, since that is what a paged
cache looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fmsim.exec.kernels.attention import flash_mla
from fmsim.exec.kernels.attention.rows import Rows, matrix_type
from fmsim.exec.kernels.attention.sparse_attention import (
    sparse_attention,
    sparse_attention_reference,
)
from fmsim.exec.kernels.lang import cdiv
from fmsim.exec.kernels.layout import KEY, LATENT, Layout
from fmsim.exec.kernels.pages.compress import Append, Pooling, append
from fmsim.exec.kernels.pages.gather import copy_rows
from fmsim.exec.kernels.pages.late_pages import copy_late
from fmsim.exec.kernels.selection.index_score import (
    index_scores,
    index_scores_reference,
    new_scores,
)
from fmsim.exec.kernels.selection.memory_score import memory_scores, memory_scores_reference
from fmsim.exec.kernels.selection.top_k import top_k, top_k_reference
from fmsim.exec.kernels.tuning import GatherTuning
from fmsim.exec.kv.home import PER_PAGE
from fmsim.exec.kv.mirror import HostMirror
from fmsim.geometry.memory_indexer import PUBLISHED_HEADS

WINDOW, TOP_K = 128, 512
HEADS = 64
COPY_NODES = 4096


@dataclass(frozen=True)
class Case:
    """``n_bytes``: the fewest bytes that ``run`` must move, each input read once and each output
    written once.

    ``reference`` computes the same in torch, where that fits in memory; ``peers`` are other ways to
    the same result; ``given`` is what others need to compute it too; ``flops`` counts the
    operations of matrix products, where they can be what bounds it.
    """

    kernel: str
    shape: str
    n_bytes: int
    run: Callable[[], object]
    reference: Callable[[], object] | None = None
    peers: dict[str, Callable[[], object]] | None = None
    given: tuple = ()
    flops: int = 0


def fill_entries(pool: Tensor, layout: Layout) -> Tensor:
    """Made-up entries without nan (codes below 0x78) in every page of a pool, which is returned."""
    per_page = layout.per_page(pool)
    values = pool[:, : per_page * layout.value_bytes]
    scales = pool[:, per_page * layout.value_bytes :]
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
        # float32 2^-6
        scales.copy_(
            torch.tensor([0, 0, 0x80, 0x3C], dtype=torch.uint8, device=pool.device).repeat(per_page)
        )
    else:
        values.unflatten(1, (per_page, -1))[..., 448:] = 0x3F  # bfloat16 0.75
        scales.fill_(119)  # 2^-8
    return pool


def paged(
    layout: Layout, batch: int, entries: int, device, per_page: int = PER_PAGE
) -> tuple[Tensor, Tensor]:
    """A pool of made-up entries, and a block table over its pages in random order."""
    pages = cdiv(entries, per_page)
    pool = fill_entries(
        torch.empty(batch * pages, per_page * layout.entry_bytes, dtype=torch.uint8, device=device),
        layout,
    )
    return pool, torch.randperm(batch * pages, device=device).view(batch, pages).to(torch.int32)


def index_scoring(
    batch: int, entries: int, device, float8_queries: bool = False, per_page: int = PER_PAGE
) -> Case:
    pool, table = paged(KEY, batch, entries, device, per_page)
    queries = torch.randn(batch, HEADS, KEY.width, device=device).to(
        torch.float8_e4m3fn if float8_queries else torch.bfloat16
    )
    weights = torch.randn(batch, HEADS, device=device)
    lengths = torch.full((batch,), entries, dtype=torch.int32, device=device)
    inputs = (queries, weights, pool, KEY, table, lengths)
    out = new_scores(batch, table.shape[1] * per_page, device)
    n_bytes = batch * entries * (KEY.entry_bytes + 4)
    name = "index scores, float8 queries" if float8_queries else "index scores"
    of = slice(None), slice(entries)
    return Case(
        name,
        f"{batch} x {entries:,}",
        n_bytes,
        lambda: index_scores(*inputs, out).scores[of],
        lambda: index_scores_reference(*inputs).scores[of],
        given=inputs,
    )


def selection(
    batch: int, entries: int, device, others: dict[str, Callable[[Tensor], object]] | None = None
) -> Case:
    """``others``: further ways to the same set, by name, each called with the scores."""
    scores = torch.randn(batch, entries, device=device)
    lengths = torch.full((batch,), entries, dtype=torch.int32, device=device)
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
    batch: int,
    entries: int,
    device,
    masses: bool = False,
    selected: int = TOP_K,
    per_page: int = PER_PAGE,
) -> Case:
    """``selected`` of the entries, at random; all of them, as in an HCA layer, where they are as
    many.
    """
    pool, table = paged(LATENT, batch, entries, device, per_page)
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
    served = not masses and flash_mla.serves(batch, HEADS, LATENT, window, pool, rows.count)
    queries = torch.randn(batch, HEADS, LATENT.width, device=device)
    queries = queries.to(torch.bfloat16 if served else matrix_type(LATENT))
    sinks = torch.zeros(HEADS, device=device)
    inputs = queries, rows, sinks, LATENT.width**-0.5, masses
    n_bytes = batch * ((WINDOW + selected) * LATENT.entry_bytes + 2 * queries[0].numel() * 2)
    name = "sparse attention with masses" if masses else "sparse attention"
    pages = "" if per_page == PER_PAGE else f", pages of {per_page}"
    return Case(
        name,
        f"{batch} x {selected + WINDOW:,}{pages}",
        n_bytes,
        lambda: sparse_attention(*inputs)[0],
        lambda: sparse_attention_reference(*inputs)[0],
        given=inputs,
        flops=4 * batch * (WINDOW + selected) * HEADS * LATENT.width,
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
    positions = torch.full((batch,), 2 * rate - 1, dtype=torch.int32, device=device)
    turn = torch.ones(batch, 1, 32, device=device), torch.zeros(batch, 1, 32, device=device)
    of = [Append(kv, gate, pooling, ring, turn, pool, layout, table)]
    n_bytes = batch * (series * rate * width * 2 * 2 + layout.entry_bytes)
    return Case(
        f"append, {layout.kind}",
        f"{batch} x {rate}",
        n_bytes,
        lambda: append(of, positions),
    )


def memory_scoring(
    batch: int, entries: int, device, layers: int = 3, float8_queries: bool = True
) -> Case:
    """With float8 queries, as the released FlashMemory engine scores."""
    pools, tables = zip(*(paged(KEY, batch, entries, device) for _ in range(layers)), strict=True)
    queries = torch.randn(layers, batch, PUBLISHED_HEADS, KEY.width, device=device).to(
        torch.float8_e4m3fn if float8_queries else torch.bfloat16
    )
    weights = torch.randn(layers, batch, PUBLISHED_HEADS, device=device)
    lengths = torch.full((batch,), entries, dtype=torch.int32, device=device)
    out = new_scores(batch, tables[0].shape[1] * PER_PAGE, device)
    n_bytes = batch * entries * (layers * KEY.entry_bytes + 4)
    inputs = queries, weights, pools, KEY, tables, lengths
    of = slice(None), slice(entries)
    return Case(
        "memory scores" + ("" if float8_queries else ", bfloat16 queries"),
        f"{layers} x {batch} x {entries:,}",
        n_bytes,
        lambda: memory_scores(*inputs, out=out).scores[of],
        lambda: memory_scores_reference(*inputs).scores[of],
    )


def recall(
    row_bytes: int,
    count: int,
    device,
    tune: GatherTuning | None = None,
    host_bytes: int = 2**31,
    ascending: bool = False,
    layers: int = 1,
    mirror: HostMirror | None = None,
    late: bool = False,
) -> Case:
    """Random rows of pinned host memory into slots of the device's; in random order, or ascending
    as a residency asks for them; or as what a decision recalls ``late``.

    The memory is a `mirror` of such rows, or one of ``host_bytes`` that is made. With several
    ``layers`` each has its share of the rows and of the memory, one after another as in a mirror.
    """
    device, each = torch.device(device), count // layers
    if mirror is None:
        host_rows = max(each, host_bytes // row_bytes // layers)
        mirror = HostMirror(layers, host_rows, row_bytes, device)
    host_rows = mirror.pages.shape[1]
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
    # each move is a node of a CUDA graph
    peers = {"copy engine": by_copy_engine} if layers * each <= COPY_NODES else {}
    waiting = torch.zeros(layers, each + 1, dtype=torch.int32, device=device)

    def run() -> None:
        if late:
            copy_late(mirror.pages, target, pages, slots, counts, waiting.fill_(1), 1)
        else:
            copy_rows(mirror.pages, target, pages, slots, counts, tune)

    return Case(name, f"{layers * each:,}", row_bytes * layers * each, run, peers=peers)

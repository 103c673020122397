"""Block tables of a step out of a residency's: where each page of each request lies in the pool."""

from __future__ import annotations

from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import (
    after_previous,
    cdiv,
    overlapped,
    runs_compiled,
    tl,
    triton,
)


def enter_slots(table: Tensor, first: Tensor, out: Tensor) -> None:
    """Into ``out`` int32 [L, B, P] the pool's page of each page: its slot in ``table`` int32 [L or
    1, B or 1, P] and ``first`` int32 [L or 1, B], the page of a request's first slot; -1 where it
    has no slot.
    """
    run = enter_slots_triton if runs_compiled(out) else enter_slots_reference
    run(table, first, out)


def enter_slots_reference(table, first, out) -> None:
    out.copy_((table + first[..., None]).masked_fill(table < 0, -1))


def enter_slots_triton(table, first, out, block_pages=tuning.BLOCK_TABLE_PAGES) -> None:
    layers, batch, pages = out.shape
    table, first = table.expand(out.shape), first.expand(layers, batch)
    assert table.stride(2) == out.stride(2) == 1, "a request's pages lie side by side"
    _enter_slots[(cdiv(pages, block_pages), batch, layers)](
        table,
        first,
        out,
        pages,
        table.stride(0),
        table.stride(1),
        first.stride(0),
        first.stride(1),
        out.stride(0),
        out.stride(1),
        PAGES=block_pages,
        num_warps=8,
        **overlapped(out),
    )


@triton.jit
def _enter_slots(
    table,
    first,
    out,
    pages,
    table_layer,
    table_request,
    first_layer,
    first_request,
    out_layer,
    out_request,
    PAGES: tl.constexpr,
):
    """One program: some pages of one request in one layer."""
    b, layer = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    inside = page < pages
    after_previous()
    slot = tl.load(table + layer * table_layer + b * table_request + page, mask=inside, other=-1)
    begin = tl.load(first + layer * first_layer + b * first_request)
    found = tl.where(slot < 0, -1, slot + begin)
    tl.store(out + layer * out_layer + b * out_request + page, found, mask=inside)

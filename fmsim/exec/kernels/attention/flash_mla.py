"""Attention of many requests by FlashMLA's kernel for Hopper GPUs, where its wheel (sgl-flash-mla)
is installed: it reads packed entries once for all heads.

The layout is the same, so nothing is copied: a window's ring is a page of its cache, and a pool of
entries its extra one. It takes lists of slots, whose lengths are multiples of 64. It does not tell
masses, and reads 16 bytes at a time: pages of one entry (584 bytes) begin anywhere but there.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.attention.rows import Rows
from fmsim.exec.kernels.lang import cdiv, next_power_of_2, runs_compiled, tl, triton
from fmsim.exec.kernels.layout import LATENT, Layout, slots_of

LISTED = 64  # slots; its own block of rows
HEADS = (64, 128)
ALIGNED = 16  # bytes


@cache
def package() -> ModuleType | None:
    """The package, where it can be had."""
    try:
        return importlib.import_module("flash_mla")
    except Exception:  # a wheel for another torch or CUDA fails in its own ways
        return None


def serves(
    batch: int, heads: int, layout: Layout, window: Tensor, pool: Tensor, count: int
) -> bool:
    """Whether it can attend to ``count`` such rows (`Rows`) of each request, and does so faster."""
    device = window.device
    return (
        tuning.flash_mla(batch, count)
        and device.type == "cuda"
        and heads in HEADS
        and layout.kind == "latent"
        and pool.shape[1] % ALIGNED == 0
        and window.shape[1] % ALIGNED == 0
        and layout.per_page(window) % LISTED == 0
        and torch.cuda.get_device_capability(device) == (9, 0)
        and package() is not None
    )


def attend(queries: Tensor, rows: Rows, sinks: Tensor, scale: float) -> Tensor:
    """As `sparse_attention`, without masses; queries are taken as bfloat16."""
    found = package()
    assert found is not None
    layout, (near, selected) = rows.layout, listed(rows)
    extra = {}
    if selected.shape[1]:
        extra = {
            "extra_k_cache": rows.pool.view(-1, layout.per_page(rows.pool), 1, LATENT.entry_bytes),
            "extra_indices_in_kvcache": selected[:, None],
        }
    asked = queries.to(torch.bfloat16)[:, None]
    shape = (len(queries), queries.shape[1], near.shape[1], *selected.shape, rows.pool.shape[1])
    out, _ = found.flash_mla_with_kvcache(
        asked,
        rows.window.view(-1, rows.window_rows, 1, LATENT.entry_bytes),
        None,
        None,
        layout.width,
        _plan(queries.device, shape),
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=near[:, None],
        attn_sink=sinks.float(),
        use_legacy=True,
        kv_format="V4",
        **extra,
    )
    return out[:, 0].to(queries.dtype)


@cache
def _plan(device: torch.device, shape: tuple[int, ...]) -> Any:
    """How its programs share the rows: worked out at a shape's first call, of which nothing but the
    shape decides.
    """
    found = package()
    assert found is not None
    return found.get_mla_metadata()[0]


def listed(rows: Rows) -> tuple[Tensor, Tensor]:
    """Slots int32, of the window [B, W] and of the selected entries [B, K and more], a multiple of
    64; -1 for what is not there.
    """
    return (listed_triton if runs_compiled(rows.ids) else listed_reference)(rows)


def listed_reference(rows: Rows) -> tuple[Tensor, Tensor]:
    batch, width = len(rows.ids), rows.window_rows
    place = torch.arange(width, device=rows.ids.device)
    near = place + width * torch.arange(batch, device=rows.ids.device)[:, None]
    near = torch.where(place < rows.window_lengths[:, None], near, -1)
    slots = slots_of(rows.table, rows.ids, rows.layout.per_page(rows.pool))
    slots = torch.nn.functional.pad(slots, (0, -rows.ids.shape[1] % LISTED), value=-1)
    return near.int(), slots.int()


def listed_triton(rows: Rows) -> tuple[Tensor, Tensor]:
    batch, selected = rows.ids.shape
    room = cdiv(selected, LISTED) * LISTED
    near, slots = (
        torch.empty(batch, width, dtype=torch.int32, device=rows.ids.device)
        for width in (rows.window_rows, room)
    )
    block = min(1024, next_power_of_2(max(room, rows.window_rows)))
    _listed[(batch, cdiv(max(room, 1), block))](
        rows.window_lengths,
        rows.table,
        rows.ids,
        near,
        slots,
        rows.table.stride(0),
        rows.ids.stride(0),
        selected,
        room,
        WINDOW=rows.window_rows,
        WINDOW_PADDED=next_power_of_2(rows.window_rows),
        PER_PAGE=rows.layout.per_page(rows.pool),
        BLOCK=block,
        num_warps=4,
    )
    return near, slots


@triton.jit(do_not_specialize=["selected", "room"])
def _listed(
    window_lengths,
    table,
    ids,
    near_out,
    slots_out,
    table_stride,
    ids_stride,
    selected,
    room,
    WINDOW: tl.constexpr,
    WINDOW_PADDED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a block of one sequence's entries; the first, of its window too."""
    b = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WINDOW_PADDED)
    there = place < tl.load(window_lengths + b)
    tl.store(
        near_out + b * WINDOW + place,
        tl.where(there, (b * WINDOW + place).to(tl.int32), -1),
        mask=(place < WINDOW) & (tl.program_id(1) == 0),
    )
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(ids + b * ids_stride + number, mask=number < selected, other=-1)
    page = tl.load(table + b * table_stride + entry // PER_PAGE, mask=entry >= 0, other=-1)
    slot = tl.where(page >= 0, page * PER_PAGE + entry % PER_PAGE, -1)
    tl.store(slots_out + b * room + number, slot.to(tl.int32), mask=number < room)

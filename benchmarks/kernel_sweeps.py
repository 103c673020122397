"""What `tune_kernels.py` tries: for every kernel its shapes, and a grid of its tuning values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fmsim.exec.kernels.layout import KEY, LATENT
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure import module_cases as modules

DEVICE = "cuda"


class Sweep(NamedTuple):
    """``value``: the name in tuning; ``shapes``: builders of a case by label; ``settings``: what to
    try beside what is set.
    """

    value: str
    shapes: dict[str, Callable[[], cases.Case]]
    settings: list[dict[str, int]]


def grid(**values: Iterable[int]) -> list[dict[str, int]]:
    return [
        dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())
    ]


def rows(*sizes: int, **values: Iterable[int]) -> list[dict[str, int]]:
    """Of the experts: as many rows of weights in a program of either product."""
    return [
        {"gate_rows": size, "down_rows": size} | setting
        for size in sizes
        for setting in grid(**values)
    ]


def mixing(*batches: int, float8: bool = False) -> dict[str, Callable[[], cases.Case]]:
    return {
        str(batch): lambda batch=batch: modules.mixing(batch, DEVICE, float8) for batch in batches
    }


def projecting(*batches: int, float8_rows: bool = False) -> dict[str, Callable[[], cases.Case]]:
    """The two largest of a layer's products, one short and wide, one long and narrow."""
    return {
        f"{what}, {batch}": lambda what=what, batch=batch: modules.projecting(
            batch, *modules.PROJECTIONS[what], DEVICE, float8_rows
        )
        for batch in batches
        for what in ("latent", "output")
    }


SWEEPS = {
    "index scores": Sweep(
        "INDEX_SCORES",
        {
            "1 x 131,072": lambda: cases.index_scoring(1, 131_072, DEVICE),
            "8 x 128,000": lambda: cases.index_scoring(8, 128_000, DEVICE),
        },
        grid(block_entries=[64], programs=[264, 396, 528, 660], stages=[3, 4, 6])
        + grid(block_entries=[32], programs=[528, 1056], stages=[4, 6]),
    ),
    "index scores, float8 queries": Sweep(
        "FLOAT8_INDEX_SCORES",
        {
            f"{batch} x 128,000": lambda batch=batch: cases.index_scoring(
                batch, 128_000, DEVICE, float8_queries=True
            )
            for batch in (8, 67)
        },
        grid(programs=[528, 660, 1320], run_blocks=[1, 4, 8, 16]),
    ),
    "memory scores": Sweep(
        "FLOAT8_MEMORY_SCORES",
        {
            "3 x 1 x 131,072": lambda: cases.memory_scoring(1, 131_072, DEVICE),
            "3 x 8 x 32,768": lambda: cases.memory_scoring(8, 32_768, DEVICE),
        },
        grid(block_entries=[64], programs=[132, 264, 396], stages=[2, 3, 4], warps=[4]),
    ),
    "top-k": Sweep(
        "TOP_K",
        {
            f"{batch} x {n:,}": lambda batch=batch, n=n: cases.selection(batch, n, DEVICE)
            for batch, n in ((1, 32_768), (1, 131_072), (8, 262_144), (67, 131_072))
        },
        grid(sections=[32, 64], warps=[2, 4, 8], last_warps=[2, 4, 8])
        + grid(programs=[256, 1024])
        + grid(bound_keys=[2]),
    ),
    "attention, one": Sweep(
        "ATTENTION",
        {
            "1 x 640": lambda: cases.attention(1, 128_000, DEVICE),
            "1 x 4,224": lambda: cases.attention(1, 4096, DEVICE, selected=4096),
        },
        grid(block_heads=[16], block_rows=[16, 32], programs=[132, 264], warps=[4], stages=[1])
        + grid(block_heads=[16], block_rows=[32], programs=[264], warps=[4], stages=[2]),
    ),
    "attention, some": Sweep(
        "ATTENTION_OF_SOME",
        {
            f"{batch} x 640": lambda batch=batch: cases.attention(batch, 128_000, DEVICE)
            for batch in (4, 8)
        },
        grid(block_rows=[64], programs=[132], stages=[2])
        + grid(block_rows=[32], programs=[132, 264], stages=[1])
        + grid(block_heads=[16], block_rows=[32], programs=[264], warps=[4], stages=[1]),
    ),
    "attention, many": Sweep(
        "ATTENTION_OF_MANY",
        {
            f"{batch} x 640": lambda batch=batch: cases.attention(batch, 8192, DEVICE)
            for batch in (16, 32, 64, 97, 128, 256)
        }
        | {
            "97 x 640, pages of 1": lambda: cases.attention(97, 8192, DEVICE, per_page=1),
            "32 x 4,224": lambda: cases.attention(32, 4096, DEVICE, selected=4096),
        },
        grid(gather_rows=[8, 32], block_rows=[64], stages=[2])
        + grid(gather_rows=[16], block_rows=[32], stages=[2, 3]),
    ),
    "experts, one": Sweep(
        "EXPERTS_OF_ONE",
        mixing(1),
        rows(64, block_depth=[64], stages=[3, 4, 6, 8])
        + rows(64, block_depth=[128], stages=[2, 3, 4, 5])
        + rows(64, 128, block_depth=[256], stages=[2, 3])
        + rows(128, block_depth=[64, 128], stages=[3, 4])
        + rows(32, block_depth=[128, 256], stages=[3, 4])
        + rows(16, 32, block_depth=[128], stages=[4], warps=[1, 2])
        + rows(64, token_tile=[8], block_depth=[64, 128], stages=[4, 6])
        + rows(32, token_tile=[8], block_depth=[128, 256], stages=[3, 4], warps=[2, 4])
        + rows(8, 16, token_tile=[1], block_depth=[512], stages=[1, 2, 3])
        + rows(16, 32, token_tile=[1], block_depth=[256], stages=[1, 2, 4])
        + rows(8, token_tile=[1], block_depth=[1024], stages=[1, 2])
        + grid(down_rows=[32, 128]),
    ),
    "experts, few": Sweep(
        "EXPERTS_OF_FEW",
        mixing(4, 16),
        rows(64, block_depth=[64], stages=[3, 4, 5, 6])
        + rows(64, block_depth=[128], stages=[2, 3, 5])
        + rows(128, block_depth=[64, 128], stages=[3, 4])
        + rows(128, block_depth=[64], stages=[3, 4], warps=[8])
        + rows(32, block_depth=[128], stages=[3, 4])
        + rows(64, token_tile=[8], block_depth=[64, 128], stages=[4])
        + grid(down_rows=[128]),
    ),
    "experts, many": Sweep(
        "EXPERTS_OF_MANY",
        mixing(64, 128),
        rows(64, 128, token_tile=[32, 64], block_depth=[64], stages=[3, 4])
        + rows(64, 128, token_tile=[32, 64], block_depth=[128], stages=[2, 3])
        + rows(128, token_tile=[32, 64], block_depth=[64], stages=[3, 4], warps=[8]),
    ),
    "experts, float8, one": Sweep(
        "FLOAT8_EXPERTS_OF_ONE",
        mixing(1, float8=True),
        rows(64, stages=[3, 5, 6, 8])
        + rows(64, token_tile=[16], warps=[2, 4], stages=[4, 6])
        + rows(64, warps=[4], stages=[4, 6])
        + rows(32, warps=[1, 2], stages=[4, 6, 8])
        + rows(16, warps=[1], stages=[4, 8])
        + rows(128, warps=[2, 4, 8], stages=[3, 4])
        + rows(16, 32, token_tile=[1], warps=[4], stages=[1, 2, 4])
        + grid(down_rows=[32, 128]),
    ),
    "experts, float8, few": Sweep(
        "FLOAT8_EXPERTS_OF_FEW",
        mixing(4, 16, float8=True),
        rows(64, stages=[3, 5, 6])
        + rows(64, token_tile=[8], stages=[4, 6])
        + rows(64, warps=[4], stages=[3, 4])
        + rows(32, warps=[1, 2], stages=[4, 6])
        + rows(128, warps=[2, 4, 8], stages=[3, 4]),
    ),
    "experts, float8, many": Sweep(
        "FLOAT8_EXPERTS_OF_MANY",
        mixing(64, 128, 256, float8=True),
        rows(64, token_tile=[32, 64], warps=[4], stages=[3, 4])
        + rows(128, token_tile=[32, 64, 128], warps=[8], stages=[3, 4]),
    ),
    "append": Sweep(
        "COMPRESS",
        {
            "latent, 8 x 128": lambda: cases.appending(8, LATENT, 128, 1, DEVICE),
            "key, 8 x 4": lambda: cases.appending(8, KEY, 4, 2, DEVICE),
        },
        grid(block_tokens=[4, 8, 16, 32], warps=[4, 8, 16]),
    ),
    "float8 linear": Sweep(
        "LINEAR",
        {
            f"{what}, {batch}": lambda batch=batch, shape=shape: modules.projecting(
                batch, *shape, DEVICE
            )
            for batch in (1, 8)
            for what, shape in modules.PROJECTIONS.items()
        },
        grid(block_outputs=[64], programs=[264, 528, 1056], warps=[2], stages=[3, 4, 6])
        + grid(block_outputs=[32], programs=[528, 1056], warps=[2, 4], stages=[4, 6])
        + grid(block_outputs=[128], programs=[264, 528], warps=[2, 4], stages=[3, 4])
        + grid(block_outputs=[64], programs=[528], warps=[4], stages=[4]),
    ),
    "float8 linear, 17 to 64 rows": Sweep(
        "LINEAR_OF_SOME",
        projecting(17, 64),
        grid(block_outputs=[64], block_rows=[64], programs=[264, 396], warps=[4], stages=[3, 4])
        + grid(block_outputs=[128], block_rows=[64], programs=[264], warps=[8], stages=[3]),
    ),
    "float8 linear, 65 to 256 rows": Sweep(
        "LINEAR_OF_MANY",
        projecting(128, 256),
        grid(block_outputs=[128], block_rows=[256], programs=[132], warps=[8], stages=[2, 3])
        + grid(block_outputs=[64], block_rows=[128], programs=[132, 264], warps=[4], stages=[3])
        + grid(block_outputs=[64], block_rows=[64], programs=[396], warps=[4], stages=[3]),
    ),
    "float8 linear, a prompt": Sweep(
        "LINEAR_OF_PROMPTS",
        projecting(1024, 8192),
        grid(block_outputs=[128], block_rows=[256], programs=[132], warps=[8], stages=[2, 3])
        + grid(block_outputs=[64], block_rows=[128], programs=[132, 264], warps=[4], stages=[3]),
    ),
    "float8 rows, 17 to 192": Sweep(
        "FLOAT8_LINEAR_OF_SOME",
        projecting(17, 64, 128, float8_rows=True),
        grid(block_outputs=[64], block_rows=[32, 64], programs=[264, 396], warps=[4], stages=[3, 4])
        + grid(block_outputs=[64], block_rows=[128], programs=[264], warps=[4], stages=[3]),
    ),
    "float8 rows, 193 and more": Sweep(
        "FLOAT8_LINEAR_OF_MANY",
        projecting(256, 1024, 8192, float8_rows=True),
        grid(block_outputs=[128], block_rows=[128], programs=[132], warps=[8], stages=[3, 4])
        + grid(block_outputs=[64], block_rows=[128], programs=[264], warps=[4], stages=[3, 4])
        + grid(block_outputs=[128], block_rows=[64], programs=[132, 264], warps=[8], stages=[3]),
    ),
    "recall": Sweep(
        "GATHER",
        {
            "32,768 x 584 B": lambda: cases.recall(584, 32_768, DEVICE),
            "8,192 x 2,336 B": lambda: cases.recall(2336, 8192, DEVICE),
            "96 x 37,376 B": lambda: cases.recall(37_376, 96, DEVICE),
        },
        grid(programs=[4, 8, 12, 16, 24, 32, 64], tile_words=[2048], stages=[4], warps=[4])
        + grid(programs=[8, 16], tile_words=[2048], stages=[4], warps=[8])
        + grid(programs=[8, 16], tile_words=[1024, 4096], stages=[4], warps=[4])
        + grid(programs=[8, 16], tile_words=[2048], stages=[3, 6], warps=[4])
        + grid(programs=[16], segment_words=[64, 512], tile_words=[2048], stages=[4], warps=[4]),
    ),
}

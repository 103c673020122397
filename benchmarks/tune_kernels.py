"""Times every kernel over a grid of its tuning values (`fmsim/exec/kernels/tuning.py`) on one GPU:
what those values are chosen by.

    python benchmarks/tune_kernels.py [--kernel NAME ...] [--seconds 100] [--out FILE.json]

A line a setting, its time at each shape; the best of each shape is marked. A setting that does not
compile (out of registers or shared memory) is left out, and one whose result is not the reference's
is an error. Processes beside this one compile first, into Triton's cache. For the recall also how
much slower a stream of matrix products beside it becomes, which decides its number of programs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.layout import KEY, LATENT
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure.timing import captured, median_s

DEVICE = "cuda"
LIMIT = 1e-2  # relative error against the reference
RUNS = 8


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
        str(batch): lambda batch=batch: cases.mixing(batch, DEVICE, float8) for batch in batches
    }


SWEEPS = {
    "index scores": Sweep(
        "INDEX_SCORES",
        {
            "1 x 131,072": lambda: cases.index_scoring(1, 131_072, DEVICE),
            "8 x 128,000": lambda: cases.index_scoring(8, 128_000, DEVICE),
            "8 x 128,000, float8 queries": lambda: cases.index_scoring(
                8, 128_000, DEVICE, float8_queries=True
            ),
        },
        grid(block_entries=[64], programs=[264, 396, 528, 660], stages=[3, 4, 6])
        + grid(block_entries=[32], programs=[528, 1056], stages=[4, 6]),
    ),
    "memory scores": Sweep(
        "MEMORY_SCORES",
        {
            "3 x 1 x 131,072": lambda: cases.memory_scoring(1, 131_072, DEVICE),
            "3 x 8 x 32,768": lambda: cases.memory_scoring(8, 32_768, DEVICE),
        },
        grid(block_entries=[64], programs=[264, 396, 528], stages=[4, 5], warps=[4])
        + grid(block_entries=[32], programs=[396, 528, 792], stages=[4], warps=[4]),
    ),
    "top-k": Sweep(
        "TOP_K",
        {
            f"{batch} x {n:,}": lambda batch=batch, n=n: cases.selection(batch, n, DEVICE)
            for batch, n in ((1, 32_768), (1, 131_072), (8, 262_144))
        },
        grid(chunk=[16_384, 8192], finalists=[1024, 2048], warps=[8, 16]),
    ),
    "attention, one": Sweep(
        "ATTENTION",
        {
            "1 x 640": lambda: cases.attention(1, 128_000, DEVICE),
            "1 x 4,224": lambda: cases.attention(1, 4096, DEVICE, selected=4096),
        },
        grid(block_heads=[16], block_rows=[16, 32], programs=[132, 264], warps=[4], stages=[1, 2])
        + grid(block_heads=[64], block_rows=[32, 64], warps=[8], stages=[1, 2]),
    ),
    "attention, some": Sweep(
        "ATTENTION_OF_SOME",
        {
            f"{batch} x 640": lambda batch=batch: cases.attention(batch, 128_000, DEVICE)
            for batch in (4, 8)
        },
        grid(block_rows=[32, 64], programs=[132, 264], stages=[1, 2])
        + grid(block_heads=[16], block_rows=[32], programs=[132, 264], warps=[4], stages=[2]),
    ),
    "attention, many": Sweep(
        "ATTENTION_OF_MANY",
        {
            f"{batch} x 640": lambda batch=batch: cases.attention(batch, 16_384, DEVICE)
            for batch in (16, 32, 97)
        }
        | {"97 x 4,224": lambda: cases.attention(97, 4096, DEVICE, selected=4096)},
        grid(block_rows=[64], programs=[132, 264], stages=[1, 2], gather_rows=[8, 16, 32])
        + grid(block_rows=[32], programs=[132, 264], stages=[2, 3]),
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
        mixing(64, 128, float8=True),
        rows(64, token_tile=[32, 64], warps=[2, 4], stages=[3, 4])
        + rows(128, token_tile=[32, 64], warps=[4, 8], stages=[3, 4])
        + rows(32, token_tile=[32, 64], warps=[2], stages=[4]),
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
            f"{what}, {batch}": lambda batch=batch, shape=shape: cases.projecting(
                batch, *shape, DEVICE
            )
            for batch in (1, 8)
            for what, shape in cases.PROJECTIONS.items()
        },
        grid(block_outputs=[64], programs=[264, 528, 1056], warps=[2], stages=[3, 4, 6])
        + grid(block_outputs=[32], programs=[528, 1056], warps=[2, 4], stages=[4, 6])
        + grid(block_outputs=[128], programs=[264, 528], warps=[2, 4], stages=[3, 4])
        + grid(block_outputs=[64], programs=[528], warps=[4], stages=[4]),
    ),
    "float8 linear, many rows": Sweep(
        "LINEAR_OF_MANY",
        {
            f"{what}, 64": lambda shape=shape: cases.projecting(64, *shape, DEVICE)
            for what, shape in cases.PROJECTIONS.items()
        },
        grid(block_outputs=[128], programs=[132, 264, 528], warps=[4, 8], stages=[3, 4])
        + grid(block_outputs=[64], programs=[264, 528], warps=[2, 4], stages=[3, 4]),
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


def set_to(sweep: Sweep, setting: dict[str, int]) -> None:
    setattr(tuning, sweep.value, STARTING[sweep.value]._replace(**setting))


STARTING = {sweep.value: getattr(tuning, sweep.value) for sweep in SWEEPS.values()}


def error_of(case: cases.Case) -> float | None:
    if case.reference is None:
        return None
    expected, found = case.reference().double(), case.run().double()
    return float((found - expected).norm() / expected.norm())


def why_not(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"


# -------------------------------------------------------------------- compiling ahead, in processes


@torch.inference_mode()
def compile_some(jobs: list[tuple[str, str, dict[str, int]]], deadline: float) -> None:
    """Run each job once, for Triton's cache of compiled kernels.

    The time that is left is the caller's too.
    """
    for kernel, shape, setting in jobs:
        if time.time() > deadline:
            return
        set_to(SWEEPS[kernel], setting)
        try:
            SWEEPS[kernel].shapes[shape]().run()
        except Exception as error:  # it will fail again where it is timed, and be told there
            print(f"{kernel}, {shape}, {setting}: {why_not(error)}", file=sys.stderr)


def compile_ahead(kernels: list[str], processes: int, deadline: float) -> None:
    """All settings of all shapes, but for the recall's, whose gigabytes of pinned memory cost more
    than its compilation.
    """
    jobs = [
        (name, shape, setting)
        for name in kernels
        if name != "recall"
        for shape in SWEEPS[name].shapes
        for setting in [{}, *SWEEPS[name].settings]
    ]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_some, args=(jobs[n::processes], deadline))
        for n in range(min(processes, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


# ------------------------------------------------------------------------------------------- timing


def table_of(kernel: str, deadline: float) -> list[dict[str, Any]]:
    sweep = SWEEPS[kernel]
    rows = [
        {"kernel": kernel, "setting": setting, "us": {}, "failed": {}}
        for setting in [{}, *sweep.settings]
    ]
    for label, build in sweep.shapes.items():
        case = build()
        for row in rows:
            if time.time() > deadline:
                row["failed"][label] = "no time left"
                continue
            set_to(sweep, row["setting"])
            try:
                error = error_of(case)
                row["us"][label] = median_s(case.run, DEVICE, runs=RUNS) * 1e6
            except Exception as why:  # OutOfResources and the compiler's own errors
                row["failed"][label] = why_not(why)
                continue
            if error is not None and not error <= (0.0 if kernel == "top-k" else LIMIT):
                row["failed"][label] = f"relative error {error:.1e}"
        del case
        torch.cuda.empty_cache()
    set_to(sweep, {})
    return rows


def print_table(kernel: str, rows: list[dict[str, Any]]) -> None:
    labels = list(SWEEPS[kernel].shapes)
    print(f"\n{kernel}: us at {'; '.join(labels)}")
    best = {
        label: min(
            (row["us"][label] for row in rows if label in row["us"] and label not in row["failed"]),
            default=None,
        )
        for label in labels
    }
    for row in rows:
        told = [
            (
                f"{row['us'][label]:9.1f}{'*' if row['us'][label] == best[label] else ' '}"
                if label in row["us"]
                else "        - "
            )
            for label in labels
        ]
        setting = (
            ", ".join(f"{name} {value}" for name, value in row["setting"].items()) or "as it is set"
        )
        print(
            " ".join(told),
            f" {setting}",
            *(f"[{label}: {why}]" for label, why in row["failed"].items()),
            flush=True,
        )


def slowdowns(programs: Iterable[int], deadline: float) -> list[dict[str, Any]]:
    """How much slower 5 ms of matrix products are while entries are recalled all the time: large
    ones, and a decode's with few rows.
    """
    entries = cases.recall(584, 32_768, DEVICE)
    square, thin = (torch.randn(n, 8192, device=DEVICE, dtype=torch.bfloat16) for n in (8192, 8))
    weights = torch.randn(8192, 32_768, device=DEVICE, dtype=torch.bfloat16)
    work = {
        "large products": lambda: [square @ square for _ in range(4)],
        "a decode's products": lambda: [thin @ weights for _ in range(24)],
    }
    rows = []
    for count in programs:
        if time.time() > deadline:
            break
        set_to(SWEEPS["recall"], {"programs": count})
        recall_s = median_s(entries.run, DEVICE, runs=RUNS, cold=False)
        recall, slower = captured(entries.run), {}
        for label, products in work.items():
            run = captured(products)
            alone_s = _beside(run, lambda: None, 0)
            slower[label] = _beside(run, recall, round(1.5 * alone_s / recall_s) + 1) / alone_s - 1
        rows.append(
            {
                "programs": count,
                "recall_us": recall_s * 1e6,
                "gb_per_s": entries.n_bytes / recall_s / 1e9,
                "slower": slower,
            }
        )
        told = "; ".join(f"{label} {share:+.1%}" for label, share in slower.items())
        print(
            f"recall on {count} programs, {rows[-1]['gb_per_s']:.1f} GB/s; beside it {told}",
            flush=True,
        )
    set_to(SWEEPS["recall"], {})
    return rows


def _beside(run: Callable[[], object], recall: Callable[[], object], times: int) -> float:
    """Seconds of ``run`` while ``recall`` goes on, ``times`` over, on another stream; the median of
    five.
    """
    side, found = torch.cuda.Stream(), []
    for _ in range(6):
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(times):
                recall()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found[1:])[2]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/tune_kernels.py --kernel recall --seconds 60",
    )
    parser.add_argument(
        "--kernel", action="append", choices=list(SWEEPS), help="only this one; repeat for more"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=100.0,
        help="time for all of it; what is not timed by then is left out and told",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=max(1, min(14, (os.cpu_count() or 2) - 1)),
        help="that compile ahead",
    )
    parser.add_argument("--out", type=Path, help="write all times as JSON")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/tune_kernels.py needs a CUDA device, and torch finds none")
    start, kernels = time.time(), given.kernel or list(SWEEPS)
    deadline = start + given.seconds
    compile_ahead(kernels, given.processes, start + 0.5 * given.seconds)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    rows, beside = [], []
    for number, kernel in enumerate(kernels):
        share = (deadline - time.time()) / (
            len(kernels) - number
        )  # of what is left; a kernel that needs less leaves more
        found = table_of(kernel, time.time() + share * (0.6 if kernel == "recall" else 1.0))
        print_table(kernel, found)
        rows += found
        if kernel == "recall":
            beside = slowdowns((4, 8, 12, 16, 24, 32), deadline)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(
            json.dumps(
                {
                    "device": torch.cuda.get_device_name(),
                    "rows": rows,
                    "recall_beside_products": beside,
                },
                indent=1,
            )
            + "\n"
        )
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()

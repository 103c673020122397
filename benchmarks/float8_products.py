"""Every way to a product of float8 rows and weights, at every number of rows, on one GPU: what
`fmsim/exec/kernels/products/float8_ways.json` is made from.

    python benchmarks/float8_products.py [--seconds 100] [--write] [--out FILE.json]

Shapes are those of V4-Flash's projections. Three things are timed, each beside torch with bfloat16
weights: the product of rows that are rounded (`us`), what makes the rows, with and without rounding
them (`producer_us`), and both, one after the other (`with_producer_us`). What a product in groups
makes is rounded by a launch of its own; what one takes is `rounding_us`. `start_us` is a launch
that does nothing, which no product can be without. Medians of CUDA graph replays with a cold L2.
With --write the order of the ways, the fastest first, goes into the package's table under this
card.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from torch import Tensor

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.lang import after_previous, overlapped, triton
from fmsim.exec.kernels.norms.norm_rope import norm_rope
from fmsim.exec.kernels.norms.rms_norm import rms_norm
from fmsim.exec.kernels.norms.rounded_rows import Activations, Float8Rows, round_rows
from fmsim.exec.kernels.products import float8_products
from fmsim.exec.kernels.products.hyper_connection import enter
from fmsim.exec.kernels.products.linear import grouped_product, linear_triton
from fmsim.exec.kernels.weights import dequantise, quantise
from fmsim.exec.measure import module_cases as modules
from fmsim.exec.measure.timing import median_s
from fmsim.exec.model.norm_rope import RMSNorm

ROWS = (17, 32, 48, 64, 96, 128, 129, 192, 256, 512, 1024, 2048, 4096, 8192)
DECODED = 256  # rows at most that a decode step makes; more are a prompt's
HEADS, HEAD = 64, 512
RUNS = 11
DEVICE = "cuda"
WIDE = "torch, bf16"

Produce = Callable[[bool], Activations]  # rows, rounded or not


class Product(NamedTuple):
    """One of `modules.PROJECTIONS`: its weights, float8 [out, in] with scales, and bfloat16."""

    weight: Tensor
    scale: Tensor
    groups: int
    wide: Tensor

    @classmethod
    def drawn(cls, name: str) -> Product:
        outputs, inputs, groups = modules.PROJECTIONS[name]
        weight, scale = quantise(torch.randn(outputs, inputs, device=DEVICE) * inputs**-0.5)
        return cls(weight, scale, groups, dequantise(weight, scale, dtype=torch.bfloat16))

    def by(self, way: str, rows: Float8Rows) -> Tensor:
        given = rows, self.weight, self.scale, self.groups
        if way in float8_products.WAYS:
            return float8_products.WAYS[way](*given)
        return linear_triton(*given, tune=float8_products.OWN_TUNES.get(way))

    def ways(self, rows: int) -> list[str]:
        """But for those that would be others', with blocks of fewer rows."""
        described = tuning.DESCRIBED_LINEAR.items()
        left = {way for way, tune in described if tune.block_rows >= 2 * rows}
        every = [float8_products.OWN, *float8_products.OWN_TUNES, *float8_products.WAYS]
        return [way for way in every if way not in left]

    def by_torch(self, x: Tensor) -> Tensor:
        return grouped_product(x, self.wide, self.groups)

    def floor_us(self, rows: int) -> float:
        """Bytes over 3.35 TB/s, or operations at 70% of the card's float8 rate."""
        (outputs, inputs), width = self.weight.shape, self.groups * self.weight.shape[1]
        of_rows = rows * (width + width // 128 * 4 + 2 * outputs)
        n_bytes = self.weight.nbytes + self.scale.nbytes + of_rows
        return max(n_bytes / 3.35e12, 2 * rows * outputs * inputs / (0.7 * 1979e12)) * 1e6


def producer(name: str, rows: int) -> Produce:
    """What makes the input of a product, but that of `output`."""
    draw = lambda *shape: torch.randn(rows, *shape, device=DEVICE).to(torch.bfloat16)
    if name == "attended":
        x, angles = draw(HEADS, HEAD), torch.rand(rows, modules.ROPE_PAIRS, device=DEVICE)
        turn = angles.cos(), angles.sin()

        def turned(rounded: bool) -> Activations:
            out = norm_rope(x, turn, inverse=True, rounded=rounded)
            return out if isinstance(out, Float8Rows) else out.flatten(1)

        return turned
    if name == "input" and rows <= DECODED:
        given = modules.connecting(rows, DEVICE).given
        return lambda rounded: enter(*given, rounded)[1]
    x = draw(modules.PROJECTIONS[name][1])
    norm = RMSNorm(x.shape[1], 1e-6).to(DEVICE, torch.bfloat16)
    return lambda rounded: rms_norm(x, norm, rounded)


@triton.jit
def _nothing(x):
    after_previous()


def start_us() -> float:
    """Of a launch that does nothing, on all multiprocessors."""
    x = torch.zeros(1, device=DEVICE)
    return us(lambda: _nothing[(132,)](x, num_warps=4, **overlapped(x)))


def us(work: Callable[[], object]) -> float:
    return round(median_s(work, DEVICE, RUNS) * 1e6, 2)


def timed(
    product: Product, rows: Float8Rows, patience: peers.Patience
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds by way, and why a way is missing."""
    ours = product.by(float8_products.OWN, rows)
    to_try = {way: lambda way=way: product.by(way, rows) for way in product.ways(rows.count)}
    tried = peers.tried(to_try, ours, patience)
    skipped = {way: why for way, why in tried.items() if isinstance(why, str)}
    found = {way: us(lambda way=way: product.by(way, rows)) for way in tried if way not in skipped}
    return found, skipped


class Bench:
    """The products of a layer."""

    def __init__(self, patience: peers.Patience):
        self.patience = patience
        self.products = {name: Product.drawn(name) for name in modules.PROJECTIONS}

    def row(self, name: str, count: int, before: str | None) -> dict[str, Any]:
        """Of one product and ``count`` rows; ``before`` is the fastest way of the product that
        makes the rows of `output`."""
        product = self.products[name]
        if name == "output":
            attended, source = self.products["attended"], producer("attended", count)
            given, wide = source(True), source(False)

            def make(rounded: bool) -> Activations:
                out = attended.by(before, given)
                return round_rows(out) if rounded else out

            by_torch = lambda: product.by_torch(attended.by_torch(wide))
        else:
            make = producer(name, count)
            by_torch = lambda: product.by_torch(make(False))
        rows, x = make(True), make(False).flatten(0, -2)
        found, skipped = timed(product, rows, self.patience)
        best = min(found, key=found.get)
        both = {best: us(lambda: product.by(best, make(True))), WIDE: us(by_torch)}
        return {
            "rows": count,
            "us": found | {WIDE: us(lambda: product.by_torch(x))},
            "rounding_us": us(lambda: round_rows(x)),
            "producer_us": {
                "as it is": us(lambda: make(False)),
                "rounded": us(lambda: make(True)),
            },
            "with_producer_us": both,
            "skipped": skipped,
            "floor_us": product.floor_us(count),
        }


def best_of(row: dict[str, Any]) -> str:
    return min((way for way in row["us"] if way != WIDE), key=row["us"].get)


def told(name: str, row: dict[str, Any]) -> str:
    best, times, both = best_of(row), row["us"], row["with_producer_us"]
    of = "; ".join(
        ", ".join(f"{way} {taken:.1f}" for way, taken in row[key].items())
        for key in ("us", "producer_us", "with_producer_us")
    )
    return (
        f"{name:8}, {row['rows']:5} rows: {times[best] / times[WIDE]:.2f} of torch's bf16,"
        f" {both[best] / both[WIDE]:.2f} with what makes the rows; {of}; {row['skipped'] or ''}"
    )


@torch.inference_mode()
def compile_all(name: str, way: str) -> None:
    """One way of our kernel at every number of rows, for Triton's cache."""
    product = Product.drawn(name)
    width = product.groups * product.weight.shape[1]
    for count in ROWS[:-2]:
        x = torch.randn(count, width, device=DEVICE).to(torch.bfloat16)
        product.by(way, round_rows(x))


@torch.inference_mode()
def compile_producers(name: str) -> None:
    for rounded in (False, True):
        producer(name, DECODED)(rounded)
        producer(name, 2 * DECODED)(rounded)


def compiled() -> None:
    """Everything, in processes side by side."""
    own = [float8_products.OWN, *float8_products.OWN_TUNES, *tuning.DESCRIBED_LINEAR]
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        makers = [name for name in modules.PROJECTIONS if name != "output"]
        waits = [pool.apply_async(compile_producers, (name,)) for name in makers]
        waits += [
            pool.apply_async(compile_all, (name, way))
            for way in own
            for name in modules.PROJECTIONS
        ]
        for wait in waits:
            wait.get()


def written(card: str, shapes: list[dict[str, Any]]) -> None:
    """Of each number of rows the ways, the fastest first, into the package's table: to the first of
    our own through pointers, which always can be had.
    """
    own = {float8_products.OWN, *float8_products.OWN_TUNES}

    def ordered(us: dict[str, float]) -> list[str]:
        ways = sorted((way for way in us if way != WIDE), key=us.get)
        return ways[: 1 + next(place for place, way in enumerate(ways) if way in own)]

    def of(shape: dict[str, Any]) -> dict[str, int]:
        return {key: shape[key] for key in ("outputs", "inputs", "groups")}

    table = json.loads(float8_products.TABLE.read_text())
    before = {tuple(of(shape).values()): shape["ways"] for shape in table["cards"].get(card, ())}
    for shape in shapes:  # rows that were not reached keep their ways
        ways = before.setdefault(tuple(of(shape).values()), {})
        ways |= {str(row["rows"]): ordered(row["us"]) for row in shape["rows"]}
    table["cards"][card] = [
        of(shape) | {"ways": before[tuple(of(shape).values())]} for shape in shapes
    ]
    float8_products.TABLE.write_text(json.dumps(table, indent=1) + "\n")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="start no row after so many")
    parser.add_argument("--write", action="store_true", help="into the package's table")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "float8-products.json"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/float8_products.py needs a CUDA device, and torch finds none")
    start_s = time.monotonic()
    card = torch.cuda.get_device_name()
    shapes = {
        name: {"outputs": outputs, "inputs": inputs, "groups": groups, "rows": []}
        for name, (outputs, inputs, groups) in modules.PROJECTIONS.items()
    }
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": card,
        "torch": torch.__version__,
        "command": f"python benchmarks/float8_products.py, {RUNS} CUDA graph replays a time",
        "shapes": list(shapes.values()),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.out.exists():  # what was tried stays beside what is measured anew
        result["tried"] = json.loads(given.out.read_text()).get("tried", [])
    compiled()
    print(f"compiled in {time.monotonic() - start_s:.0f} s", flush=True)
    bench = Bench(peers.Patience(given.seconds))
    gc.collect()
    gc.freeze()  # what a capture collects is then little
    result["start_us"] = start_us()
    for count in ROWS:
        before = None
        for name in modules.PROJECTIONS:
            if time.monotonic() - start_s > given.seconds:
                print(f"{name}, {count} rows: no time left", flush=True)
                continue
            row = bench.row(name, count, before)
            before = best_of(row) if name == "attended" else before
            shapes[name]["rows"].append(row)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            print(told(name, row), flush=True)
            torch.cuda.empty_cache()
        if given.write:
            written(card, list(shapes.values()))
    print(f"{time.monotonic() - start_s:.0f} s, from {tuning.FEW_ROWS + 1} rows on; {given.out}")


if __name__ == "__main__":
    main()

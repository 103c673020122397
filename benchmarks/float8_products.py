"""Every way to a product of float8 rows and weights, at every number of rows, on one GPU: what
`fmsim/exec/kernels/float8_ways.json` is made from.

    python benchmarks/float8_products.py [--seconds 100] [--write] [--out FILE.json]

Shapes are those of V4-Flash's projections. Ours and cuBLAS, the rounding of rows included, beside
torch with bfloat16 weights; medians of CUDA graph replays with a cold L2. With
--write the order of the ways, the fastest first, goes into the package's table under this card.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import peers
import torch

from fmsim.exec.kernels import float8_products, tuning
from fmsim.exec.kernels.linear import linear_triton
from fmsim.exec.measure import module_cases as modules
from fmsim.exec.measure.timing import median_s

ROWS = (17, 32, 64, 96, 128, 129, 192, 256, 512, 1024, 2048, 4096, 8192)
RUNS = 12
DEVICE = "cuda"


def own_ways() -> dict[str, tuning.LinearTuning | None]:
    """Our kernel's, by their sizes."""
    return {float8_products.OWN: None} | float8_products.OWN_BY_ROWS


@torch.inference_mode()
def compile_own(shape: tuple[int, int, int]) -> None:
    """Our kernel at every number of rows, once, for Triton's cache."""
    for rows in ROWS:
        x, weight, scale, groups, _ = modules.projecting(rows, *shape, DEVICE, True).given
        for tune in own_ways().values():
            linear_triton(x, weight, scale, groups, float8_rows=True, tune=tune)
        torch.cuda.empty_cache()


def measured(shape: tuple[int, int, int], rows: int, patience: peers.Patience) -> dict[str, Any]:
    """Microseconds by way, and why a way is missing."""
    case = modules.projecting(rows, *shape, DEVICE, float8_rows=True)
    x, weight, scale, groups, _ = case.given
    given = x.flatten(0, -2), weight, scale, groups
    ours = linear_triton(*given, float8_rows=True)
    found = {name: (lambda way=way: way(*given)) for name, way in float8_products.WAYS.items()}
    ways = peers.tried(found, ours, patience)
    skipped = {name: way for name, way in ways.items() if isinstance(way, str)}
    to_time = {name: way for name, way in ways.items() if name not in skipped}
    to_time |= {
        name: lambda tune=tune: linear_triton(*given, float8_rows=True, tune=tune)
        for name, tune in own_ways().items()
    }
    to_time |= case.peers
    us = {name: median_s(way, DEVICE, RUNS) * 1e6 for name, way in to_time.items()}
    bytes_s, flops_s = case.n_bytes / 3.35e12, case.flops / (0.7 * 1979e12)
    return {"rows": rows, "us": us, "skipped": skipped, "floor_us": max(bytes_s, flops_s) * 1e6}


def orders(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Of each number of rows the ways, the fastest first."""
    names = {*own_ways(), *float8_products.WAYS}
    return {
        str(row["rows"]): sorted((way for way in row["us"] if way in names), key=row["us"].get)
        for row in rows
    }


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
    start_s, patience = time.monotonic(), peers.Patience(given.seconds)
    card = torch.cuda.get_device_name()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": card,
        "torch": torch.__version__,
        "shapes": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    shapes = list(modules.PROJECTIONS.values())
    with multiprocessing.get_context("spawn").Pool(len(shapes)) as pool:
        pool.map(compile_own, shapes)
    for outputs, inputs, groups in shapes:
        shape = {"outputs": outputs, "inputs": inputs, "groups": groups, "rows": []}
        result["shapes"].append(shape)
        for rows in ROWS:
            if time.monotonic() - start_s > given.seconds:
                print(f"{outputs} x {inputs}, {rows} rows: no time left", flush=True)
                continue
            row = measured((outputs, inputs, groups), rows, patience)
            shape["rows"].append(row)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            best = min(row["us"][way] for way in orders([row])[str(rows)])
            told = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
            print(
                f"{outputs:6} x {inputs:5} / {groups}, {rows:5} rows:"
                f" {best / row['us']['torch, bf16']:.2f} of torch's bf16,"
                f" {best / row['floor_us']:.2f} of the floor; {told} {row['skipped'] or ''}",
                flush=True,
            )
            torch.cuda.empty_cache()
    if given.write:
        table = json.loads(float8_products.TABLE.read_text())
        table["cards"][card] = [
            {key: shape[key] for key in ("outputs", "inputs", "groups")}
            | {"ways": orders(shape["rows"])}
            for shape in result["shapes"]
            if shape["rows"]
        ]
        float8_products.TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{time.monotonic() - start_s:.0f} s, from {tuning.FEW_ROWS + 1} rows on; {given.out}")


if __name__ == "__main__":
    main()

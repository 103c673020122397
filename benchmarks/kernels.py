"""Every kernel against its floor and its peers, on one GPU: bytes, time, share of the bandwidth,
and the best other way.

    python benchmarks/kernels.py [--kernel NAME ...] [--out benchmarks/results/kernels.json]

A floor is the fewest bytes that a kernel must move over the bandwidth at which this GPU adds up a
large tensor (of PCIe, for recall), or its matrix products' operations at 70% of the card's rate,
whichever takes longer. Times are medians of CUDA graph replays with a cold L2. Each kernel's result
is compared with its torch reference first; one that differs is marked, and ends the run with an
error.

A row's time is the engine's way, which may be another's kernel (`flash_mla`, `float8_products`);
"own" beside it is ours. Peers: FlashMLA, DeepGEMM and cuBLAS's float8 product (`peers`),
FlashInfer's top_k, where they are installed (where not, the row says why); torch.topk;
torch.compile of the reference where that makes no host synchronisation; of a recall the copy
engine, with a copy for each row and the list of rows known beforehand, which a decode's host does
not know.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from step_profile import bandwidth

try:
    import flashinfer
except ImportError:
    flashinfer = None

from fmsim.exec.kernels import tuning
from fmsim.exec.kernels.layout import KEY, LATENT
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure import module_cases as modules
from fmsim.exec.measure.module_times import AttentionTimer, attention_bytes
from fmsim.exec.measure.timing import median_s
from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.model.weights.synthetic import synthetic_config
from fmsim.geometry import PRESETS

PCIE_BYTES_PER_S = 55e9
# of an H100 and an H200, dense, by data sheet; 70% of it is what large products reach
HALF_FLOPS_PER_S, FLOAT8_FLOPS_PER_S, REACHED = 989e12, 1979e12, 0.7
DEVICE = "cuda"
SGLANG = "SGLang 0.5.14, H100, FP8 weights (aiconfigurator-core 0.12.0 table, not run here)"
LIMITS = {
    "index scores": 1e-2,
    "index scores, float8 queries": 1e-2,
    "memory scores": 1e-2,
    "memory scores, bfloat16 queries": 1e-2,
    "sparse attention": 1e-2,
    "sparse attention with masses": 1e-2,
    "top-k": 0.0,
    "hyper-connection": 1e-2,
    "hyper-connection, head": 1e-2,
    "norm and RoPE": 1e-2,
    "RoPE": 1e-2,
    "RMSNorm": 1e-2,
    "experts": 1e-2,
    "experts, float8": 1e-2,
    "float8 linear": 1e-2,
    "float8 linear, float8 rows": 1e-2,
}
COMPILED_ALONE = {"sparse attention"}  # whose reference compiles, but not for a CUDA graph
COMPILED = {
    "hyper-connection",
    "hyper-connection, head",
    "norm and RoPE",
    "RoPE",
    "RMSNorm",
}  # whose compiled reference a CUDA graph holds too
TOP_K_PEERS = (
    {}
    if flashinfer is None
    else {"flashinfer.top_k": lambda scores: flashinfer.top_k(scores, cases.TOP_K)}
)
PROJECTED = (1, 8, 16, 17, 64, 128, 129, 256, 1024, 8192)  # rows, about every change of way
OTHERS = {
    "sparse attention": peers.of_attention,
    "index scores, float8 queries": peers.of_index_scores,
    "float8 linear, float8 rows": peers.of_product,
}
BUILDERS = {
    "index scores": [
        lambda b=b, n=n: cases.index_scoring(b, n, DEVICE)
        for b, n in ((1, 32_768), (1, 131_072), (8, 128_000), (32, 32_768))
    ],
    "index scores, float8 queries": [
        lambda b=b, n=n: cases.index_scoring(b, n, DEVICE, float8_queries=True)
        for b, n in ((1, 8192), (1, 131_072), (8, 128_000), (32, 32_768), (67, 131_072))
    ],
    "top-k": [
        lambda b=b, n=n: cases.selection(b, n, DEVICE, TOP_K_PEERS)
        for b, n in (
            (1, 32_768),
            (1, 131_072),
            (1, 262_144),
            (1, 2**20),
            (8, 128_000),
            (33, 131_072),
            (67, 131_072),
            (128, 131_072),
            (64, 32_768),
        )
    ],
    "sparse attention": (
        [lambda b=b: cases.attention(b, 128_000, DEVICE) for b in (1, 8, 16, 32)]
        + [lambda b=b: cases.attention(b, 16_384, DEVICE) for b in (64, 97, 128, 256)]
        + [lambda b=b: cases.attention(b, 4096, DEVICE, selected=4096) for b in (1, 32, 97)]
        + [lambda b=b: cases.attention(b, 16_384, DEVICE, per_page=1) for b in (16, 97)]
    ),
    "sparse attention with masses": [lambda: cases.attention(8, 128_000, DEVICE, masses=True)],
    "append": [
        lambda: cases.appending(8, LATENT, 4, 2, DEVICE),
        lambda: cases.appending(8, KEY, 4, 2, DEVICE),
        lambda: cases.appending(8, LATENT, 128, 1, DEVICE),
    ],
    "hyper-connection": [lambda b=b: modules.connecting(b, DEVICE) for b in (1, 8, 64)],
    "hyper-connection, head": [
        lambda b=b: modules.connecting(b, DEVICE, head=True) for b in (1, 64)
    ],
    "norm and RoPE": [
        lambda b=b: modules.turning(b, cases.HEADS, LATENT.width, DEVICE, normalised=True)
        for b in (1, 8, 64)
    ],
    "RoPE": [
        lambda w=w: modules.turning(8, cases.HEADS, w, DEVICE) for w in (KEY.width, LATENT.width)
    ],
    "RMSNorm": [lambda b=b: modules.norming(b, DEVICE) for b in (1, 64)],
    "routing": [lambda b=b: modules.routing(b, DEVICE) for b in (1, 64)],
    "experts": [lambda b=b: modules.mixing(b, DEVICE) for b in (1, 4, 16, 64, 128, 256)],
    "experts, float8": [
        lambda b=b: modules.mixing(b, DEVICE, float8=True) for b in (1, 4, 16, 64, 128, 256, 320)
    ],
    "float8 linear": [
        lambda b=b, s=s: modules.projecting(b, *s, DEVICE)
        for s in modules.PROJECTIONS.values()
        for b in PROJECTED
    ],
    "float8 linear, float8 rows": [
        lambda b=b, s=s: modules.projecting(b, *s, DEVICE, float8_rows=True)
        for s in modules.PROJECTIONS.values()
        for b in PROJECTED
        if b > tuning.FEW_ROWS
    ],
    "memory scores": [
        lambda b=b, n=n: cases.memory_scoring(b, n, DEVICE)
        for b, n in ((1, 32_768), (1, 131_072), (1, 262_144), (8, 32_768))
    ],
    "memory scores, bfloat16 queries": [
        lambda b=b, n=n: cases.memory_scoring(b, n, DEVICE, float8_queries=False)
        for b, n in ((1, 32_768), (1, 131_072), (8, 32_768))
    ],
    "recall": (
        [
            lambda r=r, n=n: cases.recall(r, n, DEVICE)
            for r, n in (
                (584, 4096),
                (584, 32_768),
                (2336, 8192),
                (37_376, 96),
                (37_376, 384),
                (37_376, 2000),
            )
        ]
        + [lambda n=n: cases.recall(584, n, DEVICE, ascending=True) for n in (4096, 32_768)]
        + [lambda: cases.recall(584, 32_768, DEVICE, host_bytes=21 * 128_000 * 584, layers=21)]
    ),  # a request's mirror at 512K tokens, as an engine reads it
}
LAYERS = {"csa layer": CSA, "hca layer": HCA}


def wrong_by(case: cases.Case) -> float | None:
    """Relative error against the reference, or None where there is no reference."""
    if case.reference is None:
        return None
    expected, found = case.reference().double(), case.run().double()
    return float((found - expected).norm() / expected.norm())


class Ways(NamedTuple):
    """What a row is compared with: bytes a second by link, whether torch.compile is, and how long
    the peers' first calls may take.
    """

    floors: dict[str, float]
    compiled: bool
    patience: peers.Patience


def measured(name: str, case: cases.Case, ways: Ways) -> dict[str, Any]:
    error = wrong_by(case)
    bandwidth = PCIE_BYTES_PER_S if name == "recall" else ways.floors["hbm"]
    flops_per_s = FLOAT8_FLOPS_PER_S if name.endswith("float8 rows") else HALF_FLOPS_PER_S
    floor_s = max(case.n_bytes / bandwidth, case.flops / flops_per_s / REACHED)
    seconds = median_s(case.run, DEVICE)
    others = {}
    if name in OTHERS:
        others = peers.tried(OTHERS[name](*case.given), case.run(), ways.patience)
    skipped = {label: way for label, way in others.items() if isinstance(way, str)}
    to_time = (case.peers or {}) | {n: way for n, way in others.items() if n not in skipped}
    timed = {}
    for label, way in to_time.items():
        try:
            timed[label] = median_s(way, DEVICE)
        except Exception as why:  # what runs need not be what a CUDA graph can hold
            skipped[label] = f"{type(why).__name__}: {(str(why).splitlines() or [''])[0][:90]}"
    if ways.compiled and name in COMPILED_ALONE:  # the other references read lengths on the host
        timed["torch.compile"] = median_s(
            torch.compile(case.reference, dynamic=False), DEVICE, graph=False
        )
    if ways.compiled and name in COMPILED:
        timed["torch"] = median_s(case.reference, DEVICE)
        timed["torch.compile"] = median_s(torch.compile(case.reference, dynamic=False), DEVICE)
    others_s = [peer_s for label, peer_s in timed.items() if label != "own"]
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "bytes": case.n_bytes,
        "relative_error": error,
        "right": error is None or error <= LIMITS[name],
        "us": seconds * 1e6,
        "share_of_floor": floor_s / seconds,
        "peers_us": {label: peer_s * 1e6 for label, peer_s in timed.items()},
        "of_best_peer": seconds / min(others_s) if others_s else None,
        "peers_skipped": skipped,
    }


def layer(kind: str, float8: bool, floors: dict[str, float], tokens: int = 524_288) -> dict:
    """One layer's attention at batch 1, its weights bfloat16 or float8 as published: projections
    and the kernels between them, one CUDA graph; the step's angles and lengths, which layers share,
    given; the token closes no entry, as three of four don't.
    """
    flash = replace(PRESETS["v4-flash"], float8_weights=float8)
    config = synthetic_config(flash, flash.n_experts)
    timer = AttentionTimer(config, kind, (LATENT, KEY), DEVICE, lambda line: None)
    seconds = timer.ms(1, tokens) / 1e3
    read = flash.csa_entries(tokens) * (KEY.entry_bytes + 4) + flash.index_topk * LATENT.entry_bytes
    read = read if kind == CSA else flash.hca_entries(tokens) * LATENT.entry_bytes
    n_bytes = attention_bytes(config, kind) + read + flash.window_tokens * LATENT.entry_bytes
    name = f"{'CSA' if kind == CSA else 'HCA'} layer, {'float8' if float8 else 'bf16'} weights"
    return {
        "kernel": name,
        "shape": f"1 x {tokens:,} tokens",
        "bytes": n_bytes,
        "relative_error": None,
        "right": True,
        "us": seconds * 1e6,
        "share_of_floor": n_bytes / floors["hbm"] / seconds,
        "peers_us": {SGLANG: 137.0} if kind == CSA and tokens == 524_288 else {},
        "of_best_peer": None,
        "peers_skipped": {},
    }


def rows_of(name: str, ways: Ways) -> Iterator[dict[str, Any]]:
    if name in LAYERS:
        yield from (layer(LAYERS[name], float8, ways.floors) for float8 in (False, True))
    else:
        yield from (measured(name, build(), ways) for build in BUILDERS[name])


def line_of(row: dict[str, Any]) -> str:
    told = [] if row["right"] else [f"WRONG by {row['relative_error']:.1e}"]
    told += [f"{label} {us:.1f}" for label, us in row["peers_us"].items()]
    told += [f"{label}: {why}" for label, why in row["peers_skipped"].items()]
    ratio = "" if row["of_best_peer"] is None else f"{row['of_best_peer']:.2f}"
    return (
        f"{row['kernel']:30} {row['shape']:>22} {row['bytes'] / 1e6:8.1f} {row['us']:9.1f}"
        f" {row['share_of_floor']:9.1%} {ratio:>13}  {', '.join(told)}"
    )


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernel",
        action="append",
        choices=[*BUILDERS, *LAYERS],
        help="only this one; repeat for more",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes a minute"
    )
    parser.add_argument(
        "--seconds", type=float, help="start no row after so many; what is left out is told"
    )
    parser.add_argument(
        "--peer-seconds", type=float, default=300, help="that peers' first calls may take in all"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/kernels.py needs a CUDA device, and torch finds none; the kernels' tests"
            " run without one"
        )
    versions = {
        name: installed(name)
        for name in ("torch", "triton", "flashinfer-python", "sgl-flash-mla", "sgl-deep-gemm")
    }
    floors = {"hbm": bandwidth(), "pcie": PCIE_BYTES_PER_S}
    ways = Ways(floors, not given.no_compile, peers.Patience(given.peer_seconds))
    start_s = time.monotonic()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "floors_bytes_per_s": floors,
        "rows": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{'kernel':30} {'shape':>22} {'MB':>8} {'us':>9} {'of floor':>9} {'of best peer':>13}"
        "  peers, us"
    )
    for name in given.kernel or [*LAYERS, *BUILDERS]:
        if given.seconds and time.monotonic() - start_s > given.seconds:
            print(f"{name}: no time left", flush=True)
            continue
        for row in rows_of(name, ways):
            result["rows"].append(row)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            print(line_of(row), flush=True)
            torch.cuda.empty_cache()
            if given.seconds and time.monotonic() - start_s > given.seconds:
                print(f"{name}: no time left for further rows", flush=True)
                break
    print(f"written to {given.out}")
    if not all(row["right"] for row in result["rows"]):
        sys.exit("some results are not their references': see WRONG above")


if __name__ == "__main__":
    main()

"""Every kernel against its floor and its peers, on one GPU: bytes, time, share of the bandwidth,
and the best other way.

    python benchmarks/kernels.py [--kernel NAME ...] [--out benchmarks/results/kernels.json]

A floor is the fewest bytes that a kernel must move over the measured copy bandwidth: 3.0 TB/s of
HBM on an H100, 55 GB/s of PCIe for recall. Times are medians of CUDA graph replays with a cold L2.
Each kernel's result is compared with its torch reference first. Peers: torch.topk, FlashInfer's
top_k where it is installed, torch.compile of the reference where that makes no host
synchronisation; of a recall the copy engine, with a copy for each row and the list of rows known
beforehand, which a decode's host does not know. FlashInfer and TileLang hold no kernel that reads
the other kernels' layouts, so there is no like for like.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

try:
    import flashinfer
except ImportError:
    flashinfer = None

from fmsim.exec.kernels.layout import KEY, LATENT
from fmsim.exec.measure import calibrate
from fmsim.exec.measure import kernel_cases as cases
from fmsim.exec.measure import module_cases as modules
from fmsim.exec.measure.timing import median_s
from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.model.weights.synthetic import synthetic_config
from fmsim.geometry import PRESETS

HBM_BYTES_PER_S, PCIE_BYTES_PER_S = 3.0e12, 55e9
DEVICE = "cuda"
SGLANG = "SGLang 0.5.14, H100, FP8 weights (aiconfigurator-core 0.12.0 table, not run here)"
LIMITS = {
    "index scores": 1e-2,
    "index scores, float8 queries": 1e-2,
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
}
COMPILED_ALONE = {"sparse attention"}  # whose reference compiles, but not for a CUDA graph
COMPILED = {
    "hyper-connection",
    "hyper-connection, head",
    "norm and RoPE",
    "RoPE",
    "RMSNorm",
}  # whose compiled reference a CUDA graph holds too
PEERS = (
    {}
    if flashinfer is None
    else {"flashinfer.top_k": lambda scores: flashinfer.top_k(scores, cases.TOP_K)}
)
BUILDERS = {
    "index scores": [
        lambda b=b, n=n: cases.index_scoring(b, n, DEVICE)
        for b, n in ((1, 32_768), (1, 131_072), (8, 128_000), (32, 32_768))
    ],
    "index scores, float8 queries": [
        lambda: cases.index_scoring(8, 128_000, DEVICE, float8_queries=True)
    ],
    "top-k": [
        lambda b=b, n=n: cases.selection(b, n, DEVICE, PEERS)
        for b, n in ((1, 32_768), (1, 131_072), (1, 262_144), (8, 128_000))
    ],
    "sparse attention": (
        [lambda b=b: cases.attention(b, 128_000, DEVICE) for b in (1, 8, 32)]
        + [lambda: cases.attention(97, 16_384, DEVICE)]
        + [lambda b=b: cases.attention(b, 4096, DEVICE, selected=4096) for b in (1, 32)]
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
    "experts": [lambda b=b: modules.mixing(b, DEVICE) for b in (1, 4, 16, 64, 128)],
    "experts, float8": [
        lambda b=b: modules.mixing(b, DEVICE, float8=True) for b in (1, 4, 16, 64, 128)
    ],
    "float8 linear": [
        lambda b=b, s=s: modules.projecting(b, *s, DEVICE)
        for s in modules.PROJECTIONS.values()
        for b in (1, 8, 64)
    ],
    "memory scores": [lambda n=n: cases.memory_scoring(1, n, DEVICE) for n in (32_768, 131_072)],
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


def measured(name: str, case: cases.Case) -> dict[str, Any]:
    error = wrong_by(case)
    if error is not None and not error <= LIMITS[name]:
        sys.exit(
            f"{case.kernel}, {case.shape}: relative error {error:.1e} against the reference;"
            " nothing is timed"
        )
    bandwidth = PCIE_BYTES_PER_S if name == "recall" else HBM_BYTES_PER_S
    seconds = median_s(case.run, DEVICE)
    peers = {label: median_s(run, DEVICE) for label, run in (case.peers or {}).items()}
    if name in COMPILED_ALONE:  # the other references read lengths on the host
        peers["torch.compile"] = median_s(
            torch.compile(case.reference, dynamic=False), DEVICE, graph=False
        )
    if name in COMPILED:
        peers["torch"] = median_s(case.reference, DEVICE)
        peers["torch.compile"] = median_s(torch.compile(case.reference, dynamic=False), DEVICE)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "bytes": case.n_bytes,
        "relative_error": error,
        "us": seconds * 1e6,
        "share_of_floor": case.n_bytes / bandwidth / seconds,
        "peers_us": {label: peer * 1e6 for label, peer in peers.items()},
    }


def layer(kind: str, float8: bool, tokens: int = 524_288) -> dict[str, Any]:
    """One layer's attention at batch 1, its weights bfloat16 or float8 as published: projections
    and the kernels between them, one CUDA graph; the step's angles and lengths, which layers share,
    given; the token closes no entry, as three of four don't.
    """
    flash = replace(PRESETS["v4-flash"], float8_weights=float8)
    config = synthetic_config(flash, flash.n_experts)
    seconds = calibrate.attention_s(config, kind, 1, tokens, (LATENT, KEY), DEVICE)
    read = flash.csa_entries(tokens) * (KEY.entry_bytes + 4) + flash.index_topk * LATENT.entry_bytes
    read = read if kind == CSA else flash.hca_entries(tokens) * LATENT.entry_bytes
    n_bytes = (
        calibrate.attention_bytes(config, kind) + read + flash.window_tokens * LATENT.entry_bytes
    )
    name = f"{'CSA' if kind == CSA else 'HCA'} layer, {'float8' if float8 else 'bf16'} weights"
    return {
        "kernel": name,
        "shape": f"1 x {tokens:,} tokens",
        "bytes": n_bytes,
        "relative_error": None,
        "us": seconds * 1e6,
        "share_of_floor": n_bytes / HBM_BYTES_PER_S / seconds,
        "peers_us": {SGLANG: 137.0} if kind == CSA and tokens == 524_288 else {},
    }


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    if name in LAYERS:
        yield from (layer(LAYERS[name], float8) for float8 in (False, True))
    else:
        yield from (measured(name, build()) for build in BUILDERS[name])


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
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/kernels.py needs a CUDA device, and torch finds none; the kernels' tests"
            " run without one"
        )
    versions = {
        name: installed(name) for name in ("torch", "triton", "flashinfer-python", "tilelang")
    }
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "floors_bytes_per_s": {"hbm": HBM_BYTES_PER_S, "pcie": PCIE_BYTES_PER_S},
        "rows": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'kernel':30} {'shape':>16} {'MB':>8} {'us':>9} {'of floor':>9}  peers, us")
    for name in given.kernel or [*LAYERS, *BUILDERS]:
        for row in rows_of(name):
            result["rows"].append(row)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
            peers = ", ".join(f"{label} {us:.1f}" for label, us in row["peers_us"].items())
            print(
                f"{row['kernel']:30} {row['shape']:>16} {row['bytes'] / 1e6:8.1f} {row['us']:9.1f}"
                f" {row['share_of_floor']:9.1%}  {peers}",
                flush=True,
            )
            torch.cuda.empty_cache()
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()

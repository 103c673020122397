"""How a model lies on a server's GPUs: parallelism, weight format, and what is left for KV."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fmsim.errors import FmsimError
from fmsim.files.inputs import MOST_BYTES_OF_RESULTS, read_bytes
from fmsim.geometry import Geometry

GIB = 2**30
MOST_POOL = 1e15  # bytes or tokens; a server's have 1e12
WEIGHT_BYTES = {  # (of a routed expert's parameter, of any other)
    "bf16": (2.0, 2.0),
    "fp8": (1.0, 1.0),
    "fp4": (17 / 32, 1.0),  # 4-bit values with one scale byte per 32, as V4 is published
}
Format = Literal["bf16", "fp8", "fp4"]


class Deployment(BaseModel):
    """The `deployment` block of a scenario. What is not given follows from the rest.

    A server's GPUs are `tp` x `dp` x `cp`: `dp` ranks, each with requests and KV of its own and all
    attention weights, on `tp` tensor-parallel GPUs which hold that KV once each, or `cp` GPUs which
    share it out. Experts lie whole on `ep` groups of GPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_gpus: int | None = Field(None, ge=1)  # of one server; the preset's
    tp: int | None = Field(None, ge=1)  # GPUs that split each layer; all that dp and cp leave
    dp: int = Field(1, ge=1)  # ranks, each with requests and KV of its own
    cp: int = Field(1, ge=1)  # GPUs that share out the KV of one request
    ep: int | None = Field(None, ge=1)  # groups that hold whole experts; 1, with dp all GPUs
    servers: int = Field(1, ge=1)  # alike, each with its own requests
    weights: Format | None = None  # how weights are stored; the preset's unless given
    engine: Literal["sglang", "vllm"] = "sglang"  # whose kernels
    imbalance: Literal["balanced", "power_law_1.01", "power_law_1.2"] = (
        "power_law_1.01"  # how unevenly tokens go to experts
    )
    kv_pool_bytes: float | None = Field(
        None, ge=1, le=MOST_POOL
    )  # of each GPU; an engine's own figure
    kv_pool_tokens: int | None = Field(None, ge=1, le=int(MOST_POOL))  # the same in tokens
    mem_fraction: float | None = Field(None, gt=0, le=1)  # of GPU memory, weights and KV together
    start_log: Path | None = None  # of SGLang or vLLM, which print the pool


class Placement(BaseModel):
    """A deployment with every number in place, checked against each other."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_gpus: int
    tp: int
    dp: int
    cp: int
    ep: int
    servers: int
    weights: Format
    engine: str
    imbalance: str

    @property
    def title(self) -> str:
        """Such as 'TP8', 'DP8 EP8' or 'TP2 CP4'."""
        parts = [("TP", self.tp), ("DP", self.dp), ("CP", self.cp), ("EP", self.ep)]
        shown = " ".join(f"{name}{n}" for name, n in parts if n > 1) or "TP1"
        return shown + (f", {self.servers} servers" if self.servers > 1 else "")

    def weight_bytes(self, geometry: Geometry) -> float:
        """On each GPU: a share of the experts, and of everything else what `tp` leaves."""
        expert, other = WEIGHT_BYTES[self.weights]
        return (
            geometry.expert_parameters * expert + geometry.table_bytes
        ) / self.n_gpus + geometry.shared_parameters * other / self.tp

    def ranked(self, requests: int) -> int:
        """Requests of the busiest rank."""
        return -(-requests // self.dp)


def place(given: Deployment, preset_gpus: int, preset_weights: Format) -> Placement:
    """Raises FmsimError for numbers that do not fit each other."""
    group = given.dp * given.cp
    if given.n_gpus is None and given.tp is not None:
        n_gpus = given.tp * group
    else:
        n_gpus = given.n_gpus or preset_gpus
    tp = given.tp or max(1, n_gpus // group)
    if tp * group != n_gpus:
        raise FmsimError(
            f"deployment: tp {tp} x dp {given.dp} x cp {given.cp} are {tp * group} GPUs, and there"
            f" are {n_gpus}; give n_gpus: {tp * group}, or other numbers"
        )
    ep = given.ep or (n_gpus if given.dp > 1 else 1)
    if n_gpus % ep:
        raise FmsimError(
            f"deployment: ep {ep} does not divide {n_gpus} GPUs; take one of"
            f" {', '.join(str(n) for n in range(1, n_gpus + 1) if n_gpus % n == 0)}"
        )
    return Placement(
        n_gpus=n_gpus,
        tp=tp,
        dp=given.dp,
        cp=given.cp,
        ep=ep,
        servers=given.servers,
        weights=given.weights or preset_weights,
        engine=given.engine,
        imbalance=given.imbalance,
    )


_VLLM_BYTES = re.compile(r"Available KV cache memory:\s*(\d+(?:\.\d+)?)\s*GiB")
_SGLANG_ALL = re.compile(r"KV Cache is allocated\..*?KV size:\s*(\d+(?:\.\d+)?)\s*GB")
_SGLANG_PARTS = re.compile(
    r"KV Cache is allocated\..*?K size:\s*(\d+(?:\.\d+)?)\s*GB,\s*V size:\s*(\d+(?:\.\d+)?)\s*GB"
)
_TOKENS = re.compile(
    r"max_total_num_tokens=(\d+)|KV Cache is allocated\. #tokens:\s*(\d+)"
    r"|GPU KV cache size:\s*([\d,]+) tokens"
)


def pool_of_log(path: Path) -> tuple[str, float]:
    """("bytes", of each GPU) or ("tokens", n), from what SGLang or vLLM print when they start.

    Bytes are taken where they are printed (both mean GiB). Raises FmsimError where neither is.
    """
    try:
        text = read_bytes(path, MOST_BYTES_OF_RESULTS).decode(errors="replace")
    except FileNotFoundError:
        raise FmsimError(
            f"start log {path}: there is none; give the file that the engine wrote at its start"
        ) from None
    for pattern in (_VLLM_BYTES, _SGLANG_ALL, _SGLANG_PARTS):
        found = pattern.search(text)
        if found:
            size = sum(map(float, found.groups())) * GIB
            return "bytes", _checked_pool(path, size, "bytes")
    found = _TOKENS.search(text)
    if found:
        size = float(next(filter(None, found.groups())).replace(",", ""))
        return "tokens", _checked_pool(path, size, "tokens")
    raise FmsimError(
        f"start log {path}: names no KV pool; look for 'Available KV cache memory' (vLLM) or 'KV"
        " Cache is allocated' (SGLang), or give kv_pool_bytes"
    )


def _checked_pool(path: Path, size: float, unit: str) -> float:
    if not 1 <= size <= MOST_POOL:
        raise FmsimError(
            f"start log {path}: its KV pool is {size:g} {unit}; give the log of a server that"
            " started, or kv_pool_bytes"
        )
    return size

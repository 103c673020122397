"""The `workload` and `server` blocks of a scenario.

Times in seconds, lengths in tokens, rates in bytes a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _as_range(given: Any) -> Any:
    """A number, or [low, high]."""
    low, high = given if isinstance(given, (list, tuple)) and len(given) == 2 else (given, given)
    if (
        not all(
            isinstance(end, int) and not isinstance(end, bool) and end > 0 for end in (low, high)
        )
        or low > high
    ):
        raise ValueError("give a number of tokens, or [low, high] to draw from")
    return (low, high)


Tokens = Annotated[tuple[int, int], BeforeValidator(_as_range)]


class Slo(_Strict):
    """What a request must keep to count as good."""

    ttft_s: float = Field(30.0, gt=0)
    tpot_s: float = Field(0.05, gt=0)


class _Drawn(_Strict):
    """Requests whose lengths are drawn uniformly."""

    prompt_tokens: Tokens
    output_tokens: Tokens
    duration_s: float = Field(
        gt=0
    )  # requests arrive until then; what has arrived is served to its end
    seed: int = Field(0, ge=0)
    slo: Slo = Slo()


class ClosedLoop(_Drawn):
    """`requests` clients, each asking again as soon as it is answered."""

    kind: Literal["closed_loop"]
    requests: int = Field(ge=1)
    ramp_s: float = Field(0.0, ge=0)  # the clients' first requests are spread over this time


class Poisson(_Drawn):
    kind: Literal["poisson"]
    rate_per_s: float = Field(gt=0)


class Bursts(_Drawn):
    """`burst` requests at once, every `every_s` seconds."""

    kind: Literal["bursts"]
    burst: int = Field(ge=1)
    every_s: float = Field(gt=0)


class RequestFile(_Strict):
    """Recorded requests: Mooncake's JSON lines, or Azure's or BurstGPT's CSV, told apart by their
    first line.
    """

    kind: Literal["file"]
    file: Path
    speed: float = Field(1.0, gt=0)  # 2 = the arrivals come twice as fast
    duration_s: float | None = Field(
        None, gt=0
    )  # of the simulated time; later arrivals are left out
    lengths: float = Field(1.0, gt=0)  # every prompt this many times as long
    seed: int = Field(0, ge=0)
    slo: Slo = Slo()


Workload = Annotated[ClosedLoop | Poisson | Bursts | RequestFile, Field(discriminator="kind")]
WORKLOADS: dict[str, type[BaseModel]] = {
    "closed_loop": ClosedLoop,
    "poisson": Poisson,
    "bursts": Bursts,
    "file": RequestFile,
}  # by kind


class Server(_Strict):
    """How requests are admitted and prefilled.

    `prefill` is "done" (the prompt's KV is there when a request is admitted: decode alone is looked
    at), "chunked" (on the same GPUs, one chunk a step beside decode), or "separate" (on other
    servers, which send KV straight into the host's mirror).
    """

    prefill: Literal["done", "chunked", "separate"] = "chunked"
    prefill_chunk_tokens: int = Field(8192, ge=1)
    prefill_servers: int = Field(1, ge=1)  # each like the decode server
    network_bytes_per_s: float = Field(
        25e9, gt=0
    )  # from prefill to decode server, for each GPU: 200 Gbit/s
    max_batch: int | None = Field(None, ge=1)  # an engine's own limit on requests at once
    mirror: Literal["per_gpu", "shared"] = (
        "per_gpu"  # each GPU's process pins a copy of the mirror, or all use one
    )
    recall_bytes_per_s: float | None = Field(
        None, gt=0
    )  # an engine's copy path, where it is slower than the link
    admit_by_link: bool = (
        False  # admit only while the running requests' recalls fit into the time of their windows
    )
    admit_by_slo: bool = False  # admit only while a step keeps the workload's slo.tpot_s

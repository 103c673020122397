"""The `workload` and `server` blocks of a scenario.

Times in seconds, lengths in tokens, rates in bytes a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_TOKENS = 10**9  # of a request; far more than any model has positions for
MOST_SECONDS = 1e9
MOST_REQUESTS = 200_000  # that a run takes unless the workload's max_requests says otherwise


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_range(given: Any) -> Any:
    """A number, or [low, high]."""
    low, high = given if isinstance(given, (list, tuple)) and len(given) == 2 else (given, given)
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high))
    if not whole or not 0 < low <= high <= MOST_TOKENS:
        raise ValueError(
            f"give a number of tokens from 1 to {MOST_TOKENS:,}, or [low, high] to draw from"
        )
    return (low, high)


Tokens = Annotated[tuple[int, int], BeforeValidator(_as_range)]


class Slo(_Strict):
    """What a request must keep to count as good."""

    # longest time to the first token
    ttft_s: float = Field(30.0, gt=0, le=MOST_SECONDS)
    # longest mean time of each later token
    tpot_s: float = Field(0.05, gt=0, le=MOST_SECONDS)


class _Workload(_Strict):
    """What every workload has."""

    seed: int = Field(0, ge=0, lt=2**63)  # of all that is drawn
    slo: Slo = Slo()  # what a request must keep to count as good
    max_requests: int = Field(MOST_REQUESTS, ge=1)  # a run of more is refused


class _Drawn(_Workload):
    """Requests whose lengths are drawn uniformly."""

    prompt_tokens: Tokens  # of each request
    output_tokens: Tokens  # that each request makes
    # requests arrive until then; what has arrived is served to its end
    duration_s: float = Field(gt=0, le=MOST_SECONDS)


class ClosedLoop(_Drawn):
    """`requests` clients, each asking again as soon as it is answered."""

    kind: Literal["closed_loop"]
    requests: int = Field(ge=1)  # clients
    ramp_s: float = Field(
        0.0, ge=0, le=MOST_SECONDS
    )  # the clients' first requests are spread over this time


class Poisson(_Drawn):
    """Requests that come at random, independently of each other."""

    kind: Literal["poisson"]
    rate_per_s: float = Field(ge=1e-9, le=1e12)  # mean arrivals


class Bursts(_Drawn):
    """`burst` requests at once, every `every_s` seconds."""

    kind: Literal["bursts"]
    burst: int = Field(ge=1)  # requests at once
    every_s: float = Field(ge=1e-9, le=MOST_SECONDS)  # from one burst to the next


class SessionWorkload(_Workload):
    """Conversations that begin at random. Each turn's prompt is all that was said before, and some
    new tokens; it comes when the last answer has been read.
    """

    kind: Literal["sessions"]
    rate_per_s: float = Field(ge=1e-9, le=1e12)  # of sessions
    turns: Tokens = (1, 8)  # of a session
    think_s: float = Field(30.0, ge=0, le=MOST_SECONDS)  # mean, from an answer to the next turn
    shared_tokens: int = Field(0, ge=0, le=MOST_TOKENS)  # that all sessions begin with
    prompt_tokens: Tokens  # of the first turn, beyond these
    turn_tokens: Tokens  # new ones of every later turn
    output_tokens: Tokens  # of each answer
    block_tokens: int = Field(512, ge=16, le=MOST_TOKENS)  # that are kept and found as one
    # turns come until then; what has come is served to its end
    duration_s: float = Field(gt=0, le=MOST_SECONDS)


class RequestFile(_Workload):
    """Recorded requests: Mooncake's JSON lines, or Azure's or BurstGPT's CSV, told apart by their
    first line.
    """

    kind: Literal["file"]
    file: Path  # the recording
    speed: float = Field(1.0, ge=1e-6, le=1e6)  # 2 = the arrivals come twice as fast
    # of the simulated time; later arrivals are left out
    duration_s: float | None = Field(None, gt=0, le=MOST_SECONDS)
    lengths: float = Field(1.0, ge=1e-6, le=1e6)  # every prompt this many times as long


AnyWorkload = ClosedLoop | Poisson | Bursts | SessionWorkload | RequestFile
Workload = Annotated[AnyWorkload, Field(discriminator="kind")]
WORKLOADS: dict[str, type[BaseModel]] = {
    "closed_loop": ClosedLoop,
    "poisson": Poisson,
    "bursts": Bursts,
    "sessions": SessionWorkload,
    "file": RequestFile,
}  # by kind


class Server(_Strict):
    """How requests are admitted and prefilled.

    `prefill` is "done" (the prompt's KV is there when a request is admitted: decode alone is looked
    at), "chunked" (on the same GPUs, one chunk a step beside decode), or "separate" (on other
    servers, which send KV straight into the host's mirror).
    """

    prefill: Literal["done", "chunked", "separate"] = "chunked"  # where prompts are read
    prefill_chunk_tokens: int = Field(8192, ge=1, le=MOST_TOKENS)  # of a chunk
    prefill_servers: int = Field(1, ge=1, le=10**6)  # each like the decode server
    network_bytes_per_s: float = Field(
        25e9, ge=1, le=1e18
    )  # from prefill to decode server, for each GPU: 200 Gbit/s
    max_batch: int | None = Field(None, ge=1, le=10**9)  # an engine's own limit on requests at once
    mirror: Literal["per_gpu", "shared"] = (
        "per_gpu"  # each GPU's process pins a copy of the mirror, or all use one
    )
    recall_bytes_per_s: float | None = Field(
        None, ge=1, le=1e18
    )  # an engine's copy path, where it is slower than the link
    admit_by_link: bool = (
        False  # admit only while the running requests' recalls fit into the time of their windows
    )
    # what a request under a policy that fetches its misses has on the GPU: "policy", its slots from
    # the first step on; "hisparse", the same once its whole prompt is written to the host; or
    # "hybrid", all of it until GPU memory runs short
    residency: Literal["policy", "hisparse", "hybrid"] = "policy"
    draft_tokens: int = Field(0, ge=0, le=16)  # that a step drafts: multi-token prediction
    # how likely a drafted token is accepted, where those before it were
    acceptance: float = Field(0.7, ge=0, le=1)
    nvme: bool = False  # what host memory has no room for goes to the preset's NVMe drives
    # of prompts that begin like earlier ones, prefill only the rest; with chunked prefill
    reuse_prefixes: bool = True
    admit_by_slo: bool = False  # admit only while a step keeps the workload's slo.tpot_s

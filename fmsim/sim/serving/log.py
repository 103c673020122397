"""What happened on a server: its requests, where the time went, and samples of what was in use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fmsim.hw.memory import MemorySystem
from fmsim.sim.serving.batch import ServedRequest
from fmsim.sim.serving.spec import Slo

SAMPLE = (
    "t_s",
    "running",
    "admitted",
    "waiting",
    "gpu_bytes",
    "host_bytes",
    "nvme_bytes",
    "h2d_bytes",
    "tokens",
    "missed_entries",
    "selected_entries",
)
SUMS = ("h2d_bytes", "tokens", "missed_entries", "selected_entries")  # of them, since the start


@dataclass
class Log:
    """Times in seconds, sums over the whole run."""

    requests: list[ServedRequest] = field(default_factory=list)
    tokens: float = 0  # made; means where steps draft some, by prefill or decode
    busy_s: float = 0.0  # some request decodes or is prefilled here; the four below are part of it
    stall_s: float = 0.0  # waiting for misses
    recall_wait_s: float = 0.0  # waiting for recalls that were late
    prefix_wait_s: float = 0.0  # waiting for prefixes that were on the host
    prefill_s: float = 0.0
    missed_entries: float = 0.0  # of all layers; of `selected_entries`
    selected_entries: float = 0.0
    block_tokens: int = 0  # of a prefix's block; 0 where none is kept
    written_back_bytes: float = 0.0  # to the mirror; nothing waits for them
    waits_for: str | None = None  # what the queue's head cannot get now
    waited_s: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # how long it was refused, by what
    samples: list[tuple[float, ...]] = field(default_factory=list)  # of SAMPLE, in time's order
    _now_s: float = 0.0

    @property
    def stalled_s(self) -> float:
        """Waiting for misses, late recalls and prefixes."""
        return self.stall_s + self.recall_wait_s + self.prefix_wait_s

    def pass_to(self, now_s: float, busy: bool) -> None:
        """Book the time since the last call."""
        elapsed_s, self._now_s = now_s - self._now_s, now_s
        if busy:
            self.busy_s += elapsed_s
        if self.waits_for:
            self.waited_s[self.waits_for] += elapsed_s

    def sample(
        self, now_s: float, counts: tuple[int, int, int], ranks: Sequence[MemorySystem]
    ) -> None:
        """Of requests that run, are admitted and wait, and of what is in use."""
        hbm = sum(rank.hbm.capacity - rank.hbm.level for rank in ranks)
        host = sum(rank.host.capacity - rank.host.level for rank in ranks)
        nvme = sum(rank.nvme.capacity - rank.nvme.level for rank in ranks if rank.nvme)
        moved = sum(rank.to_gpu.moved_bytes for rank in ranks)
        sums = moved, self.tokens, self.missed_entries, self.selected_entries
        self.samples.append((now_s, *counts, hbm, host, nvme, *sums))

    def mean_in_use(self, name: str) -> float:
        """Mean over time of a sampled quantity, which holds until the next sample."""
        table = np.array(self.samples)
        held_s = np.diff(table[:, 0])
        return (
            float(table[:-1, SAMPLE.index(name)] @ held_s / held_s.sum()) if held_s.sum() else 0.0
        )

    def most(self, name: str) -> float:
        return float(max(sample[SAMPLE.index(name)] for sample in self.samples))

    def tokens_by(self, now_s: float) -> float:
        """Tokens made by then."""
        table = np.array(self.samples)
        return float(np.interp(now_s, table[:, 0], table[:, SAMPLE.index("tokens")]))


def request_rows(logs: list[Log], slo: Slo) -> list[dict[str, Any]]:
    """A row a request, flat: times in seconds from the run's start, lengths in tokens.

    `wait_*_s` end with its admission: behind others (`queue`), then as the head of the queue,
    for what was lacking; `wait_prefix_s` is its first chunk's, for blocks from the host.
    `stall_s`: its decode steps' waits, for misses, late recalls, and others' blocks.
    `hit_*_tokens`: whole blocks of its prompt that a tier had. What a request does not have is
    None.
    """
    rows = []
    for server, log in enumerate(logs):
        names = sorted({name for request in log.requests for name in request.waits_s})
        for request in log.requests:
            found, size = request.found, log.block_tokens
            waits = {
                name: request.waits_s.get(name, 0.0)
                for name in {"queue": 0, **dict.fromkeys(names)}
            }
            rows.append(
                {
                    "request": request.number,
                    "server": server,
                    "rank": request.rank,
                    "session": request.asked.session,
                    "turn": request.asked.turn,
                    "prompt_tokens": request.prompt_tokens,
                    "output_tokens": request.output_tokens,
                    "arrival_s": request.arrival_s,
                    "admitted_s": request.admitted_s,
                    "first_token_s": request.first_token_s,
                    "finished_s": request.finished_s,
                    "ttft_s": ttft_s(request),
                    "tpot_s": tpot_s(request),
                    "good": keeps(request, slo),
                    "refused": request.refused or "",
                    **{
                        f"wait_{name.replace(' ', '_')}_s": waited for name, waited in waits.items()
                    },
                    "stall_s": request.stall_s,
                    "reused_tokens": request.reused_tokens,
                    "hit_gpu_tokens": size * len(found.gpu),
                    "hit_host_tokens": size * len(found.host),
                    "hit_nvme_tokens": size * len(found.nvme),
                }
            )
    return rows


def ttft_s(request: ServedRequest) -> float | None:
    """Arrival to first token."""
    if request.first_token_s is None:
        return None
    return request.first_token_s - request.arrival_s


def tpot_s(request: ServedRequest) -> float | None:
    """Mean time between later tokens, of a finished request of more than one."""
    if request.finished_s is None or request.first_token_s is None or request.output_tokens == 1:
        return None
    return (request.finished_s - request.first_token_s) / (request.output_tokens - 1)


def keeps(request: ServedRequest, slo: Slo) -> bool:
    """It was answered within both times that are asked for."""
    first_s, later_s = ttft_s(request), tpot_s(request)
    if request.finished_s is None or first_s is None:
        return False
    return first_s <= slo.ttft_s and (later_s is None or later_s <= slo.tpot_s)


def over_time(logs: list[Log], n_points: int) -> dict[str, list[float]]:
    """The samples of all servers on an even grid; bytes and tokens, which are sums, as rates since
    the point before.
    """
    tables = [np.array(log.samples) for log in logs]
    grid_s = np.linspace(0.0, max(table[-1, 0] for table in tables), n_points)
    columns: dict[str, list[float]] = {"t_s": grid_s.tolist()}
    for place, name in enumerate(SAMPLE[1:], 1):
        total = np.zeros(n_points)
        for table in tables:
            if name in SUMS:
                sums = np.interp(grid_s, table[:, 0], table[:, place])
                total += np.diff(sums, prepend=sums[0]) / max(grid_s[1], 1e-12)
            else:
                latest = np.searchsorted(table[:, 0], grid_s, side="right") - 1
                total += table[np.maximum(latest, 0), place]
        columns[f"{name}_per_s" if name in SUMS else name] = total.tolist()
    missed = np.array(columns.pop("missed_entries_per_s"))
    selected = np.array(columns.pop("selected_entries_per_s"))
    columns["miss_rate"] = (missed / np.maximum(selected, 1e-12)).tolist()
    return columns

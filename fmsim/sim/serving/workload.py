"""When requests come, and how long they are. The same seed gives the same requests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fmsim.errors import FmsimError
from fmsim.sim.serving.requests import MOONCAKE_BLOCK, Arrival, read_requests
from fmsim.sim.serving.spec import (
    AnyWorkload,
    Bursts,
    ClosedLoop,
    Poisson,
    RequestFile,
    SessionWorkload,
)

Drawn = ClosedLoop | Poisson | Bursts  # workloads whose lengths are drawn
SLOWEST_ANSWER_S = 100.0  # a client of a closed loop asks again at least so often


class _Turn(NamedTuple):
    new_tokens: int
    output_tokens: int
    think_s: float


def _turns(workload: SessionWorkload, session: int) -> list[_Turn]:
    """Drawn from a stream of the session's own, whenever its turns come."""
    rng = np.random.default_rng([workload.seed, 3, session])
    n_turns = int(rng.integers(workload.turns[0], workload.turns[1] + 1))
    found = []
    for turn in range(n_turns):
        low, high = workload.turn_tokens if turn else workload.prompt_tokens
        new = int(rng.integers(low, high + 1))
        output = int(rng.integers(workload.output_tokens[0], workload.output_tokens[1] + 1))
        found.append(_Turn(new, output, float(rng.exponential(workload.think_s))))
    return found


class RequestGenerator:
    """The requests of one workload: those that come by themselves, and, in a closed loop, the next
    one of a client.
    """

    def __init__(self, workload: AnyWorkload, path: Path | None = None) -> None:
        """`path`: where a workload's file lies, where that is not relative to the working
        directory. Raises FmsimError when it is no request file.
        """
        self.workload = workload
        _check_count(workload)
        self._rng = np.random.default_rng(workload.seed)
        self._turns: list[list[_Turn]] = []  # of each session
        self.first: list[Arrival]
        if isinstance(workload, RequestFile):
            self.first = _recorded(workload, path or workload.file)
        elif isinstance(workload, SessionWorkload):
            starts_s = self._poisson(workload)
            self._turns = [_turns(workload, session) for session in range(len(starts_s))]
            self.first = [
                self._turn(workload, float(at_s), session, 0, workload.shared_tokens)
                for session, at_s in enumerate(starts_s)
            ]
        else:
            self.first = [self._draw(workload, at_s) for at_s in self._times(workload)]
        if not self.first:
            raise FmsimError(
                "workload: no request arrives within its duration_s; raise duration_s or the rate"
            )
        self._asked = len(self.first)
        if self._asked > workload.max_requests:
            raise FmsimError(_too_many(f"{self._asked:,}", workload))

    @property
    def window_s(self) -> float:
        """The time in which requests arrive; at least that of the last one."""
        return self.workload.duration_s or max(self.first[-1].arrival_s, 1e-9)

    def dealt(self, servers: int) -> list[RequestGenerator]:
        """The same requests dealt out to `servers` in turn, as a plain load balancer does; one that
        gets none is left out. Clients of a closed loop stay with their server.
        """
        if servers == 1:
            return [self]
        parts = []
        for server in range(min(servers, len(self.first))):
            part = copy.copy(self)
            part.first = self.first[server::servers]
            part._rng = np.random.default_rng([self.workload.seed, 2, server])
            parts.append(part)
        return parts

    @property
    def block_tokens(self) -> int:
        """Tokens that a block's id stands for."""
        if isinstance(self.workload, SessionWorkload):
            return self.workload.block_tokens
        lengths = self.workload.lengths if isinstance(self.workload, RequestFile) else 1.0
        return max(1, round(MOONCAKE_BLOCK * lengths))

    def after(self, now_s: float, asked: Arrival) -> Arrival | None:
        """What a client asks, now or later, when `asked` has been answered; None where nobody waits
        for answers, or the time is up.
        """
        if isinstance(self.workload, SessionWorkload):
            return self._next_turn(self.workload, now_s, asked)
        if not isinstance(self.workload, ClosedLoop) or now_s >= self.workload.duration_s:
            return None
        self._asked += 1
        if self._asked > self.workload.max_requests:
            raise FmsimError(_too_many(f"more than {self.workload.max_requests:,}", self.workload))
        return self._draw(self.workload, now_s)

    def _next_turn(self, workload: SessionWorkload, now_s: float, asked: Arrival) -> Arrival | None:
        turn = asked.turn + 1
        if turn == len(self._turns[asked.session]):
            return None
        at_s = now_s + self._turns[asked.session][turn].think_s
        if at_s >= workload.duration_s:
            return None
        said = asked.prompt_tokens + asked.output_tokens
        return self._turn(workload, at_s, asked.session, turn, said)

    def _turn(
        self, workload: SessionWorkload, at_s: float, session: int, number: int, said: int
    ) -> Arrival:
        """A turn after `said` tokens."""
        turn = self._turns[session][number]
        prompt = said + turn.new_tokens
        size = workload.block_tokens
        common = workload.shared_tokens // size
        own = range(common, (prompt + turn.output_tokens) // size)
        blocks = (*range(common), *((session + 1 << 32) + block for block in own))
        return Arrival(at_s, prompt, turn.output_tokens, blocks, session, number)

    def _times(self, workload: Drawn) -> NDArray[np.float64]:
        """Arrival times, ascending."""
        if isinstance(workload, ClosedLoop):
            return np.sort(self._rng.uniform(0, workload.ramp_s, workload.requests))
        if isinstance(workload, Bursts):
            return np.repeat(np.arange(0, workload.duration_s, workload.every_s), workload.burst)
        return self._poisson(workload)

    def _poisson(self, workload: Poisson | SessionWorkload) -> NDArray[np.float64]:
        expected = workload.rate_per_s * workload.duration_s
        gaps_s = self._rng.exponential(
            1 / workload.rate_per_s, int(expected + 10 * expected**0.5 + 10)
        )
        times_s = np.cumsum(gaps_s)
        return times_s[times_s < workload.duration_s]

    def _draw(self, workload: Drawn, arrival_s: float) -> Arrival:
        prompt, output = (
            int(self._rng.integers(low, high + 1))
            for low, high in (workload.prompt_tokens, workload.output_tokens)
        )
        return Arrival(float(arrival_s), prompt, output)


def _recorded(workload: RequestFile, path: Path) -> list[Arrival]:
    requests = [
        Arrival(
            row.arrival_s / workload.speed,
            max(1, round(row.prompt_tokens * workload.lengths)),
            row.output_tokens,
            row.blocks,
        )
        for row in read_requests(path)
    ]
    return [
        row
        for row in requests
        if workload.duration_s is None or row.arrival_s < workload.duration_s
    ]


def _check_count(workload: AnyWorkload) -> None:
    """Refuse what cannot end, before a request is drawn.

    A closed loop is refused early where its clients would have to wait `SLOWEST_ANSWER_S` for every
    answer to stay below the bound; otherwise when it has asked as often.
    """
    if isinstance(workload, RequestFile):
        return
    if isinstance(workload, ClosedLoop):
        n_requests = workload.requests * max(1.0, workload.duration_s / SLOWEST_ANSWER_S)
    elif isinstance(workload, Bursts):
        n_requests = workload.burst * workload.duration_s / workload.every_s
    else:
        n_requests = workload.rate_per_s * workload.duration_s
        if isinstance(workload, SessionWorkload):
            n_requests *= workload.turns[1]
    if n_requests > workload.max_requests + 10 * workload.max_requests**0.5:
        raise FmsimError(_too_many(f"about {n_requests:,.0f}", workload))


def _too_many(count: str, workload: AnyWorkload) -> str:
    return (
        f"{count} requests; a run takes at most {workload.max_requests:,}: lower its rate, clients"
        " or duration_s, or raise the bound with --set workload.max_requests=N"
    )

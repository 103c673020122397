"""Requests made by hand, of the hand-made ledger's length, and a server that has these alone."""

from hand_ledger import FLASH, H100

from fmsim.sim.serving.batch import ServedRequest
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.requests import Arrival
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import ClosedLoop, Server
from fmsim.sim.serving.workload import RequestGenerator

PROMPT = 32_000  # tokens of the hand-made ledger's prompt: 8,000 entries


def request(demand, prompt=PROMPT, output=64, rank=0):
    return ServedRequest(
        number=0,
        asked=Arrival(0.0, prompt, output),
        arrival_s=0.0,
        prompt_tokens=prompt,
        output_tokens=output,
        offset=0,
        steps=output,
        pools=demand.pools(prompt, output),
        rank=rank,
    )


class Given(RequestGenerator):
    """These requests and no others."""

    def __init__(self, *arrivals: Arrival, duration_s: float = 1e-9) -> None:
        super().__init__(
            ClosedLoop(
                kind="closed_loop",
                requests=1,
                prompt_tokens=1,
                output_tokens=1,
                duration_s=duration_s,
            )
        )
        self.first = list(arrivals)


class FromTheStart(ServerRun):
    """All requests replay their ledger from its first step."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._offsets = type("First", (), {"choice": lambda self, offsets: offsets[0]})()


def serve(made, *arrivals, hw=H100, run=FromTheStart, **options):
    """A server that has served `arrivals`, tuples of time, prompt and output, by the ledger."""
    given = Given(*(Arrival(*each) for each in arrivals))
    server = run(hw, FLASH, Demand(made, FLASH), Server(**({"prefill": "done"} | options)), given)
    server.run()
    return server

"""Requests made by hand, of the hand-made ledger's length."""

from fmsim.sim.serving.batch import ServedRequest
from fmsim.sim.serving.requests import Arrival

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

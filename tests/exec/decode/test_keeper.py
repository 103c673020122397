"""A batch that one cache manager keeps decodes as each of its requests does alone."""

from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from kernel_pools import no_waits, on_each_device
from tiny_indexer import lookahead
from tiny_model import CSA, HCA, oracle, ours

from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.policies import registry

STEPS, TAU, LENGTHS = 44, 8, (150, 97, 149, 64)
if not torch.cuda.is_available():
    STEPS, LENGTHS = 36, LENGTHS[:3]
SPECS = [
    {"policy": "lru", "budget": "9 entries"},
    {"policy": "lru", "budget": "20%", "granularity": 4, "scope": "shared"},
    {"policy": "lru", "budget": "20%", "granularity": 4, "on_miss": "fallback"},
    {"policy": "lru", "budget": "30%", "on_miss": "mask", "cadence": TAU},
    {"policy": "lfu", "budget": "20%", "on_miss": "fallback", "fallback_below": 0.7},
    {"policy": "lfu", "budget": "20 entries"},  # the shortest keeps all that it has
    {"policy": "h2o", "budget": "30%"},
    {"policy": "lruk", "budget": "9 entries"},
    {"policy": "fifo", "budget": "9 entries"},  # one policy for all, outside of the graph
    {"policy": "recency", "budget": "40%"},
    {"policy": "full"},
]
if not torch.cuda.is_available():
    SPECS = SPECS[::2]  # an interpreted step takes long


@pytest.fixture(scope="module")
def prompts():
    reference = oracle(layer_types=[CSA, HCA, CSA], index_topk=8)
    read = {}

    def on(device):
        if device not in read:
            model = ours(reference).to(device)
            texts = [
                torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(n))
                for n in LENGTHS
            ]
            read[device] = [Prompt(model, text.tolist(), STEPS) for text in texts]
        return read[device]

    return on


def decoded(prompts, spec, steps):
    batch = Batch(prompts, registry.build(spec), tau=TAU)
    for token in range(4):
        batch.step([token] * len(prompts))
    # scores come from states that are made then
    with nullcontext() if spec["policy"] == "lsa" else no_waits():
        for _ in range(steps - 4):
            batch.step()
    return batch


@on_each_device
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_request_of_a_batch_decodes_as_alone(prompts, device, spec):
    if device == "cuda":
        compared(prompts(device), spec)
    else:
        compared(prompts(device)[:2], spec, STEPS - TAU)


@on_each_device
@pytest.mark.parametrize("granularity", [1, 4])
def test_decisions_of_many_are_foreseen_in_turn_and_recalled_in_one(
    prompts, tmp_path, device, granularity
):
    """The same pages move as alone, where each is foreseen at its decision."""
    spec = lookahead(tmp_path, "16 entries", (0, 1), granularity=granularity, cadence=TAU)
    batch = compared(prompts(device), spec)
    assert sum(request.ledger().lookahead_loads.sum() for request in batch.requests) > 5


def compared(prompts, spec, steps=STEPS):
    """A batch, each request of which decoded as it does alone."""
    batch, moved = decoded(prompts, spec, steps), 0
    for request, prompt in zip(batch.requests, prompts, strict=True):
        alone = decoded([prompt], spec, steps)
        moved += alone.h2d_bytes
        [expected] = alone.requests
        assert request.tokens == expected.tokens
        for name in fields(expected.ledger()):
            one, other = (getattr(of.ledger(), name.name) for of in (request, expected))
            if name.name.startswith("mass") or name.name == "heaviest_lost":
                np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4)
            else:
                assert np.array_equal(one, other), name.name
        slots = expected.residency.slots
        assert torch.equal(request.residency.slots[:, : slots.shape[1]], slots)
    assert batch.h2d_bytes == moved
    return batch

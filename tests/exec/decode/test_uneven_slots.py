"""The live engine under policies whose layers have different numbers of slots."""

from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from kernel_pools import no_waits
from tapered import Tapered, TaperedLSA
from tiny_indexer import lookahead
from tiny_model import CSA, oracle, ours

from fmsim.exec.decode.engine import Batch, Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.unscaled import unscaled
from fmsim.exec.runs.record import trace_header, trace_of
from fmsim.policies.pyramid import Pyramid
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import allocation

STEPS, TAU, LENGTHS, ENTRY_BYTES = 28, 8, (150, 97), 16 * 4
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
MAKES = {
    "pyramid": lambda folder: Pyramid(budget="70%"),
    "pages": lambda folder: Pyramid(budget="70%", granularity=4),
    "lru": lambda folder: Tapered(budget="7 entries"),
    "fallback": lambda folder: Tapered(budget="70%", granularity=4, on_miss="fallback"),
    "decisions": lambda folder: Tapered(budget="30%", cadence=TAU),
    "lsa": lambda folder: tapered_lsa(folder),
    "lsa and misses": lambda folder: tapered_lsa(folder, on_miss="fetch", granularity=4),
}


def tapered_lsa(folder, **options):
    """It says a window ahead what it will recall."""
    spec = lookahead(folder, "24 entries", (0, 1, 2), scope="per_layer", **options)
    return TaperedLSA(**{key: value for key, value in spec.items() if key != "policy"})


@pytest.fixture(scope="module")
def prompts():
    reference = oracle(layer_types=[CSA, CSA, CSA], index_topk=8)
    read = {}

    def on(device):
        if device not in read:
            model = ours(reference).to(device)
            texts = [
                torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist()
                for length in LENGTHS
            ]
            read[device] = [Prompt(model, text, STEPS) for text in texts]
        return read[device]

    return on


def decoded(batch):
    for token in range(4):
        batch.step([token, token + 1][: len(batch.requests)])
    scores = isinstance(batch.policy, TaperedLSA)  # at decisions, from states that are made then
    with nullcontext() if scores else no_waits():
        for _ in range(STEPS - 4):
            batch.step()
    return batch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MAKES)
def test_what_is_allocated_is_what_is_predicted(prompts, tmp_path, name, device):
    policy = MAKES[name](tmp_path)
    batch = decoded(Batch(prompts(device), policy, tau=TAU))
    geometry = unscaled(batch.model.config, torch.float32)
    ledgers = [request.ledger() for request in batch.requests]
    for ledger in ledgers:
        assert ledger.group_slots[0] > ledger.group_slots[2]
        assert (ledger.resident <= ledger.group_slots).all()
    predicted = [allocation(ledger, geometry) for ledger in ledgers]
    assert batch.tiers.slot_bytes == sum(one.slots for one in predicted)
    assert batch.tiers.pool_bytes == sum(one.slots + one.spare for one in predicted)
    loads = sum(ledger.demand_loads + ledger.lookahead_loads for ledger in ledgers)
    assert (loads.sum() > 0) == (not name.startswith("p"))
    if ledgers[0].cadence == 1:  # what is foreseen at the end is copied, and not recalled any more
        assert batch.h2d_bytes == loads.sum() * ledgers[0].granularity * ENTRY_BYTES


@pytest.mark.parametrize("name", ["lru", "lsa and misses"])
def test_an_exact_policy_changes_no_token_and_no_logit(prompts, tmp_path, name):
    [prompt, _] = prompts("cpu")
    plain = prompt.session()
    for token in range(4):
        plain.read([token])
    tokens = plain.generate(STEPS - 4)
    for kernels in (False, True):
        engine = decoded(Engine(prompt, MAKES[name](tmp_path), tau=TAU, kernels=kernels))
        assert engine.tokens[4:] == tokens
        torch.testing.assert_close(engine.logits[0], plain.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["pyramid", "pages", "lru", "decisions"])
def test_the_replay_of_its_trace_takes_the_same_decisions(prompts, tmp_path, name):
    prompt = prompts("cpu")[0]
    engine = decoded(Engine(prompt, MAKES[name](tmp_path), tau=TAU, select="all"))
    header = trace_header(prompt.model, LENGTHS[0], name="tiny", seed=0, sha256=None, tau=TAU)
    trace = trace_of(engine.request, header, [True] * 4 + [False] * (STEPS - 4))
    replayed = Replayer(trace).run(MAKES[name](tmp_path))
    measured = engine.ledger()
    for field in fields(replayed):
        one, other = getattr(replayed, field.name), getattr(measured, field.name)
        if field.name.startswith("mass"):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        elif field.name != "all_keys":  # this engine keeps them, to measure what was lost
            assert np.array_equal(one, other), field.name


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the engine ran on the CPU only"
)
@pytest.mark.parametrize("name", MAKES)
def test_a_graph_of_kernels_decodes_as_torch_does(prompts, tmp_path, name):
    one, other = (
        decoded(Batch(prompts(device), MAKES[name](tmp_path), tau=TAU))
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(other.logits.cpu(), one.logits, atol=1e-3, rtol=0)
    for expected, measured in zip(one.requests, other.requests):
        assert measured.tokens == expected.tokens
        for count in ("resident", "demand_loads", "lookahead_loads", "written", "evicted"):
            assert np.array_equal(
                getattr(measured.ledger(), count), getattr(expected.ledger(), count)
            ), count
    assert one.h2d_bytes == other.h2d_bytes

"""Many requests after one context: each as a batch of its own decodes it."""

from dataclasses import fields

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="decoding needs fmsim[model]")

from every_policy import label, specs
from tiny_indexer import lookahead
from tiny_model import CSA, HCA, oracle, ours

from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.decode.unscaled import unscaled
from fmsim.exec.runs.after_one import AfterOne, Asked
from fmsim.policies import registry
from fmsim.policies.full import Full
from fmsim.sim.footprint import ModelMemory

MODEL = ours(oracle(3, layer_types=[CSA, HCA, CSA]))
MEMORY = ModelMemory(unscaled(MODEL.config, torch.float16))  # not the model's own bytes
RANDOM = np.random.default_rng(1)
CONTEXT = RANDOM.integers(2, 64, 301).tolist()
STEPS = (9, 17, 13)  # of the questions' answers
QUESTIONS = [RANDOM.integers(2, 64, size).tolist() for size in (5, 11, 2)]


@pytest.fixture(scope="module")
def prompts():
    context = Prompt(MODEL, CONTEXT, 40)
    return context, [context.extended(*pair) for pair in zip(QUESTIONS, STEPS, strict=True)]


def built(spec, folder):
    """A policy; one with a memory indexer gets one of the tiny model, and decides every 8 steps
    where it decides at all.
    """
    fields_of = registry.get(spec["policy"]).Params.model_fields
    if "checkpoint" in fields_of:
        given = lookahead(folder, spec["budget"])
        spec = {"checkpoint": given["checkpoint"], "recent_entries": 2} | spec
        spec = {key: value for key, value in spec.items() if key in {"policy", *fields_of}}
    return registry.build(spec)


def every_spec():
    for spec in specs():
        if spec["policy"] != "native":  # reads a model's folder
            yield spec
    yield {"policy": "lsa", "on_miss": "fallback", "budget": "70% gpu"}
    yield {"policy": "lru", "cadence": 64, "on_miss": "mask", "budget": "60% gpu"}
    yield {"policy": "recency", "granularity": 4, "budget": "50% gpu"}


def same(request, reference):
    assert request.tokens == reference.tokens
    ours, theirs = request.ledger(), reference.ledger()
    for field in fields(ours):
        found, wanted = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name.startswith(("mass", "heaviest")):
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)
        else:
            assert np.array_equal(found, wanted), field.name


def test_each_request_is_what_a_batch_of_its_own_decodes(prompts, tmp_path):
    """All policies at once, each with one of the questions, beside a `Batch` of its own."""
    context, asked = prompts
    full = AfterOne(context, [Asked(prompt, Full()) for prompt in asked], MEMORY, seed=5)
    full.decode()
    pairs = [(place % len(asked), spec) for place, spec in enumerate(every_spec())]
    together = AfterOne(
        context,
        [
            Asked(asked[number], policy, full.requests[number] if future(policy) else None)
            for number, policy in ((number, built(spec, tmp_path)) for number, spec in pairs)
        ],
        MEMORY,
        seed=5,
    )
    assert not together.refused
    together.decode()
    for place, (number, spec) in enumerate(pairs):
        policy = built(spec, tmp_path)
        alone = Batch(
            [asked[number]],
            policy,
            seed=5,
            hindsight=full.requests[number] if future(policy) else None,
            memory=MEMORY,
        )
        alone.generate(STEPS[number])
        try:
            same(together.requests[place], alone.requests[0])
        except AssertionError as error:
            raise AssertionError(f"{label(spec)}, question {number}: {error}") from None


def future(policy):
    return policy.evidence == "future"


def test_with_room_for_everything_every_answer_is_the_full_caches(prompts):
    context, asked = prompts
    policies = [
        Full(),
        *(registry.build({"policy": name, "budget": "100% gpu"}) for name in ("recency", "h2o")),
    ]
    run = AfterOne(context, [Asked(prompt, each) for each in policies for prompt in asked], MEMORY)
    run.decode()
    for place, request in run.requests.items():
        assert request.tokens == run.requests[place % len(asked)].tokens
        ledger = request.ledger()
        assert (ledger.hit == ledger.accessed).all()


def test_what_cannot_be_is_refused_and_the_others_go_on(prompts):
    context, asked = prompts
    tiny = registry.build({"policy": "lru", "budget": "0.01% gpu"})
    run = AfterOne(context, [Asked(asked[0], tiny), Asked(asked[1], Full())], MEMORY)
    assert list(run.refused) == [0] and "0.01% gpu" in str(run.refused[0])
    run.decode()
    assert len(run.requests[1].tokens) == STEPS[1]
    nothing = AfterOne(context, [Asked(asked[0], tiny)], MEMORY)
    nothing.decode()
    assert not nothing.requests


@pytest.mark.parametrize("stale", [False, True])
def test_decisions_within_an_answer_see_the_keys_that_it_decoded(prompts, tmp_path, stale):
    """A question alone, and beside the same under another policy and one that ends before."""
    context, asked = prompts
    spec = {"policy": "lsa", "budget": "50%", "cadence": 8, "stale": stale}
    policies = [built(spec, tmp_path), Full(), built(spec, tmp_path)]
    wanted = [
        Asked(asked[number], policy) for number, policy in zip((1, 1, 0), policies, strict=True)
    ]
    run = AfterOne(context, wanted, MEMORY)
    run.decode()
    for place, number in ((0, 1), (2, 0)):
        alone = Batch([asked[number]], built(spec, tmp_path), memory=MEMORY)
        alone.generate(STEPS[number])
        same(run.requests[place], alone.requests[0])


def test_a_model_in_bfloat16_decodes_too():
    model = ours(oracle(3, layer_types=[CSA, HCA, CSA])).bfloat16()
    context = Prompt(model, CONTEXT, 40)
    asked = context.extended(QUESTIONS[0], STEPS[0])
    run = AfterOne(context, [Asked(asked, Full())], MEMORY)
    run.decode()
    ledger = run.requests[0].ledger()
    assert len(run.requests[0].tokens) == STEPS[0] and (ledger.hit == ledger.accessed).all()

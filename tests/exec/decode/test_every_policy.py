"""Every policy in the live engine, and in the replay of what that decode recorded: one ledger.

The engine selects among all entries here and masks what is not resident, so that the trace tells
all that it did. An engine that selects among resident entries alone differs from its replay;
benchmarks/results/live-gap.json has by how much.
"""

from dataclasses import fields, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from every_policy import label, specs
from tiny_indexer import lookahead
from tiny_model import CSA, oracle, ours

from fmsim.exec.decode.engine import Engine
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.runs.record import trace_header, trace_of
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.trace import Trace

STEPS, TAU, LENGTH = 28, 8, 150
BUDGET = "60%"  # of 37 entries
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


def live(spec):
    """An engine runs it, and its trace tells all that it went by: `fallback` weighs by the
    indexer's softmax in an engine, by attention mass in a replay.
    """
    return registry.get(spec["policy"]).evidence != "future" and spec.get("on_miss") != "fallback"


@pytest.fixture(scope="module")
def reference():
    return oracle(layer_types=[CSA, CSA], index_topk=8)


@pytest.fixture(scope="module")
def prompts(reference):
    text = torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    read = {}

    def on(device):
        if device not in read:
            read[device] = Prompt(ours(reference).to(device), text, STEPS)
        return read[device]

    return on


def fitting(spec, reference, folder):
    """The spec with weights that fit the tiny model, where it needs some."""
    name = spec["policy"]
    if name == "full":
        return spec
    spec = spec | {"budget": BUDGET}
    if name == "lru-prefetch":
        spec |= {"spacing": TAU, "most": 4}
    elif "checkpoint" in registry.get(name).Params.model_fields:
        spec |= {"cadence": TAU, "recent_entries": 2}
    else:
        return spec
    if name == "native":
        reference.save_pretrained(folder)
        return spec | {"checkpoint": folder}
    return spec | {"checkpoint": lookahead(folder, BUDGET)["checkpoint"]}


def recorded(engine):
    """Its trace, and the states that it was decoded with: a trace's own are in 16 and 8 bits."""
    header = trace_header(engine.model, LENGTH, name="tiny", seed=0, sha256=None, tau=TAU)
    trace = trace_of(engine.request, header, [True] * 4 + [False] * (STEPS - 4))
    states = [engine.request.hidden[TAU * window] for window in range(len(trace.hidden))]
    keys = engine.request.keys_of(trace.n_entries(STEPS - 1))
    keys = np.stack([keys[layer].cpu().numpy() for layer in range(trace.n_layers)])
    return replace(trace, hidden=torch.stack(states).cpu().numpy()), keys


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", list(filter(live, specs())), ids=label)
def test_the_replay_of_its_trace_has_the_engines_ledger(
    prompts, reference, tmp_path, monkeypatch, spec, device
):
    spec = fitting(spec, reference, tmp_path)
    engine = Engine(prompts(device), registry.build(spec), tau=TAU, select="all")
    engine.read(range(4))
    engine.generate(STEPS - 4)
    trace, keys = recorded(engine)
    monkeypatch.setattr(Trace, "keys", lambda trace, entries: keys[:, :entries])
    replayed = Replayer(trace).run(registry.build(spec))
    measured = engine.ledger()
    for field in fields(replayed):
        one, other = getattr(replayed, field.name), getattr(measured, field.name)
        if field.name.startswith("mass"):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        elif field.name != "all_keys":  # this engine keeps them, to measure what was lost
            assert np.array_equal(one, other), field.name

"""Random weights, a trace's accesses: the replay's ledger and bytes whatever the batch, and pages
attended to where the policy keeps them.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

from command import fmsim_here
from kernel_pools import no_waits
from made_trace import make_trace, save_indexer
from small_flash import small_flash

from fmsim.errors import FmsimError
from fmsim.exec.decode import trace_driven
from fmsim.exec.decode.synthetic_decode import SyntheticStep
from fmsim.exec.decode.trace_driven import TraceDrivenDecode
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.geometry import CSA, HCA, PRESETS
from fmsim.policies import registry
from fmsim.replay.decode_loop import DecodeLoop
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import allocation, footprint

SMALL = small_flash((CSA, HCA, CSA, CSA), vocabulary=128)
ON_GPU = torch.cuda.is_available()
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
SPECS = [
    "full",
    {"policy": "recency", "budget": "20%"},
    {"policy": "h2o", "budget": "20%"},
    {"policy": "lru", "budget": "40 entries"},
    {"policy": "lru", "granularity": 4, "on_miss": "fallback"},
]


class Unwaiting(DecodeLoop):
    """After the first step, which compiles kernels and captures the graph, no step within a window
    waits for the device.
    """

    def advance(self):
        with no_waits() if self.step % 64 else nullcontext():
            super().advance()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_moves_what_the_replay_says(spec, device, monkeypatch):
    monkeypatch.setattr(trace_driven, "DecodeLoop", Unwaiting)
    replayer = Replayer(make_trace(prompt_tokens=800, n_steps=12))
    model, experts = synthetic_model(SMALL, device, model_bytes(SMALL, 8), 0)
    assert experts == 8
    layer_map = (0, 1, 2)
    ledger = replayer.run(registry.build(spec))
    for batch in (1, 3) if ON_GPU else (3,):
        found = synthetic_run.run(
            "it", lambda: registry.build(spec), replayer, SMALL, layer_map, model, device, batch
        )
        for field in fields(ledger):
            assert np.array_equal(
                getattr(ledger, field.name), getattr(found.outcome.ledger, field.name)
            ), field.name
        loads = (
            (ledger.demand_loads + ledger.lookahead_loads)
            .sum(axis=0)[footprint(ledger, SMALL, layer_map).groups]
            .sum()
        )
        assert found.outcome.h2d_bytes == loads * ledger.granularity * 584
        predicted = allocation(ledger, SMALL).total
        assert (
            0 <= found.gpu_bytes - predicted <= 64 * (584 + 3 * 132)
        )  # keys of three layers and HCA entries of one fill whole pages of 64
    shown = synthetic_run.report([found], replayer, SMALL, layer_map, experts, device, "made")
    assert shown["policies"][0]["decode_tokens_per_s"] > 0 and shown["scenario"]["batch"] == 3


@pytest.mark.parametrize("batch", [1, 2, 7, 97])
def test_each_requests_memory_is_scored_once_between_two_decisions(batch):
    policy = SimpleNamespace(params=SimpleNamespace(cadence=8))
    decode = SimpleNamespace(policy=policy, batch=batch)
    turns = [
        SyntheticStep._in_turn(SimpleNamespace(decode=decode, _step=step)) for step in range(16, 24)
    ]
    scored = [request for turn in turns for request in range(turn.start, turn.stop)]
    assert scored == list(range(batch))
    most = max(turn.stop - turn.start for turn in turns)
    assert most == -(-batch // 7) and (turns[0] == slice(0, 1)) == (batch == 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("granularity", [1, 4])
def test_a_lookahead_policy_keeps_the_keys_of_what_its_indexer_scores(
    granularity, device, monkeypatch, tmp_path
):
    """One layer keeps all its keys, in pages of the residency's size, and finds those of what is
    resident among them.
    """
    monkeypatch.setattr(trace_driven, "DecodeLoop", Unwaiting)
    trace = make_trace(prompt_tokens=800, n_steps=20)
    header = trace.header.model_copy(update={"tau": 8})  # decisions at steps 0, 8 and 16
    states = make_trace(n_steps=130).hidden  # three, which differ
    replayer = Replayer(replace(trace, header=header, hidden=states))
    spec = {
        "policy": "lsa",
        "budget": "30%",
        "stale": False,
        "cadence": 8,
        "layers": [0],
        "checkpoint": save_indexer(tmp_path / "indexer.safetensors"),
        "granularity": granularity,
    }
    model, _ = synthetic_model(SMALL, device, model_bytes(SMALL, 8), 0)
    ledger = replayer.run(registry.build(spec))
    found = synthetic_run.run(
        "it",
        lambda: registry.build(spec),
        replayer,
        SMALL,
        (0, 1, 2),
        model,
        device,
        batch=2 if ON_GPU else 1,
    )
    for field in fields(ledger):
        assert np.array_equal(
            getattr(ledger, field.name), getattr(found.outcome.ledger, field.name)
        ), field.name
    loads = ledger.lookahead_loads.sum()
    assert loads > 0 and found.outcome.h2d_bytes == loads * granularity * (3 * 584 + 2 * 132)
    predicted = allocation(ledger, SMALL).total
    assert found.decode.spare_bytes == allocation(ledger, SMALL).spare
    assert 0 <= found.gpu_bytes - predicted <= 64 * 584 + granularity * 132


def test_where_all_is_kept_all_that_was_selected_is_there():
    """Nobody looks into the residency then; who does finds the same."""
    replayer, full = Replayer(make_trace(prompt_tokens=800, n_steps=4)), registry.build("full")
    model, _ = synthetic_model(SMALL, "cpu", model_bytes(SMALL, 8), 0)
    groups = footprint(replayer.run(full), SMALL, (0, 1, 2)).groups
    decode = TraceDrivenDecode(replayer, full, SMALL, groups, SMALL.n_csa, watch=False)
    step, needs = SyntheticStep(decode, model, (0, 1, 2)), decode.manager.needs
    assert needs.keeps_all
    for number in range(4):
        decode.manager.needs = needs
        step.prepare(number)
        found = step.given.clone()
        decode.manager.needs = replace(needs, keeps_all=False)
        step.prepare(number)
        assert torch.equal(step.given, found) and (found >= 0).any()


def test_layers_before_the_first_csa_layer_read_nothing_that_is_shown_later(monkeypatch):
    """On a GPU they compute while tables are written: spoiled until they are waited for, these
    change no logits.
    """
    replayer = Replayer(make_trace(prompt_tokens=800, n_steps=4))
    model, _ = synthetic_model(SMALL, "cpu", model_bytes(SMALL, 8), 0)
    compute, wait = SyntheticStep.compute, trace_driven.TraceDrivenDecode.wait_until_shown
    found = []

    def spoiled(step):
        decode = step.decode
        shown = [step.given, decode.pages, decode.fetched, decode.tables.rows]
        step.kept = [(part, part.clone()) for part in shown]
        for part in shown:
            part.zero_()
        decode.restore = lambda: [part.copy_(right) for part, right in step.kept]
        noted(step)

    def noted(step):
        compute(step)
        found[-1].append(step.logits.clone())

    def restored(decode):
        wait(decode)
        decode.restore()

    for computed in (noted, spoiled):
        found.append([])
        monkeypatch.setattr(SyntheticStep, "compute", computed)
        synthetic_run.run(
            "it",
            lambda: registry.build({"policy": "lru", "budget": "40 entries"}),
            replayer,
            SMALL,
            (0, 1, 2),
            model,
            "cpu",
            2,
        )
        monkeypatch.setattr(trace_driven.TraceDrivenDecode, "wait_until_shown", restored)
    expected, given = found
    assert len(given) == 4 and len(torch.stack(expected).unique(dim=0)) > 1
    assert torch.equal(torch.stack(given), torch.stack(expected))


WRONG = [
    (
        ("--model", "v9"),
        "--model: neither a preset nor a model's file: 'v9'; presets are v4-flash, v4-pro",
    ),
    (("--context", "200k"), "--context 204800: no shipped trace has about as many tokens"),
    (("--context", "many"), "'many' is no number of tokens; write 8192, 32K or 1M"),
    (("--trace", "absent.safetensors"), "absent.safetensors"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    WRONG,
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_gets_one_clear_line(options, message, tmp_path):
    done = fmsim_here(
        "exec", "--weights", "synthetic", "--device", "cpu", *options, folder=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_a_budget_says_how_many_requests_it_holds():
    assert synthetic_run.batch_that_fits(16 * 2**30, 3 * 2**30) == 5
    with pytest.raises(
        FmsimError, match=r"one request takes 3.00 GiB, 1.00 GiB more than the budget's 2.00 GiB"
    ):
        synthetic_run.batch_that_fits(2 * 2**30, 3 * 2**30)


def test_a_model_larger_than_memory_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(synthetic_run, "host_free_bytes", lambda: 15 * 2**30)
    with pytest.raises(FmsimError, match="memory for weights: v4-flash with 6 experts a layer"):
        synthetic_run.weights_for(PRESETS["v4-flash"], "cpu", 2**30, seed=0)
    assert synthetic_run.free_weight_bytes(SMALL, "cpu", 2**30) == model_bytes(SMALL, 8)

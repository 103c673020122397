"""Replay and engine on one trace: the same slots at every step, and the same bytes, which are
really moved.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from command import fmsim_here
from made_trace import make_trace, save_indexer
from tapered import Tapered, TaperedLSA

from fmsim.errors import FmsimError
from fmsim.exec.decode.trace_driven import TraceDrivenDecode
from fmsim.experiments.validate import validate
from fmsim.geometry import CSA, HCA, PRESETS, SLIDING, from_config
from fmsim.policies import registry
from fmsim.policies.pyramid import Pyramid
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import (
    ModelMemory,
    allocation,
    keyed_layers,
    spread,
)
from fmsim.trace import read, write

ROOT = Path(__file__).parents[2]

SMALL = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 8,
    "hidden_size": 384,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128],
    "num_attention_heads": 6,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "sliding_window": 128,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "q_lora_rank": 192,
    "o_lora_rank": 160,
    "o_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 160,
    "vocab_size": 4096,
}


@pytest.fixture(scope="module")
def replayer():
    return Replayer(make_trace(prompt_tokens=800, n_steps=70))


@pytest.fixture(scope="module")
def indexer(tmp_path_factory):
    return save_indexer(tmp_path_factory.mktemp("indexer") / "indexer.safetensors")


def check_memory(check, geometry, n_hca):
    """The engine's tensors take what is predicted, but that index keys and HCA entries fill whole
    pages of 64.
    """
    assert check.memory_holds and check.allocator_gpu_bytes is None
    entry_bytes, key_bytes = geometry.kv_entry_bytes, geometry.index_key_bytes
    rounded = 64 * (n_hca * entry_bytes + geometry.n_csa * key_bytes)
    assert 0 <= check.built_gpu_bytes - check.predicted_gpu_bytes <= rounded


POLICIES = [
    "full",
    {"policy": "recency", "budget": "10%"},
    "lru",
    {
        "policy": "lru",
        "budget": "10 entries",
    },  # fewer slots than a step selects: pages pass through
    {"policy": "lru", "granularity": 4, "scope": "shared", "budget": "20%"},
    {"policy": "lru", "on_miss": "fallback"},
    {"policy": "h2o", "budget": "20%"},
    {"policy": "lsa", "budget": "30%", "stale": False},
    {"policy": "lsa", "budget": "60%", "granularity": 16, "on_miss": "fallback"},
    {"policy": "lsa", "budget": "30%", "scope": "per_layer", "on_miss": "fetch", "stale": False},
    {
        "policy": "lsa",
        "budget": "300 entries",
        "threshold": 0.9,
        "stale": False,
    },  # room for all, of which the threshold gives up some
    {
        "policy": "lsa",
        "budget": "300 entries",
        "threshold": 0.9,
        "on_miss": "fetch",
        "stale": False,
    },
    {"policy": "oracle"},
    {"policy": "oracle", "cadence": 16, "budget": "100%"},  # foresees pages that are not there yet
    "belady",
]


@pytest.mark.parametrize("spec", POLICIES, ids=str)
def test_both_worlds_agree_slot_for_slot_and_byte_for_byte(replayer, indexer, spec):
    name = spec if isinstance(spec, str) else spec["policy"]
    given = ({"policy": spec} if isinstance(spec, str) else spec) | (
        {"checkpoint": indexer} if name == "lsa" else {}
    )
    geometry = from_config(SMALL, "small")
    [check] = validate([("it", lambda: registry.build(given))], replayer, geometry, spread(3, 3))
    assert check.identical, check
    check_memory(check, geometry, 3)
    assert (check.engine_bytes > 0) == (name in ("lru", "lsa", "oracle", "belady"))


UNEVEN = {
    "pyramid": lambda checkpoint: Pyramid(budget="20%"),
    "lru": lambda checkpoint: Tapered(budget="12 entries"),
    "pages": lambda checkpoint: Tapered(budget="20%", granularity=4, on_miss="fallback"),
    "decisions": lambda checkpoint: Tapered(budget="20%", cadence=16),
    "lsa": lambda checkpoint: TaperedLSA(
        checkpoint=checkpoint, budget="40%", scope="per_layer", stale=False
    ),
    "lsa ahead": lambda checkpoint: TaperedLSA(
        checkpoint=checkpoint, budget="40%", scope="per_layer", granularity=4, cadence=16
    ),
    "lsa and misses": lambda checkpoint: TaperedLSA(
        checkpoint=checkpoint, budget="40%", scope="per_layer", on_miss="fetch", stale=False
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_both_worlds_agree_where_layers_have_slots_of_their_own(replayer, indexer, name):
    """Five layers of a model on three of a trace; beside two of them index keys come and go."""
    flash = replace(PRESETS["v4-flash"], layer_types=(SLIDING, CSA, HCA, CSA, CSA, CSA, CSA))
    [check] = validate(
        [(name, lambda: UNEVEN[name](indexer))], replayer, flash, layer_map=(0, 0, 1, 1, 2)
    )
    assert check.identical, check
    check_memory(check, flash, 1)
    ledger = replayer.run(UNEVEN[name](indexer))
    assert len(set(ledger.group_slots)) == 3
    assert check.spare_bytes == allocation(ledger, flash, (0, 0, 1, 1, 2)).spare
    # the trace knows no newer state by the decisions of "lsa ahead"
    assert (check.engine_bytes > 0) == (name not in ("pyramid", "lsa ahead"))
    assert (check.spare_bytes > 0) == (name not in ("pyramid", "lsa"))


def test_the_published_geometry_moves_its_own_bytes(replayer):
    flash = replace(PRESETS["v4-flash"], layer_types=(SLIDING, CSA, HCA, CSA, CSA, CSA))
    [check] = validate([("lru", lambda: registry.build("lru"))], replayer, flash, spread(3, 4))
    assert check.identical and check.engine_bytes == check.engine_pages * 584 > 0


def test_index_keys_move_with_their_entries_in_the_layers_that_the_indexer_does_not_score(
    replayer, indexer
):
    flash = replace(PRESETS["v4-flash"], layer_types=(SLIDING, CSA, HCA, CSA, CSA, CSA, CSA))
    for on_miss, key_layers in (("mask", 5 - 3), ("fetch", 0)):
        spec = {
            "policy": "lsa",
            "checkpoint": indexer,
            "budget": "30%",
            "stale": False,
            "on_miss": on_miss,
        }
        [check] = validate([("lsa", lambda: registry.build(spec))], replayer, flash, spread(3, 5))
        assert (
            check.identical
            and check.engine_bytes == check.engine_pages // 5 * (5 * 584 + key_layers * 132) > 0
        )


def test_a_wrong_byte_and_a_wrong_decision_are_found(replayer):
    geometry = from_config(SMALL, "small")
    decode = TraceDrivenDecode(replayer, registry.build("lru"), geometry, range(3), 3)
    decode.tiers.entries.storage ^= 1
    with pytest.raises(FmsimError, match="differs from the mirror"):
        decode.run()
    specs = iter(["lru", "lfu"])
    [check] = validate(
        [("it", lambda: registry.build(next(specs)))], replayer, geometry, spread(3, 3)
    )
    assert not check.identical and check.first_difference is not None


def test_the_command_shows_both_worlds_and_never_in_one_column(tmp_path):
    write(tmp_path / "small.safetensors", make_trace(prompt_tokens=800, n_steps=20))
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano/config.json").write_text(json.dumps(SMALL))
    (tmp_path / "small.yaml").write_text(
        "name: small\ntrace: small.safetensors\nmodel: nano\npolicies: [full, lru]\n"
    )
    done = fmsim_here("validate", "small.yaml", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["policies"]
    assert [(row["policy"], row["identical"]) for row in rows] == [("full", True), ("lru", True)]
    assert rows[1]["replay_bytes"] == rows[1]["engine_bytes"] > 0
    shown = fmsim_here("validate", "small.yaml", "-p", "lru", folder=tmp_path)
    assert "yes" in shown.stdout and "simulated" in shown.stdout and "measured" in shown.stdout


def test_whole_steps_are_timed_with_random_weights(tmp_path):
    """The published entries and keys, so heads of 512 and keys of 128; the rest small."""
    write(tmp_path / "small.safetensors", make_trace(prompt_tokens=800, n_steps=12))
    fields = {
        "compress_ratios": [0, 4, 128, 4, 4],
        "num_hidden_layers": 5,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
    }
    fields |= {
        "index_n_heads": 2,
        "index_head_dim": 128,
        "q_lora_rank": 16,
        "o_lora_rank": 16,
        "moe_intermediate_size": 16,
        "vocab_size": 128,
        "n_routed_experts": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(SMALL | fields))
    (tmp_path / "small.yaml").write_text(
        "name: small\ntrace: small.safetensors\nmodel: .\nbatch: 2\npolicies: [full, {policy: lru,"
        " budget: 20 entries}]\n"
    )
    done = fmsim_here(
        "validate", "small.yaml", "--whole-steps", "--device", "cpu", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        report["scenario"]["whole_steps"] and "8 experts a layer" in report["scenario"]["notes"][0]
    )
    for row in report["policies"]:
        assert row["identical"] and row["measured_tokens_per_s"] > 0
        assert row["step_error"] == pytest.approx(
            row["simulated_step_p50_s"] / row["measured_step_p50_s"] - 1
        )
        assert 0 <= row["modelled_gpu_bytes"] - row["predicted_gpu_bytes"] <= 64 * (584 + 3 * 132)
    shown = fmsim_here(
        "validate", "small.yaml", "-p", "full", "--whole-steps", "--device", "cpu", folder=tmp_path
    )
    assert "differs" in shown.stdout and "tokens/s" in shown.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch tells no bytes")
@pytest.mark.parametrize("trace", ["nano-32k-needles", "nano-128k-needles", "nano-500k-needles"])
@pytest.mark.parametrize(
    "spec",
    [
        "full",
        "recency:budget=25% gpu",
        "lru:budget=40% gpu",
        "lru:budget=40% gpu,cadence=64,on_miss=mask",
        "lsa:budget=25% gpu",
        "lsa:budget=25% gpu,granularity=16",
        "oracle:budget=12.5% gpu",
        "pyramid:budget=40% gpu",
    ],
)
def test_a_request_takes_what_is_predicted_by_torchs_own_allocator(spec, trace):
    """What torch is asked for while a request's KV is built, within 1% of the figure that leads
    every table.
    """
    flash = PRESETS["v4-flash"]
    found = read(ROOT / "traces" / f"{trace}.safetensors")
    layer_map = spread(found.n_layers, flash.n_csa)
    shown = Replayer(found, memory=ModelMemory(flash, layer_map), max_steps=2)
    groups = layer_map if registry.build(spec).params.scope == "per_layer" else (0,) * flash.n_csa
    ledger = shown.run(registry.build(spec))
    keyed = keyed_layers(ledger, flash)
    # what was built before, in earlier cases, is given back when it is told to
    gc.collect()
    decode = TraceDrivenDecode(shown, registry.build(spec), flash, groups, keyed, "cuda")
    predicted = allocation(ledger, flash, layer_map).total
    assert decode.allocator.n_bytes == pytest.approx(predicted, rel=0.01)
    assert decode.gpu_bytes == pytest.approx(predicted, rel=0.01)
    budget = registry.build(spec).params.budget
    if spec != "full":
        full_bytes = flash.full_gpu_bytes(found.header.prompt_tokens + 2)
        assert predicted <= budget.gpu_bytes(full_bytes)

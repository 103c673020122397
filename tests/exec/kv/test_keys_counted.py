"""Tiered index keys as they are counted, reported and refused.

Bytes, figures that are not measured, and a user's mistakes.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from dataclasses import replace

from command import fmsim_here
from tiered_decode import (
    ENTRY_BYTES,
    KEY_BYTES,
    LAYERS,
    LENGTHS,
    OPTIONS,
    STEPS,
    TARGETS,
    TAU,
    TIERED,
    Decoded,
)
from tiny_indexer import lookahead
from tiny_model import ours

from fmsim.errors import FmsimError
from fmsim.exec.decode.engine import Engine
from fmsim.exec.decode.unscaled import unscaled
from fmsim.exec.runs import live as run
from fmsim.exec.runs.record import trace_header, trace_of
from fmsim.exec.runs.stream import Stream, Turn
from fmsim.indexer import checkpoint
from fmsim.policies import registry
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.sim import metrics
from fmsim.sim.footprint import allocation, footprint, keyed_layers


class ReplayerOf(Replayer):
    """Of a decode's trace, with the decode's own states in the place of what a trace rounds."""

    def __init__(self, trace, request, **options):
        super().__init__(trace, **options)
        self.request = request

    def _lookahead(self, window):
        state = self.request.lookahead(window)
        return state.hidden.numpy(), state.position, state.keys.numpy()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bytes_are_those_of_the_replay_and_of_its_footprint(prompts, tmp_path, options):
    spec, [prompt] = lookahead(tmp_path, "28 entries", TARGETS, **options), prompts("cpu")[:1]
    everything, tiered = (Decoded([prompt], spec, where) for where in ("all", "tiered"))
    trace = trace_of(
        everything.batch.requests[0],
        trace_header(prompt.model, LENGTHS[0], name="tiny", seed=0, sha256=None, tau=TAU),
        [False] * STEPS,
    )
    replayed = ReplayerOf(trace, everything.batch.requests[0]).run(registry.build(spec))
    [ledger] = tiered.ledgers
    for name in ("resident", "lookahead_loads", "written", "evicted", "scored", "initial"):
        assert np.array_equal(getattr(ledger, name), getattr(replayed, name)), name
    geometry, batch = unscaled(prompt.model.config, torch.float32), tiered.batch
    place, own = footprint(replayed, geometry), footprint(ledger, geometry)
    assert (
        place.keys_tiered and own.keys_tiered and keyed_layers(replayed, geometry) == len(TARGETS)
    )
    assert place.allocated == own.allocated
    entries, granularity = (LENGTHS[0] + STEPS) // 4, ledger.granularity
    assert batch.tiers.slot_bytes == ledger.budget_entries * (
        LAYERS * ENTRY_BYTES + len(TIERED) * KEY_BYTES
    )
    planned = allocation(replayed, geometry)
    assert batch.tiers.slot_bytes == planned.slots
    assert batch.keys.kept_bytes == planned.index_keys
    assert batch.tiers.pool_bytes - batch.tiers.slot_bytes == planned.spare
    assert batch.tiers.mirror_bytes == entries * (LAYERS * ENTRY_BYTES + len(TIERED) * KEY_BYTES)
    loads = int(replayed.lookahead_loads.sum()) * granularity
    assert batch.h2d_bytes == loads * (LAYERS * ENTRY_BYTES + len(TIERED) * KEY_BYTES) > 0
    assert batch.timeline().h2d_bytes.sum() == batch.h2d_bytes
    assert everything.batch.h2d_bytes == loads * LAYERS * ENTRY_BYTES
    assert batch.gpu_kv_bytes < everything.batch.gpu_kv_bytes


def test_what_is_not_measured_is_said_and_never_counted(decoded, tmp_path):
    everything, tiered = (decoded({}, where, "cpu") for where in ("all", "tiered"))
    for one, other in zip(everything.ledgers, tiered.ledgers):
        assert one.unmeasured == [] and other.unmeasured == TIERED
        for name in (
            "accessed",
            "hit",
            "golden",
            "golden_hit",
            "mass_total",
            "mass_kept",
            "heaviest_lost",
        ):
            assert not getattr(other, name)[:, TIERED].any()
            assert np.array_equal(
                getattr(one, name)[:, TARGETS], getattr(other, name)[:, TARGETS]
            ), name
        kept, only = metrics.kept(other, range(LAYERS)), metrics.kept(one, TARGETS)
        assert kept == only and 0 < kept["mass_kept"] < 1
        of_mass = ("entry_recall", "entry_recall_per_step", "mass_kept")
        assert metrics.kept(other, TIERED) == only | dict.fromkeys(of_mass)
        assert metrics.exact(other) is False
        assert metrics.exact(replace(other, mass_kept=other.mass_total)) is None
        other.save(tmp_path / "it.npz")
        assert Ledger.load(tmp_path / "it.npz").unmeasured == TIERED


@pytest.mark.parametrize("targets", [TARGETS, range(LAYERS)], ids=["some", "all"])
def test_the_report_says_over_how_many_layers(reference, tmp_path, capsys, targets):
    from fmsim.report.grid import ALL, show_parts
    from fmsim.report.tables import measured

    stream = Stream("text", np.random.default_rng(0).integers(0, 64, 120), [Turn([1, 2, 3], 20)])
    policy = registry.build(lookahead(tmp_path, "20 entries", targets, cadence=64))
    prompts = run.read(ours(reference), [stream])
    decoded = run.decode(prompts, [stream], policy, index_keys="tiered")
    report = run.report(*decoded, "lsa", "tiny", "text")
    details = report["scenario"]["details"]["lsa"]
    assert details["index_keys"] == "tiered" and details["measured_layers"] == list(targets)
    show_parts(measured.parts(report, [[]]), ALL)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"all in the {len(targets)} of {LAYERS} CSA layers that the memory indexer scores" in shown
    )
    assert (f"in 2 of {LAYERS} CSA layers; not measured in the others" in shown) == (
        targets == TARGETS
    )


REFUSED = [
    ("lru", "policy lru has on_miss fetch, .* give --set on_miss=mask, or --index-keys all"),
    ({"policy": "lsa", "on_miss": "fallback"}, "policy lsa has on_miss fallback"),
    (
        {"policy": "recency", "budget": "40%"},
        "policy recency has no memory indexer, .* give --policy lsa, or --index-keys all",
    ),
]


@pytest.mark.parametrize(("spec", "says"), REFUSED, ids=str)
def test_what_needs_all_keys_is_refused(prompts, spec, says):
    with pytest.raises(FmsimError, match="--index-keys tiered: " + says):
        Engine(prompts("cpu")[0], registry.build(spec), index_keys="tiered")


def test_what_was_not_measured_cannot_be_asked_for(prompts, tmp_path):
    spec, prompt = lookahead(tmp_path, "28 entries", TARGETS), prompts("cpu")[0]
    with pytest.raises(FmsimError, match='select="all" takes the scores of all index keys'):
        Engine(prompt, registry.build(spec), index_keys="tiered", select="all")
    engine = Engine(prompt, registry.build(spec), index_keys="tiered")
    engine.generate(2)
    header = trace_header(prompt.model, LENGTHS[0], name="tiny", seed=0, sha256=None, tau=TAU)
    with pytest.raises(
        FmsimError, match=r"what CSA layers \[0, 2\] select among all entries was not measured"
    ):
        trace_of(engine.request, header, [False] * 2)
    with pytest.raises(FmsimError, match=r"CSA layer 2 .* those of layers \[1, 3\] are all there"):
        engine.keys.first(0, 9)[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--record", "it.safetensors"],
            "--record: a trace says what each layer selects among all entries",
        ),
        (
            ["--weights", "synthetic"],
            "--index-keys: with --weights synthetic they lie as `fmsim run` counts them",
        ),
    ],
)
def test_a_users_mistake_is_one_line(arguments, says):
    done = fmsim_here("exec", *arguments, "--index-keys", "tiered", "--device", "cpu")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_nano_tiers_the_layers_that_its_indexer_is_told_to_leave_out():
    """It scores a layer or two of nano's six, of which it is told to take one."""
    layer = max(checkpoint.load(checkpoint.SHIPPED).layers)
    done = fmsim_here(
        "exec",
        "--context",
        "1024",
        "--steps",
        "8",
        "--device",
        "cpu",
        "--json",
        "--index-keys",
        "tiered",
        "--set",
        f"layers=[{layer}]",
        "--set",
        "budget=30%",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        report["scenario"]["details"]["lsa"]["measured_layers"] == [layer]
        and 0 < report["policies"][0]["mass_kept"] < 1
    )

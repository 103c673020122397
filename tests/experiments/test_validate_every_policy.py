"""Every policy in both worlds on a trace of the shipped nano: the same slots, counts and bytes."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the engine needs fmsim[model]")

from every_policy import label, own_policies, specs

from fmsim.experiments.validate import validate
from fmsim.geometry import CSA, HCA, PRESETS, SLIDING
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import spread
from fmsim.testing.sample import shortened
from fmsim.trace import read

ROOT = Path(__file__).parents[2]
STEPS = 70  # a window of 64 steps and a little
# Four layers of a model on three of the trace.
MODEL = replace(PRESETS["v4-flash"], layer_types=(SLIDING, CSA, HCA, CSA, CSA, CSA))
EXAMPLES = {"sieve": "Sieve", "s3fifo": "S3FIFO", "snapkv": "SnapKV", "pyramidkv": "PyramidKV"}


@pytest.fixture(scope="module")
def replayer():
    return Replayer(shortened(read(ROOT / "traces/nano-32k-needles.safetensors"), STEPS))


def test_every_policy_is_among_them():
    assert {spec["policy"] for spec in specs()} == set(own_policies())


def agree(replayer, spec):
    layers = spread(replayer.trace.n_layers, MODEL.n_csa)
    [check] = validate([("it", lambda: registry.build(spec))], replayer, MODEL, layers)
    assert check.identical, check
    assert check.allocated_kv_bytes == check.predicted_kv_bytes


@pytest.mark.parametrize("spec", list(specs()), ids=label)
def test_both_worlds_agree(replayer, spec):
    agree(replayer, spec)


@pytest.mark.parametrize("name", EXAMPLES)
def test_both_worlds_agree_on_a_plug_in(replayer, name):
    file = f"{ROOT / 'docs/examples' / name}.py:{EXAMPLES[name]}"
    agree(replayer, {"policy": file, "budget": "20%"})

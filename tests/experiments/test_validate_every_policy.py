"""Every policy in both worlds on a trace of the shipped nano: the same slots, counts and bytes."""

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")

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
# Seven layers of a model on six of the trace.
MODEL = replace(PRESETS["v4-flash"], layer_types=(SLIDING, CSA, HCA, *6 * [CSA]))
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


@pytest.fixture(scope="module")
def replayer():
    return Replayer(shortened(read(ROOT / "traces/nano-32k-needles.safetensors"), STEPS))


def test_every_policy_is_among_them():
    assert {spec["policy"] for spec in specs()} >= set(own_policies())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", list(specs()), ids=label)
def test_both_worlds_agree(replayer, spec, device):
    layers = spread(replayer.trace.n_layers, MODEL.n_csa)
    policies = [("it", lambda: registry.build(spec))]
    [check] = validate(policies, replayer, MODEL, layers, device)
    assert check.identical, check
    assert check.memory_holds, check

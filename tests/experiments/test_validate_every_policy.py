"""Every policy in both worlds on a trace of the shipped nano: the same slots, counts and bytes."""

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")

from every_policy import label, specs

from fmsim.experiments.validate import validate
from fmsim.geometry import CSA, HCA, PRESETS, SLIDING
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import spread
from fmsim.trace import read
from fmsim.trace.cut import cut

ROOT = Path(__file__).parents[2]
STEPS = 70  # a window of 64 steps and a little
LAYERS = (1, 4)  # of the trace's six; native scores all six
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
def replayers():
    trace = read(ROOT / "traces/nano-32k-needles.safetensors")
    return [Replayer(cut(trace, 0, STEPS, layers)) for layers in (LAYERS, None)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", list(specs()), ids=label)
def test_both_worlds_agree(replayers, spec, device):
    replayer = replayers[spec["policy"] == "native"]
    # one layer of the model more than the trace has
    kinds = (SLIDING, CSA, HCA, *replayer.trace.n_layers * [CSA])
    model = replace(PRESETS["v4-flash"], layer_types=kinds)
    layers = spread(replayer.trace.n_layers, model.n_csa)
    policies = [("it", lambda: registry.build(spec))]
    [check] = validate(policies, replayer, model, layers, device)
    assert check.identical, check
    assert check.memory_holds, check

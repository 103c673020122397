"""Step times of other families: their own tables, a twin's, or V4-Flash's scaled and said so."""

import json
from importlib.resources import files

import numpy as np
import pytest

from fmsim.geometry import PRESETS, geometry_named
from fmsim.hw import load_hardware
from fmsim.hw.deployment import Deployment
from fmsim.hw.modules import modules, stand_in
from fmsim.hw.tables import AttentionTimes, Curve, load_table
from fmsim.sim.step_cost import StepModel

H200 = load_hardware("h200")


@pytest.mark.parametrize("name", ["v3.2", "glm-5", "glm-5.1", "glm-5.2", "glm-5.3"])
def test_dsa_models_have_kernels_of_their_own_or_a_twins(name):
    geometry = PRESETS[name]
    assert stand_in(H200, geometry) is None
    contexts = np.array([4096.0, 65_536, 131_072])
    model = StepModel(H200, geometry)
    one = model.equal(1, contexts, contexts).total_s(geometry.n_csa)
    many = model.equal(32, contexts, contexts).total_s(geometry.n_csa)
    assert (np.diff(one) > 0).all() and (many > one).all() and (many < 32 * one).all()


def test_shared_layers_cost_what_their_table_says():
    """GLM-5.2: 21 layers of 78 run the indexer; at the shortest context and one request."""
    table = load_table("h200", "sglang")["models"]["glm-5.2"]["attention"]
    tp = str(H200.placed.tp)
    own, shared = (table[kind][tp]["short_ms"][0][0] for kind in ("dsa", "dsa_shared"))
    found = modules(H200, PRESETS["glm-5.2"]).csa.short_ms[0][0]
    assert found == pytest.approx((21 * own + 57 * shared) / 78 * H200.kernel_factor.value)


def test_the_mean_of_two_modules_by_hand():
    def times(short, grown):
        return AttentionTimes(
            np.array([1.0, 100.0]),
            np.array([1.0, 2.0]),
            np.array(short),
            Curve(np.array([100.0, 200.0]), np.array(grown)),
            4.0,
        )

    one, other = times([[1, 2], [3, 4]], [0, 10]), times([[3, 4], [5, 6]], [0, 20])
    mean = one.mean(other, 0.25)
    assert mean.short_ms.tolist() == [[2.5, 3.5], [4.5, 5.5]]
    assert mean.grown(150.0) == pytest.approx(0.25 * 5 + 0.75 * 10) and mean.token_ns == 4


def test_an_untimed_model_is_scaled_and_said_so():
    said = stand_in(H200, PRESETS["v4.1-flash"])
    assert "not timed" in said and "v4-flash's" in said
    assert stand_in(H200, PRESETS["v4-flash"]) is None


def test_minimax_m3_has_kernels_of_its_own():
    """57 block-sparse layers and 3 dense ones, from the tables; its experts were timed in bf16."""
    geometry = PRESETS["minimax-m3"].on_gpu(8)
    hw = load_hardware("h200").deployed(Deployment(weights="bf16"))
    assert stand_in(hw, geometry) is None
    assert "fp8 experts were not timed" in stand_in(load_hardware("h200"), geometry)
    tokens = np.array([4096, 131_072])
    costs = StepModel(hw, geometry).equal(1, tokens, geometry.csa_entries(tokens))
    # SGLang 0.5.16's module at tensor parallel 8, bfloat16 KV, batch 1 (aiconfigurator-core)
    np.testing.assert_allclose(costs.csa_s * 1e3, [0.0390, 0.0691], atol=2e-4)
    dense_ms = np.diff(costs.rest_s)[0] * 1e3 / 3
    kv_ms = 126_976 * 512 / hw.hbm_bytes_per_s.value * 1e3  # what a dense layer reads more
    assert kv_ms < dense_ms < 10 * kv_ms


def test_a_config_with_the_presets_sizes_has_its_kernels(tmp_path):
    config = json.loads((files("fmsim.geometry") / "presets" / "minimax-m3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config["config"]))
    mine = geometry_named(str(tmp_path))
    assert mine.name != "minimax-m3"
    hw = load_hardware("h200").deployed(Deployment(weights="bf16"))
    assert stand_in(hw, mine.on_gpu(8)) is None

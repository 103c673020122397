"""Calibration: what it writes is what the simulator reads; without a GPU it says so; and its
measuring runs, at sizes that mean nothing, on a CPU and on a GPU.
"""

import json
import pickle

import numpy as np
import pytest
import torch
import yaml
from hand_kernels import kernel_table
from kernel_pools import on_each_device
from typer.testing import CliRunner

from fmsim.cli.hw import app
from fmsim.errors import FmsimError
from fmsim.exec.measure.jobs import Job, run_jobs
from fmsim.geometry import PRESETS
from fmsim.hw.calibration import Calibration, Timing, write_preset
from fmsim.hw.spec import load_hardware
from fmsim.sim.step_cost import StepModel
from fmsim.sim.transfer_cost import GatherCurve


def given(**changes) -> Calibration:
    fields = dict(
        device="Some GPU",
        software="torch 2.11",
        date="2026-01-01",
        weights="bf16 weights",
        hbm_bytes=80e9,
        reserve_bytes=1e9,
        host_bytes=128e9,
        copy_bytes_per_s=2.99e12,
        matmul_flops=779e12,
        link_bytes_per_s=55.1e9,
        graph_launch_s=1.5e-6,
        host_launch_s=5e-6,
        gathers={37_376: {384: 46e9, 96: 37e9}, 584: {4096: 26e9, 32_768: 42e9}},
        kernels={"v4-flash": kernel_table()},
        timings=(Timing(kernel="top-k", shape="1 x 8,192", n_bytes=34_816, seconds=1e-5),),
    )
    return Calibration(**fields | changes)


def test_what_is_written_is_read(tmp_path):
    calibration = given()
    written = write_preset(calibration, tmp_path / "new" / "mine.yaml")
    assert [path.name for path in written] == ["mine.yaml", "mine-link.yaml", "mine-kernels.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        path.name for path in written
    )
    hw = load_hardware("new/mine.yaml", tmp_path)
    assert (hw.name, hw.title, hw.n_gpus) == ("mine", "Some GPU", 1)
    assert (hw.hbm_bytes.value, hw.hbm_bytes_per_s.value, hw.matmul_flops.value) == (
        80e9,
        2.99e12,
        779e12,
    )
    assert (hw.link.bandwidth_bytes_per_s.value, hw.kernels) == (55.1e9, calibration.kernels)
    assert {
        gather.row_bytes: gather.bytes_per_s for gather in hw.link.gathers
    } == calibration.gathers
    assert (
        "2026-01-01" in hw.hbm_bytes.source
        and "bf16 weights" in hw.kernel_source
        and "1.50 us" in hw.kernel_source
    )
    assert Calibration.model_validate_json(written[2].read_text()) == calibration


def test_a_simulation_computes_with_it(tmp_path):
    write_preset(given(), tmp_path / "mine.yaml")
    hw = load_hardware("mine.yaml", tmp_path)
    assert GatherCurve(hw.link).seconds(584, 584 * 4096) == pytest.approx(584 * 4096 / 26e9)
    tokens = torch.tensor([1024.0, 131_072.0]).numpy()
    costs = StepModel(hw, PRESETS["v4-flash"]).equal(1, tokens, tokens / 4)
    batch_1 = 1 + 1 / 64
    assert costs.csa_s * 1e3 == pytest.approx([0.08 * batch_1, 0.08 * batch_1 + 0.01])
    other = 43 * (0.03 + 0.024 + 0.006) + 0.05 + 22 * 0.05
    assert costs.rest_s[0] * 1e3 == pytest.approx(other * batch_1)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw.pop("hbm_bytes"), "hbm_bytes: Field required"),
        (lambda raw: raw.update(n_gpus=0), "n_gpus: Input should be greater than or equal to 1"),
        (lambda raw: raw.pop("link"), "must name a file beside it"),
        (lambda raw: raw.update(link="elsewhere"), "elsewhere.yaml: there is none"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, says):
    path = write_preset(given(), tmp_path / "mine.yaml")[0]
    raw = yaml.safe_load(path.read_text())
    damage(raw)
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(FmsimError, match=says.replace(".", r"\.")):
        load_hardware("mine.yaml", tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FmsimError, match="cannot be written"):
        write_preset(given(), tmp_path / "file" / "mine.yaml")
    with pytest.raises(FmsimError, match=r"call it mine\.yaml"):
        write_preset(given(), tmp_path / "mine")


def test_presets_are_listed():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0 and "h100" in result.output and "55" in result.output


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here, so the command would measure it"
)
def test_without_a_gpu_it_says_so(tmp_path):
    result = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "mine.yaml")])
    assert isinstance(result.exception, FmsimError) and "no CUDA device" in str(result.exception)
    assert "\n" not in str(result.exception) and not list(tmp_path.iterdir())


def small_sizes():
    """Sizes that mean nothing, and take no time."""
    from fmsim.exec.measure.sizes import Sizes, StepSize

    return Sizes(
        contexts=(256, 512),
        batches=(1, 2),
        crowds=(2,),
        crowd_contexts=(512,),
        some_batches=(1, 2),
        paged_batches=(1, 2),
        residents=(64, 128),
        resident_pages=(1, 64),
        staged=(0, 2),
        staged_entries=256,
        fetched={1: (0, 2), 4: (0, 3)},
        fetched_entries=64,
        fetching_batches=(1, 2),
        gathers={8: (2, 4), 584: (2, 4)},
        beside_rows=4,
        within_bytes=2**16,
        kernel_shapes=((1, 128),),
        steps=(StepSize(64, 32), StepSize(96, 32), StepSize(96, 64), StepSize(64, 32, 2)),
        decisions=(StepSize(96, 32, 2), StepSize(96, 64, 2)),
        loading_batches=(1, 2),
        loading_entries=(64, 96),
        step_groups=2,
        step_topk=8,
        busy_s=0.001,
        copy_bytes=2**16,
        link_bytes=2**12,
        host_bytes=2**14,
        matmul=16,
    )


@on_each_device
@pytest.mark.parametrize("float8", [False, True])
def test_the_measuring_runs(tmp_path, device, float8):
    """nano's modules at small sizes: the figures mean nothing, but the whole path from clock to
    preset is walked.
    """
    from fmsim.exec.kernels.layout import plain
    from fmsim.exec.measure.calibrate import measure
    from fmsim.exec.model.weights.synthetic import QUANTISED
    from fmsim.nano.config import nano_config

    sizes = small_sizes()
    lines: list[str] = []
    layouts = plain(torch.bfloat16, 64), plain(torch.bfloat16, 32)
    config = nano_config()
    if float8:
        config.quantization_config = QUANTISED
    calibration = measure(PRESETS["v4-flash"], config, layouts, device, sizes, 0, lines.append)
    assert {timing.kernel for timing in calibration.timings} == {
        "index scores",
        "top-k",
        "sparse attention",
        "memory scores",
    }
    assert calibration.kernels["v4-flash"].csa_context_ms.keys() == {256, 512} and len(lines) > 20
    assert ("float8" in calibration.weights) == float8
    assert (calibration.device == "CPU") == (device == "cpu")
    write_preset(calibration, tmp_path / "small.yaml")
    loaded = load_hardware("small.yaml", tmp_path)
    assert loaded.link.gathers[1].bytes_per_s.keys() == {2, 4}
    engine = loaded.kernels["v4-flash"].engine
    assert engine.fetching_ms.keys() == engine.common_fetching_ms.keys() == sizes.fetched.keys()
    assert engine.residents_ms.keys() == set(sizes.resident_pages)
    assert engine.late_bytes_per_s.keys() == set(sizes.recalled_rows)
    assert engine.within_bytes_per_s.keys() == set(sizes.recalled_rows)
    assert engine.csa_crowd_ms.keys() == engine.hca_crowd_ms.keys()
    assert engine.steps["fetched"].loading_ms and engine.steps["fallback"].loading_ms


def test_a_module_that_is_timed_has_the_types_of_a_loaded_model():
    """FlashMLA takes float32 sinks alone, as a loaded model has them."""
    from fmsim.exec.measure.module_times import random_weights
    from fmsim.exec.model.attention import Attention
    from fmsim.exec.model.weights.loader import meta_model
    from fmsim.nano.config import nano_config

    def types(module):
        parts = [*module.named_parameters(), *module.named_buffers()]
        return {name: part.dtype for name, part in parts}

    config = nano_config()
    layers = meta_model(config, torch.bfloat16).model.layers
    for attention in {layer.self_attn.kind: layer.self_attn for layer in layers}.values():
        with torch.inference_mode():
            timed = types(random_weights(Attention(config, attention.kind)))
        assert timed == types(attention) and timed["sinks"] == torch.float32


def test_every_kernel_is_launched_ahead(monkeypatch):
    """In one process here, where nothing is compiled: each launch's work runs."""
    from fmsim.exec.kernels.layout import plain
    from fmsim.exec.measure.compile_ahead import launched, launches_of
    from fmsim.nano.config import nano_config

    layouts = plain(torch.bfloat16, 64), plain(torch.bfloat16, 32)
    sizes = small_sizes()
    launches = list(launches_of(sizes))
    asked = [(nano_config(), layouts, "cpu", sizes, launch) for launch in launches]
    assert pickle.loads(pickle.dumps(asked)) is not None
    assert [launched(each) for each in asked] == [""] * len(asked)
    for launch in launches:
        wanted = sizes.some_batches if " " in launch.what else sizes.batches
        found = [each.batches for each in launches if each.what == launch.what]
        assert sorted(sum(found, ())) == sorted(wanted)


def test_a_killed_calibration_goes_on(tmp_path):
    part = tmp_path / "mine.part.json"
    ran: list[str] = []

    def job(name, fails=False):
        def run():
            if fails:
                raise KeyboardInterrupt
            ran.append(name)
            return {1: len(ran)}

        return Job(name, 2.0, run)

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job("a"), job("b"), job("c", fails=True)], {"at": (1, 2)}, part, lines.append)
    assert "takes about 6 s on an H200, in 3 parts" in lines
    found = run_jobs([job("a"), job("b"), job("c")], {"at": (1, 2)}, part, lines.append)
    assert ran == ["a", "b", "c"] and found == {"a": {"1": 1}, "b": {"1": 2}, "c": {"1": 3}}
    assert "takes about 2 s on an H200, in 1 parts" in lines
    run_jobs([job("a")], {"at": (1, 3)}, part, lines.append)  # of other sizes: all anew
    assert ran[-1] == "a" and json.loads(part.read_text())["figures"] == {"a": {"1": 4}}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda link: link.update(gathers=[]), "gathers: .*at least 1 item"),
        (lambda link: link["gathers"][0].update(row_bytes=0), "greater than or equal to 1"),
        (
            lambda link: link["gathers"][0].update(bytes_per_s={64: 1e-308, 128: 1e9}),
            "greater than or equal to 0.000001",
        ),
        (lambda link: link["gathers"][0].update(bytes_per_s={64: 1e30, 128: 1e9}), "less than"),
        (lambda link: link["gathers"][0].update(bytes_per_s={0: 1e9, 128: 1e9}), "greater than"),
        (lambda link: link["gathers"][0].update(bytes_per_s={64: 1e9}), "at least 2 items"),
    ],
)
def test_a_damaged_link_is_told(tmp_path, damage, says):
    write_preset(given(), tmp_path / "mine.yaml")
    link_path = tmp_path / "mine-link.yaml"
    raw = yaml.safe_load(link_path.read_text())
    damage(raw)
    link_path.write_text(yaml.safe_dump(raw))
    with pytest.raises(FmsimError, match=says):
        load_hardware("mine.yaml", tmp_path)


def test_hardware_without_times_of_any_kernels_is_told():
    bare = load_hardware("h100").model_copy(update={"kernel_tables": None})
    with pytest.raises(FmsimError, match="says no times of v4-flash's kernels; give kernel_tables"):
        StepModel(bare, PRESETS["v4-flash"]).equal(1, np.array([1024.0]), np.array([256.0]))


def test_what_a_decision_takes_is_found_from_times_at_five_sizes():
    """Times made of known parts."""
    from fmsim.exec.measure.sizes import Sizes
    from fmsim.exec.measure.step_work import _decision

    sizes, n_csa = Sizes(), 21
    made = {"fixed_ms": 0.7, "slot_ns": 20.0, "page_ns": 0.9, "table_ns": 0.02, "move_ns": 0.05}

    def seconds(size, parts):
        of_one = parts["slot_ns"] * size.slots + parts["page_ns"] * size.entries
        of_each = 6 * parts["table_ns"] * size.entries + n_csa * parts["move_ns"] * size.slots
        return parts["fixed_ms"] / 1e3 + (6 * of_one + size.batch * of_each) / 1e9

    numbered = dict(enumerate((*sizes.steps, *sizes.decisions)))
    times = {number: seconds(size, made) for number, size in numbered.items()}
    assert _decision(times, n_csa, sizes) == pytest.approx(made)

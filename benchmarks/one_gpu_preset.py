"""A preset that ships, from what `fmsim hw calibrate --model scenarios/one-gpu` measured.

    fmsim hw calibrate --model scenarios/one-gpu --out mine.yaml
    python benchmarks/one_gpu_preset.py mine.yaml h200-1gpu [--host-gpus 2]

writes fmsim/hw/presets/h200-1gpu.yaml and fmsim/hw/links/h200-1gpu.yaml, and keeps all timings in
benchmarks/results/calibration-h200-1gpu.json. The preset's times are of V4-Flash
with 16 of its 256 experts a layer, which one GPU holds, and stand for V4-Flash.

    python benchmarks/one_gpu_preset.py benchmarks/results/exec.json h100-1gpu

does so with the calibration that a run of exec.py kept, and the packaged link of that card.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from fmsim.errors import FmsimError
from fmsim.exec.runs.synthetic import SPARE_BYTES
from fmsim.files import write_text
from fmsim.hw import load_hardware
from fmsim.units import GIB

ROOT = Path(__file__).parents[1]
HW = ROOT / "fmsim" / "hw"
MODEL, EXPERTS = "v4-flash", 16
DIGITS = 5  # significant ones


def rounded(value: Any) -> Any:
    """The same with fewer digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def shipped(
    measured: dict[str, Any], link: str, file: str, experts: int, host_gpus: int
) -> dict[str, Any]:
    """The preset, from a calibration's file of one model with so many experts a layer; of the
    host's memory the part of one of its `host_gpus`.
    """
    preset = dict(measured)
    if host_gpus > 1:
        host = measured["host_bytes"]
        preset["host_bytes"] = {
            "value": host["value"] / host_gpus,
            "source": f"one of {host_gpus} GPUs' part of {host['source']}",
        }
    preset["link"] = link
    preset["title"] = f"{measured['title']}, 1 GPU, fmsim's engine"
    runtime = measured["reserve_bytes"]
    preset["reserve_bytes"] = {
        "value": runtime["value"] + SPARE_BYTES,
        "source": (
            f"{runtime['value'] / GIB:.2f} GiB that the runtime holds before weights and KV"
            f" ({runtime['source']}), and {SPARE_BYTES / GIB:.0f} GiB that the engine leaves for"
            " activations, scores and CUDA graphs (fmsim/exec/runs/synthetic.py)"
        ),
    }
    preset["kernel_source"] = f"{file}: {measured['kernel_source']}"
    [table] = measured["kernels"].values()
    preset["kernels"] = {MODEL: table}
    preset["experts"] = experts
    return rounded(preset)


def of_files(calibrated: Path, name: str, host_gpus: int) -> None:
    """Ship what `fmsim hw calibrate` wrote, its link and its timings."""
    load_hardware(calibrated.name, calibrated.resolve().parent)  # checks both
    measured = yaml.safe_load(calibrated.read_text(encoding="utf-8"))
    link_path = calibrated.with_name(f"{measured['link']}.yaml")
    link = yaml.safe_load(link_path.read_text(encoding="utf-8"))
    kept = f"benchmarks/results/calibration-{name}.json"
    timings = calibrated.with_name(f"{calibrated.stem}-kernels.json")
    write_text(ROOT / kept, timings.read_text(encoding="utf-8"))
    _write("links", name, rounded(link))
    _write("presets", name, shipped(measured, name, kept, EXPERTS, host_gpus))


def of_result(path: Path, name: str, host_gpus: int) -> None:
    """Ship the calibration in a result of exec.py."""
    result = json.loads(path.read_text(encoding="utf-8"))
    table = result["calibration"]
    for model, columns in table["kernels"].items():
        numbered = {
            column: {int(size): ms for size, ms in points.items()}
            if isinstance(points, dict)
            else points
            for column, points in columns.items()
        }
        table["kernels"][model] = numbered
    card = name.partition("-")[0]
    kept = f"benchmarks/results/{path.name}"
    _write("presets", name, shipped(table, card, kept, result["experts"], host_gpus))


def _write(folder: str, name: str, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False, width=160, default_flow_style=None)
    write_text(HW / folder / f"{name}.yaml", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "calibrated", type=Path, help="preset of `fmsim hw calibrate`, or exec.json"
    )
    parser.add_argument("name", help="of the preset that ships, such as h200-1gpu")
    parser.add_argument(
        "--host-gpus", type=int, default=1, help="that share the host's memory; 1 by default"
    )
    given = parser.parse_args()
    try:
        ship = of_result if given.calibrated.suffix == ".json" else of_files
        ship(given.calibrated, given.name, given.host_gpus)
        print(f"{given.name}: {load_hardware(given.name).title}")
    except FmsimError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

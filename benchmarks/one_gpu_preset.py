"""A preset that ships, from what `fmsim hw calibrate --model scenarios/one-gpu` measured.

    fmsim hw calibrate --model scenarios/one-gpu --out mine.yaml
    python benchmarks/one_gpu_preset.py mine.yaml h200-1gpu

writes fmsim/hw/presets/h200-1gpu.yaml and fmsim/hw/links/h200-1gpu.yaml, and keeps all timings in
benchmarks/results/calibration-h200-1gpu.json. The preset's times are of V4-Flash
with 16 of its 256 experts a layer, which one GPU holds, and stand for V4-Flash.
"""

from __future__ import annotations

import argparse
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
TIMED, MODEL, EXPERTS = "one-gpu", "v4-flash", 16
DIGITS = 5  # significant ones


def rounded(value: Any) -> Any:
    """The same with fewer digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def shipped(measured: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    """The preset, from a calibration's file."""
    preset = dict(measured)
    preset["link"] = name
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
    preset["kernels"] = {MODEL: measured["kernels"][TIMED]}
    preset["experts"] = EXPERTS
    return rounded(preset)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibrated", type=Path, help="preset of `fmsim hw calibrate`")
    parser.add_argument("name", help="of the preset that ships, such as h200-1gpu")
    given = parser.parse_args()
    kept = ROOT / "benchmarks" / "results" / f"calibration-{given.name}.json"
    try:
        load_hardware(given.calibrated.name, given.calibrated.resolve().parent)  # checks both
        measured = yaml.safe_load(given.calibrated.read_text(encoding="utf-8"))
        link_path = given.calibrated.with_name(f"{measured['link']}.yaml")
        link = yaml.safe_load(link_path.read_text(encoding="utf-8"))
        parts = {
            "links": rounded(link),
            "presets": shipped(measured, given.name, f"benchmarks/results/{kept.name}"),
        }
        timings = given.calibrated.with_name(f"{given.calibrated.stem}-kernels.json")
        write_text(kept, timings.read_text(encoding="utf-8"))
        for folder, content in parts.items():
            text = yaml.safe_dump(content, sort_keys=False, width=160, default_flow_style=None)
            write_text(HW / folder / f"{given.name}.yaml", text)
        print(f"{given.name}: {load_hardware(given.name).title}")
    except FmsimError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

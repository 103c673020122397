"""What a calibration measured of one GPU, written as a hardware preset and its link, which
`load_hardware` reads.

Measuring is `fmsim.exec.measure.calibrate`'s; this half needs no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from fmsim.errors import FmsimError
from fmsim.files import write_text
from fmsim.hw.spec import KernelTable


class Timing(BaseModel):
    """One kernel at one shape."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: str
    shape: str
    n_bytes: int
    seconds: float = Field(gt=0)


class Calibration(BaseModel):
    """Measured figures, in bytes, seconds, and bytes or operations a second; ``kernels`` by model,
    in KernelTable's units.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    software: str
    date: str
    weights: str  # of the modules of ``kernels``
    hbm_bytes: float = Field(gt=0)
    reserve_bytes: float = Field(gt=0)
    host_bytes: float = Field(gt=0)
    copy_bytes_per_s: float = Field(gt=0)
    matmul_flops: float = Field(gt=0)
    link_bytes_per_s: float = Field(gt=0)
    graph_launch_s: float = Field(gt=0)
    host_launch_s: float = Field(gt=0)
    gathers: dict[int, dict[int, float]]  # row bytes -> rows -> bytes/s
    kernels: dict[str, KernelTable]
    timings: tuple[Timing, ...] = ()

    @property
    def _source(self) -> str:
        return f"measured by fmsim hw calibrate, {self.date}, {self.software}"

    def preset(self, name: str) -> dict[str, Any]:
        """The preset's YAML as a mapping; its link stands beside it as ``<name>-link.yaml``."""
        source = self._source

        def figure(value: float, how: str) -> dict[str, Any]:
            return {"value": float(value), "source": f"{how}; {source}"}

        return {
            "title": self.device,
            "n_gpus": 1,
            "link": f"{name}-link",
            "hbm_bytes": figure(self.hbm_bytes, "the driver's total"),
            "hbm_bytes_per_s": figure(
                self.copy_bytes_per_s, "device-to-device copy, bytes read and written"
            ),
            "matmul_flops": figure(self.matmul_flops, "bf16 matrix product of 8192 x 8192 x 8192"),
            "reserve_bytes": figure(
                self.reserve_bytes, "what the runtime holds before any weights or KV"
            ),
            "host_bytes": figure(self.host_bytes, "the host's memory"),
            "kernel_factor": {"value": 1.0, "source": f"measured modules, added up; {source}"},
            "kernel_source": (
                f"{source}; {self.weights}, CUDA graphs, cold L2; a graph's launch of one kernel"
                f" takes {self.graph_launch_s * 1e6:.2f} us, the host's"
                f" {self.host_launch_s * 1e6:.1f} us"
            ),
            "kernels": {
                model: table.model_dump(exclude_none=True) for model, table in self.kernels.items()
            },
        }

    def link(self) -> dict[str, Any]:
        """The link's YAML as a mapping."""
        return {
            "name": f"host link of {self.device}",
            "bandwidth_bytes_per_s": {
                "value": float(self.link_bytes_per_s),
                "source": f"pinned contiguous copy to the GPU; {self._source}",
            },
            "gather_source": (
                "a kernel that reads random rows of pinned host memory, nothing else running;"
                f" {self._source}"
            ),
            "gathers": [
                {"row_bytes": size, "bytes_per_s": dict(sorted(rates.items()))}
                for size, rates in sorted(self.gathers.items())
            ],
        }


def check_out(path: Path) -> None:
    """Raise FmsimError where `path` cannot be a preset's, before anything is measured for it."""
    if path.suffix != ".yaml":
        raise FmsimError(
            f"--out {path}: a hardware preset is a .yaml file; call it {path.name}.yaml"
        )


def write_preset(calibration: Calibration, path: Path) -> list[Path]:
    """Write ``path`` (``NAME.yaml``), ``NAME-link.yaml`` and ``NAME-kernels.json`` (every kernel by
    shape) beside it.

    Each file is replaced whole or not at all; the preset comes last, so that it never names a link
    that is missing. Raises FmsimError.
    """
    check_out(path)
    link, kernels = (
        path.with_name(f"{path.stem}-link.yaml"),
        path.with_name(f"{path.stem}-kernels.json"),
    )
    texts = {
        kernels: calibration.model_dump_json(indent=1) + "\n",
        link: yaml.safe_dump(calibration.link(), sort_keys=False, width=140),
        path: yaml.safe_dump(calibration.preset(path.stem), sort_keys=False, width=140),
    }
    try:
        for target, text in texts.items():
            write_text(target, text)
    except OSError as error:
        raise FmsimError(
            f"--out {path}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
    return [path, link, kernels]

"""Device presets: one YAML a device under `presets/`, every figure beside its source."""

from __future__ import annotations

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmsim.errors import FmsimError

LINK_FIGURE = "link_bytes_per_s"  # the figure that stands in the link's own file


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Strict):
    """A number and where it comes from."""

    value: float = Field(gt=0)
    source: str = Field(min_length=8)


class Gather(_Strict):
    """Rate of a kernel that gathers rows of one size from pinned host memory, by the number of
    rows.
    """

    row_bytes: int
    bytes_per_s: dict[int, float]


class Link(_Strict):
    """One direction of the path between host and GPU memory; both directions have these figures."""

    name: str
    bandwidth_bytes_per_s: Figure
    gather_source: str
    gathers: tuple[Gather, ...]
    gather_speedup: float = Field(
        1.0, gt=0
    )  # of the measured rates, where a scenario gives another bandwidth; fixed costs stay


class KernelTable(_Strict):
    """Measured times of one model's decode modules on one of `n_gpus` tensor-parallel GPUs, in
    milliseconds.

    `*_context_ms` is by context tokens at batch 1, `*_batch_ms` by batch (attention: at the
    smallest context). `*_entry_ns`: what each entry of a further request's history adds, where it
    was measured; otherwise it is taken from the device's rates.
    """

    csa_context_ms: dict[int, float]
    csa_batch_ms: dict[int, float]
    hca_context_ms: dict[int, float]
    hca_batch_ms: dict[int, float]
    moe_batch_ms: dict[int, float]
    hyper_connections_batch_ms: dict[int, float]
    all_reduce_batch_ms: dict[int, float]
    router_batch_ms: dict[int, float]
    head_batch_ms: dict[int, float]
    csa_entry_ns: float | None = Field(None, ge=0)
    hca_entry_ns: float | None = Field(None, ge=0)


class Hardware(_Strict):
    """A GPU in a server of `n_gpus` that run one model tensor-parallel, each with the whole KV
    cache.
    """

    name: str
    title: str
    n_gpus: int = Field(ge=1)
    hbm_bytes: Figure
    hbm_bytes_per_s: Figure
    matmul_flops: Figure
    reserve_bytes: Figure
    host_bytes: Figure  # of the whole server
    host_reserve_bytes: Figure | None = None  # of it, what no mirror can have
    link: Link
    kernel_source: str
    kernel_factor: Figure
    topk_context_ms: dict[int, float] | None = (
        None  # by context, of a top-k kernel other than the one in the kernel table
    )
    topk_source: str = ""
    kernels: dict[str, KernelTable]

    @property
    def host_bytes_per_gpu(self) -> float:
        """Each GPU's process pins its own mirror."""
        reserve_bytes = self.host_reserve_bytes.value if self.host_reserve_bytes else 0.0
        return (self.host_bytes.value - reserve_bytes) / self.n_gpus

    def kv_pool_bytes(self, weight_bytes: float) -> float:
        """GPU memory that weights and the runtime leave for KV; may be negative."""
        return self.hbm_bytes.value - weight_bytes - self.reserve_bytes.value


def hardware_names() -> list[str]:
    folder = files("fmsim.hw") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_hardware(name: str, folder: Path | None = None) -> Hardware:
    """The preset called `name`, or the file of that name if it ends in .yaml (as `fmsim hw
    calibrate` writes it), taken from `folder`.

    Raises FmsimError with the nearest names when there is none, or with what is wrong with the
    file.
    """
    if name.endswith(".yaml"):
        return _from_file((folder or Path()) / name)
    names = hardware_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else f"choose one of {', '.join(names)}, or a .yaml file of fmsim hw calibrate"
        )
        raise FmsimError(f"no hardware preset '{name}'; {hint}")
    presets = files("fmsim.hw")
    raw = _read(presets / "presets" / f"{name}.yaml")
    raw["link"] = _read(presets / "links" / f"{raw['link']}.yaml")
    if "kernels_of" in raw:  # no table of its own: another device's, times kernel_factor
        raw["kernels"] = _read(presets / "presets" / f"{raw.pop('kernels_of')}.yaml")["kernels"]
    return Hardware(name=name, **raw)


def figure_names() -> list[str]:
    """Figures that `replace_figure` takes."""
    return [
        *(
            name
            for name, field in Hardware.model_fields.items()
            if field.annotation in (Figure, Figure | None)
        ),
        LINK_FIGURE,
    ]


def replace_figure(hw: Hardware, name: str, value: float) -> Hardware:
    """`hw` with another value of one figure.

    Raises FmsimError for a name that is none, or a value not above zero.

    With another bandwidth of the link the measured rates of gathers change alike; their fixed costs
    stay.
    """
    if name not in figure_names():
        near = difflib.get_close_matches(name, figure_names(), n=1)
        raise FmsimError(
            "no such figure; "
            + (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(figure_names())}")
        )
    if not value > 0:
        raise FmsimError(f"must be above zero, not {value:g}")
    figure = Figure(value=value, source="given by the scenario")
    if name != LINK_FIGURE:
        return hw.model_copy(update={name: figure})
    speedup = hw.link.gather_speedup * value / hw.link.bandwidth_bytes_per_s.value
    return hw.model_copy(
        update={
            "link": hw.link.model_copy(
                update={"bandwidth_bytes_per_s": figure, "gather_speedup": speedup}
            )
        }
    )


def _from_file(path: Path) -> Hardware:
    """A preset outside the package, whose link lies beside it."""
    try:
        raw = _read(path)
        return Hardware(
            **raw | {"name": path.stem, "link": _read(path.with_name(f"{raw['link']}.yaml"))}
        )
    except OSError as error:
        raise FmsimError(
            f"hardware file {error.filename}: {error.strerror}; fmsim hw calibrate --out {path}"
            " writes one"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise FmsimError(
            f"hardware file {path}: {key}: {first['msg']}; fmsim hw calibrate --out {path} writes"
            " it anew"
        ) from None
    except (KeyError, TypeError, yaml.YAMLError):
        raise FmsimError(
            f"hardware file {path} is no hardware preset; fmsim hw calibrate --out {path}"
            " writes one"
        ) from None


def _read(path: Path | Traversable) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    figures: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    return figures

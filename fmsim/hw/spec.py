"""Device presets: one YAML a device under `presets/`, every figure beside its source."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fmsim.errors import DoesNotFit, FmsimError, shown
from fmsim.files import strict_json, strict_yaml
from fmsim.files.inputs import read_text
from fmsim.geometry import Geometry
from fmsim.hw.deployment import GIB, Deployment, Format, Placement, place, pool_of_log

LEAST, MOST = 1e-6, 1e21  # of a figure: beyond them, times overflow
MOST_ROW_BYTES, MOST_ROWS = 2**40, 2**40
Rate = Annotated[float, Field(ge=LEAST, le=MOST)]
LINK_FIGURE = "link_bytes_per_s"  # the figure that stands in the link's own file


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(_Strict):
    """A number and where it comes from."""

    value: float = Field(ge=LEAST, le=MOST)
    source: str = Field(min_length=8)
    guess: bool = False  # nobody measured it here; the output says so


HOST_RESERVE = Figure(
    value=10 * GIB,
    source="what SGLang's host cache leaves free (memory_pool_host.py of 0.5)",
    guess=True,
)


class Gather(_Strict):
    """Rate of a kernel that gathers rows of one size from pinned host memory, by the number of
    rows.
    """

    row_bytes: Annotated[int, Field(ge=1, le=MOST_ROW_BYTES)]
    # by rows; of two numbers at least, for the first ones tell the fixed cost
    bytes_per_s: dict[Annotated[int, Field(ge=1, le=MOST_ROWS)], Rate] = Field(min_length=2)
    source: str = ""


class Link(_Strict):
    """One direction of the path between host and GPU memory; both directions have these figures."""

    name: str
    bandwidth_bytes_per_s: Figure
    gather_source: str
    gathers: tuple[Gather, ...] = Field(min_length=1)
    gather_speedup: float = Field(
        1.0, gt=0
    )  # of the measured rates, where a scenario gives another bandwidth; fixed costs stay


Ms = Annotated[float, Field(ge=-1e9, le=1e9)]
Ns = Annotated[float, Field(ge=0, le=1e9)]
ByBatch = dict[int, Ms]
Grid = dict[int, dict[int, Ms]]


class StepWork(_Strict):
    """GPU time of an engine's bookkeeping in one kind of step, which its sizes set."""

    fixed_ms: Ms
    slot_ns: Ns = 0.0  # a slot of each group
    page_ns: Ns = 0.0  # a page in a block table: of each row of the tables, and each request
    # a page that a step may load, or a decision may keep: of each layer, and each request
    move_ns: Ns = 0.0


class DecisionWork(StepWork):
    """The same of a decision. One manager takes it for all requests, so `page_ns` is of a page of
    each group. A preset without `table_ns` has one request's block tables in `page_ns`.
    """

    table_ns: Ns = 0.0  # a page in a block table: of each row of the tables, and each request


class Bookkeeping(_Strict):
    """Of a kind of policy: a step, and what more a step takes in which an entry closes, or that
    begins with a decision.
    """

    plain: StepWork
    closing: StepWork
    decision: DecisionWork | None = None
    # a plain step that loads misses, by requests and by pages in the block tables of each; without
    # what slots take. An older preset has none: `plain` stands for it there
    loading_ms: Grid = {}


class EngineTimes(_Strict):
    """What fmsim's engine takes beside the modules alone, in milliseconds.

    All but `in_row_batch_ms` is added to a module or a step whose policy asks for it.
    """

    # of a layer, by batch: its modules one after another, less what they take alone
    in_row_batch_ms: ByBatch
    # of a layer's attention, by batch and then context
    csa_crowd_ms: Grid
    hca_crowd_ms: Grid
    closing_batch_ms: ByBatch  # of a CSA layer: that an entry closes in every request
    masses_batch_ms: ByBatch  # of a CSA layer: that attention tells its masses
    pages_batch_ms: Grid  # of a CSA layer, by entries a page and batch: more than with pages of 64
    # of a CSA layer that selects among resident entries, by entries a page, batch and how many of
    # these each request has: more than where there are no others, in pages of 64
    residents_ms: dict[int, Grid] = {}
    # the same in older presets: naming what was selected among them, by batch; and scoring these,
    # beyond pages of 64, by entries a page
    listed_batch_ms: ByBatch = {}
    listed_scores: dict[int, StepWork] = {}
    staging_ms: Grid  # of a CSA layer, by batch and pages of one entry that each request loads
    # of a CSA layer that loads in most steps, and makes its queries meanwhile, by entries a page,
    # batch and pages that each request loads: pages of its own, or the same as the others'
    fetching_ms: dict[int, Grid] = {}
    common_fetching_ms: dict[int, Grid] = {}
    # of rows that another request has just read from the host: in older presets, and not priced
    same_rows_bytes_per_s: Rate | None = None
    beside_bytes_per_s: Rate  # of a recall beside a decode
    beside_slower: Ms  # share by which steps beside it take longer
    # and beside what a decision recalls late, by bytes of a row; else `beside_slower`
    late_slower: dict[int, Ms] = {}
    # of that, by bytes of a row; in an older preset the link's
    late_bytes_per_s: dict[int, Rate] = {}
    # of rows of so many bytes that go from one place of the GPU's memory to another
    within_bytes_per_s: dict[int, Rate] = {}
    steps: dict[str, Bookkeeping]  # by kind of policy, `STEP_KINDS`

    @model_validator(mode="after")
    def _are_fetched_alike(self) -> Self:
        if self.fetching_ms.keys() != self.common_fetching_ms.keys():
            raise ValueError("fetching_ms and common_fetching_ms need the same sizes of pages")
        return self

    @model_validator(mode="after")
    def _choices_among_residents_are_timed(self) -> Self:
        if not self.residents_ms and not (self.listed_batch_ms and self.listed_scores):
            raise ValueError("residents_ms is needed, or listed_batch_ms and listed_scores")
        return self


# How a policy's steps keep its books: everything stays; a set that only writes change; one that
# learns from each step; misses loaded, or the heavy ones; decisions; decisions known ahead.
STEP_KINDS = ("kept", "held", "observed", "fetched", "fallback", "decided", "ahead")


class KernelTable(_Strict):
    """Measured times of one model's decode modules on one GPU, in milliseconds, as `fmsim hw
    calibrate` writes them.

    `*_context_ms` is by context tokens at batch 1, `*_batch_ms` by batch (attention: at the
    smallest context). `*_entry_ns`: what each entry of a further request's history adds, where it
    was measured; otherwise it is taken from the device's rates. `engine`: what comes beside the
    modules, where it was measured.
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
    engine: EngineTimes | None = None


class Hardware(_Strict):
    """A GPU in a server, and how a model lies on the server's GPUs.

    Memory is counted as nvidia-smi does, in MiB, and written in bytes.
    """

    name: str
    title: str
    n_gpus: int = Field(ge=1)  # of a server
    hbm_bytes: Figure
    hbm_bytes_per_s: Figure
    matmul_flops: Figure
    reserve_bytes: Figure  # of GPU memory, what is neither weights nor KV
    host_bytes: Figure  # of the whole server
    host_reserve_bytes: Figure = HOST_RESERVE  # of it, what no mirror can have
    # below host memory, of the whole server; reads
    nvme_bytes: Figure | None = None
    nvme_bytes_per_s: Figure | None = None
    nvme_usd_per_tb: Figure | None = None
    link: Link
    weights: Format = "fp8"  # that the server runs unless a deployment says otherwise
    kernel_source: str
    kernel_factor: Figure
    kernel_tables: str | None = None  # the GPU whose tables/*.json give the times, or
    experts_as: Format | None = None  # whose experts' times stand in for the served format's
    kernels: dict[str, KernelTable] = {}  # by model, a calibration's own
    # of each layer's routed experts, so many are held: of a model that one GPU cannot hold whole
    experts: int | None = Field(None, ge=1)
    topk_context_ms: dict[int, float] | None = (
        None  # by context, of a top-k kernel other than the one in the kernel table
    )
    topk_source: str = ""
    usd_per_gpu_hour: Figure | None = None
    deployment: Deployment = Deployment()

    @cached_property
    def placed(self) -> Placement:
        """How a model lies on one server's GPUs. Raises FmsimError for numbers that do not fit."""
        return place(self.deployment, self.n_gpus, self.weights)

    @property
    def host_bytes_per_gpu(self) -> float:
        """Each GPU's process pins its own mirror."""
        return max(0.0, self.host_bytes.value - self.host_reserve_bytes.value) / self.n_gpus

    @property
    def nvme_bytes_per_gpu(self) -> float:
        return self.nvme_bytes.value / self.n_gpus if self.nvme_bytes else 0.0

    @property
    def nvme_rate_per_gpu(self) -> float:
        """Bytes/s that each GPU's process reads, all at once."""
        return self.nvme_bytes_per_s.value / self.n_gpus if self.nvme_bytes_per_s else 0.0

    def deployed(self, deployment: Deployment) -> Hardware:
        """The same hardware under another deployment, whose numbers are checked now."""
        hw = self.model_copy(update={"deployment": deployment})
        hw.__dict__.pop("placed", None)
        hw.placed  # noqa: B018 - raises where the numbers do not fit
        return hw

    def weight_bytes(self, geometry: Geometry) -> float:
        """On each GPU."""
        return self.placed.weight_bytes(self._held(geometry))

    def cuts_experts(self, geometry: Geometry) -> bool:
        """The model has more routed experts a layer than this hardware holds of any."""
        n_experts = getattr(geometry, "n_experts", 0)
        return self.experts is not None and n_experts > self.experts

    def _held(self, geometry: Geometry) -> Geometry:
        """The model with the experts that are held."""
        if not self.cuts_experts(geometry):
            return geometry
        held: Geometry = replace(cast(Any, geometry), n_experts=self.experts)
        return held

    def kv_pool(self, geometry: Geometry) -> Figure | None:
        """Each GPU's memory for KV and where the figure comes from; None where there is none."""
        given = self.deployment
        weights = self.weight_bytes(geometry)
        kind, size = "", 0.0
        source = ""
        if given.start_log is not None:
            kind, size = pool_of_log(given.start_log)
            source = f"{given.start_log}, the engine's start log"
        elif given.kv_pool_bytes is not None:
            kind, size, source = "bytes", given.kv_pool_bytes, "deployment.kv_pool_bytes"
        elif given.kv_pool_tokens is not None:
            kind, size, source = "tokens", given.kv_pool_tokens, "deployment.kv_pool_tokens"
        if kind == "tokens":
            size *= geometry.full_kv_bytes(_TOKENS_OF_A_POOL) / _TOKENS_OF_A_POOL
        if kind:
            return Figure(value=size, source=source)
        if given.mem_fraction is not None:
            size = given.mem_fraction * self.hbm_bytes.value - weights
            source = "deployment.mem_fraction of GPU memory, less the weights"
        else:
            size = self.hbm_bytes.value - weights - self.reserve_bytes.value
            source = f"GPU memory less weights and reserve: {self.reserve_bytes.source}"
        if size <= 0:
            return None
        guess = given.mem_fraction is None and self.reserve_bytes.guess
        return Figure(value=size, source=source, guess=guess)

    def kv_pool_bytes(self, geometry: Geometry) -> float:
        """Each GPU's memory for KV.

        Raises FmsimError where the weights alone leave none.
        """
        pool = self.kv_pool(geometry)
        if pool is None:
            placed, weights = self.placed, self.weight_bytes(geometry)
            raise DoesNotFit(
                f"{geometry.name} does not fit {self.title}, {placed.title}:"
                f" {weights / GIB:.1f} GiB of {placed.weights} weights on each of"
                f" {placed.n_gpus} GPUs leave nothing for KV of its"
                f" {self.hbm_bytes.value / GIB:.1f} GiB, of which"
                f" {self.reserve_bytes.value / GIB:.1f} GiB are the engine's; take more GPUs, a"
                " smaller weight format or larger hardware"
            )
        return pool.value


_TOKENS_OF_A_POOL = 2**20  # at which a token's bytes are taken, so that rounding does not matter


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
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}."
        raise FmsimError(
            f"no hardware preset '{shown(name)}'; {hint} For another GPU `fmsim hw calibrate --out"
            " FILE.yaml`, run on it, writes one"
        )
    presets = files("fmsim.hw")
    raw = _packaged(presets / "presets" / f"{name}.yaml")
    raw["link"] = _packaged(presets / "links" / f"{raw['link']}.yaml")
    return strict_json.check(Hardware, raw | {"name": name}, f"preset {name}")


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
    if not LEAST <= value <= MOST:
        raise FmsimError(f"must be between {LEAST:g} and {MOST:g}, not {value:g}")
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


def times_figure(hw: Hardware, name: str, factor: float) -> Hardware:
    """`hw` with one of its figures ``factor`` times as large, or as large as a figure may be."""
    figure = hw.link.bandwidth_bytes_per_s if name == LINK_FIGURE else getattr(hw, name)
    return replace_figure(hw, name, min(factor * figure.value, MOST))


def _from_file(path: Path) -> Hardware:
    """A preset outside the package, whose link lies beside it."""
    raw = _mapping(path)
    link = raw.get("link")
    if not isinstance(link, str) or Path(link).name != link:
        raise FmsimError(f"hardware file {shown(path)}: 'link' must name a file beside it")
    raw |= {"name": path.stem, "link": _mapping(path.with_name(f"{link}.yaml"))}
    return strict_json.check(Hardware, raw, f"hardware file {shown(path)}")


def _mapping(path: Path) -> dict[str, Any]:
    """A file of a preset, or of its link."""
    try:
        raw = strict_yaml.load(read_text(path), f"hardware file {path}")
    except FileNotFoundError:
        raise FmsimError(
            f"hardware file {shown(path)}: there is none; fmsim hw calibrate --out NAME.yaml"
            " writes one"
        ) from None
    if not isinstance(raw, dict):
        raise FmsimError(
            f"hardware file {shown(path)} is no hardware preset; fmsim hw calibrate --out NAME.yaml"
            " writes one"
        )
    return raw


def _packaged(path: Traversable) -> dict[str, Any]:
    found: dict[str, Any] = strict_yaml.load(path.read_text(encoding="utf-8"), str(path))
    return found

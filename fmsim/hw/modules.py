"""The modules of a decode step on one deployment: which table gives which time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS, Geometry
from fmsim.hw.spec import Hardware, KernelTable
from fmsim.hw.tables import (
    NOTHING,
    AttentionTimes,
    CrowdTimes,
    Curve,
    PrefillTimes,
    load_table,
    timed_engines,
)

# Between two steps an engine samples, schedules and launches, which kernel times do not hold:
# 0.65 ms of an idle GPU at one request (github.com/pegainfer-project/pegainfer issue 999).
BETWEEN_STEPS_MS = 0.65
_LARGEST_CHUNK = 32_768  # tokens, beyond which a chunk's time goes on as it went
_PREFILLS = (("dsa", "dsa"), ("msa", "gqa"), ("csa", "hca"))  # layers that select, and that do not
# entries among which fmsim's own top-k chooses by one program, which holds a power of two of them
# (`TOP_K.whole` of fmsim/exec/kernels/tuning.py)
WHOLE_ENTRIES = 4_096
_FP8_SPEEDUP = 2.0  # of matrix products over bf16, on every device here
_SPLIT = "no table has {what} on {gpu} with {engine}; there are {there}"


@dataclass(frozen=True)
class Modules:
    """Times of one model's modules, kernel factors applied."""

    csa: AttentionTimes  # of a layer that selects
    hca: AttentionTimes  # of a layer that does not
    n_sliding: int  # layers taken as an HCA layer of an empty context
    rest_ms: Callable[[int, int], float]  # by a rank's tokens and the server's
    # the same of one routed layer and the head, which is what a drafting layer has
    draft_ms: Callable[[int, int], float]
    topk: Curve | None = None  # by context, of a top-k kernel other than the table's
    prefill: PrefillModules | None = None


@dataclass(frozen=True)
class PrefillModules:
    """Of one rank that prefills."""

    attention: PrefillTimes  # of all layers together
    rest_ms: Curve  # of all layers, by the chunk's tokens


def modules(hw: Hardware, geometry: Geometry) -> Modules:
    """Raises FmsimError where no table has the deployment."""
    if hw.kernel_tables is None:
        return _calibrated(hw, geometry)
    return _Tabled(hw, geometry).modules()


class _Tabled:
    """From the tables of one GPU and engine."""

    def __init__(self, hw: Hardware, geometry: Geometry) -> None:
        self.hw = hw
        self.geometry = geometry
        self.placed = hw.placed
        gpu = str(hw.kernel_tables)
        found = load_table(gpu, self.placed.engine)
        if found is None:
            raise FmsimError(
                f"deployment: {self.placed.engine}'s kernels were not timed on {gpu}; take engine:"
                f" {', '.join(timed_engines(gpu))}"
            )
        self.file = found
        self.table, self.size = _model_table(found, geometry)
        self.factor = hw.kernel_factor.value

    def modules(self) -> Modules:
        attention = self.table["attention"]
        csa_ns, hca_ns = _roofline_ns(self.hw, self.geometry)
        if "dsa" in attention:
            csa = self._dsa(attention, csa_ns)
            hca = csa  # a DSA model has no other layers
        elif "msa" in attention:
            csa = self._attention(attention["msa"], csa_ns)
            hca = self._attention(attention["gqa"], hca_ns)
        else:
            csa = self._attention(attention["csa"], csa_ns)
            hca = self._attention(attention["hca"], hca_ns)
        topk = None
        if self.hw.topk_context_ms:
            csa = replace(csa, grown=NOTHING)
            topk = Curve.of(self.hw.topk_context_ms)
        rest_ms, draft_ms = self._rest_ms()
        return Modules(
            csa=csa,
            hca=hca,
            n_sliding=self.geometry.n_sliding,
            rest_ms=rest_ms,
            draft_ms=draft_ms,
            topk=topk,
            prefill=self._prefill(),
        )

    def _dsa(self, attention: Mapping[str, Any], roofline_ns: float) -> AttentionTimes:
        """The mean over layers that run an indexer and layers that use another's selection."""
        own = self._attention(attention["dsa"], roofline_ns)
        if "dsa_shared" not in attention:
            return own
        shared = self._attention(attention["dsa_shared"], 0.0)
        return own.mean(shared, self.geometry.n_indexing / self.geometry.n_selecting)

    def _attention(self, by_tp: Mapping[str, Any], roofline_ns: float) -> AttentionTimes:
        """What further tokens add is the device's own: as timed, and no faster than its rates. The
        tables end where their reads still hide behind launches.
        """
        key = str(self.placed.tp)
        if key not in by_tp:
            there = {tp: None for tp in by_tp if tp != "token_ns"}
            raise self._not_timed(f"attention over {key} tensor-parallel GPUs", there)
        times = AttentionTimes.of(by_tp[key], max(by_tp["token_ns"], roofline_ns))
        factor = self.factor * self.size
        return replace(times, short_ms=times.short_ms * factor, grown=times.grown.scaled(factor))

    def _rest_ms(self) -> tuple[Callable[[int, int], float], Callable[[int, int], float]]:
        """Everything but attention, as a function of a rank's tokens and the server's; and one
        routed layer with the head.
        """
        experts, router = self._experts(), Curve.of(self.table["router"])
        shared = self._of_tp("shared_expert")
        hyper = self._hyper_connections()
        head = self._of_tp("head")
        dense = self._of_tp("dense") if "dense" in self.table else NOTHING
        exchange = self._exchange()
        n_dense = self.geometry.dense_mlps if "dense" in self.table else 0
        n_routed = self.geometry.n_layers - n_dense
        factor = self.factor * self.size

        def layer(ranked: int, batch: int) -> Any:
            routed = router(ranked) + experts(batch)
            return hyper(ranked) + exchange(ranked, batch) + np.maximum(routed, shared(ranked))

        def rest(ranked: int, batch: int) -> float:
            layers = n_routed * layer(ranked, batch)
            common = hyper(ranked) + exchange(ranked, batch)
            layers = layers + n_dense * (common + dense(ranked))
            return float((layers + head(ranked)) * factor) + BETWEEN_STEPS_MS

        def draft(ranked: int, batch: int) -> float:
            return float((layer(ranked, batch) + head(ranked)) * factor)

        return rest, draft

    def _hyper_connections(self) -> Curve:
        found = self.table.get("hyper_connections")
        return NOTHING if found is None else Curve.of(found)

    def _of_tp(self, part: str) -> Curve:
        return Curve.of(self.table[part][str(self.placed.tp)])

    def _experts(self) -> Curve:
        """By tokens of all GPUs."""
        formats = self.table["experts"]
        weights = _experts_of(self.hw, formats)
        if weights not in formats:
            raise self._not_timed(f"{weights} experts", formats)
        of_format = formats[weights]
        placed = self.placed
        parts = {"tp": placed.n_gpus // placed.ep, "ep": placed.ep}
        split = " x ".join(f"{kind}{n}" for kind, n in parts.items() if n > 1) or "tp1"
        if split not in of_format:
            raise self._not_timed(f"experts as {split}", of_format)
        by_distribution = of_format[split]
        name = (
            placed.imbalance if placed.imbalance in by_distribution else next(iter(by_distribution))
        )
        return Curve.of(by_distribution[name])

    def _exchange(self) -> Callable[[int, int], np.ndarray]:
        """Between the GPUs in one layer: after attention, and around the experts."""
        placed, token_bytes = self.placed, 2 * self.geometry.hidden_size
        after_attention = self._collective("all_reduce", placed.tp)
        if placed.dp == 1 and placed.cp == 1:
            after_experts = self._collective("all_reduce", placed.n_gpus)
            return lambda ranked, batch: (
                after_attention(ranked * token_bytes) + after_experts(batch * token_bytes)
            )
        gather = self._collective("all_gather", placed.n_gpus)
        scatter = self._collective("reduce_scatter", placed.n_gpus)
        by_tokens = self.table.get("all_to_all")
        sends = Curve.of(by_tokens) if by_tokens and placed.ep == placed.n_gpus == 8 else None
        partial = self._collective("all_gather", placed.cp)

        def exchange(ranked: int, batch: int) -> np.ndarray:
            gathered = gather(batch * token_bytes) + scatter(batch * token_bytes)
            if sends is not None:  # an engine takes what is faster
                gathered = np.minimum(gathered, sends(max(1.0, ranked / placed.tp)))
            # the parts of a KV that is shared out are put together: scores' best, then values
            context = 2 * partial(ranked * token_bytes) if placed.cp > 1 else 0.0
            ms: NDArray[np.float64] = after_attention(ranked * token_bytes) + gathered + context
            return ms

        return exchange

    def _collective(self, name: str, n_gpus: int) -> Curve:
        """By bytes."""
        if n_gpus == 1:
            return NOTHING
        by_gpus = self.file[name]
        if str(n_gpus) not in by_gpus:
            raise self._not_timed(f"{name} over {n_gpus} GPUs", by_gpus)
        return Curve.of(by_gpus[str(n_gpus)])

    def _prefill(self) -> PrefillModules | None:
        found = self.table["prefill"]
        key = str(self.placed.tp)
        kinds = next(pair for pair in _PREFILLS if pair[0] in found or pair[0] == "csa")
        if any(key not in found.get(kind, {}) for kind in kinds):
            return None
        experts, router = self._experts(), Curve.of(self.table["router"])
        shared, hyper = self._of_tp("shared_expert"), self._hyper_connections()
        after_attention = self._collective("all_reduce", self.placed.tp)
        after_experts = self._collective("all_reduce", self.placed.n_gpus)
        token_bytes, factor = 2 * self.geometry.hidden_size, self.factor * self.size

        def rest(tokens: np.ndarray) -> np.ndarray:
            layer = hyper(tokens) + np.maximum(router(tokens) + experts(tokens), shared(tokens))
            layer = layer + after_attention(tokens * token_bytes)
            layer = layer + after_experts(tokens * token_bytes)
            ms: NDArray[np.float64] = self.geometry.n_layers * layer * factor
            return ms

        sizes = np.unique(np.geomspace(1, _LARGEST_CHUNK, 240).round())
        summed = Curve(sizes, np.asarray(rest(sizes)))
        csa, hca = (PrefillTimes.of(found[kind][key]) for kind in kinds)
        geometry = self.geometry
        chunk, start = np.meshgrid(csa.chunks, csa.starts, indexing="ij")
        layers = geometry.n_selecting * csa.grid_ms + geometry.n_hca * hca.ms(chunk, start)
        # a sliding layer takes what an HCA layer of an empty context takes
        layers = layers + geometry.n_sliding * hca.ms(chunk, np.zeros_like(start))
        return PrefillModules(replace(csa, grid_ms=factor * layers), summed)

    def _not_timed(self, what: str, there: Mapping[str, Any]) -> FmsimError:
        message = _SPLIT.format(
            what=what, gpu=self.hw.kernel_tables, engine=self.file["engine"], there=", ".join(there)
        )
        return FmsimError(f"deployment {self.placed.title}: {message}")


def _model_table(file: Mapping[str, Any], geometry: Geometry) -> tuple[Mapping[str, Any], float]:
    """The model's own table, or v4-flash's and what to scale it up by: the weights that a layer
    reads (never down: launches stay).
    """
    models = file["models"]
    name = timed_as(geometry, models)
    return models[name], 1.0 if _alike(geometry, name) else _layer_weights(geometry)


def _experts_of(hw: Hardware, formats: Mapping[str, Any]) -> str:
    """Whose times the experts have: the served format's, another's that the preset names, or
    bfloat16's where nobody timed fp8.
    """
    weights = hw.experts_as or hw.placed.weights
    return "bf16" if weights == "fp8" and "fp8" not in formats and "bf16" in formats else weights


def timed_as(geometry: Geometry, models: Mapping[str, Any]) -> str:
    """The model whose kernels stand for ``geometry``'s: its own, one of the same shape, or
    v4-flash's.
    """
    return next((name for name in models if _alike(geometry, name)), "v4-flash")


def stand_in(hw: Hardware, geometry: Geometry) -> str | None:
    """In words, whose kernels give the times where nobody timed the model's own, and what of the
    times is missing.
    """
    missing = []
    if hw.cuts_experts(geometry):
        missing.append(
            f"{hw.experts} of {geometry.name}'s experts a layer are held: a batch reads fewer"
            " weights than it would of all"
        )
    timed = None if hw.kernel_tables else calibrated_table(hw, geometry)
    if timed is not None and hw.placed.n_gpus > 1 and not any(timed.all_reduce_batch_ms.values()):
        missing.append(f"no exchange between GPUs was timed on {hw.name}, so none is counted")
    if missing:
        return "; ".join(missing)
    models: Mapping[str, Any] = hw.kernels
    if hw.kernel_tables is not None:
        found = load_table(hw.kernel_tables, hw.placed.engine)
        models = {} if found is None else found["models"]
    name = timed_as(geometry, models)
    if _alike(geometry, name):
        formats = models[name]["experts"] if hw.kernel_tables is not None else {}
        if _experts_of(hw, formats) == (hw.experts_as or hw.placed.weights):
            return None
        return f"{geometry.name}'s fp8 experts were not timed: bf16's times, an upper bound"
    try:
        factor = _layer_weights(geometry)
    except FmsimError as error:  # a described model's tokens were not counted
        return str(error)
    return (
        f"{geometry.name}'s kernels were not timed: step times are {name}'s, x {factor:.2f} for the"
        " weights of a layer"
    )


def _alike(geometry: Geometry, name: str) -> bool:
    """The preset of that name has the same layers and widths, so the same kernels."""
    if geometry.name == name:
        return True
    if name not in PRESETS:
        return False
    sizes = ("hidden_size", "n_heads", "index_n_heads", "active_parameters", "layers")
    return any(
        all(getattr(geometry, size) == getattr(other, size) for size in sizes)
        for other in (PRESETS[name].on_gpu(n_gpus) for n_gpus in (1, 2, 4, 8))
    )


def _layer_weights(geometry: Geometry) -> float:
    """A layer's active weights over v4-flash's; at least 1."""
    flash = PRESETS["v4-flash"]
    per_layer = geometry.active_parameters / geometry.n_layers
    return max(1.0, per_layer / (flash.active_parameters / flash.n_layers))


def calibrated_table(hw: Hardware, geometry: Geometry) -> KernelTable | None:
    """A calibration's times of a model, or V4-Flash's in their place; None where there are none."""
    return hw.kernels.get(geometry.name, hw.kernels.get("v4-flash"))


def _calibrated(hw: Hardware, geometry: Geometry) -> Modules:
    """From a calibration's own times, of one GPU that holds the whole model, or as many experts as
    each of several holds of a layer.
    """
    table = calibrated_table(hw, geometry)
    if table is None:
        raise FmsimError(
            f"hardware {hw.name}: says no times of {geometry.name}'s kernels; give kernel_tables,"
            " a GPU that fmsim has tables of, or kernels, as `fmsim hw calibrate` writes them"
        )
    size = 1.0 if geometry.name in hw.kernels else _layer_weights(geometry)
    factor = hw.kernel_factor.value * size
    curves = {
        name: Curve.of(points).scaled(factor)
        for name, points in table.model_dump(exclude={"engine"}).items()
        if isinstance(points, dict)
    }
    n_layers = geometry.n_layers
    engine = table.engine
    in_row = NOTHING if engine is None else Curve.of(engine.in_row_batch_ms).scaled(factor)

    def layer(ranked: int, batch: int) -> Any:
        # its part of the experts is asked for by as many tokens as its part of them
        experts_ms = curves["moe_batch_ms"](batch / hw.placed.ep)
        routed = curves["hyper_connections_batch_ms"](ranked) + experts_ms
        exchanged = curves["router_batch_ms"](ranked) + 2 * curves["all_reduce_batch_ms"](batch)
        return routed + exchanged + in_row(ranked)

    def rest(ranked: int, batch: int) -> float:
        return float(n_layers * layer(ranked, batch) + curves["head_batch_ms"](ranked))

    def draft(ranked: int, batch: int) -> float:
        return float(layer(ranked, batch) + curves["head_batch_ms"](ranked))

    csa_ns, hca_ns = _token_ns(hw, geometry, table)
    csa_crowds = {} if engine is None else engine.csa_crowd_ms
    hca_crowds = {} if engine is None else engine.hca_crowd_ms
    csa = _by_batch(curves["csa_batch_ms"], curves["csa_context_ms"], csa_ns)
    hca = _by_batch(curves["hca_batch_ms"], curves["hca_context_ms"], hca_ns)
    padded = 0 if engine is None else WHOLE_ENTRIES * geometry.csa_rate
    csa = replace(csa, crowd=_crowd(csa, csa_crowds, factor), padded_tokens=padded)
    return Modules(
        csa=csa,
        hca=replace(hca, crowd=_crowd(hca, hca_crowds, factor)),
        n_sliding=geometry.n_sliding,
        rest_ms=rest,
        draft_ms=draft,
    )


def _by_batch(batches: Curve, contexts: Curve, token_ns: float) -> AttentionTimes:
    """Batches were timed at the smallest context, contexts at batch 1."""
    return AttentionTimes(
        contexts=contexts.at[:1],
        batches=batches.at,
        short_ms=batches.ms[None],
        grown=Curve(contexts.at, contexts.ms - contexts.ms[0]),
        token_ns=token_ns,
    )


def _crowd(
    times: AttentionTimes, crowd_ms: Mapping[int, Mapping[int, float]], factor: float
) -> CrowdTimes | None:
    """What crowds of several contexts take more than the same batches at the smallest context; None
    where none was measured.
    """
    if not crowd_ms:
        return None
    batches = sorted(crowd_ms)
    contexts = sorted(crowd_ms[batches[0]])
    short = Curve(times.batches, times.short_ms[0])
    grown = [[0.0, *times.grown(np.array(contexts, dtype=float))]]
    for batch in batches:
        first = short.one(batch)
        grown.append([0.0, *(factor * crowd_ms[batch][tokens] - first for tokens in contexts)])
    return CrowdTimes(
        batches=np.array([1, *batches], dtype=float),
        contexts=np.array([times.contexts[0], *contexts], dtype=float),
        grown_ms=np.array(grown),
    )


def _token_ns(hw: Hardware, geometry: Geometry, table: KernelTable) -> tuple[float, float]:
    """What a token of a further request adds in a CSA and an HCA layer: as measured, or the
    roofline's.
    """
    csa_ns, hca_ns = _roofline_ns(hw, geometry)
    if table.csa_entry_ns is not None:
        csa_ns = table.csa_entry_ns / geometry.csa_rate
    if table.hca_entry_ns is not None:
        hca_ns = table.hca_entry_ns / geometry.hca_rate
    return csa_ns, hca_ns


def _roofline_ns(hw: Hardware, geometry: Geometry) -> tuple[float, float]:
    """A token's bytes or operations at the device's rates, whichever takes longer, in a CSA layer
    (index scores) and an HCA layer (attention: kernels pad few heads to all).
    """
    keys_s = geometry.index_key_bytes / hw.hbm_bytes_per_s.value
    scores = geometry.index_n_heads * (2 * geometry.index_head_dim + 2)
    scores_s = scores / (_FP8_SPEEDUP * hw.matmul_flops.value)
    dense_s = geometry.dense_bytes_per_token / hw.hbm_bytes_per_s.value
    attended_s = 4 * geometry.n_heads * geometry.head_dim / hw.matmul_flops.value
    return (
        max(keys_s, scores_s) * 1e9 / geometry.csa_rate,
        max(dense_s, attended_s / geometry.hca_rate) * 1e9,
    )

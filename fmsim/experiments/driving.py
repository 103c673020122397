"""How a trace drives a model: which of its layers stands for which, and what its entries mean."""

from __future__ import annotations

from fmsim.errors import FmsimError
from fmsim.geometry import Geometry
from fmsim.scenario import ScenarioFile
from fmsim.sim.footprint import spread
from fmsim.trace import Trace


def layers_that_drive(trace: Trace, geometry: Geometry) -> tuple[int, ...]:
    """The trace layer of each of the model's layers that page, where nobody says otherwise.

    Layers that share a selection have one trace layer, so that they move in lockstep: as the
    trace's header says it, or as the model does where the trace has a layer for each selection.
    Any other trace is spread over the model.
    """
    layout = trace.header.layout
    if layout is not None and len(layout.selections) == geometry.n_csa:
        return layout.selections
    selections = geometry.selection_map()
    if trace.n_layers == len(set(selections)):
        return selections
    return spread(trace.n_layers, geometry.n_csa)


def stands_for(file: ScenarioFile, trace: Trace, geometry: Geometry) -> str | None:
    """What the entries of a trace of another family stand for, in words; None for the model's own.

    Raises FmsimError where the scenario does not say how such a trace drives the model.
    """
    header, scenario = trace.header, file.scenario
    family = "DeepSeek-V4" if header.layout is None else header.layout.family
    alike = header.entry_tokens == geometry.csa_rate
    if alike and family in (geometry.family, "unknown"):
        return None
    tokens = geometry.csa_rate
    if scenario.layer_map is None or scenario.entry_tokens is None:
        raise FmsimError(
            f"{file.where(('trace',))}: selections of a {family} model, by entries of"
            f" {header.entry_tokens} tokens; {geometry.name} is a {geometry.family} model with"
            f" entries of {tokens}. If these entries shall stand for its own, say so:"
            f" entry_tokens: {tokens} and layer_map: spread (or {geometry.n_csa} numbers)"
        )
    if scenario.entry_tokens != tokens:
        raise FmsimError(
            f"{file.where(('entry_tokens',))}: is {scenario.entry_tokens}, but {geometry.name}"
            f" has entries of {tokens} tokens"
        )
    said = (
        f"another family's selections stand in: each {family} entry ({header.entry_tokens} tokens)"
        f" counts as one of {geometry.name}'s ({tokens})"
    )
    if trace.topk != geometry.index_topk:
        said += f"; a step selects {trace.topk} of them, {geometry.name}'s {geometry.index_topk}"
    return said

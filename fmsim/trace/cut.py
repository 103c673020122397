"""A part of a trace as a trace of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmsim.errors import FmsimError
from fmsim.trace.format import Trace, TraceHeader


def cut(trace: Trace, first: int, end: int, layers: Sequence[int] | None = None) -> Trace:
    """Decode steps ``first`` to ``end`` - 1, of all layers or those numbered ``layers``.

    The steps before become part of the prompt. So the prompt's history no longer reaches its end
    and is left out where ``first`` is above 0. Hidden states stand at windows' starts, so with them
    ``first`` must be a multiple of tau. Raises FmsimError for a part that is not there.
    """
    chosen = list(range(trace.n_layers)) if layers is None else list(layers)
    if not 0 <= first < end <= trace.n_steps:
        raise FmsimError(f"--steps {first}:{end}: the trace has steps 0:{trace.n_steps}")
    wrong = [layer for layer in chosen if not 0 <= layer < trace.n_layers]
    if wrong or not chosen or sorted(set(chosen)) != chosen:
        raise FmsimError(
            f"--layers {','.join(map(str, chosen))}: give rising numbers from 0 to"
            f" {trace.n_layers - 1}"
        )
    tau = trace.header.tau
    if trace.hidden is not None and first % tau:
        raise FmsimError(
            f"--steps {first}:{end}: hidden states stand every {tau} steps; begin at a multiple of"
            f" {tau}"
        )
    prompt_tokens = trace.header.prompt_tokens + first
    entries = (prompt_tokens + end - first) // trace.header.entry_tokens
    keyed = [row for row, layer in enumerate(trace.keyed) if layer in chosen]
    steps = slice(first, end)
    history = None if first else _part(trace.prompt_mass, chosen, slice(entries))
    return Trace(
        header=_header(
            trace, prompt_tokens, chosen, history is not None, end - first == trace.n_steps
        ),
        entry_ids=np.ascontiguousarray(np.asarray(trace.entry_ids[steps])[:, chosen]),
        mass=_rows(trace.mass, steps, chosen),
        window_mass=_rows(trace.window_mass, steps, chosen),
        sink_mass=_rows(trace.sink_mass, steps, chosen),
        token_ids=(
            None if trace.token_ids is None else trace.token_ids[: trace.header.prompt_tokens + end]
        ),
        forced=trace.forced[steps],
        hidden=_rows(trace.hidden, slice(first // tau, -(-end // tau)), chosen),
        index_keys=_part(trace.index_keys, keyed, slice(entries)) if keyed else None,
        index_key_scales=_part(trace.index_key_scales, keyed, slice(entries)) if keyed else None,
        prompt_mass=history,
    )


def _rows(values: Any, steps: slice, layers: list[int]) -> np.ndarray | None:
    return None if values is None else np.ascontiguousarray(np.asarray(values[steps])[:, layers])


def _part(values: Any, layers: list[int], entries: slice) -> np.ndarray | None:
    return None if values is None else np.ascontiguousarray(np.asarray(values)[layers, entries])


def _header(
    trace: Trace, prompt_tokens: int, layers: list[int], history: bool, whole: bool
) -> TraceHeader:
    header = trace.header
    geometry = header.geometry | {
        "csa_layers": [header.geometry["csa_layers"][layer] for layer in layers],
    }
    if len(layers) < trace.n_layers:
        geometry["csa_numbers"] = [trace.csa_numbers[layer] for layer in layers]
    layout = header.layout
    if layout is not None and layout.selections and len(layers) < trace.n_layers:
        kept = {layer: number for number, layer in enumerate(layers)}
        selections = tuple(kept[layer] for layer in layout.selections if layer in kept)
        layout = layout.model_copy(update={"selections": selections})
    return header.model_copy(
        update={
            "geometry": geometry,
            "layout": layout,
            "prompt_tokens": prompt_tokens,
            "prompt_mass_queries": header.prompt_mass_queries if history else 0,
            "keyed": (
                tuple(number for number, layer in enumerate(layers) if layer in trace.keyed)
                if header.keyed
                else None
            ),
            "packed_shape": None,  # the writer's matter, as the next two are
            "context_sha256": None,
            "quality": header.quality if whole else {},  # of answers that the part may lack
            "content_sha256": None,
        }
    )


def parse_range(text: str, option: str) -> tuple[int, int | None]:
    """ "64:128" -> (64, 128); an empty end is None."""
    begin, colon, end = text.partition(":")
    try:
        found = int(begin or 0), int(end) if end else None
    except ValueError:
        found = (-1, None)
    if not colon or found[0] < 0:
        raise FmsimError(f"{option} {text}: write first:end, such as 0:256 or 64:")
    return found


def parse_numbers(text: str, option: str) -> list[int]:
    """ "0,2,5-7" -> [0, 2, 5, 6, 7]."""
    found: list[int] = []
    try:
        for part in text.split(","):
            low, dash, high = part.partition("-")
            found += range(int(low), int(high if dash else low) + 1)
    except ValueError:
        raise FmsimError(f"{option} {text}: write numbers, such as 0,2,5-7") from None
    return found

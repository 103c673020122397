"""What a trace holds, as a dict for people and machines."""

from __future__ import annotations

from typing import Any

import numpy as np

from fmsim.trace.format import Trace

HEAD_SHARE = 0.95
NO_MASS = "not captured, so there is no figure that needs them"
# a key of the header's `quality`: the share of selected entries that lru misses with room for twice
# top-k in each layer, the mean over layers, from step 64 on
LRU_MISSES = "lru_misses"
LABELLED = "golden labels, not attention; mass is the share of CSA layers that chose an entry"


def summary(trace: Trace) -> dict[str, Any]:
    """``about``: the header in words; ``layers``: of each layer the shares of mass and of entries
    described in ``layer_row``.
    """
    header = trace.header
    answers = [f"{key} {value}" for key, value in header.quality.items() if key != LRU_MISSES]
    misses = header.quality.get(LRU_MISSES)
    about = {
        "model": f"{header.model.name} ({header.model.dtype}), {header.source}",
        "prompt": f"{header.prompt_kind}, {header.prompt_tokens:,} tokens, seed {header.seed}",
        "text": header.prompt_text or "not said",
        "decode": f"{trace.n_steps} steps, {int((~trace.forced).sum())} of them generated",
        "selected": (
            LABELLED
            if trace.holds_labels
            else (
                f"{trace.topk} of {trace.total_entries:,} entries a step and layer,"
                f" {trace.n_layers} layers"
            )
        ),
        "answers": ", ".join(answers) or "none asked",
        "lru misses": (
            "not measured"
            if misses is None
            else f"{misses:.1%} of the selected, with room for 2 x top-k"
        ),
        "masses": "on every selected entry" if trace.has_mass else NO_MASS,
        "entries": f"of {header.entry_tokens} token{'s' * (header.entry_tokens > 1)}",
        "for lookahead": (
            "hidden states and index keys" + _of_some_layers(trace)
            if trace.hidden is not None and trace.index_keys is not None
            else "nothing"
        ),
        "recorded": f"{header.created} on {header.device}",
    }
    rows = [layer_row(trace, layer) for layer in range(trace.n_layers)]
    return {
        "about": about,
        "bytes": trace.path.stat().st_size if trace.path else 0,
        "header": header.model_dump(),
        "layers": rows,
    }


def _of_some_layers(trace: Trace) -> str:
    """Which layers have index keys, where not all have."""
    if len(trace.keyed) == trace.n_layers:
        return ""
    return f", keys of layers {', '.join(map(str, trace.keyed))} alone"


def layer_row(trace: Trace, layer: int) -> dict[str, float]:
    """Mean mass on entries, window and sink; then, as shares of the prompt's entries and means over
    windows of tau steps, the union of what was selected, and the fewest entries that carry 95% of
    the window's mass. Without masses the union alone.
    """
    prompt_entries = max(1, trace.prompt_entries)
    unions, heads = [], []
    for start in range(0, trace.n_steps, trace.header.tau):
        steps = slice(start, start + trace.header.tau)
        ids = trace.entry_ids[steps, layer]
        unions.append(np.unique(ids[ids >= 0]).size)
        if trace.mass is not None and (ids >= 0).any():
            total = np.bincount(ids[ids >= 0], weights=trace.mass[steps, layer][ids >= 0])
            ranked = np.sort(total)[::-1].cumsum()
            heads.append(np.searchsorted(ranked, HEAD_SHARE * ranked[-1]) + 1)
    union = {"union_of_a_window": float(np.mean(unions)) / prompt_entries}
    if trace.mass is None or trace.window_mass is None or trace.sink_mass is None:
        return union
    return {
        "mass_on_entries": float(trace.mass[:, layer].sum(-1).mean()),
        "mass_on_window": float(trace.window_mass[:, layer].mean()),
        "mass_on_sink": float(trace.sink_mass[:, layer].mean()),
        **union,
        "carrying_95%": float(np.mean(heads or [0])) / prompt_entries,
    }

"""Is a trace sound?

`check_structure` looks at shapes and types only; `validate` reads every value.
"""

from __future__ import annotations

from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from fmsim.errors import FmsimError
from fmsim.trace import float8
from fmsim.trace.format import MASSES, TENSORS, Trace

STEPS_AT_ONCE = 64
Kind = TypeVar("Kind")
# Stored masses are float16, and a bfloat16 model's softmax rows do not sum to 1 exactly.
MASS_TOLERANCE = 0.02
RECORD_AGAIN = (
    "the file is damaged or was written by a faulty recorder; record it again (fmsim trace record)"
)


def fail(trace: Trace, field: str, what: str) -> NoReturn:
    """Raise the one error that names file, field and fix."""
    raise FmsimError(f"{trace.path or 'trace'}: {field}: {what}; {RECORD_AGAIN}")


def check_structure(trace: Trace) -> None:
    """Raise FmsimError where a tensor's shape contradicts the header or another tensor."""
    if len(trace.entry_ids.shape) != 3 or 0 in trace.entry_ids.shape:
        fail(
            trace,
            "entry_ids",
            f"has shape {list(trace.entry_ids.shape)}, not [steps, layers, top-k] of one or more"
            " each",
        )
    if (trace.index_keys is None) != (trace.index_key_scales is None):
        fail(trace, "index_keys", "must come with index_key_scales, and the reverse")
    there = [name for name in MASSES if getattr(trace, name) is not None]
    if there and len(there) < len(MASSES):
        fail(trace, there[0], f"must come with {' and '.join(MASSES)}, or all be absent")
    if not there and trace.header.format_version == 1:
        fail(trace, "mass", "is missing; a trace of version 1 has masses")
    sizes = axis_sizes(trace)
    for name, spec in TENSORS.items():
        array = getattr(trace, name, None)  # FILE_ONLY ones are the reader's matter
        if array is None:
            continue
        wanted = [sizes[axis] for axis in spec.axes]
        if list(array.shape) != wanted:
            axes = ", ".join(AXES[axis] for axis in spec.axes)
            fail(
                trace,
                name,
                f"has shape {list(array.shape)}; the header and the other tensors say {wanted}"
                f" ({axes})",
            )


AXES = {
    "T": "steps",
    "L": "layers",
    "K": "top-k",
    "N": "prompt_tokens + steps",
    "W": "windows",
    "H": "geometry.hidden_size",
    "E": "entries",
    "Q": "layers with index keys",
    "D": "geometry.index_head_dim",
    "S": "entries or 1",
}


def axis_sizes(trace: Trace) -> dict[str, int]:
    """The length of each axis, from the header and entry_ids; geometry is looked into only where a
    tensor needs it.
    """
    steps, layers, topk = trace.entry_ids.shape
    csa_layers = _geometry(trace, "csa_layers", list)
    if len(csa_layers) != layers:
        fail(
            trace,
            "geometry.csa_layers",
            f"lists {len(csa_layers)} layers, entry_ids holds {layers}",
        )
    named = "geometry.index_topk" if trace.header.topk is None else "topk"
    most = trace.header.topk or _geometry(trace, "index_topk", int)
    if most < topk and not trace.holds_labels:
        fail(trace, named, f"is {most}, yet entry_ids holds {topk} ids a row")
    if trace.header.layout is not None and trace.header.layout.selections:
        _check_selections(trace, trace.header.layout.selections, layers)
    if (
        "csa_numbers" in trace.header.geometry
        and len(_geometry(trace, "csa_numbers", list)) != layers
    ):
        fail(
            trace,
            "geometry.csa_numbers",
            f"numbers {len(trace.csa_numbers)} layers, entry_ids holds {layers}",
        )
    if trace.holds_labels and _geometry(trace, "label_layers", int) < 1:
        fail(trace, "geometry.label_layers", "is below 1")
    sizes = {"T": steps, "L": layers, "K": topk, "E": trace.total_entries, "W": trace.n_windows}
    sizes["N"] = trace.header.prompt_tokens + steps
    sizes["H"] = 0 if trace.hidden is None else _geometry(trace, "hidden_size", int)
    sizes["D"] = 0 if trace.index_keys is None else _geometry(trace, "index_head_dim", int)
    sizes["Q"] = len(trace.keyed)
    if trace.keyed != sorted(set(trace.keyed) & set(range(layers))):
        fail(trace, "keyed", f"is {trace.keyed}, not ascending numbers from 0 to {layers - 1}")
    one_scale = trace.index_key_scales is not None and trace.index_key_scales.shape[-1:] == (1,)
    sizes["S"] = 1 if one_scale else sizes["E"]
    return sizes


def _check_selections(trace: Trace, named: tuple[int, ...], layers: int) -> None:
    """Every layer of the trace is some model layer's selection, and each named one is there."""
    if set(named) != set(range(layers)):
        fail(
            trace,
            "layout.selections",
            f"names layers {sorted(set(named))}, entry_ids holds {layers}",
        )


def _geometry(trace: Trace, key: str, kind: type[Kind]) -> Kind:
    value = trace.header.geometry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        fail(
            trace,
            f"geometry.{key}",
            "is missing" if value is None else f"is {value!r}, not of type {kind.__name__}",
        )
    return value


def validate(trace: Trace) -> None:
    """Read every value; raise FmsimError at the first that cannot be. Reads 64 steps at a time."""
    check_structure(trace)
    for first in range(0, trace.n_steps, STEPS_AT_ONCE):
        _check_steps(trace, first)
    if trace.token_ids is not None and np.min(trace.token_ids) < 0:
        fail(trace, "token_ids", f"token {int(np.argmin(trace.token_ids))} is negative")
    forced = np.asarray(trace.forced)
    if forced.dtype == bool and forced.view(np.uint8).max() > 1:
        fail(trace, "forced", "holds a byte that is neither 0 nor 1")
    if trace.hidden is not None and not np.isfinite(trace.hidden).all():
        fail(trace, "hidden", "holds a value that is not finite")
    if trace.index_keys is not None:
        _check_keys(trace)
    if trace.prompt_mass is not None:
        prompt_mass = np.asarray(trace.prompt_mass)
        if not (
            (prompt_mass >= 0)
            & (prompt_mass <= trace.header.prompt_mass_queries * (1 + MASS_TOLERANCE))
        ).all():
            fail(
                trace,
                "prompt_mass",
                f"is not between 0 and prompt_mass_queries = {trace.header.prompt_mass_queries}"
                " everywhere",
            )


def _check_steps(trace: Trace, first: int) -> None:
    steps = slice(first, first + STEPS_AT_ONCE)
    ids = np.asarray(trace.entry_ids[steps])
    seen_tokens = trace.header.prompt_tokens + np.arange(first, first + len(ids)) + 1
    visible = seen_tokens // trace.header.entry_tokens
    _at(trace, "entry_ids", (ids < -1).any(-1), first, "an entry id is negative")
    _at(
        trace,
        "entry_ids",
        (ids >= visible[:, None, None]).any(-1),
        first,
        "an entry id is not yet visible, or out of range",
    )
    padding = ids < 0
    rising = (ids[..., 1:] > ids[..., :-1]) | padding[..., 1:]
    _at(
        trace,
        "entry_ids",
        ~rising.all(-1),
        first,
        "ids are not in ascending order, or one stands twice",
    )
    _at(
        trace,
        "entry_ids",
        (padding[..., :-1] & ~padding[..., 1:]).any(-1),
        first,
        "padding stands before an entry id",
    )
    if trace.mass is not None:
        _check_masses(trace, np.asarray(trace.mass[steps]), first, padding)


def _check_masses(
    trace: Trace, mass: NDArray[np.float32], first: int, padding: NDArray[np.bool]
) -> None:
    """Masses [n, L, K] of the steps from ``first`` on; padding bool of the same shape."""
    steps = slice(first, first + STEPS_AT_ONCE)
    _at(trace, "mass", ~((mass >= 0) & (mass <= 1)).all(-1), first, "a mass is not between 0 and 1")
    _at(trace, "mass", ((mass != 0) & padding).any(-1), first, "padding has mass")
    total = mass.sum(-1)
    for name in ("window_mass", "sink_mass"):
        part = np.asarray(getattr(trace, name)[steps], dtype=np.float32)
        _at(trace, name, ~((part >= 0) & (part <= 1)), first, "a mass is not between 0 and 1")
        total = total + part
    least = 1 - MASS_TOLERANCE if trace.header.source == "deepseek_v4" else 0
    wrong = (total > 1 + MASS_TOLERANCE) | (total < least)
    if wrong.any() and not trace.holds_labels:
        step, layer = np.argwhere(wrong)[0]
        what = f"with window_mass and sink_mass it sums to {total[step, layer]:.3f}, not 1"
        _at(trace, "mass", wrong, first, what)


def _at(trace: Trace, field: str, wrong: NDArray[np.bool] | np.bool, first: int, what: str) -> None:
    """Fail at the first (step, layer) that is wrong; wrong bool [n, L]."""
    if wrong.any():
        step, layer = np.argwhere(wrong)[0]
        fail(trace, field, f"at step {first + step}, layer {layer}: {what}")


def _check_keys(trace: Trace) -> None:
    assert trace.index_keys is not None
    scales = np.asarray(trace.index_key_scales)
    if not (np.isfinite(scales) & (scales > 0)).all():
        fail(trace, "index_key_scales", "holds a scale that is not a positive number")
    for layer, codes in enumerate(trace.index_keys):
        if np.isin(codes, float8.NAN_CODES).any():
            fail(trace, "index_keys", f"layer {layer} holds a NaN code")

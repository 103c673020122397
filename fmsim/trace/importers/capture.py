"""What an engine captured of its indexer's selections, checked and made into a trace.

An engine's capture has ids and nothing else: which entries each query selected. So the trace has no
masses. Rows of the prompt's last queries become its history: how often each entry was selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import numpy as np

from fmsim.errors import FmsimError
from fmsim.geometry import Geometry
from fmsim.trace.format import CacheLayout, ModelInfo, Trace, TraceHeader
from fmsim.trace.recorder import TraceRecorder

PROMPT_QUERIES = 1024  # of the prompt's end that make its history
ROWS_AT_ONCE = 64
LEAST, MOST = -(2**31), 2**31 - 1  # of a trace's ids
SLOTS = (
    "these are places in the engine's KV pool, not positions of the text; SGLang gives positions"
    " of a DSA model with SGLANG_DSA_FUSE_TOPK=0"
)


@dataclass(frozen=True)
class Watched:
    """The model that was watched, as far as a capture's reader must know it."""

    name: str
    family: str
    entry_tokens: int
    topk: int
    layers: tuple[int, ...]  # the model's numbers of the layers that page
    selections: tuple[int, ...]  # of each of these, the number of the selection that it uses
    entry_bytes: int | None = None
    key_bytes: int | None = None

    @property
    def n_selections(self) -> int:
        return len(set(self.selections))


def watched(geometry: Geometry) -> Watched:
    """The model of a preset or a config; FmsimError for one that no trace can describe."""
    geometry.check_replayable()
    return Watched(
        name=geometry.name,
        family=geometry.family,
        entry_tokens=int(geometry.csa_rate),
        topk=geometry.index_topk,
        layers=tuple(n for n, layer in enumerate(geometry.layers) if layer.pages),
        selections=geometry.selection_map(),
        entry_bytes=geometry.kv_entry_bytes,
        key_bytes=geometry.index_key_bytes,
    )


def described(topk: int, layers: int, entry_tokens: int, name: str = "unnamed") -> Watched:
    """A model that fmsim does not know, each of whose captured layers selects by itself."""
    numbers = tuple(range(layers))
    return Watched(name, "unknown", entry_tokens, topk, numbers, numbers)


@dataclass(frozen=True)
class Capture:
    """Selections of one request. Row i is the query at position ``first`` + i."""

    path: Path
    rows: np.ndarray  # integers [n, L, K], in any order; a negative id is no entry
    first: int
    prompt_tokens: int
    source: str  # of the trace's header
    where: str = ""  # in the file, for messages

    def fail(self, what: str) -> NoReturn:
        """Raise the one error that names file and place."""
        raise FmsimError(f"{self.path}{self.where and f' ({self.where})'}: {what}")


def to_trace(capture: Capture, model: Watched) -> Trace:
    """The capture's decode steps as a trace; FmsimError where the rows cannot be what they claim.

    Layers that another selects for stand there once; `layout.selections` says which is whose.
    """
    rows = _checked(capture, model)
    start = capture.prompt_tokens - capture.first
    if not 0 <= start < len(rows):
        capture.fail(
            f"rows of positions {capture.first} to {capture.first + len(rows) - 1}, so none of a"
            f" decode step after a prompt of {capture.prompt_tokens} tokens; give --prompt-tokens"
        )
    decode = rows[start:]
    positions = capture.first + np.arange(len(rows))
    _check_rows(capture, model, decode, positions[start:])
    groups = _groups(capture, model, decode)
    kept = [groups.index(group) for group in range(max(groups) + 1)]
    queries = slice(max(0, start - PROMPT_QUERIES), start)
    history, asked = rows[queries], positions[queries]
    missing = _zeros(history) | _nothing(history, _visible(model, asked))
    captured = ~missing.any(-1)
    history = history[captured]
    _check_rows(capture, model, history, asked[captured])
    recorder = TraceRecorder(
        _header(capture, model, groups, kept, len(history)), len(decode), len(kept), rows.shape[2]
    )
    for number, layer in enumerate(kept):
        recorder.step(0, number, decode[:, layer])
        if len(history):
            ids = history[:, layer]
            recorder.prompt_mass(number, np.bincount(ids[ids >= 0]).astype(np.float32))
    return recorder.finish()


def _checked(capture: Capture, model: Watched) -> np.ndarray:
    """The rows as int32 [n, L, K]: of the model's shape, and no id is changed by its type."""
    rows = np.asarray(capture.rows)
    if rows.ndim != 3 or 0 in rows.shape or rows.dtype.kind not in "iu":
        capture.fail(
            f"holds {rows.dtype} of shape {list(rows.shape)}, not integers [steps, layers, top-k]"
        )
    if rows.shape[1] not in (len(model.layers), model.n_selections):
        capture.fail(
            f"has {rows.shape[1]} layers, {model.name} has {len(model.layers)} that page"
            f" ({model.n_selections} selections); give the --model that was captured, or --layers"
        )
    if rows.shape[2] > model.topk:
        capture.fail(f"has {rows.shape[2]} ids a row, {model.name} selects {model.topk}")
    if rows.min() < LEAST or rows.max() > MOST:
        row, layer, place = np.argwhere((rows < LEAST) | (rows > MOST))[0]
        capture.fail(
            f"position {capture.first + row}, layer {layer} (row {row}) has the id"
            f" {rows[row, layer, place]}, which is beyond 32 bits, so no entry's; capture again,"
            " or write ids as int32"
        )
    return np.asarray(rows, np.int32)


def _visible(model: Watched, positions: np.ndarray) -> np.ndarray:
    """[n]: how many entries a query at each of ``positions`` [n] selects among."""
    return (positions + 1) // model.entry_tokens


def _zeros(rows: np.ndarray) -> np.ndarray:
    """bool [n, L]: rows that the engine left as zeros."""
    if rows.shape[2] == 1:
        return np.zeros(rows.shape[:2], bool)
    return np.asarray((rows == 0).all(-1))


def _nothing(rows: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """bool [n, L]: rows without an id, where entries are ``visible`` [n]."""
    return np.asarray((rows < 0).all(-1)) & (visible > 0)[:, None]


def _check_rows(capture: Capture, model: Watched, rows: np.ndarray, positions: np.ndarray) -> None:
    """Rows [n, L, K] of the queries at ``positions`` [n] are captured, visible and distinct."""
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[begin : begin + ROWS_AT_ONCE]
        at = positions[begin : begin + ROWS_AT_ONCE]
        visible = _visible(model, at)
        for missing, what in (
            (_zeros(part), "is all zeros"),
            (_nothing(part, visible), "selects nothing"),
        ):
            if missing.any():
                row, layer = np.argwhere(missing)[0]
                capture.fail(
                    f"position {at[row]}, layer {layer} was not captured: its row {what};"
                    " capture again, or cut the rows"
                )
        unseen = part >= visible[:, None, None]
        if unseen.any():
            row, layer, place = np.argwhere(unseen)[0]
            capture.fail(
                f"position {at[row]}, layer {layer} selects entry {part[row, layer, place]}, but"
                f" {visible[row]} entries are visible there; {SLOTS}; or --model or"
                " --prompt-tokens is wrong"
            )
        ranked = np.sort(part, axis=-1)
        twice = ((ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)).any(-1)
        if twice.any():
            row, layer = np.argwhere(twice)[0]
            capture.fail(f"position {at[row]}, layer {layer} selects an entry twice")


def _groups(capture: Capture, model: Watched, decode: np.ndarray) -> list[int]:
    """For each captured layer the number of its selection: layers that selected the same at every
    step share one.

    Rows that hold all visible entries are alike anyway and say nothing. Where there is no other
    row, the model's own sharing stands.
    """
    n_layers = decode.shape[1]
    if n_layers != len(model.layers):
        return list(range(n_layers))
    visible = _visible(model, capture.prompt_tokens + np.arange(len(decode)))
    telling = visible > decode.shape[2]
    if not telling.any():
        return list(model.selections)
    ranked = np.sort(decode[telling], axis=-1)
    groups = [0]
    for layer in range(1, n_layers):
        same = bool((ranked[:, layer] == ranked[:, layer - 1]).all())
        groups.append(groups[-1] + (not same))
    return groups


def _header(
    capture: Capture, model: Watched, groups: Sequence[int], kept: list[int], queries: int
) -> TraceHeader:
    mirrored = len(groups) == len(model.layers)
    selections = tuple(groups) if mirrored else model.selections
    first_of = [selections.index(number) for number in range(len(kept))]
    return TraceHeader(
        geometry={
            "model_type": model.family,
            "csa_layers": [model.layers[place] for place in first_of],
            "index_topk": model.topk,
        },
        entry_tokens=model.entry_tokens,
        topk=model.topk,
        layout=CacheLayout(
            family=model.family,
            entry_bytes=model.entry_bytes,
            key_bytes=model.key_bytes,
            selections=selections,
        ),
        model=ModelInfo(name=model.name, dtype="not said"),
        source=capture.source,
        prompt_kind="capture",
        prompt_text=f"{capture.path.name}{capture.where and f' ({capture.where})'}",
        prompt_tokens=capture.prompt_tokens,
        prompt_mass_queries=queries,
        prompt_history="count",
        seed=0,
        device="not said",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )

"""Collect a decode into a `Trace`: numpy in, numpy out, whatever model is watched.

import numpy as np
from fmsim import trace

header = trace.TraceHeader(
    geometry={"model_type": "mine", "csa_layers": [0, 1], "index_topk": 64},
    model=trace.ModelInfo(name="mine", dtype="bfloat16"),
    source="my_engine", prompt_kind="text", prompt_tokens=1000, entry_tokens=1,
    seed=0, device="cpu", created="2026-11-28T12:00:00+00:00",
)
recorder = trace.TraceRecorder(header, steps=10, layers=2, topk=64)
for step in range(10):
    for layer in range(2):
        recorder.step(step, layer, ids=np.arange(64) * 15)
trace.write("mine.safetensors", recorder.finish())
"""

from __future__ import annotations

import numpy as np

from fmsim.errors import FmsimError
from fmsim.trace import float8
from fmsim.trace.check import validate
from fmsim.trace.format import PACKED_VERSION, Trace, TraceHeader


def sort_rows(ids: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [..., K] in a trace's order: ascending ids, padding (any negative id) last as -1 with
    mass 0.
    """
    ids = np.asarray(ids, np.int64)
    ids = np.where(ids < 0, np.iinfo(np.int64).max, ids)
    order = np.argsort(ids, axis=-1, kind="stable")
    ids, mass = (
        np.take_along_axis(ids, order, -1),
        np.take_along_axis(np.asarray(mass, np.float32), order, -1),
    )
    padding = ids == np.iinfo(np.int64).max
    return np.where(padding, -1, ids).astype(np.int32), np.where(padding, 0, mass).astype(
        np.float32
    )


class TraceRecorder:
    """Fills a trace piece by piece, in any order; `finish` checks that the result is sound.

    Shapes as in `fmsim.trace.Trace`. ``steps`` T, ``layers`` L and ``topk`` K are known beforehand;
    a row may be given with fewer ids than K. Rows need not be sorted.

    The header must say: `geometry` with `csa_layers` (the model's numbers of the recorded layers)
    and `index_topk`; `model`; `source`; `prompt_kind`; `prompt_tokens`; `entry_tokens` (4 unless
    given); `seed`; `device`; `created`. Hidden states need `geometry.hidden_size`, index keys
    `geometry.index_head_dim`, prompt masses `prompt_mass_queries`.
    """

    def __init__(self, header: TraceHeader, steps: int, layers: int, topk: int):
        self.header, self.steps = header, steps
        self._seen = np.zeros((steps, layers), dtype=bool)
        self._ids = np.full((steps, layers, topk), -1, np.int32)
        self._mass = np.zeros((steps, layers, topk), np.float32)
        self._window_mass = np.zeros((steps, layers), np.float32)
        self._sink_mass = np.zeros((steps, layers), np.float32)
        self._with_mass: bool | None = None  # whether the steps so far came with masses
        self._windows = -(-steps // header.tau)
        self._hidden: dict[tuple[int, int], np.ndarray] = {}
        self._keys: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._prompt_mass: dict[int, np.ndarray] = {}

    def step(
        self,
        first: int,
        layer: int,
        ids: np.ndarray,
        mass: np.ndarray | None = None,
        window_mass: np.ndarray | float = 0.0,
        sink_mass: np.ndarray | float = 0.0,
    ) -> None:
        """One decode step (ids and mass [k]) or n steps from ``first`` on (ids and mass [n, k], the
        others [n]); k <= K. Without ``mass`` the trace says what was selected and no more.
        """
        if self._with_mass not in (None, mass is not None):
            raise FmsimError("trace recorder: give masses at every step, or at none")
        self._with_mass = mass is not None
        ids = np.atleast_2d(ids)
        weights = np.zeros(ids.shape, np.float32) if mass is None else np.atleast_2d(mass)
        ids, weights = sort_rows(ids, weights)
        rows, width = slice(first, first + len(ids)), ids.shape[1]
        self._ids[rows, layer, :width] = ids
        self._mass[rows, layer, :width] = weights
        self._window_mass[rows, layer] = window_mass
        self._sink_mass[rows, layer] = sink_mass
        self._seen[rows, layer] = True

    def hidden(self, window: int, layer: int, state: np.ndarray) -> None:
        """The layer's attention input [H] at the last token before ``window``: position
        prompt_tokens + tau * window - 1.
        """
        self._hidden[window, layer] = np.asarray(state, np.float16)

    def index_keys(self, layer: int, keys: np.ndarray) -> None:
        """Index keys float [E, D] of all entries closed by the end of the trace, RoPE applied; kept
        as float8 with one scale. They are given for all layers; in a trace of version 3, for some.
        """
        self._keys[layer] = float8.quantise(np.asarray(keys, np.float32))

    def prompt_mass(self, layer: int, mass: np.ndarray) -> None:
        """Add to the mass [e] that the prompt's queries put on the first e entries, or to how often
        they selected each (`header.prompt_history`); header.prompt_mass_queries queries in all.
        """
        entries = (self.header.prompt_tokens + len(self._seen)) // self.header.entry_tokens
        total = self._prompt_mass.setdefault(layer, np.zeros(entries, np.float32))
        total[: len(mass)] += mass

    def finish(
        self, token_ids: np.ndarray | None = None, forced: np.ndarray | None = None
    ) -> Trace:
        """The trace; FmsimError if a step, or part of an optional tensor, was not given, or a value
        cannot be. ``token_ids`` [prompt_tokens + T]; ``forced`` bool [T], all generated by default.
        """
        if not self._seen.all():
            step, layer = np.argwhere(~self._seen)[0]
            raise FmsimError(
                f"trace recorder: step {step}, layer {layer} was not recorded; call step() for"
                " every step and layer"
            )
        layers = range(self._seen.shape[1])
        hidden = [
            [self._hidden.get((window, layer)) for layer in layers]
            for window in range(self._windows)
        ]
        keys = [self._keys.get(layer) for layer in layers]
        header = self.header
        if header.format_version >= PACKED_VERSION and self._keys:
            keys = [self._keys[layer] for layer in sorted(self._keys)]
            header = header.model_copy(update={"keyed": tuple(sorted(self._keys))})
        if header.topk is None and header.format_version > 1:
            header = header.model_copy(update={"topk": self._ids.shape[2]})
        trace = Trace(
            header=header,
            entry_ids=self._ids,
            mass=self._mass if self._with_mass else None,
            window_mass=self._window_mass if self._with_mass else None,
            sink_mass=self._sink_mass if self._with_mass else None,
            token_ids=None if token_ids is None else np.asarray(token_ids, np.int32),
            forced=np.zeros(self.steps, bool) if forced is None else np.asarray(forced, bool),
            hidden=_all_or_none("hidden", sum(hidden, []), (self._windows, len(layers))),
            index_keys=_all_or_none(
                "index_keys", [pair and pair[0] for pair in keys], (len(keys),)
            ),
            index_key_scales=_all_or_none(
                "index_keys", [pair and pair[1] for pair in keys], (len(keys),)
            ),
            prompt_mass=_all_or_none(
                "prompt_mass", [self._prompt_mass.get(layer) for layer in layers], (len(layers),)
            ),
        )
        validate(trace)
        return trace


def _all_or_none(
    name: str, parts: list[np.ndarray | None], lead: tuple[int, ...]
) -> np.ndarray | None:
    """Parts stacked to [*lead, ...], None where no part was given; FmsimError where some are
    missing.
    """
    given = [part for part in parts if part is not None]
    missing = len(parts) - len(given)
    if not given:
        return None
    if missing:
        raise FmsimError(
            f"trace recorder: {missing} of {len(parts)} {name} were not given; give all or none"
        )
    stacked = np.stack(given)
    return stacked.reshape(*lead, *stacked.shape[1:])

"""Collect a decode into a `Trace`: numpy in, numpy out, whatever model is watched."""

from __future__ import annotations

import numpy as np

from fmsim.errors import FmsimError
from fmsim.trace import float8
from fmsim.trace.check import validate
from fmsim.trace.format import ENTRY_TOKENS, Trace, TraceHeader


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
    """

    def __init__(self, header: TraceHeader, steps: int, layers: int, topk: int):
        self.header, self.steps = header, steps
        self._seen = np.zeros((steps, layers), dtype=bool)
        self._ids = np.full((steps, layers, topk), -1, np.int32)
        self._mass = np.zeros((steps, layers, topk), np.float32)
        self._window_mass = np.zeros((steps, layers), np.float32)
        self._sink_mass = np.zeros((steps, layers), np.float32)
        self._windows = -(-steps // header.tau)
        self._hidden: dict[tuple[int, int], np.ndarray] = {}
        self._keys: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._prompt_mass: dict[int, np.ndarray] = {}

    def step(
        self,
        first: int,
        layer: int,
        ids: np.ndarray,
        mass: np.ndarray,
        window_mass: np.ndarray | float,
        sink_mass: np.ndarray | float,
    ) -> None:
        """One decode step (ids and mass [k]) or n steps from ``first`` on (ids and mass [n, k], the
        others [n]); k <= K.
        """
        ids, mass = sort_rows(np.atleast_2d(ids), np.atleast_2d(mass))
        rows, width = slice(first, first + len(ids)), ids.shape[1]
        self._ids[rows, layer, :width], self._mass[rows, layer, :width] = ids, mass
        self._window_mass[rows, layer], self._sink_mass[rows, layer] = window_mass, sink_mass
        self._seen[rows, layer] = True

    def hidden(self, window: int, layer: int, state: np.ndarray) -> None:
        """The layer's attention input [H] at the last token before ``window``: position
        prompt_tokens + tau * window - 1.
        """
        self._hidden[window, layer] = np.asarray(state, np.float16)

    def index_keys(self, layer: int, keys: np.ndarray) -> None:
        """Index keys float [E, D] of all entries closed by the end of the trace, RoPE applied; kept
        as float8 with one scale.
        """
        self._keys[layer] = float8.quantise(np.asarray(keys, np.float32))

    def prompt_mass(self, layer: int, mass: np.ndarray) -> None:
        """Add to the mass [e] that the prompt's queries put on the first e entries;
        header.prompt_mass_queries queries in all.
        """
        total = self._prompt_mass.setdefault(
            layer,
            np.zeros((self.header.prompt_tokens + len(self._seen)) // ENTRY_TOKENS, np.float32),
        )
        total[: len(mass)] += mass

    def finish(self, token_ids: np.ndarray, forced: np.ndarray) -> Trace:
        """The trace; FmsimError if a step, or part of an optional tensor, was not given, or a value
        cannot be.
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
        trace = Trace(
            header=self.header,
            entry_ids=self._ids,
            mass=self._mass,
            window_mass=self._window_mass,
            sink_mass=self._sink_mass,
            token_ids=np.asarray(token_ids, np.int32),
            forced=np.asarray(forced, bool),
            hidden=_all_or_none("hidden", sum(hidden, []), (self._windows, len(layers))),
            index_keys=_all_or_none(
                "index_keys", [pair and pair[0] for pair in keys], (len(layers),)
            ),
            index_key_scales=_all_or_none(
                "index_keys", [pair and pair[1] for pair in keys], (len(layers),)
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

"""A small made-up trace, and the same with something in it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fmsim.trace import ModelInfo, Trace, TraceHeader


def sample_trace(
    prompt_tokens: int = 1600,
    n_steps: int = 70,
    n_layers: int = 2,
    topk: int = 16,
    hidden: int = 8,
    seed: int = 0,
) -> Trace:
    """A small made-up trace for tests: entries that come back now and then, and a heavy few.

    No model attended to anything here.
    """
    rng = np.random.default_rng(seed)
    ids = np.empty((n_steps, n_layers, topk), dtype=np.int32)
    for layer in range(n_layers):
        chosen = rng.choice(prompt_tokens // 4, topk, replace=False)
        for step in range(n_steps):
            others = np.setdiff1d(np.arange((prompt_tokens + step + 1) // 4), chosen)
            chosen = np.concatenate(
                [rng.permutation(chosen)[: topk - topk // 4], rng.permutation(others)[: topk // 4]]
            )
            ids[step, layer] = np.sort(chosen)
    mass = rng.exponential(size=ids.shape) ** 3
    mass = (mass / mass.sum(-1, keepdims=True) / 2).astype(np.float16).astype(np.float32)
    n_entries = (prompt_tokens + n_steps) // 4
    return Trace(
        header=TraceHeader(
            geometry={
                "index_topk": topk,
                "csa_layers": list(range(n_layers)),
                "hidden_size": hidden,
                "index_head_dim": hidden,
            },
            model=ModelInfo(name="made up by fmsim.testing.sample", dtype="float32"),
            source="deepseek_v4",
            prompt_kind="made up",
            prompt_tokens=prompt_tokens,
            seed=seed,
            device="none",
            created="2026-01-01T00:00:00",
        ),
        entry_ids=ids,
        mass=mass,
        window_mass=np.full(ids.shape[:2], 0.4, dtype=np.float32),
        sink_mass=np.full(ids.shape[:2], 0.1, dtype=np.float32),
        token_ids=np.zeros(prompt_tokens + n_steps, dtype=np.int32),
        forced=np.zeros(n_steps, dtype=bool),
        hidden=rng.standard_normal((-(-n_steps // 64), n_layers, hidden)).astype(np.float32),
        index_keys=rng.integers(0, 120, (n_layers, n_entries, hidden)).astype(np.uint8),
        index_key_scales=np.ones((n_layers, 1), dtype=np.float32),
        prompt_mass=rng.uniform(size=(n_layers, n_entries)).astype(np.float32),
    )


def shortened(trace: Trace, n_steps: int) -> Trace:
    """The first `n_steps` of a trace, in memory."""
    windows = -(-min(n_steps, trace.n_steps) // trace.header.tau)
    return replace(
        trace,
        entry_ids=np.asarray(trace.entry_ids[:n_steps]),
        mass=None if trace.mass is None else np.asarray(trace.mass[:n_steps]),
        window_mass=None if trace.window_mass is None else np.asarray(trace.window_mass[:n_steps]),
        sink_mass=None if trace.sink_mass is None else np.asarray(trace.sink_mass[:n_steps]),
        forced=trace.forced[:n_steps],
        hidden=None if trace.hidden is None else np.asarray(trace.hidden[:windows]),
    )


def with_other_mass(trace: Trace) -> Trace:
    """The same entries selected, with other attention mass on them and on the prompt's; a trace
    without masses as it is.
    """
    if trace.mass is None:
        return trace
    rng = np.random.default_rng(1)
    ids = np.asarray(trace.entry_ids)
    mass = np.where(ids >= 0, rng.uniform(0.1, 1, ids.shape), 0)
    mass = (mass / mass.sum(axis=2, keepdims=True) / 2).astype(np.float32)
    prompt_mass = trace.prompt_mass
    if prompt_mass is not None:
        prompt_mass = rng.uniform(size=prompt_mass.shape).astype(np.float32)
    return replace(trace, mass=mass, prompt_mass=prompt_mass)


def with_other_keys(trace: Trace, layers: Sequence[int] | None = None) -> Trace:
    """The same selections, with other hidden states and index keys; of some `layers` alone, other
    index keys.
    """
    if trace.hidden is None or trace.index_keys is None:
        return trace
    if layers is not None:
        keys = np.array(trace.index_keys)
        keys[list(layers)] ^= 0x80
        return replace(trace, index_keys=keys)
    hidden = np.roll(np.asarray(trace.hidden), 1, axis=2)
    return replace(trace, hidden=hidden, index_keys=trace.index_keys ^ 0x80)


def with_other_end(trace: Trace, step: int) -> Trace:
    """The same up to `step`; from there on, other selections, hidden states and index keys."""
    ids, mass = np.array(trace.entry_ids), None if trace.mass is None else np.array(trace.mass)
    rest = len(ids) - step
    ids[step:] = ids[:rest]
    if mass is not None:
        mass[step:] = mass[:rest]
    changed = replace(trace, entry_ids=ids, mass=mass)
    if trace.hidden is None or trace.index_keys is None:
        return changed
    hidden, keys = np.array(trace.hidden), np.array(trace.index_keys)
    hidden[-(-step // trace.header.tau) :] *= -1
    keys[:, trace.n_entries(step - 1) :] ^= 0x80
    return replace(changed, hidden=hidden, index_keys=keys)

"""Ledgers made by hand, for sums that can be worked by hand."""

import numpy as np

from fmsim.geometry import PRESETS
from fmsim.hw import load_hardware
from fmsim.replay.ledger import Ledger

FLASH, H100 = PRESETS["v4-flash"], load_hardware("h100")


def ledger(
    n_steps=128,
    n_layers=3,
    n_groups=1,
    prompt_entries=8000,
    slots=800,
    granularity=1,
    on_miss="mask",
    **changes,
):
    """A hand-made ledger; `changes` are its fields."""
    steps_groups, steps_layers = (
        np.zeros((n_steps, n_groups), np.int32),
        np.zeros((n_steps, n_layers), np.int32),
    )
    given = {
        "policy": "hand-made",
        "params": {},
        "granularity": granularity,
        "scope": "shared" if n_groups == 1 else "per_layer",
        "on_miss": on_miss,
        "cadence": 64,
        "tau": 64,
        "n_steps": n_steps,
        "n_layers": n_layers,
        "n_groups": n_groups,
        "n_slots": slots,
        "group_slots": [slots] * n_groups,
        "prompt_entries": prompt_entries,
        "topk": 512,
        "accessed": steps_layers + 512,
        "hit": steps_layers + 400,
        "golden": steps_layers + 10,
        "golden_hit": steps_layers + 8,
        "mass_total": np.full((n_steps, n_layers), 0.5, np.float32),
        "mass_kept": np.full((n_steps, n_layers), 0.4, np.float32),
        "heaviest_lost": np.full((n_steps, n_layers), 0.1, np.float32),
        "resident": steps_groups + slots,
        "initial": np.full(n_groups, slots, np.int32),
        "demand_loads": steps_groups,
        "lookahead_loads": steps_groups,
        "written": steps_groups,
        "evicted": steps_groups,
        "set_overlap": np.array([0.5], np.float32),
        "scored": np.zeros(n_steps, np.int64),
    }
    given |= changes
    decisions = np.flatnonzero(given["scored"])
    layers = -(-given["scored"][decisions[0]] // prompt_entries) if len(decisions) else 0
    declared = {
        "decides_ahead": given["params"].get("stale", True),
        "target_layers": list(range(layers)),
        "all_keys": on_miss != "mask",
        "comes_back": bool(given["demand_loads"].any() or given["lookahead_loads"].any()),
    }
    return Ledger(**(declared | given))


def loads(n_steps, n_groups=1, **at):
    """[T, G] loads: `at` is step -> slots, in every group."""
    counts = np.zeros((n_steps, n_groups), np.int32)
    for step, slots in at.items():
        counts[int(step.removeprefix("s"))] = slots
    return counts

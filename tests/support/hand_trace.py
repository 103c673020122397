"""Accesses written by hand, with just what the replay reads of a trace."""

from types import SimpleNamespace

import numpy as np


class HandTrace:
    """ids: nested lists [T][L][k], ragged; masses of the same shape, or 1/16 each.

    With `still`, no entry closes.
    """

    def __init__(self, ids, masses=None, prompt_entries=8, still=True, tau=64, prompt_mass=None):
        width = max(len(row) for step in ids for row in step)
        shape = (len(ids), len(ids[0]), width)
        self.entry_ids, self.mass = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for t, step in enumerate(ids):
            for layer, row in enumerate(step):
                self.entry_ids[t, layer, : len(row)] = row
                self.mass[t, layer, : len(row)] = masses[t][layer] if masses else 1 / 16
        self.header = SimpleNamespace(
            prompt_tokens=4 * prompt_entries, entry_tokens=4, tau=tau, seed=0
        )
        self.prompt_mass = None if prompt_mass is None else np.asarray(prompt_mass, np.float32)
        self.hidden = self.index_keys = None
        self.n_layers, self.keyed = shape[1], []
        self.holds_labels, self.csa_numbers = False, list(range(shape[1]))
        self.still = still

    def n_entries(self, step):
        return (self.header.prompt_tokens + (0 if self.still else step + 1)) // 4


def stream(entries, prompt_entries):
    """One layer, one access a step."""
    return HandTrace([[[int(entry)]] for entry in entries], prompt_entries=prompt_entries)

"""Decodes under a memory indexer with index keys on the GPU or tiered, for tests of both."""

import torch

from fmsim.exec.decode.engine import Batch
from fmsim.policies import registry

TARGETS, TIERED, LAYERS = (1, 3), [0, 2], 4
LENGTHS, STEPS, TAU = (212, 97), 44, 8  # 64 entries at the end of the first
ENTRY_BYTES, KEY_BYTES = 32 * 4, 16 * 4
OPTIONS = [
    {"stale": False},
    {},
    {"granularity": 4},
    {"granularity": 4, "stale": False, "recent_entries": 9},
]


class Decoded:
    """A batch after `STEPS` steps; `ids` int32 [T, L, B, K] what each attended to."""

    def __init__(self, prompts, spec, index_keys, watch=lambda batch: None, **options):
        self.batch = Batch(prompts, registry.build(spec), tau=TAU, index_keys=index_keys, **options)
        self.ids = []
        for step in range(STEPS):
            self.batch.step([step, step + 1][: len(prompts)] if step < 4 else None)
            self.ids.append(self.batch.selections.ids.cpu().clone())
            watch(self.batch)
        self.ids = torch.stack(self.ids)
        self.tokens = [request.tokens for request in self.batch.requests]
        self.ledgers = [request.ledger() for request in self.batch.requests]

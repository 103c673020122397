"""One sequence being read and continued: prefill at once or in chunks, forced tokens, greedy
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fmsim.exec.model.cache import Access
from fmsim.exec.model.deepseek_v4 import DeepseekV4
from fmsim.exec.model.kinds import CSA
from fmsim.exec.whole.prefill import grain, read_whole, reads_whole
from fmsim.trace import ENTRY_TOKENS

# Elements of one [chunk, entries] score matrix held at once: 1 GiB of float32 on a GPU, 128 MiB on
# a CPU.
SCORES_PER_CHUNK = {"cuda": 2**28, "cpu": 2**25}
WHOLE_TOKENS = 16_384  # the least that are worth reading at once
MAX_CHUNK = {"cuda": 4096, "cpu": 256}  # tokens; a CPU is faster when a chunk stays in its caches

Observer = Callable[[int, int, list[Access]], None]


class Session:
    """A model, its cache of one sequence, and the logits of the last token read.

    ``observer(start, tokens, accesses)`` is called after every chunk that starts at absolute
    position ``start``. It must be told of the tokens from ``observe_from`` on; those before may be
    read at once, of which nobody is told.
    """

    def __init__(
        self,
        model: DeepseekV4,
        max_tokens: int,
        observer: Observer | None = None,
        observe_from: int = 0,
    ):
        self.model, self.cache, self.observer = model, model.new_cache(1, max_tokens), observer
        self.observe_from = observe_from
        self.device = model.lm_head.weight.device
        self.logits: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.cache.length

    @torch.inference_mode()
    def read(self, tokens: Iterable[int], progress: Callable[[int], None] | None = None) -> None:
        """Process given tokens, in chunks whose memory does not grow with the square of the length;
        on a GPU the most of a long prompt at once, which is several times as fast.
        """
        pending = torch.as_tensor(tokens, dtype=torch.long)
        if whole := self._whole_tokens(len(pending)):
            told = progress or (lambda tokens: None)
            read_whole(self.model, pending[:whole].to(self.device), self.cache, told)
            pending = pending[whole:]
        while len(pending):
            longest = MAX_CHUNK[self.device.type]
            entries = (
                self.length // self.model.config.compress_rates.get(CSA, ENTRY_TOKENS) + longest
            )
            size = max(1, min(longest, SCORES_PER_CHUNK[self.device.type] // entries))
            chunk, pending = pending[:size], pending[size:]
            start = self.length
            logits, accesses = self.model(chunk[None].to(self.device), self.cache, last_only=True)
            self.logits = logits[0, -1]
            if self.observer is not None:
                self.observer(start, len(chunk), accesses)
            if progress is not None:
                progress(len(chunk))

    def _whole_tokens(self, count: int) -> int:
        """How many of the first ``count`` tokens to read at once."""
        if self.length or self.device.type != "cuda" or not reads_whole(self.model):
            return 0
        most = count - 1  # the last one's logits are wanted
        if self.observer is not None:
            most = min(most, self.observe_from)
        whole = most - most % grain(self.model)
        return whole if whole >= WHOLE_TOKENS else 0

    def generate(self, count: int, progress: Callable[[int], None] | None = None) -> list[int]:
        """Greedy tokens, each processed as it is chosen, so that the cache holds them all."""
        tokens = []
        for _ in range(count):
            tokens.append(int(self.logits.argmax()))
            self.read(tokens[-1:], progress)
        return tokens

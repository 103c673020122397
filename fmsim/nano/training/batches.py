"""Training batches from worker processes; batch i of a seed is the same however many workers make
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fmsim.nano import tokens as corpora
from fmsim.nano import wording
from fmsim.nano.tokens import Corpus
from fmsim.nano.weaving import Mixture, find_mixture, pack_sequence


class Batches(Dataset):
    """Batch number -> (tokens int64 [B, S + 1], weights float32 [B, S], positions int64 [B, S]).

    ``weights[b, s]`` is 1 where the predicted token ``tokens[b, s + 1]`` answers a question.
    """

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        sequences: int,
        mixture: Mixture | str,
        seed: int,
        density: float = 1.0,
    ):
        self.corpus, self.length, self.sequences = corpus, length, sequences
        self.mixture, self.seed, self.density = find_mixture(mixture), seed, density

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((self.seed, number))
        samples = [
            pack_sequence(rng, self.length + 1, self.corpus, self.density, self.mixture)
            for _ in range(self.sequences)
        ]
        tokens = np.stack([sample.tokens for sample in samples]).astype(np.int64)
        weights = np.stack([sample.answer[1:] for sample in samples]).astype(np.float32)
        positions = np.stack([sample.positions[:-1] for sample in samples]).astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(weights), torch.from_numpy(positions)


class _From(Sampler):
    """Batch numbers from ``start`` on, without end."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


def stream_batches(
    corpus: Corpus | Path,
    length: int,
    sequences: int,
    mixture: Mixture | str,
    seed: int,
    start: int = 0,
    workers: int = 12,
    density: float = 1.0,
) -> DataLoader:
    """Endless batches of ``sequences`` sequences of ``length`` tokens, from batch ``start`` on.

    ``corpus`` is a corpus or the folder of one (its training part is read). Workers are forked, and
    share its memory.
    """
    if not isinstance(corpus, Corpus):
        corpus = corpora.load(corpus, "train")
    corpus.breaks, wording.wording(evaluation=False)  # before the fork, so that workers share them
    batches = Batches(corpus, length, sequences, mixture, seed, density)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_From(start),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )

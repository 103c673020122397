"""Growing the shipped nano into the next one's shape."""

import torch

from fmsim.exec.model.kinds import CSA, HCA, SLIDING
from fmsim.exec.model.weights.loader import load_model
from fmsim.nano import tokenizer as bpe
from fmsim.nano.tokenizer import MODEL_FOLDER
from fmsim.nano.training.grow import grow


@torch.no_grad()
def test_growing_changes_next_to_nothing():
    small = load_model(MODEL_FOLDER)
    grown = grow(small)
    kinds = grown.config.layer_types
    assert kinds.count(CSA) == 6 and kinds.count(HCA) == 3 and kinds[:2] == [SLIDING, SLIDING]
    assert grown.config.index_n_heads == 2 * small.config.index_n_heads
    text = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune "
        * 12
    )
    given = torch.tensor([bpe.load().encode(text).ids])
    before, after = (model(given)[0].softmax(-1) for model in (small, grown))
    # of at most 2: experts that were chosen by a hair
    assert (before - after).abs().sum(-1).mean() < 0.02

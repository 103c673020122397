"""A tiny model and its prompts, for tests of where index keys lie."""

import pytest


@pytest.fixture(scope="module")
def reference():
    from tiered_decode import LAYERS
    from tiny_model import CSA, oracle

    return oracle(layer_types=[CSA] * LAYERS, index_topk=8, head_dim=32)


@pytest.fixture(scope="module")
def prompts(reference):
    import torch
    from tiered_decode import LENGTHS, STEPS
    from tiny_model import ours

    from fmsim.exec.decode.prompt import Prompt

    read = {}

    def on(device):
        if device not in read:
            texts = [
                torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist()
                for length in LENGTHS
            ]
            model = ours(reference).to(device)
            read[device] = [Prompt(model, text, STEPS) for text in texts]
        return read[device]

    return on

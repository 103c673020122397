"""A tiny model, its prompts and their decodes, for tests of where index keys lie."""

import pytest


@pytest.fixture(scope="session")
def reference():
    from tiered_decode import LAYERS
    from tiny_model import CSA, oracle

    return oracle(layer_types=[CSA] * LAYERS, index_topk=8, head_dim=32)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def decoded(prompts, tmp_path_factory):
    """Both prompts under options of the memory indexer's policy, keys in a place: each once."""
    from tiered_decode import TARGETS, Decoded
    from tiny_indexer import lookahead

    folder, found = tmp_path_factory.mktemp("indexer"), {}

    def under(options, where, device, kernels=None):
        key = (str(options), where, device, kernels)
        if key not in found:
            spec = lookahead(folder, "28 entries", TARGETS, **options)
            found[key] = Decoded(prompts(device), spec, where, kernels=kernels)
        return found[key]

    return under

"""Index keys that come and go with their entries, in the layers that no memory indexer scores: the same decode as with all keys on the GPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from dataclasses import fields  # noqa: E402

from test_engine import lookahead  # noqa: E402
from test_model import CSA, HCA, SLIDING, oracle, ours  # noqa: E402

from fmsim.exec.engine import Batch  # noqa: E402
from fmsim.exec.kernels.layout import read_entries  # noqa: E402
from fmsim.exec.prompt import Prompt  # noqa: E402
from fmsim.policies import registry  # noqa: E402

TARGETS, TIERED, LAYERS = (1, 3), [0, 2, 4], 5
LENGTHS, STEPS, TAU = (212, 97), 44, 8  # 64 entries at the end of the first
ENTRY_BYTES, KEY_BYTES = 32 * 4, 16 * 4
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]
OPTIONS = [
    {"stale": False},
    {},
    {"granularity": 4},
    {"granularity": 4, "stale": False, "recent_entries": 9},
]


@pytest.fixture(scope="module")
def reference():
    return oracle(layer_types=[SLIDING, CSA, HCA, CSA, CSA, CSA, CSA], index_topk=8, head_dim=32)


@pytest.fixture(scope="module")
def prompts(reference):
    read = {}

    def on(device):
        if device not in read:
            texts = [torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist() for length in LENGTHS]
            model = ours(reference).to(device)
            read[device] = [Prompt(model, text, STEPS) for text in texts]
        return read[device]

    return on


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [None, True], ids=["", "kernels"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_places_of_keys_select_the_same_step_for_step(prompts, tmp_path, options, kernels, device):
    spec = lookahead(tmp_path, "28 entries", TARGETS, **options)
    everything, tiered = (Decoded(prompts(device), spec, where, kernels=kernels) for where in ("all", "tiered"))
    assert tiered.batch.keys.tiered == TIERED
    assert torch.equal(tiered.ids, everything.ids)
    assert tiered.tokens == everything.tokens
    for one, other in zip(everything.ledgers, tiered.ledgers):
        assert one.lookahead_loads.sum() > 1 and one.evicted.sum() > 1
        assert (one.hit[:, TIERED] < one.accessed[:, TIERED]).mean() > 0.2  # the selections among all keys would have been others
        for name in ("resident", "initial", "lookahead_loads", "demand_loads", "written", "evicted", "set_overlap", "scored"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    if device == "cpu":
        assert torch.equal(tiered.batch.logits, everything.batch.logits)

"""The engine on a GPU, its step one CUDA graph, against the same decode in plain torch on the
CPU.
"""

from dataclasses import fields

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from kernel_pools import no_waits
from tiny_model import CSA, HCA, SLIDING, oracle, ours

from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.policies import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: the engine ran on the CPU only"
    ),
]
STEPS, TAU = 44, 8
SPECS = [
    "full",
    {"policy": "lru", "budget": "9 entries"},
    {"policy": "lru", "budget": "20%", "granularity": 4, "on_miss": "fallback"},
    {"policy": "lfu", "granularity": 4, "scope": "shared", "budget": "20%"},
    {"policy": "recency", "budget": "40%"},
    {"policy": "h2o", "budget": "30%"},
]


@pytest.mark.parametrize("select", ["resident", "all"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_graph_of_kernels_decodes_as_torch_does(spec, select):
    reference = oracle(layer_types=[SLIDING, CSA, HCA, CSA], index_topk=8)
    texts = [
        torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist()
        for length in (150, 97)
    ]
    found = {}
    for device in ("cpu", "cuda"):
        model = ours(reference).to(device)
        batch = Batch(
            [Prompt(model, text, STEPS) for text in texts],
            registry.build(spec),
            tau=TAU,
            select=select,
        )
        for token in range(4):
            batch.step([token, token + 1])
        with no_waits():  # across windows, as pages are written, missed and given up
            for _ in range(STEPS - 4):
                batch.step()
        found[device] = batch
    torch.testing.assert_close(found["cuda"].logits.cpu(), found["cpu"].logits, atol=1e-3, rtol=0)
    for one, other in zip(found["cpu"].requests, found["cuda"].requests):
        assert one.tokens == other.tokens
        for field in fields(one.ledger()):
            expected, measured = (
                getattr(one.ledger(), field.name),
                getattr(other.ledger(), field.name),
            )
            if field.name.startswith("mass"):
                np.testing.assert_allclose(measured, expected, rtol=2e-3)
            else:
                assert np.array_equal(measured, expected), field.name
    assert found["cpu"].h2d_bytes == found["cuda"].h2d_bytes

"""Decode steps of a batch of different lengths against transformers' model, over prefill and every boundary after it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the oracle is transformers' DeepseekV4ForCausalLM")

from test_model import CSA, HCA, SLIDING, kinds, oracle, ours  # noqa: E402

from fmsim.exec.engine import Batch  # noqa: E402
from fmsim.exec.prompt import Prompt  # noqa: E402
from fmsim.policies import registry  # noqa: E402


@torch.no_grad()
def check(reference, lengths, steps, spec, **options):
    """Every step's logits of every request are the oracle's for the same tokens."""
    texts = [torch.randint(0, 64, (length + steps,)) for length in lengths]
    expected = [reference(text[None]).logits[0] for text in texts]
    model = ours(reference)
    batch = Batch([Prompt(model, text[:length].tolist(), steps) for text, length in zip(texts, lengths)], registry.build(spec), **options)
    for step in range(steps):
        batch.step([int(text[length + step]) for text, length in zip(texts, lengths)])
        for row, (logits, length) in enumerate(zip(expected, lengths)):
            torch.testing.assert_close(batch.logits[row], logits[length + step], atol=1e-4, rtol=0)


@settings(max_examples=5, deadline=None)
@given(
    layers=st.lists(kinds, min_size=1, max_size=3).map(lambda mix: [*mix, CSA]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    granularity=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_a_batch_of_different_lengths_is_the_oracle(layers, lengths, granularity, seed):
    spec = {"policy": "lru", "budget": "3x topk", "granularity": granularity} if min(lengths) > 8 else "full"
    check(oracle(seed, layer_types=layers), lengths, 14, spec)


def test_six_hundred_steps_cross_every_boundary():
    check(oracle(layer_types=[SLIDING, CSA, HCA]), [30, 7], 600, "full")


def test_so_do_kernels():
    """By their references: rings, pages and block tables instead of torch's own arrays, from a prefill that ends anywhere."""
    for seed, lengths in enumerate(([30, 7], [1], [133, 128, 4])):
        check(oracle(seed, layer_types=[SLIDING, CSA, HCA, CSA]), lengths, 140 if seed == 0 else 20, "full" if seed == 1 else "lru", kernels=True)

"""Decode steps of a batch of different lengths against transformers' model, over prefill and every
boundary after it.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the oracle is transformers' DeepseekV4ForCausalLM")

from kernel_pools import on_each_device
from tiny_model import CSA, HCA, SLIDING, kinds, oracle, ours

from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.kernels.products import hyper_connection, mixing
from fmsim.exec.model import deepseek_v4 as exec_model
from fmsim.exec.model.weights.loader import allocate, meta_model
from fmsim.policies import registry


@torch.no_grad()
def check(reference, lengths, steps, spec, **options):
    """Every step's logits of every request are the oracle's for the same tokens."""
    texts = [torch.randint(0, 64, (length + steps,)) for length in lengths]
    expected = [reference(text[None]).logits[0] for text in texts]
    model = ours(reference)
    batch = Batch(
        [Prompt(model, text[:length].tolist(), steps) for text, length in zip(texts, lengths)],
        registry.build(spec),
        **options,
    )
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
    spec = (
        {"policy": "lru", "budget": "3x topk", "granularity": granularity}
        if min(lengths) > 8
        else "full"
    )
    check(oracle(seed, layer_types=layers), lengths, 14, spec)


def test_sixty_steps_cross_every_boundary():
    """Those of pages too: of 64 HCA entries in one request, of 64 CSA entries in the other."""
    check(oracle(layer_types=[SLIDING, CSA, HCA]), [470, 215], 60, "full")


@pytest.mark.slow
@on_each_device
@torch.no_grad()
def test_hyper_connections_from_kernels_are_those_of_torch(device, monkeypatch):
    reference = oracle(layer_types=[SLIDING, CSA, HCA], hc_mult=4)
    model, texts, found = (
        ours(reference).to(device),
        [torch.randint(0, 64, (length,)).tolist() for length in (30, 7)],
        [],
    )
    for way in ("reference", "triton"):
        for name in ("enter", "read_out"):
            monkeypatch.setattr(exec_model, name, getattr(hyper_connection, f"{name}_{way}"))
        batch = Batch([Prompt(model, text, 6) for text in texts], registry.build("full"))
        found.append([])
        for token in range(6):
            batch.step([token, token + 1])
            found[-1].append(batch.logits.clone())
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(found[0]), atol=2e-5, rtol=0)
    assert not torch.equal(torch.stack(found[1]), torch.stack(found[0]))  # they were two ways


@pytest.mark.slow
@on_each_device
@torch.no_grad()
def test_gates_that_are_left_due_are_those_of_the_connection(device, monkeypatch):
    """Of one bfloat16 request, all of whose experts and entries are given. On a GPU products work
    gates out. On a CPU no product of one row is a kernel's, so each next way back does.
    """
    layers, steps = [SLIDING, CSA], 40 if device == "cuda" else 2
    reference = oracle(layer_types=layers, hc_mult=4, num_hash_layers=2, index_topk=20)
    model = allocate(meta_model(reference.config, torch.bfloat16), device)
    model.load_state_dict(reference.state_dict())
    model.eval().requires_grad_(False)
    left, unclaimed, found = [], [], []
    leave, finish = mixing.Due.leave, mixing.Due.finish

    def leave_and_count(due, gates):
        left.append(1)
        leave(due, gates)

    def finish_and_count(due):
        unclaimed.append(due._gates is not None)
        finish(due)

    monkeypatch.setattr(mixing.Due, "leave", leave_and_count)
    monkeypatch.setattr(mixing.Due, "finish", finish_and_count)
    monkeypatch.setattr(exec_model, "read_out", hyper_connection.read_out_triton)
    for leaves in (False, True):
        monkeypatch.setattr(
            exec_model,
            "enter",
            lambda *given, then, leaves=leaves: hyper_connection.enter_triton(
                *given, then=then if leaves else None
            ),
        )
        batch = Batch([Prompt(model, list(range(30)), steps)], registry.build("full"))
        found.append([])
        for token in range(steps):
            batch.step([token])
            found[-1].append(batch.logits.float().clone())
        assert bool(left) == leaves
    assert len(left) >= 2 * len(layers)
    assert sum(unclaimed) < len(left) if device == "cuda" else sum(unclaimed) == len(left)
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(found[0]), atol=0.02, rtol=0)


@pytest.mark.slow
def test_so_do_kernels():
    """By their references: rings, pages and block tables instead of torch's own arrays, from a
    prefill that ends anywhere.
    """
    for seed, lengths in enumerate(([30, 7], [1], [133, 128, 4])):
        check(
            oracle(seed, layer_types=[SLIDING, CSA, HCA, CSA]),
            lengths,
            70 if seed == 0 else 20,
            "full" if seed == 1 else "lru",
            kernels=True,
        )

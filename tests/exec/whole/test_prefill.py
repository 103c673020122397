"""A prompt read at once leaves what chunks leave: the same cache, selections and answers."""

import pytest
import torch
from kernel_pools import on_each_device
from nano_training.tiny_nano import tiny_nano

from fmsim.exec.decode.session import Session
from fmsim.exec.whole import forward, prefill

GRAIN = 32
STATES = ("entries", "open_kv", "open_gate", "prior_kv", "prior_gate")


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setattr("fmsim.exec.whole.device.runs_kernels", lambda tensor: False)


def tokens_of(count, seed=0):
    return torch.randint(64, (count,), generator=torch.Generator().manual_seed(seed))


def both_ways(model, tokens, whole, after):
    """Caches, and the accesses and logits of ``after`` tokens more, of ``tokens`` read in chunks of
    40 and of the first ``whole`` at once.
    """
    found = []
    for at_once in (0, whole):
        cache = model.new_cache(1, len(tokens) + len(after))
        if at_once:
            prefill.read_whole(model, tokens[:at_once], cache)
        with torch.inference_mode():
            for chunk in tokens[at_once:].split(40) if at_once < len(tokens) else ():
                model(chunk[None], cache)
            filled = [
                (layer.window, *((s.closed, *(getattr(s, n) for n in STATES)) if s else ()))
                for layer in cache.layers
                for s in (layer.kv, layer.index)
            ]
            filled = [tuple(map(copied, part)) for part in filled]
            logits, accesses = model(after[None], cache)
        found.append((cache.length, filled, accesses, logits))
    return found


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_close(ours, theirs, within=1e-4):
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("count", "whole"), [(160, 160), (160, 96), (173, 160), (64, 32)])
def test_the_same_cache_selections_and_logits_as_in_chunks(count, whole):
    model, after = tiny_nano(), tokens_of(23, seed=1)
    assert prefill.grain(model) == GRAIN and prefill.reads_whole(model)
    slow, fast = both_ways(model, tokens_of(count), whole, after)
    assert fast[0] == slow[0] == count + len(after)
    for ours, theirs in zip(fast[1], slow[1], strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert_close(one, two)
    for ours, theirs in zip(fast[2], slow[2], strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert_close(ours.mass, theirs.mass)
    assert_close(fast[3], slow[3])


def test_progress_is_told_after_each_layer_and_adds_up():
    model, told = tiny_nano(), []
    prefill.read_whole(model, tokens_of(160), model.new_cache(1, 160), told.append)
    assert sum(told) == 160 and len(told) == len(model.model.layers) and min(told) > 0


def test_every_layer_selects_for_the_prompt_what_chunks_select():
    model, tokens = tiny_nano(), tokens_of(160)
    positions = torch.arange(160)[None]
    places = forward.Places.of(model, positions)
    manner = forward.Manner(model.config.index_topk, index_loss=False)
    with torch.inference_mode():
        forward.train_forward(model, tokens[None], positions, manner, places)
        _, accesses = model(tokens[None], model.new_cache(1, 160))
    assert len(places.kept) == len(accesses) == 2
    for ours, access in zip(places.kept.values(), accesses, strict=True):
        assert torch.equal(ours.long(), access.ids)


@on_each_device
def test_a_session_reads_long_prompts_at_once_but_for_what_is_observed(device, monkeypatch):
    monkeypatch.setattr("fmsim.exec.decode.session.WHOLE_TOKENS", GRAIN)
    model, tokens = tiny_nano().to(device), tokens_of(200)
    told, progress = [], []
    session = Session(model, 210, lambda start, count, accesses: told.append((start, count)), 150)
    # what the session would ask of a GPU, asked here of whatever is there
    monkeypatch.setattr(session, "device", torch.device("cuda")) if device == "cpu" else None
    assert session._whole_tokens(200) == 128
    monkeypatch.undo()
    monkeypatch.setattr("fmsim.exec.whole.device.runs_kernels", lambda tensor: tensor.is_cuda)
    monkeypatch.setattr(Session, "_whole_tokens", lambda self, count: 128 if not self.length else 0)
    session.read(tokens.tolist(), progress.append)
    plain = Session(model, 210)
    monkeypatch.setattr(Session, "_whole_tokens", lambda self, count: 0)
    plain.read(tokens.tolist())
    assert sum(progress) == 200 and told[0][0] == 128 and session.length == plain.length == 200
    within = 1e-4 if device == "cpu" else 2e-2
    assert_close(session.logits, plain.logits, within)
    assert session.generate(8) == plain.generate(8)


def test_models_that_are_not_made_for_it_are_read_in_chunks():
    model = tiny_nano()
    model.config.n_routed_experts = 64
    assert not prefill.reads_whole(model)
    cache = tiny_nano().new_cache(1, 64)
    with pytest.raises(ValueError, match="at once"):
        prefill.read_whole(tiny_nano(), tokens_of(33), cache)

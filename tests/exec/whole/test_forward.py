"""The forward of training: the same values and gradients as the plain reference, whatever computes
them.
"""

import numpy as np
import pytest
import torch
from kernel_pools import on_each_device
from nano_training.tiny_nano import BATCH, LENGTH, TOP_K, sequences, tiny_nano

from fmsim.exec.model.kinds import CSA, HCA
from fmsim.exec.whole import forward
from fmsim.exec.whole.forward import Manner


@pytest.fixture
def model():
    return tiny_nano()


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setattr("fmsim.exec.whole.device.runs_kernels", lambda tensor: False)


def outcome(model, hidden, index_loss):
    """Hidden states, the indexer's loss, and every parameter's gradient."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    loss = (hidden * torch.randn(hidden.shape, generator=generator).to(hidden.device)).sum()
    loss = loss + index_loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), "index": index_loss.detach()} | grads


def dense(model, given, positions, sparse):
    hidden, aux = model.train_forward(given, positions, sparse)
    index_loss = torch.stack([part.index_loss for part in aux if part.index_loss is not None]).sum()
    return outcome(model, hidden.flatten(0, 1), index_loss)


def assert_alike(ours, theirs):
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 2e-3 * expected.norm() + 1e-6, name


@pytest.mark.parametrize(("sparse", "recompute"), [(False, False), (True, False), (True, True)])
def test_the_same_values_and_gradients_as_the_dense_rendering(model, sparse, recompute):
    given, positions = sequences(0)
    manner = Manner(top_k=TOP_K if sparse else None, recompute=recompute)
    found = forward.train_forward(model, given, positions, manner)
    ours = outcome(model, found.hidden, found.index_loss)
    assert_alike(ours, dense(model, given, positions, sparse))


@pytest.mark.slow
@on_each_device
def test_kernels_give_the_values_and_gradients_of_the_dense_rendering(device, monkeypatch):
    monkeypatch.setattr("fmsim.exec.whole.device.runs_kernels", lambda tensor: True)
    model = tiny_nano(kinds=(CSA, HCA)).to(device)
    given, positions = (part[:1, :64].to(device) for part in sequences(2))
    found = forward.train_forward(model, given, positions, Manner(TOP_K))
    ours = outcome(model, found.hidden, found.index_loss)
    assert_alike(ours, dense(model, given, positions, sparse=True))


def test_selected_entries_are_told_and_none_is_of_the_future(model):
    given, positions = sequences(3)
    places = forward.Places.of(model, positions)
    with torch.no_grad():
        forward.train_forward(model, given, positions, Manner(TOP_K, index_loss=False), places)
    assert sorted(places.kept) == [1, 3]
    for ids in places.kept.values():
        assert ids.shape == (BATCH, LENGTH, TOP_K)
        closed = (torch.arange(LENGTH) + 1) // 4
        assert (ids < closed[None, :, None]).all()
        assert ((ids >= 0).sum(-1) == closed.clamp(max=TOP_K)).all()


def test_the_index_loss_of_watched_queries_is_the_mean_over_them_by_attention(model):
    given, positions = sequences(4)
    blocks = torch.tensor([[0], [1]])
    watched = (blocks[..., None] * 64 + torch.arange(64)).flatten(1)
    with torch.no_grad():
        some = forward.train_forward(model, given, positions, Manner(watched=watched)).index_loss
        rest = (1 - torch.zeros(BATCH, LENGTH).scatter(1, watched, 1.0)).nonzero()[:, 1]
        others = Manner(watched=rest.view(BATCH, -1))
        other = forward.train_forward(model, given, positions, others).index_loss
        whole = forward.train_forward(model, given, positions, Manner()).index_loss
    assert min(some, other) < whole < max(some, other)


def test_a_calm_target_leaves_the_hidden_states_alone_and_changes_the_loss(model):
    given, positions = sequences(5)
    with torch.no_grad():
        own, calm = (
            forward.train_forward(model, given, positions, Manner(calm=c)) for c in (0, 0.5)
        )
    assert torch.equal(own.hidden, calm.hidden)
    assert calm.index_loss > 0 and calm.index_loss != own.index_loss


def test_watched_blocks_hold_answers_before_others(monkeypatch):
    monkeypatch.setattr(forward, "WATCHED_LOGITS", 8 * 64 * 2 * 100)
    answers = torch.zeros(2, 64 * 64)
    answers[:, 5 * 64 + 3] = 1.0
    drawn = [forward.watch(answers, 100, torch.Generator().manual_seed(s)) for s in range(50)]
    assert drawn[0].shape == (2, 8 * 64)
    assert (drawn[0].view(2, 8, 64).diff(dim=-1) == 1).all()
    share = np.mean([bool((chosen == 5 * 64).any(1).all()) for chosen in drawn])
    assert share > 0.15  # of 64 blocks 8 are drawn: by chance 0.016 for both
    assert forward.watch(answers[:, :512], 1) is None


def test_lengths_that_split_an_entry_are_refused(model):
    with pytest.raises(ValueError, match="multiple of the rates"):
        forward.train_forward(
            model, torch.zeros(1, 100, dtype=torch.long), torch.arange(100)[None], Manner()
        )

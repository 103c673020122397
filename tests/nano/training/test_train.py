"""Training: an update lowers the loss, a call leaves what the next one goes on from."""

import json

import numpy as np
import pytest
import torch
from nano_training.tiny_nano import tiny_nano

from fmsim.exec.model.weights.loader import load_model
from fmsim.nano.text.pack_tokens import write
from fmsim.nano.tokens import Corpus
from fmsim.nano.training.batches import Batches
from fmsim.nano.training.stages import Stage
from fmsim.nano.training.train import Settings, run
from fmsim.nano.training.trainer import Trainer, Workers, next_token_loss

VOCABULARY = 4096
STAGE = Stage(512, 0.1, 512, (3e-3, 1e-3), ((12, 1.0),), mixture="dense")


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setattr("fmsim.exec.whole.device.runs_kernels", lambda tensor: False)


@pytest.fixture
def corpus():
    text = np.random.default_rng(0).integers(300, VOCABULARY, 20_000).astype(np.uint16)
    return Corpus(text, np.array([0, len(text)]), ["made up"])


def test_updates_on_one_batch_lower_its_losses(corpus):
    trainer = Trainer(tiny_nano(VOCABULARY), Workers("cpu"))
    batch = Batches(corpus, 512, 1, "dense", seed=0)[0]
    losses = [trainer.train_step(STAGE, 3e-3, 12, batch) for _ in range(3)]
    for name in ("text", "answer", "index"):
        assert losses[-1][name] < losses[0][name], name
    assert not trainer.spoilt


def test_a_call_leaves_a_log_a_model_and_a_state_to_resume_from(corpus, tmp_path):
    write({"train": corpus}, tmp_path / "tokens")
    trainer = Trainer(tiny_nano(VOCABULARY), Workers("cpu"))
    settings = Settings(tmp_path / "tokens", tmp_path, workers=0)
    run(trainer, (STAGE, STAGE), settings, first_stage=1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["stage"] == 1 and rows[0]["step"] == 1 and rows[-1]["ended"] == 1
    assert rows[-1]["tokens"] == rows[-1]["steps"] * STAGE.batch_tokens
    kept = dict(trainer.model.state_dict())
    for name, weight in load_model(tmp_path / "model").state_dict().items():
        torch.testing.assert_close(weight, kept[name], rtol=1e-2, atol=1e-3)
    resumed = Trainer(tiny_nano(VOCABULARY), Workers("cpu"))
    resumed.load(tmp_path / "state.pt")
    batch = Batches(corpus, 512, 1, "dense", seed=1)[0]
    for one in (trainer, resumed):
        one.train_step(STAGE, 1e-3, 12, batch)
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name


def test_a_gradient_that_is_not_finite_is_left_out(corpus):
    trainer = Trainer(tiny_nano(VOCABULARY), Workers("cpu"))
    tokens, weights, positions = Batches(corpus, 512, 1, "dense", seed=0)[0]
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    trainer.train_step(STAGE, 3e-3, 12, (tokens, weights * float("nan"), positions))
    assert trainer.spoilt == 1
    assert torch.equal(trainer.model.model.embed_tokens.weight, before)


def test_the_loss_in_parts_is_the_loss(monkeypatch):
    monkeypatch.setattr("fmsim.nano.training.trainer.LOSS_TOKENS", 7)
    hidden, head = torch.randn(30, 8), torch.randn(20, 8)
    targets, weights = torch.randint(20, (30,)), (torch.arange(30) % 3 == 0).float()
    whole = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    text, answer = next_token_loss(head, hidden, targets, weights)
    assert torch.isclose(text, whole.mean())
    assert torch.isclose(answer, whole[weights > 0].mean())

"""Training on constructed windows whose hidden state decides linearly which keys will be used."""

import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint, scorer
from fmsim.indexer import train as train_module
from fmsim.indexer.network import MemoryIndexer
from fmsim.indexer.scorer import ScorerConfig
from fmsim.indexer.train import (
    Progress,
    TrainingBatch,
    TrainingRun,
    TrainOptions,
    _batches,
    _loss,
    _negatives,
    focal_loss,
    infonce_loss,
    recall_at,
    threshold_of_share,
    train,
)
from fmsim.indexer.windows import Windows

CONFIG = ScorerConfig(rope_dims=2, rope_theta=10_000.0)
HIDDEN, HEAD_DIM, LAYERS, ENTRIES, QUERIES = 16, 8, 2, 256, 24
OPTIONS = TrainOptions(heads=8, rank=16, steps=160, evaluate_every=40, learning_rate=1e-2, seed=1)
READOUT = np.random.default_rng(99).standard_normal((LAYERS, HEAD_DIM, HIDDEN)) / HIDDEN**0.5


def constructed(seed: int) -> Windows:
    """A query's positives are the 5% of keys nearest to what its hidden state of layer 0 or 1
    points at.
    """
    random = np.random.default_rng(seed)
    keys = random.standard_normal((LAYERS, ENTRIES, HEAD_DIM)).astype(np.float32)
    pointed = random.standard_normal((QUERIES, LAYERS, HEAD_DIM))
    pointed[..., -CONFIG.rope_dims :] = 0.0  # what the rotation does not touch
    hidden = np.einsum("wld,ldh->wlh", pointed, READOUT).astype(np.float32)
    hidden[..., 0] = (
        # without a bias, the head weights need a constant to be positive for a query and its
        # opposite
        1.0
    )
    entries = np.linspace(ENTRIES // 2, ENTRIES, QUERIES).astype(np.int64)
    golden = np.zeros((QUERIES, ENTRIES), dtype=bool)
    for query, seen in enumerate(entries):
        for layer in range(LAYERS):
            near = keys[layer, :seen] @ pointed[query, layer]
            golden[query, np.argsort(-near)[: seen // 40]] = True
    return Windows(
        f"made {seed}", 4 * entries - 1, entries, hidden, keys, golden, golden.astype(np.float32)
    )


def shuffled(windows: Windows, seed: int) -> Windows:
    golden = np.zeros_like(windows.golden)
    for query, seen in enumerate(windows.entries):
        golden[query, :seen] = np.random.default_rng([seed, query]).permutation(
            windows.golden[query, :seen]
        )
    return windows._replace(golden=golden, mass=golden.astype(np.float32))


TRAINING, HELD_OUT = [constructed(seed) for seed in range(8)], [constructed(100)]


@pytest.mark.parametrize(("loss", "reached"), [("focal", 0.7), ("infonce", 0.9)])
def test_it_learns_what_can_be_learnt(loss, reached):
    seen = []
    trained = train(TRAINING, HELD_OUT, CONFIG, replace(OPTIONS, loss=loss), report=seen.append)
    assert seen[-1].loss < 0.85 * seen[0].loss
    assert max(progress.recall[1] for progress in seen) == pytest.approx(
        trained.training["recall"]["0.1"], abs=0.02
    )
    assert trained.training["recall"]["0.1"] > reached


def test_it_does_not_learn_shuffled_labels():
    training = [shuffled(windows, seed) for seed, windows in enumerate(TRAINING)]
    recall = train(training, HELD_OUT, CONFIG, OPTIONS).training["recall"]["0.1"]
    assert recall < 0.35  # a tenth by chance


def test_a_seed_decides_the_weights_and_the_threshold_keeps_its_share(tmp_path):
    options = replace(OPTIONS, steps=40, evaluate_every=20, kept_share=0.2)
    first, second = (train(TRAINING[:3], HELD_OUT, CONFIG, options) for _ in range(2))
    other = train(TRAINING[:3], HELD_OUT, CONFIG, replace(options, seed=2))
    assert np.array_equal(first.layers[1].wq_b, second.layers[1].wq_b)
    assert not np.array_equal(first.layers[1].wq_b, other.layers[1].wq_b)
    checkpoint.save(first, tmp_path / "i.safetensors")
    loaded, held_out = checkpoint.load(tmp_path / "i.safetensors"), HELD_OUT[0]
    shares = []
    for query, seen in enumerate(held_out.entries):
        keys, position = held_out.keys[:, :seen], int(held_out.positions[query])
        logits = scorer.layer_logits(
            list(loaded.layers.values()), CONFIG, held_out.hidden[query], position, keys
        )
        shares.append((scorer.combine(logits, "max") >= scorer.logit(loaded.threshold)).mean())
    assert np.mean(shares) == pytest.approx(0.2, abs=0.01)


def test_one_trace_is_enough_and_a_network_saves_what_it_learns_alone():
    options = replace(OPTIONS, steps=2, evaluate_every=1)
    seen = []
    found = train(TRAINING[:1], HELD_OUT, CONFIG, options, report=seen.append)
    assert found.training["traces"] == ["made 0"] and found.training["state_age"] == 0
    assert [progress.step for progress in seen] == [1, 2]
    made = MemoryIndexer((0,), 16, 2, 8, 4, replace(CONFIG, hadamard=True))
    parts = {name.rpartition(".")[2] for name in made.state_dict()}
    assert parts == {"weight", "q_norm_weight", "margin"}


def test_it_stops_when_held_out_recall_no_longer_grows():
    seen = []
    train(
        TRAINING[:2],
        HELD_OUT,
        CONFIG,
        replace(OPTIONS, steps=5000, evaluate_every=10, patience=2),
        report=seen.append,
    )
    best = max(range(len(seen)), key=lambda place: seen[place].merit)
    assert len(seen) == best + 3


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    options, state = replace(OPTIONS, steps=60, evaluate_every=20), tmp_path / "run.state"

    def interrupt(progress):
        if progress.step == 40:
            raise KeyboardInterrupt

    whole = train(TRAINING[:3], HELD_OUT, CONFIG, options)
    with pytest.raises(KeyboardInterrupt):
        train(TRAINING[:3], HELD_OUT, CONFIG, options, report=interrupt, state=state)
    seen = []
    resumed = train(
        TRAINING[:3], HELD_OUT, CONFIG, options, report=seen.append, state=state, resume=True
    )
    assert [progress.step for progress in seen] == [60] and not state.exists()
    assert (
        resumed.threshold == whole.threshold
        and resumed.training["recall"] == whole.training["recall"]
    )
    for layer in whole.layers:
        assert all(
            np.array_equal(a, b)
            for a, b in zip(resumed.layers[layer], whole.layers[layer], strict=True)
        )


def test_only_a_run_of_the_same_traces_and_options_is_resumed(tmp_path):
    options, state = replace(OPTIONS, steps=4, evaluate_every=2), tmp_path / "run.state"

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(FmsimError, match="no interrupted training"):
        train(TRAINING[:2], HELD_OUT, CONFIG, options, state=state, resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(TRAINING[:2], HELD_OUT, CONFIG, options, report=interrupt, state=state)
    for traces, other in ((TRAINING[:2], replace(options, seed=5)), (TRAINING[:3], options)):
        with pytest.raises(FmsimError, match="run.state: is the state of a run with other"):
            train(traces, HELD_OUT, CONFIG, other, state=state, resume=True)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(FmsimError, match="run.state: no training state"):
        train(TRAINING[:2], HELD_OUT, CONFIG, options, state=state, resume=True)


def test_nothing_to_learn_from_and_unlike_traces_are_errors():
    barren = HELD_OUT[0]._replace(golden=np.zeros_like(HELD_OUT[0].golden))
    with pytest.raises(FmsimError, match="golden"):
        train(TRAINING, [barren], CONFIG, OPTIONS)
    wider = HELD_OUT[0]._replace(
        hidden=np.zeros((QUERIES, LAYERS, 20), np.float32), name="wide.safetensors"
    )
    with pytest.raises(FmsimError, match="wide.safetensors"):
        train([TRAINING[0], wider], HELD_OUT, CONFIG, OPTIONS)
    with pytest.raises(FmsimError, match="golden"):
        train([barren], HELD_OUT, CONFIG, OPTIONS)
    first = TRAINING[0]
    for other in (
        first._replace(name="b", keys=np.zeros((LAYERS, ENTRIES, 2 * HEAD_DIM), np.float32)),
        first._replace(name="b", csa_numbers=(1, 2)),
    ):
        with pytest.raises(FmsimError, match="^b: its layers or widths differ from those of made"):
            train([first, other], HELD_OUT, CONFIG, OPTIONS)


def test_of_equal_evaluations_the_first_is_kept(monkeypatch):
    monkeypatch.setattr("fmsim.indexer.train.recall_at", lambda *given: ((0.5,), (0.25,)))
    batches = _batches(TRAINING[:1], CONFIG, 8, "cpu")
    model = MemoryIndexer([0, 1], HIDDEN, 8, HEAD_DIM, 16, CONFIG)
    assert model.margin.item() == 0
    run = TrainingRun(model, batches, replace(OPTIONS, evaluate_every=2, steps=5), ["a"])
    found = [run.advance([]) for _ in range(3)]
    assert [each.step for each in found] == [2, 4, 5] and run.finished
    assert run.best is found[0] and found[0].merit == 0.75


# The parts of a step, by hand.


def batch_of(visible, golden, mass=None):
    """Queries by rows of 0 and 1; what a model reads is not there."""
    wanted = torch.tensor(golden, dtype=torch.bool)
    weights = wanted.float() if mass is None else torch.tensor(mass)
    nothing = torch.zeros(0)
    seen = torch.tensor(visible, dtype=torch.bool)
    most = int(wanted.sum(-1).max())
    return TrainingBatch((nothing, nothing), nothing, nothing, seen, wanted, weights, most)


def model_of(logits):
    """One that answers with these logits, in one layer."""
    return lambda hidden, rotation, keys: torch.tensor([logits])


def test_the_rate_rises_in_a_tenth_of_the_steps_and_falls_as_a_cosine():
    run = SimpleNamespace(options=TrainOptions(steps=100, warm_up=0.1))
    rates = {step: TrainingRun._rate(run, step) for step in (0, 4, 9, 10, 55, 100)}
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}
    assert rates == pytest.approx(expected, abs=1e-12)


def test_focal_loss_of_a_positive_and_a_negative_of_score_three_quarters():
    """Missed: 2 x (1/4)^2 x ln(4/3); false: (3/4)^2 x ln 4; a positive weighs 2."""
    logits = torch.full((1, 3), math.log(3))
    weights, negatives = torch.tensor([[2.0, 0, 0]]), torch.tensor([[False, True, False]])
    expected = (2 / 16 * math.log(4 / 3) + 9 / 16 * math.log(4)) / 2
    assert focal_loss(logits, weights, negatives, 2.0).item() == pytest.approx(expected)
    linear = (2 / 4 * math.log(4 / 3) + 3 / 4 * math.log(4)) / 2
    assert focal_loss(logits, weights, negatives, 1.0).item() == pytest.approx(linear)


def test_infonce_is_the_cross_entropy_over_what_is_listed():
    """Shares of 1/8, 2/8 and 5/8; two positives of one weight; what is not listed says nothing."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5), 50.0]])
    listed = torch.tensor([[True, True, True, False]])
    alike = infonce_loss(logits, torch.tensor([[1.0, 1.0, 0, 0]]), listed)
    assert alike.item() == pytest.approx(2.5 * math.log(2))
    uneven = infonce_loss(logits, torch.tensor([[3.0, 1.0, 0, 0]]), listed)
    assert uneven.item() == pytest.approx((3 * 3 + 2) / 4 * math.log(2))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"random_negatives": 0.0, "hard_negatives": 1.0}, [[3], [1, 3]]),
        ({"random_negatives": 0.0, "hard_negatives": 2.0}, [[1, 3], [0, 1, 3]]),
        ({"random_negatives": 0.0, "hard_negatives": 0.0}, [[], []]),
        ({"random_negatives": 9.0, "hard_negatives": 0.0}, [[0, 1, 3], [0, 1, 3]]),
        ({"random_negatives": 0.0, "hard_negatives": 9.0}, [[0, 1, 3], [0, 1, 3]]),
    ],
)
def test_negatives_are_the_highest_of_those_that_are_visible_and_not_golden(given, expected):
    """Five entries; the last is not visible. One positive in the first query, two in the second,
    of which one is an entry that the first lacks.
    """
    batch = batch_of([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[0, 0, 1, 0, 0], [0, 0, 1, 0, 1]])
    logits = torch.tensor([[0.1, 0.2, 5.0, 0.3, 9.0], [0.1, 0.2, 5.0, 0.3, 9.0]])
    found = _negatives(logits, batch, TrainOptions(**given), torch.Generator().manual_seed(0))
    assert [row.nonzero()[:, 0].tolist() for row in found] == expected


def test_random_negatives_are_so_many_a_positive_on_average():
    """Of 10,000 entries 30 and 120 in the mean: within five standard deviations."""
    golden = torch.zeros(2, 10_000, dtype=torch.int)
    golden[0, :2], golden[1, :8] = 1, 1
    batch = batch_of(torch.ones_like(golden).tolist(), golden.tolist())
    options = TrainOptions(random_negatives=15.0, hard_negatives=0.0)
    generator = torch.Generator().manual_seed(1)
    found = _negatives(torch.zeros(2, 10_000), batch, options, generator).sum(1).tolist()
    assert abs(found[0] - 30) < 5 * 30**0.5 and abs(found[1] - 120) < 5 * 120**0.5


def test_a_single_candidate_is_drawn_where_as_many_are_asked_for():
    batch = batch_of([[1, 1]] * 64, [[1, 0]] * 64)
    options = TrainOptions(random_negatives=1.0, hard_negatives=0.0)
    found = _negatives(torch.zeros(64, 2), batch, options, torch.Generator().manual_seed(0))
    assert found.tolist() == [[False, True]] * 64


def test_recall_of_the_best_of_what_is_visible():
    """Of four visible entries 3 and 0 are the best; 30% of four are two."""
    logits = [[2.0, 1.0, 0.0, 3.0, 9.0]]
    batch = batch_of([[1, 1, 1, 1, 0]], [[1, 0, 1, 0, 0]], [[0.1, 0.2, 0.3, 0.4, 0.0]])
    golden, mass = recall_at(model_of(logits), [batch], (0.25, 0.3, 0.75, 1.0))
    assert golden == pytest.approx((0.0, 0.5, 0.5, 1.0))
    assert mass == pytest.approx((0.4, 0.5, 0.7, 1.0))


def test_the_threshold_keeps_a_share_of_each_query_on_average():
    """A query of four entries and one of two. At a logit of 2 or more: 2 of 4 and 0 of 2, a quarter
    on average; at 1: 3 of 4 and 1 of 2, five eighths.
    """
    logits = [[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 9.0, 9.0]]
    batch = batch_of([[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]])
    for share, logit in ((0.25, 2.0), (0.625, 1.0), (1.0, 0.0), (0.1, 3.0)):
        found = threshold_of_share(model_of(logits), [batch], share)
        assert found == pytest.approx(1 / (1 + math.exp(-logit)))
    for logit, score in ((99.0, 1 - 1e-9), (-99.0, 1e-9)):
        found = threshold_of_share(model_of([[logit] * 4, [logit] * 4]), [batch], 0.5)
        assert found == score  # that a policy takes: neither 0 nor 1


def test_a_loss_weighs_positives_by_their_mass_and_moves_the_focal_border():
    """Masses 0.1 and 0.3 weigh 0.5 and 1.5 in a query of two positives; to the power 0, 1 each.

    The logits of two layers are combined by the larger. InfoNCE over shares 2/5, 1/5 and 2/5 of
    what is listed. Focal with a margin of 1: logits ln 2 - 1, -1, ln 2 - 1.
    """
    batch = batch_of([[1, 1, 1]], [[1, 1, 0]], [[0.1, 0.3, 0.0]])
    two = math.log(2)

    class Model:
        margin = torch.tensor(1.0)

        def __call__(self, hidden, rotation, keys):
            return torch.tensor([[[two, -9.0, two]], [[0.0, 0.0, 0.0]]])

    def loss(**given):
        options = TrainOptions(random_negatives=9.0, hard_negatives=0.0, **given)
        return _loss(Model(), batch, options, torch.Generator().manual_seed(0)).item()

    assert loss() == pytest.approx(0.25 * math.log(5 / 2) + 0.75 * math.log(5))
    assert loss(mass_power=0.0) == pytest.approx((math.log(5 / 2) + math.log(5)) / 2)
    high, low = (1 / (1 + math.exp(-logit)) for logit in (two - 1, -1.0))
    missed = 0.5 * (1 - high) * -math.log(high) + 1.5 * (1 - low) * -math.log(low)
    false = high * -math.log(1 - high)
    found = loss(loss="focal", focal_gamma=1.0)
    assert found == pytest.approx((missed + false) / 2, rel=1e-5)


def test_a_positive_without_mass_weighs_next_to_nothing():
    batch = batch_of([[1, 1]], [[1, 1]], [[0.0, 1.0]])
    found = _loss(
        model_of([[0.0, math.log(3)]]), batch, TrainOptions(), torch.Generator().manual_seed(0)
    )
    assert found.item() == pytest.approx(math.log(4 / 3), rel=1e-4)


def test_queries_without_positives_are_left_out_and_the_others_split(monkeypatch):
    """Four of five queries, at most two a batch: 2 x 3 heads x 4 entries are 24 products."""
    golden = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 0]], bool)
    entries = np.array([3, 3, 3, 4, 4])
    windows = Windows(
        "made",
        4 * entries - 1,
        entries,
        np.ones((5, 1, 2), np.float32),
        np.ones((1, 4, 2), np.float32),
        golden,
        golden.astype(np.float32),
    )
    assert train_module.PRODUCTS_PER_BATCH * 4 == 256 * 2**20  # bytes in float32
    for products, sizes in ((24, [2, 2]), (35, [2, 2]), (36, [3, 1]), (1, [1, 1, 1, 1])):
        monkeypatch.setattr("fmsim.indexer.train.PRODUCTS_PER_BATCH", products)
        found = _batches([windows], CONFIG, 3, "cpu")
        assert [len(batch.golden) for batch in found] == sizes
    monkeypatch.setattr("fmsim.indexer.train.PRODUCTS_PER_BATCH", 36)
    first, second = _batches([windows], CONFIG, 3, "cpu")
    assert first.visible.tolist() == [[True] * 3 + [False]] * 2 + [[True] * 4]
    assert (first.most_positives, second.most_positives) == (2, 3)
    assert first.golden.tolist() == golden[[0, 2, 3]].tolist()


@pytest.mark.parametrize(
    ("step", "best", "finished"),
    [(0, None, False), (99, None, False), (100, None, True), (59, 40, False), (60, 40, True)],
)
def test_a_run_ends_with_its_steps_or_after_two_evaluations_without_a_better_one(
    step, best, finished
):
    options = TrainOptions(steps=100, evaluate_every=10, patience=2)
    known = None if best is None else Progress(best, 0.0, (0.0,), (0.0,))
    run = SimpleNamespace(options=options, step=step, best=known)
    assert TrainingRun.finished.fget(run) is finished


def test_what_a_training_says_of_itself(monkeypatch):
    options = replace(OPTIONS, steps=3, evaluate_every=2)
    clock = SimpleNamespace(perf_counter=iter((10.0, 22.34)).__next__)
    monkeypatch.setattr("fmsim.indexer.train.time", clock)
    seen = []
    found = train(TRAINING[:2], HELD_OUT, CONFIG, options, report=seen.append)
    assert [progress.step for progress in seen] == [2, 3]
    best = max(seen, key=lambda progress: progress.merit)
    assert best.merit == pytest.approx(sum(best.recall) + sum(best.mass_kept))
    said = found.training
    assert (said["step"], said["state_age"]) == (best.step, 0)
    assert (said["traces"], said["held_out"]) == (["made 0", "made 1"], ["made 100"])
    assert said["recall"] == dict(zip(("0.05", "0.1"), best.recall))
    assert said["mass_kept"] == dict(zip(("0.05", "0.1"), best.mass_kept))
    assert said["options"]["steps"] == 3 and said["seconds"] == 12.3
    monkeypatch.undo()
    mixed = [TRAINING[0], TRAINING[1]._replace(state_age=1)]
    with pytest.raises(FmsimError, match="different state ages"):
        train(mixed, HELD_OUT, CONFIG, options)


def test_what_is_not_said():
    assert asdict(TrainOptions()) == {
        "heads": 32,
        "rank": 192,
        "loss": "infonce",
        "random_negatives": 3.0,
        "hard_negatives": 1.0,
        "mass_power": 1.0,
        "learning_rate": 2e-3,
        "weight_decay": 0.01,
        "warm_up": 0.05,
        "focal_gamma": 2.0,
        "steps": 2000,
        "traces_per_step": 4,
        "evaluate_every": 100,
        "patience": 5,
        "kept_share": 0.10,
        "seed": 0,
    }


def test_the_rate_of_a_single_step_is_whole():
    run = SimpleNamespace(options=TrainOptions(steps=1))
    assert TrainingRun._rate(run, 0) == 1.0
    short = SimpleNamespace(options=TrainOptions(steps=3, warm_up=1.0))
    assert [TrainingRun._rate(short, step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    two = SimpleNamespace(options=TrainOptions(steps=2, warm_up=0.5))
    assert [TrainingRun._rate(two, step) for step in range(3)] == pytest.approx([1, 1, 0])

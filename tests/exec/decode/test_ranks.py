"""Ranks that decode requests of their own and hold a part of the experts each, beside one process
that does all.
"""

from functools import partial
from operator import itemgetter

import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from command import fmsim_here
from made_trace import make_trace
from small_flash import small_flash
from tiny_model import CSA, HCA, SLIDING, oracle, ours

from fmsim.exec.decode.engine import Batch
from fmsim.exec.decode.prompt import Prompt
from fmsim.exec.model.exchange import joined
from fmsim.exec.model.split_experts import split_experts
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.exec.runs import synthetic as synthetic_run
from fmsim.experiments.workers.parallel import as_they_end
from fmsim.policies import registry
from fmsim.replay.replayer import Replayer
from fmsim.sim.footprint import footprint

LENGTHS = (60, 41, 53, 47)
# NCCL takes a GPU a rank: one GPU alone has all requests, and its exchange in its graph
RANKS = {"cpu": 2, "cuda": min(2, max(1, torch.cuda.device_count()))}
POLICY = {"policy": "lru", "budget": "9 entries"}
SMALL = small_flash((SLIDING, CSA, CSA), vocabulary=64)
LAYER_MAP = (0, 2)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def steps(device: str) -> int:
    return 40 if device == "cuda" else 6  # a GPU captures a graph of a longer decode


def prompts(device: str):
    """Of one model that its first layer routes by tokens' ids; the same in each process."""
    model = ours(oracle(layer_types=[SLIDING, CSA, HCA, CSA], index_topk=8)).to(device)
    made = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 64, (length,), generator=made).tolist() for length in LENGTHS]
    return [Prompt(model, text, steps(device)) for text in texts]


def decoded(batch, device):
    engine = Batch(batch, registry.build(POLICY), tau=8)
    tokens = engine.generate(steps(device))
    return tokens, engine.logits.cpu()


def decoded_by(device, meeting, rank):
    """By a rank: its share of the requests; by one process more, which compiles its kernels beside
    theirs: all of them.
    """
    if rank == RANKS[device]:
        return rank, *decoded(prompts(device), device)
    with joined(meeting, rank, RANKS[device], device) as exchange:
        count = len(LENGTHS) // exchange.count
        own = prompts(device)[rank * count : (rank + 1) * count]
        split_experts(own[0].model, exchange)
        held = {len(layer.mlp.experts.down_proj) for layer in own[0].model.model.layers}
        assert held == {4 // exchange.count}
        return rank, *decoded(own, device)


def on_ranks(work, device, folder, others=0):
    """What each rank finds, and each of so many ``others`` that meet nobody, in their order."""
    start = "spawn" if device == "cuda" else "fork"
    at_once = RANKS[device] + others
    asked = partial(work, device, folder / "meeting")
    return sorted(as_they_end(asked, range(at_once), at_once, start), key=itemgetter(0))


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_decode_what_one_process_does(device, tmp_path):
    *parts, (_, tokens, logits) = on_ranks(decoded_by, device, tmp_path, others=1)
    assert [row for _, found, _ in parts for row in found] == tokens
    found = torch.cat([part for _, _, part in parts])
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


def synthetic_by(device, meeting, rank):
    """-> the rank, whether it made the mirror, what a request moved, sums of weights that all ranks
    have, and of its experts'.
    """
    with joined(meeting, rank, RANKS[device], device) as exchange:
        replayer = Replayer(make_trace(prompt_tokens=200, n_steps=6))
        model, experts = synthetic_model(SMALL, device, model_bytes(SMALL, 8), 0, exchange)
        assert experts == 8
        run = synthetic_run.run(
            "lru",
            partial(registry.build, POLICY),
            replayer,
            SMALL,
            LAYER_MAP,
            model,
            device,
            2 * exchange.count,
            exchange=exchange,
        )
        layer = model.model.layers[2]
        sums = [
            float(weight.float().abs().sum())
            for weight in (layer.mlp.gate.weight, layer.self_attn.q_a_proj.weight)
        ]
        own = float(layer.mlp.experts.down_proj.float().abs().sum())
        [cache] = run.decode.tiers.caches
        return rank, cache.made_mirror, run.outcome.h2d_bytes, sums, own


@pytest.mark.parametrize("device", DEVICES)
def test_ranks_share_a_mirror_and_all_weights_but_experts(device, tmp_path):
    parts = on_ranks(synthetic_by, device, tmp_path)
    _, made, moved, shared, own = zip(*parts, strict=True)
    assert sum(made) == 1
    ledger = Replayer(make_trace(prompt_tokens=200, n_steps=6)).run(registry.build(POLICY))
    loads = (ledger.demand_loads + ledger.lookahead_loads).sum(axis=0)
    loads = loads[footprint(ledger, SMALL, LAYER_MAP).groups].sum()
    assert set(moved) == {loads * 584} and loads
    assert len({tuple(sums) for sums in shared}) == 1 and len(set(own)) == len(own)


def test_what_does_not_split_is_refused():
    for options, why in (
        (["--weights", "synthetic", "--batch", "3", "--context", "32k"], "give a multiple of 2"),
        (["--batch", "2"], "takes --weights synthetic"),
    ):
        told = fmsim_here("exec", "--gpus", "2", "--device", "cpu", *options)
        assert told.returncode != 0 and why in told.stderr, told.stderr

"""FlashMemory's published figures (arXiv 2606.09079, and its engine's technical report), without a
trace where none is needed.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from hand_ledger import FLASH, ledger, loads

from fmsim.hw import load_hardware
from fmsim.sim.serving.capacity.plan import CapacityQuestion
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import ClosedLoop, Server
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import paper

H20 = load_hardware("h20")
TURNOVER = 0.42  # of a window's pages: (1 - J) / (1 + J), with J = 0.41 of the replay of h20-512k
ENGINE = Server(prefill="done", max_batch=80, recall_bytes_per_s=2.55e9, admit_by_link=True)


def full(tokens):
    return Demand(
        ledger(
            n_steps=64,
            prompt_entries=tokens // 4,
            slots=tokens // 4 + 16,
            on_miss="fetch",
            params={"budget": "100%"},
        ),
        FLASH,
    )


def served(demand, workload):
    run = ServerRun(H20, FLASH, demand, ENGINE, RequestGenerator(workload))
    run.run()
    return summary(run)


@pytest.mark.parametrize(
    ("k_tokens", "held", "tokens_per_s"), [(256, 47, 1584), (512, 25, 1028), (1024, 11, 455)]
)
def test_the_full_cache_on_8_h20_is_served_as_published(k_tokens, held, tokens_per_s):
    """Requests within 10%, tokens/s within 15%.

    Two constants of h20.yaml are set on the first two rows; the third is predicted.
    """
    workload = ClosedLoop(
        kind="closed_loop",
        requests=60,
        prompt_tokens=min(k_tokens, 1023) * 1024,  # an answer takes positions too
        output_tokens=[512, 1024],
        ramp_s=10,
        duration_s=120,
    )
    row = served(full(k_tokens * 1024), workload)
    assert row["bound"] == "GPU memory"
    assert row["held"] == pytest.approx(held, rel=0.10)
    assert row["arriving_tokens_per_s"] == pytest.approx(tokens_per_s, rel=0.15)


@pytest.mark.parametrize(
    ("k_tokens", "kmax", "requests", "tokens_per_s"),
    [(256, 96, 76, 2759), (512, 192, 60, 2008), (1024, 384, 30, 1266), (1024, 96, 40, 1537)],
)
def test_lsa_decodes_at_the_published_rate_with_the_published_number_of_requests(
    k_tokens, kmax, requests, tokens_per_s
):
    """No constant is set on these rows.

    The ledger is made by hand, of KMAX pages whose recalls never wait: it says nothing of turnover.
    """
    state = CapacityQuestion(
        H20, FLASH, lsa(k_tokens, kmax, 0.0), ENGINE, k_tokens * 1024, 1024, 0.05
    ).state()
    assert state.at(requests).tokens_per_s == pytest.approx(tokens_per_s, rel=0.10)


def lsa(k_tokens, kmax, turnover):
    """KMAX pages of 64 entries, of which a share is new in each window; three layers scored by the
    memory indexer.
    """
    entries = k_tokens * 256
    recalled = {f"s{step}": round(kmax * turnover) for step in range(64, 512, 64)}
    scored = np.where(np.arange(512) % 64 == 0, 3 * entries, 0)
    return Demand(
        ledger(
            n_steps=512,
            prompt_entries=entries,
            slots=kmax,
            granularity=64,
            scored=scored,
            lookahead_loads=loads(512, **recalled),
            params={"budget": f"{100 * kmax * 64 / entries}%"},
        ),
        FLASH,
    )


def test_lsas_walls_are_the_published_ones():
    """256K: the batch limit; 1M with few pages: host memory; with many pages, recall, from a
    turnover that slows it down.
    """
    walls = lambda k, kmax, turnover: CapacityQuestion(
        H20, FLASH, lsa(k, kmax, turnover), ENGINE, k * 1024, 1024, 1.0
    ).walls()
    bound = lambda found: min(found, key=found.get)
    assert bound(walls(256, 96, TURNOVER)) == "batch limit"
    assert (
        bound(walls(1024, 96, TURNOVER)) == "host memory"
        and 40 <= walls(1024, 96, TURNOVER)["host memory"] < 60
    )
    assert bound(walls(512, 192, TURNOVER)) == bound(walls(1024, 384, TURNOVER)) == "PCIe"


@pytest.mark.parametrize("suite", paper.FOOTPRINTS)
def test_footprints_of_table_1(suite):
    """full within 1.5% (RULER 64K stands at the edge of its rounding), recency and random within
    their rounding plus 10%.
    """
    tokens, published, _, recency, random = paper.FOOTPRINTS[suite]
    assert FLASH.full_kv_bytes(tokens) / paper.GIB == pytest.approx(
        published, rel=0.025 if suite == "RULER 64K" else 0.015
    )
    for share, figure in ((0.0, recency), (paper.RANDOM_SHARE, random)):
        modelled = paper.footprint_bytes(FLASH, tokens, share) / paper.GIB
        assert (figure - 0.005) * 0.9 <= modelled <= (figure + 0.005) * 1.1


def test_a_share_is_taken_from_a_replay_without_the_recent_and_decoded_tokens():
    trace = {"steps": 100, "prompt_tokens": 108_192}
    kept = 8192 + 50 + 10_000  # the recent, half of the decoded, and a tenth of the rest
    report = {
        "scenario": {"trace": trace},
        "policies": [{"policy": "lsa", "kv_hbm_ratio": kept / 108_242}],
    }
    assert paper.share_kept(report, "lsa") == pytest.approx(0.1)
    assert paper.share_kept(report, "random") is None

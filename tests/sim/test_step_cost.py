"""Step times from tables in round numbers, every sum worked by hand.

V4-Flash has 43 layers: 21 CSA, 20 HCA, 2 sliding ones. A token's activation has 8,192 bytes.
"""

import numpy as np
import pytest
from hand_ledger import FLASH, H100
from hand_tables import tabled

from fmsim.hw.deployment import Deployment
from fmsim.hw.spec import Figure, KernelTable
from fmsim.sim.serving.prefill import PrefillModel
from fmsim.sim.step_cost import StepModel, memory_indexer_s

TOKENS, ENTRIES = np.array([2048]), np.array([512])


def step_ms(hw, batch):
    costs = StepModel(hw, FLASH).equal(batch, TOKENS, ENTRIES)
    return 21 * costs.csa_s[0] * 1e3, costs.rest_s[0] * 1e3


def test_a_step_of_tensor_parallel_gpus(monkeypatch):
    """16 requests on 8 GPUs, all kernels taken twice.

    CSA: 2 x (2 + 0.25) and (32,768 - 2,048 - 15 x 1,024) tokens at 1 us: 19.86 ms. HCA: half of
    it. A layer besides: 0.1 + two all-reduces of 0.5 + the shared expert's 3, which takes longer
    than 0.2 + 1: 4.1. A sliding layer is one of 512 tokens: 0.5. Between steps: 0.65.
    """
    csa_ms, rest_ms = step_ms(tabled(H100, monkeypatch), 16)
    assert csa_ms == pytest.approx(21 * 19.86)
    sliding_ms = 2 * 2 * 0.5
    assert rest_ms == pytest.approx(2 * (43 * 4.1 + 7) + 0.65 + sliding_ms + 20 * 9.93)


def test_a_step_that_drafts_fifteen_tokens(monkeypatch):
    """One request of 2,048 tokens, and 16 positions, which read its keys together.

    CSA: 2 x (2 + 0.25), as of 16 requests; there are no others' tokens. HCA: half of it. A sliding
    layer: 2 x 0.5. Each draft takes a layer for one request, 2 x (0.25 of its window + 4.1), and a
    head, 2 x 7.
    """
    costs = StepModel(tabled(H100, monkeypatch), FLASH, 15).equal(1, TOKENS, ENTRIES)
    assert costs.csa_s[0] * 1e3 == pytest.approx(4.5)
    rest_ms = 2 * (43 * 4.1 + 7) + 0.65 + 2 * 2 * 0.5 + 20 * 2.25
    drafts_ms = 15 * 2 * (0.25 + 4.1 + 7)
    assert costs.rest_s[0] * 1e3 == pytest.approx(rest_ms + drafts_ms)


@pytest.mark.parametrize(("all_to_all_ms", "exchange_ms"), [(0.6, 0.6), (5.0, 0.3 + 0.4)])
def test_a_step_of_data_parallel_ranks(monkeypatch, all_to_all_ms, exchange_ms):
    """2 of 16 requests a rank. Batch 2 stands 1/15 of the way from 1 to 16: short 1 + 1/15.

    CSA: 2 x (16 / 15 + 0.25) and 4,096 - 2,048 - 1,024 tokens at 1 us. What is faster of an
    all-to-all, and a gather with a scatter, is taken; there is no all-reduce.
    """
    hw = tabled(H100, monkeypatch, all_to_all_ms, dp=8, ep=8)
    csa_ms, rest_ms = step_ms(hw, 16)
    each_ms = 2 * (16 / 15 + 0.25) + 1.024
    assert csa_ms == pytest.approx(21 * each_ms)
    layer_ms = 0.1 + exchange_ms + 3.0
    sliding_ms = 2 * 2 * 0.25 * 16 / 15
    expected = 2 * (43 * layer_ms + 7) + 0.65 + sliding_ms + 20 * each_ms / 2
    assert rest_ms == pytest.approx(expected)


def test_a_step_of_gpus_that_share_out_the_context(monkeypatch):
    """Two tensor-parallel GPUs times four that hold a quarter of 2,048 tokens each: 512.

    Short at 512 tokens and batch 16: 1; nothing grown, no further tokens. Exchange: an all-reduce
    over 2 of 0.25, the experts' gather and scatter 0.7, and twice a gather over 4 of 0.2.
    """
    hw = tabled(H100, monkeypatch, tp=2, cp=4, ep=1)
    csa_ms, rest_ms = step_ms(hw, 16)
    assert csa_ms == pytest.approx(21 * 2 * 1.0)
    layer_ms = 0.1 + 0.25 + 0.7 + 2 * 0.2 + 3.0
    assert rest_ms == pytest.approx(2 * (43 * layer_ms + 7) + 0.65 + 2 * 2 * 0.5 + 20 * 2 * 0.5)


def test_a_prompts_chunk(monkeypatch):
    """1,536 tokens behind 2,048: half-way in both, 2.25 in CSA, half of it in HCA; in a sliding
    layer, as if they were first, 0.75. A layer besides: 0.1 + 3 + two all-reduces of 0.5.
    """
    model = PrefillModel(tabled(H100, monkeypatch), FLASH)
    assert not model.lower_bound
    expected_ms = 2 * (21 * 2.25 + 20 * 1.125 + 2 * 0.75 + 43 * 4.1)
    assert model.seconds(np.array([2048]), np.array([1536])) == pytest.approx(expected_ms / 1e3)
    # two of 2,048, which start at 4,096 in the mean; a sliding layer sees no context
    twice_ms = 2 * (21 * 4.0 * 2 + 20 * 2.0 * 2 + 2 * 1.0 * 2 + 43 * 4.1)
    found = model.seconds(np.array([3072]), np.array([4096]))
    assert found == pytest.approx(twice_ms / 1e3)


def test_a_step_from_a_calibration():
    """8 requests on one GPU. CSA: 0.16 + 0.02 and 16,384 - 2,048 - 7 x 1,024 tokens at 1 ns; a
    layer besides: 0.04 + 0.1 + 0.01 + two all-reduces of 0.02.
    """
    by_batch = lambda one, eight: {1: one, 8: eight}
    table = KernelTable(
        csa_context_ms={1024: 0.08, 2048: 0.10},
        csa_batch_ms=by_batch(0.08, 0.16),
        hca_context_ms={1024: 0.05, 2048: 0.06},
        hca_batch_ms=by_batch(0.05, 0.10),
        moe_batch_ms=by_batch(0.03, 0.10),
        hyper_connections_batch_ms=by_batch(0.02, 0.04),
        all_reduce_batch_ms={1: 0.01, 8: 0.02, 16: 0.03},
        router_batch_ms=by_batch(0.005, 0.01),
        head_batch_ms=by_batch(0.05, 0.10),
        csa_entry_ns=4.0,
        hca_entry_ns=128.0,
    )
    measured = {"kernel_tables": None, "kernels": {"v4-flash": table}, "n_gpus": 1}
    factor = {"kernel_factor": Figure(value=1.0, source="made by hand")}
    hw = H100.model_copy(update=measured | factor).deployed(Deployment())
    csa_ms, rest_ms = step_ms(hw, 8)
    assert csa_ms == pytest.approx(21 * (0.18 + 0.007168))
    expected = 43 * 0.19 + 0.10 + 2 * 0.10 + 20 * (0.11 + 0.007168)
    assert rest_ms == pytest.approx(expected)
    # 16 on two GPUs, whose experts get as many pairs each; 16 tokens are exchanged
    two = step_ms(hw.deployed(Deployment(n_gpus=2, dp=2)), 16)
    assert two == (pytest.approx(csa_ms), pytest.approx(expected + 43 * 2 * 0.01))


def test_the_memory_indexer_takes_its_operations_or_its_reads():
    """A million entries: 128 heads x 2 x 128 operations and 132 bytes each."""
    one = {"matmul_flops": Figure(value=1e12, source="made by hand")}
    rate = {"hbm_bytes_per_s": Figure(value=1e12, source="made by hand")}
    slow_reads = {"hbm_bytes_per_s": Figure(value=1e9, source="made by hand")}
    for figures, seconds in ((one | rate, 128 * 2 * 128 / 1e6), (one | slow_reads, 0.132)):
        hw = H100.model_copy(update=figures)
        assert memory_indexer_s(hw, FLASH, np.array([10**6]))[0] == pytest.approx(seconds)

"""What a pool has before a request comes, and how many fit."""

import pytest
from hand_ledger import FLASH, H100, ledger, loads

from fmsim.hw import replace_figure
from fmsim.hw.deployment import Deployment
from fmsim.sim.serving.banner import banner
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.spec import Server

MADE = Demand(ledger(lookahead_loads=loads(128, s64=100), params={"budget": "10%"}), FLASH)


def shown(hw=H100, demand=MADE, **options):
    return banner(hw, FLASH, demand, Server(**options), 64_000, 1000)


def test_where_the_memory_goes_and_what_binds():
    found, pools = shown(), MADE.pools(64_000, 1000)
    assert (found["prompt_tokens"], found["output_tokens"]) == (64_000, 1000)
    assert found["hbm_bytes"] == {
        "all": H100.hbm_bytes.value,
        "weights": H100.weight_bytes(FLASH),
        "reserve": H100.reserve_bytes.value,
        "kv": H100.kv_pool_bytes(FLASH),
    }
    assert found["request_bytes"]["gpu"] == pools.gpu_bytes == pools.gpu.total
    assert found["request_bytes"]["slots"] == pools.gpu.slots
    assert found["request_bytes"]["mirror"] == FLASH.host_kv_bytes(65_000)
    on_gpu = int(H100.kv_pool_bytes(FLASH) // pools.gpu_bytes)
    on_host = int(H100.host_bytes_per_gpu // pools.mirror)
    assert found["limits"] == {"GPU memory": on_gpu, "host memory": on_host}
    assert found["fits"] == min(on_gpu, on_host)
    assert found["bound"] == ("GPU memory" if on_gpu <= on_host else "host memory")
    limited = shown(max_batch=3)
    assert (limited["limits"]["batch limit"], limited["fits"]) == (3, 3)
    assert limited["bound"] == "batch limit"


def test_ranks_count_apart_and_gpus_that_share_out_a_context_together():
    pools = MADE.pools(64_000, 1000)
    for layout, times, parts in (({"dp": 4, "tp": 2}, 4, 1), ({"tp": 4, "cp": 2}, 1, 2)):
        hw = H100.deployed(Deployment(**layout))
        assert shown(hw)["limits"] == {
            "GPU memory": times * int(hw.kv_pool_bytes(FLASH) * parts // pools.gpu_bytes),
            "host memory": times * int(hw.host_bytes_per_gpu * parts // pools.mirror),
        }


def test_drives_lie_below_host_memory():
    hw = replace_figure(replace_figure(H100, "nvme_bytes", 8e12), "nvme_bytes_per_s", 5e10)
    found = shown(hw, nvme=True)
    assert found["nvme_bytes"] == pytest.approx(1e12)
    room = hw.host_bytes_per_gpu + 1e12
    assert found["limits"]["NVMe"] == int(room // FLASH.host_kv_bytes(65_000))
    assert "host memory" not in found["limits"]


def test_what_never_comes_back_needs_no_mirror():
    full = Demand(ledger(slots=8032, on_miss="fetch"), FLASH)
    assert list(shown(demand=full)["limits"]) == ["GPU memory"]

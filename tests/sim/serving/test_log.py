"""A row a request: waits that add up, and figures that are the summary's."""

import csv
import io

import numpy as np
import pytest
from hand_ledger import FLASH, H100, ledger

from fmsim.experiments.results.rows import csv_text, write_rows
from fmsim.hw import replace_figure
from fmsim.sim.serving.demand import Demand
from fmsim.sim.serving.log import request_rows
from fmsim.sim.serving.server import ServerRun
from fmsim.sim.serving.spec import Poisson, Server, Slo
from fmsim.sim.serving.summary import summary
from fmsim.sim.serving.workload import RequestGenerator


@pytest.fixture(scope="module")
def run():
    """More than fit at once, with misses."""
    made = Demand(
        ledger(
            on_miss="fetch",
            params={"budget": "800 entries"},
            demand_loads=np.full((128, 1), 200, np.int32),
        ),
        FLASH,
    )
    workload = Poisson(
        kind="poisson",
        rate_per_s=20,
        prompt_tokens=[20_000, 40_000],
        output_tokens=[1, 200],
        duration_s=5,
        slo=Slo(ttft_s=2, tpot_s=0.02),
    )
    hw = replace_figure(replace_figure(H100, "host_reserve_bytes", 1), "host_bytes", 8e9)
    served = ServerRun(hw, FLASH, made, Server(), RequestGenerator(workload))
    served.run()
    return served


def test_waits_lead_from_arrival_to_admission_and_stalls_are_within_decode(run):
    rows = request_rows([run.log], run.source.workload.slo)
    assert len(rows) == len(run.log.requests) and max(row["wait_queue_s"] for row in rows) > 0
    for row in rows:
        waited = row["wait_queue_s"] + row["wait_host_memory_s"]
        assert row["admitted_s"] - row["arrival_s"] == pytest.approx(waited, abs=1e-9)
        assert row["arrival_s"] <= row["admitted_s"] <= row["first_token_s"] <= row["finished_s"]
        assert -1e-9 <= row["stall_s"] <= row["finished_s"] - row["first_token_s"] + 1e-9
    heads = sum(row["wait_host_memory_s"] for row in rows)
    assert heads == pytest.approx(run.log.waited_s["host memory"], rel=1e-6)


def test_the_summary_is_made_of_the_rows(run):
    slo, row = run.source.workload.slo, summary(run)
    rows = request_rows([run.log], slo)
    assert sum(each["good"] for each in rows) / len(rows) == row["slo_share"]
    times = [each["ttft_s"] for each in rows]
    assert row["ttft_s"]["mean"] == pytest.approx(np.mean(times))
    ordered = sorted(times)
    rank = 0.95 * (len(times) - 1)
    low = int(rank)
    by_hand = ordered[low] + (rank - low) * (ordered[low + 1] - ordered[low])
    assert row["ttft_s"]["p95"] == pytest.approx(by_hand)
    assert all((each["tpot_s"] is None) == (each["output_tokens"] == 1) for each in rows)


def test_the_rate_of_misses_is_what_was_fetched_of_what_was_selected(run):
    """200 entries of the 512 that each layer selects, at every step."""
    row = summary(run)
    assert row["miss_rate"] == pytest.approx(200 / 512)
    over = row["over_time"]
    busy = [rate for rate, made in zip(over["miss_rate"], over["tokens_per_s"]) if made > 0]
    assert np.median(busy) == pytest.approx(200 / 512)


def test_rows_are_csv_and_parquet(run, tmp_path):
    rows = request_rows([run.log], run.source.workload.slo)
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [float(row["arrival_s"]) for row in read] == [row["arrival_s"] for row in rows]
    parquet = pytest.importorskip("pyarrow.parquet")
    write_rows(tmp_path / "requests.parquet", rows)
    assert parquet.read_table(tmp_path / "requests.parquet").to_pylist() == rows

"""A fixed slice of the fuzzers' cases; `python -m tests.fuzz CLASS --seconds N` runs fresh ones."""

import pytest

from tests.fuzz import cases

PARTS = 2  # of each class, so that the cores share them
IN_WORKERS = 6  # of a part: the first cases' policies run in processes, as a user's do
COUNTS = {  # 2,260 cases; those that only read a file are cheap
    "scenario": 120,
    "override": 120,
    "requests": 140,
    "config": 60,
    "trace": 700,
    "packed": 100,
    "parameter": 60,
    "results": 60,
    "rows": 150,
    "grid": 120,
    "hardware": 60,
    "link": 60,
    "start_log": 40,
    "checkpoint": 150,
    "dump": 150,
    "capture": 150,
    "indexer": 20,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return cases.Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", cases.CLASSES)
def test_no_case_brings_fmsim_down(bench, kind, part):
    seeds = range(part, COUNTS[kind], PARTS)
    faults = [
        fault
        for number, seed in enumerate(seeds)
        if (fault := bench.run(kind, seed, workers=number < IN_WORKERS))
    ]
    assert not faults, "\n".join(faults)

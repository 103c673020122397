"""A fixed slice of the fuzzers' cases; `python -m tests.fuzz CLASS --seconds N` runs fresh ones."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fuzz_cases", Path(__file__).with_name("cases.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

PARTS = 2  # of each class, so that the cores share them
COUNTS = {  # 2,000 cases; those that only read a file are cheap
    "scenario": 120,
    "override": 120,
    "requests": 140,
    "config": 60,
    "trace": 1200,
    "results": 60,
    "rows": 150,
    "grid": 150,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return cases.Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", cases.CLASSES)
def test_no_case_brings_fmsim_down(bench, kind, part):
    seeds = range(part, COUNTS[kind], PARTS)
    faults = [fault for seed in seeds if (fault := bench.run(kind, seed))]
    assert not faults, "\n".join(faults)

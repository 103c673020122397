"""What a config says where arithmetic wants a number is a number."""

import json
import tracemalloc
from pathlib import Path

import pytest

from fmsim.errors import FmsimError
from fmsim.geometry import geometry_named
from fmsim.geometry.fields import check_numbers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"n_shared_experts": "x" * 300}, "'n_shared_experts' is no number"),
        ({"n_shared_experts": [1]}, "'n_shared_experts' is no number"),
        ({"n_shared_experts": True}, "'n_shared_experts' is no number"),
        ({"max_position_embeddings": -1}, "'max_position_embeddings' is no number"),
        ({"max_position_embeddings": 2**40 + 1}, "'max_position_embeddings' is no number"),
        ({"num_hidden_layers": 10_001}, "'num_hidden_layers' is more than 10,000"),
        ({"text_config": {"intermediate_size": "a"}}, "'intermediate_size' is no number"),
    ],
)
def test_other_things_are_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        check_numbers(changed)


def test_numbers_and_what_is_left_out_are_taken():
    numbers = {"n_shared_experts": 0, "max_position_embeddings": 2**40, "index_topk_freq": None}
    for config in ({}, numbers, {"num_hidden_layers": 10_000}, {"text_config": 3}):
        check_numbers(config)


def test_a_text_times_a_number_takes_no_memory(tmp_path):
    """300 letters times the 12 million parameters of an expert would be gigabytes."""
    config = json.loads((ROOT / "scenarios/one-gpu/config.json").read_text(encoding="utf-8"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"n_shared_experts": "x" * 300}))
    tracemalloc.start()
    with pytest.raises(FmsimError, match="'n_shared_experts' is no number"):
        geometry_named(str(path))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()

"""Every policy's parameters: what is not said, and the bounds of the numbers, each at its edge."""

import math

import pytest
from pydantic import ValidationError

from fmsim.errors import FmsimError
from fmsim.policies import registry

COMMON = {
    "budget": "2x topk",
    "cadence": "1",
    "scope": "per_layer",
    "granularity": "1",
    "on_miss": "fetch",
    "sees": "resident",
    "fallback_above": "0.05",
    "fallback_below": "0.0",
}
HISTORY = {"prompt_history": "False"}
TENTH = {"budget": "10%", "on_miss": "mask"}
LSA = TENTH | {
    "cadence": "64",
    "scope": "shared",
    "checkpoint": "None",
    "layers": "None",
    "combine": "max",
    "threshold": "None",
    "fill": "True",
    "page_rank": "max",
    "sink_entries": "1",
    "recent_entries": "32",
    "kmax": "None",
    "stale": "True",
}
DEFAULTS = {
    "full": {"budget": "all"},
    "recency": TENTH | {"sink_tokens": "4"},
    "random": TENTH | {"recent_tokens": "0"},
    "fifo": {},
    "random-fetch": {},
    "clock": {},
    "sieve": {},
    "s3fifo": {"small_share": "0.1", "ghost_share": "0.9", "uses_to_stay": "2"},
    "lru": HISTORY,
    "lruk": HISTORY | {"k": "2"},
    "lfu": HISTORY,
    "lru-prefetch": HISTORY | {"spacing": "64", "most": "256", "checkpoint": "None"},
    "hisparse": {"initial": "oldest"},
    "h2o": TENTH,
    "snapkv": TENTH | {"pool": "5", "window_tokens": "32"},
    "pyramid": TENTH | {"beta": "20", "window_tokens": "8"},
    "lsa": LSA,
    "lsa-history": LSA | HISTORY | {"weight": "1.0", "fade": "0.5"},
    "foresight": LSA
    | {"scope": "per_layer", "stale": "False", "recent_entries": "4"}
    | {"weight": "0.154", "heavy_weight": "0.137", "prompt_weight": "0.097"}
    | {"age_weight": "-0.097", "fade": "0.5", "prompt_share": "0.15"},
    "native": LSA | {"scope": "per_layer", "sees": "all"},
    "oracle": TENTH | {"cadence": "64"},
    "belady": {},
}


@pytest.mark.parametrize("name", registry.OWN)
def test_what_is_not_said(name):
    fields = registry.get(name).Params.model_fields
    assert {key: str(field.default) for key, field in fields.items()} == COMMON | DEFAULTS[name]
    assert list(DEFAULTS) == list(registry.OWN)


TINY, BELOW_ONE = math.ulp(0.0), math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "key", "least", "most"),
    [
        ("lfu", "cadence", 1, None),
        ("lfu", "fallback_above", TINY, 1.0),
        ("lfu", "fallback_below", 0.0, 1.0),
        ("lru-prefetch", "spacing", 1, None),
        ("lru-prefetch", "most", 1, None),
        ("lruk", "k", 1, 16),
        ("lsa", "cadence", 1, None),
        ("lsa", "threshold", TINY, BELOW_ONE),
        ("lsa", "sink_entries", 0, None),
        ("lsa", "recent_entries", 0, None),
        ("lsa", "kmax", 1, None),
        ("lsa-history", "weight", 0.0, None),
        ("lsa-history", "fade", 0.0, 1.0),
        ("foresight", "weight", 0.0, None),
        ("foresight", "heavy_weight", 0.0, None),
        ("foresight", "fade", 0.0, 1.0),
        ("foresight", "prompt_share", 0.0, None),
        ("oracle", "cadence", 1, None),
        ("pyramid", "beta", 1.0, None),
        ("pyramid", "window_tokens", 0, None),
        ("random", "recent_tokens", 0, None),
        ("recency", "sink_tokens", 0, None),
        ("s3fifo", "small_share", TINY, BELOW_ONE),
        ("s3fifo", "ghost_share", TINY, None),
        ("s3fifo", "uses_to_stay", 1, 3),
        ("snapkv", "pool", 1, None),
        ("snapkv", "window_tokens", 0, None),
    ],
)
def test_a_number_is_taken_up_to_its_bounds_and_no_further(name, key, least, most):
    def beside(value, towards):
        step = 1 if towards > value else -1
        return value + step if isinstance(value, int) else math.nextafter(value, towards)

    for value in (least, most):
        if value is not None:
            assert getattr(registry.build({"policy": name, key: value}).params, key) == value
    refused = [beside(least, -math.inf)] + ([] if most is None else [beside(most, math.inf)])
    for value in refused:
        with pytest.raises(FmsimError, match=f"policy {name}: {key}: "):
            registry.build({"policy": name, key: value})


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_no_parameter_is_infinite(wrong):
    n_asked = 0
    for name in registry.OWN:
        for key, field in registry.get(name).Params.model_fields.items():
            if field.annotation in (float, float | None):
                n_asked += 1
                with pytest.raises(FmsimError, match=f"policy {name}: {key}: "):
                    registry.build({"policy": name, key: wrong})
    assert n_asked > 40


def test_parameters_stay_as_they_were_given():
    policy = registry.build("lru:cadence=4")
    with pytest.raises(ValidationError, match="frozen"):
        policy.params.cadence = 5
    assert policy.params.cadence == 4


@pytest.mark.parametrize("size", [0, 2, 3, 8, 32, 128])
def test_pages_have_1_4_16_or_64_entries(size):
    for fine in (1, 4, 16, 64):
        assert registry.build({"policy": "lru", "granularity": fine}).params.granularity == fine
    with pytest.raises(FmsimError, match="policy lru: granularity"):
        registry.build({"policy": "lru", "granularity": size})


def test_kmax_is_a_budget_of_whole_pages():
    params = registry.build({"policy": "lsa", "kmax": 7, "granularity": 64}).params
    assert params.budget.entries(prompt_entries=1, topk=1, entry_bytes=1, model_layers=1) == 448
    same = registry.build({"policy": "lsa", "kmax": 7, "budget": "7 entries"}).params
    assert same.budget.slots(1, prompt_entries=100, topk=1, entry_bytes=1, model_layers=1) == 7
    with pytest.raises(FmsimError, match="give one of kmax and budget"):
        registry.build({"policy": "lsa", "kmax": 7, "budget": "8 entries"})

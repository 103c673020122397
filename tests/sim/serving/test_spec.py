"""The bounds and defaults of a scenario's workload and server, each at its edge."""

import math

import pytest
from pydantic import ValidationError

from fmsim.sim.serving import spec

DRAWN = {"prompt_tokens": 1, "output_tokens": 1, "duration_s": 1}
SESSION = DRAWN | {"kind": "sessions", "rate_per_s": 1, "turn_tokens": 1}
KINDS = {
    "slo": (spec.Slo, {}),
    "closed_loop": (spec.ClosedLoop, DRAWN | {"kind": "closed_loop", "requests": 1}),
    "poisson": (spec.Poisson, DRAWN | {"kind": "poisson", "rate_per_s": 1}),
    "bursts": (spec.Bursts, DRAWN | {"kind": "bursts", "burst": 1, "every_s": 1}),
    "sessions": (spec.SessionWorkload, SESSION),
    "file": (spec.RequestFile, {"kind": "file", "file": "requests.jsonl"}),
    "server": (spec.Server, {}),
}
TINY, BILLION = math.ulp(0.0), 10**9


def nextafter(value):
    """The numbers beside it: a count's or a float's."""
    if isinstance(value, int):
        return value - 1, value + 1
    return math.nextafter(value, -math.inf), math.nextafter(value, math.inf)


@pytest.mark.parametrize(
    ("kind", "field", "least", "most"),
    [
        ("slo", "ttft_s", TINY, 1e9),
        ("slo", "tpot_s", TINY, 1e9),
        ("closed_loop", "seed", 0, 2**63 - 1),
        ("closed_loop", "max_requests", 1, None),
        ("closed_loop", "duration_s", TINY, 1e9),
        ("closed_loop", "requests", 1, None),
        ("closed_loop", "ramp_s", 0.0, 1e9),
        ("closed_loop", "prompt_tokens", 1, BILLION),
        ("closed_loop", "output_tokens", 1, BILLION),
        ("poisson", "rate_per_s", 1e-9, 1e12),
        ("bursts", "burst", 1, None),
        ("bursts", "every_s", 1e-9, 1e9),
        ("sessions", "rate_per_s", 1e-9, 1e12),
        ("sessions", "think_s", 0.0, 1e9),
        ("sessions", "shared_tokens", 0, BILLION),
        ("sessions", "turns", 1, BILLION),
        ("sessions", "turn_tokens", 1, BILLION),
        ("sessions", "block_tokens", 16, BILLION),
        ("sessions", "duration_s", TINY, 1e9),
        ("file", "speed", 1e-6, 1e6),
        ("file", "lengths", 1e-6, 1e6),
        ("file", "duration_s", TINY, 1e9),
        ("server", "prefill_chunk_tokens", 1, BILLION),
        ("server", "prefill_servers", 1, 10**6),
        ("server", "network_bytes_per_s", 1.0, 1e18),
        ("server", "max_batch", 1, BILLION),
        ("server", "recall_bytes_per_s", 1.0, 1e18),
        ("server", "draft_tokens", 0, 16),
        ("server", "acceptance", 0.0, 1.0),
    ],
)
def test_a_number_is_taken_up_to_its_bounds_and_no_further(kind, field, least, most):
    model, given = KINDS[kind]
    for value in (least, most):
        if value is not None:
            taken = getattr(model(**given | {field: value}), field)
            assert taken in (value, (value, value))
    with pytest.raises(ValidationError):
        model(**given | {field: nextafter(least)[0]})
    if most is not None:
        with pytest.raises(ValidationError):
            model(**given | {field: nextafter(most)[1]})


def test_what_is_not_said():
    assert spec.Slo().model_dump() == {"ttft_s": 30.0, "tpot_s": 0.05}
    common = {"seed": 0, "max_requests": 200_000}
    for kind, expected in {
        "closed_loop": common | {"ramp_s": 0.0},
        "sessions": common
        | {"turns": (1, 8), "think_s": 30.0, "shared_tokens": 0, "block_tokens": 512},
        "file": common | {"speed": 1.0, "lengths": 1.0, "duration_s": None},
    }.items():
        model, given = KINDS[kind]
        found = model(**given).model_dump()
        assert {name: found[name] for name in expected} == expected
    assert spec.Server().model_dump() == {
        "prefill": "chunked",
        "prefill_chunk_tokens": 8192,
        "prefill_servers": 1,
        "network_bytes_per_s": 25e9,
        "max_batch": None,
        "mirror": "per_gpu",
        "recall_bytes_per_s": None,
        "admit_by_link": False,
        "residency": "policy",
        "draft_tokens": 0,
        "acceptance": 0.7,
        "nvme": False,
        "reuse_prefixes": True,
        "admit_by_slo": False,
    }


def test_other_names_and_what_is_not_finite_are_refused():
    for changes in ({"colour": 1}, {"ttft_s": math.inf}, {"ttft_s": math.nan}):
        with pytest.raises(ValidationError):
            spec.Slo(**changes)
    with pytest.raises(ValidationError):
        spec.Slo().ttft_s = 2.0


@pytest.mark.parametrize("wrong", [[1], [1, 2, 3], [2, 1], [True, 2], [1, 2.0], True, 1.0])
def test_no_range_of_tokens(wrong):
    model, given = KINDS["poisson"]
    with pytest.raises(ValidationError, match="give a number of tokens"):
        model(**given | {"prompt_tokens": wrong})
    assert model(**given | {"prompt_tokens": [3, 3]}).prompt_tokens == (3, 3)

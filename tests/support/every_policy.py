"""Every policy that comes with fmsim, the switches that change what it sees or when it moves, and
the plug-ins of docs/examples: what both worlds must agree on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmsim.policies import registry

FOLDER = Path(__file__).parents[2] / "docs" / "examples"
EXAMPLES = {"sieve": "Sieve", "s3fifo": "S3FIFO", "snapkv": "SnapKV", "pyramidkv": "PyramidKV"}

# A small share, so that even snapkv's pins fit and every other policy has to choose.
BUDGET = "20%"
MORE: tuple[dict[str, Any], ...] = (
    {"policy": "lru", "on_miss": "mask", "cadence": 16},
    {"policy": "lru", "on_miss": "mask", "cadence": 16, "sees": "all"},
    {"policy": "lru", "on_miss": "fallback", "granularity": 4},
    {"policy": "h2o", "sees": "all"},
    {"policy": "lsa-history", "sees": "all"},
    {"policy": "hisparse", "initial": "empty"},
)


def own_policies() -> list[str]:
    """Names of the policies that are fmsim's own."""
    return [name for name in registry.names() if registry.get(name).__module__.startswith("fmsim.")]


def example(name: str) -> str:
    """One of docs/examples, as `-p` takes it."""
    return f"{FOLDER / name}.py:{EXAMPLES[name]}"


def specs() -> Iterator[dict[str, Any]]:
    """One for each policy at least, as `registry.build` takes them."""
    for name in own_policies():
        yield {"policy": name} | ({} if name == "full" else {"budget": BUDGET})
    yield from ({"budget": BUDGET} | more for more in MORE)
    yield from ({"policy": example(name), "budget": BUDGET} for name in EXAMPLES)


def label(spec: dict[str, Any]) -> str:
    """`lru-on_miss=mask-cadence=16`, as a test's name."""
    given = [f"{key}={value}" for key, value in spec.items() if key not in ("policy", "budget")]
    return "-".join([registry.get(spec["policy"]).name, *given])

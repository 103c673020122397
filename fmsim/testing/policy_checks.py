"""Conformance kit: one call tells the author of a policy plug-in whether fmsim can rely on it.

from fmsim.testing import check_policy
check_policy(MyPolicy)
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator
from typing import Any, get_args

import array_api_compat.numpy as numpy_namespace
import numpy as np
from pydantic import ValidationError

from fmsim.policies import base
from fmsim.policies.base import Policy, PolicyParams
from fmsim.replay.decode_loop import DecodeLoop
from fmsim.replay.replayer import Replayer
from fmsim.trace import ModelInfo, Trace, TraceHeader

SWITCHES = (
    {},
    {"scope": "shared"},
    {"granularity": 4},
    {"cadence": 16},
    {"on_miss": "fallback"},
    {"on_miss": "mask", "cadence": 16},
)


def check_policy(policy: type[Policy] | Policy, trace: Any = None) -> None:
    """Check a policy class, or an instance where it needs parameters.

    Replays `sample_trace()`, or `trace` where given, under all switches that the policy's `Params`
    accept. Raises AssertionError with the broken rule, or FmsimError where the policy raises or
    answers wrongly.
    """
    subject = policy() if isinstance(policy, type) else policy
    check_declarations(subject)
    check_params(subject.params)
    trace = sample_trace() if trace is None else trace
    for switches in SWITCHES:
        try:
            params = type(subject.params).model_validate(subject.params.model_dump() | switches)
        except ValidationError:
            continue  # the policy fixes this switch
        check_replay(type(subject), params, trace)
        if importlib.util.find_spec("torch") is not None:
            check_torch_agrees(type(subject), params, trace)


def check_declarations(policy: Policy) -> None:
    """Name, docstring, and the three declarations in their own words."""
    cls = type(policy)
    assert isinstance(getattr(cls, "name", None), str) and cls.name, (
        f"{cls.__name__}: set the class attribute `name`"
    )
    assert cls.__doc__, (
        f"policy {cls.name}: write a docstring that says what it keeps, and its source"
    )
    for key, words in (
        ("action", base.Action),
        ("evidence", base.Evidence),
        ("decision_scope", base.DecisionScope),
    ):
        value = getattr(cls, key, None)
        assert value in get_args(words), (
            f"policy {cls.name}: `{key}` is {value!r}; it must be one of"
            f" {', '.join(get_args(words))}"
        )
    assert issubclass(cls.Params, PolicyParams), (
        f"policy {cls.name}: `Params` must extend fmsim.policies.base.PolicyParams"
    )
    for key, field in cls.Params.model_fields.items():
        assert field.description, (
            f"policy {cls.name}: parameter {key} has no description; give it one by Field"
        )


def check_params(params: PolicyParams) -> None:
    """Parameters survive pickling and a round trip through JSON, as processes and saved ledgers
    need.
    """
    assert pickle.loads(pickle.dumps(params)) == params, f"{params!r} changes when pickled"
    again = type(params).model_validate_json(params.model_dump_json())
    assert again == params, f"{params!r} comes back from JSON as {again!r}"


def check_replay(cls: type[Policy], params: PolicyParams, trace: Any) -> None:
    """Two replays agree, by a fresh policy and by one that was used; the budget holds and every
    slot is accounted for.
    """
    replayer, policy = Replayer(trace), cls(params)
    first, again, fresh = replayer.run(policy), replayer.run(policy), replayer.run(cls(params))
    for name, value in vars(first).items():
        for other, how in ((again, "a second reset of the same object"), (fresh, "a new object")):
            assert np.array_equal(value, getattr(other, name)), (
                f"policy {cls.name}: {name} differs after {how}: it is not deterministic"
            )
    assert (first.resident <= first.group_slots).all() and (first.resident >= 0).all(), (
        f"policy {cls.name} exceeds its slots, {first.group_slots}"
    )
    change = np.diff(first.resident, axis=0, prepend=first.initial[None])
    moved = first.demand_loads + first.lookahead_loads + first.written - first.evicted
    assert np.array_equal(change, moved), (
        f"policy {cls.name}: loads less evictions are not the change of the resident set"
    )


def check_torch_agrees(cls: type[Policy], params: PolicyParams, trace: Any) -> None:
    """The same code under numpy, with arrays as wide as they must be, and under torch, with fixed
    widths: the same slots at every step.
    """
    import array_api_compat.torch as torch_namespace

    histories = [slot_history(cls(params), trace, xp) for xp in (numpy_namespace, torch_namespace)]
    for step, (one, other) in enumerate(zip(*histories, strict=True)):
        assert np.array_equal(one, other), (
            f"policy {cls.name}, step {step}: numpy and torch put different pages into the slots"
            f" ({params!r})"
        )


def slot_history(policy: Policy, trace: Any, xp: Any) -> Iterator[np.ndarray]:
    """The pages in the slots, int32 [G, S], at the end of each step, computed with the arrays of
    `xp`.
    """
    replayer = Replayer(trace)
    source = replayer.source(policy, xp)
    loop = DecodeLoop([source.book], source)
    for _ in range(replayer.n_steps):
        loop.advance()
        yield np.asarray(source.manager.residency.slots).copy()


def sample_trace(
    prompt_tokens: int = 1600,
    n_steps: int = 70,
    n_layers: int = 2,
    topk: int = 16,
    hidden: int = 8,
    seed: int = 0,
) -> Trace:
    """A small made-up trace for tests: entries that come back now and then, and a heavy few.

    No model attended to anything here.
    """
    rng = np.random.default_rng(seed)
    ids = np.empty((n_steps, n_layers, topk), dtype=np.int32)
    for layer in range(n_layers):
        chosen = rng.choice(prompt_tokens // 4, topk, replace=False)
        for step in range(n_steps):
            others = np.setdiff1d(np.arange((prompt_tokens + step + 1) // 4), chosen)
            chosen = np.concatenate(
                [rng.permutation(chosen)[: topk - topk // 4], rng.permutation(others)[: topk // 4]]
            )
            ids[step, layer] = np.sort(chosen)
    mass = rng.exponential(size=ids.shape) ** 3
    mass = (mass / mass.sum(-1, keepdims=True) / 2).astype(np.float16).astype(np.float32)
    n_entries = (prompt_tokens + n_steps) // 4
    return Trace(
        header=TraceHeader(
            geometry={
                "index_topk": topk,
                "csa_layers": list(range(n_layers)),
                "hidden_size": hidden,
                "index_head_dim": hidden,
            },
            model=ModelInfo(name="made up by fmsim.testing.policy_checks", dtype="float32"),
            source="deepseek_v4",
            prompt_kind="made up",
            prompt_tokens=prompt_tokens,
            seed=seed,
            device="none",
            created="2026-01-01T00:00:00",
        ),
        entry_ids=ids,
        mass=mass,
        window_mass=np.full(ids.shape[:2], 0.4, dtype=np.float32),
        sink_mass=np.full(ids.shape[:2], 0.1, dtype=np.float32),
        token_ids=np.zeros(prompt_tokens + n_steps, dtype=np.int32),
        forced=np.zeros(n_steps, dtype=bool),
        hidden=rng.standard_normal((-(-n_steps // 64), n_layers, hidden)).astype(np.float32),
        index_keys=rng.integers(0, 120, (n_layers, n_entries, hidden)).astype(np.uint8),
        index_key_scales=np.ones((n_layers, 1), dtype=np.float32),
        prompt_mass=rng.uniform(size=(n_layers, n_entries)).astype(np.float32),
    )

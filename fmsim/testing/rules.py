"""The rules of the conformance kit. Each raises AssertionError with a sentence, or returns."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from fmsim.policies import registry
from fmsim.policies.base import Context, Observation, Policy, PolicyParams
from fmsim.policies.guard import is_whole
from fmsim.replay.cache_manager import CacheManager
from fmsim.replay.decode_loop import DecodeLoop
from fmsim.replay.ledger import Ledger
from fmsim.replay.replayer import Replayer
from fmsim.testing.sample import with_other_end, with_other_keys, with_other_mass
from fmsim.trace import Trace

NAME = re.compile("[A-Za-z0-9-]+")
BLIND_TO_MASS = ("position", "kv_derived")
BLIND_TO_KEYS = ("position", "attention_history")
LOADS = ("demand_loads", "lookahead_loads")


@dataclass(frozen=True)
class Subject:
    """A policy class, the parameters to make it with, and a trace to replay."""

    policy: type[Policy]
    params: PolicyParams
    trace: Trace

    @property
    def name(self) -> str:
        return f"policy {self.policy.name}"

    @cached_property
    def replayer(self) -> Replayer:
        return Replayer(self.trace)

    @cached_property
    def replayed(self) -> tuple[Policy, Ledger, list[bytes]]:
        """A policy after its first replay under numpy, the ledger of that, and of each step a
        digest of the pages in the slots at its end.
        """
        policy, placed = self.make(), list[bytes]()
        ledger = self.replayer.run(policy, lambda manager: placed.append(_digest(manager)))
        return policy, ledger, placed

    @property
    def ledger(self) -> Ledger:
        return self.replayed[1]

    @property
    def placed(self) -> list[bytes]:
        return self.replayed[2]

    def fits(self) -> bool:
        """The budget holds what the policy pins; what else is wrong, the rules tell."""
        try:
            self.replayer.source(self.make())
        except (Exception, SystemExit):  # whatever the policy raises
            return False
        return True

    def make(self) -> Policy:
        return self.policy(self.params)


def declarations(policy: type[Policy]) -> None:
    """It has a name, a docstring, and the three declarations in their own words."""
    fault = registry.fault_of(policy)
    if fault is None and not NAME.fullmatch(policy.name):
        fault = f"has the `name` {policy.name!r}; take letters, digits and hyphens"
    assert fault is None, f"policy {getattr(policy, 'name', policy.__name__)}: it {fault}"
    assert policy.__doc__, (
        f"policy {policy.name}: write a docstring that says what it keeps, and its source"
    )
    for key, field in policy.Params.model_fields.items():
        assert field.description, (
            f"policy {policy.name}: parameter {key} has no description; give it one by Field"
        )


def parameters(policy: type[Policy] | Policy) -> None:
    """Parameters survive pickling and a round trip through JSON, as processes and saved ledgers
    need; the policy can be made of them again.
    """
    made = policy() if inspect.isclass(policy) else policy
    params = made.params
    assert isinstance(params, PolicyParams), (
        f"policy {made.name}: `params` is {params!r}; Policy.__init__ sets it, so call it"
    )
    assert pickle.loads(pickle.dumps(params)) == params, (
        f"policy {made.name}: {params!r} changes when pickled"
    )
    again = type(params).model_validate_json(params.model_dump_json())
    assert again == params, f"policy {made.name}: {params!r} comes back from JSON as {again!r}"
    assert type(made)(params).params == params, (
        f"policy {made.name}: made of its own parameters it has others"
    )
    layers = made.target_layers()
    numbers = isinstance(layers, Sequence) and all(map(is_whole, layers))
    assert numbers and min(layers, default=0) >= 0 and len(set(layers)) == len(layers), (
        f"policy {made.name}: target_layers returned {layers!r}, not different numbers of layers"
        " from 0"
    )


def repeats(subject: Subject) -> None:
    """A new object, and one that was used, do the same on the same trace."""
    used, ledger, _ = subject.replayed
    again = subject.replayer.run(used)
    for name, value in vars(ledger).items():
        assert np.array_equal(value, getattr(again, name)), (
            f"{subject.name}: {name} differs after a second reset: make all state in `reset`, and"
            " draw random numbers from ctx.seed"
        )


def budget_holds(subject: Subject) -> None:
    """No more slots are filled than there are."""
    ledger = subject.ledger
    slots = ledger.group_slots
    assert (ledger.resident <= slots).all() and (ledger.resident >= 0).all(), (
        f"{subject.name} fills more than its slots, {slots}"
    )


def moves_add_up(subject: Subject) -> None:
    """Loads less evictions are the change of the resident set."""
    ledger = subject.ledger
    change = np.diff(ledger.resident, axis=0, prepend=ledger.initial[None])
    moved = ledger.demand_loads + ledger.lookahead_loads + ledger.written - ledger.evicted
    assert np.array_equal(change, moved), (
        f"{subject.name}: loads less evictions are not the change of the resident set"
    )


def does_as_declared(subject: Subject) -> None:
    """`evict` loads nothing back; `visibility_only` moves nothing."""
    loaded = sum(int(getattr(subject.ledger, key).sum()) for key in LOADS)
    if subject.policy.action in ("evict", "visibility_only"):
        assert not loaded, (
            f"{subject.name}: `action` is {subject.policy.action!r}, but it loads {loaded} pages"
            f" back from the host ({subject.params!r}); declare 'hierarchical', or let its Params"
            " allow on_miss mask alone"
        )
    if subject.policy.action == "visibility_only":
        evicted = int(subject.ledger.evicted.sum())
        assert not evicted, (
            f"{subject.name}: `action` is 'visibility_only', but it evicts {evicted} pages; declare"
            " 'evict' or 'hierarchical'"
        )


def worth_only_answers(subject: Subject) -> None:
    """`worth` may be asked at any time, twice, for padding and for pages that are not resident;
    `worth_of_first` says the same.
    """
    steps = iter(range(subject.replayer.n_steps))

    def ask(manager: Any) -> None:
        step, policy, ctx = next(steps), manager.policy, manager.ctx
        n = ctx.pages(ctx.prompt_entries)
        pages = np.broadcast_to(np.arange(n, dtype=np.int32), (ctx.n_groups, n))
        worth = policy.worth(step, pages)
        assert np.array_equal(worth, policy.worth(step, pages)), (
            f"{subject.name}, step {step}: worth answers otherwise when it is asked again"
        )
        assert np.array_equal(worth, policy.worth_of_first(step, n)), (
            f"{subject.name}, step {step}: worth_of_first differs from worth of the same pages"
        )
        backwards = policy.worth(step, pages[:, ::-1])
        assert np.array_equal(worth[:, ::-1], backwards), (
            f"{subject.name}, step {step}: worth of a page depends on where in the array it stands"
        )
        policy.worth(step, np.full((ctx.n_groups, 2), -1, dtype=np.int32))

    ledger = subject.replayer.run(subject.make(), ask)
    assert np.array_equal(ledger.resident, subject.ledger.resident) and np.array_equal(
        ledger.hit, subject.ledger.hit
    ), f"{subject.name}: asking for worth changes what it does; let `worth` only read"


def torch_agrees(subject: Subject) -> None:
    """The same code under numpy and under torch puts the same pages into the same slots, and writes
    to nothing that it is handed.
    """
    if importlib.util.find_spec("torch") is None:
        return
    import array_api_compat.torch as torch_namespace

    policy = only_reading(subject.policy)(subject.params)
    theirs = _placed(subject.replayer, policy, Placing(torch_namespace))
    for step, (one, other) in enumerate(zip(subject.placed, theirs, strict=True)):
        assert one == other, (
            f"{subject.name}, step {step}: numpy and torch put different pages into the slots"
            f" ({subject.params!r}); use ctx.xp and array methods alone"
        )


def evidence(subject: Subject) -> None:
    """What its `evidence` leaves out makes no difference, and nothing that is still to come does.

    Where `fallback` loads by mass the manager reads it, so that nothing can be said.
    """
    if subject.params.on_miss == "fallback":
        return
    kind, trace = subject.policy.evidence, subject.trace
    if kind in BLIND_TO_MASS:
        _same_with(subject, with_other_mass(trace), len(trace.entry_ids), "attention mass")
    if kind in BLIND_TO_KEYS:
        changed = with_other_keys(trace)
        _same_with(subject, changed, len(trace.entry_ids), "hidden states or index keys")
    if kind != "future":
        step = trace.n_steps * 2 // 3
        _same_with(subject, with_other_end(trace, step), step, "what is still to come")


def target_layers(subject: Subject) -> None:
    """With `target_layers`, the index keys of other layers make no difference."""
    targets, trace = subject.make().target_layers(), subject.trace
    if targets and trace.index_keys is not None:
        others = [row for row, layer in enumerate(trace.csa_numbers) if layer not in targets]
        changed = with_other_keys(trace, others)
        what = f"index keys of other layers than its target layers, {list(targets)},"
        _same_with(subject, changed, len(trace.entry_ids), what)


def pins_stand(subject: Subject) -> None:
    """With `layer_shares`, the answer of `pins` does not depend on `ctx.n_slots`."""
    policy = subject.make()
    ctx = subject.replayer.source(policy).manager.ctx
    if policy.layer_shares(ctx.n_layers) is None:
        return
    answers = []
    for n_slots in (ctx.n_slots, 2 * ctx.n_slots):
        policy.reset(replace(ctx, n_slots=n_slots, group_slots=()))
        answers.append(policy.pins())
    assert answers[0] == answers[1], (
        f"{subject.name}: pins answers {answers[0]} with {ctx.n_slots} slots and {answers[1]} with"
        " as many again; its layers' slots are shared out by that answer"
    )


def decides_ahead(subject: Subject) -> None:
    """`ahead` says one cadence before a decision what `worth_of_first` will say at it."""
    if subject.params.cadence == 1 or not subject.make().decides_ahead:
        return
    cadence, n_steps = subject.params.cadence, subject.replayer.n_steps
    foreseen: dict[int, np.ndarray] = {}

    # the base is the class under test
    class Foreseeing(subject.policy):  # type: ignore[name-defined, misc]
        def decide(self, step: int) -> None:
            super().decide(step)
            if step in foreseen:
                said = foreseen[step]
                assert np.array_equal(said, self.worth_of_first(step, said.shape[1])), (
                    f"{subject.name}, step {step}: `ahead` said otherwise one cadence before; it"
                    " does not decide ahead"
                )
            later = step + cadence
            if later < n_steps:
                n = self.ctx.pages(subject.trace.n_entries(later))
                foreseen[later] = np.array(self.ahead(later, n))

    subject.replayer.run(Foreseeing(subject.params))


OF_REPLAYS: tuple[Callable[[Subject], None], ...] = (
    repeats,
    budget_holds,
    moves_add_up,
    does_as_declared,
    worth_only_answers,
    torch_agrees,
    evidence,
    target_layers,
    pins_stand,
    decides_ahead,
)


def _same_with(subject: Subject, changed: Trace, n_steps: int, what: str) -> None:
    theirs = _placed(Replayer(changed), subject.make())
    for step, one, other in zip(range(n_steps), subject.placed, theirs):
        assert one == other, (
            f"{subject.name}, step {step}: `evidence` is {subject.policy.evidence!r}, but {what}"
            " changes what it keeps"
        )


def _placed(replayer: Replayer, policy: Policy, xp: Any = None) -> Iterator[bytes]:
    """Of each step a digest of the pages in the slots at its end, computed with arrays of `xp`."""
    source = replayer.source(policy, xp)
    loop = DecodeLoop([source.book], source)
    for _ in range(replayer.n_steps):
        loop.advance()
        yield _digest(source.manager)


def _digest(manager: CacheManager) -> bytes:
    """Of the pages in its slots."""
    slots = np.asarray(manager.residency.slots).astype("<i8")
    return hashlib.blake2b(slots.tobytes(), digest_size=16).digest()


class Placing:
    """An array namespace that wants to be told where a new array lies.

    Without it torch makes arrays on the host, which on a GPU fails at the first use.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._xp, name)
        if name not in ("arange", "empty", "eye", "full", "linspace", "ones", "zeros"):
            return found

        def made(*args: Any, **kwargs: Any) -> Any:
            assert "device" in kwargs, (
                f"xp.{name} without a device makes an array on the host, not on the GPU; write"
                f" xp.{name}(..., device=ctx.device)"
            )
            return found(*args, **kwargs)

        return made


def only_reading(policy: type[Policy]) -> type[Policy]:
    """The same policy, which says so when it writes to an array that it is handed.

    In a replay such arrays are read-only; torch has no such thing.
    """

    def checked(key: str) -> Callable[..., Any]:
        method = getattr(policy, key)

        def call(self: Policy, step: int, *args: Any) -> Any:
            arrays = dict(_arrays(args)) | _arrays_of(self.ctx)
            copies = {what: self.ctx.xp.asarray(a, copy=True) for what, a in arrays.items()}
            answer = method(self, step, *args)
            for what, array in arrays.items():
                assert bool(self.ctx.xp.all(array == copies[what])), (
                    f"policy {self.name}, step {step}: {key} writes to {what}, which others read;"
                    " write to a copy"
                )
            return answer

        return call

    handed = ("observe", "wrote", "moved", "worth")
    overridden = [key for key in handed if getattr(policy, key) is not getattr(Policy, key)]
    return type(policy.__name__, (policy,), {key: checked(key) for key in overridden})


def _arrays_of(ctx: Context) -> dict[str, Any]:
    """What a policy can reach at any time, and others read."""
    of_prompt = {} if ctx.prompt_mass is None else {"ctx.prompt_mass": ctx.prompt_mass}
    return of_prompt | {"ctx.residents.pages": ctx.residents.pages}


def _arrays(args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for number, arg in enumerate(args):
        if isinstance(arg, Observation):
            yield from ((f"obs.{f.name}", getattr(arg, f.name)) for f in fields(arg))
        else:
            yield f"argument {number + 2}", arg

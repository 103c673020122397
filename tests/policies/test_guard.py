"""What the guard refuses of a policy's answers, and what it takes at their edges."""

import numpy as np
import pytest
from hand_trace import HandTrace

from fmsim.errors import PolicyError
from fmsim.policies import guard, registry
from fmsim.policies.base import Context, Pins, Policy
from fmsim.replay.replayer import Replayer
from fmsim.testing import rules

NO_LAYERS = (None, 5, "abc", (0.5,), (True,), (-1,), (0, 0))


def guarded(**methods):
    class Odd(Policy):
        name, action, evidence, decision_scope = "odd", "evict", "position", "step"

        def worth(self, step, pages):
            return self.ctx.xp.zeros(pages.shape, dtype=self.ctx.xp.float32)

    for name, method in methods.items():
        setattr(Odd, name, method)
    found = guard.Guarded(registry.build(Odd), [0, 5])
    found.reset(Context(1, 1, 8, 4, 1, 6, 2, 16, tau=4))
    return found


@pytest.mark.parametrize(
    ("methods", "call", "says"),
    [
        ({"pins": lambda self: 3}, lambda g: g.pins(), "pins returned 3, no Pins"),
        ({"pins": lambda self: Pins(sink=-1)}, lambda g: g.pins(), "no Pins of whole numbers"),
        ({"pins": lambda self: Pins(recent=1.5)}, lambda g: g.pins(), "no Pins of whole numbers"),
        ({"floor": float("nan")}, lambda g: g.floor, "floor is nan"),
        ({"floor": True}, lambda g: g.floor, "floor is True"),
        ({"floor": "high"}, lambda g: g.floor, "floor is 'high'"),
        (
            {"prefetch": lambda self, step: [1]},
            lambda g: g.prefetch(2),
            "step 2: prefetch must return an array of integers",
        ),
        (
            {"prefetch": lambda self, step: np.zeros((1, 1))},
            lambda g: g.prefetch(2),
            "must return an array of integers",
        ),
        (
            {"prefetch": lambda self, step: np.zeros((2, 1), int)},
            lambda g: g.prefetch(2),
            r"has shape \(2, 1\); it must be \[1, n\]",
        ),
        (
            {"prefetch": lambda self, step: np.array([[4, 1, 4]])},
            lambda g: g.prefetch(2),
            "asks for a page twice",
        ),
        (
            {"prefetch": lambda self, step: np.array([[0, 4, 0]])},
            lambda g: g.prefetch(2),
            "asks for a page twice",
        ),
        (
            {"scored_entries": lambda self, step: -1},
            lambda g: g.scored_entries(1),
            "scored_entries returned -1",
        ),
        (
            {"scored_entries": lambda self, step: 2**62},
            lambda g: g.scored_entries(1),
            "no number of entries",
        ),
        *(
            (
                {"target_layers": lambda self, layers=layers: layers},
                lambda g: g.target_layers(),
                r"reset: target_layers returned .* CSA layers among the trace's, \[0, 5\]",
            )
            for layers in (*NO_LAYERS, (0, 1))
        ),
        (
            {"worth": lambda self, step, pages: np.ma.zeros(pages.shape, np.float32)},
            lambda g: g.worth(3, np.zeros((1, 2), np.int32)),
            "step 3: worth returned MaskedArray, not an array",
        ),
        (
            {"prefetch": lambda self, step: np.ma.zeros((1, 1), int)},
            lambda g: g.prefetch(2),
            "must return an array of integers",
        ),
        ({"n_slots": lambda self, n, **sizes: 0}, lambda g: g.n_slots(8), "must be from 1 to 8"),
        ({"n_slots": lambda self, n, **sizes: 9}, lambda g: g.n_slots(8), "must be from 1 to 8"),
        ({"n_slots": lambda self, n, **sizes: True}, lambda g: g.n_slots(8), "no whole number"),
        ({"n_slots": lambda self, n, **sizes: 2.5}, lambda g: g.n_slots(8), "no whole number"),
        ({"n_slots": lambda self, n, **sizes: 2}, lambda g: g.n_slots(1), "must be from 1 to 1"),
    ],
)
def test_an_odd_answer_is_told(methods, call, says):
    with pytest.raises(PolicyError, match=f"policy odd.*{says}"):
        call(guarded(**methods))


def test_answers_at_the_bounds_are_taken():
    fine = guarded(
        pins=lambda self: Pins(sink=0, recent=0),
        prefetch=lambda self, step: np.array([[4, -1, -1]]),
        scored_entries=lambda self, step: 2**62 - 1,
        n_slots=lambda self, n, **sizes: n,
        floor=0.0,
    )
    assert fine.pins() == Pins() and fine.floor == 0.0
    assert fine.prefetch(0).tolist() == [[4, -1, -1]]
    assert (
        fine.scored_entries(0) == 2**62 - 1
        and guarded(scored_entries=lambda self, step: 0).scored_entries(0) == 0
    )
    assert fine.n_slots(8) == 8 and fine.n_slots(1) == 1
    assert guarded(prefetch=lambda self, step: None).prefetch(0) is None
    scored = guarded(target_layers=lambda self: [np.int64(5), 0]).target_layers()
    assert scored == (5, 0) and all(type(layer) is int for layer in scored)
    # a subclass of arrays, such as a mapped file, is taken as the array that it is
    mapped = lambda self, step, pages: np.zeros(pages.shape, np.float32).view(np.recarray)
    assert type(guarded(worth=mapped).worth(0, np.zeros((1, 2), np.int32))) is np.ndarray


def test_a_layer_is_missed_only_once_the_policy_saw_the_trace():
    seen = guarded(target_layers=lambda self: (7,))
    assert guard.Guarded(seen.policy, [0, 5]).target_layers() == (7,)
    with pytest.raises(PolicyError, match=r"target_layers returned \(7,\)"):
        seen.target_layers()
    with pytest.raises(PolicyError, match=r"target_layers .* among the trace's, \[0, 1\]"):
        Replayer(HandTrace([[[0], [0]]])).run(seen.policy)


def test_integer_worths_reach_to_the_bound_of_their_bits():
    pages = (1, 2)
    assert guard.fault_of(np.array([[0, 2**37 - 1]]), pages) is None
    assert "is outside" in guard.fault_of(np.array([[0, 2**37]]), pages)
    assert "is outside" in guard.fault_of(np.array([[-1, 0]]), pages)
    assert "has dtype float64" in guard.fault_of(np.zeros(pages), pages)
    assert "is NaN" in guard.fault_of(np.array([[0, np.nan]], np.float32), pages)
    assert guard.fault_of(np.full(pages, np.inf, np.float32), pages) is None


@pytest.mark.parametrize("layers", NO_LAYERS)
def test_the_conformance_kit_tells_of_no_layers_too(layers):
    odd = guarded(target_layers=lambda self: layers).policy
    with pytest.raises(AssertionError, match="target_layers returned .*, not different numbers"):
        rules.parameters(odd)

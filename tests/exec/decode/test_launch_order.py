"""Which launch of a decode step follows which in its stream: a walk over the host's code in
which no kernel runs.
"""

import inspect
import sys

import pytest

torch = pytest.importorskip("torch", reason="the engine needs fmsim[model]")
pytest.importorskip("transformers", reason="the engine needs fmsim[model]")

from contextlib import contextmanager
from itertools import pairwise

from small_flash import small_flash

from fmsim.exec.decode import decode_attention
from fmsim.exec.decode.step_state import decode_attentions
from fmsim.exec.kernels.lang import INTERPRETED
from fmsim.exec.kernels.layout import KEY, LATENT
from fmsim.exec.model.weights.synthetic import model_bytes, synthetic_model
from fmsim.geometry import CSA, HCA, SLIDING

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are caught in the interpreter")
SMALL = small_flash((SLIDING, CSA, HCA, CSA), vocabulary=128)


def opens_at_once(kernel, constants):
    """The next launch may begin beside this one and the one before it."""
    return "after_previous_with_next()" in inspect.getsource(kernel)


def reads_at_once(kernel, constants):
    """It reads what launches have made before it waits for the one before it."""
    if kernel.__name__ == "_gate_up":
        return not constants["SORTED"]
    if constants.get("GATES") is not None:
        return True
    source = inspect.getsource(kernel)
    first = source.partition("wait_for_previous()")[0]
    always = "let_next_begin()" in first and "ALONGSIDE" not in source
    return constants.get("ALONGSIDE", constants.get("AHEAD", always))


class Walk:
    """Launches of each stream, in order: a kernel and its constants, or None where it waits for
    another stream.
    """

    def __init__(self):
        self.streams = {"step": []}
        self.now = "step"

    def launch(self, kernel, constants):
        self.streams[self.now].append((kernel, constants))

    @contextmanager
    def beside(self, device, side):
        before, self.now = self.now, side
        self.wait()
        yield
        self.now = before

    def wait(self, *which):
        self.streams.setdefault(self.now, []).append(None)

    def pairs(self):
        """Launches that follow one another with nothing between."""
        for launches in self.streams.values():
            yield from (pair for pair in pairwise(launches) if None not in pair)


@pytest.fixture(scope="module")
def model():
    return synthetic_model(SMALL, "cpu", model_bytes(SMALL, 8), 0)[0]


@pytest.mark.parametrize(("batch", "least"), [(1, 12), (3, 2)])
def test_no_launch_that_reads_at_once_follows_one_that_opens_at_once(
    model, batch, least, monkeypatch
):
    """Attention opens at once, so that the output projection reads its weights beside it. What the
    launch before attention makes may not be there yet: so nothing else may be read so early.
    """
    from triton.runtime.interpreter import GridExecutor

    walk = Walk()
    for name, module in list(sys.modules.items()):
        if name.startswith("fmsim.exec") and hasattr(module, "runs_compiled"):
            monkeypatch.setattr(module, "runs_compiled", lambda tensor: True)
    monkeypatch.setattr(
        GridExecutor,
        "__call__",
        lambda launched, *given, **constants: walk.launch(launched.fn, constants),
    )
    monkeypatch.setattr(decode_attention, "beside", walk.beside)
    monkeypatch.setattr(decode_attention, "wait_beside", walk.wait)
    with torch.inference_mode():
        attends = decode_attentions(model, batch, 800, LATENT, KEY, [None, None])
        at = torch.zeros(batch, dtype=torch.int32)
        model.decode(at.long(), at, attends)
    pairs = list(walk.pairs())
    after_attention = [later for former, later in pairs if opens_at_once(*former)]
    early = [later for former, later in pairs if reads_at_once(*later)]
    assert len(after_attention) >= 2 * len(SMALL.layer_types) and len(early) >= least
    assert not [kernel for kernel, constants in after_attention if reads_at_once(kernel, constants)]

"""One step seen by pages, in any library, against the whole trace seen by pages."""

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim.replay import paging
from fmsim.replay.paging import Paged, PagedFuture, page_step, page_trace

PAGES = [[[0, 2], [1, -1]], [[2, -1], [1, 2]], [[1, 2], [-1, -1]]]  # of three, in two groups


def test_what_is_to_come_of_two_groups():
    """Masses 1, 2 and 4 at steps 0 to 2. After the last step there is none."""
    pages = np.array(PAGES, np.int32)
    mass = np.where(pages < 0, 0, 2.0 ** np.arange(3)[:, None, None]).astype(np.float32)
    future = PagedFuture(Paged(pages, np.ones_like(pages), mass, None, n_pages=3))
    sums, used = future.window(0, 2)
    assert sums.tolist() == [[1, 0, 3], [0, 3, 2]]
    assert used.tolist() == [[True, False, True], [False, True, True]]
    sums, used = future.window(2, 2)
    assert sums.tolist() == [[0, 4, 4], [0, 0, 0]] and not used[1].any()
    never = future.never
    assert never == 3
    assert future.first_use().tolist() == [[0, 2, 0], [never, 0, 1]]
    assert future.next_use(0)[:, 0].tolist() == [never, 1] and future.next_use(0)[0, 1] == 1
    assert future.next_use(1)[0, 0] == 2 and future.next_use(1)[1].tolist() == [never, never]
    assert future.next_use(2)[0].tolist() == [never, never]


@pytest.mark.parametrize("shared", [False, True])
def test_chunks_of_two_steps_are_the_whole(monkeypatch, shared):
    """Rows of one to five entries in pages of four: chunks are of different widths."""
    rng = np.random.default_rng(0)
    ids = np.full((7, 2, 5), -1, np.int32)
    for step, layers in enumerate(ids):
        for row in layers:
            row[: 1 + step % 5] = np.sort(rng.permutation(40)[: 1 + step % 5])
    mass = np.where(ids < 0, 0, 1 + ids / 64).astype(np.float32)
    whole = page_trace(ids, mass, 4, shared, 10)
    monkeypatch.setattr(paging, "CHUNK_STEPS", 2)
    parts = page_trace(ids, mass, 4, shared, 10)
    for name in ("pages", "count", "mass"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert np.array_equal(whole.column[ids >= 0], parts.column[ids >= 0])


LIBRARIES = [numpy_namespace]
try:
    import array_api_compat.torch as torch_namespace

    LIBRARIES.append(torch_namespace)
except ModuleNotFoundError:
    pass
ROW = st.lists(st.integers(0, 60), unique=True, max_size=9)


@pytest.mark.parametrize("xp", LIBRARIES, ids=lambda xp: xp.__name__)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=3),
    granularity=st.sampled_from([1, 4, 16]),
    shared=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_step_is_a_trace_of_one_step(xp, rows, granularity, shared, seed):
    ids = np.full((len(rows), 9), -1, np.int32)
    for row, chosen in zip(ids, rows):
        row[: len(chosen)] = sorted(chosen)
    mass = (
        np.where(ids < 0, 0, np.random.default_rng(seed).uniform(size=ids.shape))
        .astype(np.float16)
        .astype(np.float32)
    )
    paged = page_trace(ids[None], mass[None], granularity, shared, 61)
    use = page_step(xp.asarray(ids), xp.asarray(mass), granularity, shared)
    width = paged.pages.shape[2]
    for mine, whole, padding in (
        (use.pages, paged.pages, -1),
        (use.count, paged.count, 0),
        (use.mass, paged.mass, 0),
    ):
        known = paged.pages[0] >= 0
        mine = np.asarray(mine)
        assert np.array_equal(mine[:, :width][known], whole[0][known])
        assert (mine[:, width:] == padding).all() and (mine[:, :width][~known] == padding).all()

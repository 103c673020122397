"""Exact top-k: the kernel against a stable sort over random rows full of ties, with and without
pre-selection.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_pools import on_each_device

from fmsim.exec.kernels.selection.index_score import GROUP
from fmsim.exec.kernels.selection.top_k import top_k_reference, top_k_triton
from fmsim.exec.kernels.tuning import TopKTuning

SMALL = TopKTuning(
    whole=256,
    chunk=256,
    warps=4,
    last_warps=4,
    maxima_groups=16,
    bound_turns=2,
    groups_at_once=4,
    few_at_once=4,
    many_sections=3,
    listed_groups=32,
    fewest_groups=2,
    sections=3,
    held=64,
    some_held=128,
    many_held=256,
    most_rows=3,
)
# At the lengths that an interpreter manages: all scores, all maxima and all candidates in one
# chunk; more candidates than fit; more maxima too.
CHUNKS = [
    SMALL._replace(whole=512, chunk=512, held=1024, some_held=1024, many_held=2048, few_at_once=16),
    SMALL,
    SMALL._replace(chunk=32),
]


def maxima_of(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    known = scores.masked_fill(
        torch.arange(scores.shape[1], device=scores.device) >= lengths[:, None], float("-inf")
    )
    return (
        torch.nn.functional.pad(known, (0, -scores.shape[1] % GROUP), value=float("-inf"))
        .unflatten(1, (-1, GROUP))
        .amax(2)
    )


def test_by_hand():
    scores = torch.tensor([[1.0, 3.0, -0.0, 3.0, float("-inf"), 0.0, 2.0, 9.0]])
    length = torch.tensor([7], dtype=torch.int32)  # the 9 lies beyond it
    for k, expected in (
        (1, [1]),
        (2, [1, 3]),
        (4, [0, 1, 3, 6]),
        (5, [0, 1, 2, 3, 6]),
        (8, [0, 1, 2, 3, 5, 6, -1, -1]),
    ):
        assert top_k_reference(scores, length, k).tolist() == [expected]


@on_each_device
def test_no_rows_are_an_empty_selection(device):
    none = torch.zeros(0, 700, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    assert top_k_triton(*none, 9, tune=SMALL).shape == top_k_reference(*none, 9).shape == (0, 9)


@on_each_device
@pytest.mark.parametrize("known", [False, True])
def test_more_rows_than_a_launch_takes_are_several(device, known):
    scores = torch.randn(5, 700, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([700, 3, 650, 0, 411], dtype=torch.int32)
    maxima = maxima_of(scores, lengths).to(device) if known else None
    found = top_k_triton(scores.to(device), lengths.to(device), 9, maxima, SMALL)
    assert found.cpu().equal(top_k_reference(scores, lengths, 9))


@on_each_device
@pytest.mark.parametrize("preselect", [False, True])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    entries=st.integers(1, 1500),
    k=st.sampled_from([1, 5, 64, 512]),
    values=st.sampled_from(["any", "few", "signs", "spread"]),
    missing=st.sampled_from([0.0, 0.5, 1.0]),
    tune=st.sampled_from(CHUNKS[:2]),
)
def test_the_kernel_is_the_reference(
    device, preselect, seed, batch, entries, k, values, missing, tune
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, entries, generator=generator)
    if values == "few":  # ties beyond any k
        scores = scores.round()
    elif values == "signs":
        scores = torch.sign(scores) * 0.0
    elif values == "spread":  # every exponent
        scores = scores * 2.0 ** torch.randint(-140, 120, scores.shape, generator=generator)
    scores = scores.masked_fill(
        torch.rand(scores.shape, generator=generator) < missing, float("-inf")
    )
    lengths = torch.randint(0, entries + 1, (batch,), generator=generator).to(torch.int32)
    lengths[-1] = entries
    scores, lengths = scores.to(device), lengths.to(device)
    found = top_k_triton(
        scores, lengths, k, maxima_of(scores, lengths) if preselect else None, tune=tune
    )
    assert torch.equal(found, top_k_reference(scores, lengths, k))


@on_each_device
@pytest.mark.parametrize(
    "values, tune, ks",
    [
        *(
            (values, tune, (1, 155))
            for values in ("rising", "equal", "infinite")
            for tune in CHUNKS[:2]
        ),
        *(("two values", tune, (1, 154, 155)) for tune in CHUNKS[:2]),
        ("two values", CHUNKS[2], (155,)),
    ],
)
def test_edges_of_every_path(device, values, tune, ks):
    """1,100 scores, a length amid a group and a vector, k at the ends of what a search may meet."""
    ids = torch.arange(1100, dtype=torch.float32)
    scores = {
        "rising": ids,
        "equal": ids * 0 - 1,
        "two values": (ids % 7 == 3).float(),
        "infinite": (ids * 0 + 1) * float("inf"),
    }[values]
    scores, lengths = (
        scores.expand(2, -1).contiguous().to(device),
        torch.tensor([1077, 0], dtype=torch.int32, device=device),
    )
    for k in ks:  # of the two values, 154 are the higher one
        assert torch.equal(
            top_k_triton(scores, lengths, k, tune=tune), top_k_reference(scores, lengths, k)
        )


@on_each_device
def test_preselection_leaves_most_scores_unread(device):
    """Scores of groups well below the bound may be anything, since the kernel must not read
    them."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 64 * GROUP, generator=generator).to(device)
    lengths = torch.tensor([64 * GROUP], dtype=torch.int32, device=device)
    maxima, expected = maxima_of(scores, lengths), top_k_reference(scores, lengths, 8)
    bound = maxima.sort(descending=True).values[0, 15]  # of the 8th, and what a coarse one lets in
    poisoned = torch.where(
        (maxima < bound)[..., None], float("inf"), scores.view(1, 64, GROUP)
    ).view(1, -1)
    assert int((poisoned != scores).sum()) == 48 * GROUP
    assert torch.equal(top_k_triton(poisoned, lengths, 8, maxima, tune=SMALL), expected)
